// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pseudoterminals and window sizes: the ioctls of ioctl_tty(2) without a safe wrapper.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use ckpt_abi::init_protocol::WindowSize;

/// A pseudoterminal.
#[derive(Debug)]
pub struct Pty {
    /// The master, close-on-exec and non-blocking.
    pub master: OwnedFd,
    /// N of /dev/pts/N in the devpts instance it came from.
    pub number: u32,
}

/// Opens a new pseudoterminal through `/dev/ptmx` and unlocks it. Which devpts instance it comes from is the kernel's
/// choice: the one mounted on `pts` beside the device node.
///
/// # Errors
/// As open(2): `ENOSPC` when /proc/sys/kernel/pty/max is reached, `ENODEV` or `ENOENT` without devpts.
pub fn open() -> io::Result<Pty> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open("/dev/ptmx")?;
    let master = OwnedFd::from(file);
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })?;
    let mut number: libc::c_uint = 0;
    // SAFETY: TIOCGPTN writes an unsigned int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) })?;
    Ok(Pty { master, number })
}

/// Opens the other end of a master, whatever is mounted on /dev/pts; close-on-exec, not as controlling terminal.
///
/// # Errors
/// As ioctl_tty(2), TIOCGPTPEER.
pub fn open_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // O_CLOEXEC would stay in the description's own flags, and every duplicate look close-on-exec in fdinfo.
    let flags = libc::O_RDWR | libc::O_NOCTTY;
    // SAFETY: TIOCGPTPEER takes open flags by value.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    check(fd)?;
    crate::spawn::set_close_on_exec(fd, true)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes `terminal` the controlling terminal of the calling session leader, which has none yet.
///
/// # Errors
/// `EPERM` if the caller leads no session, has a terminal already, or the terminal belongs to another session.
pub fn become_controlling(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer by value; 0 never steals.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })
}

/// The window size of a terminal.
///
/// # Errors
/// `ENOTTY` for what is no terminal.
pub fn window_size(terminal: BorrowedFd<'_>) -> io::Result<WindowSize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes a struct winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) })?;
    Ok(WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
        width_pixels: size.ws_xpixel,
        height_pixels: size.ws_ypixel,
    })
}

/// Sets the window size of a terminal; the foreground process group gets SIGWINCH if it changed.
///
/// # Errors
/// `ENOTTY` for what is no terminal.
pub fn set_window_size(terminal: BorrowedFd<'_>, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: size.width_pixels,
        ws_ypixel: size.height_pixels,
    };
    // SAFETY: TIOCSWINSZ reads a struct winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
}

/// The foreground process group of a terminal, asked through either end; `None` if it has none.
///
/// # Errors
/// `ENOTTY` for what is no terminal.
pub fn foreground_group(terminal: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let mut group: libc::pid_t = 0;
    // SAFETY: TIOCGPGRP writes a pid_t.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGPGRP, &raw mut group) })?;
    Ok((group > 0).then_some(group))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn size_passes_from_end_to_end() {
        let pty = open().unwrap();
        let slave = open_peer(pty.master.as_fd()).unwrap();
        let size = WindowSize { rows: 31, columns: 97, width_pixels: 5, height_pixels: 6 };
        set_window_size(pty.master.as_fd(), size).unwrap();
        assert_eq!(window_size(slave.as_fd()).unwrap(), size);
        assert_eq!(foreground_group(pty.master.as_fd()).unwrap(), None);
    }
}
