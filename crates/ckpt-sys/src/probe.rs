// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finding out by trying what the kernel lets this process do; nothing is left changed.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// `UFFD_USER_MODE_ONLY` of linux/userfaultfd.h.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// Opens a userfaultfd, to see whether it may be. With `kernel_faults` faults in system calls are served too, which takes a privilege
/// on most hosts.
///
/// # Errors
/// `EPERM` where it takes a privilege, `ENOSYS` where the kernel has none.
pub fn userfaultfd(kernel_faults: bool) -> io::Result<OwnedFd> {
    let mode = if kernel_faults { 0 } else { UFFD_USER_MODE_ONLY };
    // SAFETY: takes flags by value and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | mode) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Whether a child can be made under a pid of our choice, by making one and waiting for it.
///
/// # Errors
/// `EPERM` without the privilege in the pid namespace's owner, `EEXIST` if the pid is taken, `ENOSYS` or `EINVAL` before Linux 5.5;
/// as [`crate::spawn::fork_child`].
pub fn child_with_pid(pid: i32) -> io::Result<()> {
    let child = crate::spawn::fork_child_with_pid(pid, || 0)?;
    let mut status = 0;
    // SAFETY: a pointer to a live int.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    if child == pid { Ok(()) } else { Err(io::Error::other(format!("asked for pid {pid}, got {child}"))) }
}
