// SPDX-License-Identifier: MIT OR Apache-2.0
//! `/dev/ckpt`, the kernel module's device: see `docs/kernel-abi.md` and [`ckpt_abi::kmod`].

use crate::arch::Making;
use ckpt_abi::kmod;
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

/// Where it is.
pub const PATH: &str = "/dev/ckpt";

pub use ckpt_abi::kmod::{KIND_COPY, KIND_DATA, KIND_FOREIGN, KIND_SAME, KIND_ZERO, Query, Run};

fn ioctl<T>(fd: RawFd, request: u32, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: each request of this module comes with the structure that it reads and writes, whose size is part of the
    // request's number; a buffer that one of them points to is a live slice of the length that it names.
    Errno::result(unsafe { libc::ioctl(fd, request as libc::Ioctl, argument as *mut T) }).map(drop)
}

/// Asks the module what it is.
///
/// # Errors
/// ENOENT without the module, EACCES without the right to open its device, EPROTO if it is of another version than this
/// ckpt.
pub fn query() -> Result<Query, Errno> {
    let device = File::options()
        .read(true)
        .write(true)
        .open(PATH)
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    let mut query = Query { size: size_of::<Query>() as u32, ..Query::default() };
    ioctl(device.as_raw_fd(), kmod::QUERY, &mut query)?;
    if query.abi_version != kmod::ABI_VERSION || query.features & kmod::FEATURE_TEST_BUILD != 0 {
        return Err(Errno::EPROTO);
    }
    Ok(query)
}

/// Whether a module that answered thus can tell what has been written.
pub fn tracks_writes(query: &Query) -> bool {
    query.features & kmod::FEATURE_INCREMENTAL != 0
}

/// How a helper makes a session on the memory of the process that has made it, whose pid as it sees it is `pid`.
pub fn session_of(pid: i32) -> Making {
    let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
    Making {
        path: PATH.into(),
        open: (libc::SYS_open, [None, Some(flags), Some(0)]),
        with: (libc::SYS_ioctl, [u64::from(kmod::ATTACH), pid as u64]),
    }
}

/// Whether a descriptor that came out of a process is of the module's device, and not of what that process has under its name.
fn is_device(fd: &OwnedFd) -> bool {
    let device = std::fs::metadata(PATH).map(|m| (m.file_type().is_char_device(), m.rdev()));
    let file = fd.try_clone().and_then(|fd| File::from(fd).metadata());
    matches!((device, file), (Ok((true, d)), Ok(m)) if m.file_type().is_char_device() && m.rdev() == d)
}

/// The session of an attached process.
#[derive(Debug)]
pub struct Session(OwnedFd);

/// What was taken, in pages and nanoseconds.
pub use ckpt_abi::kmod::Snapshot as Taken;

impl Session {
    /// For a descriptor that came out of a process.
    ///
    /// # Errors
    /// ENXIO: it is not of the module's device.
    pub fn new(fd: OwnedFd) -> Result<Session, Errno> {
        if is_device(&fd) { Ok(Session(fd)) } else { Err(Errno::ENXIO) }
    }

    /// For one that [`Session::into_fd`] gave.
    pub fn adopt(fd: OwnedFd) -> Session {
        Session(fd)
    }

    /// CKPT_IOC_SNAPSHOT: all private memory of the process as it is now.
    ///
    /// # Errors
    /// As the command; of these EDQUOT is RLIMIT_MEMLOCK, ENOSPC the module's own limit.
    pub fn snapshot(&self) -> Result<(Snapshot, Taken), Errno> {
        self.take(0, 0)
    }

    /// As [`Session::snapshot`]; a new generation begins, whose number is in [`Taken`]. What has not been written since the generation
    /// `since`, if that is given, is of the kind [`KIND_SAME`] and can't be read.
    ///
    /// # Errors
    /// As the command; of these ESTALE: the generation is over, which the caller had or which somebody has ended by clearing the
    /// soft-dirty bits; EOPNOTSUPP: this kernel has none, or this process is not tracked by them.
    pub fn snapshot_and_track(&self, since: Option<u64>) -> Result<(Snapshot, Taken), Errno> {
        match since {
            None => self.take(kmod::SNAPSHOT_CLEAR, 0),
            Some(generation) => self.take(kmod::SNAPSHOT_CLEAR | kmod::SNAPSHOT_INCREMENTAL, generation),
        }
    }

    /// The descriptor, to be handed to whoever keeps it.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    fn take(&self, flags: u32, generation: u64) -> Result<(Snapshot, Taken), Errno> {
        let mut args = Taken { size: size_of::<Taken>() as u32, flags, generation, ..Taken::default() };
        ioctl(self.0.as_raw_fd(), kmod::SNAPSHOT, &mut args)?;
        // SAFETY: the command has just returned this descriptor, which nobody else knows.
        let fd = unsafe { OwnedFd::from_raw_fd(args.fd) };
        Ok((Snapshot(File::from(fd)), args))
    }
}

/// A snapshot of a process's private memory.
#[derive(Debug)]
pub struct Snapshot(File);

impl Snapshot {
    /// The runs of pages of `kinds` in `[start, end)`, ascending: how many were written to `runs`, and where to go on.
    ///
    /// # Errors
    /// As CKPT_IOC_GETRUNS.
    pub fn runs(&self, start: u64, end: u64, kinds: u32, runs: &mut [Run]) -> Result<(usize, u64), Errno> {
        let mut args = kmod::GetRuns {
            size: size_of::<kmod::GetRuns>() as u32,
            kinds,
            va: start,
            npages: (end - start) / crate::memory::PAGE,
            runs: runs.as_mut_ptr() as u64,
            nruns: u32::try_from(runs.len()).unwrap_or(u32::MAX),
            reserved: 0,
        };
        ioctl(self.0.as_raw_fd(), kmod::GETRUNS, &mut args)?;
        Ok((args.nruns as usize, args.va))
    }

    /// Fills `buf` with pages of the kinds DATA and ZERO from `addr` on.
    ///
    /// # Errors
    /// What pread(2) gives; UnexpectedEof where other pages follow.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.0, buf, addr)
    }
}
