// SPDX-License-Identifier: MIT OR Apache-2.0
//! The store: `<root>/<job>/<number>/` is a complete checkpoint, `<root>/<job>/<number>.partial/` one being written,
//! `<root>/<job>/<number>.removed.partial/` one being removed.
//!
//! A checkpoint becomes visible by one rename, so a crash at any instant leaves older ones whole and at most a partial
//! directory, which the next claim or removal of that job sweeps. Nothing in the store refers to a host: several may
//! share it. Numbers are 1 to `u64::MAX` in decimal and grow; directories have mode 0700.

mod claim;
mod error;
mod partial;
mod restored;
mod retention;
mod squash;

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;

pub use claim::Claim;
pub use error::StoreError;
pub(crate) use partial::hold_names;
use partial::{PARTIAL_SUFFIX, REMOVED_SUFFIX, REPLACED_SUFFIX, SQUASH_SUFFIX, Swept};
pub use restored::{RESTORED_FILE, Restoration};
pub use retention::{Keep, Pruned};
pub use squash::{Squash, Squashed};

use crate::format::Parent;

/// Longest job name in bytes.
pub const MAX_JOB_NAME: usize = 64;

/// A directory that holds checkpoints by job.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// A complete checkpoint in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointEntry {
    /// The job.
    pub job: String,
    /// Its number.
    pub number: u64,
    /// Its directory.
    pub path: PathBuf,
    /// Size of all its files in bytes.
    pub bytes: u64,
    /// When the dump began, or when the directory last changed if the header cannot be read.
    pub created: SystemTime,
    /// Its image id, if the header can be read.
    pub id: Option<[u8; 16]>,
    /// The checkpoint that it is built on, if it is incremental.
    pub parent: Option<Parent>,
}

/// What a sweep of unfinished checkpoints did.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SweepReport {
    /// Removed, nobody held them.
    pub removed: Vec<PathBuf>,
    /// Left alone: being written.
    pub in_use: Vec<PathBuf>,
    /// Left alone: they lie on a network file system and were begun by another host or in another boot, so that it
    /// cannot be told from here whether somebody is writing them.
    pub in_doubt: Vec<PathBuf>,
    /// Could not be removed, and why.
    pub failed: Vec<(PathBuf, String)>,
}

/// Begins the names of the files in which a restore keeps what it has cut off others.
const CUT_PREFIX: &str = "cut-";

/// Moves what restores have cut off the job's files out of a checkpoint that goes, beside it: it is not in the checkpoint, and nowhere else.
/// Returns the new names.
fn keep_cut_ends(doomed: &Path, number: u64) -> io::Result<Vec<PathBuf>> {
    let mut kept = Vec::new();
    let Some(job_dir) = doomed.parent() else { return Ok(kept) };
    let listing = match fs::read_dir(doomed) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(kept),
        listing => listing?,
    };
    for entry in listing {
        let name = entry?.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(CUT_PREFIX)) else { continue };
        let to = job_dir.join(format!("{CUT_PREFIX}{number}-{rest}"));
        match claim::rename_new(&doomed.join(&name), &to) {
            Ok(()) => kept.push(to),
            // Somebody else sweeps, too.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(kept)
}

