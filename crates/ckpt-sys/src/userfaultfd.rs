// SPDX-License-Identifier: MIT OR Apache-2.0
//! userfaultfd(2) in its asynchronous write-protect mode (UFFD_FEATURE_WP_ASYNC, Linux 6.7): the kernel itself lifts the
//! protection of a page at its first write, and nobody is told. What is left protected has not been written to;
//! [`crate::pagemap::scan`] finds and protects pages.
//!
//! Constants and layouts are those of linux/userfaultfd.h, which libc does not have.

use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Flags for userfaultfd(2): close-on-exec, and only for faults in user mode, which needs no privilege. That does not matter here:
/// in asynchronous mode no fault is ever handed to anyone.
pub const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | USER_MODE_ONLY;

const USER_MODE_ONLY: u64 = 1;
const API: u64 = 0xaa;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;

#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

/// Write tracking of one address space: that of the process in which the descriptor was made. When the last copy of the
/// descriptor is closed all of it ends, and no page stays protected.
#[derive(Debug)]
pub struct WriteTracking(OwnedFd);

impl WriteTracking {
    /// Sets a new userfaultfd up for it.
    ///
    /// # Errors
    /// `EINVAL` if the kernel does not know the mode, or the descriptor has been set up before.
    pub fn set_up(fd: OwnedFd) -> Result<WriteTracking, Errno> {
        let features = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED;
        let mut api = UffdioApi { api: API, features, ioctls: 0 };
        // SAFETY: the kernel reads and writes one `struct uffdio_api`, which this is.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(WriteTracking(fd))
    }

    /// One that has been set up before.
    pub fn adopt(fd: OwnedFd) -> WriteTracking {
        WriteTracking(fd)
    }

    /// One for this process itself, for tests and probes.
    ///
    /// # Errors
    /// `ENOSYS`, `EPERM` (a seccomp filter), `EINVAL` before Linux 6.7.
    pub fn of_this_process() -> Result<WriteTracking, Errno> {
        // SAFETY: the call takes one number.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) })?;
        use std::os::fd::FromRawFd;
        // SAFETY: a new descriptor that nobody else owns.
        WriteTracking::set_up(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Watches a range of whole mappings. Pages are not protected by this. Does nothing to what is watched by this
    /// descriptor already.
    ///
    /// # Errors
    /// `EBUSY` if another userfaultfd watches a part of it; `EPERM` for a shared mapping of a file that was not opened for
    /// writing; `EINVAL` if nothing is mapped at its start or it can't be watched; `ENOMEM` if the address space is gone.
    pub fn register(&self, start: u64, bytes: u64) -> Result<(), Errno> {
        let mut r = UffdioRegister { start, len: bytes, mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: the kernel reads and writes one `struct uffdio_register`, which this is.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut r) })?;
        Ok(())
    }

    /// Ends the watching of a range; no page of it stays protected.
    ///
    /// # Errors
    /// `EINVAL` if nothing is mapped there.
    pub fn unregister(&self, start: u64, bytes: u64) -> Result<(), Errno> {
        let mut r = UffdioRange { start, len: bytes };
        // SAFETY: the kernel reads one `struct uffdio_range`, which this is.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut r) })?;
        Ok(())
    }

    /// The descriptor, to be handed to whoever keeps it.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

/// Whether the kernel can do all that is relied on: probed by doing. A mapping that is moved must not keep its protection (before Linux
/// 6.13 and its backports it does, and what was moved would look unwritten where it is now).
///
/// # Errors
/// Why not: what [`WriteTracking::of_this_process`] gives; `EOPNOTSUPP` for moved protection.
pub fn probe() -> Result<(), Errno> {
    use crate::memory::PAGE;
    let tracking = WriteTracking::of_this_process()?;
    let pagemap = std::fs::File::open("/proc/self/pagemap").map_err(|_| Errno::EACCES)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: new memory of three pages where nothing is mapped.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 3 * PAGE as usize, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let start = at as u64;
    let attempt = || {
        // SAFETY: inside the mapping, which is writable.
        unsafe { (at as *mut u8).write_volatile(1) };
        tracking.register(start, PAGE)?;
        crate::pagemap::scan_written(&pagemap, start, start + PAGE, true, false, &mut |_| ())?;
        let to = start + 2 * PAGE;
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: moves the first page of the mapping over the third, both ours and without references to them.
        let moved = unsafe { libc::mremap(at, PAGE as usize, PAGE as usize, how, to as *mut libc::c_void) };
        if moved == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        tracking.register(to, PAGE)?;
        let mut written = false;
        crate::pagemap::scan_written(&pagemap, to, to + PAGE, false, false, &mut |r| {
            written |= r.is(crate::pagemap::WRITTEN);
        })?;
        if written { Ok(()) } else { Err(Errno::EOPNOTSUPP) }
    };
    let result = attempt();
    // SAFETY: the mapping made above, to which there are no references.
    unsafe { libc::munmap(at, 3 * PAGE as usize) };
    result
}

impl AsFd for WriteTracking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
