// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attach: one short stop, in which processes that are not watched yet get a userfaultfd, or their soft-dirty bits cleared.
//!
//! Only a process itself can make a userfaultfd for its memory. An injected call does; the dumper takes a copy and the injection's last
//! call, which also a task without its tracer makes, closes the number. All threads are stopped, so that none of them sees it.

use super::watch::Watch;
use crate::dump::collect::{open_undone_by, padding_of, scratch_of};
use crate::dump::freeze;
use crate::dump::phases::Phases;
use crate::error::DumpError;
use crate::model::Job;
use crate::model::process::{Process, ProcessId};
use crate::resource::process::is_filtered;
use ckpt_sys::memory::Forced;
use ckpt_sys::{Errno, libc, task, userfault};
use std::os::fd::AsFd;

/// A process, and how it is watched or why not.
pub type Attached = (ProcessId, Result<Watch, String>);

/// Attaches to these processes. Why one can't be watched is told for each.
///
/// # Errors
/// If the job could not be stopped; it runs on.
pub fn attach(job: &Job, which: &[ProcessId]) -> Result<Vec<Attached>, DumpError> {
    let protection =
        userfault::probe_tracking().map_err(|e| format!("no asynchronous write protection ({e})"));
    let frozen = freeze::freeze(job, true, &mut Phases::default())?;
    let mut out = Vec::new();
    for p in frozen.job.live().filter(|p| which.contains(&ProcessId::of(p))) {
        ckpt_sys::hook::point();
        let watch = if p.closed || frozen.opened.has(p.pid) {
            Err("it is not dumpable".to_owned())
        } else if is_filtered(p) {
            Err("it runs under a seccomp filter".to_owned())
        } else {
            match &protection {
                Ok(()) => protect(p).or_else(|why| soft_dirty(p).map_err(|e| format!("{why}; {e}"))),
                Err(why) => soft_dirty(p).map_err(|e| format!("{why}; {e}")),
            }
        };
        let busy = "a userfaultfd of the application watches its memory";
        let watch = watch.and_then(|w| w.cover(p).map(|()| w).map_err(|_| busy.to_owned()));
        out.push((ProcessId::of(p), watch));
    }
    frozen.resume()?;
    Ok(out)
}

fn protect(p: &Process) -> Result<Watch, String> {
    let words = |e: &dyn std::fmt::Display| format!("no userfaultfd could be made in it ({e})");
    let thread = p.threads.first().ok_or_else(|| words(&"its main thread is gone"))?;
    let memory = Forced::open(p.host).map_err(|e| words(&e))?;
    let padding = padding_of(p).map_err(|e| words(&e))?;
    let scratch = scratch_of(p).map_err(|e| words(&e))?;
    // The number that the kernel will choose, for nobody else can take it now.
    let number = p.free_descriptor();
    let close = (libc::SYS_close, [number as u64, 0, 0, 0, 0, 0]);
    let mut beside = task::Beside::default();
    beside.on(task::last_cpu(p.host, thread.host));
    let mut live = open_undone_by(p, thread, &memory, padding, scratch, close).map_err(|e| words(&e))?;
    ckpt_sys::hook::point();
    let made =
        live.raw(libc::SYS_userfaultfd, [userfault::TRACKING_FLAGS, 0, 0, 0, 0, 0]).map_err(|e| words(&e))?;
    ckpt_sys::hook::point();
    let taken = match made {
        n if n == i64::from(number) => {
            task::pidfd_open(p.host).and_then(|pidfd| task::pidfd_getfd(pidfd.as_fd(), number))
        }
        n if n >= 0 => {
            // Not the number it should be: that one is made the one that is closed.
            let move_to = [n as u64, number as u64, libc::O_CLOEXEC as u64, 0, 0, 0];
            live.raw(libc::SYS_dup3, move_to).map_err(|e| words(&e))?;
            live.raw(libc::SYS_close, [n as u64, 0, 0, 0, 0, 0]).map_err(|e| words(&e))?;
            Err(Errno::EAGAIN)
        }
        n => {
            // The last call must have something to close.
            let event = live.raw(libc::SYS_eventfd2, [0, libc::O_CLOEXEC as u64, 0, 0, 0, 0]);
            let _ = event.map_err(|e| words(&e))?;
            Err(Errno::from_raw(-n as i32))
        }
    };
    ckpt_sys::hook::point();
    let closed = live.close(&memory);
    let fd = taken.map_err(|e| words(&e))?;
    closed.map_err(|e| words(&e))?;
    Watch::protection(fd).map_err(|e| words(&e))
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
