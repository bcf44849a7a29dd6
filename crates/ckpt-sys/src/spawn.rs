// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starting processes: fork, what a process inherited, and becoming the user's command.
//!
//! Everything here presumes a process with one thread; the functions that need it check it.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

/// Signals are numbered from 1 to this.
pub const MAX_SIGNAL: i32 = 64;

// ---- What the process was given by whoever executed it ----

/// Bit 0: SIGPIPE was ignored. Bits 1 to 3: fds 0 to 2 were closed. Bit 31: recorded.
static AT_START: AtomicU32 = AtomicU32::new(0);

/// Runs before the Rust runtime, which ignores SIGPIPE and opens /dev/null on closed standard fds: afterwards nobody
/// could tell what the user's shell had set up.
extern "C" fn record_inheritance() {
    let mut bits = 1 << 31;
    // SAFETY: sigaction is plain old data, a zeroed one is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks for the present action and writes it into live memory.
    unsafe { libc::sigaction(libc::SIGPIPE, std::ptr::null(), &raw mut action) };
    if action.sa_sigaction == libc::SIG_IGN {
        bits |= 1;
    }
    for fd in 0..3 {
        // SAFETY: F_GETFD has no argument and no effect.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            bits |= 2 << fd;
        }
    }
    AT_START.store(bits, Ordering::Relaxed);
}

// SAFETY: the loader calls the functions of .init_array with C linkage before main; this one touches nothing but an
// atomic and makes two kinds of harmless system calls.
#[used]
#[unsafe(link_section = ".init_array")]
static RECORD_INHERITANCE: extern "C" fn() = record_inheritance;

/// Whether the process was started with SIGPIPE ignored; the Rust runtime ignores it in any case.
pub fn started_with_sigpipe_ignored() -> bool {
    AT_START.load(Ordering::Relaxed) & 1 != 0
}

/// Whether the process was started with this fd closed (0, 1 or 2 only); the Rust runtime puts /dev/null there.
pub fn started_with_fd_closed(fd: RawFd) -> bool {
    (0..3).contains(&fd) && AT_START.load(Ordering::Relaxed) & (2 << fd) != 0
}

/// The signals that are ignored, SIGPIPE as it was before the runtime set it.
pub fn ignored_signals() -> Vec<i32> {
    let mut ignored = Vec::new();
    for signal in 1..=MAX_SIGNAL {
        // SAFETY: sigaction is plain old data, a zeroed one is valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: only asks for the present action. Signals reserved by libc give EINVAL and leave SIG_DFL here.
        unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
        let is_ignored = action.sa_sigaction == libc::SIG_IGN;
        if if signal == libc::SIGPIPE { started_with_sigpipe_ignored() } else { is_ignored } {
            ignored.push(signal);
        }
    }
    ignored
}

/// Ignores a signal or gives it its default action.
///
/// # Errors
/// `EINVAL` for SIGKILL, SIGSTOP and numbers that are no signals.
pub fn set_ignored(signal: i32, ignored: bool) -> io::Result<()> {
    // SAFETY: sigaction is plain old data; zeroed means no flags and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = if ignored { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: SIG_IGN and SIG_DFL run no code of ours.
    check(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) }).map(drop)
}

/// Signals as bits: bit n - 1 stands for signal n, as in /proc/pid/status.
pub type SignalMask = u64;

/// Replaces the mask of blocked signals, returning the old one. Signals that libc keeps for itself stay as they are.
///
/// # Errors
/// None expected; whatever `pthread_sigmask(3)` says.
pub fn set_blocked_signals(mask: SignalMask) -> io::Result<SignalMask> {
    // SAFETY: sigset_t is plain old data; sigemptyset initialises it anyway.
    let (mut new, mut old): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: valid pointers to live sets throughout; numbers are within 1..=64.
    unsafe {
        libc::sigemptyset(&raw mut new);
        for signal in (1..=MAX_SIGNAL).filter(|signal| mask & (1 << (signal - 1)) != 0) {
            libc::sigaddset(&raw mut new, signal);
        }
        let error = libc::pthread_sigmask(libc::SIG_SETMASK, &raw const new, &raw mut old);
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        Ok((1..=MAX_SIGNAL)
            .filter(|signal| libc::sigismember(&raw const old, *signal) == 1)
            .fold(0, |bits, signal| bits | 1 << (signal - 1)))
    }
}

