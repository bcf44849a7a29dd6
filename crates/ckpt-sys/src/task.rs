// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tasks and processes seen from outside: pidfds, kcmp(2), scheduling, robust lists, signals to oneself.

use nix::errno::Errno;
use nix::unistd::Pid;
use std::cmp::Ordering;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

type Result<T> = std::result::Result<T, Errno>;

fn raw(nr: i64, args: [u64; 6]) -> Result<i64> {
    // SAFETY: private; callers pass only numbers, or addresses of live objects of the size the call expects.
    Errno::result(unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5]) })
}

/// pidfd_open(2).
///
/// # Errors
/// ESRCH if there is no such process.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd> {
    let fd = raw(libc::SYS_pidfd_open, [pid.as_raw() as u64, 0, 0, 0, 0, 0])?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// pidfd_getfd(2): the same open file description as `fd` of that process.
///
/// # Errors
/// EBADF if it has no such descriptor, EPERM without the right to trace it.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd> {
    let fd = raw(libc::SYS_pidfd_getfd, [pidfd.as_raw_fd() as u64, fd as u64, 0, 0, 0, 0])?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What kcmp(2) compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// Open file descriptions behind two descriptors.
    File(i32, i32),
    /// Address spaces.
    Memory,
    /// Descriptor tables.
    Files,
    /// Root, working directory, umask.
    Fs,
    /// Signal actions.
    SignalActions,
    /// System V semaphore undo lists.
    SemaphoreUndo,
}

/// kcmp(2): `Equal` means the same kernel object, the others are an order.
///
/// # Errors
/// EPERM without the right to trace both, EBADF.
pub fn kcmp(a: Pid, b: Pid, what: Shared) -> Result<Ordering> {
    let (kind, x, y) = match what {
        Shared::File(x, y) => (0, x, y),
        Shared::Memory => (1, 0, 0),
        Shared::Files => (2, 0, 0),
        Shared::Fs => (3, 0, 0),
        Shared::SignalActions => (4, 0, 0),
        Shared::SemaphoreUndo => (6, 0, 0),
    };
    let n = raw(libc::SYS_kcmp, [a.as_raw() as u64, b.as_raw() as u64, kind, x as u64, y as u64, 0])?;
    Ok(match n {
        0 => Ordering::Equal,
        1 => Ordering::Less,
        _ => Ordering::Greater,
    })
}

/// True if `target`, a descriptor of `pid`, is the description that epoll instance `epfd` of `pid` watches as
/// descriptor number `number` (its `offset`-th entry of that number), KCMP_EPOLL_TFD.
///
/// # Errors
/// ENOENT if the epoll instance has no such entry.
pub fn epoll_watches(pid: Pid, target: i32, epfd: i32, number: i32, offset: u32) -> Result<bool> {
    let slot = [epfd as u32, number as u32, offset];
    let args = [pid.as_raw() as u64, pid.as_raw() as u64, 7, target as u64, slot.as_ptr() as u64, 0];
    Ok(raw(libc::SYS_kcmp, args)? == 0)
}

/// get_robust_list(2): address and length.
///
/// # Errors
/// EPERM without the right to trace the task.
pub fn robust_list(tid: Pid) -> Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    raw(
        libc::SYS_get_robust_list,
        [tid.as_raw() as u64, &raw mut head as u64, &raw mut len as u64, 0, 0, 0],
    )?;
    Ok((head, len))
}

/// sched_getaffinity(2) as raw bytes.
///
/// # Errors
/// ESRCH.
pub fn affinity(tid: Pid) -> Result<Vec<u8>> {
    let mut mask = vec![0u8; 1024];
    let n = raw(
        libc::SYS_sched_getaffinity,
        [tid.as_raw() as u64, mask.len() as u64, mask.as_mut_ptr() as u64, 0, 0, 0],
    )?;
    mask.truncate(n as usize);
    Ok(mask)
}

/// sched_setaffinity(2).
///
/// # Errors
/// EINVAL if none of the CPUs exists here.
pub fn set_affinity(tid: Pid, mask: &[u8]) -> Result<()> {
    raw(libc::SYS_sched_setaffinity, [tid.as_raw() as u64, mask.len() as u64, mask.as_ptr() as u64, 0, 0, 0])
        .map(drop)
}

