// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restartable sequences (rseq(2)), per thread.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;

/// Version of [`RseqRecord`].
pub const VERSION: u16 = 1;

/// A registered area. The record's owner is the tid.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RseqRecord {
    /// Address of `struct rseq`.
    pub pointer: u64,
    /// Length in bytes as registered.
    pub size: u32,
    /// Signature of abort handlers.
    pub signature: u32,
}

/// The kind.
#[derive(Debug)]
pub struct RseqResource;

impl Resource for RseqResource {
    nothing_to_do! { claims, asks, probe, content, create, connect, finish }

    fn kind(&self) -> Kind {
        Kind::Rseq
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Thread]
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Thread(p, t) = at else { return Ok(()) };
        let Some(c) = t.frozen.as_ref().and_then(|f| f.rseq) else { return Ok(()) };
        let record = RseqRecord { pointer: c.pointer, size: c.size, signature: c.signature };
        cx.put(Kind::Rseq, VERSION, t.tid as u64, p.pid as u64, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let r: RseqRecord = decode(record, VERSION)?;
        Ok(format!("{} bytes at {:#x}", r.size, r.pointer))
    }

    fn arm(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let r: RseqRecord = decode(record, VERSION)?;
        let args = [r.pointer, u64::from(r.size), 0, u64::from(r.signature)];
        cx.call(record.owner as i32, "rseq", libc::SYS_rseq, &args)?;
        Ok(())
    }
}