/// `kill(2)` with any signal number, real-time ones included. The meaning of `pid` is kill's: negative for a process
/// group, -1 for everything but the caller and pid 1.
///
/// # Errors
/// `ESRCH` if there is no such process or group, `EPERM`, `EINVAL`.
pub fn send_signal(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

// ---- Inherited descriptors ----

static ADOPTED: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes ownership of a descriptor that this process got across `execve`, and makes it close-on-exec. Each number can be
/// adopted once in the life of a process, which is what makes two owners impossible.
///
/// # Errors
/// `EBADF` if it is not open, `AlreadyExists` if it was adopted before.
pub fn adopt_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let mut adopted = ADOPTED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if fd < 3 || adopted.contains(&fd) {
        let text = format!("fd {fd} has an owner already");
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    set_close_on_exec(fd, true)?;
    adopted.insert(fd);
    // SAFETY: the number is open and, by the set, has not been given to an OwnedFd before. Descriptors that the
    // runtime or a library opens itself have numbers that no one passes here, as they are not inherited.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the fd is open and would be passed on by `execve`.
pub fn is_inheritable(fd: RawFd) -> bool {
    // SAFETY: F_GETFD has no argument and no effect.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags != -1 && flags & libc::FD_CLOEXEC == 0
}

/// The file status flags (`O_RDWR`, `O_APPEND` …) of an fd given by number.
///
/// # Errors
/// `EBADF`.
pub fn status_flags(fd: RawFd) -> io::Result<i32> {
    // SAFETY: F_GETFL has no argument and no effect.
    check(unsafe { libc::fcntl(fd, libc::F_GETFL) })
}

/// Sets or clears close-on-exec of an fd given by number.
///
/// # Errors
/// `EBADF`.
pub fn set_close_on_exec(fd: RawFd, on: bool) -> io::Result<()> {
    let flags = if on { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: F_SETFD takes an integer; the descriptor itself stays open.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, flags) }).map(drop)
}

/// Duplicates an fd to the lowest free number from `at_least` on; the copy is passed on by `execve` and has no owner: for
/// use between fork and exec.
///
/// # Errors
/// `EINVAL` if `at_least` is not below RLIMIT_NOFILE, `EMFILE` if nothing is free, `EBADF`.
pub fn duplicate_for_exec(fd: RawFd, at_least: RawFd) -> io::Result<RawFd> {
    // SAFETY: F_DUPFD takes an integer and replaces nothing.
    check(unsafe { libc::fcntl(fd, libc::F_DUPFD, at_least) })
}

/// Duplicates an fd to the lowest free number from `at_least` on, close-on-exec.
///
/// # Errors
/// As [`duplicate_for_exec`].
pub fn duplicate_above(fd: BorrowedFd<'_>, at_least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an integer and replaces nothing.
    let copy = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, at_least) })?;
    // SAFETY: the kernel just gave us this descriptor; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Replaces a standard fd (0, 1 or 2) of this process by a copy of `source`.
///
/// # Errors
/// As dup3(2).
///
/// # Panics
/// If `standard` is not 0, 1 or 2.
pub fn replace_standard(standard: RawFd, source: &impl AsRawFd) -> io::Result<()> {
    assert!((0..3).contains(&standard), "fd {standard} is no standard fd");
    // SAFETY: nobody owns the standard fds exclusively; std's handles look the number up at each use.
    check(unsafe { libc::dup2(source.as_raw_fd(), standard) }).map(drop)
}

/// Closes an inherited fd above 2 that has no owner in this process. Refused if it was adopted.
///
/// # Errors
/// `EBADF` if it is not open, `AlreadyExists` if it has an owner.
pub fn close_inherited(fd: RawFd) -> io::Result<()> {
    adopt_inherited(fd).map(drop)
}

// ---- Processes ----

/// Forks a child that runs `child` and exits with what it returns. Returns the child's pid.
///
/// # Errors
/// As fork(2); `Unsupported` if this process has several threads, as locks that another thread holds would stay locked
/// in the child.
pub fn fork_child(child: impl FnOnce() -> i32) -> io::Result<i32> {
    fork_with(0, child)
}

/// As [`fork_child`], but the child's parent is the caller's parent (`CLONE_PARENT`).
///
/// # Errors
/// As [`fork_child`].
pub fn fork_sibling(child: impl FnOnce() -> i32) -> io::Result<i32> {
    fork_with(libc::CLONE_PARENT, child)
}

/// As [`fork_child`], but the child gets this pid in the caller's pid namespace for children (`clone3` with `set_tid`).
///
/// # Errors
/// As [`fork_child`]; `EPERM` without CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in the owner of the pid namespace, `EEXIST` if the pid is
/// taken.
pub fn fork_child_with_pid(pid: i32, child: impl FnOnce() -> i32) -> io::Result<i32> {
    require_one_thread()?;
    let set_tid = [pid];
    // SAFETY: clone_args is plain old data; zeroed means nothing special.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.set_tid = set_tid.as_ptr() as u64;
    arguments.set_tid_size = 1;
    let size = size_of::<libc::clone_args>();
    // SAFETY: no CLONE_VM and no stack: this is fork with a chosen pid; the pointers are to live memory.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) };
    run_if_child(result as libc::pid_t, child)
}

