// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unfinished checkpoint directories: who holds them, and the removal of those that nobody does.
//!
//! What is safe needs no lock around the store, so that it also works where stores are shared by hosts:
//! 1. `X.partial` is made with mkdir, which one process wins. Inside, the file `lock` is the first entry to appear and
//!    the last to go; the owner holds an flock(2) on it.
//! 2. Whoever obtains the flock of a `lock` file that is still linked owns the directory, its maker or a sweeper.
//! 3. A directory without `lock` is either just made (empty: rmdir is all that a sweeper may do to it, and its
//!    maker begins again) or half removed (not empty).
//!
//! The `lock` file holds the boot id of its maker. On a network file system locks may be local to each host, so there
//! a free lock only counts if the maker ran in this boot of this host.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Suffix of unfinished checkpoint directories.
pub(super) const PARTIAL_SUFFIX: &str = ".partial";
/// Suffix of directories being removed. Not that of claims, because a claim may hold `N.partial` for a moment until it
/// finds `N` taken.
pub(super) const REMOVED_SUFFIX: &str = ".removed.partial";
/// Suffix of the directory in which a full image is built that is to replace an incremental one, and of the replaced one
/// after that.
pub(super) const SQUASH_SUFFIX: &str = ".squash.partial";
/// Suffix of a checkpoint whose place is being taken, where two directories cannot be exchanged in one step.
pub(super) const REPLACED_SUFFIX: &str = ".replaced.partial";
/// Name of the lock file inside.
pub(super) const LOCK_FILE: &str = "lock";

/// The flock, or the open file where flock is not to be had.
#[derive(Debug)]
pub(super) enum Held {
    /// Locked until dropped.
    Locked(Flock<File>),
    /// The file system has no locks: nobody can tell that this directory is in use, so nobody sweeps it.
    Unlockable(File),
}

/// What became of an attempt to make `X.partial`.
#[derive(Debug)]
pub(super) enum Made {
    /// It is ours.
    Ours(Held),
    /// The name is taken, or was taken away again: look again.
    Taken,
}

/// State of an existing `X.partial`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Swept {
    /// Nobody held it; it is gone.
    Removed,
    /// Somebody holds it.
    InUse,
    /// Nothing says that somebody holds it, but on this file system that is no proof.
    InDoubt,
}

/// Makes the directory `path` (mode 0700) with a held lock inside.
pub(super) fn make(path: &Path) -> io::Result<Made> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(Made::Taken),
        Err(e) => return Err(e),
    }
    take_lock_file(path).inspect_err(|_| {
        // Only if nothing is in it: it might be another process's by now.
        fs::remove_dir(path).ok();
    })
}

fn take_lock_file(dir: &Path) -> io::Result<Made> {
    let lock_path = dir.join(LOCK_FILE);
    let file = match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&lock_path) {
        Ok(file) => file,
        // A sweeper took the empty directory away, and perhaps another process made it again.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => {
            return Ok(Made::Taken);
        }
        Err(e) => return Err(e),
    };
    let TryLock::Locked(held) = try_lock(file)? else { return Ok(Made::Taken) };
    if !is_linked(&held)? {
        return Ok(Made::Taken);
    }
    // From here on the directory is ours.
    if let Err(e) = file_of(&held).write_all(boot_id().as_bytes()) {
        remove_held(dir).ok();
        return Err(e);
    }
    Ok(Made::Ours(held))
}

fn file_of(held: &Held) -> &File {
    match held {
        Held::Locked(flock) => flock,
        Held::Unlockable(file) => file,
    }
}

enum TryLock {
    Locked(Held),
    Busy,
}

fn try_lock(file: File) -> io::Result<TryLock> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(flock) => Ok(TryLock::Locked(Held::Locked(flock))),
        Err((_, Errno::EWOULDBLOCK)) => Ok(TryLock::Busy),
        Err((file, Errno::ENOLCK | Errno::ENOTSUP | Errno::ENOSYS | Errno::EINVAL)) => {
            Ok(TryLock::Locked(Held::Unlockable(file)))
        }
        Err((_, errno)) => Err(errno.into()),
    }
}

fn is_linked(held: &Held) -> io::Result<bool> {
    Ok(file_of(held).metadata()?.nlink() > 0)
}

/// Whether somebody holds an `X.partial`.
#[derive(Debug)]
pub(super) enum Hold {
    /// Nobody did: it is ours now.
    Ours(Held),
    /// It has no lock file, or is not there.
    NoLock,
    /// Somebody does.
    InUse,
    /// See [`Swept::InDoubt`].
    InDoubt,
}

