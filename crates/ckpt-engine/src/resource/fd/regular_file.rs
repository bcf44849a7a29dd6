// SPDX-License-Identifier: MIT OR Apache-2.0
//! Regular files: by path if they have one, else as a shared object of the image.
//!
//! A file that the job was writing at its end and that only grew since the dump is cut back to the length it had; the
//! tail is kept beside the checkpoint. See [`crate::restore::plan`] for the judgement.

use super::Opened;
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::{FileStat, OpenFile};
use crate::resource::{At, Collect, Resource, decode, nothing_to_do, shared_object};
use crate::restore::build_tree::{Build, open_call};
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Version of [`RegularFileRecord`].
pub const VERSION: u16 = 1;

/// An open regular file.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RegularFileRecord {
    /// What all have.
    pub opened: Opened,
    /// Absolute path.
    pub path: Vec<u8>,
    /// What it was.
    pub stat: FileStat,
    /// The object with its content, if it has no name.
    pub object: Option<u64>,
}

/// The kind.
#[derive(Debug)]
pub struct RegularFileResource;

impl Resource for RegularFileResource {
    nothing_to_do! { content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::RegularFile
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::SharedObject, Kind::ShmFile]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        let kernel = f.seen.link.starts_with(b"/proc/") || f.seen.link.starts_with(b"/sys/");
        f.seen.stat.format() == libc::S_IFREG && !kernel && f.seen.link.starts_with(b"/")
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for f in job.files.values().filter(|f| f.kind == Some(Kind::RegularFile) && !f.deleted()) {
            // Paths are as init's mount namespace has them, whatever root the process has.
            let root = format!("/proc/{}/root", job.info.init);
            let mut outside = root.clone().into_bytes();
            outside.extend_from_slice(&f.other_name(&root).unwrap_or_else(|| f.path().to_vec()));
            let same = std::fs::metadata(OsStr::from_bytes(&outside)).is_ok_and(|m| {
                let now = FileStat::of(&m);
                (now.dev, now.ino) == (f.seen.stat.dev, f.seen.stat.ino)
            });
            if !same {
                let what = format!("{} is not the file at that path any more", f.seen.target);
                for (pid, fd) in &f.holders {
                    refusals.fd(*pid, *fd, what.clone(), "put it back under that name, or close it");
                }
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let object = if shared_object::is_nameless(f) { shared_object::of_file(cx.out, f) } else { None };
        let record = RegularFileRecord {
            opened: Opened::of(cx.job, f)?,
            path: f
                .other_name(&format!("/proc/{}/root", cx.job.info.init))
                .unwrap_or_else(|| f.path().to_vec()),
            stat: f.seen.stat.clone(),
            object,
        };
        cx.put(Kind::RegularFile, VERSION, f.id, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let f: RegularFileRecord = decode(record, VERSION)?;
        let deleted = if f.object.is_some() { " (deleted)" } else { "" };
        let path = String::from_utf8_lossy(&f.path).into_owned();
        Ok(format!(
            "{path}{deleted}, at {} of {} bytes, flags {:#o}",
            f.opened.position, f.stat.size, f.opened.flags
        ))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let f: RegularFileRecord = decode(record, VERSION)?;
        let pid = f.opened.pid;
        let fd = match f.object {
            Some(object) => {
                let from = cx.objects.get(&object).copied();
                match from {
                    Some(_) => shared_object::reopen(cx, pid, object, f.opened.flags)?,
                    None if ckpt_sys::hook::any_skipped() => return Ok(()),
                    None => return Err(RestoreError::Record(format!("there is no shared object {object}"))),
                }
            }
            None => cx.open_in(pid, |b| open_call(b, &f.path, f.opened.flags))?,
        };
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let f: RegularFileRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        f.opened.finish(cx, fd, f.opened.flags & libc::O_PATH == 0)
    }
}

/// Cuts the files that grew back to the length they had, keeping their tails in the checkpoint's directory.
///
/// # Errors
/// If the tail can't be kept or the file can't be cut.
pub fn cut_back(cx: &mut Build<'_>) -> Result<(), RestoreError> {
    use std::io::{Read, Seek, SeekFrom};
    for (n, (path, then, now)) in cx.plan.cuts.clone().into_iter().enumerate() {
        let name = OsStr::from_bytes(&path);
        let text = name.to_string_lossy().into_owned();
        let err = |what: &str| RestoreError::io(0, format!("{what} {text}"));
        let mut file = std::fs::File::options().read(true).write(true).open(name).map_err(err("opening"))?;
        let base = std::path::Path::new(name).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let tail = format!("cut-{}-{n}-{base}", now.mtime_ns);
        let flags = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CREAT | nix::fcntl::OFlag::O_CLOEXEC;
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        let out = nix::fcntl::openat(&cx.request.dir, tail.as_str(), flags, mode)
            .map_err(|e| err("keeping the tail of")(e.into()))?;
        let mut out = std::fs::File::from(out);
        file.seek(SeekFrom::Start(then.size)).map_err(err("seeking in"))?;
        std::io::copy(&mut file.by_ref().take(u64::MAX), &mut out).map_err(err("keeping the tail of"))?;
        out.sync_all().map_err(err("keeping the tail of"))?;
        file.set_len(then.size).map_err(err("cutting"))?;
        cx.warnings.push(format!(
            "{text}: cut from {} back to {} bytes; what was written after the dump is in {}/{tail}",
            now.size, then.size, cx.request.label
        ));
    }
    Ok(())
}
