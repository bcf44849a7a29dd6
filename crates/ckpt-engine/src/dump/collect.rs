// SPDX-License-Identifier: MIT OR Apache-2.0
//! Collect: every kind saves the state of the frozen job; calls are injected into each thread in turn.

use super::freeze::FrozenJob;
use crate::error::DumpError;
use crate::kind::Kind;
use crate::model::Job;
use crate::model::process::{Frozen, Process, Task};
use crate::resource::process::is_filtered;
use crate::resource::{At, Collect, Collected, Resource, in_order};
use ckpt_sys::arch::Making;
use ckpt_sys::inject::{InjectError, Left, Live, NO_CALL, Padding, Query, SCRATCH_BYTES, Start};
use ckpt_sys::memory::Forced;
use ckpt_sys::task::{Beside, last_cpu};
use ckpt_sys::{Errno, frozen_copy, libc};
use std::os::fd::OwnedFd;

/// Runs all kinds over the job, its open files, its processes and their threads.
///
/// # Errors
/// The first error of a kind.
pub fn collect(
    frozen: &mut FrozenJob,
    before: &Job,
    warnings: &mut Vec<String>,
) -> Result<Collected, DumpError> {
    let mut out = Collected::default();
    let order = in_order();
    let FrozenJob { job, opened, .. } = frozen;
    job.build_ids = before.build_ids.clone();
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
        // The code in a main thread that was made dumpable stays to the end, and unmaps its own at any time if the dumper dies.
        let scratch = if opened.is_some() { scratch_beside(p)? } else { scratch_of(p)? };
        let mut beside = ckpt_sys::task::Beside::default();
        if let Some(o) = &mut opened {
            let t = &p.threads[0];
            beside.on(last_cpu(p.host, t.host));
            o.live.prefetch(&asks(&order, job, &[At::Process(p), At::Thread(p, t)]))?;
            step(Some(&mut o.live), At::Process(p), None, &mut out, warnings)?;
            step(Some(&mut o.live), At::Thread(p, t), None, &mut out, warnings)?;
            o.live.release_scratch()?;
        }
        // Each thread's code stands before that of the thread before is taken away, so that there is always one to unmap
        // the scratch pages. That of a process made dumpable has one place only, and would unmap them at any time.
        let second = opened.is_none().then(|| padding.beside());
        let (mut before, mut left): (Option<Live>, Option<Left>) = (None, None);
        // The leader, then those of one CPU after those of another: each move between CPUs costs as much as a thread.
        let mut threads: Vec<(bool, Option<usize>, &Task)> =
            p.threads.iter().map(|t| (t.tid != p.pid, cpu_of(p, t), t)).collect();
        threads.sort_by_key(|(other, cpu, _)| (*other, *cpu));
        for (i, (_, cpu, t)) in threads.into_iter().enumerate().skip(usize::from(opened.is_some())) {
            beside.on(cpu);
            let place = second.filter(|_| i % 2 == 1).unwrap_or(padding);
            if second.is_none()
                && let Some(last) = before.take()
            {
                last.close(&memory)?;
            }
            let mut live = open(p, t, &memory, place, scratch)?;
            if let Some(mut last) = before.take() {
                live.inherit_scratch(&mut last);
                left = Some(last.leave()?);
            }
            if t.tid == p.pid {
                live.prefetch(&asks(&order, job, &[At::Process(p), At::Thread(p, t)]))?;
                step(Some(&mut live), At::Process(p), None, &mut out, warnings)?;
            } else {
                live.prefetch(&asks(&order, job, &[At::Thread(p, t)]))?;
            }
            step(Some(&mut live), At::Thread(p, t), None, &mut out, warnings)?;
            before = Some(live);
        }
        if let Some(last) = before {
            last.close(&memory)?;
        }
        left.map_or(Ok(()), |code| code.erase(&memory))?;
    }
    Ok(out)
}

/// The CPU on which a thread ran last: most note it in their memory, and that it has been moved since is rare.
fn cpu_of(p: &Process, t: &Task) -> Option<usize> {
    t.frozen.as_ref().and_then(|f| f.cpu).or_else(|| last_cpu(p.host, t.host))
}

