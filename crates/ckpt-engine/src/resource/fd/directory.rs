// SPDX-License-Identifier: MIT OR Apache-2.0
//! Open directories.

use super::Opened;
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::{Build, open_call};
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;

/// Version of [`DirectoryRecord`].
pub const VERSION: u16 = 1;

/// An open directory.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DirectoryRecord {
    /// What all have.
    pub opened: Opened,
    /// Absolute path.
    pub path: Vec<u8>,
}

/// The kind.
#[derive(Debug)]
pub struct DirectoryResource;

impl Resource for DirectoryResource {
    nothing_to_do! { asks, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Directory
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process, Kind::ShmFile]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        f.seen.stat.format() == libc::S_IFDIR && !f.seen.link.starts_with(b"/proc/")
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for f in job.files.values().filter(|f| f.kind == Some(Kind::Directory)) {
            if f.seen.link.ends_with(b" (deleted)") {
                refusals.fd(f.pid, f.fd, format!("directory {}", f.seen.target), "close it first");
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let record = DirectoryRecord { opened: Opened::of(cx.job, f)?, path: f.seen.link.clone() };
        cx.put(Kind::Directory, VERSION, f.id, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let d: DirectoryRecord = decode(record, VERSION)?;
        Ok(format!("directory {}", String::from_utf8_lossy(&d.path)))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let d: DirectoryRecord = decode(record, VERSION)?;
        let fd = cx.open_in(d.opened.pid, |b| open_call(b, &d.path, d.opened.flags))?;
        cx.add_file(record.owner, d.opened.pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let d: DirectoryRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        d.opened.finish(cx, fd, d.opened.flags & libc::O_PATH == 0)
    }
}
