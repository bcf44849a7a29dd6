// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls in a live task, which must go on as if nothing had been whenever its tracer dies.
//!
//! A block of code that restores everything by itself is written into the zero padding behind the vDSO (a private copy
//! of that page; nothing is mapped, and no byte that anybody uses is written) and the task is pointed at it. It makes one
//! call, or a list of them, and then rings: it sends itself a signal that it ignores, which stops it while it is traced. A
//! task that ignores no signal is stepped by the tracer through each call. Scratch pages for lists and results are the
//! first call's doing and the block's undoing. See docs/adr/0002-live-injection.md.

use crate::arch::{self, LiveFinish, Registers};
use crate::memory::{self, Forced};
use crate::ptrace::{self, Stop};
use nix::errno::Errno;
use nix::unistd::Pid;

/// Bytes of the scratch pages.
pub const SCRATCH_BYTES: u64 = 16 << 10;
/// Most bytes that one call may fill.
pub const RESULT_BYTES: u64 = 4096;

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

    /// The place for a second injection into the process, behind the first.
    pub fn beside(&self) -> Padding {
        let start = (self.start + arch::live_block_bytes()).next_multiple_of(16);
        Padding { start: start.min(self.end), end: self.end }
    }
}

/// A system call: its number and arguments.
pub type SystemCall = (i64, [u64; 6]);

/// One that does nothing.
pub const NO_CALL: SystemCall = (libc::SYS_getpid, [0; 6]);

/// A call that changes nothing, so that it does not matter when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Query {
    nr: i64,
    args: [u64; 6],
    /// Which argument is the address of a result, and how many bytes that has.
    fills: Option<(usize, u64)>,
}

impl Query {
    /// One that returns a number.
    pub fn number(nr: i64, args: [u64; 6]) -> Query {
        Query { nr, args, fills: None }
    }

    /// One that fills `bytes` bytes, at most [`RESULT_BYTES`], at the address that is its argument number `at` (from 0).
    pub fn filling(nr: i64, args: [u64; 6], at: usize, bytes: u64) -> Query {
        Query { nr, args, fills: Some((at, bytes)) }
    }

    fn args(&self, address: u64) -> [u64; 6] {
        let mut args = self.args;
        if let Some((at, _)) = self.fills {
            args[at] = address;
        }
        args
    }

    fn bytes(&self) -> u64 {
        self.fills.map_or(0, |(_, bytes)| bytes)
    }
}

/// What an injection starts from.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// Where the code may be; no other task with the same memory may have an injection in the same place.
    pub padding: Padding,
    /// Address of [`SCRATCH_BYTES`] where nothing is mapped.
    pub scratch: u64,
    /// The registers to go on with.
    pub registers: Registers,
    /// The signals that it blocks.
    pub mask: u64,
    /// No deliverable signal is pending.
    pub quiet: bool,
    /// The task makes this call before it goes on, whether told to by [`Live::close`] or left to finish by itself, and
    /// then perhaps more than once: it undoes what the injection does.
    pub last: SystemCall,
    /// A standard signal that the task does not block and its process ignores, by which it says that it is done; 0 if
    /// there is none, and each call is to be stepped.
    pub bell: i32,
}

/// An injection under way in one stopped task. Dropped without [`Live::close`], the tracee is left to finish by itself.
#[derive(Debug)]
pub struct Live {
    pid: Pid,
    block_bytes: usize,
    start: Start,
    mapped: bool,
    stop_again: bool,
    /// It stands where it has rung, and has done nothing since.
    at_bell: bool,
    /// Answers to queries that were asked in one batch: the query, its result, and where its bytes are in `filled`.
    answers: Vec<(Query, i64, usize)>,
    filled: Vec<u8>,
    /// The list that stands at the start of the scratch pages, but for the results in it.
    list: Vec<u8>,
}

/// Code that has done its work and still stands in a process.
#[derive(Debug)]
pub struct Left {
    pid: Pid,
    at: u64,
    bytes: usize,
}

