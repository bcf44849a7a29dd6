// SPDX-License-Identifier: MIT OR Apache-2.0
//! Resume: the last trace of ckpt leaves each process, every thread gets its registers, and then all go.

use super::Rebuilt;
use super::build_tree::Build;
use super::plan::VDSO_ROOM;
use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::decode;
use crate::resource::memory_map::MemoryMapRecord;
use crate::resource::signal::SignalRecord;
use crate::resource::thread::ThreadRecord;
use ckpt_sys::area::{AREA_BYTES, event_stop, stepped_call};
use ckpt_sys::{Pid, arch, libc, ptrace};
use nix::sys::signal::{Signal, kill};

/// Tasks that only need to be let go.
#[derive(Debug)]
pub struct Ready {
    tasks: Vec<Pid>,
    stopped: Vec<Pid>,
}

/// Brings every task to the point from which it goes on by itself.
///
/// # Errors
/// Anything; the caller exits then.
pub fn prepare(mut build: Build<'_>) -> Result<Rebuilt, RestoreError> {
    // The files are put back last, when nothing else can fail any more.
    crate::resource::fd::regular_file::cut_back(&mut build)?;
    let mut tasks = Vec::new();
    let mut stopped = Vec::new();
    for pid in build.live() {
        let p = build.processes[&pid].clone();
        let leader = Pid::from_raw(pid);
        for tid in p.threads.iter().filter(|t| **t != pid) {
            event_stop(Pid::from_raw(*tid)).map_err(RestoreError::remote(*tid))?;
        }
        let insn = syscall_instruction(&build, pid)?;
        let stepped = |what: &str, nr: i64, args: [u64; 6]| {
            stepped_call(leader, insn, what, nr, args).map_err(RestoreError::remote(pid))
        };
        let ignores_trap = ignores_sigtrap(&build, pid)?;
        if let Some(action) = ignores_trap {
            // Set by a call that doesn't end with a trap; the action is read from the area, which is still there.
            let at = build.area.batch().words(&action);
            stepped(
                "rt_sigaction of SIGTRAP",
                libc::SYS_rt_sigaction,
                [libc::SIGTRAP as u64, at, 0, 8, 0, 0],
            )?;
        }
        let room = [build.plan.hole, AREA_BYTES as u64 + VDSO_ROOM, 0, 0, 0, 0];
        stepped("munmap of the area", libc::SYS_munmap, room)?;
        event_stop(leader).map_err(RestoreError::remote(pid))?;
        tasks.extend(p.threads.iter().map(|t| Pid::from_raw(*t)));
        if p.stopped {
            stopped.push(leader);
        }
    }
    for r in build.image.of_kind(Kind::Thread) {
        let t: ThreadRecord = decode(r, crate::resource::thread::VERSION)?;
        let tid = Pid::from_raw(r.owner as i32);
        if !tasks.contains(&tid) {
            return Err(RestoreError::Record(format!("thread {tid} belongs to no process")));
        }
        let err = |what: &str| RestoreError::errno(tid.as_raw(), what.to_owned());
        ptrace::set_xstate(tid, &t.xstate).map_err(err("setting floating point and vector registers"))?;
        ptrace::set_signal_mask(tid, t.mask).map_err(err("setting the signal mask"))?;
        let registers = arch::resume_restored(&arch::registers_from_words(&t.registers), t.quiet);
        ptrace::set_registers(tid, &registers).map_err(err("setting registers"))?;
    }
    Ok(Rebuilt {
        main_pid: build.image.job.main_pid,
        main_status: build.image.job.main_status,
        warnings: std::mem::take(&mut build.warnings),
        ready: Ready { tasks, stopped },
    })
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
    /// Lets all tasks go.
    ///
    /// # Errors
    /// If one vanished.
    pub fn resume(self) -> Result<(), RestoreError> {
        for p in &self.stopped {
            kill(*p, Signal::SIGSTOP).map_err(RestoreError::errno(p.as_raw(), "stopping it again"))?;
        }
        for t in &self.tasks {
            ptrace::detach(*t).map_err(RestoreError::errno(t.as_raw(), "letting it go"))?;
        }
        Ok(())
    }
}
