// SPDX-License-Identifier: MIT OR Apache-2.0
//! One job under ckpt, driven through its command line, and killed when dropped.

use std::{cell::RefCell, time::Duration};

use nix::sys::signal::Signal;

use crate::{
    Failure, Outcome,
    process::{Finished, HostProcess, Running, poll_until},
    sandbox::Sandbox,
    stage::stage,
};

/// How long a ckpt command may take. Generous: many tests share few CPUs.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(60);
/// How long killed processes may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

/// The choices of `ckpt run`.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// With the interceptor.
    pub interceptor: bool,
    /// On a terminal of its own.
    pub tty: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        RunOptions { interceptor: true, tty: false }
    }
}

/// A job, its name in the registry, and the processes seen of it.
pub struct Job<'a> {
    sandbox: &'a Sandbox,
    ckpt: String,
    /// Its name in the registry and in the store.
    pub name: String,
    seen: RefCell<Vec<HostProcess>>,
}

impl<'a> Job<'a> {
    /// `ckpt run --detach` of `command` under `name`.
    ///
    /// # Errors
    /// ckpt is not built or refuses.
    pub fn run(
        sandbox: &'a Sandbox,
        name: &str,
        options: RunOptions,
        command: &[String],
    ) -> Outcome<Job<'a>> {
        Job::run_under(&[], sandbox, name, options, command)
    }

    /// Like [`Job::run`], with `ckpt run` itself started under the command `prefix`.
    ///
    /// # Errors
    /// ckpt is not built or refuses.
    pub fn run_under(
        prefix: &[String],
        sandbox: &'a Sandbox,
        name: &str,
        options: RunOptions,
        command: &[String],
    ) -> Outcome<Job<'a>> {
        Job::start_under(prefix, sandbox, name, options, &[], command)
    }

    /// Like [`Job::run`], with more options.
    ///
    /// # Errors
    /// ckpt is not built or refuses.
    pub fn run_with(sandbox: &'a Sandbox, name: &str, more: &[&str], command: &[String]) -> Outcome<Job<'a>> {
        Job::start_under(&[], sandbox, name, RunOptions::default(), more, command)
    }

    /// `ckpt run` in the foreground, beside the test, with more options. The job is there once its command says so.
    ///
    /// # Errors
    /// ckpt is not built or can't be started.
    pub fn run_attached(
        sandbox: &'a Sandbox,
        name: &str,
        more: &[&str],
        command: &[String],
    ) -> Outcome<(Job<'a>, Running)> {
        let ckpt = stage().ckpt()?.to_string_lossy().into_owned();
        let job = Job { sandbox, ckpt, name: name.to_owned(), seen: RefCell::default() };
        let store = sandbox.store.to_string_lossy().into_owned();
        let words = [&["run", "--name", name, "--store", &store], more, &["--"]].concat();
        let line: Vec<String> = job.line(&words).into_iter().chain(command.iter().cloned()).collect();
        let running = sandbox.start(&line, &[])?;
        Ok((job, running))
    }

    fn start_under(
        prefix: &[String],
        sandbox: &'a Sandbox,
        name: &str,
        options: RunOptions,
        more: &[&str],
        command: &[String],
    ) -> Outcome<Job<'a>> {
        let ckpt = stage().ckpt()?.to_string_lossy().into_owned();
        let job = Job { sandbox, ckpt, name: name.to_owned(), seen: RefCell::default() };
        let store = sandbox.store.to_string_lossy().into_owned();
        let mut words: Vec<&str> = vec!["run", "--name", name, "--store", &store, "--detach"];
        words.extend(more);
        if options.tty {
            words.push("--tty");
        }
        if !options.interceptor {
            words.push("--no-interceptor");
        }
        words.push("--");
        words.extend(command.iter().map(String::as_str));
        let line: Vec<String> = prefix.iter().cloned().chain(job.line(&words)).collect();
        let started = sandbox.execute(&line, &[], COMMAND_DEADLINE)?;
        if started.code != 0 {
            return Err(Failure(started.report()));
        }
        job.remember();
        Ok(job)
    }

    /// Runs `ckpt <words>`, with `environment` added; whatever its status.
    ///
    /// # Errors
    /// It could not be started or missed its deadline.
    pub fn ckpt(&self, words: &[&str], environment: &[(&str, &str)]) -> Outcome<Finished> {
        self.sandbox.execute(&self.line(words), environment, COMMAND_DEADLINE)
    }

    /// Runs `ckpt <words>`, whatever the status, itself started by the shell command line `before`, such as `ulimit -n 20`.
    ///
    /// # Errors
    /// It cannot be started or does not end.
    pub fn ckpt_after(&self, before: &str, words: &[&str]) -> Outcome<Finished> {
        let shell = ["sh", "-c", &format!("{before} && exec \"$@\""), "sh"].map(String::from);
        let line: Vec<String> = shell.into_iter().chain(self.line(words)).collect();
        self.sandbox.execute(&line, &[], COMMAND_DEADLINE)
    }

    /// Runs `ckpt <words>` and demands status 0.
    ///
    /// # Errors
    /// The command's report.
    pub fn succeed(&self, words: &[&str], environment: &[(&str, &str)]) -> Outcome<Finished> {
        let finished = self.ckpt(words, environment)?;
        if finished.code == 0 { Ok(finished) } else { Err(Failure(finished.report())) }
    }

    /// Starts `ckpt <words>` beside the test.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, words: &[&str], environment: &[(&str, &str)]) -> Outcome<Running> {
        self.sandbox.start(&self.line(words), environment)
    }

    fn line(&self, words: &[&str]) -> Vec<String> {
        std::iter::once(self.ckpt.as_str()).chain(words.iter().copied()).map(String::from).collect()
    }

    /// `ckpt dump NAME` followed by `options`.
    ///
    /// # Errors
    /// The command's report.
    pub fn dump(&self, options: &[&str]) -> Outcome<Finished> {
        self.remember();
        self.succeed(&[&["dump", self.name.as_str()], options].concat(), &[])
    }

    /// `ckpt restore --detach` of the newest checkpoint, or of `checkpoint` (a number), under the same name.
    ///
    /// # Errors
    /// The command's report.
    pub fn restore(&self, checkpoint: Option<u32>, environment: &[(&str, &str)]) -> Outcome<Finished> {
        let source = match checkpoint {
            Some(number) => format!("{}@{number}", self.name),
            None => self.name.clone(),
        };
        let restored = self.succeed(&["restore", &source, "--detach"], environment);
        self.remember();
        restored
    }

    /// A job that `ckpt restore … --name` made, adopted so that it is killed too.
    pub fn adopt(&self, name: &str) -> Job<'a> {
        let job = Job {
            sandbox: self.sandbox,
            ckpt: self.ckpt.clone(),
            name: name.to_owned(),
            seen: RefCell::default(),
        };
        job.remember();
        job
    }

    /// The job's pid 1, by its pid on the host, as `ckpt ps --json` tells it. `None` if the job doesn't run.
    pub fn init(&self) -> Option<HostProcess> {
        let line = self.line(&["ps", "--json"]);
        let listed =
            self.sandbox.start(&line, &[]).and_then(|running| running.finish(COMMAND_DEADLINE)).ok()?;
        let jobs: serde_json::Value = serde_json::from_str(&listed.stdout).ok()?;
        let init = init_pid_of(&jobs, &self.name).and_then(|pid| HostProcess::find(i32::try_from(pid).ok()?));
        if init.is_none() {
            self.sandbox.record(&format!("(ckpt ps --json does not name the job: {})", listed.stdout.trim()));
        }
        init
    }

    /// The processes of the job, pid 1 first; empty if it doesn't run.
    pub fn processes(&self) -> Vec<HostProcess> {
        self.init().map(HostProcess::tree).unwrap_or_default()
    }

    fn remember(&self) {
        let processes = self.processes();
        self.seen.borrow_mut().extend(processes);
    }

    /// SIGKILL to all of the job, and waits until all of it is gone.
    ///
    /// # Errors
    /// ckpt refuses, or something survives.
    pub fn kill(&self) -> Outcome<()> {
        let processes = self.processes();
        self.seen.borrow_mut().extend(&processes);
        self.succeed(&["kill", &self.name, "KILL"], &[])?;
        self.wait_gone(&processes)
    }

    /// SIGKILL to the job's pid 1 behind ckpt's back, as a machine that dies would, and waits until all of it is gone.
    ///
    /// # Errors
    /// The job doesn't run, or something survives.
    pub fn crash(&self) -> Outcome<()> {
        let processes = self.processes();
        let Some(init) = processes.first() else {
            return Err(Failure(format!("{} does not run", self.name)));
        };
        init.signal(Signal::SIGKILL);
        self.wait_gone(&processes)
    }

    fn wait_gone(&self, processes: &[HostProcess]) -> Outcome<()> {
        let alive = || processes.iter().filter(|process| process.is_alive()).count();
        poll_until(KILL_DEADLINE, || (alive() == 0).then_some(())).ok_or_else(|| {
            Failure(format!("{} of {} processes survive the kill of {}", alive(), processes.len(), self.name))
        })
    }
}

