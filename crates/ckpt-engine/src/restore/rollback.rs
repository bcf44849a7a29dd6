// SPDX-License-Identifier: MIT OR Apache-2.0
//! Puts files back to what they held at the dump, from the content in the image.
//!
//! Before the commit the old content is written to a file beside each one and synced; nothing that somebody else sees changes. After it, when
//! everything is built and nothing has run, each file gets its content: one that is still the same inode in place, as the job, a lock
//! or a hard link may know it by that; any other by rename. What was there is kept beside it. If the host dies in between, the
//! next restore does it all again.

use super::read::Image;
use super::{RestoreRequest, fill_memory};
use crate::error::RestoreError;
use crate::kind::Kind;
use crate::model::file::FileStat;
use crate::resource::decode;
use crate::resource::saved_file::{self, SavedFileRecord};
use ckpt_sys::libc;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What is to be done with one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It gets this content back.
    Content {
        /// As it was.
        record: SavedFileRecord,
        /// Still the same inode.
        in_place: bool,
        /// Its times say that it is as it was, but the job may have written to it through a mapping.
        compare: bool,
    },
    /// It was not there at the dump: it is moved out of the way.
    Aside,
}

/// The files whose change is to be undone, by path.
pub type Changes = BTreeMap<Vec<u8>, Change>;

/// All saved files of an image that have changed since the dump.
///
/// # Errors
/// If a record does not decode.
pub fn changes(image: &Image, request: &RestoreRequest) -> Result<Changes, RestoreError> {
    let mut out = Changes::new();
    if !request.options.rollback_files {
        return Ok(out);
    }
    for r in image.of_kind(Kind::SavedFile) {
        let record: SavedFileRecord = decode(r, saved_file::VERSION)?;
        let name = OsStr::from_bytes(&record.path);
        let now = std::fs::symlink_metadata(name).ok().map(|m| FileStat::of(&m));
        let path = record.path.clone();
        if request.options.allow_changed.contains(name.to_string_lossy().as_ref()) {
            continue;
        }
        match (record.object, now) {
            (None, None) => {}
            (None, Some(_)) => drop(out.insert(path, Change::Aside)),
            (Some(_), Some(now)) if now.format() != libc::S_IFREG => {}
            (Some(_), now) => {
                let same_inode = |now: &FileStat| (now.dev, now.ino) == (record.stat.dev, record.stat.ino);
                let in_place = now.as_ref().is_some_and(same_inode);
                let as_it_was = now.as_ref().is_some_and(|now| {
                    record.stat.unchanged(now)
                        || crate::resource::fd::regular_file::left_by_restore(&request.dir, &path, now)
                });
                if !as_it_was || record.mapped {
                    let compare = as_it_was && in_place;
                    out.insert(path, Change::Content { record, in_place, compare });
                }
            }
        }
    }
    Ok(out)
}

/// Everything prepared; files beside the originals, removed again when this is dropped.
#[derive(Debug, Default)]
pub struct Rollbacks {
    files: Vec<Prepared>,
}

#[derive(Debug)]
struct Prepared {
    path: PathBuf,
    change: Change,
    /// The old content.
    beside: Option<(PathBuf, File)>,
}

fn io_error(what: &str, path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    RestoreError::io(0, format!("{what} {}", path.display()))
}

/// `.NAME.ending` or `NAME.ending` in the same directory.
fn sibling(path: &Path, prefix: &str, ending: &str) -> PathBuf {
    let mut name = OsString::from(prefix);
    name.push(path.file_name().unwrap_or_default());
    name.push(ending);
    path.with_file_name(name)
}

impl Rollbacks {
    /// Writes the old contents beside the files.
    ///
    /// # Errors
    /// Damage in the image, a full file system, or a directory that can't be written to.
    pub fn prepare(image: &Image, changes: Changes) -> Result<Rollbacks, RestoreError> {
        let mut out = Rollbacks::default();
        for (path, change) in changes {
            let path = PathBuf::from(OsStr::from_bytes(&path));
            let mut prepared = Prepared { path, change, beside: None };
            if let Change::Content { record, compare, .. } = &prepared.change {
                let compare = *compare;
                let beside = sibling(&prepared.path, ".", ".ckpt-rollback");
                // Of a restore that was killed.
                let _ = std::fs::remove_file(&beside);
                let err = || io_error("preparing the old content of", &prepared.path);
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&beside)
                    .map_err(err())?;
                let record = record.clone();
                let path = prepared.path.clone();
                prepared.beside = Some((beside, file));
                out.files.push(prepared);
                let Some((_, file)) = out.files.last().and_then(|last| last.beside.as_ref()) else {
                    continue;
                };
                write_content(image, file, &record).map_err(|e| match e {
                    Content::Image(e) => e,
                    Content::Io(e) => io_error("preparing the old content of", &path)(e),
                })?;
                if compare && same_content(file, &path).map_err(io_error("reading", &path))? {
                    out.forget_last();
                }
            } else {
                out.files.push(prepared);
            }
        }
        Ok(out)
    }

    fn forget_last(&mut self) {
        if let Some((beside, _)) = self.files.pop().and_then(|last| last.beside) {
            // What cannot be removed is replaced by the next restore.
            let _ = std::fs::remove_file(beside);
        }
    }

    /// Where a file is to be opened before [`Rollbacks::put_back`].
    pub fn path_now(&self, path: &[u8]) -> Vec<u8> {
        let found = self.files.iter().find(|p| p.path.as_os_str().as_bytes() == path);
        match found {
            Some(Prepared {
                change: Change::Content { in_place: false, .. },
                beside: Some((beside, _)),
                ..
            }) => beside.as_os_str().as_bytes().to_vec(),
            _ => path.to_vec(),
        }
    }

    /// Puts all files back; `left` is told how each one was left. Says what it did.
    ///
    /// # Errors
    /// A file that can't be put back; those before it have been.
    pub fn put_back(
        mut self,
        mut left: impl FnMut(&Path, &FileStat) -> io::Result<()>,
    ) -> Result<Vec<String>, RestoreError> {
        let mut said = Vec::new();
        for prepared in &mut self.files {
            ckpt_sys::hook::point();
            let path = prepared.path.clone();
            let name = path.display();
            let err = || io_error("putting back", &path);
            let kept = free_name(&path);
            match (&prepared.change, prepared.beside.take()) {
                (Change::Content { in_place: true, .. }, Some((beside, content))) => {
                    replace_in_place(&path, &kept, &content).map_err(err())?;
                    std::fs::remove_file(&beside).map_err(err())?;
                    left(&path, &FileStat::of(&std::fs::metadata(&path).map_err(err())?)).map_err(err())?;
                }
                (Change::Content { .. }, Some((beside, _))) => {
                    let existed = keep_by_name(&path, &kept).map_err(err())?;
                    std::fs::rename(&beside, &path).map_err(err())?;
                    sync_directory(&path).map_err(err())?;
                    if !existed {
                        said.push(format!("{name}: put back as it was at the dump; it had been removed"));
                        continue;
                    }
                }
                _ => {
                    std::fs::rename(&path, &kept).map_err(err())?;
                    sync_directory(&path).map_err(err())?;
                    said.push(format!("{name}: was not there at the dump; it is now {}", kept.display()));
                    continue;
                }
            }
            said.push(format!(
                "{name}: put back as it was at the dump; what it held since is in {}",
                kept.display()
            ));
        }
        Ok(said)
    }
}

