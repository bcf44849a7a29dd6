// SPDX-License-Identifier: MIT OR Apache-2.0
//! Helpers in a live process, which it never sees: they share its memory and nothing else.
//!
//! One makes a *frozen copy* of the process by fork(2): copy-on-write keeps its memory as it was.
//! Two steps, so that many processes can be forked at the same time: [`Fork::start`] sets the helper of each going,
//! [`Fork::finish`] waits for it. The process that is copied sees nothing of it: neither helper nor copy sends a
//! signal, the helper is reaped within the injected code, and the copy is a child of the job's init. The copy never
//! executes an instruction in user mode; without its tracer it is killed, or exits.
//! See docs/adr/0008-copy-on-write-by-fork.md.
//!
//! Another one makes a descriptor that is about the process's memory ([`make_descriptor`]): a userfaultfd, or a session of the kernel
//! module. See docs/adr/0019-attach-by-injection.md.

use crate::arch::{self, Making};
use crate::inject::{InjectError, Live};
use crate::memory::Forced;
use crate::ptrace::{self, Stop};
use crate::task;
use nix::errno::Errno;
use nix::unistd::Pid;
use std::os::fd::{AsFd, OwnedFd};

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
        let code = |block, _| arch::fork_code(block);
        let started = start_helper(live, memory, &code, ptrace::COPY_OPTIONS)?;
        Ok(started.map(|h| Fork { helper: Some(h.process), code: h.code }))
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
        let _ = task::kill(self.pid, libc::SIGKILL);
        loop {
            match ptrace::wait(self.pid) {
                Ok(Stop::Gone(_)) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
}

/// A helper under way, and the code that it and the task which waits for it are in.
struct Helper {
    process: CopyProcess,
    code: (u64, usize),
}

/// Lets the task of `live` clone a helper, which shares its memory and runs the code behind the clone; the task waits for it. `code` is
/// given the addresses of the self-finishing block and of itself. No other injection may be under way in the process. The kernel's
/// refusal to clone is the inner error.
fn start_helper(
    live: &mut Live,
    memory: &Forced,
    code: &dyn Fn(u64, u64) -> Vec<u8>,
    options: i32,
) -> Result<Result<Helper, Errno>, InjectError> {
    let pid = live.pid();
    let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
    let (block, free) = live.places();
    let code = code(block, free.start);
    if free.write_places().start.saturating_sub(free.start) < code.len() as u64 {
        return Err(InjectError::NoRoom { pid, needed: code.len() });
    }
    memory.write(free.start, &code).map_err(|source| InjectError::Memory { pid, source })?;
    let registers = live.registers_at(free.start, arch::HELPER_CALL);
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
        ptrace::set_options(helper.pid, options)?;
        // Inherited is that of an injection, which may leave a signal unblocked; the helper blocks all.
        ptrace::set_signal_mask(helper.pid, u64::MAX)?;
        ptrace::cont(helper.pid, 0)
    };
    start().map_err(err("start the helper"))?;
    // Out of the clone, into the wait for the helper.
    live.step()?;
    live.step()?;
    ptrace::cont_to_syscall(pid).map_err(err("continue"))?;
    Ok(Ok(Helper { process: helper, code }))
}

/// Has a helper in the process of `live` make a descriptor, in a table of its own, and takes it out. The process never has it, and it
/// is closed if the caller dies. The inner error is that of the call which failed, or of the clone.
///
/// # Errors
/// [`InjectError::NoRoom`], or if task or helper could not be driven.
pub fn make_descriptor(
    live: &mut Live,
    memory: &Forced,
    making: &Making,
) -> Result<Result<OwnedFd, Errno>, InjectError> {
    let code = |block, at| arch::helper_code(block, at, making);
    let Helper { process: helper, code } = match start_helper(live, memory, &code, ptrace::HELPER_OPTIONS)? {
        Ok(started) => started,
        Err(errno) => return Ok(Err(errno)),
    };
    let pid = helper.pid;
    let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
    let fd = loop {
        match ptrace::wait(pid).map_err(err("wait for the helper"))? {
            // On its way out, with all its descriptors: the one there is has the number 0.
            Stop::Ptrace(libc::PTRACE_EVENT_EXIT) => {
                let status = ptrace::event_message(pid).map_err(err("get the helper's status"))? as i32;
                break match libc::WEXITSTATUS(status) {
                    0 if libc::WIFEXITED(status) => {
                        task::pidfd_open(pid).and_then(|pidfd| task::pidfd_getfd(pidfd.as_fd(), 0))
                    }
                    0 => Err(Errno::EINTR),
                    errno => Err(Errno::from_raw(errno)),
                };
            }
            stop @ Stop::Gone(_) => {
                std::mem::forget(helper);
                return Err(InjectError::UnexpectedStop { pid, stop });
            }
            _ => ptrace::cont(pid, 0).map_err(err("continue the helper"))?,
        }
    };
    // The task waits for it.
    ptrace::detach(pid).map_err(err("detach"))?;
    std::mem::forget(helper);
    live.stopped()?;
    erase(live, memory, code)?;
    Ok(fd)
}

/// Removes the code, once the task is out of it.
fn erase(live: &Live, memory: &Forced, (at, bytes): (u64, usize)) -> Result<(), InjectError> {
    live.rest()?;
    let pid = live.pid();
    memory.write(at, &vec![0; bytes]).map_err(|source| InjectError::Memory { pid, source })
}
