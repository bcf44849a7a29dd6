// SPDX-License-Identifier: MIT OR Apache-2.0
//! signalfd(2): its mask. The signals are pending ones of the process.

use super::Opened;
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;

/// Version of [`SignalfdRecord`].
pub const VERSION: u16 = 1;

/// A signalfd.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SignalfdRecord {
    /// What all have.
    pub opened: Opened,
    /// The signals it takes.
    pub mask: u64,
}

/// The kind.
#[derive(Debug)]
pub struct SignalfdResource;

impl Resource for SignalfdResource {
    nothing_to_do! { asks, probe, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Signalfd
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        f.seen.target == "anon_inode:[signalfd]"
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let mask = f.info("sigmask").and_then(|s| u64::from_str_radix(s, 16).ok());
        let mask = mask.ok_or_else(|| DumpError::fd(f.pid, f.fd, "its mask")(ckpt_sys::Errno::ENODATA))?;
        cx.put(Kind::Signalfd, VERSION, f.id, 0, &SignalfdRecord { opened: Opened::of(cx.job, f)?, mask })
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let s: SignalfdRecord = decode(record, VERSION)?;
        Ok(format!("signalfd of mask {:#x}", s.mask))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: SignalfdRecord = decode(record, VERSION)?;
        let pid = s.opened.pid;
        let fd = cx.open_in(pid, |b| {
            let mask = b.words(&[s.mask]);
            let none = -1i64 as u64;
            b.call("signalfd4", libc::SYS_signalfd4, &[none, mask, 8, libc::SFD_CLOEXEC as u64])
        })?;
        s.opened.set_flags(cx, fd)?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: SignalfdRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        s.opened.finish(cx, fd, false)
    }
}