/// Takes the lock of an existing `X.partial`.
pub(super) fn try_hold(path: &Path) -> io::Result<Hold> {
    let lock_path = path.join(LOCK_FILE);
    // Each turn means that somebody else made progress in this directory; so many of them are somebody alive.
    for _ in 0..100 {
        let file = match OpenOptions::new().read(true).write(true).open(&lock_path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Hold::NoLock),
            Err(e) => return Err(e),
        };
        let mut maker = String::new();
        (&file).take(64).read_to_string(&mut maker).unwrap_or(0);
        match try_lock(file)? {
            TryLock::Busy => return Ok(Hold::InUse),
            TryLock::Locked(Held::Unlockable(_)) => return Ok(Hold::InDoubt),
            TryLock::Locked(held) => {
                if !is_linked(&held)? {
                    continue;
                }
                if locks_may_be_local(path) && maker != boot_id() {
                    return Ok(Hold::InDoubt);
                }
                return Ok(Hold::Ours(held));
            }
        }
    }
    Ok(Hold::InUse)
}

/// Removes `path`, an `X.partial`, if nobody holds it.
pub(super) fn sweep(path: &Path) -> io::Result<Swept> {
    for _ in 0..100 {
        match try_hold(path)? {
            Hold::NoLock => {
                if sweep_lockless(path)? {
                    return Ok(Swept::Removed);
                }
            }
            Hold::InUse => return Ok(Swept::InUse),
            Hold::InDoubt => return Ok(Swept::InDoubt),
            Hold::Ours(_held) => {
                remove_held(path)?;
                return Ok(Swept::Removed);
            }
        }
    }
    Ok(Swept::InUse)
}

/// Removes a directory that has no lock file; false if it got one meanwhile.
fn sweep_lockless(path: &Path) -> io::Result<bool> {
    match fs::remove_dir(path) {
        Ok(()) => return Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(true),
        Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => {}
        Err(e) => return Err(e),
    }
    // Not empty: its maker has put the lock there by now, or it is half removed.
    if path.join(LOCK_FILE).try_exists()? {
        return Ok(false);
    }
    empty_but_lock(path)?;
    remove_dir_if_there(path)
}

/// Removes a directory whose lock the caller holds: the lock goes last.
pub(super) fn remove_held(path: &Path) -> io::Result<()> {
    empty_but_lock(path)?;
    match fs::remove_file(path.join(LOCK_FILE)) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    remove_dir_if_there(path).map(drop)
}

/// Removes an emptied directory. False if something is in it again: since its lock is gone, others may have
/// taken it away and made a new one under its name, which is theirs.
fn remove_dir_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(true),
        Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => Ok(false),
        Err(e) => Err(e),
    }
}

fn empty_but_lock(path: &Path) -> io::Result<()> {
    let listing = match fs::read_dir(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in listing {
        let entry = entry?;
        if entry.file_name() == LOCK_FILE {
            continue;
        }
        let removed = if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())
        } else {
            fs::remove_file(entry.path())
        };
        match removed {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Holds off renames in a job's directory while its numbers are read, and the other way round: a listing that runs
/// beside a rename may show neither name. Held for moments only. `None` where directories cannot be locked (NFS); then
/// mkdir still keeps numbers apart, but a number may come out lower than one just removed.
pub(crate) fn hold_names(job_dir: File) -> Option<Flock<File>> {
    let mut dir = job_dir;
    loop {
        match Flock::lock(dir, FlockArg::LockExclusive) {
            Ok(flock) => return Some(flock),
            Err((again, Errno::EINTR)) => dir = again,
            Err(_) => return None,
        }
    }
}

/// Takes the lock of a complete checkpoint that is to be removed; a full disk is no hindrance.
pub(super) fn mark_for_removal(path: &Path) -> io::Result<Option<Held>> {
    let lock_path = path.join(LOCK_FILE);
    let opened =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(lock_path);
    let mut file = match opened {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => return Ok(None),
        Err(e) => return Err(e),
    };
    // Without the boot id, a removal that is interrupted on a network file system stays for `ckpt rm` to repeat.
    file.write_all(boot_id().as_bytes()).ok();
    match try_lock(file)? {
        TryLock::Locked(held) => Ok(Some(held)),
        TryLock::Busy => Err(Errno::EBUSY.into()),
    }
}

/// Identifies this boot of this host; without /proc, no other process has the same.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_else(|_| format!("unknown-{}", std::process::id()))
}

/// True on file systems whose flock may not be seen by other hosts.
fn locks_may_be_local(path: &Path) -> bool {
    // Magic numbers of statfs(2).
    const NETWORK: [u32; 14] = [
        0x6969,      // NFS
        0x517b,      // SMB
        0xff53_4d42, // CIFS
        0xfe53_4d42, // SMB2
        0x6573_5546, // FUSE
        0x00c3_6400, // Ceph
        0x0bd0_0bd0, // Lustre
        0x5346_414f, // AFS
        0x0102_1997, // 9P
        0x0116_1970, // GFS2
        0x7461_636f, // OCFS2
        0x4750_4653, // GPFS
        0x1983_0326, // BeeGFS
        0x7375_7245, // Coda
    ];
    match nix::sys::statfs::statfs(path) {
        Ok(found) => NETWORK.contains(&(found.filesystem_type().0 as u32)),
        Err(_) => true,
    }
}
