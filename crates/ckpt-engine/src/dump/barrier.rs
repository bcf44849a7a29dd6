// SPDX-License-Identifier: MIT OR Apache-2.0
//! Barrier: waits, bounded, for processes that are at a point where they could not be saved but soon will be.
//!
//! Without the interceptor's cooperation that is the parent of a vfork(2): it shares its memory with the child and
//! sleeps uninterruptibly until the child has called execve or exited.

use crate::model::Job;
use ckpt_sys::task::{Shared, kcmp};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(2);

/// Waits until no process of the job shares its memory with its parent any more, or the time is up; *freeze* decides.
pub fn prepare(job: &Job) {
    let until = Instant::now() + LIMIT;
    let borrows = |p: &crate::model::process::Process| {
        job.process(p.ppid)
            .is_some_and(|q| kcmp(p.host, q.host, Shared::Memory) == Ok(std::cmp::Ordering::Equal))
    };
    while job.live().any(borrows) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}
