// SPDX-License-Identifier: MIT OR Apache-2.0
//! ptrace(2): seize, stop, read and write the state of one task.
//!
//! A tracer that dies detaches its tracees and they run on from the registers they have, so nothing here leaves a task
//! in a state that it cannot run on from, unless the name says `blank`.

use crate::arch::Registers;
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

type Result<T> = std::result::Result<T, Errno>;

/// Options a live task is seized with: system call stops are told from SIGTRAP; new children are seized with it.
pub const LIVE_OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC;
/// Options of a blank task: it dies with its tracer.
pub const BLANK_OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_EXITKILL;

/// Options of the tasks that make and are the frozen copy of a process: they die with their tracer, and with them the
/// tasks they make.
pub const COPY_OPTIONS: i32 = libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;

/// Options of a task that makes a descriptor: it stops when it is about to exit, while it still has it.
pub const HELPER_OPTIONS: i32 = libc::PTRACE_O_TRACEEXIT | libc::PTRACE_O_EXITKILL;

fn request(request: u32, pid: Pid, addr: usize, data: usize) -> Result<i64> {
    crate::hook::point();
    // SAFETY: callers in this module pass, in `data`, either a plain number or the address of a live object of the
    // size that the request reads or writes.
    Errno::result(unsafe { libc::ptrace(request as _, pid.as_raw(), addr, data) })
}

/// PTRACE_SEIZE.
///
/// # Errors
/// ESRCH if the task is gone, EPERM if it may not be traced or is traced already.
pub fn seize(pid: Pid, options: i32) -> Result<()> {
    request(libc::PTRACE_SEIZE, pid, 0, options as usize).map(drop)
}

/// PTRACE_SETOPTIONS.
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn set_options(pid: Pid, options: i32) -> Result<()> {
    request(libc::PTRACE_SETOPTIONS, pid, 0, options as usize).map(drop)
}

/// PTRACE_INTERRUPT. The stop is reported by [`wait`].
///
/// # Errors
/// ESRCH if the task is gone.
pub fn interrupt(pid: Pid) -> Result<()> {
    request(libc::PTRACE_INTERRUPT, pid, 0, 0).map(drop)
}

/// PTRACE_CONT, delivering `signal` (0: none).
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn cont(pid: Pid, signal: i32) -> Result<()> {
    request(libc::PTRACE_CONT, pid, 0, signal as usize).map(drop)
}

/// PTRACE_SYSCALL: as [`cont`], up to the next entry to or exit from a system call.
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn cont_to_syscall(pid: Pid) -> Result<()> {
    request(libc::PTRACE_SYSCALL, pid, 0, 0).map(drop)
}

/// PTRACE_DETACH.
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn detach(pid: Pid) -> Result<()> {
    request(libc::PTRACE_DETACH, pid, 0, 0).map(drop)
}

/// PTRACE_GETREGS.
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn registers(pid: Pid) -> Result<Registers> {
    let mut r = crate::arch::registers_from_words(&[0; 27]);
    request(libc::PTRACE_GETREGS, pid, 0, &raw mut r as usize)?;
    Ok(r)
}

/// PTRACE_SETREGS.
///
/// # Errors
/// ESRCH if the task is not stopped, EIO for segment values the kernel refuses.
pub fn set_registers(pid: Pid, r: &Registers) -> Result<()> {
    request(libc::PTRACE_SETREGS, pid, 0, r as *const Registers as usize).map(drop)
}

/// PTRACE_PEEKDATA: a word of its memory, also where it may not read itself.
///
/// # Errors
/// EIO if nothing is mapped there, ESRCH if the task is not stopped.
pub fn peek(pid: Pid, addr: u64) -> Result<u64> {
    let mut word = 0u64;
    crate::hook::point();
    // The system call stores the word at `data`; libc's wrapper would return it, mixed up with errors.
    let args = (libc::SYS_ptrace, libc::PTRACE_PEEKDATA as u64, pid.as_raw() as u64);
    // SAFETY: `word` is a live u64, which is what PTRACE_PEEKDATA writes.
    Errno::result(unsafe { libc::syscall(args.0, args.1, args.2, addr, &raw mut word) })?;
    Ok(word)
}

/// PTRACE_POKEDATA: a word into its memory, into a private copy of the page where it may not write itself.
///
/// # Errors
/// EIO if nothing is mapped there, ESRCH if the task is not stopped.
pub fn poke(pid: Pid, addr: u64, word: u64) -> Result<()> {
    request(libc::PTRACE_POKEDATA, pid, addr as usize, word as usize).map(drop)
}

const NT_X86_XSTATE: usize = 0x202;

/// The whole extended state (x87, SSE, AVX, …) in the layout of XSAVE (standard format), PTRACE_GETREGSET.
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn xstate(pid: Pid) -> Result<Vec<u8>> {
    let mut buf = [0u8; 16 * 1024];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    request(libc::PTRACE_GETREGSET, pid, NT_X86_XSTATE, &raw mut iov as usize)?;
    Ok(buf[..iov.iov_len].to_vec())
}

/// PTRACE_SETREGSET of what [`xstate`] gave.
///
/// # Errors
/// EINVAL if this CPU doesn't know a component in it.
pub fn set_xstate(pid: Pid, bytes: &[u8]) -> Result<()> {
    let iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    request(libc::PTRACE_SETREGSET, pid, NT_X86_XSTATE, &raw const iov as usize).map(drop)
}