impl Store {
    /// Opens the store at `root`, creating it with mode 0700 if it is not there.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(root: &Path) -> Result<Store, StoreError> {
        let absent =
            root.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists()).count();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(StoreError::io(root, "create the store"))?;
        for made in root.ancestors().take(absent) {
            let parent = claim::parent_of(made);
            File::open(parent)
                .and_then(|dir| sync_dir(&dir))
                .map_err(StoreError::io(parent, "bring the directory to the disk"))?;
        }
        Ok(Store { root: root.to_owned() })
    }

    /// The store to use when none is named: `$CKPT_STORE`, else `$XDG_STATE_HOME/ckpt`, else `~/.local/state/ckpt`.
    ///
    /// # Errors
    /// [`StoreError::NoDefaultRoot`] when none of the variables is an absolute path.
    pub fn default_root() -> Result<PathBuf, StoreError> {
        default_root_from(|name| std::env::var_os(name))
    }

    /// The directory of the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Claims the next number of `job`, larger than every one there is, and sweeps what dead dumps left.
    ///
    /// # Errors
    /// [`StoreError::BadJobName`], [`StoreError::Io`].
    pub fn claim(&self, job: &str) -> Result<Claim, StoreError> {
        let job_dir = self.job_dir(job)?;
        let mut floor = 0;
        loop {
            match DirBuilder::new().mode(0o700).create(&job_dir) {
                Ok(()) => {
                    let root =
                        File::open(&self.root).map_err(StoreError::io(&self.root, "open the store"))?;
                    sync_dir(&root).map_err(StoreError::io(&self.root, "bring the store to the disk"))?;
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(StoreError::io(&job_dir, "create the directory of the job")(e)),
            }
            // Looked at before the sweep, so that the number of a dead dump is not given out again at once.
            floor = floor.max(highest_number(&job_dir)?);
            self.sweep(job)?;
            let names_held = hold_names_in(&job_dir);
            let next = highest_number(&job_dir)?.max(floor).checked_add(1).ok_or_else(|| StoreError::Io {
                path: job_dir.clone(),
                action: "find a free checkpoint number",
                source: Errno::EOVERFLOW.into(),
            })?;
            let claimed = Claim::numbered(&job_dir, next)?;
            drop(names_held);
            match claimed {
                Some(claim) => return Ok(claim),
                None => floor = if job_dir.exists() { next } else { 0 },
            }
        }
    }

    /// All complete checkpoints, by job and number.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the store cannot be read.
    pub fn list(&self) -> Result<Vec<CheckpointEntry>, StoreError> {
        let mut all = Vec::new();
        for job in self.jobs()? {
            all.extend(self.list_job(&job)?);
        }
        Ok(all)
    }

    /// The complete checkpoints of `job` by number; empty if there are none.
    ///
    /// # Errors
    /// [`StoreError::BadJobName`], [`StoreError::Io`].
    pub fn list_job(&self, job: &str) -> Result<Vec<CheckpointEntry>, StoreError> {
        let job_dir = self.job_dir(job)?;
        let mut found = Vec::new();
        for number in self.numbers(job)? {
            let path = job_dir.join(number.to_string());
            match describe(job, number, &path) {
                Ok(entry) => found.push(entry),
                // Removed while we looked.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(StoreError::io(path, "read the checkpoint directory")(e)),
            }
        }
        Ok(found)
    }

    /// The directory that `spec` names: `NAME` is the newest complete checkpoint of a job, `NAME@N` a certain one,
    /// anything with a slash (and `.` and `..`) is a path.
    ///
    /// # Errors
    /// [`StoreError::NoSuchJob`] and [`StoreError::NoSuchCheckpoint`] name what there is;
    /// [`StoreError::Unfinished`], [`StoreError::BadSpec`], [`StoreError::BadJobName`], [`StoreError::Io`].
    pub fn resolve(&self, spec: &str) -> Result<PathBuf, StoreError> {
        if spec.contains('/') || spec == "." || spec == ".." {
            return resolve_path(Path::new(spec));
        }
        let (job, number) = self.checkpoint(spec)?;
        Ok(self.job_dir(&job)?.join(number.to_string()))
    }

    /// Job and number of the checkpoint in this store that `spec` names: `NAME` or `NAME@N`, as for [`Store::resolve`].
    ///
    /// # Errors
    /// As for [`Store::resolve`].
    pub fn checkpoint(&self, spec: &str) -> Result<(String, u64), StoreError> {
        let (job, wanted) = match spec.split_once('@') {
            None => (spec, None),
            Some((job, digits)) => {
                let number =
                    parse_number(digits).ok_or_else(|| StoreError::BadSpec { spec: spec.to_owned() })?;
                (job, Some(number))
            }
        };
        let numbers = self.numbers(job)?;
        let Some(&newest) = numbers.last() else {
            return Err(self.no_such_job(job)?);
        };
        let number = wanted.unwrap_or(newest);
        if !numbers.contains(&number) {
            return Err(StoreError::NoSuchCheckpoint { job: job.to_owned(), number, numbers });
        }
        Ok((job.to_owned(), number))
    }

    /// Removes a complete checkpoint, and sweeps what dead dumps of the job left. It is invisible from the first
    /// moment on; an interrupted removal is completed by the next claim or removal. What restores have cut off the job's files, and
    /// kept in it, is moved beside it; returned is where to.
    ///
    /// # Errors
    /// [`StoreError::Needed`] if incremental checkpoints are built on it, also such as are being written: nothing is
    /// removed then. [`StoreError::NoSuchJob`], [`StoreError::NoSuchCheckpoint`], [`StoreError::BadJobName`],
    /// [`StoreError::Io`].
    pub fn remove(&self, job: &str, number: u64) -> Result<Vec<PathBuf>, StoreError> {
        let path = self.checkpoint_dir(job, number)?;
        let job_dir = self.job_dir(job)?;
        // Dumps that are dead need nothing.
        self.sweep(job)?;
        self.refuse_if_needed(job, number, &path)?;
        let doomed = job_dir.join(format!("{number}{REMOVED_SUFFIX}"));
        let held = partial::mark_for_removal(&path).map_err(StoreError::io(&path, "lock it for removal"))?;
        let names_held = hold_names_in(&job_dir);
        // A dump names its parent while it holds the names.
        let hidden = self.refuse_if_needed(job, number, &path).and_then(|()| {
            claim::rename_new(&path, &doomed).map_err(StoreError::io(&path, "hide it for removal"))?;
            if names_held.is_none() {
                // It was not held off, but looks for its parent after it has named it: so one of the two finds out.
                self.refuse_if_needed(job, number, &doomed)
                    .inspect_err(|_| drop(claim::rename_new(&doomed, &path)))?;
            }
            Ok(())
        });
        drop(names_held);
        hidden.inspect_err(|_| drop(fs::remove_file(path.join(partial::LOCK_FILE))))?;
        let removed =
            keep_cut_ends(&doomed, number).and_then(|kept| partial::remove_held(&doomed).map(|()| kept));
        drop(held);
        let kept = removed.map_err(StoreError::io(&doomed, "remove it"))?;
        self.sweep(job)?;
        fs::remove_dir(&job_dir).ok();
        Ok(kept)
    }

    /// An error if the checkpoint at `path` is the parent of another one.
    fn refuse_if_needed(&self, job: &str, number: u64, path: &Path) -> Result<(), StoreError> {
        let job_dir = self.job_dir(job)?;
        // Of one that cannot be read, the number must do.
        let id = crate::reader::read_header(path).ok().map(|header| header.id);
        let (mut needed_by, mut writing) = (Vec::new(), Vec::new());
        for entry in entries(&job_dir)? {
            let (dir, found) = match entry {
                Entry::Complete(child) => (job_dir.join(child.to_string()), &mut needed_by),
                Entry::Partial(child) => (job_dir.join(format!("{child}{PARTIAL_SUFFIX}")), &mut writing),
                _ => continue,
            };
            // What has not named a parent yet looks for it first.
            let Ok((_, Some(parent))) = crate::reader::read_link(&dir) else { continue };
            if parent.number == number && id.is_none_or(|id| id == parent.id) {
                found.push(entry.number());
            }
        }
        if needed_by.is_empty() && writing.is_empty() {
            return Ok(());
        }
        needed_by.sort_unstable();
        writing.sort_unstable();
        Err(StoreError::Needed { job: job.to_owned(), number, needed_by, writing })
    }

    /// Removes the unfinished checkpoints of `job` that nobody is writing.
    ///
    /// # Errors
    /// [`StoreError::BadJobName`], [`StoreError::Io`].
    pub fn sweep(&self, job: &str) -> Result<SweepReport, StoreError> {
        let job_dir = self.job_dir(job)?;
        let mut report = SweepReport::default();
        for entry in entries(&job_dir)? {
            let complete = job_dir.join(entry.number().to_string());
            let (path, swept) = match entry {
                Entry::Complete(_) => continue,
                Entry::Partial(number) => {
                    let path = job_dir.join(format!("{number}{PARTIAL_SUFFIX}"));
                    let swept = partial::sweep(&path);
                    (path, swept)
                }
                Entry::Removed(number) => {
                    let path = job_dir.join(format!("{number}{REMOVED_SUFFIX}"));
                    let swept = keep_cut_ends(&path, number).and_then(|_| partial::sweep(&path));
                    (path, swept)
                }
                Entry::Squash(number) => {
                    let path = job_dir.join(format!("{number}{SQUASH_SUFFIX}"));
                    let swept = squash::retire(&path, &complete);
                    (path, swept)
                }
                Entry::Replaced(number) => {
                    let path = job_dir.join(format!("{number}{REPLACED_SUFFIX}"));
                    let names_held = hold_names_in(&job_dir);
                    let back = squash::put_back(&path, &complete);
                    let left = path.exists();
                    drop(names_held);
                    let swept = match back {
                        Ok(()) if !left => continue,
                        Ok(()) => squash::retire(&path, &complete),
                        Err(e) => Err(e),
                    };
                    (path, swept)
                }
            };
            match swept {
                Ok(Swept::Removed) => report.removed.push(path),
                Ok(Swept::InUse) => report.in_use.push(path),
                Ok(Swept::InDoubt) => report.in_doubt.push(path),
                // Published or removed while we looked.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => report.failed.push((path, e.to_string())),
            }
        }
        Ok(report)
    }

    /// The jobs that have a complete checkpoint, by name.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn jobs(&self) -> Result<Vec<String>, StoreError> {
        let mut jobs = Vec::new();
        for name in names(&self.root)? {
            let Some(job) = name.to_str().filter(|job| is_job_name(job)) else { continue };
            if !self.numbers(job)?.is_empty() {
                jobs.push(job.to_owned());
            }
        }
        jobs.sort_unstable();
        Ok(jobs)
    }

    /// Numbers of the complete checkpoints of a job, in order.
    fn numbers(&self, job: &str) -> Result<Vec<u64>, StoreError> {
        let job_dir = self.job_dir(job)?;
        let mut found = entries(&job_dir)?;
        // A squash was killed between two renames, or is between them at this moment.
        let orphans = |found: &[Entry]| {
            let is_orphan = |e: &&Entry| matches!(e, Entry::Replaced(number) if !found.contains(&Entry::Complete(*number)));
            found.iter().filter(is_orphan).map(Entry::number).collect::<Vec<_>>()
        };
        let numbers = orphans(&found);
        if !numbers.is_empty() {
            let names_held = hold_names_in(&job_dir);
            for number in numbers {
                let replaced = job_dir.join(format!("{number}{REPLACED_SUFFIX}"));
                squash::put_back(&replaced, &job_dir.join(number.to_string()))
                    .map_err(StoreError::io(&replaced, "put it back in its place"))?;
            }
            drop(names_held);
            found = entries(&job_dir)?;
        }
        let mut numbers: Vec<u64> = found
            .into_iter()
            .filter_map(|entry| if let Entry::Complete(number) = entry { Some(number) } else { None })
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// The directory of a complete checkpoint.
    fn checkpoint_dir(&self, job: &str, number: u64) -> Result<PathBuf, StoreError> {
        let job_dir = self.job_dir(job)?;
        let numbers = self.numbers(job)?;
        if numbers.is_empty() {
            return Err(self.no_such_job(job)?);
        }
        if !numbers.contains(&number) {
            return Err(StoreError::NoSuchCheckpoint { job: job.to_owned(), number, numbers });
        }
        Ok(job_dir.join(number.to_string()))
    }

    fn job_dir(&self, job: &str) -> Result<PathBuf, StoreError> {
        if !is_job_name(job) {
            return Err(StoreError::BadJobName { name: job.to_owned() });
        }
        Ok(self.root.join(job))
    }

    fn no_such_job(&self, job: &str) -> Result<StoreError, StoreError> {
        Ok(StoreError::NoSuchJob { job: job.to_owned(), root: self.root.clone(), jobs: self.jobs()? })
    }
}

