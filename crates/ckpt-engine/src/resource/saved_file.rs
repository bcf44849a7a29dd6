// SPDX-License-Identifier: MIT OR Apache-2.0
//! Content of the files that the job is writing, if the dump was asked for it: as they are at the freeze, never torn.
//!
//! While the job is frozen each file is cloned where its file system shares extents (FICLONE), else copied; what is kept is written into the
//! image, as pages of an object, when the job runs again. What SQLite keeps beside a database goes with it: a journal that
//! was not there at the dump must not be there after the rollback. See [`crate::restore::rollback`].

use super::{At, Collect, Collected, Content, NewRecord, Resource, decode, nothing_to_do, put};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::FileStat;
use crate::restore::build_tree::Build;
use ckpt_image::codec::{self, Decode, Encode};
use ckpt_image::{Record, ZeroPages};
use ckpt_sys::libc;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Version of [`SavedFileRecord`].
pub const VERSION: u16 = 1;

/// Bytes copied or written at a time.
const PIECE: usize = 1 << 20;

/// Endings of the files that SQLite keeps beside a database.
const COMPANIONS: [&str; 3] = ["-journal", "-wal", "-shm"];

/// A file whose content is in the image, or that was not there.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SavedFileRecord {
    /// Absolute path.
    pub path: Vec<u8>,
    /// What it was.
    pub stat: FileStat,
    /// Its owner: user and group, as the dumper saw them.
    pub owner: (u32, u32),
    /// The job may write to it through a mapping: such changes need not show in its times.
    pub mapped: bool,
    /// The object with its content; none: there was no such file.
    pub object: Option<u64>,
}

/// The frozen content of a file.
#[derive(Debug)]
pub struct Kept {
    object: u64,
    file: File,
    bytes: u64,
}

/// The kind.
#[derive(Debug)]
pub struct SavedFileResource;

/// A file to be saved.
struct Written {
    /// Where it is to be read.
    from: PathBuf,
    mapped: bool,
}

/// All of them, by the path that the job has.
fn written_files(job: &Job) -> BTreeMap<Vec<u8>, Written> {
    let root = format!("/proc/{}/root", job.info.init);
    let mut found = BTreeMap::new();
    for f in job.files.values().filter(|f| f.kind == Some(Kind::RegularFile) && !f.deleted()) {
        if f.access() != libc::O_RDONLY {
            let path = f.other_name(&root).unwrap_or_else(|| f.path().to_vec());
            found.insert(
                path,
                Written { from: format!("/proc/{}/fd/{}", f.host, f.fd).into(), mapped: false },
            );
        }
    }
    for p in job.live() {
        let written =
            p.vmas.iter().filter(|v| v.is_file() && v.shared && !v.deleted && v.name.starts_with('/'));
        for v in written.filter(|v| v.prot & libc::PROT_WRITE != 0) {
            let unseen = || Written { from: PathBuf::from(format!("{root}{}", v.name)), mapped: true };
            found.entry(v.name.as_bytes().to_vec()).or_insert_with(unseen).mapped = true;
        }
    }
    // Those of the job's own /dev/shm are in the image anyway.
    found.retain(|path, _| !path.starts_with(b"/dev/shm/") && !path.starts_with(b"/dev/"));
    let names: Vec<Vec<u8>> = found.keys().cloned().collect();
    for name in names.iter().filter(|name| !COMPANIONS.iter().any(|end| name.ends_with(end.as_bytes()))) {
        for end in COMPANIONS {
            let companion = [name.as_slice(), end.as_bytes()].concat();
            let mut outside = root.clone().into_bytes();
            outside.extend_from_slice(&companion);
            found.entry(companion).or_insert_with(|| Written {
                from: PathBuf::from(OsStr::from_bytes(&outside)),
                mapped: false,
            });
        }
    }
    found
}

