// SPDX-License-Identifier: MIT OR Apache-2.0
//! The executables of a run of the tests, copied to where a plain user may execute them.
//!
//! `/tmp/ckpt-tests-<key>-<pid>/` holds `bin/` (ckpt, its interceptor, the guests) and one directory per test. Those of
//! failed tests stay until the next run from the same target directory. CKPT_TEST_STAGE names an empty directory to be used
//! instead, and then it is for whoever made it to remove it.

use std::{
    collections::HashSet,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
};

use crate::{Failure, Outcome};

/// The directories of this run.
pub struct Stage {
    /// Holds all of this run.
    pub root: PathBuf,
    /// Executables.
    pub bin: PathBuf,
    done: Mutex<HashSet<String>>,
}

/// The profile's directory in cargo's target directory (`target/debug`): the parent of the test executable's `deps`.
fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let dir = test.parent().expect("a directory");
    if dir.ends_with("deps") { dir.parent().expect("a directory").to_owned() } else { dir.to_owned() }
}

fn create_open(dir: &Path) {
    fs::create_dir_all(dir)
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(0o755)))
        .unwrap_or_else(|error| panic!("cannot create {}: {error}", dir.display()));
}

/// The stage of this run, set up by the first who asks.
pub fn stage() -> &'static Stage {
    static STAGE: OnceLock<Stage> = OnceLock::new();
    STAGE.get_or_init(|| {
        if let Some(root) = std::env::var_os("CKPT_TEST_STAGE").map(PathBuf::from) {
            let bin = root.join("bin");
            create_open(&root);
            create_open(&bin);
            return Stage { root, bin, done: Mutex::new(HashSet::new()) };
        }
        let mut hasher = DefaultHasher::new();
        profile_dir().hash(&mut hasher);
        let prefix = format!("ckpt-tests-{:08x}-", hasher.finish() as u32);
        for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let of_dead_run = name.to_str().and_then(|name| name.strip_prefix(&prefix)).is_some_and(|pid| {
                pid.parse().is_ok_and(|pid: u32| !Path::new(&format!("/proc/{pid}")).exists())
            });
            if of_dead_run {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let root = Path::new("/tmp").join(format!("{prefix}{}", std::process::id()));
        let bin = root.join("bin");
        create_open(&root);
        create_open(&bin);
        Stage { root, bin, done: Mutex::new(HashSet::new()) }
    })
}

fn tool(command: &mut Command) -> Outcome<()> {
    let output = command.output().map_err(|error| Failure(format!("cannot start {command:?}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure(format!("{command:?} failed:\n{}", String::from_utf8_lossy(&output.stderr))))
}

impl Stage {
    /// Copies `source` to `bin/<name>` once and returns the copy's path.
    ///
    /// # Errors
    /// The copy failed.
    pub fn copy(&self, source: &Path, name: &str) -> Outcome<PathBuf> {
        let target = self.bin.join(name);
        self.once(name, || {
            // By another process: if this one held the file open for writing while another test thread forks, executing
            // the copy would give ETXTBSY.
            tool(Command::new("install").args(["-m", "0755"]).arg(source).arg(&target))
        })?;
        Ok(target)
    }

    /// Builds a C program of `guests/` with gcc (its cached copy is kept in the target directory) and stages it.
    /// Extra flags stand in the source, in a line `// build: FLAGS`. Where there is no compiler, CKPT_TEST_GUESTS names a
    /// directory that has them all.
    ///
    /// # Errors
    /// The compiler's.
    pub fn compile(&self, source: &str, is_static: bool) -> Outcome<PathBuf> {
        let name = format!("{source}{}", if is_static { "-static" } else { "" });
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
        let file = sources.join(format!("{source}.c"));
        let cache = profile_dir().join("guests");
        let built = cache.join(&name);
        let target = self.bin.join(&name);
        if let Some(ready) = std::env::var_os("CKPT_TEST_GUESTS") {
            return self.copy(&Path::new(&ready).join(&name), &name);
        }
        self.once(&format!("guest {name}"), || {
            let text = fs::read_to_string(&file)
                .map_err(|error| Failure(format!("cannot read the guest {}: {error}", file.display())))?;
            let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
            let built_at = modified(&built);
            let is_fresh = built_at.is_some()
                && built_at > modified(&file)
                && built_at > modified(&sources.join("guest.h"));
            if !is_fresh {
                create_open(&cache);
                let draft = cache.join(format!(".{name}.{}", std::process::id()));
                let flags = text.lines().find_map(|line| line.strip_prefix("// build: ")).unwrap_or("");
                tool(
                    Command::new(std::env::var("CC").unwrap_or_else(|_| "gcc".into()))
                        .args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"])
                        .args(is_static.then_some("-static"))
                        .arg("-o")
                        .arg(&draft)
                        .arg(&file)
                        .args(flags.split_whitespace()),
                )?;
                fs::rename(&draft, &built)
                    .map_err(|error| Failure(format!("cannot rename {}: {error}", draft.display())))?;
            }
            tool(Command::new("install").args(["-m", "0755"]).arg(&built).arg(&target))
        })?;
        Ok(target)
    }

    /// The staged ckpt with its interceptor beside it. `CKPT_BIN` names it, else it is looked for beside the tests in
    /// the target directory.
    ///
    /// # Errors
    /// There is none; the message says how to build it.
    pub fn ckpt(&self) -> Outcome<PathBuf> {
        let binary = match std::env::var_os("CKPT_BIN") {
            Some(path) => PathBuf::from(path),
            None => profile_dir().join("ckpt"),
        };
        if !binary.is_file() {
            return Err(Failure(format!(
                "there is no ckpt at {}: build it first (cargo build --workspace --features ckpt-cli/test-hooks) or \
                 name it with CKPT_BIN",
                binary.display()
            )));
        }
        let beside = binary.parent().unwrap_or(Path::new("."));
        const INTERCEPTOR: &str = "libckpt_interceptor.so";
        for dir in [beside.to_owned(), beside.join("../lib/ckpt")] {
            if dir.join(INTERCEPTOR).is_file() {
                self.copy(&dir.join(INTERCEPTOR), INTERCEPTOR)?;
                break;
            }
        }
        self.copy(&binary, "ckpt")
    }

    fn once(&self, key: &str, make: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
        // Held while making, so that nobody uses a half-made file. Poisoned only if making panicked: nothing is recorded then.
        let mut done = self.done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !done.contains(key) {
            make()?;
            done.insert(key.to_owned());
        }
        Ok(())
    }
}
