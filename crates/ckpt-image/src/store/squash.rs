// SPDX-License-Identifier: MIT OR Apache-2.0
//! Folding a chain: an incremental checkpoint becomes a full one in place, under the same number and the same image id,
//! so that those built on it stay valid.
//!
//! The full image is built in `<N>.squash.partial/`, synced, and exchanged with `<N>/` in one step; what was there is then
//! in `<N>.squash.partial/` and removed. Where the file system cannot exchange, `<N>/` becomes
//! `<N>.replaced.partial/` and the new one `<N>/`; should that be interrupted in between, the next one who looks puts the old
//! one back. So `<N>` is whole at every instant, and what is left over says by its name what is to be done with it.
//!
//! Readers that have opened the old image go on reading it. Files that a restore keeps in a checkpoint (`cut-*`, `cuts`)
//! move along, also those that appear while this is going on: the old directory is only removed when it is empty, and in a
//! directory that was removed no file can be made.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;

use super::claim::rename_new;
use super::error::StoreError;
use super::partial::{self, LOCK_FILE, Made, REPLACED_SUFFIX, SQUASH_SUFFIX, Swept};
use super::{Store, hold_names_in, sync_dir};
use crate::compression::Compression;
use crate::format::{PAGES_FILE, RECORDS_FILE};
use crate::pipeline::Buffer;
use crate::reader::{Reader, RunKind};
use crate::writer::{Summary, Writer, ZeroPages};

/// How to squash.
pub struct Squash<'a> {
    /// Compression of the new image; none given: that of the newest image of the chain.
    pub compression: Option<Compression>,
    /// Told of the progress: bytes of memory done, and in all.
    pub progress: &'a mut dyn FnMut(u64, u64),
    /// Called between any two steps that change something on the disk. For tests.
    pub step: &'a mut dyn FnMut(),
    /// Rename twice even where the file system can exchange. For tests.
    pub without_exchange: bool,
}

/// What [`Store::squash`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Squashed {
    /// Images of the chain that was folded; 1: it was a full checkpoint, and nothing was done.
    pub images: usize,
    /// Size of the checkpoint's own image before, in bytes.
    pub bytes_before: u64,
    /// And now.
    pub bytes: u64,
}

impl Store {
    /// Makes the checkpoint `number` of `job` a full one, in place: number, id and what it restores to stay as they are.
    /// It needs those below it no more, which are left alone. Nothing happens to a checkpoint that is full.
    ///
    /// At every instant, also if this process is killed, the checkpoint is there and whole, as it was or as it will be.
    ///
    /// # Errors
    /// [`StoreError::NoSuchJob`], [`StoreError::NoSuchCheckpoint`]; [`StoreError::Busy`] if it is being squashed;
    /// [`StoreError::Changed`] if it was replaced or removed meanwhile; [`StoreError::Read`] and [`StoreError::Write`];
    /// [`StoreError::NotDurable`], when it is full, but a power loss might undo that; [`StoreError::Io`].
    pub fn squash(&self, job: &str, number: u64, how: Squash<'_>) -> Result<Squashed, StoreError> {
        let path = self.checkpoint_dir(job, number)?;
        let job_dir = self.job_dir(job)?;
        let io = StoreError::io;
        let opened = File::open(&path).map_err(io(&path, "open the checkpoint directory"))?;
        let identity = opened.metadata().map_err(io(&path, "open the checkpoint directory"))?;
        let reader = Reader::open_at(opened.into(), &path.display().to_string())?;
        let own = reader.images().next().map_or(0, |image| image.bytes);
        let images = reader.images().len();
        if images == 1 {
            return Ok(Squashed { images, bytes_before: own, bytes: own });
        }
        let building = job_dir.join(format!("{number}{SQUASH_SUFFIX}"));
        let held = loop {
            match partial::make(&building).map_err(io(&building, "create the directory"))? {
                Made::Ours(held) => break held,
                Made::Taken => {}
            }
            let hint = match retire(&building, &path).map_err(io(&building, "remove the leftover"))? {
                Swept::Removed => continue,
                Swept::InUse => "",
                Swept::InDoubt => ", or has died on another host: remove it if you know that it has",
            };
            return Err(StoreError::Busy { path: building, hint });
        };
        // What is left behind by an error is removed; by a kill, by the next squash, claim or removal.
        let unfinished = Unfinished { building: &building, path: &path };
        (how.step)();
        let compression = how.compression.unwrap_or(reader.header().compression);
        let summary = copy(&reader, &building, compression, how.progress, how.step)?;
        (how.step)();
        keep_extras(&path, &building).map_err(io(&building, "link what a restore keeps"))?;
        (how.step)();
        let job_handle = File::open(&job_dir).map_err(io(&job_dir, "open the directory"))?;
        let built = File::open(&building).map_err(io(&building, "open the directory"))?;
        sync_dir(&built).map_err(io(&building, "bring the directory to the disk"))?;
        let names_held = hold_names_in(&job_dir);
        let now = fs::metadata(&path).map_err(|_| StoreError::Changed { path: path.clone() })?;
        if (now.dev(), now.ino()) != (identity.dev(), identity.ino()) {
            return Err(StoreError::Changed { path: path.clone() });
        }
        (how.step)();
        exchange(&building, &path, number, how.without_exchange, how.step)
            .map_err(io(&path, "put the full checkpoint in its place"))?;
        let synced = sync_dir(&job_handle);
        drop(names_held);
        (how.step)();
        // Of no use any more, and harmless should it stay.
        fs::remove_file(path.join(LOCK_FILE)).ok();
        drop(held);
        (how.step)();
        drop(unfinished);
        (how.step)();
        synced.map_err(|source| StoreError::NotDurable { path: path.clone(), source })?;
        Ok(Squashed { images, bytes_before: own, bytes: summary.records_bytes + summary.pages_bytes })
    }
}

