// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a launcher tells init to build, and what it leaves in the registry for those who come later.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use ckpt_abi::init_protocol::WindowSize;
use serde::{Deserialize, Serialize};

use crate::name::JobName;
use crate::policy::Supervised;

/// What a job is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Work {
    /// Run a command.
    Command {
        /// Program and arguments.
        argv: Vec<OsString>,
        /// The whole environment, before the interceptor is added.
        environment: Vec<(OsString, OsString)>,
    },
    /// Bring a checkpoint back; only the restoring code knows what this says.
    Restore(serde_json::Value),
}

/// What the clocks of a restored job are to show, absolutely, when its namespaces are made.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct TimeTarget {
    /// CLOCK_MONOTONIC in nanoseconds.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME in nanoseconds.
    pub boottime_ns: i64,
}

/// Everything that init needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// The job's name; no other live job may have it.
    pub name: JobName,
    /// Where the job's checkpoints go; absolute, UTF-8.
    pub store: PathBuf,
    /// Command or restore.
    pub work: Work,
    /// Give the job a terminal of its own.
    pub tty: bool,
    /// The terminal's size at the start.
    pub window: Option<(u16, u16)>,
    /// Nobody stays attached: output goes to the log, input is empty.
    pub detach: bool,
    /// The interceptor to preload into a command.
    pub interceptor: Option<PathBuf>,
    /// Host name inside the job, if not the host's.
    pub hostname: Option<OsString>,
    /// NIS domain name inside the job, if not the host's.
    pub domainname: Option<OsString>,
    /// Clocks inside the job, if not the host's.
    pub time: Option<TimeTarget>,
    /// Where output goes when nobody is attached; absolute, UTF-8.
    pub log: PathBuf,
    /// The checkpoint that this job came from, as the user named it.
    pub restored_from: Option<String>,
    /// The command of a restored job, as text; that of others is in `work`.
    pub restored_command: Vec<String>,
    /// The restore makes the job's memory mergeable, to be shared with other copies of it.
    pub mergeable: bool,
    /// Dumps save the content of files that the job has open for writing.
    pub with_files: bool,
    /// What dumps do about TCP connections, in the words of the command line; `None` if nothing was said.
    pub tcp: Option<String>,
    /// What a supervisor is to do.
    pub supervised: Option<Supervised>,
    /// Started by its supervisor, for its next run.
    pub by_supervisor: bool,
}

impl LaunchSpec {
    /// The window size to start the terminal with.
    pub fn window_size(&self) -> Option<WindowSize> {
        self.window.map(|(rows, columns)| WindowSize { rows, columns, ..WindowSize::default() })
    }
}

/// An fd that came from outside: what it was when the job started, so that a dump recognises it by device, inode and access
/// mode, and a person by its description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalRecord {
    /// The number that the launcher had it under, and the command gets it under.
    pub number: i32,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// `st_rdev`.
    pub special_device: u64,
    /// `st_mode`, type and permissions.
    pub mode: u32,
    /// File status flags as `F_GETFL` gives them (access mode, `O_APPEND` …).
    pub flags: i32,
    /// What /proc/self/fd/N links to, as text.
    pub description: String,
}

/// An external fd in init's hands.
#[derive(Debug)]
pub struct External {
    /// What it is.
    pub record: ExternalRecord,
    /// Where init holds it until the job runs: close-on-exec, under a number that no external fd of the job has, and from
    /// 512 on if RLIMIT_NOFILE allows.
    pub fd: OwnedFd,
}

/// What only init has to know, put together by [`crate::launch()`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct InitSpec {
    pub spec: LaunchSpec,
    pub externals: Vec<ExternalRecord>,
    /// All fds that the launcher was started with, also those that are replaced.
    pub inherited: Vec<i32>,
    /// Standard fds that the launcher was started without.
    pub closed: Vec<i32>,
    pub ignored_signals: Vec<i32>,
    pub blocked_signals: u64,
    /// Soft and hard RLIMIT_NOFILE of the launcher.
    pub open_files_limit: (u64, u64),
    pub user_namespace: bool,
    /// Seconds since the epoch.
    pub started: u64,
}

/// `job.json` in the registry: what does not change while the job lives.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobRecord {
    /// The job's name.
    pub name: JobName,
    /// The protocol its init speaks.
    pub protocol_version: u16,
    /// Pid of the main process inside the job.
    pub main_pid: i32,
    /// When this run of the job began, in seconds since the epoch.
    pub started: u64,
    /// Where its checkpoints go.
    pub store: PathBuf,
    /// Where its output goes while nobody is attached.
    pub log: PathBuf,
    /// The command, as text.
    pub command: Vec<String>,
    /// The checkpoint that it came from.
    pub restored_from: Option<String>,
    /// Dumps save the content of files that the job has open for writing.
    #[serde(default)]
    pub with_files: bool,
    /// What dumps do about TCP connections, in the words of the command line.
    #[serde(default)]
    pub tcp: Option<String>,
    /// Whether it has a terminal of its own.
    pub tty: bool,
    /// Whether it has a user namespace of its own.
    pub user_namespace: bool,
    /// Whether it has a /proc of its own; if not, it sees the host's.
    pub fresh_proc: bool,
    /// The fds that came from outside.
    pub external: Vec<ExternalRecord>,
    /// Its restore has made its memory mergeable.
    #[serde(default)]
    pub mergeable: bool,
    /// The slave of its terminal, as the job sees it.
    pub terminal: Option<PathBuf>,
}
