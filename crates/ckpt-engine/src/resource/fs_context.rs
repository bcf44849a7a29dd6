// SPDX-License-Identifier: MIT OR Apache-2.0
//! Working directory, root directory and umask.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::process::Process;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;
use std::os::unix::ffi::OsStrExt;

/// Version of [`FsContextRecord`].
pub const VERSION: u16 = 1;

/// Where a process stands in the file system.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FsContextRecord {
    /// Working directory.
    pub cwd: Vec<u8>,
    /// Root directory.
    pub root: Vec<u8>,
    /// umask.
    pub umask: u32,
}

/// The kind.
#[derive(Debug)]
pub struct FsContextResource;

fn link(p: &Process, name: &str) -> std::io::Result<Vec<u8>> {
    Ok(std::fs::read_link(format!("/proc/{}/{name}", p.host))?.as_os_str().as_bytes().to_vec())
}

impl Resource for FsContextResource {
    nothing_to_do! { claims, asks, content, create, connect, arm }

    fn kind(&self) -> Kind {
        Kind::FsContext
    }

    fn after(&self) -> &'static [Kind] {
        // Files are opened by paths as init sees them.
        &[Kind::FdTable, Kind::MemoryMap]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for p in job.live() {
            for (name, what) in [("cwd", "working directory"), ("root", "root directory")] {
                let path = link(p, name).unwrap_or_default();
                if path.ends_with(b" (deleted)") {
                    let text = format!("its {what} {} has been deleted", String::from_utf8_lossy(&path));
                    refusals.process(p.pid, text, "make it change to one that exists");
                }
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        let record = FsContextRecord {
            cwd: link(p, "cwd").map_err(DumpError::process(p.pid, "reading its working directory"))?,
            root: link(p, "root").map_err(DumpError::process(p.pid, "reading its root directory"))?,
            umask: p.status.umask.unwrap_or(0o22),
        };
        cx.put(Kind::FsContext, VERSION, p.pid as u64, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let f: FsContextRecord = decode(record, VERSION)?;
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        Ok(format!("in {}, root {}, umask {:03o}", text(&f.cwd), text(&f.root), f.umask))
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let f: FsContextRecord = decode(record, VERSION)?;
        cx.run(record.owner as i32, |b| {
            let text = |p: &[u8]| String::from_utf8_lossy(p).into_owned();
            let cwd = b.string(&f.cwd);
            b.call(format!("changing to directory {}", text(&f.cwd)), libc::SYS_chdir, &[cwd]);
            if f.root != b"/" {
                let root = b.string(&f.root);
                b.call(format!("chroot to {}", text(&f.root)), libc::SYS_chroot, &[root]);
            }
            b.call("umask", libc::SYS_umask, &[u64::from(f.umask)]);
        })?;
        Ok(())
    }
}