fn fork_with(flags: libc::c_int, child: impl FnOnce() -> i32) -> io::Result<i32> {
    require_one_thread()?;
    let pid = if flags == 0 {
        // SAFETY: there is one thread, so that the child has a consistent copy of everything.
        unsafe { libc::fork() }
    } else {
        let flags = (flags | libc::SIGCHLD) as libc::c_ulong;
        // SAFETY: without CLONE_VM and with a null stack this is fork with another parent. libc's fork handlers are not
        // run and its cached tid is stale in the child, which executes another program soon.
        (unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) }) as libc::pid_t
    };
    run_if_child(pid, child)
}

fn require_one_thread() -> io::Result<()> {
    match std::fs::read_dir("/proc/self/task")?.count() {
        1 => Ok(()),
        threads => {
            let text = format!("fork from a process with {threads} threads");
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        }
    }
}

fn run_if_child(pid: libc::pid_t, child: impl FnOnce() -> i32) -> io::Result<i32> {
    if check(pid)? == 0 {
        let status = child();
        // SAFETY: ends the process at once; exit handlers and buffers belong to the parent.
        unsafe { libc::_exit(status) };
    }
    Ok(pid)
}

/// Makes `command` start with no signal blocked, whatever is blocked here, and with the descriptors `pass` open; with `dies_too`,
/// SIGKILL reaches it when the calling thread ends.
pub fn clean_start(command: &mut std::process::Command, pass: Vec<RawFd>, dies_too: bool) {
    use std::os::unix::process::CommandExt as _;
    let prepare = move || {
        set_blocked_signals(0)?;
        for fd in &pass {
            set_close_on_exec(*fd, false)?;
        }
        if dies_too {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        }
        Ok(())
    };
    // SAFETY: runs between fork and exec and makes system calls only: no lock is taken and nothing is allocated (a failure makes an
    // io::Error of an errno, which needs no memory).
    unsafe { command.pre_exec(prepare) };
}

/// What [`reap_any`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaped {
    /// This child has ended, with this status as `waitpid(2)` gives it, and is gone.
    Child {
        /// Its pid.
        pid: i32,
        /// Its wait status.
        status: i32,
    },
    /// There are children, and none has ended.
    NoneEnded,
    /// There are no children.
    NoChildren,
}

/// Waits for any child that has ended, whatever signal it was to send, without waiting for one to end.
///
/// # Errors
/// None expected; whatever waitpid(2) says but `ECHILD` and `EINTR`.
pub fn reap_any() -> io::Result<Reaped> {
    loop {
        let mut status = 0;
        // SAFETY: a pointer to a live int.
        match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) } {
            0 => return Ok(Reaped::NoneEnded),
            -1 => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ECHILD) => return Ok(Reaped::NoChildren),
                error if error.raw_os_error() == Some(libc::EINTR) => {}
                error => return Err(error),
            },
            pid => return Ok(Reaped::Child { pid, status }),
        }
    }
}

/// Ends the process at once, without exit handlers.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: does not return and runs no code of this process.
    unsafe { libc::_exit(status) }
}

/// What a forked child does to become the user's command.
#[derive(Debug)]
pub struct Command<'a> {
    /// The program, looked up in PATH of `environment` unless it contains a slash, and its arguments.
    pub argv: &'a [CString],
    /// The whole environment.
    pub environment: &'a [CString],
    /// (where the fd is now, which number the command is to see). No `from` may be the `to` of another.
    pub fds: &'a [(RawFd, RawFd)],
    /// The standard fds that the command is to find closed.
    pub closed: &'a [RawFd],
    /// Signals the command starts ignoring; all others get their default action.
    pub ignored_signals: &'a [i32],
    /// Signals the command starts with blocked.
    pub blocked_signals: SignalMask,
    /// Soft and hard RLIMIT_NOFILE, if it is to be set.
    pub open_files_limit: Option<(u64, u64)>,
    /// Give up all capabilities first.
    pub drop_capabilities: bool,
}

