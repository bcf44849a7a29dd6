// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands with a deadline, conditions with a deadline, and processes named so that a reused pid is never hit.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Pid};

use crate::{Failure, Outcome};

/// Between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Looks at `condition` until it gives a value; `None` when `deadline` has passed.
pub fn poll_until<T>(deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// What a finished command left.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The command line as a person would type it.
    pub command_line: String,
    /// The exit status: 0-255, or 128 + signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// The command line, its status and all it printed.
    pub fn report(&self) -> String {
        format!("$ {}\n{}{}[status {}]\n", self.command_line, self.stdout, self.stderr, self.code)
    }
}

/// A command that runs beside the test, killed when dropped.
pub struct Running {
    child: std::process::Child,
    command_line: String,
    stdout: std::path::PathBuf,
    stderr: std::path::PathBuf,
}

impl Running {
    /// Starts `words` with exactly the environment `environment`; its output goes to files in `output_dir` called
    /// `label`.out and .err. Files, because a pipe would stay open as long as a job that inherited it.
    ///
    /// # Errors
    /// The command cannot be started.
    pub fn start(
        words: &[String],
        environment: &[(String, String)],
        output_dir: &Path,
        label: &str,
    ) -> Outcome<Running> {
        let file = |extension: &str| {
            let path = output_dir.join(format!("{label}.{extension}"));
            File::create(&path)
                .map(|file| (file, path.clone()))
                .map_err(|error| Failure(format!("cannot create {}: {error}", path.display())))
        };
        let ((out, stdout), (err, stderr)) = (file("out")?, file("err")?);
        let command_line = words.join(" ");
        let child = Command::new(&words[0])
            .args(&words[1..])
            .env_clear()
            .envs(environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .map_err(|error| Failure(format!("cannot start {command_line}: {error}")))?;
        Ok(Running { child, command_line, stdout, stderr })
    }

    /// The host pid of the command.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// `deadline` passed; the command is killed then.
    pub fn finish(mut self, deadline: Duration) -> Outcome<Finished> {
        use std::os::unix::process::ExitStatusExt;
        let status = poll_until(deadline, || self.child.try_wait().ok().flatten());
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        let (stdout, stderr) = (read(&self.stdout), read(&self.stderr));
        let command_line = self.command_line.clone();
        match status {
            Some(status) => {
                let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                Ok(Finished { command_line, code, stdout, stderr })
            }
            None => {
                Err(Failure(format!("$ {command_line}\n{stdout}{stderr}[not finished after {deadline:?}]\n")))
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A process on the host, told apart from a later one of the same pid by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostProcess {
    /// Pid as the harness sees it.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat, in clock ticks since boot.
    start_time: u64,
}

/// The fields of /proc/PID/stat that the harness uses.
struct Stat {
    state: char,
    parent: i32,
    start_time: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    stat_of(Path::new(&format!("/proc/{pid}/stat")))
}

fn stat_of(path: &Path) -> Option<Stat> {
    let text = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&text);
    // The name may hold blanks and parentheses: what follows the last one is plain.
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

impl HostProcess {
    /// The process that has `pid` now.
    pub fn find(pid: i32) -> Option<HostProcess> {
        stat(pid).map(|stat| HostProcess { pid, start_time: stat.start_time })
    }

    /// Whether it still runs. A zombie doesn't: pid 1 of a container may reap late.
    pub fn is_alive(self) -> bool {
        stat(self.pid)
            .is_some_and(|stat| stat.start_time == self.start_time && !matches!(stat.state, 'Z' | 'X'))
    }

    /// Whether all of its threads are stopped by a signal.
    pub fn is_stopped(self) -> bool {
        let same = stat(self.pid).is_some_and(|stat| stat.start_time == self.start_time);
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        // A thread that is on its way to its stop still writes to its stack.
        let mut states =
            threads.filter_map(|thread| stat_of(&thread.path().join("stat"))).map(|stat| stat.state);
        same && states.all(|state| matches!(state, 'T' | 'Z' | 'X'))
    }

    /// Sends `signal` unless the process is gone.
    pub fn signal(self, signal: Signal) {
        if self.is_alive() {
            let _ = nix::sys::signal::kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Itself and all its descendants, parents before children, zombies included.
    pub fn tree(self) -> Vec<HostProcess> {
        let mut all: Vec<(i32, HostProcess)> = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok())
                && let Some(stat) = stat(pid)
            {
                all.push((stat.parent, HostProcess { pid, start_time: stat.start_time }));
            }
        }
        let mut tree = vec![self];
        let mut next = 0;
        while next < tree.len() {
            let parent = tree[next].pid;
            tree.extend(all.iter().filter(|(of, _)| *of == parent).map(|(_, process)| *process));
            next += 1;
        }
        tree
    }
}
