// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls in a live task, which must go on as if nothing had been whenever its tracer dies.
//!
//! A block of code that restores everything by itself is written into the zero padding behind the vDSO (a private copy
//! of that page; nothing is mapped, and no byte that anybody uses is written), the task is pointed at its first
//! instruction, and each call is stepped by the tracer. A scratch page for results is the first call's doing and the
//! block's undoing. See docs/adr/0002-live-injection.md.

use crate::arch::{self, LiveFinish, Registers};
use crate::memory::{self, Forced};
use crate::ptrace::{self, Stop};
use nix::errno::Errno;
use nix::unistd::Pid;

/// Bytes of the scratch page.
pub const SCRATCH_BYTES: u64 = 4096;

/// What an injection can fail with.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// ptrace failed.
    #[error("task {pid}: {what}: {errno}")]
    Ptrace {
        /// The task.
        pid: Pid,
        /// The step.
        what: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// The vDSO could not be written.
    #[error("task {pid}: writing behind the vDSO: {source}")]
    Memory {
        /// The task.
        pid: Pid,
        /// The cause.
        source: std::io::Error,
    },
    /// The task did something else than the call.
    #[error("task {pid}: unexpected stop {stop:?} during a system call of ckpt")]
    UnexpectedStop {
        /// The task.
        pid: Pid,
        /// The stop.
        stop: Stop,
    },
    /// No place for the code.
    #[error("task {pid}: its vDSO has no room for {needed} bytes of code")]
    NoRoom {
        /// The task.
        pid: Pid,
        /// Bytes needed.
        needed: usize,
    },
    /// The call failed.
    #[error("task {pid}: {what}: {errno}")]
    Call {
        /// The task.
        pid: Pid,
        /// The call.
        what: &'static str,
        /// Its errno.
        errno: Errno,
    },
}

/// Where the code may be written in a process: the zero bytes at the end of its vDSO.
#[derive(Debug, Clone, Copy)]
pub struct Padding {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// Bytes at the start of the padding for self-finishing blocks; behind them are places for
/// [`crate::arch::write_block`].
const LIVE_BYTES: u64 = 1008;

impl Padding {
    /// Where code for short writes may be, each place of [`arch::WRITE_BLOCK_BYTES`]. A place is used once in the life
    /// of a process: a signal frame somewhere on a stack may lead back to it.
    pub fn write_places(&self) -> std::ops::Range<u64> {
        (self.start + LIVE_BYTES).min(self.end)..self.end
    }

    /// Finds it in this process's own vDSO, which nobody has written to, for one of the same length at `vdso`: code
    /// that a dumper left behind when it was killed is no part of the vDSO.
    ///
    /// # Errors
    /// EFAULT if the vDSO can't be read.
    pub fn find(own: std::ops::Range<u64>, vdso: std::ops::Range<u64>) -> Result<Padding, Errno> {
        let mut bytes = vec![0u8; (own.end - own.start) as usize];
        memory::read(Pid::this(), own.start, &mut bytes)?;
        let used = bytes.iter().rposition(|&b| b != 0).map_or(0, |n| n + 1);
        // A distance of 16 bytes from the last used one, aligned for the data words.
        let start = (vdso.start + used as u64 + 16).next_multiple_of(16);
        Ok(Padding { start: start.min(vdso.end), end: vdso.end })
    }