impl Left {
    /// Takes it away.
    ///
    /// # Errors
    /// If its place can't be written.
    pub fn erase(self, memory: &Forced) -> Result<(), InjectError> {
        let pid = self.pid;
        memory.write(self.at, &vec![0; self.bytes]).map_err(|source| InjectError::Memory { pid, source })
    }
}

impl Live {
    /// Starts an injection into `pid`, which is in an EVENT_STOP.
    ///
    /// # Errors
    /// [`InjectError::NoRoom`], or what ptrace gives; the task is then as it was.
    pub fn open(pid: Pid, memory: &Forced, start: Start) -> Result<Live, InjectError> {
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        let Start { registers, mask, last, .. } = start;
        let finish = LiveFinish { scratch: (start.scratch, SCRATCH_BYTES), mask, last, registers };
        let block = arch::live_block(&finish, start.quiet);
        let Padding { start: at, end } = start.padding;
        if end - at < block.len() as u64 {
            return Err(InjectError::NoRoom { pid, needed: block.len() });
        }
        memory.write(at, &block).map_err(|source| InjectError::Memory { pid, source })?;
        let block_bytes = block.len();
        let (answers, filled, list) = (Vec::new(), Vec::new(), Vec::new());
        let live = Live {
            pid,
            block_bytes,
            start,
            at_bell: false,
            mapped: false,
            stop_again: false,
            answers,
            filled,
            list,
        };
        // From here on the task finishes by itself: first the registers, then the mask, which the block puts back.
        live.rest()?;
        let masked = match start.bell {
            0 => u64::MAX,
            n => !(1 << (n - 1)),
        };
        ptrace::set_signal_mask(pid, masked).map_err(err("set signal mask"))?;
        Ok(live)
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
        let r = arch::live_call(&self.start.registers, self.start.padding.start, self.start.bell, nr, args);
        if self.start.bell != 0 {
            return Ok(arch::live_result(&self.until_rung(&r)?));
        }
        ptrace::set_registers(pid, &r).map_err(err("set registers"))?;
        for _ in 0..2 {
            match self.step()? {
                Stop::Syscall => {}
                stop => return Err(InjectError::UnexpectedStop { pid, stop }),
            }
        }
        Ok(ptrace::registers(pid).map_err(err("get registers"))?.rax as i64)
    }

    /// Lets the task go on from `r` until it has rung.
    fn until_rung(&mut self, r: &Registers) -> Result<Registers, InjectError> {
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        let rung = self.start.padding.start + arch::live_offsets().1;
        ptrace::set_registers(pid, r).map_err(err("set registers"))?;
        loop {
            ptrace::cont(pid, 0).map_err(err("continue"))?;
            match ptrace::wait(pid).map_err(err("wait"))? {
                Stop::Signal(n) if n == self.start.bell => {
                    let now = ptrace::registers(pid).map_err(err("get registers"))?;
                    if now.rip == rung {
                        self.at_bell = true;
                        return Ok(now);
                    }
                    // From somebody else: the task would have ignored it.
                }
                Stop::Event { .. } => {}
                Stop::Signal(libc::SIGSTOP) => self.stop_again = true,
                stop => return Err(InjectError::UnexpectedStop { pid, stop }),
            }
        }
    }

