// SPDX-License-Identifier: MIT OR Apache-2.0
//! The directory of one test: work directory of the guest, store, registry (`XDG_RUNTIME_DIR`), outputs of commands.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use crate::{
    Failure, Outcome,
    process::{Finished, Running},
    stage::stage,
    user::User,
};

/// Bound on the text of one log in a failure's message, in bytes.
const LOG_TAIL_BYTES: usize = 8192;

/// One test's directories and the record of what it did. Removed when dropped, unless the thread panics.
pub struct Sandbox {
    /// Holds the others.
    pub root: PathBuf,
    /// The guest's work directory.
    pub work: PathBuf,
    /// The store.
    pub store: PathBuf,
    /// The value of XDG_RUNTIME_DIR.
    pub runtime: PathBuf,
    /// As whom commands run.
    pub user: User,
    transcript: RefCell<String>,
    outputs: AtomicU32,
}

impl Sandbox {
    /// Makes the directories of the test called `label`.
    ///
    /// # Errors
    /// A directory cannot be made or given to the user.
    pub fn new(label: &str, user: User) -> Outcome<Sandbox> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = stage().root.join(format!("{number}-{label}-{}", user.name()));
        let [work, store, runtime] = ["work", "store", "run"].map(|name| root.join(name));
        for (dir, mode) in [(&root, 0o755), (&work, 0o755), (&store, 0o700), (&runtime, 0o700)] {
            fs::create_dir(dir)
                .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(mode)))
                .map_err(|error| Failure(format!("cannot create {}: {error}", dir.display())))?;
            user.give(dir)?;
        }
        fs::create_dir(root.join("out")).map_err(|error| Failure(format!("cannot create out: {error}")))?;
        let (transcript, outputs) = (RefCell::default(), AtomicU32::new(0));
        Ok(Sandbox { root, work, store, runtime, user, transcript, outputs })
    }

    /// The environment of commands, without anything of the tester's own.
    pub fn environment(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        [
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
            ("HOME", text(&self.work)),
            ("XDG_RUNTIME_DIR", text(&self.runtime)),
            ("CKPT_STORE", text(&self.store)),
            // By this the processes of a job are found: a ckpt with the feature test-hooks hands it on to its pid 1, which
            // has nothing else in its environment.
            ("CKPT_TEST_SANDBOX", text(&self.root)),
            ("LC_ALL", "C".to_owned()),
            ("TERM", "dumb".to_owned()),
            ("RUST_BACKTRACE", "1".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .to_vec()
    }

    /// Starts a command as the sandbox's user, with `extra` added to its environment.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, words: &[String], extra: &[(&str, &str)]) -> Outcome<Running> {
        let mut line = self.user.command_prefix();
        line.extend_from_slice(words);
        let mut environment = self.environment();
        environment.extend(extra.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let number = self.outputs.fetch_add(1, Ordering::Relaxed);
        let set: String = extra.iter().map(|(key, value)| format!("{key}={value} ")).collect();
        self.record(&format!("$ {set}{}", line.join(" ")));
        Running::start(&line, &environment, &self.root.join("out"), &format!("{number:02}"))
    }

    /// Runs a command to its end; what it printed is recorded, whatever its status.
    ///
    /// # Errors
    /// It cannot be started or missed `deadline`.
    pub fn execute(&self, words: &[String], extra: &[(&str, &str)], deadline: Duration) -> Outcome<Finished> {
        let finished = self.start(words, extra)?.finish(deadline)?;
        self.record(&format!("{}{}[status {}]", finished.stdout, finished.stderr, finished.code));
        Ok(finished)
    }

    /// Adds a line to the record that a failure prints.
    pub fn record(&self, line: &str) {
        let mut transcript = self.transcript.borrow_mut();
        transcript.push_str(line);
        transcript.push('\n');
    }

    /// All that a reader of a failure needs: the commands, what they printed, the guest's files, the logs of the job.
    pub fn report(&self) -> String {
        let mut report = format!("--- commands, as {}\n{}", self.user.name(), self.transcript.borrow());
        let mut logs = Vec::new();
        for (dir, is_ours) in
            [(&self.work, true), (&self.runtime, false), (&self.store, false), (&self.root.join("out"), true)]
        {
            find_logs(dir, is_ours, 6, &mut logs);
        }
        logs.sort();
        for path in logs {
            let bytes = fs::read(&path).unwrap_or_default();
            if !bytes.is_empty() {
                let tail = &bytes[bytes.len().saturating_sub(LOG_TAIL_BYTES)..];
                report.push_str(&format!(
                    "--- {}\n{}\n",
                    path.display(),
                    String::from_utf8_lossy(tail).trim_end()
                ));
            }
        }
        report
    }
}

/// Regular files of the guest (`all`), or those whose name says log.
fn find_logs(dir: &Path, all: bool, depth: u32, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let name = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() && depth > 0 {
            find_logs(&entry.path(), all, depth - 1, found);
        } else if kind.is_file() && (all || name.contains("log")) {
            found.push(entry.path());
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.root);
        }
    }
}