    /// What remains of it while `live`, which was opened at its start, is under way: another task of the process may
    /// have an injection there.
    pub fn beside(&self, live: &Live) -> Padding {
        let start = (self.start + live.block_bytes as u64).next_multiple_of(16);
        Padding { start: start.min(self.end), end: self.end }
    }
}

/// A system call: its number and arguments.
pub type SystemCall = (i64, [u64; 6]);

/// One that does nothing.
pub const NO_CALL: SystemCall = (libc::SYS_getpid, [0; 6]);

/// An injection under way in one stopped task. Dropped without [`Live::close`], the tracee is left to finish by itself.
#[derive(Debug)]
pub struct Live {
    pid: Pid,
    padding: Padding,
    block_bytes: usize,
    saved: Registers,
    mask: u64,
    quiet: bool,
    last: SystemCall,
    scratch: u64,
    mapped: bool,
    stop_again: bool,
}

impl Live {
    /// Starts an injection into `pid`, which is in an EVENT_STOP. No other task with the same memory may have one in the
    /// same padding. `scratch` is a page where nothing is mapped; `quiet`: no deliverable signal is pending; `saved`: the
    /// registers to go on with. The task makes the call `last` before it goes on, whether told to by [`Live::close`] or
    /// left to finish by itself, and then perhaps more than once: it undoes what the injection does.
    ///
    /// # Errors
    /// [`InjectError::NoRoom`], or what ptrace gives; the task is then as it was.
    pub fn open(
        pid: Pid,
        memory: &Forced,
        padding: Padding,
        scratch: u64,
        saved: &Registers,
        quiet: bool,
        last: SystemCall,
    ) -> Result<Live, InjectError> {
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        let mask = ptrace::signal_mask(pid).map_err(err("get signal mask"))?;
        let finish = LiveFinish { scratch: (scratch, SCRATCH_BYTES), mask, last, registers: *saved };
        let block = arch::live_block(&finish, quiet);
        if padding.end - padding.start < block.len() as u64 {
            return Err(InjectError::NoRoom { pid, needed: block.len() });
        }
        memory.write(padding.start, &block).map_err(|source| InjectError::Memory { pid, source })?;
        let live = Live {
            pid,
            padding,
            block_bytes: block.len(),
            saved: *saved,
            mask,
            quiet,
            last,
            scratch,
            mapped: false,
            stop_again: false,
        };
        // From here on the task finishes by itself: first the registers, then the mask, which the block puts back.
        live.rest()?;
        ptrace::set_signal_mask(pid, u64::MAX).map_err(err("set signal mask"))?;
        Ok(live)
    }

    /// What the last call would undo was not done. (A task left to finish by itself still makes it.)
    pub fn nothing_to_undo(&mut self) {
        self.last = NO_CALL;
    }