    /// Makes many calls in as few stops as can be; [`Live::query`] then has their answers.
    ///
    /// # Errors
    /// If the task could not be driven.
    pub fn prefetch(&mut self, queries: &[Query]) -> Result<(), InjectError> {
        const ENTRY_BYTES: u64 = arch::LIVE_ENTRY_WORDS as u64 * 8;
        self.answers.clear();
        self.filled.clear();
        // Without a bell each call is stepped anyway, and for one or two it is as quick.
        if self.start.bell == 0 || queries.is_empty() {
            return Ok(());
        }
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        let scratch = self.scratch()?;
        let mut left = queries;
        while !left.is_empty() {
            // As many as fit with their results behind them.
            let mut used = 0;
            let room = |q: &Query| ENTRY_BYTES + q.bytes().next_multiple_of(8);
            let fits = |q: &&Query| {
                used += room(q);
                used <= SCRATCH_BYTES
            };
            let n = left.iter().take_while(fits).count().max(1);
            let (batch, rest) = left.split_at(n);
            left = rest;
            let mut at = n as u64 * ENTRY_BYTES;
            let (mut entries, mut places) = (Vec::with_capacity(at as usize), Vec::with_capacity(n));
            for q in batch {
                let args = q.args(scratch + at);
                let words = [q.nr as u64].into_iter().chain(args).chain([0]);
                entries.extend(words.flat_map(u64::to_le_bytes));
                places.push(at as usize);
                at += q.bytes().next_multiple_of(8);
            }
            // Mostly that of the thread before. That all of it has been gone through is told by the bell, not by the results.
            if entries != self.list {
                memory::write(pid, scratch, &entries).map_err(err("write scratch page"))?;
                self.list = entries;
            }
            let Start { padding, bell, registers, .. } = self.start;
            self.until_rung(&arch::live_batch(&registers, padding.start, bell, scratch, n as u64))?;
            let base = self.filled.len();
            self.filled.resize(base + at as usize, 0);
            memory::read(pid, scratch, &mut self.filled[base..]).map_err(err("read scratch page"))?;
            for (i, (q, place)) in batch.iter().zip(places).enumerate() {
                let result = base + (i + 1) * ENTRY_BYTES as usize - 8;
                let word = self.filled[result..result + 8].try_into().unwrap_or_default();
                self.answers.push((*q, i64::from_le_bytes(word), base + place));
            }
        }
        Ok(())
    }

    /// As [`Live::raw`], with an error for a call that failed.
    ///
    /// # Errors
    /// [`InjectError::Call`].
    pub fn call(&mut self, what: &'static str, nr: i64, args: [u64; 6]) -> Result<u64, InjectError> {
        let n = self.raw(nr, args)?;
        self.checked(what, n)
    }

    fn checked(&self, what: &'static str, n: i64) -> Result<u64, InjectError> {
        if (-4095..0).contains(&n) {
            return Err(InjectError::Call { pid: self.pid, what, errno: Errno::from_raw(-n as i32) });
        }
        Ok(n as u64)
    }

    /// Steps to the next stop at the entry or exit of a system call, or at the event of a clone.
    pub(crate) fn step(&mut self) -> Result<Stop, InjectError> {
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        self.at_bell = false;
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
                // From somebody else: the task would have ignored it.
                Stop::Signal(n) if n == self.start.bell => {
                    ptrace::cont_to_syscall(pid).map_err(err("continue"))?;
                }
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
        arch::with_syscall(&self.start.registers, at, call.0, call.1)
    }

    /// Points the task at its block, out of any other code.
    pub(crate) fn rest(&self) -> Result<(), InjectError> {
        let (nr, args) = NO_CALL;
        let Start { padding, registers, bell, .. } = self.start;
        let registers = arch::live_call(&registers, padding.start, bell, nr, args);
        let err = |errno| InjectError::Ptrace { pid: self.pid, what: "set registers", errno };
        ptrace::set_registers(self.pid, &registers).map_err(err)
    }

    /// Where its block is, and what is free behind it.
    pub(crate) fn places(&self) -> (u64, Padding) {
        (self.start.padding.start, self.start.padding.beside())
    }

    /// Address of the scratch pages; mapped at the first use, zero bytes then.
    ///
    /// # Errors
    /// ENOMEM under RLIMIT_AS, for one.
    pub fn scratch(&mut self) -> Result<u64, InjectError> {
        if !self.mapped {
            let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
            let args = [self.start.scratch, SCRATCH_BYTES, prot, flags, u64::MAX, 0];
            self.call("mmap of scratch pages", libc::SYS_mmap, args)?;
            self.mapped = true;
        }
        Ok(self.start.scratch)
    }

