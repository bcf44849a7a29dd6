// SPDX-License-Identifier: MIT OR Apache-2.0
//! Remote system calls in blank tasks.
//!
//! A memfd is mapped at one address in the tracer and, inherited by clone, in every blank: first a page with the loop
//! of [`crate::arch::blank_code`], then up to [`MAX_CALLS`] entries, then data. One stop executes a whole batch.

use crate::arch::{self, Registers};
use crate::ptrace::{self, Stop};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::Pid;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

/// Most calls in one batch.
pub const MAX_CALLS: usize = 1024;
const CODE_BYTES: usize = 4096;
const ENTRY_BYTES: usize = 96;
/// Where results go that nobody asked for.
const SINK_OFFSET: usize = CODE_BYTES - 8;
const DATA_OFFSET: usize = CODE_BYTES + MAX_CALLS * ENTRY_BYTES;
/// Size of the area in bytes.
pub const AREA_BYTES: usize = 4 << 20;
/// Size in bytes of the data part, the most that one batch can carry.
pub const DATA_BYTES: usize = AREA_BYTES - DATA_OFFSET;

/// What a remote call can fail with.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// ptrace or the area failed.
    #[error("remote call in task {pid}: {what}: {errno}")]
    Ptrace {
        /// The task.
        pid: Pid,
        /// The step.
        what: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// The task did something other than finish the batch.
    #[error("remote call in task {pid}: unexpected stop {stop:?} at instruction {rip:#x}")]
    UnexpectedStop {
        /// The task.
        pid: Pid,
        /// The stop.
        stop: Stop,
        /// Where.
        rip: u64,
    },
    /// A call returned an error.
    #[error("{what} in task {pid}: {errno}")]
    Call {
        /// The task.
        pid: Pid,
        /// What was tried, with its arguments where they tell something.
        what: String,
        /// Its errno.
        errno: Errno,
    },
    /// More data than the area holds.
    #[error("remote call in task {pid}: {bytes} bytes of arguments do not fit")]
    TooLarge {
        /// The task.
        pid: Pid,
        /// How many.
        bytes: usize,
    },
}

/// The shared area.
#[derive(Debug)]
pub struct Area {
    base: NonNull<libc::c_void>,
    /// The stop a blank is in between batches; registers of a fresh blank to start from.
    base_registers: Registers,
}

