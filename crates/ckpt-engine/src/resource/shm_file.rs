// SPDX-License-Identifier: MIT OR Apache-2.0
//! Content of the job's private /dev/shm: it exists only in its mount namespace, so it is saved whole.

use super::{At, Collect, Content, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::restore::build_tree::Build;
use crate::restore::fill_memory::fill_file;
use crate::snapshot::{From, Source};
use ckpt_image::codec::{Decode, Encode};
use ckpt_image::{Record, ZeroPages};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Version of [`ShmFileRecord`].
pub const VERSION: u16 = 1;

/// A regular file, directory or symbolic link in /dev/shm.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ShmFileRecord {
    /// Absolute path in the job.
    pub path: Vec<u8>,
    /// st_mode.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes.
    pub bytes: u64,
    /// The object with its content; none for a directory or link.
    pub object: Option<u64>,
    /// Target of a symbolic link.
    pub link: Option<Vec<u8>>,
}

/// The kind.
#[derive(Debug)]
pub struct ShmFileResource;

const SHM: &str = "/dev/shm";

/// Everything in the job's /dev/shm, directories first: path in the job, path from outside.
fn walk(job: &Job) -> Vec<(PathBuf, PathBuf)> {
    let root = PathBuf::from(format!("/proc/{}/root", job.info.init));
    let (mut out, mut pending) = (Vec::new(), vec![PathBuf::from(SHM)]);
    while let Some(dir) = pending.pop() {
        let outside = root.join(dir.strip_prefix("/").unwrap_or(&dir));
        for e in std::fs::read_dir(&outside).into_iter().flatten().flatten() {
            let inside = dir.join(e.file_name());
            if e.file_type().is_ok_and(|t| t.is_dir()) {
                pending.push(inside.clone());
            }
            out.push((inside, e.path()));
        }
    }
    out
}

/// Whether the job's /dev/shm is its own.
fn is_private(job: &Job) -> bool {
    let dev = |p: &str| std::fs::metadata(p).map(|m| m.dev()).ok();
    dev(&format!("/proc/{}/root{SHM}", job.info.init)) != dev(SHM)
}

impl Resource for ShmFileResource {
    nothing_to_do! { claims, asks, connect, finish, arm }

    fn kind(&self) -> Kind {
        Kind::ShmFile
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Job]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        if !is_private(job) {
            return;
        }
        for (inside, outside) in walk(job) {
            let Ok(m) = std::fs::symlink_metadata(&outside) else { continue };
            if !m.is_file() && !m.is_dir() && !m.is_symlink() {
                let what = format!("{} is neither a file nor a directory nor a link", inside.display());
                refusals.process(0, what, "remove it from /dev/shm");
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Job = at else { return Ok(()) };
        if !is_private(cx.job) {
            return Ok(());
        }
        for (n, (inside, outside)) in walk(cx.job).into_iter().enumerate() {
            let err = |what: &str| DumpError::process(0, format!("{what} {}", inside.display()));
            let m = std::fs::symlink_metadata(&outside).map_err(err("looking at"))?;
            let mut object = None;
            if m.is_file() {
                let number = cx.out.new_object();
                let file = std::fs::File::open(&outside).map_err(err("opening"))?;
                let from = From::File { fd: file.into(), bytes: m.size() };
                let source = Source { kind: Kind::ShmFile, object: number, zeros: ZeroPages::Elide, from };
                cx.out.sources.push(source);
                object = Some(number);
            }
            let record = ShmFileRecord {
                path: inside.as_os_str().as_bytes().to_vec(),
                mode: m.mode(),
                uid: m.uid(),
                gid: m.gid(),
                bytes: if m.is_file() { m.size() } else { 0 },
                object,
                link: match m.is_symlink() {
                    true => {
                        let target = std::fs::read_link(&outside).map_err(err("reading the link"))?;
                        Some(target.as_os_str().as_bytes().to_vec())
                    }
                    false => None,
                },
            };
            cx.put(Kind::ShmFile, VERSION, 0, n as u64, &record)?;
        }
        Ok(())
    }

    fn content(&self, cx: &mut Content<'_>) -> Result<(), DumpError> {
        cx.write_pages(Kind::ShmFile)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let f: ShmFileRecord = decode(record, VERSION)?;
        Ok(format!("{}: {} bytes", String::from_utf8_lossy(&f.path), f.bytes))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let f: ShmFileRecord = decode(record, VERSION)?;
        let path = Path::new(OsStr::from_bytes(&f.path));
        let up = path.components().any(|c| matches!(c, std::path::Component::ParentDir));
        if !path.starts_with(SHM) || up {
            return Err(RestoreError::Record(format!("{} is not in {SHM}", path.display())));
        }
        let err = |what: &str| RestoreError::io(0, format!("{what} {}", path.display()));
        if let Some(target) = &f.link {
            return std::os::unix::fs::symlink(OsStr::from_bytes(target), path).map_err(err("creating"));
        }
        match f.object {
            None => std::fs::create_dir(path).map_err(err("creating"))?,
            Some(object) => {
                let file = std::fs::File::options()
                    .write(true)
                    .create_new(true)
                    .open(path)
                    .map_err(err("creating"))?;
                file.set_len(f.bytes).map_err(err("sizing"))?;
                fill_file(cx, &file, object, f.bytes)?;
            }
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(f.mode & 0o7777))
            .map_err(err("chmod"))?;
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(path, Some(f.uid), Some(f.gid)).map_err(err("chown"))?;
        }
        Ok(())
    }
}
