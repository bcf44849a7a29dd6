// SPDX-License-Identifier: MIT OR Apache-2.0
//! A checkpoint directory that is being written, until it is published by one rename or removed.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::error::StoreError;
use super::partial::{self, Held, LOCK_FILE, Made, PARTIAL_SUFFIX, Swept};
use super::{hold_names_in, sync_dir};
use crate::reader::read_link;

/// An unfinished checkpoint directory that this process owns. Dropping it removes the directory.
#[derive(Debug)]
pub struct Claim {
    partial: PathBuf,
    target: PathBuf,
    number: Option<u64>,
    // Gone once published, so that Drop removes nothing.
    held: Option<Held>,
}

impl Claim {
    /// Claims the directory `target` itself, for `dump --dir`: it must not exist. Until published it is called
    /// `target` with `.partial` appended.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::Busy`] when another dump is writing there, [`StoreError::ReservedName`],
    /// [`StoreError::Io`].
    pub fn for_dir(target: &Path) -> Result<Claim, StoreError> {
        let name = target.file_name().ok_or_else(|| StoreError::Exists { path: target.to_owned() })?;
        if name.as_encoded_bytes().ends_with(PARTIAL_SUFFIX.as_bytes()) {
            return Err(StoreError::ReservedName { path: target.to_owned() });
        }
        let mut partial_name = name.to_owned();
        partial_name.push(PARTIAL_SUFFIX);
        let partial = target.with_file_name(partial_name);
        for _ in 0..100 {
            if fs::symlink_metadata(target).is_ok() {
                return Err(StoreError::Exists { path: target.to_owned() });
            }
            match partial::make(&partial).map_err(StoreError::io(&partial, "create the directory"))? {
                Made::Ours(held) => return Claim::check(partial, target.to_owned(), None, held),
                Made::Taken => {}
            }
            match partial::sweep(&partial).map_err(StoreError::io(&partial, "remove the leftover"))? {
                Swept::Removed => {}
                Swept::InUse => return Err(StoreError::Busy { path: partial, hint: "" }),
                Swept::InDoubt => {
                    let hint = ", or has died on another host: remove it if you know that it has";
                    return Err(StoreError::Busy { path: partial, hint });
                }
            }
        }
        Err(StoreError::Busy { path: partial, hint: "" })
    }

    /// One attempt to claim `number`; `None` if it is taken.
    pub(super) fn numbered(job_dir: &Path, number: u64) -> Result<Option<Claim>, StoreError> {
        let partial = job_dir.join(format!("{number}{PARTIAL_SUFFIX}"));
        let target = job_dir.join(number.to_string());
        match partial::make(&partial) {
            Ok(Made::Taken) => Ok(None),
            Ok(Made::Ours(held)) => match Claim::check(partial, target, Some(number), held) {
                Err(StoreError::Exists { .. }) => Ok(None),
                other => other.map(Some),
            },
            // The last checkpoint of the job was removed just now, and its directory with it.
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StoreError::Io { path: partial, action: "create the directory", source: e }),
        }
    }

    /// The partial directory is ours; but its target may have been published just before.
    fn check(
        partial: PathBuf,
        target: PathBuf,
        number: Option<u64>,
        held: Held,
    ) -> Result<Claim, StoreError> {
        let taken = fs::symlink_metadata(&target).is_ok();
        let claim = Claim { partial, target, number, held: Some(held) };
        if taken {
            return Err(StoreError::Exists { path: claim.target.clone() });
        }
        Ok(claim)
    }

    /// The directory to write to.
    pub fn dir(&self) -> &Path {
        &self.partial
    }

    /// Where it will be once published.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The checkpoint's number, if it lies in a store.
    pub fn number(&self) -> Option<u64> {
        self.number
    }

    /// Makes the checkpoint visible by one atomic rename, and durable. Its files must have been synced
    /// ([`Writer::finish`](crate::Writer::finish) does so).
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Exists`] or [`StoreError::ParentGone`]: nothing is visible and the directory is
    /// removed.
    /// [`StoreError::NotDurable`]: it is visible, but a power loss might undo that.
    pub fn publish(mut self) -> Result<PathBuf, StoreError> {
        let parent = parent_of(&self.target);
        let parent_dir = File::open(parent).map_err(StoreError::io(parent, "open the directory"))?;
        let own = File::open(&self.partial).map_err(StoreError::io(&self.partial, "open the directory"))?;
        sync_dir(&own).map_err(StoreError::io(&self.partial, "bring the directory to the disk"))?;
        let names_held = self.number.and_then(|_| hold_names_in(parent));
        if let Some(number) = self.missing_parent() {
            return Err(StoreError::ParentGone { path: self.partial.clone(), number });
        }
        let renamed = rename_new(&self.partial, &self.target);
        drop(names_held);
        match renamed {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty) => {
                return Err(StoreError::Exists { path: self.target.clone() });
            }
            Err(source) => {
                let (path, action) = (self.partial.clone(), "rename it to its final name");
                return Err(StoreError::Io { path, action, source });
            }
        }
        let held = self.held.take();
        // Of no use any more, and harmless should it stay: readers ignore it.
        fs::remove_file(self.target.join(LOCK_FILE)).ok();
        drop(held);
        let target = self.target.clone();
        sync_dir(&parent_dir).map_err(|source| StoreError::NotDurable { path: target.clone(), source })?;
        Ok(target)
    }

    /// The number of the checkpoint that this one is built on, if that is not there any more.
    fn missing_parent(&self) -> Option<u64> {
        let (_, parent) = read_link(&self.partial).ok()?;
        let parent = parent?;
        let there = read_link(&parent_of(&self.target).join(parent.number.to_string()));
        there.map_or(true, |(header, _)| header.id != parent.id).then_some(parent.number)
    }

    /// Removes the directory; as dropping, with the error told.
    ///
    /// # Errors
    /// [`StoreError::Io`]; what is left is removed by the next claim.
    pub fn abandon(mut self) -> Result<(), StoreError> {
        self.remove().map_err(StoreError::io(&self.partial, "remove the unfinished checkpoint"))
    }

    fn remove(&mut self) -> io::Result<()> {
        let Some(held) = self.held.take() else { return Ok(()) };
        let removed = partial::remove_held(&self.partial);
        drop(held);
        if self.number.is_some() {
            // The job's directory, if this was the first checkpoint; fails if there are others.
            fs::remove_dir(parent_of(&self.partial)).ok();
        }
        removed
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Nobody to tell; a leftover is swept by the next claim.
        self.remove().ok();
    }
}

/// The directory that holds `path`.
pub(super) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Renames a directory to a name that does not exist.
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_env = "gnu")]
    {
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
            // Not every file system has it.
            Err(Errno::EINVAL | Errno::ENOSYS) => {}
            result => return result.map_err(io::Error::from),
        }
    }
    if fs::symlink_metadata(to).is_ok() {
        return Err(Errno::EEXIST.into());
    }
    fs::rename(from, to)
}