/// `struct sched_attr` (sched_setattr(2)), first version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct SchedAttr {
    /// Length of this structure in bytes; set by [`set_sched_attr`].
    pub size: u32,
    /// SCHED_OTHER, SCHED_BATCH, …
    pub policy: u32,
    /// SCHED_FLAG_RESET_ON_FORK and others.
    pub flags: u64,
    /// Nice value of SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// Priority of SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// SCHED_DEADLINE, nanoseconds.
    pub runtime: u64,
    /// SCHED_DEADLINE, nanoseconds.
    pub deadline: u64,
    /// SCHED_DEADLINE, nanoseconds.
    pub period: u64,
}

/// sched_getattr(2).
///
/// # Errors
/// ESRCH.
pub fn sched_attr(tid: Pid) -> Result<SchedAttr> {
    let mut a = SchedAttr::default();
    let size = size_of::<SchedAttr>() as u64;
    raw(libc::SYS_sched_getattr, [tid.as_raw() as u64, &raw mut a as u64, size, 0, 0, 0])?;
    Ok(a)
}

/// sched_setattr(2).
///
/// # Errors
/// EPERM for real-time policies without the right.
pub fn set_sched_attr(tid: Pid, attr: &SchedAttr) -> Result<()> {
    let mut a = *attr;
    a.size = size_of::<SchedAttr>() as u32;
    raw(libc::SYS_sched_setattr, [tid.as_raw() as u64, &raw const a as u64, 0, 0, 0, 0]).map(drop)
}

/// getpriority(2): the nice value, which sched_getattr(2) doesn't tell for every policy.
///
/// # Errors
/// ESRCH.
pub fn nice(tid: Pid) -> Result<i32> {
    // The kernel gives 20 - nice, so that no value looks like an error.
    let n = raw(libc::SYS_getpriority, [libc::PRIO_PROCESS as u64, tid.as_raw() as u64, 0, 0, 0, 0])?;
    Ok(20 - n as i32)
}

/// setpriority(2).
///
/// # Errors
/// EACCES to lower it without the right.
pub fn set_nice(tid: Pid, nice: i32) -> Result<()> {
    let args = [libc::PRIO_PROCESS as u64, tid.as_raw() as u64, i64::from(nice) as u64, 0, 0, 0];
    raw(libc::SYS_setpriority, args).map(drop)
}

/// ioprio_get(2) of one task.
///
/// # Errors
/// ESRCH.
pub fn io_priority(tid: Pid) -> Result<i32> {
    raw(libc::SYS_ioprio_get, [1, tid.as_raw() as u64, 0, 0, 0, 0]).map(|n| n as i32)
}

/// ioprio_set(2) of one task.
///
/// # Errors
/// EPERM for the real-time class without the right.
pub fn set_io_priority(tid: Pid, value: i32) -> Result<()> {
    raw(libc::SYS_ioprio_set, [1, tid.as_raw() as u64, value as u64, 0, 0, 0]).map(drop)
}

/// prlimit(2): soft and hard limit of a process, u64::MAX for none.
///
/// # Errors
/// EPERM without the right to see them.
pub fn limit(pid: Pid, resource: u32) -> Result<(u64, u64)> {
    let mut old = [0u64; 2];
    raw(libc::SYS_prlimit64, [pid.as_raw() as u64, u64::from(resource), 0, old.as_mut_ptr() as u64, 0, 0])?;
    Ok((old[0], old[1]))
}

/// prlimit(2): sets both limits of a process.
///
/// # Errors
/// EPERM to raise a hard limit without CAP_SYS_RESOURCE on the host.
pub fn set_limit(pid: Pid, resource: u32, soft: u64, hard: u64) -> Result<()> {
    let new = [soft, hard];
    raw(libc::SYS_prlimit64, [pid.as_raw() as u64, u64::from(resource), new.as_ptr() as u64, 0, 0, 0])
        .map(drop)
}

/// kill(2), for any signal number.
///
/// # Errors
/// ESRCH, EPERM, EINVAL.
pub fn kill(pid: Pid, signal: i32) -> Result<()> {
    raw(libc::SYS_kill, [pid.as_raw() as u64, signal as u64, 0, 0, 0, 0]).map(drop)
}

