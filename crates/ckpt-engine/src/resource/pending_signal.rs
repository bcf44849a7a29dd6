// SPDX-License-Identifier: MIT OR Apache-2.0
//! Queued signals of processes and threads, with their siginfo (ptrace(2), PTRACE_PEEKSIGINFO).

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::area::MAX_CALLS;
use ckpt_sys::{libc, ptrace};

/// Version of [`PendingSignalRecord`].
pub const VERSION: u16 = 1;

/// Signals queued for a thread (owner: tid, id: pid), or for a process (owner: pid, id: 0).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PendingSignalRecord {
    /// `siginfo_t`, 128 bytes each, in order.
    pub queue: Vec<Vec<u8>>,
}

/// The kind.
#[derive(Debug)]
pub struct PendingSignalResource;

impl Resource for PendingSignalResource {
    nothing_to_do! { claims, asks, probe, content, create, connect, finish }

    fn kind(&self) -> Kind {
        Kind::PendingSignal
    }

    fn after(&self) -> &'static [Kind] {
        // An action set to ignore would flush them.
        &[Kind::Signal]
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let (pid, host, shared, owner, id) = match at {
            At::Process(p) => (p.pid, p.host, true, p.pid, 0),
            At::Thread(p, t) => (p.pid, t.host, false, t.tid, p.pid),
            At::Job | At::File(_) => return Ok(()),
        };
        let queue =
            ptrace::queued_signals(host, shared).map_err(DumpError::errno(pid, "PTRACE_PEEKSIGINFO"))?;
        if queue.is_empty() {
            return Ok(());
        }
        let queue = queue.into_iter().map(|s| s.to_vec()).collect();
        cx.put(Kind::PendingSignal, VERSION, owner as u64, id as u64, &PendingSignalRecord { queue })
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let s: PendingSignalRecord = decode(record, VERSION)?;
        let of = |b: &Vec<u8>| b.first().copied().unwrap_or(0).to_string();
        Ok(format!("queued: {}", s.queue.iter().map(of).collect::<Vec<_>>().join(" ")))
    }

    fn arm(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: PendingSignalRecord = decode(record, VERSION)?;
        let (owner, pid) = (record.owner, record.id);
        // Sent by the task to itself: to others the kernel lets nobody forge a siginfo.
        for chunk in s.queue.chunks(MAX_CALLS) {
            cx.run(owner as i32, |b| {
                for info in chunk {
                    let signal = u64::from(info.first().copied().unwrap_or(0));
                    let at = b.bytes(info);
                    if pid == 0 {
                        b.call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[owner, signal, at]);
                    } else {
                        b.call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, &[pid, owner, signal, at]);
                    }
                }
            })?;
        }
        Ok(())
    }
}

/// Whether a signal is queued for a process or one of its threads.
///
/// # Errors
/// If a record does not decode.
pub fn is_queued(image: &crate::restore::read::Image, pid: i32, signal: i32) -> Result<bool, RestoreError> {
    for r in image.of_kind(Kind::PendingSignal) {
        if r.owner == pid as u64 || r.id == pid as u64 {
            let s: PendingSignalRecord = decode(r, VERSION)?;
            if s.queue.iter().any(|i| i.first().copied().map(i32::from) == Some(signal)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