    /// The task.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Executes one call and returns its raw result, a negative errno on failure.
    ///
    /// # Errors
    /// If the task could not be driven.
    pub fn raw(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, InjectError> {
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        let r = arch::with_syscall(&self.saved, self.padding.start, nr, args);
        ptrace::set_registers(pid, &r).map_err(err("set registers"))?;
        for _ in 0..2 {
            match self.step()? {
                Stop::Syscall => {}
                stop => return Err(InjectError::UnexpectedStop { pid, stop }),
            }
        }
        Ok(ptrace::registers(pid).map_err(err("get registers"))?.rax as i64)
    }

    /// As [`Live::raw`], with an error for a call that failed.
    ///
    /// # Errors
    /// [`InjectError::Call`].
    pub fn call(&mut self, what: &'static str, nr: i64, args: [u64; 6]) -> Result<u64, InjectError> {
        let n = self.raw(nr, args)?;
        if (-4095..0).contains(&n) {
            return Err(InjectError::Call { pid: self.pid, what, errno: Errno::from_raw(-n as i32) });
        }
        Ok(n as u64)
    }

    /// Steps to the next stop at the entry or exit of a system call, or at the event of a clone.
    pub(crate) fn step(&mut self) -> Result<Stop, InjectError> {
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        ptrace::cont_to_syscall(pid).map_err(err("continue"))?;
        self.stopped()
    }

    /// The stop that ends a step.
    pub(crate) fn stopped(&mut self) -> Result<Stop, InjectError> {
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        loop {
            match ptrace::wait(pid).map_err(err("wait"))? {
                stop @ (Stop::Syscall | Stop::Ptrace(libc::PTRACE_EVENT_CLONE)) => return Ok(stop),
                // A group stop that is in effect reports once more when the task is resumed.
                Stop::Event { .. } => ptrace::cont_to_syscall(pid).map_err(err("continue"))?,
                // The one signal that can't be blocked and doesn't kill: it is sent again at the end.
                Stop::Signal(libc::SIGSTOP) => {
                    self.stop_again = true;
                    ptrace::cont_to_syscall(pid).map_err(err("continue"))?;
                }
                stop => return Err(InjectError::UnexpectedStop { pid, stop }),
            }
        }
    }

    /// Registers with which the task makes a call by the `syscall` instruction at `at`.
    pub(crate) fn registers_at(&self, at: u64, call: SystemCall) -> Registers {
        arch::with_syscall(&self.saved, at, call.0, call.1)
    }

    /// Points the task at its block, out of any other code.
    pub(crate) fn rest(&self) -> Result<(), InjectError> {
        let registers = self.registers_at(self.padding.start, NO_CALL);
        let err = |errno| InjectError::Ptrace { pid: self.pid, what: "set registers", errno };
        ptrace::set_registers(self.pid, &registers).map_err(err)
    }

    /// Where its block is, and what is free behind it.
    pub(crate) fn places(&self) -> (u64, Padding) {
        (self.padding.start, self.padding.beside(self))
    }

    /// The scratch page's address; mapped at the first use, zero bytes then.
    ///
    /// # Errors
    /// ENOMEM under RLIMIT_AS, for one.
    pub fn scratch(&mut self) -> Result<u64, InjectError> {
        if !self.mapped {
            let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
            let args = [self.scratch, SCRATCH_BYTES, prot, flags, u64::MAX, 0];
            self.call("mmap of a scratch page", libc::SYS_mmap, args)?;
            self.mapped = true;
        }
        Ok(self.scratch)
    }

    /// Unmaps the scratch page, so that an injection into another task of the process may have its own there.
    ///
    /// # Errors
    /// If the task could not be driven.
    pub fn release_scratch(&mut self) -> Result<(), InjectError> {
        if self.mapped {
            let args = [self.scratch, SCRATCH_BYTES, 0, 0, 0, 0];
            self.call("munmap of the scratch page", libc::SYS_munmap, args)?;
            self.mapped = false;
        }
        Ok(())
    }

    /// Executes a call that fills `N` bytes at the address `fill` gets, and returns them with the raw result.
    ///
    /// # Errors
    /// As [`Live::raw`].
    pub fn query<const N: usize>(
        &mut self,
        nr: i64,
        args: impl FnOnce(u64) -> [u64; 6],
    ) -> Result<(i64, [u8; N]), InjectError> {
        const { assert!(N as u64 <= SCRATCH_BYTES) };
        let at = self.scratch()?;
        let n = self.raw(nr, args(at))?;
        let mut out = [0u8; N];
        memory::read(self.pid, at, &mut out).map_err(|errno| InjectError::Ptrace {
            pid: self.pid,
            what: "read scratch page",
            errno,
        })?;
        Ok((n, out))
    }

    /// Ends the injection: the task is back in an EVENT_STOP with everything as it was.
    ///
    /// # Errors
    /// If the task could not be driven; it then finishes by itself.
    pub fn close(mut self, memory: &Forced) -> Result<(), InjectError> {
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        self.release_scratch()?;
        if self.last != NO_CALL {
            let (nr, args) = self.last;
            self.call("undoing what was changed", nr, args)?;
        }
        ptrace::interrupt(pid).map_err(err("interrupt"))?;
        ptrace::cont(pid, 0).map_err(err("continue"))?;
        loop {
            match ptrace::wait(pid).map_err(err("wait"))? {
                Stop::Event { .. } => break,
                Stop::Signal(libc::SIGSTOP) => {
                    self.stop_again = true;
                    ptrace::cont(pid, 0).map_err(err("continue"))?;
                }
                stop => return Err(InjectError::UnexpectedStop { pid, stop }),
            }
        }
        if self.stop_again {
            crate::task::kill(pid, libc::SIGSTOP).map_err(err("sending SIGSTOP again"))?;
        }
        ptrace::set_signal_mask(pid, self.mask).map_err(err("set signal mask"))?;
        ptrace::set_registers(pid, &arch::resume_live(&self.saved, self.quiet))
            .map_err(err("set registers"))?;
        memory
            .write(self.padding.start, &vec![0; self.block_bytes])
            .map_err(|source| InjectError::Memory { pid, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_blocks_leave_the_places_for_writes_alone() {
        let finish = LiveFinish {
            scratch: (0, 0),
            mask: 0,
            last: (libc::SYS_getpid, [0; 6]),
            registers: arch::registers_from_words(&[0; 27]),
        };
        let bytes = arch::live_block(&finish, true).len() as u64;
        assert!(2 * bytes.next_multiple_of(16) <= LIVE_BYTES, "a block has {bytes} bytes");
    }
}