/// Keeps the content of everything that the frozen job is writing. `scratch` is a directory for what has to be copied.
///
/// # Errors
/// A file that can't be read, or a full file system; the job runs on.
pub fn keep(job: &Job, scratch: &Path, out: &mut Collected) -> Result<(), DumpError> {
    for (path, Written { from, mapped }) in written_files(job) {
        ckpt_sys::hook::point();
        let name = String::from_utf8_lossy(&path).into_owned();
        let err =
            |source| DumpError::Process { pid: 0, what: format!("saving the content of {name}"), source };
        let record = match File::open(&from) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => SavedFileRecord {
                path,
                stat: FileStat::default(),
                owner: (0, 0),
                mapped: false,
                object: None,
            },
            Err(e) => return Err(err(e)),
            Ok(file) => {
                let status = file.metadata().map_err(err)?;
                if !status.is_file() {
                    continue;
                }
                let object = out.new_object();
                let kept = keep_one(&file, status.len(), &from, scratch).map_err(err)?;
                out.kept.push(Kept { object, file: kept, bytes: status.len() });
                let owner = (status.uid(), status.gid());
                SavedFileRecord { path, stat: FileStat::of(&status), owner, mapped, object: Some(object) }
            }
        };
        let id = record.object.unwrap_or_else(|| out.new_object());
        let body = codec::encode(&record)?;
        out.records.push(NewRecord { kind: Kind::SavedFile, version: VERSION, owner: 0, id, body });
    }
    Ok(())
}

/// A file without a name in a directory.
fn nameless(directory: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(directory)
}

/// A clone of the file if its file system can do that, else a copy.
fn keep_one(file: &File, bytes: u64, from: &Path, scratch: &Path) -> io::Result<File> {
    // Clones are possible within one file system only.
    let beside = std::fs::canonicalize(from).ok().and_then(|path| nameless(path.parent()?).ok());
    for clone in beside.into_iter().chain(nameless(scratch)) {
        if ckpt_sys::descriptor::clone_content(file.as_fd(), clone.as_fd()).is_ok() {
            return Ok(clone);
        }
    }
    let copy = nameless(scratch).or_else(|_| {
        // Not every file system has files without a name.
        let path = scratch.join(".kept");
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok::<_, io::Error>(file)
    })?;
    copy_content(file, &copy, bytes)?;
    Ok(copy)
}

/// Copies `bytes` bytes, and leaves holes what they are.
///
/// # Errors
/// As read(2) and write(2).
pub fn copy_content(from: &File, to: &File, bytes: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    to.set_len(bytes)?;
    while let Some(data) = ckpt_sys::descriptor::next_data(from, at)?.filter(|data| *data < bytes) {
        let end = ckpt_sys::descriptor::next_hole(from, data)?.min(bytes);
        at = data;
        while at < end {
            let most = (end - at).min(PIECE as u64) as usize;
            let n = from.read_at(&mut buffer[..most], at)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&buffer[..n], at)?;
            at += n as u64;
        }
    }
    Ok(())
}

impl Resource for SavedFileResource {
    // What is put back is decided by the plan, and done after everything else.
    nothing_to_do! { asks, after, claims, probe, create, connect, finish, arm }

    fn kind(&self) -> Kind {
        Kind::SavedFile
    }

    /// By [`keep`], which needs a place for copies.
    fn collect(&self, _: &mut Collect<'_>, _: At<'_>) -> Result<(), DumpError> {
        Ok(())
    }

    fn content(&self, cx: &mut Content<'_>) -> Result<(), DumpError> {
        for kept in cx.kept {
            let file = kept.file.try_clone().map_err(DumpError::process(0, "reading a file's content"))?;
            let (writer, progress) = (&mut *cx.writer, &mut *cx.progress);
            let pace = cx.pace;
            crate::snapshot::read_file(&file.into(), 0..kept.bytes, PIECE, &mut |piece| {
                ckpt_sys::hook::point();
                // Holes are not stored, and zero pages are none.
                let (_, bytes) = put(writer, kept.object, ZeroPages::Elide, piece)?;
                progress(bytes);
                pace.wait(writer.bytes_written());
                DumpError::if_interrupted()
            })?;
        }
        Ok(())
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let f: SavedFileRecord = decode(record, VERSION)?;
        let path = String::from_utf8_lossy(&f.path).into_owned();
        Ok(match f.object {
            Some(_) => format!("content of {path}: {} bytes", f.stat.size),
            None => format!("{path}: there was no such file"),
        })
    }
}

/// The paths under which this restore opens files that are to take another's place.
pub fn path_now(cx: &Build<'_>, path: &[u8]) -> Vec<u8> {
    cx.rollbacks.path_now(path)
}
