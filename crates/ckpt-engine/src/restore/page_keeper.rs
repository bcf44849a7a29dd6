// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process outside the job that holds copies of the page server's userfaultfds.
//!
//! Memory that nobody watches any more reads as zeros. If init is killed, the kernel closes its descriptors before it kills the
//! processes of its pid namespace: for a moment they would run on with zeros in place of what was missing. The keeper, which
//! gets copies of all descriptors, closes its own only when init, and with it the whole namespace, is gone.
//!
//! Messages are one byte, each perhaps with a descriptor: `i` init's pidfd, `h` one to hold, `d` done, close all.

use ckpt_sys::local_socket::{receive_descriptor, send_descriptor};
use ckpt_sys::{Pid, spawn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// The end of the connection that the page server has.
#[derive(Debug)]
pub struct Keeper(OwnedFd);

/// Forks the keeper, as a grandchild that nobody has to wait for. Returns the socket that becomes a [`Keeper`] in the job's init.
///
/// # Errors
/// If it can't be made.
pub fn fork() -> std::io::Result<OwnedFd> {
    let (ours, theirs) = ckpt_sys::local_socket::pair()?;
    let child = spawn::fork_child(|| {
        let kept = spawn::fork_child(|| keep(&theirs));
        i32::from(kept.is_err())
    })?;
    match nix::sys::wait::waitpid(Pid::from_raw(child), None)? {
        nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(ours),
        _ => Err(std::io::Error::other("the process that keeps descriptors could not be forked")),
    }
}

/// The keeper's life.
fn keep(socket: &OwnedFd) -> i32 {
    // Nothing of the terminal, the pipes or the directory of whoever restores is its business.
    let _ = nix::unistd::setsid();
    let _ = spawn::set_blocked_signals(!0);
    let _ = nix::sys::prctl::set_name(c"ckpt-keeper");
    let _ = std::env::set_current_dir("/");
    if let Ok(null) = std::fs::File::options().read(true).write(true).open("/dev/null") {
        (0..3).for_each(|fd| drop(spawn::replace_standard(fd, &null)));
    }
    let listing = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let open: Vec<RawFd> = listing.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2 && *fd != socket.as_raw_fd()) {
        let _ = spawn::close_inherited(fd);
    }
    raise_limit();
    let (mut init, mut held) = (None, Vec::new());
    loop {
        match receive_descriptor(socket.as_fd()) {
            Ok(Some((b'i', Some(fd)))) => init = Some(fd),
            Ok(Some((b'h', Some(fd)))) => held.push(fd),
            Ok(Some((b'd', _))) => return 0,
            Ok(Some(_)) => {}
            // The end of the connection, or what comes to the same.
            Ok(None) | Err(_) => break,
        }
    }
    if let Some(init) = init.filter(|_| !held.is_empty()) {
        // Readable when all of the pid namespace is gone.
        while poll(&mut [PollFd::new(init.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)
            == Err(Errno::EINTR)
        {}
    }
    0
}

/// There is a descriptor for each process that forks while pages are missing.
pub fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

impl Keeper {
    /// The keeper at the other end of this socket.
    pub fn new(socket: OwnedFd) -> Keeper {
        raise_limit();
        Keeper(socket)
    }

    /// Tells it whose end to wait for.
    ///
    /// # Errors
    /// EPIPE if it is gone.
    pub fn watch_this_process(&self) -> std::io::Result<()> {
        let pidfd = ckpt_sys::task::pidfd_open(Pid::this())?;
        send_descriptor(self.0.as_fd(), b'i', Some(pidfd.as_fd()))
    }

    /// Gives it a copy of a descriptor.
    ///
    /// # Errors
    /// EPIPE if it is gone.
    pub fn hold(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        send_descriptor(self.0.as_fd(), b'h', Some(fd))
    }

    /// Makes it close everything, and waits until it has.
    pub fn dismiss(&self) {
        // One that is gone has closed everything.
        if send_descriptor(self.0.as_fd(), b'd', None).is_ok() {
            while let Ok(Some(_)) = receive_descriptor(self.0.as_fd()) {}
        }
    }
}
