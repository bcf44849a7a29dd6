// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors of the store.

use std::io;
use std::path::PathBuf;

use crate::error::{IoHint, ReadError, WriteError};

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}{}", path.display(), IoHint(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// Not a name that a job can have.
    #[error(
        "{name:?} is no job name: use 1 to 64 letters, digits, dots, underscores and hyphens, not beginning with a dot"
    )]
    BadJobName {
        /// The name given.
        name: String,
    },
    /// Neither `NAME`, nor `NAME@N`, nor a path.
    #[error(
        "{spec:?} names no checkpoint: write NAME, NAME@N, or a directory with a slash in it, as in ./DIR"
    )]
    BadSpec {
        /// What was given.
        spec: String,
    },
    /// No checkpoint of this job is in the store.
    #[error("no checkpoint of job {job:?} in {}; {}", root.display(), known_jobs(jobs))]
    NoSuchJob {
        /// The job.
        job: String,
        /// The store.
        root: PathBuf,
        /// The jobs that have checkpoints.
        jobs: Vec<String>,
    },
    /// The job has no checkpoint with this number.
    #[error("job {job:?} has no checkpoint {number}; {}", known_numbers(numbers))]
    NoSuchCheckpoint {
        /// The job.
        job: String,
        /// The number asked for.
        number: u64,
        /// The numbers there are.
        numbers: Vec<u64>,
    },
    /// The directory is there but was never completed.
    #[error("{}: an unfinished checkpoint, which cannot be restored; `ckpt list` shows the complete ones", path.display())]
    Unfinished {
        /// The directory.
        path: PathBuf,
    },
    /// The directory to be made exists.
    #[error("{}: exists already; name a directory that does not, or remove it", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// The name is one of unfinished checkpoints.
    #[error("{}: names ending in .partial are those of unfinished checkpoints; choose another", path.display())]
    ReservedName {
        /// The directory.
        path: PathBuf,
    },
    /// Another dump is writing there, or it cannot be told that none is.
    #[error("{}: another dump is writing it{hint}", path.display())]
    Busy {
        /// The unfinished directory.
        path: PathBuf,
        /// More to do, if it is not certain.
        hint: &'static str,
    },
    /// The checkpoint is complete and visible but may not survive a power loss.
    #[error("{}: written, but it could not be brought to the disk: {source}{}", path.display(), IoHint(source))]
    NotDurable {
        /// The checkpoint.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Incremental checkpoints are built on it.
    #[error(
        "{job}@{number} is needed by {}; {}",
        dependants(job, needed_by, writing),
        remedy(job, needed_by, writing)
    )]
    Needed {
        /// The job.
        job: String,
        /// The checkpoint that was to be removed.
        number: u64,
        /// The checkpoints that are built on it.
        needed_by: Vec<u64>,
        /// Those that are being written.
        writing: Vec<u64>,
    },
    /// The checkpoint that this one is built on has been removed.
    #[error(
        "{}: the checkpoint that it is built on, number {number}, was removed or replaced while it was written; dump again",
        path.display()
    )]
    ParentGone {
        /// The unfinished checkpoint.
        path: PathBuf,
        /// Number of the parent.
        number: u64,
    },
    /// The checkpoint is not the one any more that work was begun with.
    #[error("{}: was removed or replaced meanwhile; try again", path.display())]
    Changed {
        /// The checkpoint.
        path: PathBuf,
    },
    /// A checkpoint cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A checkpoint cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// No place for the store can be derived.
    #[error("no place for the store: set CKPT_STORE or HOME to an absolute path, or give --store DIR")]
    NoDefaultRoot,
}

impl StoreError {
    pub(super) fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.into();
        move |source| StoreError::Io { path, action, source }
    }
}

fn known_jobs(jobs: &[String]) -> String {
    if jobs.is_empty() { "the store is empty".to_owned() } else { format!("there are: {}", jobs.join(", ")) }
}

fn known_numbers(numbers: &[u64]) -> String {
    if numbers.is_empty() {
        return "it has none".to_owned();
    }
    let words: Vec<String> = numbers.iter().map(u64::to_string).collect();
    format!("there are: {}", words.join(", "))
}

fn names(job: &str, numbers: &[u64]) -> String {
    let words: Vec<String> = numbers.iter().map(|number| format!("{job}@{number}")).collect();
    words.join(", ")
}

fn dependants(job: &str, complete: &[u64], writing: &[u64]) -> String {
    match (complete.is_empty(), writing.is_empty()) {
        (false, true) => names(job, complete),
        (true, _) => format!("{}, which is being written", names(job, writing)),
        (false, false) => {
            format!("{}, and {}, which is being written", names(job, complete), names(job, writing))
        }
    }
}

fn remedy(job: &str, complete: &[u64], writing: &[u64]) -> String {
    if complete.is_empty() || !writing.is_empty() {
        return "try again when that is done".to_owned();
    }
    let squashes: Vec<String> =
        complete.iter().map(|number| format!("`ckpt squash {job}@{number}`")).collect();
    format!(
        "make that a full one first ({}), or remove it, too; `ckpt rm {job}` removes all",
        squashes.join(", ")
    )
}
