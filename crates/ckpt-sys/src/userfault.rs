// SPDX-License-Identifier: MIT OR Apache-2.0
//! userfaultfd(2), in the two ways in which ckpt uses it. [`Userfault`]: filling another process's missing pages, and being told what
//! happens to them. [`WriteTracking`], its asynchronous write-protect mode (UFFD_FEATURE_WP_ASYNC, Linux 6.7): the kernel itself lifts the
//! protection of a page at its first write, and nobody is told. What is left protected has not been written to;
//! [`crate::pagemap::scan_written`] finds and protects pages.
//!
//! The descriptor is made by the process whose memory it is about; whoever got it by [`crate::task::pidfd_getfd`] may use it.
//! Constants and layouts are those of linux/userfaultfd.h, which libc does not have.

use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

type Result<T> = std::result::Result<T, Errno>;

/// `UFFD_USER_MODE_ONLY` of linux/userfaultfd.h: faults in system calls are not served. Needs no privilege.
pub const USER_MODE_ONLY: u64 = 1;
/// `USERFAULTFD_IOC_NEW` of linux/userfaultfd.h, on /dev/userfaultfd; its argument are the flags of userfaultfd(2).
pub const IOC_NEW: u64 = 0xaa00;
/// `UFFD_FEATURE_EVENT_FORK`, `_REMAP`, `_REMOVE`, `_UNMAP`: everything that moves or ends missing pages is told. The first needs
/// CAP_SYS_PTRACE in the initial user namespace.
pub const FEATURE_EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;

/// Flags for userfaultfd(2) that make one for [`WriteTracking`]: close-on-exec, and only for faults in user mode, which needs no privilege.
/// That does not matter here: in asynchronous mode no fault is ever handed to anyone.
const TRACKING_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | USER_MODE_ONLY;

/// How a helper makes one for [`WriteTracking`] of the memory that it shares.
pub fn tracking_of_memory() -> crate::arch::Making {
    let open = (libc::SYS_userfaultfd, [Some(TRACKING_FLAGS), Some(0), Some(0)]);
    crate::arch::Making { path: Vec::new(), open, with: (libc::SYS_getpid, [0; 2]) }
}

const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 1 << 1;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// `_IOC(direction, 0xaa, number, bytes)`.
const fn request(direction: u64, number: u64, bytes: u64) -> u64 {
    direction << 30 | bytes << 16 | 0xaa << 8 | number
}
const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const UFFDIO_API: u64 = request(READ_WRITE, 0x3f, 24);
const UFFDIO_REGISTER: u64 = request(READ_WRITE, 0, 32);
const UFFDIO_UNREGISTER: u64 = request(READ, 1, 16);
const UFFDIO_WAKE: u64 = request(READ, 2, 16);
const UFFDIO_COPY: u64 = request(READ_WRITE, 3, 40);
const UFFDIO_ZEROPAGE: u64 = request(READ_WRITE, 4, 32);

fn ioctl<const N: usize>(fd: &OwnedFd, request: u64, words: &mut [u64; N]) -> Result<()> {
    // SAFETY: private; each request reads and writes a structure of `N` words, which is what its number says.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, words.as_mut_ptr()) })?;
    Ok(())
}