/// The checkpoints that `entry` is built on, nearest first, as far as they are in `entries` (those of its job); its chain
/// has one image more. `None` if one of them is missing or another one is in its place.
pub fn built_on<'a>(
    entry: &CheckpointEntry,
    entries: &'a [CheckpointEntry],
) -> Option<Vec<&'a CheckpointEntry>> {
    let mut found: Vec<&CheckpointEntry> = Vec::new();
    let mut next = entry.parent;
    while let Some(parent) = next {
        let is =
            |e: &&CheckpointEntry| e.job == entry.job && e.number == parent.number && e.id == Some(parent.id);
        let below = entries.iter().find(is)?;
        if found.len() > crate::format::MAX_CHAIN_IMAGES {
            return None;
        }
        found.push(below);
        next = below.parent;
    }
    Some(found)
}

/// True for names that a job may have: 1 to 64 of `[A-Za-z0-9._-]`, not beginning with a dot.
pub fn is_job_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_JOB_NAME
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Bytes that this user may still write on the file system of `path`, which need not exist yet.
///
/// # Errors
/// [`StoreError::Io`].
pub fn free_bytes(path: &Path) -> Result<u64, StoreError> {
    let mut probe = path;
    loop {
        let at = if probe.as_os_str().is_empty() { Path::new(".") } else { probe };
        match nix::sys::statvfs::statvfs(at) {
            Ok(found) => {
                let unit =
                    if found.fragment_size() == 0 { found.block_size() } else { found.fragment_size() };
                return Ok(found.blocks_available().saturating_mul(unit));
            }
            Err(Errno::ENOENT) => match probe.parent() {
                Some(parent) => probe = parent,
                None => return Err(StoreError::io(path, "find free space")(Errno::ENOENT.into())),
            },
            Err(errno) => return Err(StoreError::io(path, "find free space")(errno.into())),
        }
    }
}

