// SPDX-License-Identifier: MIT OR Apache-2.0
//! epoll(7) instances: what they watch, with the data that belongs to it.
//!
//! An entry names a descriptor number of whoever added it, and an open file description; the number may mean something
//! else by now. kcmp(2) tells which description it is.

use super::Opened;
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Content, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::area::Batch;
use ckpt_sys::{Pid, libc};
use std::collections::HashMap;

/// Version of [`EpollRecord`].
pub const VERSION: u16 = 1;

/// Something watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Watch {
    /// The process in which `number` and `via` are.
    pub pid: i32,
    /// The number it was added under.
    pub number: i32,
    /// A descriptor for it now.
    pub via: i32,
    /// A descriptor for the epoll instance there.
    pub instance: i32,
    /// EPOLL*.
    pub events: u32,
    /// `epoll_data`.
    pub data: u64,
}

/// An epoll instance.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct EpollRecord {
    /// What all have.
    pub opened: Opened,
    /// What it watches.
    pub watches: Vec<Watch>,
}

/// The kind.
#[derive(Debug)]
pub struct EpollResource;

/// Lines of fdinfo: number, events, data.
fn lines(f: &OpenFile) -> Vec<(i32, u32, u64)> {
    let parse = |l: &str| {
        let mut w = l.split_whitespace();
        let number = w.next()?.parse().ok()?;
        let events = u32::from_str_radix(w.nth(1)?, 16).ok()?;
        let data = u64::from_str_radix(w.nth(1)?, 16).ok()?;
        Some((number, events, data))
    };
    f.seen.info.lines().filter_map(|l| l.strip_prefix("tfd:")).filter_map(parse).collect()
}

/// Finds what every entry watches; an entry that can't be found comes with its number.
fn resolve(job: &Job, f: &OpenFile) -> Vec<Result<Watch, i32>> {
    let mut seen: HashMap<i32, u32> = HashMap::new();
    let mut out = Vec::new();
    for (number, events, data) in lines(f) {
        // Several entries of one number, of descriptions that replaced each other, are told apart by their order.
        let offset = seen.entry(number).or_insert(0);
        let mut found = None;
        for (pid, instance) in &f.holders {
            let Some(p) = job.process(*pid) else { continue };
            let is = |fd: i32| {
                ckpt_sys::task::epoll_watches(p.host, fd, *instance, number, *offset).unwrap_or(false)
            };
            let numbers = p.descriptors.iter().map(|d| d.number);
            let mut candidates: Vec<i32> = numbers.collect();
            // The number itself is nearly always the one.
            candidates.sort_by_key(|n| *n != number);
            if let Some(via) = candidates.into_iter().find(|n| is(*n)) {
                found = Some(Watch { pid: *pid, number, via, instance: *instance, events, data });
                break;
            }
        }
        *offset += 1;
        out.push(found.ok_or(number));
    }
    out
}

/// Duplicates whatever has the number: the duplicate, and O_CLOEXEC if it had that.
fn step_aside(mut b: Batch<'_>, w: &Watch) -> Result<Option<(u64, u64)>, RestoreError> {
    let number = w.number as u64;
    let flags = b.call("fcntl F_GETFD", libc::SYS_fcntl, &[number, libc::F_GETFD as u64]);
    let dup = b.call("fcntl F_DUPFD", libc::SYS_fcntl, &[number, libc::F_DUPFD as u64, number + 1]);
    let (r, _) = b.run_raw(Pid::from_raw(w.pid)).map_err(RestoreError::remote(w.pid))?;
    let cloexec =
        if r[flags.index()] & i64::from(libc::FD_CLOEXEC) != 0 { libc::O_CLOEXEC as u64 } else { 0 };
    Ok(u64::try_from(r[dup.index()]).ok().map(|fd| (fd, cloexec)))
}

/// Whether an entry waits for anything: one with EPOLLONESHOT that has reported waits for nothing until it is set again.
fn is_armed(w: &Watch) -> bool {
    const PRIVATE: u32 =
        (libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLWAKEUP | libc::EPOLLEXCLUSIVE) as u32;
    w.events & !PRIVATE != 0
}

/// Adds an entry to its instance, under the number it had.
fn add(cx: &mut Build<'_>, w: &Watch) -> Result<(), RestoreError> {
    // struct epoll_event is packed: events, then data.
    let event = [w.events.to_le_bytes().as_slice(), &w.data.to_le_bytes()].concat();
    let (instance, number, via) = (w.instance as u64, w.number as u64, w.via as u64);
    let mut aside = None;
    if number != via {
        // What has the number now, if anything, steps aside for a moment.
        let b = cx.area.batch();
        aside = step_aside(b, w)?;
        cx.call(w.pid, "dup2", libc::SYS_dup2, &[via, number])?;
    }
    cx.run(w.pid, |b| {
        let at = b.bytes(&event);
        let add = libc::EPOLL_CTL_ADD as u64;
        let what = format!("epoll_ctl of instance {instance} for number {number}");
        b.call(what, libc::SYS_epoll_ctl, &[instance, add, number, at]);
    })?;
    if number != via {
        cx.run(w.pid, |b| match aside {
            Some((fd, cloexec)) => {
                b.call("dup3", libc::SYS_dup3, &[fd, number, cloexec]);
                b.call("close", libc::SYS_close, &[fd]);
            }
            None => {
                b.call("close", libc::SYS_close, &[number]);
            }
        })?;
    }
    Ok(())
}

impl Resource for EpollResource {
    nothing_to_do! { asks }

    fn kind(&self) -> Kind {
        Kind::Epoll
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        f.seen.target == "anon_inode:[eventpoll]"
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for f in job.files.values().filter(|f| f.kind == Some(Kind::Epoll)) {
            for number in resolve(job, f).into_iter().filter_map(Result::err) {
                let what = format!(
                    "epoll instance that watches number {number}, which no process has open any more"
                );
                refusals.fd(
                    f.pid,
                    f.fd,
                    what,
                    "the file was handed to another process and closed; not supported",
                );
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let watches = resolve(cx.job, f).into_iter().filter_map(Result::ok).collect();
        let record = EpollRecord { opened: Opened::of(cx.job, f)?, watches };
        // An instance may watch a hundred thousand descriptors: nobody waits for that to be encoded.
        cx.defer(Kind::Epoll, VERSION, f.id, 0, record);
        Ok(())
    }

    fn content(&self, cx: &mut Content<'_>) -> Result<(), DumpError> {
        cx.write_deferred(Kind::Epoll)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let e: EpollRecord = decode(record, VERSION)?;
        let numbers: Vec<String> = e.watches.iter().map(|w| w.number.to_string()).collect();
        Ok(format!("epoll watching {}", numbers.join(" ")))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let e: EpollRecord = decode(record, VERSION)?;
        let pid = e.opened.pid;
        let fd = cx.open_in(pid, |b| {
            b.call("epoll_create1", libc::SYS_epoll_create1, &[libc::EPOLL_CLOEXEC as u64])
        })?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn connect(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let e: EpollRecord = decode(record, VERSION)?;
        e.watches.iter().filter(|w| !is_armed(w)).try_for_each(|w| add(cx, w))
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let e: EpollRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        e.opened.set_flags(cx, fd)?;
        e.opened.finish(cx, fd, false)
    }

    fn arm(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        // An edge-triggered entry reports what is ready when it is added: that must not happen before all is in place.
        let e: EpollRecord = decode(record, VERSION)?;
        e.watches.iter().filter(|w| is_armed(w)).try_for_each(|w| add(cx, w))
    }
}