impl Area {
    /// Maps the area at `addr`, where nothing may be mapped in the tracer.
    ///
    /// # Errors
    /// EEXIST if something is mapped there.
    pub fn map(addr: u64) -> Result<Area, Errno> {
        let memfd = nix::sys::memfd::memfd_create(c"ckpt", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(memfd.as_fd(), AREA_BYTES as i64)?;
        let at = NonZeroUsize::new(addr as usize).ok_or(Errno::EINVAL)?;
        let len = NonZeroUsize::new(AREA_BYTES).ok_or(Errno::EINVAL)?;
        // SAFETY: a new mapping at an address where nothing is mapped (NOREPLACE) disturbs no other object.
        let base = unsafe {
            mmap(
                Some(at),
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE | ProtFlags::PROT_EXEC,
                MapFlags::MAP_SHARED | MapFlags::MAP_FIXED_NOREPLACE,
                &memfd,
                0,
            )?
        };
        let area = Area { base, base_registers: arch::registers_from_words(&[0; 27]) };
        area.store(0, arch::blank_code());
        Ok(area)
    }

    /// Where it is mapped.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    fn store(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= AREA_BYTES);
        // SAFETY: in bounds by the assertion; the area is never borrowed as Rust memory, and blanks that share it run
        // only while `Batch::run` waits for them.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.base.as_ptr().cast::<u8>().add(offset),
                bytes.len(),
            );
        }
    }

    fn load(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= AREA_BYTES);
        // SAFETY: as in `store`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.base.as_ptr().cast::<u8>().add(offset),
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
    }

    /// A new, empty batch. There is one area: the batch borrows it.
    pub fn batch(&mut self) -> Batch<'_> {
        Batch { area: self, calls: 0, data: DATA_OFFSET, what: Vec::new() }
    }

    /// Forks the calling process into a blank: a child with this thread's copy of memory, spinning in pause(2) until
    /// it is seized. `set_tid` is its pid in the current pid namespace. Returns with the blank seized and stopped.
    ///
    /// # Errors
    /// EEXIST if the pid is taken, EPERM without the right to choose one.
    pub fn fork_blank(&mut self, tid: i32) -> Result<Pid, Errno> {
        let tids = [tid];
        const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
        let mut args = clone_args(CLONE_CLEAR_SIGHAND, libc::SIGCHLD as u64, &tids);
        // SAFETY: fork semantics (no CLONE_VM); the child makes only raw system calls that need no locks, and never
        // returns from this block.
        let pid = unsafe {
            let n = libc::syscall(libc::SYS_clone3, &raw mut args, size_of_val(&args));
            if n == 0 {
                loop {
                    libc::syscall(libc::SYS_pause);
                }
            }
            Pid::from_raw(Errno::result(n)? as i32)
        };
        let started = (|| {
            ptrace::seize(pid, ptrace::BLANK_OPTIONS)?;
            ptrace::interrupt(pid)?;
            match ptrace::wait(pid)? {
                Stop::Event { .. } => {}
                _ => return Err(Errno::ECHILD),
            }
            ptrace::set_signal_mask(pid, blank_mask())?;
            self.base_registers = ptrace::registers(pid)?;
            Ok(pid)
        })();
        if started.is_err() {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            let _ = ptrace::reap(pid);
        }
        started
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows it.
        let _ = unsafe { munmap(self.base, AREA_BYTES) };
    }
}

/// Every signal is blocked in a blank but SIGTRAP, which the loop ends with: forcing a blocked one resets its action.
pub fn blank_mask() -> u64 {
    !(1 << (libc::SIGTRAP - 1))
}

/// The `struct clone_args` of clone3(2), 88 bytes.
fn clone_args(flags: u64, exit_signal: u64, tids: &[i32]) -> [u64; 11] {
    let set_tid = if tids.is_empty() { 0 } else { tids.as_ptr() as u64 };
    [flags, 0, 0, 0, exit_signal, 0, 0, 0, set_tid, tids.len() as u64, 0]
}

/// A call in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallId(usize);

impl CallId {
    /// Its place in the results.
    pub fn index(self) -> usize {
        self.0
    }
}

/// System calls for one stop of one blank, with the data they point to.
#[derive(Debug)]
pub struct Batch<'a> {
    area: &'a mut Area,
    calls: usize,
    data: usize,
    what: Vec<String>,
}