/// The pid of the job `name` in what `ckpt ps --json` printed: of the object that has both, the name perhaps deeper.
fn init_pid_of(value: &serde_json::Value, name: &str) -> Option<i64> {
    use serde_json::Value;
    fn bears(value: &Value, name: &str) -> bool {
        match value {
            Value::Object(fields) => {
                fields.get("name").and_then(Value::as_str) == Some(name)
                    || fields.values().filter(|value| value.is_object()).any(|value| bears(value, name))
            }
            _ => false,
        }
    }
    match value {
        Value::Array(items) => items.iter().find_map(|item| init_pid_of(item, name)),
        Value::Object(fields) => match fields.get("init_pid").and_then(Value::as_i64) {
            Some(pid) => bears(value, name).then_some(pid),
            None => fields.values().find_map(|value| init_pid_of(value, name)),
        },
        _ => None,
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        let _ = self.ckpt(&["kill", &self.name, "KILL"], &[]);
        self.remember();
        for process in self.seen.borrow().iter() {
            process.signal(Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::init_pid_of;

    #[test]
    fn finds_the_job_by_name_and_nothing_else() {
        let listed = serde_json::json!({"jobs": [
            {"name": "other", "init_pid": 4},
            {"status": {"record": {"name": "mine", "pid": 9}}, "init_pid": 5},
        ]});
        assert_eq!(init_pid_of(&listed, "mine"), Some(5));
        assert_eq!(init_pid_of(&listed, "other"), Some(4));
        assert_eq!(init_pid_of(&listed, "absent"), None);
        assert_eq!(init_pid_of(&serde_json::json!([]), "mine"), None);
    }
}
