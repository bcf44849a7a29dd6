// SPDX-License-Identifier: MIT OR Apache-2.0
//! Named pipes, with the data in them.

use super::Opened;
use super::pipe::{PipeContent, content_of, fill, first_of};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::{Build, open_call};
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;

/// Version of [`FifoRecord`].
pub const VERSION: u16 = 1;

/// An open end of a named pipe. The record's id is the number of the first description of it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FifoRecord {
    /// What all have.
    pub opened: Opened,
    /// Absolute path.
    pub path: Vec<u8>,
    /// For the first description of a FIFO, its state.
    pub content: Option<PipeContent>,
}

/// The kind.
#[derive(Debug)]
pub struct FifoResource;

impl Resource for FifoResource {
    nothing_to_do! { asks, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Fifo
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process, Kind::ShmFile]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        f.seen.stat.format() == libc::S_IFIFO && f.seen.link.starts_with(b"/")
    }

    fn probe(&self, job: &Job, refusals: &mut crate::error::Refusals) {
        for f in job.files.values().filter(|f| f.kind == Some(Kind::Fifo) && f.seen.stat.nlink == 0) {
            refusals.fd(f.pid, f.fd, format!("deleted named pipe {}", f.seen.target), "close it first");
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let content = if first_of(cx.job, f) == f.id { Some(content_of(cx.job, f)?) } else { None };
        let record = FifoRecord { opened: Opened::of(cx.job, f)?, path: f.path().to_vec(), content };
        cx.put(Kind::Fifo, VERSION, f.id, first_of(cx.job, f), &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let f: FifoRecord = decode(record, VERSION)?;
        let held = f.content.map_or(0, |c| c.pieces.iter().map(Vec::len).sum());
        Ok(format!("named pipe {}, {held} unread bytes", String::from_utf8_lossy(&f.path)))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let f: FifoRecord = decode(record, VERSION)?;
        let pid = f.opened.pid;
        // With a read-write end open, opening either end blocks for nobody.
        let from = match cx.pipes.get(&record.id).copied() {
            Some(from) => from,
            None => {
                let from = (pid, cx.open_in(pid, |b| open_call(b, &f.path, libc::O_RDWR))?);
                cx.pipes.insert(record.id, from);
                from
            }
        };
        if let Some(content) = &f.content {
            fill(cx, from.0, from.1, content)?;
        }
        let fd = cx.open_in(pid, |b| open_call(b, &f.path, f.opened.flags))?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let f: FifoRecord = decode(record, VERSION)?;
        if let Some((pid, fd)) = cx.pipes.remove(&record.id) {
            cx.call(pid, "close", libc::SYS_close, &[fd as u64])?;
        }
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        f.opened.finish(cx, fd, false)
    }
}
