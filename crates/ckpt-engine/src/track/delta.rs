// SPDX-License-Identifier: MIT OR Apache-2.0
//! What changed: found by one scan in the freeze. Few pages are copied there and then, which takes less time than a fork of
//! everything; of many the engine takes a snapshot.

use super::watch::{Stretch, Watch};
use super::{ProcessId, Tracker, Tracking};
use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::kind::Kind;
use crate::model::Job;
use crate::resource::Collected;
use crate::snapshot::copy::Copy;
use crate::snapshot::{
    Account, Engine, From, Pages as Which, Piece, Prepared, Range, Sink, Snapshot, Source,
};
use ckpt_sys::memory::{Forced, PAGE};
use ckpt_sys::{Errno, Pid, pagemap};
use std::fs::File;

/// Bytes of changed pages that are copied while the job is frozen. More than this is left to the snapshot engine.
const HELD_LIMIT_BYTES: u64 = 32 << 20;

/// Counts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pages {
    /// To be saved. For what the engine looks for itself, an upper bound.
    pub dirty_bytes: u64,
    /// As in the parent.
    pub same_bytes: u64,
}

/// Pages of a source that are those of the parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Same {
    /// Offset in both objects.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// The object in the parent.
    pub parent_object: u64,
}

/// Memory for the changed pages, touched before the job is stopped. How many there are is estimated by a scan that changes nothing.
pub(super) fn room(tracking: &Tracking, job: &Job) -> Vec<u8> {
    let mut bytes = 0;
    for w in &tracking.processes {
        let Some(p) = job.live().find(|p| ProcessId::of(p) == w.id) else { continue };
        let Ok(pagemap) = File::open(format!("/proc/{}/pagemap", p.host)) else { continue };
        for v in p.vmas.iter().filter(|v| v.has("uw")) {
            if let Ok(Some(stretches)) = w.watch.scan(&pagemap, v.start, v.end, v.is_file(), false) {
                bytes += stretches.iter().filter(|s| !s.unwritten).map(|s| s.bytes).sum::<u64>();
            }
        }
    }
    // Some more are written until the job stands still.
    let bytes = (2 * bytes + (1 << 20)).min(HELD_LIMIT_BYTES) as usize;
    vec![1; bytes]
}

/// Fewer bytes are not worth a second thread.
const SHARED_WORK_BYTES: u64 = 4 << 20;

/// Whether two threads can work at the same time while the job stands still. Asked before it does.
pub(super) fn can_share_work() -> bool {
    std::thread::available_parallelism().is_ok_and(|n| n.get() > 1)
}