impl Batch<'_> {
    /// Puts bytes into the area; returns their address in the blank (16-byte aligned).
    pub fn bytes(&mut self, bytes: &[u8]) -> u64 {
        let at = self.data.next_multiple_of(16);
        self.data = at + bytes.len();
        if self.data <= AREA_BYTES {
            self.area.store(at, bytes);
        }
        self.area.address() + at as u64
    }

    /// Puts words into the area.
    pub fn words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.bytes(&bytes)
    }

    /// A path or other string, with its NUL.
    pub fn string(&mut self, s: &[u8]) -> u64 {
        let mut v = s.to_vec();
        v.push(0);
        self.bytes(&v)
    }

    /// Adds a call. `what` names it in errors.
    pub fn call(&mut self, what: impl Into<String>, nr: i64, args: &[u64]) -> CallId {
        let id = CallId(self.calls);
        let mut entry = [0u64; ENTRY_BYTES / 8];
        entry[0] = nr as u64;
        entry[1..=args.len()].copy_from_slice(args);
        entry[8..11].fill(self.area.address() + SINK_OFFSET as u64);
        if self.calls < MAX_CALLS {
            let bytes: Vec<u8> = entry.iter().flat_map(|w| w.to_le_bytes()).collect();
            self.area.store(CODE_BYTES + self.calls * ENTRY_BYTES, &bytes);
        }
        self.calls += 1;
        self.what.push(what.into());
        id
    }

    /// Makes the result of `from` argument number `argument` (0 to 5) of the later call `to`; at most three times for
    /// one call.
    pub fn feed(&mut self, from: CallId, to: CallId, argument: usize) {
        assert!(from.0 < to.0 && argument < 6, "a result feeds only later calls");
        let base = self.area.address();
        let entry = CODE_BYTES + from.0 * ENTRY_BYTES;
        let slot = (8..11)
            .find(|i| {
                let mut w = [0u8; 8];
                self.area.load(entry + i * 8, &mut w);
                u64::from_le_bytes(w) == base + SINK_OFFSET as u64
            })
            .expect("at most three uses of a result");
        let target = base + (CODE_BYTES + to.0 * ENTRY_BYTES + 8 + argument * 8) as u64;
        self.area.store(entry + slot * 8, &target.to_le_bytes());
    }

    /// How many more calls fit.
    pub fn room(&self) -> usize {
        MAX_CALLS - self.calls.min(MAX_CALLS)
    }

    /// True if there is no call in it.
    pub fn is_empty(&self) -> bool {
        self.calls == 0
    }

    /// Reads back data at an address that [`Batch::bytes`] gave.
    pub fn read(&self, addr: u64, out: &mut [u8]) {
        self.area.load((addr - self.area.address()) as usize, out);
    }

    /// Clones the blank `parent` remotely; `flags` as for clone3(2). Returns the new task, seized and stopped.
    ///
    /// # Errors
    /// As [`Batch::run`].
    pub fn clone_task(
        mut self,
        parent: Pid,
        flags: u64,
        exit_signal: i32,
        tid: i32,
    ) -> Result<Pid, RemoteError> {
        let tids = self.bytes(&tid.to_le_bytes());
        let args = [flags, 0, 0, 0, exit_signal as u64, 0, 0, 0, tids, 1, 0];
        let args = self.words(&args);
        self.call(format!("clone3 of task {tid}"), libc::SYS_clone3, &[args, 88]);
        self.start(parent)?;
        let err = |what, errno| RemoteError::Ptrace { pid: parent, what, errno };
        let mut child = None;
        loop {
            match ptrace::wait(parent).map_err(|e| err("wait", e))? {
                Stop::Ptrace(_) => {
                    let n = ptrace::event_message(parent).map_err(|e| err("event message", e))?;
                    child = Some(Pid::from_raw(n as i32));
                    ptrace::cont(parent, 0).map_err(|e| err("continue", e))?;
                }
                Stop::Signal(libc::SIGTRAP) => break,
                stop => return Err(unexpected(parent, stop)),
            }
        }
        self.results(parent)?;
        let child =
            child.ok_or(RemoteError::Ptrace { pid: parent, what: "clone event", errno: Errno::ECHILD })?;
        match ptrace::wait(child).map_err(|e| err("wait for the new task", e))? {
            Stop::Event { .. } => Ok(child),
            stop => Err(unexpected(child, stop)),
        }
    }

    fn start(&self, pid: Pid) -> Result<(), RemoteError> {
        if self.calls > MAX_CALLS || self.data > AREA_BYTES {
            return Err(RemoteError::TooLarge { pid, bytes: self.data + self.calls * ENTRY_BYTES });
        }
        let base = self.area.address();
        let r = arch::blank_registers(
            &self.area.base_registers,
            base,
            base + CODE_BYTES as u64,
            self.calls as u64,
        );
        let err = |what| move |errno| RemoteError::Ptrace { pid, what, errno };
        // Segment bases are per thread and stay what they are in the blank.
        ptrace::set_registers(pid, &r).map_err(err("set registers"))?;
        ptrace::cont(pid, 0).map_err(err("continue"))
    }

    fn results(&self, pid: Pid) -> Result<Vec<u64>, RemoteError> {
        let mut out = Vec::with_capacity(self.calls);
        for i in 0..self.calls {
            let mut word = [0u8; 8];
            self.area.load(CODE_BYTES + i * ENTRY_BYTES + 56, &mut word);
            let n = u64::from_le_bytes(word);
            if n > -4096i64 as u64 {
                return Err(RemoteError::Call {
                    pid,
                    what: self.what[i].clone(),
                    errno: Errno::from_raw(-(n as i64) as i32),
                });
            }
            out.push(n);
        }
        Ok(out)
    }

    /// Runs the batch in a stopped blank. All calls are executed; the first that failed is the error.
    ///
    /// # Errors
    /// [`RemoteError::Call`] for a call that failed, others if the blank could not be driven.
    pub fn run(self, pid: Pid) -> Result<Vec<u64>, RemoteError> {
        self.drive(pid)?;
        self.results(pid)
    }

    /// As [`Batch::run`], with the raw results, negative errnos among them, and a reader for output data.
    ///
    /// # Errors
    /// If the blank could not be driven.
    pub fn run_raw(self, pid: Pid) -> Result<(Vec<i64>, Self), RemoteError> {
        self.drive(pid)?;
        let mut out = Vec::with_capacity(self.calls);
        for i in 0..self.calls {
            let mut word = [0u8; 8];
            self.area.load(CODE_BYTES + i * ENTRY_BYTES + 56, &mut word);
            out.push(i64::from_le_bytes(word));
        }
        Ok((out, self))
    }

    fn drive(&self, pid: Pid) -> Result<(), RemoteError> {
        if self.is_empty() {
            return Ok(());
        }
        self.start(pid)?;
        match ptrace::wait(pid) {
            Ok(Stop::Signal(libc::SIGTRAP)) => Ok(()),
            Ok(stop) => Err(unexpected(pid, stop)),
            Err(errno) => Err(RemoteError::Ptrace { pid, what: "wait", errno }),
        }
    }
}