/// Removes what is under the name of the image being built: that image, or the one that it has replaced.
struct Unfinished<'a> {
    building: &'a Path,
    path: &'a Path,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // Nobody to tell; a leftover is swept later.
        empty(self.building, self.path).ok();
    }
}

/// Writes all that `reader` sees as a full image into `dir`.
fn copy(
    reader: &Reader,
    dir: &Path,
    compression: Compression,
    progress: &mut dyn FnMut(u64, u64),
    step: &mut dyn FnMut(),
) -> Result<Summary, StoreError> {
    let handle = File::open(dir).map_err(StoreError::io(dir, "open the directory"))?;
    let mut writer = Writer::create_in_place_of(handle.into(), dir, reader.header(), compression)?;
    step();
    for record in reader.records() {
        writer.record(record.kind, record.version, record.owner, record.id, &record.body)?;
    }
    let total = reader.objects().flat_map(|object| object.runs).map(|run| run.bytes).sum();
    let mut done = 0;
    let pool = writer.buffers();
    // Stretches that were scattered over the chain are stored in one piece again.
    let mut gathered: Option<(u64, u64, Buffer)> = None;
    for run in reader.objects().flat_map(|object| object.runs) {
        let bytes = run.bytes as usize;
        let grows = gathered.as_ref().is_some_and(|(object, offset, buffer)| {
            *object == run.object
                && offset + buffer.len() as u64 == run.offset
                && buffer.len() + bytes <= Buffer::CAPACITY
                && run.kind == RunKind::Data
        });
        if !grows && let Some((object, offset, buffer)) = gathered.take() {
            step();
            writer.pages_owned(object, offset, buffer, ZeroPages::Record)?;
        }
        let (object, offset, mut buffer) = gathered.take().unwrap_or_else(|| {
            let mut buffer = pool.take();
            buffer.set_len(0);
            (run.object, run.offset, buffer)
        });
        let start = buffer.len();
        buffer.set_len(start + bytes);
        reader.read_run_into(run, &mut buffer[start..])?;
        gathered = Some((object, offset, buffer));
        done += run.bytes;
        progress(done, total);
    }
    if let Some((object, offset, buffer)) = gathered {
        writer.pages_owned(object, offset, buffer, ZeroPages::Record)?;
    }
    step();
    Ok(writer.finish()?)
}

