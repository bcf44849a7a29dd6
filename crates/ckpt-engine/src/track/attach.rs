// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attach: one short stop, in which processes that are not watched yet get a userfaultfd, or their soft-dirty bits cleared.
//!
//! A userfaultfd is for the memory of the task that makes it. A helper does, which shares the process's memory and has descriptors of its
//! own; the dumper takes it out before the helper exits.

use super::watch::Watch;
use crate::dump::phases::Phases;
use crate::dump::{collect, freeze};
use crate::error::DumpError;
use crate::model::Job;
use crate::model::process::{Process, ProcessId};
use crate::resource::process::is_filtered;
use ckpt_sys::{task, userfault};

/// A process, and how it is watched or why not.
pub type Attached = (ProcessId, Result<Watch, String>);

const NOT_TRUSTED: &str = "soft-dirty bits, which miss some writes, are used with --soft-dirty only";

/// Attaches to these processes, with soft-dirty bits where nothing better is to be had only if they are to be trusted. Why one can't be
/// watched is told for each.
///
/// # Errors
/// If the job could not be stopped; it runs on.
pub fn attach(job: &Job, which: &[ProcessId], trust_bits: bool) -> Result<Vec<Attached>, DumpError> {
    let protection =
        userfault::probe_tracking().map_err(|e| format!("no asynchronous write protection ({e})"));
    let frozen = freeze::freeze(job, true, &mut Phases::default())?;
    let mut out = Vec::new();
    let mut beside = task::Beside::default();
    for p in frozen.job.live().filter(|p| which.contains(&ProcessId::of(p))) {
        ckpt_sys::hook::point();
        let watch = if p.closed || frozen.opened.has(p.pid) {
            Err("it is not dumpable".to_owned())
        } else if is_filtered(p) {
            Err("it runs under a seccomp filter".to_owned())
        } else {
            let protected = match &protection {
                Ok(()) => protect(p, &mut beside)?,
                Err(why) => Err(why.clone()),
            };
            protected.or_else(|why| {
                let bits = if trust_bits { soft_dirty(p) } else { Err(NOT_TRUSTED.to_owned()) };
                bits.map_err(|e| format!("{why}; {e}"))
            })
        };
        let busy = "a userfaultfd of the application watches its memory";
        let watch = watch.and_then(|w| w.cover(p).map(|()| w).map_err(|_| busy.to_owned()));
        out.push((ProcessId::of(p), watch));
    }
    frozen.resume()?;
    drop(beside);
    task::make_way();
    Ok(out)
}

fn protect(p: &Process, beside: &mut task::Beside) -> Result<Result<Watch, String>, DumpError> {
    let words = |why: &dyn std::fmt::Display| format!("no userfaultfd could be made in it ({why})");
    let made = collect::make_descriptor(p, beside, &userfault::tracking_of_memory())?;
    Ok(made.map_err(|why| words(&why)).and_then(|fd| Watch::protection(fd).map_err(|e| words(&e))))
}

/// Clears the bits of a frozen process and marks the canary.
fn soft_dirty(p: &Process) -> Result<Watch, String> {
    let words = |e: std::io::Error| format!("no soft-dirty bits ({e})");
    let page = super::watch::canary_page(p).ok_or_else(|| "no page for a canary".to_owned())?;
    let watch = Watch::soft_dirty_since(page);
    watch.start_over(p).map_err(words)?;
    // A kernel that takes the request and has no bits is found out by the canary.
    if watch.is_doubtful(p.host) { Err("no soft-dirty bits".to_owned()) } else { Ok(watch) }
}