/// Something that happened to the memory.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The process forked: this is the child's memory. The child begins to run once this has been read.
    Fork(Userfault),
    /// `bytes` at `from` have been moved to `to`.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// Pages from the first address up to the second are being dropped (MADV_DONTNEED): they are zero from now on.
    Remove(u64, u64),
    /// The range from the first address up to the second has been unmapped.
    Unmap(u64, u64),
    /// One that this build doesn't know.
    Unknown(u8),
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Userfault {
    /// Takes a fresh descriptor into use with these features.
    ///
    /// # Errors
    /// EPERM for the event of fork(2) without CAP_SYS_PTRACE, EINVAL for features that the kernel lacks.
    pub fn start(fd: OwnedFd, features: u64) -> Result<Userfault> {
        let u = Userfault(fd);
        u.ioctl(UFFDIO_API, &mut [UFFD_API, features, 0])?;
        Ok(u)
    }

    fn ioctl<const N: usize>(&self, request: u64, words: &mut [u64; N]) -> Result<()> {
        ioctl(&self.0, request, words)
    }

    /// Missing pages of the range are reported, and can be filled, from now on. Whole mappings or parts of them.
    ///
    /// # Errors
    /// EINVAL for mappings that can't be (private ones of files), EBUSY if another userfaultfd watches them, ENOMEM.
    pub fn register(&self, start: u64, bytes: u64) -> Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut [start, bytes, MODE_MISSING, 0])
    }

    /// Ends that; threads that wait there go on.
    ///
    /// # Errors
    /// EINVAL, ENOMEM.
    pub fn unregister(&self, start: u64, bytes: u64) -> Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut [start, bytes])
    }

    /// Wakes the threads that wait for pages in the range.
    ///
    /// # Errors
    /// EINVAL.
    pub fn wake(&self, start: u64, bytes: u64) -> Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut [start, bytes])
    }

    /// Makes missing pages with this content, whole pages all of one mapping, and wakes who waits for them. Gives how many
    /// bytes were made before the error, if there was one.
    ///
    /// # Errors
    /// EEXIST if the next page is there already, EAGAIN while an event is to be read first, ENOENT if it is not in one registered
    /// mapping, ESRCH if the process is gone.
    pub fn copy(&self, to: u64, content: &[u8]) -> (u64, Result<()>) {
        let mut words = [to, content.as_ptr() as u64, content.len() as u64, 0, 0];
        let done = self.ioctl(UFFDIO_COPY, &mut words);
        settle(content.len() as u64, words[4], done)
    }

    /// Makes missing pages of zeros.
    ///
    /// # Errors
    /// As [`Userfault::copy`].
    pub fn zero(&self, to: u64, bytes: u64) -> (u64, Result<()>) {
        let mut words = [to, bytes, 0, 0];
        let done = self.ioctl(UFFDIO_ZEROPAGE, &mut words);
        settle(bytes, words[3], done)
    }

    /// The next event; `None` if there is none now. The descriptor must be non-blocking.
    ///
    /// # Errors
    /// EMFILE if there is no room for a child's descriptor.
    pub fn event(&self) -> Result<Option<Event>> {
        let mut message = [0u8; 32];
        match nix::unistd::read(&self.0, &mut message) {
            Ok(32) => {}
            Ok(_) => return Err(Errno::EPROTO),
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e),
        }
        let word = |at: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&message[at..at + 8]);
            u64::from_ne_bytes(w)
        };
        Ok(Some(match message[0] {
            0x12 => Event::Fault(word(16) & !(crate::memory::PAGE - 1)),
            0x13 => {
                // SAFETY: the kernel has just made this descriptor for the reader of the event.
                Event::Fork(Userfault(unsafe { OwnedFd::from_raw_fd(word(8) as u32 as i32) }))
            }
            0x14 => Event::Remap { from: word(8), to: word(16), bytes: word(24) },
            0x15 => Event::Remove(word(8), word(16)),
            0x16 => Event::Unmap(word(8), word(16)),
            other => Event::Unknown(other),
        }))
    }
}

/// Whether the memory that a userfaultfd watches is gone: its last process has ended or executed another program. `false` while
/// that can't be told. Changes nothing.
pub fn memory_is_gone(userfault: BorrowedFd<'_>) -> bool {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    /// Below the end of user space everywhere, above what may not be mapped; what is there doesn't matter.
    const SOMEWHERE: u64 = 1 << 36;
    let Some(page) = std::num::NonZeroUsize::new(crate::memory::PAGE as usize) else { return false };
    // SAFETY: a new mapping where the kernel likes.
    let Ok(nothing) = (unsafe { mmap_anonymous(None, page, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) })
    else {
        return false;
    };
    // A copy of what can't be read makes no page (ENOENT, EEXIST, EFAULT); memory that is gone is found before (ESRCH).
    let mut words = [SOMEWHERE, nothing.as_ptr() as u64, page.get() as u64, 0, 0];
    // SAFETY: the structure of UFFDIO_COPY is five words; the kernel only reads at `nothing`, which it can't.
    let done =
        Errno::result(unsafe { libc::ioctl(userfault.as_raw_fd(), UFFDIO_COPY as _, words.as_mut_ptr()) });
    // SAFETY: made above, and nothing borrows it.
    let _ = unsafe { munmap(nothing, page.get()) };
    done == Err(Errno::ESRCH)
}