fn unexpected(pid: Pid, stop: Stop) -> RemoteError {
    RemoteError::UnexpectedStop { pid, stop, rip: ptrace::registers(pid).map_or(0, |r| r.rip) }
}

/// Runs one system call at a `syscall` instruction outside the area, by two system call stops. Leaves the task in the
/// stop after the call.
///
/// # Errors
/// As [`Batch::run`].
pub fn stepped_call(pid: Pid, insn: u64, what: &str, nr: i64, args: [u64; 6]) -> Result<u64, RemoteError> {
    let err = |what| move |errno| RemoteError::Ptrace { pid, what, errno };
    let base = ptrace::registers(pid).map_err(err("get registers"))?;
    ptrace::set_registers(pid, &arch::with_syscall(&base, insn, nr, args)).map_err(err("set registers"))?;
    for _ in 0..2 {
        ptrace::cont_to_syscall(pid).map_err(err("continue"))?;
        match ptrace::wait(pid).map_err(err("wait"))? {
            Stop::Syscall => {}
            stop => return Err(unexpected(pid, stop)),
        }
    }
    let n = ptrace::registers(pid).map_err(err("get registers"))?.rax;
    if n > -4096i64 as u64 {
        let errno = Errno::from_raw(-(n as i64) as i32);
        return Err(RemoteError::Call { pid, what: what.to_owned(), errno });
    }
    Ok(n)
}

/// Brings a stopped blank into an EVENT_STOP without letting it execute an instruction.
///
/// # Errors
/// As [`Batch::run`].
pub fn event_stop(pid: Pid) -> Result<(), RemoteError> {
    let err = |what| move |errno| RemoteError::Ptrace { pid, what, errno };
    ptrace::interrupt(pid).map_err(err("interrupt"))?;
    ptrace::cont(pid, 0).map_err(err("continue"))?;
    match ptrace::wait(pid).map_err(err("wait"))? {
        Stop::Event { .. } => Ok(()),
        stop => Err(unexpected(pid, stop)),
    }
}
