// SPDX-License-Identifier: MIT OR Apache-2.0
//! Resume: the last trace of ckpt leaves each process, every thread gets its registers, and then all go.

use super::Rebuilt;
use super::build_tree::Build;
use super::plan::VDSO_ROOM;
use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::decode;
use crate::resource::fd::inotify::Placed;
use crate::resource::fd::regular_file::Cuts;
use crate::resource::memory_map::MemoryMapRecord;
use crate::resource::signal::SignalRecord;
use crate::resource::thread::ThreadRecord;
use ckpt_sys::area::{AREA_BYTES, event_stop, stepped_call};
use ckpt_sys::{Pid, arch, libc, ptrace};

/// Tasks that only need to be let go.
#[derive(Debug)]
pub struct Ready {
    tasks: Vec<Pid>,
    cuts: Cuts,
    inotify: Vec<Placed>,
    rollbacks: super::rollback::Rollbacks,
}

/// Brings every task to the point from which it goes on by itself.
///
/// # Errors
/// Anything; the caller exits then.
pub fn prepare(mut build: Build<'_>) -> Result<Rebuilt, RestoreError> {
    let mut tasks = Vec::new();
    // Processes that are stopped come first, children before parents: a parent that has been told of the stop is told
    // again by the kernel and must forget it, as long as it is a blank.
    let mut order = build.live();
    let depth = |mut pid: i32| {
        let mut n = 0;
        while let Some(p) = build.processes.get(&pid) {
            pid = p.ppid;
            n += 1;
        }
        n
    };
    order.sort_by_key(|pid| (!build.processes[pid].stopped, -depth(*pid)));
    for pid in order {
        super::told::tell(&build, pid);
        let own = finalise(&mut build, pid)?;
        if build.processes[&pid].stopped {
            stop_again(&mut build, pid, &own)?;
        } else {
            tasks.extend(own);
        }
    }
    Ok(Rebuilt {
        main_pid: build.image.job.main_pid,
        main_status: build.image.job.main_status,
        warnings: std::mem::take(&mut build.warnings),
        phases_ns: Vec::new(),
        page_server: build.page_server.take(),
        eager_because: build.eager_because.take(),
        ready: Ready {
            tasks,
            cuts: Cuts::of(&build)?,
            inotify: std::mem::take(&mut build.inotify),
            rollbacks: std::mem::take(&mut build.rollbacks),
        },
    })
}

/// Takes the area out of a process and gives its threads their registers. Returns them.
fn finalise(build: &mut Build<'_>, pid: i32) -> Result<Vec<Pid>, RestoreError> {
    let threads = build.processes[&pid].threads.clone();
    let leader = Pid::from_raw(pid);
    for tid in threads.iter().filter(|t| **t != pid) {
        event_stop(Pid::from_raw(*tid)).map_err(RestoreError::remote(*tid))?;
    }
    let insn = syscall_instruction(build, pid)?;
    let stepped = |what: &str, nr: i64, args: [u64; 6]| {
        stepped_call(leader, insn, what, nr, args).map_err(RestoreError::remote(pid))
    };
    if let Some(action) = ignores_sigtrap(build, pid)? {
        // Set by a call that doesn't end with a trap; the action is read from the area, which is still there.
        let at = build.area.batch().words(&action);
        stepped("rt_sigaction of SIGTRAP", libc::SYS_rt_sigaction, [libc::SIGTRAP as u64, at, 0, 8, 0, 0])?;
    }
    let room = [build.plan.hole, AREA_BYTES as u64 + VDSO_ROOM, 0, 0, 0, 0];
    stepped("munmap of the area", libc::SYS_munmap, room)?;
    event_stop(leader).map_err(RestoreError::remote(pid))?;
    for tid in &threads {
        let record = build.image.of_kind(Kind::Thread).find(|r| r.owner == *tid as u64);
        let record = record.ok_or_else(|| RestoreError::Record(format!("thread {tid} has no registers")))?;
        let t: ThreadRecord = decode(record, crate::resource::thread::VERSION)?;
        let task = Pid::from_raw(*tid);
        let err = |what: &str| RestoreError::errno(*tid, what.to_owned());
        ptrace::set_xstate(task, &t.xstate).map_err(err("setting floating point and vector registers"))?;
        ptrace::set_signal_mask(task, t.mask).map_err(err("setting the signal mask"))?;
        let registers = arch::resume_restored(&arch::registers_from_words(&t.registers), t.quiet);
        ptrace::set_registers(task, &registers).map_err(err("setting registers"))?;
    }
    Ok(threads.into_iter().map(Pid::from_raw).collect())
}

