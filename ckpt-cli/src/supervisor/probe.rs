// SPDX-License-Identifier: MIT OR Apache-2.0
//! The user's commands that are run again and again: `--dump-when` and `--health`.

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use ckpt_job::policy::Supervised;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::child::Running;

/// A command and its times.
#[derive(Debug)]
pub struct Probe {
    command: String,
    every: Duration,
    timeout: Duration,
    due: Instant,
    running: Option<(Running, Instant)>,
}

/// What a run of the command said.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Status 0.
    Yes,
    /// Another status, or too late; in words.
    No(String),
}

impl Probe {
    /// To be run for the first time after `every`.
    pub fn new(command: String, every: Duration, timeout: Duration) -> Probe {
        Probe { command, every, timeout, due: Instant::now() + every, running: None }
    }

    /// When [`Probe::turn`] has something to do, unless a child ends before.
    pub fn next(&self) -> Instant {
        self.running.as_ref().map_or(self.due, |(_, started)| *started + self.timeout)
    }

    /// Starts the command if it is due, and gives its answer once it has one.
    pub fn turn(&mut self, job: &Supervised, init: i32) -> Option<Answer> {
        let now = Instant::now();
        if let Some((running, started)) = &mut self.running {
            let answer = match running.finished() {
                Some(finished) if finished.code == 0 => Answer::Yes,
                Some(finished) => {
                    Answer::No(format!("status {} {}", finished.code, super::one_line(&finished.stderr)))
                }
                None if now >= *started + self.timeout => {
                    // With all that it started.
                    let _ = killpg(Pid::from_raw(running.pid()), Signal::SIGKILL);
                    running.wait();
                    Answer::No(format!("no answer within {:?}", self.timeout))
                }
                None => return None,
            };
            self.running = None;
            self.due = now + self.every;
            return Some(answer);
        }
        if now < self.due {
            return None;
        }
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", &self.command])
            .current_dir(&job.directory)
            .env_clear()
            .envs(job.environment.iter().map(|(name, value)| (name, value)))
            .env("CKPT_JOB", job.name.as_str())
            .env("CKPT_INIT_PID", init.to_string())
            .process_group(0);
        match Running::start(command, true) {
            Ok(running) => {
                self.running = Some((running, now));
                None
            }
            Err(error) => {
                self.due = now + self.every;
                Some(Answer::No(format!("it could not be started: {error}")))
            }
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some((running, _)) = &mut self.running {
            let _ = killpg(Pid::from_raw(running.pid()), Signal::SIGKILL);
            running.wait();
        }
    }
}