/// What a fill did: the kernel puts a negative errno where the count stands if nothing was done.
fn settle(asked: u64, done: u64, result: Result<()>) -> (u64, Result<()>) {
    match result {
        Ok(()) => (asked, Ok(())),
        Err(e) if (done as i64) <= 0 => (0, Err(e)),
        // EAGAIN stands for "not all": what stopped it shows when the rest is tried.
        Err(_) => (done, Ok(())),
    }
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
    pub fn set_up(fd: OwnedFd) -> Result<WriteTracking> {
        ioctl(&fd, UFFDIO_API, &mut [UFFD_API, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED, 0])?;
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
    pub fn of_this_process() -> Result<WriteTracking> {
        // SAFETY: the call takes one number.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, TRACKING_FLAGS) })?;
        // SAFETY: a new descriptor that nobody else owns.
        WriteTracking::set_up(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Watches a range of whole mappings. Pages are not protected by this. Does nothing to what is watched by this
    /// descriptor already.
    ///
    /// # Errors
    /// `EBUSY` if another userfaultfd watches a part of it; `EPERM` for a shared mapping of a file that was not opened for
    /// writing; `EINVAL` if nothing is mapped at its start or it can't be watched; `ENOMEM` if the address space is gone.
    pub fn register(&self, start: u64, bytes: u64) -> Result<()> {
        ioctl(&self.0, UFFDIO_REGISTER, &mut [start, bytes, MODE_WP, 0])
    }

    /// Ends the watching of a range; no page of it stays protected.
    ///
    /// # Errors
    /// `EINVAL` if nothing is mapped there.
    pub fn unregister(&self, start: u64, bytes: u64) -> Result<()> {
        ioctl(&self.0, UFFDIO_UNREGISTER, &mut [start, bytes])
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
pub fn probe_tracking() -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE;
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    use std::num::NonZeroUsize;

    #[test]
    fn pages_are_filled_and_told_apart() {
        let Ok(fd) = crate::probe::userfaultfd(false) else {
            eprintln!("skipped: no userfaultfd here");
            return;
        };
        let u = Userfault::start(fd, 0).unwrap();
        let bytes = NonZeroUsize::new(8 * PAGE as usize).unwrap();
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe {
            mmap_anonymous(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }
        .unwrap();
        let start = at.as_ptr() as u64;
        u.register(start, 8 * PAGE).unwrap();
        let content = vec![7u8; 2 * PAGE as usize];
        assert_eq!(u.copy(start + PAGE, &content), (2 * PAGE, Ok(())));
        assert_eq!(u.copy(start + PAGE, &content), (0, Err(Errno::EEXIST)));
        assert_eq!(u.copy(start, &content), (PAGE, Ok(())), "stops before the page that exists");
        assert!(!memory_is_gone(u.as_fd()));
        assert_eq!(u.zero(start + 3 * PAGE, 5 * PAGE), (5 * PAGE, Ok(())));
        assert_eq!(u.copy(start + 8 * PAGE, &content[..PAGE as usize]), (0, Err(Errno::ENOENT)));
        assert!(u.event().unwrap().is_none());
        let mut seen = vec![1u8; 8 * PAGE as usize];
        crate::memory::read(crate::Pid::this(), start, &mut seen).unwrap();
        assert!(seen[..3 * PAGE as usize].iter().all(|b| *b == 7));
        assert!(seen[3 * PAGE as usize..].iter().all(|b| *b == 0));
        // SAFETY: nothing borrows it.
        unsafe { munmap(at, bytes.get()) }.unwrap();
    }
}