/// [`hold_names`] in the directory of a job.
fn hold_names_in(job_dir: &Path) -> Option<nix::fcntl::Flock<File>> {
    hold_names(File::open(job_dir).ok()?)
}

/// Brings directory entries to the disk.
pub(crate) fn sync_dir(dir: &File) -> io::Result<()> {
    match dir.sync_all() {
        // File systems that cannot sync a directory (some FUSE and network ones) say so like this.
        Err(e) if matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EINVAL | Errno::ENOTSUP)) => {
            Ok(())
        }
        other => other,
    }
}

fn default_root_from(var: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<PathBuf, StoreError> {
    let absolute = |name| var(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(store) = var("CKPT_STORE").filter(|word| !word.is_empty()) {
        // Set on purpose, so a relative one is meant as it stands.
        return Ok(PathBuf::from(store));
    }
    // Relative paths in XDG variables are to be ignored (XDG Base Directory Specification).
    absolute("XDG_STATE_HOME")
        .map(|state| state.join("ckpt"))
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state/ckpt")))
        .ok_or(StoreError::NoDefaultRoot)
}

/// An entry of a job's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Complete(u64),
    Partial(u64),
    Removed(u64),
    /// A full image to replace an incremental one, or one that was replaced.
    Squash(u64),
    /// One that is being replaced, where that takes two steps.
    Replaced(u64),
}

impl Entry {
    fn number(&self) -> u64 {
        match *self {
            Entry::Complete(number)
            | Entry::Partial(number)
            | Entry::Removed(number)
            | Entry::Squash(number)
            | Entry::Replaced(number) => number,
        }
    }
}

/// The checkpoints in a job's directory; none if it does not exist. Other names are ignored.
fn entries(job_dir: &Path) -> Result<Vec<Entry>, StoreError> {
    let mut found = Vec::new();
    for name in names(job_dir)? {
        let Some(name) = name.to_str() else { continue };
        if let Some(digits) = name.strip_suffix(REMOVED_SUFFIX) {
            found.extend(parse_number(digits).map(Entry::Removed));
        } else if let Some(digits) = name.strip_suffix(SQUASH_SUFFIX) {
            found.extend(parse_number(digits).map(Entry::Squash));
        } else if let Some(digits) = name.strip_suffix(REPLACED_SUFFIX) {
            found.extend(parse_number(digits).map(Entry::Replaced));
        } else if let Some(digits) = name.strip_suffix(PARTIAL_SUFFIX) {
            found.extend(parse_number(digits).map(Entry::Partial));
        } else {
            found.extend(parse_number(name).map(Entry::Complete));
        }
    }
    Ok(found)
}

/// The highest number in a job's directory, complete or not; 0 if there is none.
fn highest_number(job_dir: &Path) -> Result<u64, StoreError> {
    Ok(entries(job_dir)?.iter().map(Entry::number).max().unwrap_or(0))
}

/// A number as this store writes it: decimal, from 1, no leading zero or sign.
fn parse_number(digits: &str) -> Option<u64> {
    if digits.starts_with('0') || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// Names of the directories in `dir`; none if it does not exist.
fn names(dir: &Path) -> Result<Vec<std::ffi::OsString>, StoreError> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) if e.kind() == ErrorKind::NotADirectory => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::io(dir, "list the directory")(e)),
    };
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry.map_err(StoreError::io(dir, "list the directory"))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.file_name());
        }
    }
    Ok(found)
}