/// Turns the calling process into the command; returns only if that fails, with the reason. For a freshly forked child
/// alone: afterwards the fds of this process are not what their owners think.
pub fn become_command(command: &Command<'_>) -> io::Error {
    match prepare_and_execute(command) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn prepare_and_execute(command: &Command<'_>) -> io::Result<std::convert::Infallible> {
    if command.drop_capabilities {
        crate::namespace::drop_capabilities()?;
    }
    for &(from, to) in command.fds {
        // SAFETY: this child does nothing further with its own descriptors but report an error and exit; the caller
        // keeps the reporting fd out of the way.
        check(unsafe { libc::dup2(from, to) })?;
    }
    for &fd in command.closed {
        // SAFETY: as above.
        unsafe { libc::close(fd) };
    }
    if let Some((soft, hard)) = command.open_files_limit {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
        // SAFETY: a pointer to a live struct rlimit.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    }
    for signal in 1..=MAX_SIGNAL {
        // SIGKILL, SIGSTOP and the two signals of libc give EINVAL, and need nothing.
        let _ = set_ignored(signal, command.ignored_signals.contains(&signal));
    }
    set_blocked_signals(command.blocked_signals)?;
    let program = command.argv.first().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let pointers = |strings: &[CString]| {
        strings.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect::<Vec<_>>()
    };
    let (argv, environment) = (pointers(command.argv), pointers(command.environment));
    let mut error = io::Error::from_raw_os_error(libc::ENOENT);
    for candidate in candidates(program, command.environment) {
        // SAFETY: null-terminated arrays of null-terminated strings that outlive the call.
        unsafe { libc::execve(candidate.as_ptr(), argv.as_ptr(), environment.as_ptr()) };
        let this = io::Error::last_os_error();
        match this.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => {}
            // As execvp(3): go on looking, and remember that there was something.
            Some(libc::EACCES) => {
                // A directory of PATH that may not be searched says nothing about the program.
                // SAFETY: a null-terminated string.
                let exists = unsafe { libc::access(candidate.as_ptr(), libc::F_OK) } == 0;
                if exists || program.to_bytes().contains(&b'/') {
                    error = this;
                }
            }
            // A script without #! line: execvp(3) and every shell give it to sh.
            Some(libc::ENOEXEC) => {
                let mut words = vec![c"sh".to_owned(), candidate.clone()];
                words.extend_from_slice(&command.argv[1..]);
                let words_pointers = pointers(&words);
                // SAFETY: as above.
                unsafe { libc::execve(c"/bin/sh".as_ptr(), words_pointers.as_ptr(), environment.as_ptr()) };
                return Err(io::Error::last_os_error());
            }
            _ => return Err(this),
        }
    }
    Err(error)
}

/// The paths at which execvp(3) would look for a program.
fn candidates(program: &CStr, environment: &[CString]) -> Vec<CString> {
    let name = program.to_bytes();
    if name.contains(&b'/') || name.is_empty() {
        return vec![program.to_owned()];
    }
    let path = environment
        .iter()
        .find_map(|variable| variable.to_bytes().strip_prefix(b"PATH="))
        .unwrap_or(b"/bin:/usr/bin");
    path.split(|byte| *byte == b':')
        .filter_map(|directory| {
            let mut candidate = directory.to_vec();
            if !candidate.is_empty() {
                candidate.push(b'/');
            }
            candidate.extend_from_slice(name);
            CString::new(candidate).ok()
        })
        .collect()
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inheritance_was_recorded() {
        assert!(AT_START.load(Ordering::Relaxed) & (1 << 31) != 0, "record_inheritance did not run");
    }

    #[test]
    fn programs_are_looked_up_in_path() {
        let environment = [c"A=b".to_owned(), c"PATH=/x::/y/z".to_owned()];
        let found = candidates(c"prog", &environment);
        assert_eq!(found, [c"/x/prog".to_owned(), c"prog".to_owned(), c"/y/z/prog".to_owned()]);
        assert_eq!(candidates(c"./prog", &environment), [c"./prog".to_owned()]);
        assert_eq!(candidates(c"prog", &[]), [c"/bin/prog".to_owned(), c"/usr/bin/prog".to_owned()]);
    }

    #[test]
    fn a_descriptor_has_one_owner() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let copy = duplicate_for_exec(file.as_raw_fd(), 700).unwrap();
        assert!(is_inheritable(copy));
        let owned = adopt_inherited(copy).unwrap();
        assert!(!is_inheritable(copy));
        assert_eq!(adopt_inherited(copy).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        drop(owned);
        assert_eq!(adopt_inherited(copy).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(adopt_inherited(9999).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn masks_come_back() {
        let before = set_blocked_signals(1 << (libc::SIGUSR1 - 1) | 1 << 39).unwrap();
        let here = set_blocked_signals(before).unwrap();
        assert_eq!(here, 1 << (libc::SIGUSR1 - 1) | 1 << 39);
    }
}