/// PTRACE_GETSIGMASK: bit n-1 is signal n.
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn signal_mask(pid: Pid) -> Result<u64> {
    let mut mask = 0u64;
    request(libc::PTRACE_GETSIGMASK, pid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// PTRACE_SETSIGMASK. The mask stays if the tracer dies: on a live task only while a self-finishing block that puts
/// the old mask back is where the task would go on.
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn set_signal_mask(pid: Pid, mask: u64) -> Result<()> {
    request(libc::PTRACE_SETSIGMASK, pid, 8, &raw const mask as usize).map(drop)
}

/// A queued signal, `siginfo_t` as the kernel lays it out (128 bytes).
pub type SigInfo = [u8; 128];

#[repr(C)]
struct PeekArgs {
    off: u64,
    flags: u32,
    nr: i32,
}

/// All queued signals: of the thread, or those shared by its process (PTRACE_PEEKSIGINFO).
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn queued_signals(pid: Pid, shared: bool) -> Result<Vec<SigInfo>> {
    const CHUNK: usize = 32;
    let mut out = Vec::new();
    loop {
        let args = PeekArgs { off: out.len() as u64, flags: u32::from(shared), nr: CHUNK as i32 };
        let mut buf = [[0u8; 128]; CHUNK];
        let n = request(libc::PTRACE_PEEKSIGINFO, pid, &raw const args as usize, buf.as_mut_ptr() as usize)?;
        out.extend_from_slice(&buf[..n as usize]);
        if (n as usize) < CHUNK {
            return Ok(out);
        }
    }
}

/// A thread's registered rseq area (`include/uapi/linux/ptrace.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfiguration {
    /// Address of `struct rseq`, 0 if none is registered.
    pub pointer: u64,
    /// Its length in bytes as registered.
    pub size: u32,
    /// The signature before every abort handler.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    pad: u32,
}

/// PTRACE_GET_RSEQ_CONFIGURATION.
///
/// # Errors
/// EIO on kernels without it.
pub fn rseq(pid: Pid) -> Result<RseqConfiguration> {
    const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
    let mut c = RseqConfiguration { pointer: 0, size: 0, signature: 0, flags: 0, pad: 0 };
    request(PTRACE_GET_RSEQ_CONFIGURATION, pid, size_of::<RseqConfiguration>(), &raw mut c as usize)?;
    Ok(c)
}

/// Whether a thread's system calls may be handed to it by SIGSYS instead of being made (PR_SET_SYSCALL_USER_DISPATCH): then
/// no call may be made in it. False on kernels before 6.4, which don't tell (PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG).
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn dispatches_calls(pid: Pid) -> Result<bool> {
    const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
    // Mode, offset, length, selector; mode 0 is off.
    let mut config = [0u64; 4];
    let to = &raw mut config as usize;
    match request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, pid, size_of_val(&config), to) {
        Ok(_) => Ok(config[0] != 0),
        Err(Errno::EIO) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whether a task is in the stop that PTRACE_INTERRUPT or job control made, and not in one of its own (PTRACE_GETSIGINFO: the event in
/// si_code).
///
/// # Errors
/// ESRCH if it does not stand still, or is another that has got this id by executing a program (execve(2) in a thread).
pub fn is_in_event_stop(pid: Pid) -> Result<bool> {
    let mut info = [0u8; size_of::<libc::siginfo_t>()];
    request(libc::PTRACE_GETSIGINFO, pid, 0, info.as_mut_ptr() as usize)?;
    let code = i32::from_ne_bytes(info[8..12].try_into().unwrap_or_default());
    Ok(code >> 8 == libc::PTRACE_EVENT_STOP)
}

/// PTRACE_GETEVENTMSG: for a clone, fork or vfork event the new task's id.
///
/// # Errors
/// ESRCH if the task is not stopped.
pub fn event_message(pid: Pid) -> Result<u64> {
    let mut m = 0u64;
    request(libc::PTRACE_GETEVENTMSG, pid, 0, &raw mut m as usize)?;
    Ok(m)
}

/// The system call a stopped or sleeping task is in is not needed: what a stop was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// PTRACE_EVENT_STOP: by interrupt, by attaching to a new task, or a group stop with this signal.
    Event {
        /// SIGTRAP for an interrupt, else the stopping signal of a group stop.
        signal: i32,
    },
    /// A signal is about to be delivered.
    Signal(i32),
    /// Entry to or exit from a system call.
    Syscall,
    /// PTRACE_EVENT_CLONE, FORK, VFORK, EXEC …
    Ptrace(i32),
    /// The task is gone with this wait status.
    Gone(i32),
}

fn decode(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Gone(status);
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        libc::PTRACE_EVENT_STOP => Stop::Event { signal },
        event => Stop::Ptrace(event),
    }
}

/// Waits for the next stop or the end of one tracee.
///
/// # Errors
/// ECHILD if the task is not ours.
pub fn wait(pid: Pid) -> Result<Stop> {
    // The tracee runs: in the midst of a list of calls, for one.
    crate::hook::point();
    loop {
        match wait_flags(pid, 0) {
            Ok(Some((_, stop))) => return Ok(stop),
            Ok(None) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// As [`wait`], without waiting; `pid` -1 stands for any tracee.
///
/// # Errors
/// ECHILD if there is no such tracee.
pub fn try_wait(pid: Pid) -> Result<Option<(Pid, Stop)>> {
    wait_flags(pid, libc::WNOHANG)
}

fn wait_flags(pid: Pid, flags: i32) -> Result<Option<(Pid, Stop)>> {
    let mut status = 0;
    // SAFETY: `status` is a live int.
    let n = Errno::result(unsafe { libc::waitpid(pid.as_raw(), &raw mut status, libc::__WALL | flags) })?;
    Ok((n != 0).then(|| (Pid::from_raw(n), decode(status))))
}

/// Reaps a child that has ended or will end now.
///
/// # Errors
/// ECHILD if it is not a child.
pub fn reap(pid: Pid) -> Result<WaitStatus> {
    nix::sys::wait::waitpid(pid, Some(WaitPidFlag::__WALL))
}