fn describe(job: &str, number: u64, path: &Path) -> io::Result<CheckpointEntry> {
    let dir_meta = fs::metadata(path)?;
    let mut bytes = 0;
    for entry in fs::read_dir(path)? {
        let meta = entry?.metadata();
        bytes += meta.map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
    }
    let (created, id, parent) = match crate::reader::read_link(path) {
        Ok((header, parent)) => {
            (UNIX_EPOCH + Duration::from_nanos(header.created_unix_ns), Some(header.id), parent)
        }
        Err(_) => (dir_meta.modified()?, None, None),
    };
    Ok(CheckpointEntry { job: job.to_owned(), number, path: path.to_owned(), bytes, created, id, parent })
}

fn resolve_path(path: &Path) -> Result<PathBuf, StoreError> {
    let meta = fs::metadata(path).map_err(StoreError::io(path, "open the checkpoint directory"))?;
    if !meta.is_dir() {
        return Err(StoreError::io(path, "open the checkpoint directory")(Errno::ENOTDIR.into()));
    }
    let unfinished = path.file_name().and_then(OsStr::to_str).is_some_and(|n| n.ends_with(PARTIAL_SUFFIX));
    if unfinished {
        return Err(StoreError::Unfinished { path: path.to_owned() });
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_root_follows_the_environment() {
        let root = |vars: &[(&str, &str)]| {
            let vars: Vec<(String, String)> =
                vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            default_root_from(|name| vars.iter().find(|(k, _)| k == name).map(|(_, v)| v.into()))
        };
        let home = ("HOME", "/home/u");
        assert_eq!(root(&[home]).unwrap(), Path::new("/home/u/.local/state/ckpt"));
        let xdg = ("XDG_STATE_HOME", "/state");
        assert_eq!(root(&[home, xdg]).unwrap(), Path::new("/state/ckpt"));
        assert_eq!(root(&[home, ("XDG_STATE_HOME", "rel")]).unwrap(), Path::new("/home/u/.local/state/ckpt"));
        assert_eq!(root(&[home, xdg, ("CKPT_STORE", "/store")]).unwrap(), Path::new("/store"));
        assert_eq!(root(&[home, ("CKPT_STORE", "")]).unwrap(), Path::new("/home/u/.local/state/ckpt"));
        assert!(matches!(root(&[]), Err(StoreError::NoDefaultRoot)));
    }

    #[test]
    fn numbers_have_one_spelling() {
        assert_eq!(parse_number("1"), Some(1));
        assert_eq!(parse_number("18446744073709551615"), Some(u64::MAX));
        for bad in ["", "0", "01", "+1", "-1", "1 ", "1x", "18446744073709551616"] {
            assert_eq!(parse_number(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn job_names_stay_inside_the_store() {
        for good in ["a", "job-1", "A.b_c", &"x".repeat(64)] {
            assert!(is_job_name(good), "{good:?}");
        }
        for bad in ["", ".", "..", ".hidden", "a/b", "a@1", "a b", "ä", "a\0", &"x".repeat(65)] {
            assert!(!is_job_name(bad), "{bad:?}");
        }
    }
}
