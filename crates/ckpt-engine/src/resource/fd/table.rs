// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptor tables: which number is which open file description.

use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::Descriptor;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::area::MAX_CALLS;
use ckpt_sys::inject::Query;
use ckpt_sys::libc;
use std::collections::BTreeMap;

/// Version of [`FdTableRecord`].
pub const VERSION: u16 = 1;

/// A slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Entry {
    /// Number.
    pub number: i32,
    /// Open file description.
    pub file: u64,
    /// FD_CLOEXEC.
    pub cloexec: bool,
}

/// The table of a process (the record's owner).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FdTableRecord {
    /// By number.
    pub entries: Vec<Entry>,
}

/// FD_CLOEXEC of a descriptor for which fdinfo does not tell it: it mixes it with the flags of the description, which
/// those of a terminal may hold (TIOCGPTPEER).
fn ask_cloexec(job: &Job, d: &Descriptor) -> Option<Query> {
    let unclear = d.cloexec && job.files.get(&d.file).is_some_and(|f| f.kind == Some(Kind::Tty));
    unclear.then(|| Query::number(libc::SYS_fcntl, [d.number as u64, libc::F_GETFD as u64, 0, 0, 0, 0]))
}

/// The kind.
#[derive(Debug)]
pub struct FdTableResource;

impl Resource for FdTableResource {
    nothing_to_do! { claims, probe, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::FdTable
    }

    fn after(&self) -> &'static [Kind] {
        &[
            Kind::RegularFile,
            Kind::Directory,
            Kind::CharDevice,
            Kind::Pipe,
            Kind::Fifo,
            Kind::Eventfd,
            Kind::Epoll,
            Kind::UnixSocket,
            Kind::Tty,
            Kind::External,
            Kind::Signalfd,
            Kind::Timerfd,
            Kind::TcpSocket,
            Kind::Inotify,
        ]
    }

    fn asks(&self, job: &Job, at: At<'_>) -> Vec<Query> {
        match at {
            At::Process(p) => p.descriptors.iter().filter_map(|d| ask_cloexec(job, d)).collect(),
            _ => Vec::new(),
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        let mut entries = Vec::with_capacity(p.descriptors.len());
        for d in &p.descriptors {
            let mut cloexec = d.cloexec;
            if let Some(q) = ask_cloexec(cx.job, d) {
                cloexec = cx.live().number("fcntl F_GETFD", &q)? & libc::FD_CLOEXEC as u64 != 0;
            }
            entries.push(Entry { number: d.number, file: d.file, cloexec });
        }
        cx.put(Kind::FdTable, VERSION, p.pid as u64, 0, &FdTableRecord { entries })
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let t: FdTableRecord = decode(record, VERSION)?;
        let text = |e: &Entry| format!("{}→#{}{}", e.number, e.file, if e.cloexec { " cloexec" } else { "" });
        Ok(t.entries.iter().map(text).collect::<Vec<_>>().join(", "))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let t: FdTableRecord = decode(record, VERSION)?;
        let pid = record.owner as i32;
        // Each description under the first number it has here; further ones are duplicates of that.
        let mut first: BTreeMap<u64, i32> = BTreeMap::new();
        for chunk in t.entries.chunks(100) {
            let files = cx.files.clone();
            let missing = chunk.iter().find(|e| !files.contains_key(&e.file));
            if let Some(e) = missing.filter(|_| !ckpt_sys::hook::any_skipped()) {
                let text = format!("process {pid} fd {}: there is no open file {}", e.number, e.file);
                return Err(RestoreError::Record(text));
            }
            cx.run(pid, |b| {
                for e in chunk {
                    let Some(&(holder, kept)) = files.get(&e.file) else { continue };
                    let number = e.number as u64;
                    let cloexec = if e.cloexec { libc::O_CLOEXEC as u64 } else { 0 };
                    if let Some(&other) = first.get(&e.file) {
                        b.call(format!("dup3 to {number}"), libc::SYS_dup3, &[other as u64, number, cloexec]);
                    } else if holder == pid {
                        b.call(format!("dup3 to {number}"), libc::SYS_dup3, &[kept as u64, number, cloexec]);
                    } else {
                        let pidfd = b.call("pidfd_open", libc::SYS_pidfd_open, &[holder as u64, 0]);
                        let got = b.call("pidfd_getfd", libc::SYS_pidfd_getfd, &[0, kept as u64, 0]);
                        b.feed(pidfd, got, 0);
                        let close = b.call("close", libc::SYS_close, &[0]);
                        b.feed(pidfd, close, 0);
                        // Moved out of the way first: the number it got may be the one it is to have.
                        let base = t.entries.iter().map(|e| e.number + 1).max().unwrap_or(0) as u64;
                        let high = b.call("fcntl F_DUPFD", libc::SYS_fcntl, &[0, libc::F_DUPFD as u64, base]);
                        b.feed(got, high, 0);
                        let close = b.call("close", libc::SYS_close, &[0]);
                        b.feed(got, close, 0);
                        let dup = b.call(format!("dup3 to {number}"), libc::SYS_dup3, &[0, number, cloexec]);
                        b.feed(high, dup, 0);
                        let close = b.call("close", libc::SYS_close, &[0]);
                        b.feed(high, close, 0);
                    }
                    first.entry(e.file).or_insert(e.number);
                }
            })?;
        }
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        // What was kept for others to fetch is closed, when nobody needs it any more.
        let t: FdTableRecord = decode(record, VERSION)?;
        let pid = record.owner as i32;
        let kept: Vec<i32> = cx.files.values().filter(|(p, _)| *p == pid).map(|(_, fd)| *fd).collect();
        let used = |fd: &i32| t.entries.iter().any(|e| e.number == *fd);
        for chunk in kept.chunks(MAX_CALLS) {
            cx.run(pid, |b| {
                for fd in chunk.iter().filter(|fd| !used(fd)) {
                    b.call("close", libc::SYS_close, &[*fd as u64]);
                }
            })?;
        }
        Ok(())
    }
}
