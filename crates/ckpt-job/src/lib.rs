// SPDX-License-Identifier: MIT OR Apache-2.0
//! A job: its namespaces, its init, its registry entry and its terminal.
//!
//! # Who is who
//! * The *launcher*: `ckpt run` or `ckpt restore`. It forks an intermediate process that unshares the namespaces and from
//!   there init, as its own sibling, so that init is the launcher's child ([`launch()`]).
//! * *init*: pid 1 of the job, the same binary executed anew inside the namespaces ([`init_main`]). It builds the job's
//!   mounts and terminal, starts the work (a command, or a restore), and then *commits*: until then init dies with the
//!   launcher, and everything in its pid namespace with it; from then on only a SIGKILL on init ends the job.
//! * *clients*: everyone who asks init something through its socket ([`client`]).
//!
//! # The life of a job
//! A job lives as long as any of its processes, init aside. The *main process* is the command of `ckpt run`; its exit status
//! is the job's. What it leaves behind goes on in the job.
#![forbid(unsafe_code)]

pub mod attachment;
mod channel;
pub mod client;
pub mod command;
pub mod external;
mod init;
pub mod launch;
mod mounts;
pub mod name;
pub mod namespaces;
pub mod policy;
pub mod probe;
pub mod registry;
pub mod spec;
mod supervise;
pub mod supervision;

pub use attachment::foreground;
pub use client::{
    JobStatus, Kept, LiveJob, MissingMemory, WaitOutcome, keep, kill, live_jobs, settle, status, take, wait,
};
pub use init::{
    Fetching, INIT_ARGUMENT, InitContext, JobPty, Progress, StartError, StartErrorClass, Started, init_main,
    open_log,
};
pub use launch::{Job, LaunchError, launch};
pub use name::{JobName, made_up_name};
pub use registry::{LockGuard, Registry, RegistryError, lock_for_dump};
pub use spec::{External, ExternalRecord, LaunchSpec, TimeTarget, Work};

/// How the main process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited with this code.
    Exited(u8),
    /// This signal killed it.
    Signalled(u8),
}

impl ExitStatus {
    /// From a status as `waitpid(2)` gives it; `None` if it tells of no end.
    pub fn from_wait_status(status: i32) -> Option<ExitStatus> {
        if libc::WIFEXITED(status) {
            Some(ExitStatus::Exited(libc::WEXITSTATUS(status) as u8))
        } else if libc::WIFSIGNALED(status) {
            Some(ExitStatus::Signalled(libc::WTERMSIG(status) as u8))
        } else {
            None
        }
    }

    /// The status as `waitpid(2)` gives it (without the core dump bit).
    pub fn to_wait_status(self) -> i32 {
        match self {
            ExitStatus::Exited(code) => i32::from(code) << 8,
            ExitStatus::Signalled(signal) => i32::from(signal),
        }
    }

    /// The status as a shell shows it: the code, or 128 + the signal.
    pub fn shell_code(self) -> u8 {
        match self {
            ExitStatus::Exited(code) => code,
            ExitStatus::Signalled(signal) => 128u8.saturating_add(signal),
        }
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitStatus::Exited(code) => write!(f, "exited with status {code}"),
            ExitStatus::Signalled(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_survives_encoding() {
        for status in [ExitStatus::Exited(0), ExitStatus::Exited(255), ExitStatus::Signalled(9)] {
            assert_eq!(ExitStatus::from_wait_status(status.to_wait_status()), Some(status));
        }
        assert_eq!(ExitStatus::from_wait_status(0x137f), None, "stopped is not ended");
        assert_eq!(ExitStatus::Signalled(15).shell_code(), 143);
    }
}