/// What all kinds will ask there.
fn asks(order: &[&dyn Resource], job: &Job, at: &[At<'_>]) -> Vec<Query> {
    at.iter().flat_map(|at| order.iter().flat_map(|r| r.asks(job, *at))).collect()
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

/// Where an injection may map its scratch pages.
///
/// # Errors
/// If its address space is full.
pub(crate) fn scratch_of(p: &Process) -> Result<u64, DumpError> {
    hole(p, SCRATCH_BYTES)
}

/// Where an injection may map others while those of [`scratch_of`] are somebody's.
fn scratch_beside(p: &Process) -> Result<u64, DumpError> {
    // The first hole of that size is where the one of half the size is, or another.
    hole(p, 2 * SCRATCH_BYTES).map(|start| start + SCRATCH_BYTES)
}

fn hole(p: &Process, bytes: u64) -> Result<u64, DumpError> {
    p.hole(bytes).ok_or_else(|| {
        let source = std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        DumpError::Process { pid: p.pid, what: "finding free pages in its address space".into(), source }
    })
}

/// Has a helper in a frozen process make a descriptor about its memory, which the process never has. The inner error says why it could not.
pub(crate) fn make_descriptor(
    p: &Process,
    beside: &mut Beside,
    making: &Making,
) -> Result<Result<OwnedFd, String>, DumpError> {
    if is_filtered(p) {
        return Ok(Err("it runs under a seccomp filter".into()));
    }
    let Some((leader, state)) = p.threads.first().and_then(|t| Some((t, t.frozen.as_ref()?))) else {
        return Ok(Err("its main thread is gone".into()));
    };
    if ckpt_sys::arch::is_compat(&state.registers) {
        return Ok(Err("its main thread runs 32-bit code".into()));
    }
    beside.on(last_cpu(p.host, leader.host));
    let memory = Forced::open(p.host).map_err(DumpError::process(p.pid, "opening its memory"))?;
    let mut live = open(p, leader, &memory, padding_of(p)?, scratch_of(p)?)?;
    ckpt_sys::hook::point();
    let made = match frozen_copy::make_descriptor(&mut live, &memory, making) {
        Ok(Ok(fd)) => Ok(fd),
        Ok(Err(Errno::EAGAIN)) => Err("no more processes are allowed (RLIMIT_NPROC, pids.max)".into()),
        Ok(Err(errno)) => Err(errno.to_string()),
        Err(InjectError::NoRoom { .. }) => Err("there is no room for the code behind its vDSO".into()),
        Err(e) => return Err(e.into()),
    };
    ckpt_sys::hook::point();
    live.close(&memory)?;
    Ok(made)
}

/// Starts an injection into a frozen thread, with [`SCRATCH_BYTES`] at `scratch` where nothing is mapped.
pub(crate) fn open(
    p: &Process,
    t: &Task,
    memory: &Forced,
    padding: Padding,
    scratch: u64,
) -> Result<Live, DumpError> {
    let missing = || DumpError::Process {
        pid: p.pid,
        what: format!("state of thread {}", t.tid),
        source: std::io::Error::from(std::io::ErrorKind::NotFound),
    };
    let frozen = t.frozen.as_ref().ok_or_else(missing)?;
    let Frozen { registers, mask, quiet, .. } = *frozen;
    let start = Start { padding, scratch, registers, mask, quiet, last: NO_CALL, bell: bell(p, frozen) };
    Ok(Live::open(t.host, memory, start)?)
}

/// A signal that the thread does not block and its process ignores, 0 if there is none. One that is ignored by default
/// comes first: no program minds such a signal, should a handler be installed just when the dumper is killed.
pub(super) fn bell(p: &Process, frozen: &Frozen) -> i32 {
    let has = |mask: u64, signal: i32| mask >> (signal - 1) & 1 != 0;
    let by_default = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
    let (handled, ignored) = (p.status.sigcgt, p.status.sigign);
    let unhandled = by_default.into_iter().filter(|s| !has(handled, *s));
    let standard = (1..32).filter(|s| *s != libc::SIGCONT && has(ignored, *s));
    unhandled.chain(standard).find(|s| !has(frozen.mask, *s)).unwrap_or(0)
}