    /// Takes over the scratch pages of `before`, an injection into another task of the process with the same address for
    /// them, in another place. Until `before` is closed neither may be asked anything: if the tracer dies, both unmap them.
    pub fn inherit_scratch(&mut self, before: &mut Live) {
        self.mapped = std::mem::take(&mut before.mapped);
        self.list = std::mem::take(&mut before.list);
    }

    /// Unmaps the scratch pages, so that an injection into another task of the process may have its own there.
    ///
    /// # Errors
    /// If the task could not be driven.
    pub fn release_scratch(&mut self) -> Result<(), InjectError> {
        if self.mapped {
            let args = [self.start.scratch, SCRATCH_BYTES, 0, 0, 0, 0];
            self.call("munmap of the scratch pages", libc::SYS_munmap, args)?;
            self.mapped = false;
            self.list.clear();
        }
        Ok(())
    }

    /// The result of a call, and the `N` bytes that it filled: fetched before, or asked now.
    ///
    /// # Errors
    /// As [`Live::raw`].
    pub fn query<const N: usize>(&mut self, q: &Query) -> Result<(i64, [u8; N]), InjectError> {
        const { assert!(N as u64 <= RESULT_BYTES) };
        debug_assert_eq!(N as u64, q.bytes());
        let mut out = [0u8; N];
        if let Some((_, n, at)) = self.answers.iter().find(|(asked, _, _)| asked == q) {
            out.copy_from_slice(&self.filled[*at..*at + N]);
            return Ok((*n, out));
        }
        let at = if N > 0 { self.scratch()? } else { 0 };
        // Its result may stand where the list was.
        self.list.clear();
        let n = self.raw(q.nr, q.args(at))?;
        if N > 0 {
            let (pid, what) = (self.pid, "read scratch page");
            memory::read(pid, at, &mut out).map_err(|errno| InjectError::Ptrace { pid, what, errno })?;
        }
        Ok((n, out))
    }

    /// As [`Live::query`], for a call that returns a number, with an error if it failed.
    ///
    /// # Errors
    /// [`InjectError::Call`].
    pub fn number(&mut self, what: &'static str, q: &Query) -> Result<u64, InjectError> {
        let (n, []) = self.query(q)?;
        self.checked(what, n)
    }

    /// Ends the injection: the task is stopped with everything as it was. Where it has rung the kernel has not looked yet
    /// at whether a call is to be restarted, as in an EVENT_STOP.
    ///
    /// # Errors
    /// If the task could not be driven; it then finishes by itself.
    pub fn close(self, memory: &Forced) -> Result<(), InjectError> {
        self.leave()?.erase(memory)
    }

    /// As [`Live::close`], but for the code, which the next injection into the process may be written over.
    ///
    /// # Errors
    /// As [`Live::close`].
    pub fn leave(mut self) -> Result<Left, InjectError> {
        let pid = self.pid;
        let err = |what| move |errno| InjectError::Ptrace { pid, what, errno };
        self.release_scratch()?;
        if self.start.last != NO_CALL {
            let (nr, args) = self.start.last;
            self.call("undoing what was changed", nr, args)?;
        }
        if !self.at_bell {
            ptrace::interrupt(pid).map_err(err("interrupt"))?;
        }
        while !self.at_bell {
            ptrace::cont(pid, 0).map_err(err("continue"))?;
            match ptrace::wait(pid).map_err(err("wait"))? {
                Stop::Event { .. } => break,
                Stop::Signal(libc::SIGSTOP) => self.stop_again = true,
                Stop::Signal(n) if n == self.start.bell => {}
                stop => return Err(InjectError::UnexpectedStop { pid, stop }),
            }
        }
        if self.stop_again {
            crate::task::kill(pid, libc::SIGSTOP).map_err(err("sending SIGSTOP again"))?;
        }
        ptrace::set_signal_mask(pid, self.start.mask).map_err(err("set signal mask"))?;
        ptrace::set_registers(pid, &arch::resume_live(&self.start.registers, self.start.quiet))
            .map_err(err("set registers"))?;
        Ok(Left { pid, at: self.start.padding.start, bytes: self.block_bytes })
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
