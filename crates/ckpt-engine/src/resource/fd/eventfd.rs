// SPDX-License-Identifier: MIT OR Apache-2.0
//! eventfd(2): counter and mode.

use super::Opened;
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;

/// Version of [`EventfdRecord`].
pub const VERSION: u16 = 1;

/// An eventfd.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct EventfdRecord {
    /// What all have.
    pub opened: Opened,
    /// The counter.
    pub count: u64,
    /// EFD_SEMAPHORE.
    pub semaphore: bool,
}

/// The kind.
#[derive(Debug)]
pub struct EventfdResource;

impl Resource for EventfdResource {
    nothing_to_do! { asks, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Eventfd
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        f.seen.target == "anon_inode:[eventfd]"
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for f in job.files.values().filter(|f| f.kind == Some(Kind::Eventfd)) {
            if f.info("eventfd-semaphore").is_none() {
                let what = "eventfd whose mode this kernel does not tell (it needs Linux 6.5)";
                refusals.fd(f.pid, f.fd, what, "upgrade the kernel");
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let count = f.info("eventfd-count").and_then(|s| u64::from_str_radix(s, 16).ok());
        let count =
            count.ok_or_else(|| DumpError::fd(f.pid, f.fd, "its counter")(ckpt_sys::Errno::ENODATA))?;
        let semaphore = f.info("eventfd-semaphore") == Some("1");
        let record = EventfdRecord { opened: Opened::of(cx.job, f)?, count, semaphore };
        cx.put(Kind::Eventfd, VERSION, f.id, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let e: EventfdRecord = decode(record, VERSION)?;
        Ok(format!("eventfd at {}{}", e.count, if e.semaphore { ", semaphore" } else { "" }))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let e: EventfdRecord = decode(record, VERSION)?;
        let pid = e.opened.pid;
        let flags = libc::EFD_CLOEXEC | if e.semaphore { libc::EFD_SEMAPHORE } else { 0 };
        let fd = cx.open_in(pid, |b| {
            let fd = b.call("eventfd2", libc::SYS_eventfd2, &[0, flags as u64]);
            if e.count > 0 {
                let count = b.words(&[e.count]);
                let write = b.call("write", libc::SYS_write, &[0, count, 8]);
                b.feed(fd, write, 0);
            }
            fd
        })?;
        e.opened.set_flags(cx, fd)?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let e: EventfdRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        e.opened.finish(cx, fd, false)
    }
}
