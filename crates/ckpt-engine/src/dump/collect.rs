// SPDX-License-Identifier: MIT OR Apache-2.0
//! Collect: every kind saves the state of the frozen job; calls are injected into each thread in turn.

use super::freeze::FrozenJob;
use crate::error::DumpError;
use crate::kind::Kind;
use crate::model::process::{Process, Task};
use crate::resource::{At, Collect, Collected, Resource, in_order};
use ckpt_sys::inject::{Live, NO_CALL, Padding, SCRATCH_BYTES, SystemCall};
use ckpt_sys::memory::Forced;

/// Runs all kinds over the job, its open files, its processes and their threads.
///
/// # Errors
/// The first error of a kind.
pub fn collect(frozen: &mut FrozenJob, warnings: &mut Vec<String>) -> Result<Collected, DumpError> {
    let mut out = Collected::default();
    let order = in_order();
    let FrozenJob { job, opened, .. } = frozen;
    let job = &*job;
    let step = |live: Option<&mut Live>,
                at: At<'_>,
                only: Option<Kind>,
                out: &mut Collected,
                w: &mut Vec<String>| {
        let mut cx = Collect { job, live, out, warnings: w };
        collect_all(&order, &mut cx, at, only)
    };
    step(None, At::Job, None, &mut out, warnings)?;
    for f in job.files.values() {
        step(None, At::File(f), f.kind, &mut out, warnings)?;
    }
    for p in &job.processes {
        if p.zombie.is_some() {
            step(None, At::Process(p), Some(Kind::Process), &mut out, warnings)?;
            continue;
        }
        let memory = Forced::open(p.host).map_err(DumpError::process(p.pid, "opening its memory"))?;
        let mut opened = opened.get(p.pid);
        let padding = opened.as_ref().map_or_else(|| padding_of(p), |o| Ok(o.padding))?;
        for t in &p.threads {
            let _beside = ckpt_sys::task::Beside::task(t.host);
            if t.tid == p.pid
                && let Some(o) = &mut opened
            {
                step(Some(&mut o.live), At::Process(p), None, &mut out, warnings)?;
                step(Some(&mut o.live), At::Thread(p, t), None, &mut out, warnings)?;
                // The other threads have theirs at the same place.
                o.live.release_scratch()?;
                continue;
            }
            let mut live = open(p, t, &memory, padding)?;
            if t.tid == p.pid {
                step(Some(&mut live), At::Process(p), None, &mut out, warnings)?;
            }
            step(Some(&mut live), At::Thread(p, t), None, &mut out, warnings)?;
            live.close(&memory)?;
        }
    }
    Ok(out)
}

fn collect_all(
    order: &[&dyn Resource],
    cx: &mut Collect<'_>,
    at: At<'_>,
    only: Option<Kind>,
) -> Result<(), DumpError> {
    for r in order.iter().filter(|r| only.is_none_or(|k| r.kind() == k)) {
        ckpt_sys::hook::point();
        r.collect(cx, at)?;
    }
    Ok(())
}

/// Where code may be written in a process.
pub(crate) fn padding_of(p: &Process) -> Result<Padding, DumpError> {
    p.padding().ok_or_else(|| DumpError::Process {
        pid: p.pid,
        what: "finding its vDSO".into(),
        source: std::io::Error::other(
            "it has been unmapped or is of another kernel; such a process can't be dumped",
        ),
    })
}

/// The error of a process whose address space is full.
pub(crate) fn no_place(pid: i32) -> DumpError {
    let source = std::io::Error::from(std::io::ErrorKind::OutOfMemory);
    DumpError::Process { pid, what: "finding a free page in its address space".into(), source }
}

/// Starts an injection into a frozen thread.
pub(crate) fn open(p: &Process, t: &Task, memory: &Forced, padding: Padding) -> Result<Live, DumpError> {
    open_undone_by(p, t, memory, padding, NO_CALL)
}

/// Starts an injection into a frozen thread, which makes the call `last` before it goes on.
pub(crate) fn open_undone_by(
    p: &Process,
    t: &Task,
    memory: &Forced,
    padding: Padding,
    last: SystemCall,
) -> Result<Live, DumpError> {
    let missing = || DumpError::Process {
        pid: p.pid,
        what: format!("state of thread {}", t.tid),
        source: std::io::Error::from(std::io::ErrorKind::NotFound),
    };
    let frozen = t.frozen.as_ref().ok_or_else(missing)?;
    let scratch = p.hole(SCRATCH_BYTES).ok_or_else(|| no_place(p.pid))?;
    Ok(Live::open(t.host, memory, padding, scratch, &frozen.registers, frozen.quiet, last)?)
}