impl Drop for Rollbacks {
    fn drop(&mut self) {
        for (beside, _) in self.files.iter().filter_map(|prepared| prepared.beside.as_ref()) {
            // What cannot be removed is replaced by the next restore.
            let _ = std::fs::remove_file(beside);
        }
    }
}

enum Content {
    Image(RestoreError),
    Io(io::Error),
}

fn write_content(image: &Image, file: &File, record: &SavedFileRecord) -> Result<(), Content> {
    file.set_len(record.stat.size).map_err(Content::Io)?;
    if let Some(object) = record.object {
        fill_memory::fill_from(image, file, object, record.stat.size).map_err(Content::Image)?;
    }
    let finish = || {
        if nix::unistd::geteuid().is_root() {
            // As root alone may; in a user namespace others' ids do not exist.
            let _ = std::os::unix::fs::fchown(file, Some(record.owner.0), Some(record.owner.1));
        }
        file.set_permissions(std::fs::Permissions::from_mode(record.stat.mode & 0o7777))?;
        set_mtime(file, record.stat.mtime_ns)?;
        file.sync_all()
    };
    finish().map_err(Content::Io)
}

/// Whether both hold the same.
fn same_content(one: &File, other: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    const PIECE: usize = 1 << 16;
    let other = File::open(other)?;
    let bytes = one.metadata()?.len();
    if other.metadata()?.len() != bytes {
        return Ok(false);
    }
    let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
    let mut at = 0;
    while at < bytes {
        let n = (bytes - at).min(PIECE as u64) as usize;
        one.read_exact_at(&mut a[..n], at)?;
        other.read_exact_at(&mut b[..n], at)?;
        if a[..n] != b[..n] {
            return Ok(false);
        }
        at += n as u64;
    }
    Ok(true)
}

fn set_mtime(file: &File, ns: i64) -> io::Result<()> {
    let since = std::time::Duration::from_nanos(u64::try_from(ns).unwrap_or(0));
    file.set_modified(std::time::UNIX_EPOCH + since)
}

/// A name beside the file for what it holds now.
fn free_name(path: &Path) -> PathBuf {
    let seconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let names = (0u32..).map(|n| sibling(path, "", &format!(".ckpt-replaced-{seconds}-{n}")));
    let mut free = names.filter(|name| std::fs::symlink_metadata(name).is_err());
    free.next().unwrap_or_else(|| sibling(path, "", ".ckpt-replaced"))
}

/// Gives what is there a second name; false if nothing is.
fn keep_by_name(path: &Path, kept: &Path) -> io::Result<bool> {
    match std::fs::hard_link(path, kept) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        // A file system without hard links: for a moment there is no file under its name.
        Err(_) => std::fs::rename(path, kept).map(|()| true),
    }
}

/// Copies what a file holds to `kept`, then gives it the content. Its inode stays.
fn replace_in_place(path: &Path, kept: &Path, content: &File) -> io::Result<()> {
    let old_status = content.metadata()?;
    let file = File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let copy = File::options().read(true).write(true).create_new(true).mode(0o600).open(kept)?;
    take_content(&file, &copy)?;
    copy.set_permissions(file.metadata()?.permissions())?;
    copy.sync_all()?;
    sync_directory(path)?;
    take_content(content, &file)?;
    file.set_modified(old_status.modified()?)?;
    file.sync_all()
}

/// Makes `to` hold what `from` holds: at once where the file system can share extents.
fn take_content(from: &File, to: &File) -> io::Result<()> {
    let bytes = from.metadata()?.len();
    if ckpt_sys::descriptor::clone_content(from.as_fd(), to.as_fd()).is_err() {
        // Holes are not copied.
        to.set_len(0)?;
        saved_file::copy_content(from, to, bytes)?;
    }
    to.set_len(bytes)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    match File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all() {
        // File systems that cannot sync a directory say so like this.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOTSUP)) => Ok(()),
        done => done,
    }
}