/// Does two things at the same time.
fn both<T: Send>(a: impl FnOnce() -> T + Send, b: impl FnOnce() -> T) -> (T, T) {
    std::thread::scope(|scope| {
        let other = scope.spawn(a);
        let b = b();
        match other.join() {
            Ok(a) => (a, b),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// As [`Watch::scan`], by two threads if it is worth it.
fn scan(
    watch: &Watch,
    pagemap: &File,
    r: &Range,
    over_file: bool,
    share: bool,
) -> Result<Option<Vec<Stretch>>, Errno> {
    /// So that no huge page is divided.
    const ALIGNMENT: u64 = 2 << 20;
    let part = |start, end| watch.scan(pagemap, start, end, over_file, true);
    let end = r.addr + r.bytes;
    if !share || r.bytes < 16 * SHARED_WORK_BYTES {
        return part(r.addr, end);
    }
    let middle = (r.addr + r.bytes / 2) / ALIGNMENT * ALIGNMENT;
    let (first, second) = both(|| part(r.addr, middle), || part(middle, end));
    Ok(match (first?, second?) {
        (Some(mut stretches), Some(more)) => {
            stretches.extend(more);
            Some(stretches)
        }
        _ => None,
    })
}

/// A part of a range, with pages that all exist.
fn part(r: &Range, s: &Stretch) -> Range {
    Range { addr: s.addr, bytes: s.bytes, offset: r.offset + (s.addr - r.addr), pages: Which::All, ..*r }
}

/// The pages of a range that is not watched. `None` where they can't be told apart quickly (before Linux 6.7).
fn existing(pagemap: &File, r: &Range) -> Result<Option<Vec<Range>>, Errno> {
    if r.pages == Which::All {
        return Ok(Some(vec![*r]));
    }
    let mut regions = [pagemap::Region::default(); 512];
    let (mut out, mut at, end) = (Vec::new(), r.addr, r.addr + r.bytes);
    while at < end {
        let (any, not) = (pagemap::PRESENT | pagemap::SWAPPED, pagemap::FILE | pagemap::ZERO);
        let (n, seen) = match pagemap::scan(pagemap, at, end, any, not, &mut regions) {
            Err(Errno::ENOTTY) => return Ok(None),
            found => found?,
        };
        let stretch = |g: &pagemap::Region| Stretch {
            addr: g.start,
            bytes: g.end - g.start,
            unwritten: false,
            doubtful: false,
        };
        out.extend(regions[..n].iter().map(|g| part(r, &stretch(g))));
        if seen <= at {
            return Err(Errno::EIO);
        }
        at = seen;
    }
    Ok(Some(out))
}

/// Reads a byte, so that the page is there: from swap, or from its file.
fn touch(host: Pid, pid: i32, addr: u64) -> Result<(), DumpError> {
    let what = |e: std::io::Error| DumpError::process(pid, format!("reading memory at {addr:#x}"))(e);
    let mut byte = [0];
    if ckpt_sys::memory::read(host, addr, &mut byte).is_err() {
        Forced::open(host).and_then(|memory| memory.read(addr, &mut byte)).map_err(what)?;
    }
    Ok(())
}

/// What is to be done about one source.
struct Plan {
    /// Exactly these are to be saved; `None`: the engine has to look.
    dirty: Option<Vec<Range>>,
    same: Vec<Same>,
}

fn plan(t: &Tracker, frozen: &FrozenJob, source: &Source) -> Result<Option<Plan>, DumpError> {
    let From::Process { host, pid, ranges } = &source.from else { return Ok(None) };
    if source.kind != Kind::MemoryMap {
        return Ok(None);
    }
    let err = |what: &str| DumpError::errno(*pid, what.to_owned());
    let id = frozen.job.process(*pid).map(ProcessId::of);
    let watched =
        t.tracking.processes.iter().find(|w| Some(w.id) == id).filter(|w| !w.watch.is_doubtful(*host));
    let pagemap =
        File::open(format!("/proc/{host}/pagemap")).map_err(DumpError::process(*pid, "opening pagemap"))?;
    let over_file = source.zeros == ckpt_image::ZeroPages::Record;
    let (mut dirty, mut same, mut looked) = (Vec::new(), Vec::new(), true);
    for r in ranges {
        ckpt_sys::hook::point();
        let stretches = match watched {
            Some(w) if r.pages == Which::Private => scan(&w.watch, &pagemap, r, over_file, t.share_work)
                .map_err(err("looking for written pages (PAGEMAP_SCAN)"))?,
            _ => None,
        };
        let Some(stretches) = stretches else {
            let found = existing(&pagemap, r).map_err(err("looking for pages (PAGEMAP_SCAN)"))?;
            let worth_it = r.pages == Which::Private && found.as_ref().is_none_or(|f| !f.is_empty());
            if let Some(w) = watched.filter(|_| worth_it) {
                w.watch.cover_range(r.addr, r.bytes).map_err(err("watching a mapping (userfaultfd)"))?;
            }
            looked &= found.is_some();
            dirty.extend(found.unwrap_or_else(|| vec![*r]));
            continue;
        };
        for s in &stretches {
            let parent_object = watched.and_then(|w| w.object).filter(|_| claims_same(s));
            match parent_object {
                Some(parent_object) => {
                    let offset = r.offset + (s.addr - r.addr);
                    same.push(Same { offset, bytes: s.bytes, parent_object });
                }
                None if s.doubtful => {
                    let pages = (s.addr..s.addr + s.bytes).step_by(PAGE as usize);
                    pages.clone().try_for_each(|at| touch(*host, *pid, at))?;
                    let again =
                        Range { addr: s.addr, bytes: s.bytes, offset: r.offset + (s.addr - r.addr), ..*r };
                    let found =
                        existing(&pagemap, &again).map_err(err("looking for pages (PAGEMAP_SCAN)"))?;
                    dirty.extend(found.unwrap_or_else(|| vec![again]));
                }
                None => dirty.push(part(r, s)),
            }
        }
    }
    Ok(Some(Plan { dirty: looked.then_some(dirty), same }))
}

/// Whether pages are those of the parent.
#[cfg(not(feature = "test-hooks"))]
fn claims_same(s: &Stretch) -> bool {
    s.unwritten
}

/// Tests may have the scan ignored: their guests must then find wrong memory.
#[cfg(feature = "test-hooks")]
fn claims_same(s: &Stretch) -> bool {
    s.unwritten || std::env::var_os("CKPT_TEST_IGNORE_WRITES").is_some()
}

pub(super) fn snapshot(
    t: &mut Tracker,
    engine: Box<dyn Prepared>,
    frozen: &mut FrozenJob,
    collected: &mut Collected,
) -> Result<Box<dyn Snapshot>, DumpError> {
    let mut plans = Vec::with_capacity(collected.sources.len());
    for source in &collected.sources {
        plans.push(plan(t, frozen, source)?);
    }
    t.tracking.processes.iter_mut().try_for_each(|w| match frozen.job.process(w.id.pid) {
        Some(p) => w.watch.start_over(p).map_err(DumpError::process(w.id.pid, "clearing soft-dirty bits")),
        None => Ok(()),
    })?;
    let dirty = |p: &Plan| p.dirty.as_ref().map(|d| d.iter().map(|r| r.bytes).sum::<u64>());
    let known: Option<u64> = plans.iter().flatten().map(dirty).sum();
    t.pages.same_bytes = plans.iter().flatten().flat_map(|p| &p.same).map(|s| s.bytes).sum();
    t.pages.dirty_bytes = known.unwrap_or(0);
    let few = known.is_some_and(|bytes| bytes <= HELD_LIMIT_BYTES);
    // The engine is given what is left to it.
    let (mut left, mut held) = (Vec::new(), Vec::new());
    let mut room = Room { bytes: std::mem::take(&mut t.room), used: 0, share_work: t.share_work };
    for (source, plan) in collected.sources.iter().zip(&plans) {
        let from = match (&source.from, plan.as_ref().map(|p| &p.dirty)) {
            (From::File { fd, bytes }, _) => {
                let fd = fd.try_clone().map_err(DumpError::process(0, "duplicating a descriptor"))?;
                From::File { fd, bytes: *bytes }
            }
            (From::Process { host, pid, .. }, Some(Some(dirty))) => {
                let ranges = if few { Vec::new() } else { dirty.clone() };
                held.push(if few { room.copy(*host, *pid, dirty)? } else { Vec::new() });
                left.push(Source {
                    kind: source.kind,
                    object: source.object,
                    zeros: source.zeros,
                    from: From::Process { host: *host, pid: *pid, ranges },
                });
                continue;
            }
            (From::Process { host, pid, ranges }, _) => {
                From::Process { host: *host, pid: *pid, ranges: ranges.clone() }
            }
        };
        held.push(Vec::new());
        left.push(Source { kind: source.kind, object: source.object, zeros: source.zeros, from });
    }
    t.same = plans.into_iter().map(|p| p.map_or_else(Vec::new, |p| p.same)).collect();
    let engine = if few { Copy.prepare(&frozen.job, true)? } else { engine };
    let all = std::mem::replace(&mut collected.sources, left);
    let inner = engine.snapshot(frozen, collected);
    let left = std::mem::replace(&mut collected.sources, all);
    Ok(Box::new(Delta { inner: inner?, left, held, room: room.bytes, used: room.used as u64 }))
}

/// Memory for copies.
struct Room {
    bytes: Vec<u8>,
    used: usize,
    share_work: bool,
}

impl Room {
    /// Copies the pages of a process; gives offset in the object, position and length for each stretch.
    fn copy(&mut self, host: Pid, pid: i32, ranges: &[Range]) -> Result<Vec<(u64, usize, usize)>, DumpError> {
        let total: usize = ranges.iter().map(|r| r.bytes as usize).sum();
        if self.bytes.len() < self.used + total {
            self.bytes.resize(self.used + total, 0);
        }
        let mut out = Vec::with_capacity(ranges.len());
        let first = self.used;
        for r in ranges {
            out.push((r.offset, self.used, r.bytes as usize));
            self.used += r.bytes as usize;
        }
        let list: Vec<(u64, u64)> = ranges.iter().map(|r| (r.addr, r.bytes)).collect();
        ckpt_sys::hook::point();
        let target = &mut self.bytes[first..self.used];
        if !self.share_work || (total as u64) < SHARED_WORK_BYTES {
            copy(host, pid, &list, target)?;
            return Ok(out);
        }
        let (mut middle, mut half) = (0, 0);
        while half < total / 2 {
            half += list[middle].1 as usize;
            middle += 1;
        }
        let (a, b) = target.split_at_mut(half);
        let (a, b) = both(|| copy(host, pid, &list[..middle], a), || copy(host, pid, &list[middle..], b));
        a.and(b)?;
        Ok(out)
    }
}

/// Copies stretches of a process's memory, one after the other.
fn copy(host: Pid, pid: i32, list: &[(u64, u64)], target: &mut [u8]) -> Result<(), DumpError> {
    if ckpt_sys::memory::read_list(host, list, target).is_ok() {
        return Ok(());
    }
    // Pages the process itself may not read are reached through /proc/pid/mem.
    let memory = Forced::open(host).map_err(DumpError::process(pid, "opening its memory"))?;
    let mut rest = target;
    for (addr, bytes) in list {
        let (now, later) = rest.split_at_mut(*bytes as usize);
        let what = format!("reading {bytes} bytes of memory at {addr:#x}");
        memory.read(*addr, now).map_err(DumpError::process(pid, what))?;
        rest = later;
    }
    Ok(())
}

/// The changed pages, and the snapshot of the rest.
struct Delta {
    inner: Box<dyn Snapshot>,
    left: Vec<Source>,
    held: Vec<Vec<(u64, usize, usize)>>,
    room: Vec<u8>,
    used: u64,
}

impl Snapshot for Delta {
    fn stream(&mut self, index: usize, _: &Source, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        for &(offset, at, bytes) in &self.held[index] {
            sink(Piece::Data(offset, &self.room[at..at + bytes]))?;
        }
        self.inner.stream(index, &self.left[index], sink)
    }

    fn finish(&mut self) -> Result<Account, DumpError> {
        self.room = Vec::new();
        let mut account = self.inner.finish()?;
        account.held_bytes += self.used;
        Ok(account)
    }
}

// Offsets and lengths are those of pages throughout.
const _: () = assert!(HELD_LIMIT_BYTES.is_multiple_of(PAGE));
