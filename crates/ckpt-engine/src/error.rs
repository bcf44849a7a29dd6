// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors of dump and restore.

use ckpt_image::codec::CodecError;
use ckpt_image::{ReadError, WriteError};
use ckpt_sys::Errno;
use ckpt_sys::area::RemoteError;
use ckpt_sys::inject::InjectError;
use std::fmt;
use std::path::PathBuf;

/// One thing that can't be checkpointed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Refusal {
    /// Process, as it sees itself; 0 for the job as a whole.
    pub pid: i32,
    /// Descriptor, if it is about one.
    pub fd: Option<i32>,
    /// What it is.
    pub what: String,
    /// What to do.
    pub advice: String,
    /// It will soon be over by itself: a barrier waits for it.
    #[serde(skip)]
    pub passing: bool,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, self.fd) {
            (0, _) => write!(f, "{}", self.what)?,
            (pid, None) => write!(f, "pid {pid}: {}", self.what)?,
            (pid, Some(fd)) => write!(f, "pid {pid} fd {fd}: {}", self.what)?,
        }
        if self.advice.is_empty() { Ok(()) } else { write!(f, "; {}", self.advice) }
    }
}

/// All of them: a dump is refused once, with everything that stands in its way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refusals(pub Vec<Refusal>);

impl Refusals {
    /// Adds one about a process.
    pub fn process(&mut self, pid: i32, what: impl Into<String>, advice: impl Into<String>) {
        self.0.push(Refusal { pid, fd: None, what: what.into(), advice: advice.into(), passing: false });
    }

    /// Adds one about a descriptor.
    pub fn fd(&mut self, pid: i32, fd: i32, what: impl Into<String>, advice: impl Into<String>) {
        self.0.push(Refusal { pid, fd: Some(fd), what: what.into(), advice: advice.into(), passing: false });
    }

    /// Adds one about a descriptor, or a process, that will soon be over by itself.
    pub fn passing(&mut self, pid: i32, fd: Option<i32>, what: impl Into<String>, advice: impl Into<String>) {
        self.0.push(Refusal { pid, fd, what: what.into(), advice: advice.into(), passing: true });
    }

    /// Whether all of them will soon be over.
    pub fn all_passing(&self) -> bool {
        self.0.iter().all(|r| r.passing)
    }

    /// Those that will not be over by themselves.
    pub fn lasting(mut self) -> Refusals {
        self.0.retain(|r| !r.passing);
        self
    }

    /// An error if there are any.
    ///
    /// # Errors
    /// [`DumpError::Refused`].
    pub fn check(mut self) -> Result<(), DumpError> {
        self.0.sort();
        self.0.dedup();
        if self.0.is_empty() { Ok(()) } else { Err(DumpError::Refused(self)) }
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for r in &self.0 {
            write!(f, "\n  {r}")?;
        }
        Ok(())
    }
}

/// Why a dump failed. The application runs on as before in each case.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// State that ckpt can't save.
    #[error("the job can't be checkpointed now; it runs on undisturbed:{0}")]
    Refused(Refusals),
    /// The job is gone.
    #[error("the job ended while it was being dumped")]
    JobEnded,
    /// A signal asks for the dump not to be made.
    #[error("interrupted by {0}; the job runs on")]
    Interrupted(ckpt_sys::Signal),
    /// Processes that did not reach a safe point in time, and the dump was not to be made without.
    #[error(
        "the job did not come to a safe point within {} s; it runs on undisturbed:{late}\n\
         Dump again, with a longer --barrier-timeout, or without --strict",
        timeout.as_secs_f64()
    )]
    Late {
        /// How long they were waited for.
        timeout: std::time::Duration,
        /// Who.
        late: crate::dump::barrier::LateList,
    },
    /// A task that can't be stopped.
    #[error("pid {pid}: {reason}")]
    NotStopped {
        /// The process, as it sees itself.
        pid: i32,
        /// Why.
        reason: String,
    },
    /// A system call on a process failed.
    #[error("pid {pid}: {what}: {source}")]
    Process {
        /// The process, as it sees itself.
        pid: i32,
        /// What was tried.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A system call on a descriptor failed.
    #[error("pid {pid} fd {fd}: {what}: {source}")]
    Descriptor {
        /// The process, as it sees itself.
        pid: i32,
        /// The descriptor.
        fd: i32,
        /// What was tried.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A call in a live task failed.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Too little memory for the copy.
    #[error(
        "copying the job's {needed_bytes} bytes of memory needs more than the {available_bytes} bytes that are free; \
         the job runs on. Free memory or dump when the job is smaller"
    )]
    Memory {
        /// Bytes needed.
        needed_bytes: u64,
        /// Bytes available.
        available_bytes: u64,
    },
    /// The snapshot engine that was asked for can't be used.
    #[error("--engine {engine} can't be used: {why}; without the option the best engine that can is used")]
    NoEngine {
        /// Its name.
        engine: &'static str,
        /// Why not.
        why: String,
    },
    /// A frozen copy is gone.
    #[error(
        "the frozen copy of pid {pid} was killed before all of it was written, by the OOM killer or by somebody else; the \
         job runs on. Dump again; with --engine copy the job stands still for longer, but nothing of it can be lost"
    )]
    CopyLost {
        /// The process, as it sees itself.
        pid: i32,
    },
    /// The frozen copies were given up for lack of memory.
    #[error(
        "the dump was given up before the job was short of memory: the limit of {group} left only {free_bytes} bytes; the \
         job runs on. Raise the limit, dump to a faster store, or dump with --engine copy"
    )]
    MemoryLimit {
        /// Directory of the control group.
        group: PathBuf,
        /// Bytes up to its limit.
        free_bytes: u64,
    },
    /// The frozen copies were given up because the job had written too much.
    #[error(
        "the dump was given up: the job has written to {bytes} bytes of its memory since it was frozen, and \
         --duplicate-limit allows {limit_bytes}; the job runs on. Raise the limit, dump to a faster store or when the job \
         writes less, or dump with --engine copy"
    )]
    Duplicated {
        /// Bytes that were held twice.
        bytes: u64,
        /// Bytes allowed.
        limit_bytes: u64,
    },
    /// Too little room in the store.
    #[error("the checkpoint needs about {needed_bytes} bytes, {path} has {available_bytes} bytes free")]
    Space {
        /// Bytes needed.
        needed_bytes: u64,
        /// Bytes available.
        available_bytes: u64,
        /// The store.
        path: PathBuf,
    },
    /// Writing the image failed.
    #[error(transparent)]
    Image(WriteError),
    /// State too large for a record.
    #[error(transparent)]
    Record(#[from] CodecError),
}

