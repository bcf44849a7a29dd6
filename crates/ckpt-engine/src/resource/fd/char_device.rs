// SPDX-License-Identifier: MIT OR Apache-2.0
//! Character devices without state of their own: null, zero, full, random, urandom.

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

/// Version of [`CharDeviceRecord`].
pub const VERSION: u16 = 1;

/// An open device.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CharDeviceRecord {
    /// What all have.
    pub opened: Opened,
    /// Absolute path.
    pub path: Vec<u8>,
    /// st_rdev.
    pub rdev: u64,
}

/// Minor numbers of memory devices (major 1) without state.
const STATELESS: [u32; 5] = [3, 5, 7, 8, 9];

/// The kind.
#[derive(Debug)]
pub struct CharDeviceResource;

impl Resource for CharDeviceResource {
    nothing_to_do! { asks, probe, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::CharDevice
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        let r = f.seen.stat.rdev;
        f.seen.stat.format() == libc::S_IFCHR && libc::major(r) == 1 && STATELESS.contains(&libc::minor(r))
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let record = CharDeviceRecord {
            opened: Opened::of(cx.job, f)?,
            path: f.path().to_vec(),
            rdev: f.seen.stat.rdev,
        };
        cx.put(Kind::CharDevice, VERSION, f.id, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let d: CharDeviceRecord = decode(record, VERSION)?;
        Ok(String::from_utf8_lossy(&d.path).into_owned())
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let d: CharDeviceRecord = decode(record, VERSION)?;
        let fd = cx.open_in(d.opened.pid, |b| open_call(b, &d.path, d.opened.flags))?;
        cx.add_file(record.owner, d.opened.pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let d: CharDeviceRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        d.opened.finish(cx, fd, false)
    }
}
