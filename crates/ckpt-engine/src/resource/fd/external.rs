// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptors that the job was started with and whose other end is outside: pipes, sockets, terminals, and ckpt's own
//! log. They are bound anew at a restore, by number.

use super::Opened;
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::{Build, open_call};
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;
use std::os::unix::ffi::OsStrExt;

/// Version of [`ExternalRecord`].
pub const VERSION: u16 = 1;

/// A descriptor from outside.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ExternalRecord {
    /// What all have.
    pub opened: Opened,
    /// Its number when the job was started.
    pub number: i32,
    /// What it was.
    pub target: String,
}

/// The kind.
#[derive(Debug)]
pub struct ExternalResource;

/// Number under which the job got what `f` is, if it did.
fn number(job: &Job, f: &OpenFile) -> Option<i32> {
    let s = &f.seen.stat;
    if s.format() == libc::S_IFREG {
        // A regular file is a file, whoever opened it; but not ckpt's log, which every restore has anew.
        let log = job.info.log.as_ref().is_some_and(|l| l.as_os_str().as_bytes() == f.path());
        if log {
            return Some(1);
        }
        // Nor can a file be opened anew that somebody with more rights had opened for the job.
        return inherited(job, f).filter(|_| !can_open(job, f));
    }
    let memory_device = s.format() == libc::S_IFCHR && libc::major(s.rdev) == 1;
    if memory_device || ![libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR].contains(&s.format()) {
        return None;
    }
    inherited(job, f)
}

fn inherited(job: &Job, f: &OpenFile) -> Option<i32> {
    let s = &f.seen.stat;
    let same = |e: &&crate::model::ExternalInfo| e.dev == s.dev && e.ino == s.ino && e.access == f.access();
    // The number it still has tells two that look alike apart.
    let candidates: Vec<i32> = job.info.external.iter().filter(same).map(|e| e.number).collect();
    candidates.iter().find(|n| f.holders.iter().any(|(_, fd)| fd == *n)).or(candidates.first()).copied()
}

/// Whether the user of the job could open the file as it is open.
fn can_open(job: &Job, f: &OpenFile) -> bool {
    use nix::unistd::AccessFlags;
    let mode = match f.access() {
        libc::O_RDONLY => AccessFlags::R_OK,
        libc::O_WRONLY => AccessFlags::W_OK,
        _ => AccessFlags::R_OK | AccessFlags::W_OK,
    };
    let mut path = format!("/proc/{}/root", job.info.init).into_bytes();
    path.extend_from_slice(f.path());
    nix::unistd::access(std::ffi::OsStr::from_bytes(&path), mode).is_ok()
}

impl Resource for ExternalResource {
    nothing_to_do! { asks, probe, content, connect, finish, arm }

    fn kind(&self) -> Kind {
        Kind::External
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, job: &Job, f: &OpenFile) -> bool {
        number(job, f).is_some()
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let Some(number) = number(cx.job, f) else { return Ok(()) };
        let record = ExternalRecord { opened: Opened::of(cx.job, f)?, number, target: f.seen.target.clone() };
        cx.put(Kind::External, VERSION, f.id, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let e: ExternalRecord = decode(record, VERSION)?;
        Ok(format!("{}, from outside as {}", e.target, e.number))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let e: ExternalRecord = decode(record, VERSION)?;
        let pid = e.opened.pid;
        let given = cx.request.external.iter().find(|(n, _)| *n == e.number).map(|(_, fd)| *fd);
        let output = e.opened.flags & libc::O_ACCMODE != libc::O_RDONLY;
        let given = given.or(cx.request.log.filter(|_| output));
        let fd = match given {
            Some(fd) => cx.open_in(pid, |b| {
                let init = b.call("pidfd_open", libc::SYS_pidfd_open, &[1, 0]);
                let got = b.call("pidfd_getfd", libc::SYS_pidfd_getfd, &[0, fd as u64, 0]);
                b.feed(init, got, 0);
                let close = b.call("close", libc::SYS_close, &[0]);
                b.feed(init, close, 0);
                got
            })?,
            None => cx.open_in(pid, |b| open_call(b, b"/dev/null", e.opened.flags & libc::O_ACCMODE))?,
        };
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }
}
