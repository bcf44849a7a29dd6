// SPDX-License-Identifier: MIT OR Apache-2.0
//! inotify(7) instances of others, and file handles (open_by_handle_at(2)).

use nix::errno::Errno;
use nix::unistd::read;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};

type Result<T> = std::result::Result<T, Errno>;

/// Bytes of an event without a name.
pub const EVENT_BYTES: usize = 16;

/// Adds a watch and returns its number.
///
/// # Errors
/// ENOENT, EACCES without the right to read the file, ENOSPC beyond fs.inotify.max_user_watches; EINVAL for a path with a
/// NUL.
pub fn add_watch(instance: BorrowedFd<'_>, path: &[u8], mask: u32) -> Result<i32> {
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    // SAFETY: a descriptor, a string that ends with NUL, and a number.
    Errno::result(unsafe { libc::inotify_add_watch(instance.as_raw_fd(), path.as_ptr(), mask) })
}

/// Removes a watch; that queues an IN_IGNORED.
///
/// # Errors
/// EINVAL if there is no such watch.
pub fn remove_watch(instance: BorrowedFd<'_>, number: i32) -> Result<()> {
    // SAFETY: two numbers.
    Errno::result(unsafe { libc::inotify_rm_watch(instance.as_raw_fd(), number) }).map(drop)
}

/// Reads events away until no more than `keep` bytes are queued. If events are left, they are the last ones and without names.
///
/// # Errors
/// EINVAL if it is no inotify instance.
pub fn drain(instance: BorrowedFd<'_>, keep: usize) -> Result<()> {
    // Room for an event with the longest name.
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let queued = crate::descriptor::readable_bytes(instance)? as usize;
        if queued <= keep {
            return Ok(());
        }
        let most = if keep == 0 { buffer.len() } else { (queued - keep).min(buffer.len()) };
        read(instance, &mut buffer[..most])?;
    }
}

/// A file that nobody else has, to be watched.
#[derive(Debug)]
pub struct Decoy {
    memfd: OwnedFd,
    opened: File,
}

impl Decoy {
    /// A new one.
    ///
    /// # Errors
    /// EMFILE, ENOMEM.
    pub fn new() -> Result<Decoy> {
        let memfd = nix::sys::memfd::memfd_create(c"ckpt", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        // What is written through the descriptor of memfd_create(2) itself makes no events.
        let opened = File::options().read(true).write(true).open(path_of(&memfd)).map_err(errno)?;
        Ok(Decoy { memfd, opened })
    }

    /// Watches it, and returns the number of the watch.
    ///
    /// # Errors
    /// As [`add_watch`].
    pub fn watch(&self, instance: BorrowedFd<'_>) -> Result<i32> {
        add_watch(instance, path_of(&self.memfd).as_bytes(), libc::IN_MODIFY | libc::IN_ATTRIB)
    }

    /// Makes two events, of different kinds so that the kernel can't take one for the other.
    fn change(&self, i: usize) -> Result<()> {
        self.opened.write_all_at(&[i as u8], 0).map_err(errno)?;
        let mode = std::fs::Permissions::from_mode(0o600 | (i as u32 & 1));
        self.opened.set_permissions(mode).map_err(errno)
    }

    /// Makes the queue overflow, and leaves it with the one event that says so (IN_Q_OVERFLOW). `most` is the length of the
    /// longest queue that is filled, in events.
    ///
    /// # Errors
    /// As [`add_watch`]; EOVERFLOW if the queue holds more than `most` (fs.inotify.max_queued_events).
    pub fn overflow(&self, instance: BorrowedFd<'_>, most: usize) -> Result<()> {
        let queued = || crate::descriptor::readable_bytes(instance);
        let number = self.watch(instance)?;
        let mut before = -1;
        let mut made = 0;
        // A queue that is full does not grow, whatever happens.
        loop {
            let now = queued()?;
            if now == before {
                break;
            }
            if made > most {
                let _ = remove_watch(instance, number);
                drain(instance, 0)?;
                return Err(Errno::EOVERFLOW);
            }
            before = now;
            for i in 0..64 {
                self.change(made + i)?;
            }
            made += 128;
        }
        // This would queue another event, if there was room.
        remove_watch(instance, number)?;
        drain(instance, EVENT_BYTES)
    }
}

fn path_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn errno(e: std::io::Error) -> Errno {
    e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Opens a file by its handle (O_PATH), given a file of the same file system.
///
/// # Errors
/// EPERM without CAP_DAC_READ_SEARCH, ESTALE if the file is gone, EINVAL for a handle that is too long.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
    /// `struct file_handle` with the longest handle (MAX_HANDLE_SZ).
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; 128],
    }
    let mut h = Handle { bytes: handle.len() as u32, kind, handle: [0; 128] };
    h.handle.get_mut(..handle.len()).ok_or(Errno::EINVAL)?.copy_from_slice(handle);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle is as long as it says, and a new descriptor belongs to nobody else.
    unsafe {
        let fd = libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut h, flags);
        Ok(OwnedFd::from_raw_fd(Errno::result(fd)? as i32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn instance() -> OwnedFd {
        // SAFETY: a new descriptor.
        unsafe { OwnedFd::from_raw_fd(Errno::result(libc::inotify_init1(libc::IN_NONBLOCK)).unwrap()) }
    }

    #[test]
    fn an_overflow_is_the_only_event() {
        let (instance, decoy) = (instance(), Decoy::new().unwrap());
        decoy.overflow(instance.as_fd(), 1 << 20).unwrap();
        let mut event = [0u8; 64];
        assert_eq!(read(&instance, &mut event), Ok(EVENT_BYTES));
        let word = |at: usize| i32::from_le_bytes(event[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4) as u32), (-1, libc::IN_Q_OVERFLOW));
        assert_eq!(read(&instance, &mut event), Err(Errno::EAGAIN));
    }

    #[test]
    fn a_queue_that_is_too_long_is_left_empty() {
        let (instance, decoy) = (instance(), Decoy::new().unwrap());
        assert_eq!(decoy.overflow(instance.as_fd(), 1000), Err(Errno::EOVERFLOW));
        assert_eq!(crate::descriptor::readable_bytes(instance.as_fd()), Ok(0));
    }
}