/// Puts what is at `building` at `path`, and the other way round.
fn exchange(
    building: &Path,
    path: &Path,
    number: u64,
    without: bool,
    step: &mut dyn FnMut(),
) -> io::Result<()> {
    #[cfg(target_env = "gnu")]
    if !without {
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        match renameat2(AT_FDCWD, building, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE) {
            // Not every file system has it.
            Err(Errno::EINVAL | Errno::ENOSYS) => {}
            result => return result.map_err(io::Error::from),
        }
    }
    let replaced = path.with_file_name(format!("{number}{REPLACED_SUFFIX}"));
    rename_new(path, &replaced)?;
    step();
    if let Err(e) = rename_new(building, path) {
        rename_new(&replaced, path).ok();
        return Err(e);
    }
    step();
    // So that what was replaced is under the same name in both cases.
    rename_new(&replaced, building)
}

/// Puts a checkpoint back that was to be replaced, if nothing has taken its place. The caller holds the names.
pub(super) fn put_back(replaced: &Path, path: &Path) -> io::Result<()> {
    match rename_new(replaced, path) {
        Err(e) if matches!(e.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => Ok(()),
        other => other,
    }
}

/// Removes `left`, a leftover of a squash of the checkpoint `path`, if nobody holds it.
pub(super) fn retire(left: &Path, path: &Path) -> io::Result<Swept> {
    let held = match partial::try_hold(left)? {
        partial::Hold::Ours(held) => Some(held),
        partial::Hold::NoLock => None,
        partial::Hold::InUse => return Ok(Swept::InUse),
        partial::Hold::InDoubt => return Ok(Swept::InDoubt),
    };
    empty(left, path)?;
    drop(held);
    Ok(Swept::Removed)
}

/// Removes the directory `left` with the image in it, and moves everything else to `path`; the lock goes last.
fn empty(left: &Path, path: &Path) -> io::Result<()> {
    // Each turn means that somebody else put something there.
    for _ in 0..100 {
        let listing = match fs::read_dir(left) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let mut names: Vec<_> =
            listing.map(|entry| entry.map(|e| e.file_name())).collect::<io::Result<_>>()?;
        names.sort_by_key(|name| name == OsStr::new(LOCK_FILE));
        for name in names {
            let from = left.join(&name);
            let own = [RECORDS_FILE, PAGES_FILE, LOCK_FILE].iter().any(|own| name == OsStr::new(own));
            let gone = if own || !path.exists() {
                fs::remove_file(&from)
            } else {
                move_extra(&from, &path.join(&name))
            };
            match gone {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        match fs::remove_dir(left) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => {}
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => return Ok(()),
        }
    }
    Err(Errno::ENOTEMPTY.into())
}

/// Moves a file that a restore keeps; if there is one of that name, this one's content goes behind it.
fn move_extra(from: &Path, to: &Path) -> io::Result<()> {
    let old = fs::symlink_metadata(from)?;
    match fs::symlink_metadata(to) {
        Ok(new) if (new.dev(), new.ino()) == (old.dev(), old.ino()) => return fs::remove_file(from),
        Ok(_) => {}
        Err(_) => match rename_new(from, to) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            other => return other,
        },
    }
    let mut out = OpenOptions::new().append(true).open(to)?;
    io::copy(&mut File::open(from)?, &mut out)?;
    out.sync_all()?;
    fs::remove_file(from)
}

/// Links what else is in a checkpoint into the directory that is to replace it.
fn keep_extras(path: &Path, building: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let own = [RECORDS_FILE, PAGES_FILE, LOCK_FILE].iter().any(|own| name == OsStr::new(own));
        if own || !entry.file_type()?.is_file() {
            continue;
        }
        match fs::hard_link(entry.path(), building.join(&name)) {
            // It is moved later, then.
            Err(e)
                if matches!(
                    e.raw_os_error().map(Errno::from_raw),
                    Some(Errno::EPERM | Errno::EOPNOTSUPP | Errno::EMLINK | Errno::ENOSYS | Errno::ENOENT)
                ) => {}
            other => other?,
        }
    }
    Ok(())
}