/// Keeps this thread on the CPU of the task that it drives, until it is dropped; the task is not pinned.
///
/// A stop is answered six times faster on the same CPU than across CPUs.
#[derive(Debug, Default)]
pub struct Beside {
    cpu: Option<usize>,
    /// Where this thread may run otherwise.
    old: Option<Vec<u8>>,
}

/// The CPU on which thread `tid` of `pid` ran last.
pub fn last_cpu(pid: Pid, tid: Pid) -> Option<usize> {
    use std::io::Read;
    let mut text = [0; 1024];
    let n = std::fs::File::open(format!("/proc/{pid}/task/{tid}/stat")).ok()?.read(&mut text).ok()?;
    let text = std::str::from_utf8(&text[..n]).ok()?;
    text.rsplit(')').next()?.split_whitespace().nth(36)?.parse::<usize>().ok()
}

impl Beside {
    /// Moves this thread to the CPU on which a task ran last ([`last_cpu`]), where that is possible.
    pub fn on(&mut self, cpu: Option<usize>) {
        let Some(cpu) = cpu.filter(|cpu| self.cpu != Some(*cpu)) else { return };
        let this = Pid::from_raw(0);
        if self.old.is_none() {
            self.old = affinity(this).ok();
        }
        let mut mask = vec![0u8; self.old.as_ref().map_or(0, Vec::len).max(cpu / 8 + 1)];
        mask[cpu / 8] = 1 << (cpu % 8);
        if set_affinity(this, &mask).is_ok() {
            self.cpu = Some(cpu);
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Some(old) = self.old.take().filter(|_| self.cpu.is_some()) {
            let _ = set_affinity(Pid::from_raw(0), &old);
        }
    }
}

/// Leaves the CPU to whoever waits for it, and goes on on another one where there is one: a task that has just been let go
/// waits where it was woken, on the CPU of its waker, also while another CPU is idle.
pub fn make_way() {
    let here = Pid::from_raw(0);
    let moved = affinity(here).and_then(|allowed| {
        set_affinity(here, &without(&allowed, this_cpu()).ok_or(Errno::EINVAL)?)?;
        set_affinity(here, &allowed)
    });
    if moved.is_err() {
        std::thread::yield_now();
    }
}

/// Keeps another thread of this process off the CPU that this one runs on, where it has others: it is woken elsewhere then.
pub fn keep_off(thread: Pid) {
    if let Some(others) = affinity(Pid::from_raw(0)).ok().and_then(|allowed| without(&allowed, this_cpu())) {
        let _ = set_affinity(thread, &others);
    }
}

/// Lets another thread of this process run wherever this one may.
pub fn keep_off_no_more(thread: Pid) {
    let _ = affinity(Pid::from_raw(0)).and_then(|allowed| set_affinity(thread, &allowed));
}

/// The calling thread.
pub fn this() -> Pid {
    nix::unistd::gettid()
}

fn this_cpu() -> usize {
    // SAFETY: no arguments.
    usize::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(usize::MAX)
}

/// A set of CPUs without one; `None` if it has no other.
fn without(cpus: &[u8], cpu: usize) -> Option<Vec<u8>> {
    let mut others = cpus.to_vec();
    *others.get_mut(cpu / 8)? &= !(1 << (cpu % 8));
    others.iter().any(|bits| *bits != 0).then_some(others)
}

/// SIGKILL to this process itself: the end of the road in tests that kill ckpt at chosen points.
pub fn kill_self() -> ! {
    let _ = nix::sys::signal::kill(Pid::this(), nix::sys::signal::Signal::SIGKILL);
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_makes_way_may_come_back() {
        let before = affinity(Pid::from_raw(0)).unwrap();
        make_way();
        assert_eq!(affinity(Pid::from_raw(0)).unwrap(), before);
    }

    #[test]
    fn one_cpu_alone_has_no_others() {
        assert_eq!(without(&[0b11, 0b1], 8), Some(vec![0b11, 0]));
        assert_eq!(without(&[0b11, 0], 1), Some(vec![0b1, 0]));
        assert_eq!(without(&[0, 0b1], 8), None);
        assert_eq!(without(&[0b1], 8), None);
    }
}
