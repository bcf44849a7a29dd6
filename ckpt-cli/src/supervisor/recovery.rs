// SPDX-License-Identifier: MIT OR Apache-2.0
//! `--recover`: a job that failed is started again, from its newest checkpoint or anew.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::{Duration, Instant};

use anyhow::Result;
use ckpt_image::store::Store;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd as _;

use super::{Supervisor, child, one_line};
use crate::exit_code::ExitCode;

/// The longest pause before a recovery.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How often the job may fail from one checkpoint.
const CHANCES: u32 = 2;

/// What has been tried since the job's last progress.
#[derive(Debug, Default)]
pub struct Recovery {
    /// Recoveries since the last new checkpoint.
    in_a_row: u32,
    /// The checkpoint that the present run came from; none: it was started anew.
    from: Option<u64>,
    /// How often the job failed from a checkpoint without making another.
    failed: BTreeMap<u64, u32>,
}

impl Recovery {
    /// A new checkpoint was made.
    pub fn progress(&mut self) {
        *self = Recovery::default();
    }

    fn skips(&self, number: u64) -> bool {
        self.failed.get(&number).is_some_and(|failed| *failed >= CHANCES)
    }
}

/// The pause before the `nth` recovery in a row, counted from 0.
fn pause(first: Duration, nth: u32) -> Duration {
    first.saturating_mul(2u32.saturating_pow(nth)).min(LONGEST_PAUSE.max(first))
}

impl Supervisor {
    /// Starts the failed job again; false if that is given up.
    pub(super) fn recover(&mut self) -> Result<bool> {
        let Some(recover) = self.policy().recover else { return Ok(false) };
        if let Some(from) = self.recovery.from.take() {
            let failed = self.recovery.failed.entry(from).or_default();
            *failed += 1;
            if *failed == CHANCES {
                let name = &self.job.name;
                self.journal.event(&format!(
                    "the job failed {CHANCES} times from {name}@{from} without a new checkpoint: skipping it"
                ));
            }
        }
        loop {
            if self.recovery.in_a_row >= recover.max {
                self.journal.event(&format!(
                    "gave up after {} recoveries without a new checkpoint",
                    self.recovery.in_a_row
                ));
                return self.give_up();
            }
            let first = self.policy().recover_delay.map_or(Duration::from_secs(1), |span| span.duration());
            let delay = pause(first, self.recovery.in_a_row);
            self.journal.restart_in(delay);
            if !self.pause_for(delay)? {
                self.journal.event("told to end the job: it is not recovered");
                return self.give_up();
            }
            self.recovery.in_a_row += 1;
            let attempt = format!("recovery {} of {}", self.recovery.in_a_row, recover.max);
            match self.start_again()? {
                Ok(how) => {
                    self.journal.restarted(&format!("{how} ({attempt})"));
                    return Ok(true);
                }
                Err(why) => self.journal.event(&format!("{attempt} failed: {why}")),
            }
        }
    }

    fn give_up(&mut self) -> Result<bool> {
        self.journal.last_run(self.registry.run_of(&self.job.name));
        Ok(false)
    }

    /// Waits; false if somebody wants the job to end meanwhile.
    fn pause_for(&mut self, delay: Duration) -> Result<bool> {
        let until = Instant::now() + delay;
        self.leaving = false;
        loop {
            self.take_signals();
            if self.leaving || self.wanted.take().is_some_and(|wanted| wanted.stop) {
                return Ok(false);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(true);
            }
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Tries the checkpoints from the newest on, then the command. Says what was started, or why nothing was.
    fn start_again(&mut self) -> Result<Result<String, String>> {
        let name = self.job.name.clone();
        let entries = Store::open(&self.job.store)?.list_job(name.as_str())?;
        for number in entries.iter().rev().map(|entry| entry.number) {
            if self.recovery.skips(number) {
                continue;
            }
            let mut command = self.ckpt();
            command.arg("restore").arg(format!("{name}@{number}")).arg("--name").arg(name.as_str());
            command.arg("--store").arg(&self.job.store).args(&self.job.policy.restore_options);
            if self.job.detach || self.job.tty {
                command.arg("--detach");
            }
            let finished = child::launch(command, &[], &self.inherited);
            let said = one_line(&finished.stderr);
            match u8::try_from(finished.code).map(ExitCode) {
                Ok(ExitCode::SUCCESS) => {
                    if !said.is_empty() {
                        self.journal.event(&said);
                    }
                    self.recovery.from = Some(number);
                    return Ok(Ok(format!("restored from {name}@{number}")));
                }
                Ok(ExitCode::CORRUPT | ExitCode::NOT_FOUND) => {
                    self.journal.event(&format!("{name}@{number} is skipped: {said}"));
                }
                _ => return Ok(Err(format!("restoring {name}@{number}: {said}"))),
            }
        }
        let mut command = self.ckpt();
        command.env_clear().envs(self.job.environment.iter().map(|(name, value)| (name, value)));
        command.arg("run").arg("--name").arg(name.as_str()).arg("--store").arg(&self.job.store);
        command.arg(if self.job.tty { "--tty" } else { "--no-tty" });
        if self.job.detach || self.job.tty {
            command.arg("--detach");
        }
        if self.job.policy.restore_options.iter().any(|option| option == "--rollback-files") {
            command.arg("--with-files");
        }
        if !self.job.interceptor {
            command.arg("--no-interceptor");
        }
        let rest: Vec<OsString> =
            std::iter::once(OsString::from("--")).chain(self.job.argv.iter().cloned()).collect();
        let finished = child::launch(command, &rest, &self.inherited);
        self.recovery.from = None;
        Ok(match finished.code {
            0 => Ok("started anew".to_owned()),
            _ => Err(format!("starting it anew: {}", one_line(&finished.stderr))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_bound() {
        let second = Duration::from_secs(1);
        let pauses = [0, 1, 2, 8, 9, 60].map(|nth| pause(second, nth).as_secs());
        assert_eq!(pauses, [1, 2, 4, 256, 300, 300]);
        assert_eq!(pause(Duration::from_secs(600), 3).as_secs(), 600);
    }

    #[test]
    fn a_checkpoint_has_two_chances_until_there_is_progress() {
        let mut recovery = Recovery { from: Some(3), ..Recovery::default() };
        recovery.failed.insert(3, 1);
        assert!(!recovery.skips(3));
        recovery.failed.insert(3, 2);
        assert!(recovery.skips(3) && !recovery.skips(2));
        recovery.progress();
        assert!(!recovery.skips(3));
    }
}