impl std::convert::From<WriteError> for DumpError {
    /// What was ours before it passed through the writer is so again.
    fn from(e: WriteError) -> DumpError {
        match e {
            WriteError::Origin(e) => match e.downcast() {
                Ok(ours) => *ours,
                Err(e) => DumpError::Image(WriteError::Origin(e)),
            },
            e => DumpError::Image(e),
        }
    }
}

impl DumpError {
    /// An error if a signal has been noted that is to end the dump.
    ///
    /// # Errors
    /// [`DumpError::Interrupted`].
    pub fn if_interrupted() -> Result<(), DumpError> {
        ckpt_sys::interruption::noted().map_or(Ok(()), |signal| Err(DumpError::Interrupted(signal)))
    }

    /// An error about a process.
    pub fn process(pid: i32, what: impl Into<String>) -> impl FnOnce(std::io::Error) -> DumpError {
        let what = what.into();
        move |source| DumpError::Process { pid, what, source }
    }

    /// An error about a process from an errno.
    pub fn errno(pid: i32, what: impl Into<String>) -> impl FnOnce(Errno) -> DumpError {
        let what = what.into();
        move |errno| DumpError::Process { pid, what, source: errno.into() }
    }

    /// An error about a descriptor from an errno.
    pub fn fd(pid: i32, fd: i32, what: impl Into<String>) -> impl FnOnce(Errno) -> DumpError {
        let what = what.into();
        move |errno| DumpError::Descriptor { pid, fd, what, source: errno.into() }
    }
}

/// Something outside the image that is not as the checkpoint needs it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Conflict {
    /// The path or other name.
    pub what: String,
    /// Why it stands in the way.
    pub why: String,
    /// The options that go on.
    pub advice: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)?;
        if self.advice.is_empty() { Ok(()) } else { write!(f, "; {}", self.advice) }
    }
}

/// Conflicts as a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conflicts(pub Vec<Conflict>);

impl fmt::Display for Conflicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in &self.0 {
            write!(f, "\n  {c}")?;
        }
        Ok(())
    }
}

/// Why a restore failed. Nothing that was built is left, and the image is untouched.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image.
    #[error(transparent)]
    Image(#[from] ReadError),
    /// A record whose content makes no sense.
    #[error("the checkpoint is damaged or was written by another version: {0}")]
    Record(String),
    /// Something in the way, all of it.
    #[error("the checkpoint can't be restored as things are:{0}")]
    Conflicts(Conflicts),
    /// This host can't do it.
    #[error("this host can't restore the checkpoint: {0}")]
    Host(String),
    /// A call in a task under construction failed.
    #[error("rebuilding pid {pid}: {source}")]
    Remote {
        /// The process.
        pid: i32,
        /// The cause.
        source: RemoteError,
    },
    /// A call of the restorer failed.
    #[error("rebuilding pid {pid}: {what}: {source}")]
    Task {
        /// The process.
        pid: i32,
        /// What was tried.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl RestoreError {
    /// An error about a task from an errno.
    pub fn errno(pid: i32, what: impl Into<String>) -> impl FnOnce(Errno) -> RestoreError {
        let what = what.into();
        move |errno| RestoreError::Task { pid, what, source: errno.into() }
    }

    /// An error about a task.
    pub fn io(pid: i32, what: impl Into<String>) -> impl FnOnce(std::io::Error) -> RestoreError {
        let what = what.into();
        move |source| RestoreError::Task { pid, what, source }
    }

    /// An error of a remote call.
    pub fn remote(pid: i32) -> impl FnOnce(RemoteError) -> RestoreError {
        move |source| RestoreError::Remote { pid, source }
    }
}
