// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can be asked of a descriptor that nix has no safe call for.

use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

type Result<T> = std::result::Result<T, Errno>;

fn fcntl(fd: BorrowedFd<'_>, command: i32, arg: u64) -> Result<i32> {
    // SAFETY: private; `arg` is a number, or the address of a live object of the size the command expects.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), command, arg) })
}

/// Status flags and access mode (F_GETFL).
///
/// # Errors
/// EBADF never, the descriptor being borrowed.
pub fn flags(fd: BorrowedFd<'_>) -> Result<i32> {
    fcntl(fd, libc::F_GETFL, 0)
}

/// Makes this process's table of descriptors as large as a dump of many tasks needs. Later the kernel would make it larger step by
/// step, and each time wait, for milliseconds, until no other thread of the process can be using the old one. Call it while there is one
/// thread.
pub fn make_room() {
    const ENOUGH: u64 = 4096;
    let limit = crate::task::limit(nix::unistd::Pid::this(), libc::RLIMIT_NOFILE);
    let last = limit.map_or(0, |(soft, _)| soft.min(ENOUGH).saturating_sub(1));
    // Whatever it refers to: the copy is gone at once.
    if let Ok(copy) = fcntl(std::io::stderr().as_fd(), libc::F_DUPFD_CLOEXEC, last) {
        // SAFETY: a new descriptor that nobody else owns.
        drop(unsafe { OwnedFd::from_raw_fd(copy) });
    }
}

/// Capacity of a pipe in bytes (F_GETPIPE_SZ).
///
/// # Errors
/// EBADF if it is no pipe.
pub fn pipe_capacity(fd: BorrowedFd<'_>) -> Result<i32> {
    fcntl(fd, libc::F_GETPIPE_SZ, 0)
}

/// Seals of a memfd (F_GET_SEALS).
///
/// # Errors
/// EINVAL if it can't have seals.
pub fn seals(fd: BorrowedFd<'_>) -> Result<i32> {
    fcntl(fd, libc::F_GET_SEALS, 0)
}

/// Who gets SIGIO (F_GETOWN_EX: type and id, as seen in the caller's pid namespace) and which signal (F_GETSIG).
///
/// # Errors
/// Those of fcntl(2).
pub fn owner(fd: BorrowedFd<'_>) -> Result<(i32, i32, i32)> {
    const F_GETOWN_EX: i32 = 16;
    const F_GETSIG: i32 = 11;
    let mut ex = [0i32; 2];
    fcntl(fd, F_GETOWN_EX, ex.as_mut_ptr() as u64)?;
    Ok((ex[0], ex[1], fcntl(fd, F_GETSIG, 0)?))
}

/// Bytes ready to be read (FIONREAD).
///
/// # Errors
/// ENOTTY where it has no meaning.
pub fn readable_bytes(fd: BorrowedFd<'_>) -> Result<i32> {
    let mut n = 0i32;
    // SAFETY: FIONREAD writes one int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) })?;
    Ok(n)
}

/// A copy of everything in a pipe, leaving it there (tee(2) into a pipe of at least that capacity): what each read(2)
/// gives, so that packets (O_DIRECT, pipe(2)) stay packets.
///
/// # Errors
/// Those of tee(2) and pipe2(2).
pub fn peek_pipe(read_end: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>> {
    let capacity = pipe_capacity(read_end)?;
    let (r, w) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)?;
    // A refusal (fs.pipe-user-pages-soft) is noticed below, when not everything fits.
    {
        use std::os::fd::AsFd;
        let _ = fcntl(w.as_fd(), libc::F_SETPIPE_SZ, capacity as u64);
    }
    let queued = readable_bytes(read_end)? as usize;
    if queued == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: tee takes two descriptors and numbers.
    let n = Errno::result(unsafe {
        libc::tee(read_end.as_raw_fd(), w.as_raw_fd(), i32::MAX as usize, libc::SPLICE_F_NONBLOCK)
    })? as usize;
    if n < queued {
        return Err(Errno::ENOBUFS);
    }
    drop(w);
    let (mut out, mut buf, mut done) = (Vec::new(), vec![0u8; n], 0);
    while done < n {
        match nix::unistd::read(&r, &mut buf)? {
            0 => return Err(Errno::EIO),
            k => {
                out.push(buf[..k].to_vec());
                done += k;
            }
        }
    }
    Ok(out)
}

/// The kernel's `struct termios2`, 44 bytes, and `struct winsize`, 8 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terminal {
    /// TCGETS2.
    pub termios: [u8; 44],
    /// TIOCGWINSZ.
    pub winsize: [u8; 8],
}

/// Settings of a terminal.
///
/// # Errors
/// ENOTTY.
pub fn terminal(fd: BorrowedFd<'_>) -> Result<Terminal> {
    let mut t = Terminal { termios: [0; 44], winsize: [0; 8] };
    // SAFETY: TCGETS2 writes 44 bytes, TIOCGWINSZ 8.
    unsafe {
        Errno::result(libc::ioctl(fd.as_raw_fd(), libc::TCGETS2, t.termios.as_mut_ptr()))?;
        Errno::result(libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, t.winsize.as_mut_ptr()))?;
    }
    Ok(t)
}

/// Puts the settings of a terminal back.
///
/// # Errors
/// ENOTTY.
pub fn set_terminal(fd: BorrowedFd<'_>, t: &Terminal) -> Result<()> {
    // SAFETY: TCSETS2 reads 44 bytes, TIOCSWINSZ 8.
    unsafe {
        Errno::result(libc::ioctl(fd.as_raw_fd(), libc::TCSETS2, t.termios.as_ptr()))?;
        Errno::result(libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, t.winsize.as_ptr()))?;
    }
    Ok(())
}

/// Makes `to` hold what `from` holds by sharing its extents (FICLONE): at once, and neither changes with the other later.
///
/// # Errors
/// EXDEV, EOPNOTSUPP or EINVAL where the file system can't do that.
pub fn clone_content(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: FICLONE takes a descriptor by number and touches no memory.
    Errno::result(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) }).map(drop)
}

/// First byte of data at or after `offset` (SEEK_DATA); `None` if there is only a hole. Moves the file's position.
///
/// # Errors
/// Those of lseek(2).
pub fn next_data(file: &std::fs::File, offset: u64) -> Result<Option<u64>> {
    match nix::unistd::lseek(file, offset as i64, nix::unistd::Whence::SeekData) {
        Ok(n) => Ok(Some(n as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// First hole, or the end, after `offset` (SEEK_HOLE). Moves the file's position.
///
/// # Errors
/// Those of lseek(2).
pub fn next_hole(file: &std::fs::File, offset: u64) -> Result<u64> {
    nix::unistd::lseek(file, offset as i64, nix::unistd::Whence::SeekHole).map(|n| n as u64)
}

/// timerfd_gettime(2): interval and time left. Restarts a periodic timer that has expired unread.
///
/// # Errors
/// EINVAL if it is no timerfd.
pub fn timerfd_gettime(fd: BorrowedFd<'_>) -> Result<[i64; 4]> {
    let mut spec = [0i64; 4];
    // SAFETY: the call writes a `struct itimerspec`, 32 bytes.
    Errno::result(unsafe { libc::syscall(libc::SYS_timerfd_gettime, fd.as_raw_fd(), spec.as_mut_ptr()) })?;
    Ok(spec)
}