/// Stops a process by a signal and lets go of it: it executes nothing. What the kernel tells its parent about that is
/// taken away again, unless it was still to be told.
fn stop_again(build: &mut Build<'_>, pid: i32, threads: &[Pid]) -> Result<(), RestoreError> {
    let err = |what: &str| RestoreError::errno(pid, what.to_owned());
    ckpt_sys::task::kill(Pid::from_raw(pid), libc::SIGSTOP).map_err(err("stopping it again"))?;
    for t in threads {
        ptrace::detach(*t).map_err(err("letting it go"))?;
    }
    let state = |t: &Pid| {
        let text = std::fs::read_to_string(format!("/proc/{t}/stat")).unwrap_or_default();
        text.rsplit(')').next().and_then(|s| s.trim_start().chars().next())
    };
    let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while threads.iter().any(|t| state(t) != Some('T')) {
        if std::time::Instant::now() > until {
            return Err(RestoreError::Host(format!("process {pid} does not stop")));
        }
        std::thread::yield_now();
    }
    let parent = build.processes[&pid].ppid;
    let Some(p) = build.processes.get(&parent) else { return Ok(()) };
    let told = !p.untold_stops.contains(&pid);
    let queued = crate::resource::pending_signal::is_queued(build.image, parent, libc::SIGCHLD)?;
    build.run(parent, |b| {
        if told {
            let options = (libc::WUNTRACED | libc::WNOHANG) as u64;
            b.call("wait4", libc::SYS_wait4, &[pid as u64, 0, options, 0]);
        }
    })?;
    if !queued {
        // There may be none, if the parent doesn't want to be told (SA_NOCLDSTOP).
        let mut b = build.area.batch();
        let set = b.words(&[1 << (libc::SIGCHLD - 1)]);
        let now = b.words(&[0, 0]);
        b.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, &[set, 0, now, 8]);
        b.run_raw(Pid::from_raw(parent)).map_err(RestoreError::remote(parent))?;
    }
    Ok(())
}

fn ignores_sigtrap(build: &Build<'_>, pid: i32) -> Result<Option<[u64; 4]>, RestoreError> {
    let Some(r) = build.image.of_kind(Kind::Signal).find(|r| r.owner == pid as u64) else { return Ok(None) };
    let s: SignalRecord = decode(r, crate::resource::signal::VERSION)?;
    let action =
        s.actions.iter().find(|a| a.signal == libc::SIGTRAP as u32 && a.handler == libc::SIG_IGN as u64);
    Ok(action.map(|a| [a.handler, a.flags, a.restorer, a.mask]))
}

/// A `syscall` instruction in the process's vDSO.
fn syscall_instruction(build: &Build<'_>, pid: i32) -> Result<u64, RestoreError> {
    let record = build.image.of_kind(Kind::MemoryMap).find(|r| r.owner == pid as u64);
    let record = record.ok_or_else(|| RestoreError::Record(format!("process {pid} has no memory map")))?;
    let m: MemoryMapRecord = decode(record, crate::resource::memory_map::VERSION)?;
    let v = m.vdso().ok_or_else(|| RestoreError::Record(format!("process {pid} has no vDSO")))?;
    let mut bytes = vec![0u8; (v.1 - v.0) as usize];
    ckpt_sys::memory::read(Pid::from_raw(pid), v.0, &mut bytes)
        .map_err(RestoreError::errno(pid, "reading its vDSO"))?;
    let at = bytes.windows(2).position(|w| w == [0x0f, 0x05]);
    at.map(|n| v.0 + n as u64)
        .ok_or_else(|| RestoreError::Host("its vDSO holds no syscall instruction".into()))
}

impl Ready {
    /// Puts the files back, and lets all tasks go. Says what it did to the files.
    ///
    /// # Errors
    /// If a file can't be put back, or a task vanished.
    pub fn resume(self) -> Result<Vec<String>, RestoreError> {
        // Last, when nothing else can fail any more and the restore is committed.
        let mut said = self.cuts.cut()?;
        let cuts = &self.cuts;
        said.extend(self.rollbacks.put_back(|path, left| cuts.note_left(path, left))?);
        for instance in &self.inotify {
            instance.settle()?;
        }
        for t in &self.tasks {
            ptrace::detach(*t).map_err(RestoreError::errno(t.as_raw(), "letting it go"))?;
        }
        Ok(said)
    }
}
