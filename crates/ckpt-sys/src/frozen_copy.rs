// SPDX-License-Identifier: MIT OR Apache-2.0
//! A frozen copy of a live process, made by fork(2) inside it: copy-on-write keeps its memory as it was.
//!
//! Two steps, so that many processes can be forked at the same time: [`Fork::start`] sets the helper of each going,
//! [`Fork::finish`] waits for it. The process that is copied sees nothing of it: neither helper nor copy sends a
//! signal, the helper is reaped within the injected code, and the copy is a child of the job's init. The copy never
//! executes an instruction in user mode; without its tracer it is killed, or exits.
//! See docs/adr/0008-copy-on-write-by-fork.md.

use crate::arch;
use crate::inject::{InjectError, Live};
use crate::memory::Forced;
use crate::ptrace::{self, Stop};
use nix::errno::Errno;
use nix::unistd::Pid;

/// A fork under way. Dropped before [`Fork::finish`] the helper is killed; the task goes on by itself.
#[derive(Debug)]
pub struct Fork {
    helper: Option<CopyProcess>,
    code: (u64, usize),
}

/// What became of a fork.
#[derive(Debug)]
pub enum Forked {
    /// There is a copy.
    Copy(CopyProcess),
    /// The kernel refused: with this errno.
    Refused(Errno),
}

/// A process that stands still for good, and is killed when dropped.
#[derive(Debug)]
pub struct CopyProcess {
    pid: Pid,
}

impl Fork {
    /// Lets the task of `live` make a helper that forks. No other injection may be under way in its process.
    ///
    /// # Errors
    /// [`InjectError::NoRoom`], or if it could not be driven.
    pub fn start(live: &mut Live, memory: &Forced) -> Result<Result<Fork, Errno>, InjectError> {
        let pid = live.pid();
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        let (block, free) = live.places();
        let code = arch::fork_code(block);
        if free.write_places().start.saturating_sub(free.start) < code.len() as u64 {
            return Err(InjectError::NoRoom { pid, needed: code.len() });
        }
        memory.write(free.start, &code).map_err(|source| InjectError::Memory { pid, source })?;
        let registers = live.registers_at(free.start, arch::FORK_CALL);
        ptrace::set_registers(pid, &registers).map_err(err("set registers"))?;
        let code = (free.start, code.len());
        // In, then the event or, if the clone failed, out.
        live.step()?;
        if live.step()? == Stop::Syscall {
            let n = ptrace::registers(pid).map_err(err("get registers"))?.rax as i64;
            erase(live, memory, code)?;
            return Ok(Err(Errno::from_raw(-n as i32)));
        }
        let helper = ptrace::event_message(pid).map_err(err("get the helper's pid"))?;
        let helper = CopyProcess { pid: Pid::from_raw(helper as i32) };
        helper.wait_for_stop()?;
        let start = || {
            ptrace::set_options(helper.pid, ptrace::COPY_OPTIONS)?;
            // Inherited is that of an injection, which may leave a signal unblocked; the copy blocks all.
            ptrace::set_signal_mask(helper.pid, u64::MAX)?;
            ptrace::cont(helper.pid, 0)
        };
        start().map_err(err("start the helper"))?;
        // Out of the clone, into the wait for the helper.
        live.step()?;
        live.step()?;
        ptrace::cont_to_syscall(pid).map_err(err("continue"))?;
        Ok(Ok(Fork { helper: Some(helper), code }))
    }

    /// Waits for the copy. The injection goes on as before.
    ///
    /// # Errors
    /// If the task or the helper could not be driven.
    pub fn finish(mut self, live: &mut Live, memory: &Forced) -> Result<Forked, InjectError> {
        let pid = live.pid();
        let Some(helper) = self.helper.take() else {
            return Err(InjectError::Ptrace { pid, what: "fork", errno: Errno::ESRCH });
        };
        let forked = helper.forked(pid)?;
        live.stopped()?;
        erase(live, memory, self.code)?;
        Ok(forked)
    }
}

impl CopyProcess {
    /// Its pid, as we see it.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits for its first stop, before it has executed anything.
    ///
    /// # Errors
    /// [`InjectError::UnexpectedStop`] if it was killed.
    pub fn wait_for_stop(&self) -> Result<(), InjectError> {
        let pid = self.pid;
        match ptrace::wait(pid).map_err(|errno| InjectError::Ptrace { pid, what: "wait", errno })? {
            Stop::Event { .. } => Ok(()),
            stop => Err(InjectError::UnexpectedStop { pid, stop }),
        }
    }

    /// Whether it stands where it stopped: all its memory is there. False from the moment somebody kills it.
    pub fn is_whole(&self) -> bool {
        ptrace::registers(self.pid).is_ok()
    }

    /// A helper's fork. It is let go; `task` waits for it.
    fn forked(self, task: Pid) -> Result<Forked, InjectError> {
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        loop {
            match ptrace::wait(pid).map_err(err("wait for the helper"))? {
                Stop::Ptrace(libc::PTRACE_EVENT_CLONE) => {
                    let copy = ptrace::event_message(pid).map_err(err("get the copy's pid"))?;
                    let copy = CopyProcess { pid: Pid::from_raw(copy as i32) };
                    ptrace::detach(pid).map_err(err("detach"))?;
                    std::mem::forget(self);
                    return Ok(Forked::Copy(copy));
                }
                Stop::Gone(status) => {
                    std::mem::forget(self);
                    let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 0 };
                    if code == 0 {
                        let stop = Stop::Gone(status);
                        return Err(InjectError::UnexpectedStop { pid: task, stop });
                    }
                    return Ok(Forked::Refused(Errno::from_raw(code)));
                }
                _ => ptrace::cont(pid, 0).map_err(err("continue the helper"))?,
            }
        }
    }
}

impl Drop for CopyProcess {
    fn drop(&mut self) {
        // Its pid can't be anybody else's before it has been waited for.
        let _ = crate::task::kill(self.pid, libc::SIGKILL);
        loop {
            match ptrace::wait(self.pid) {
                Ok(Stop::Gone(_)) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
}

/// Removes the code, once the task is out of it.
fn erase(live: &Live, memory: &Forced, (at, bytes): (u64, usize)) -> Result<(), InjectError> {
    live.rest()?;
    let pid = live.pid();
    memory.write(at, &vec![0; bytes]).map_err(|source| InjectError::Memory { pid, source })
}
