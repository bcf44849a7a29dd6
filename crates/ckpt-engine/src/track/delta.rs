// SPDX-License-Identifier: MIT OR Apache-2.0
//! What changed: found by one scan in the freeze. Few pages are copied there and then if they have not been before ([`super::early`]), which
//! takes less time than a fork of everything; of many the engine takes a snapshot.

use super::early::{self, Known};
use super::held::{LIMIT_BYTES, Place, Room};
use super::second::Second;
use super::watch::{Look, Stretch, push};
use super::{ProcessId, Tracker};
use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::kind::Kind;
use crate::resource::Collected;
use crate::snapshot::copy::Copy;
use crate::snapshot::{
    Account, Engine, From, Pages as Which, Piece, Prepared, Range, Sink, Snapshot, Source,
};
use ckpt_sys::memory::{Forced, PAGE};
use ckpt_sys::{Errno, Pid, pagemap};
use std::fs::File;
use std::sync::Arc;

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

/// Address space that is scanned at a time. A multiple of the size of huge pages, so that none is divided.
const SCAN_BYTES: u64 = 64 << 20;

/// A range in parts that are scanned at a time, as (start, end).
fn parts(r: &Range) -> impl Iterator<Item = (u64, u64)> {
    let (first, end) = (r.addr, r.addr + r.bytes);
    let starts = (first / SCAN_BYTES..).map(|n| n * SCAN_BYTES).take_while(move |at| *at < end);
    starts.map(move |at| (at.max(first), (at + SCAN_BYTES).min(end)))
}

/// As [`Look::scan`], of many ranges of a process.
fn scan(
    look: Look,
    pagemap: &Arc<File>,
    ranges: &[&Range],
    over_file: bool,
    second: &Second,
) -> Result<Vec<Option<Vec<Stretch>>>, Errno> {
    let pieces = ranges.iter().flat_map(|r| parts(r)).map(|(start, end)| {
        let pagemap = Arc::clone(pagemap);
        move || look.scan(&pagemap, start, end, over_file, true)
    });
    let mut found = second.all(pieces).into_iter();
    let whole = |r: &&Range| {
        let mut all = Some(Vec::new());
        for part in found.by_ref().take(parts(r).count()) {
            all = match (all, part?) {
                (Some(mut all), Some(part)) => {
                    part.into_iter().for_each(|s| push(&mut all, s));
                    Some(all)
                }
                _ => None,
            };
        }
        Ok(all)
    };
    ranges.iter().map(whole).collect()
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
    /// These have been copied before.
    copied: Vec<Held>,
}

/// Where a part of an object is held.
#[derive(Debug, Clone, Copy)]
struct Held {
    offset: u64,
    place: Place,
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
    let pagemap = Arc::new(pagemap);
    let over_file = source.zeros == ckpt_image::ZeroPages::Record;
    let mut scanned = match watched {
        Some(w) => {
            let private: Vec<&Range> = ranges.iter().filter(|r| r.pages == Which::Private).collect();
            scan(w.watch.look(), &pagemap, &private, over_file, &t.second)
                .map_err(err("looking for written pages (PAGEMAP_SCAN)"))?
        }
        None => Vec::new(),
    }
    .into_iter();
    let (mut dirty, mut same, mut copied, mut looked) = (Vec::new(), Vec::new(), Vec::new(), true);
    for r in ranges {
        ckpt_sys::hook::point();
        let stretches = if r.pages == Which::Private { scanned.next().flatten() } else { None };
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
                    for (addr, bytes, known) in early::parts(t.early.as_ref(), id, s) {
                        let offset = r.offset + (addr - r.addr);
                        match known {
                            Known::Same => same.push(Same { offset, bytes, parent_object }),
                            Known::Copied(place) => copied.push(Held { offset, place }),
                            Known::Zero => {}
                            Known::Written => dirty.push(part(r, &Stretch { addr, bytes, ..*s })),
                        }
                    }
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
    Ok(Some(Plan { dirty: looked.then_some(dirty), same, copied }))
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
    // What the scan has found unwritten from now on need not be what was known before it.
    t.begin_again();
    let dirty = |p: &Plan| p.dirty.as_ref().map(|d| d.iter().map(|r| r.bytes).sum::<u64>());
    let known: Option<u64> = plans.iter().flatten().map(dirty).sum();
    t.pages.same_bytes = plans.iter().flatten().flat_map(|p| &p.same).map(|s| s.bytes).sum();
    let copied: u64 = plans.iter().flatten().flat_map(|p| &p.copied).map(|h| h.place.bytes as u64).sum();
    t.pages.dirty_bytes = known.unwrap_or(0) + copied;
    let mut room = std::mem::take(&mut t.room);
    let before = room.used_bytes();
    let few = known.is_some_and(|bytes| bytes + before <= LIMIT_BYTES);
    if !few {
        // The engine may need as much.
        room.shrink();
    }
    // The engine is given what is left to it.
    let (mut left, mut held) = (Vec::new(), Vec::new());
    for (source, plan) in collected.sources.iter().zip(&plans) {
        let mut here = plan.as_ref().map_or_else(Vec::new, |p| p.copied.clone());
        let from = match (&source.from, plan.as_ref().map(|p| &p.dirty)) {
            (From::File { fd, bytes }, _) => {
                let fd = fd.try_clone().map_err(DumpError::process(0, "duplicating a descriptor"))?;
                From::File { fd, bytes: *bytes }
            }
            (From::Process { host, pid, .. }, Some(Some(dirty))) => {
                for r in dirty.iter().filter(|_| few) {
                    room.place(*host, *pid, r.addr, r.bytes, |addr, place| {
                        here.push(Held { offset: r.offset + (addr - r.addr), place });
                    });
                }
                let ranges = if few { Vec::new() } else { dirty.clone() };
                From::Process { host: *host, pid: *pid, ranges }
            }
            (From::Process { host, pid, ranges }, _) => {
                From::Process { host: *host, pid: *pid, ranges: ranges.clone() }
            }
        };
        held.push(here);
        left.push(Source { kind: source.kind, object: source.object, zeros: source.zeros, from });
    }
    ckpt_sys::hook::point();
    room.fill(&t.second).all()?;
    t.same = plans.into_iter().map(|p| p.map_or_else(Vec::new, |p| p.same)).collect();
    let engine = if few { Copy.prepare(&frozen.job, true)? } else { engine };
    let all = std::mem::replace(&mut collected.sources, left);
    let inner = engine.snapshot(frozen, collected);
    let left = std::mem::replace(&mut collected.sources, all);
    Ok(Box::new(Delta {
        inner: inner?,
        left,
        held,
        held_bytes: room.used_bytes() - before,
        early_bytes: copied,
        room,
    }))
}

/// The changed pages, and the snapshot of the rest.
struct Delta {
    inner: Box<dyn Snapshot>,
    left: Vec<Source>,
    held: Vec<Vec<Held>>,
    room: Room,
    /// As in [`Account`].
    held_bytes: u64,
    early_bytes: u64,
}

impl Snapshot for Delta {
    fn stream(&mut self, index: usize, _: &Source, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        self.room.shrink();
        for h in &self.held[index] {
            sink(Piece::Data(h.offset, self.room.get(h.place)))?;
        }
        self.inner.stream(index, &self.left[index], sink)
    }

    fn finish(&mut self) -> Result<Account, DumpError> {
        self.room = Room::default();
        let mut account = self.inner.finish()?;
        account.held_bytes += self.held_bytes;
        account.early_bytes += self.early_bytes;
        Ok(account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(addr: u64, bytes: u64) -> Range {
        Range { addr, bytes, offset: addr, pages: Which::Private, lost_in_fork: None }
    }

    #[test]
    fn a_range_is_parted_without_gaps() {
        let parts_of = |start, end| parts(&range(start, end - start)).collect::<Vec<_>>();
        let page = PAGE;
        assert_eq!(parts_of(page, 2 * page), [(page, 2 * page)]);
        assert_eq!(parts_of(SCAN_BYTES, 2 * SCAN_BYTES), [(SCAN_BYTES, 2 * SCAN_BYTES)]);
        let (start, end) = (SCAN_BYTES - page, 2 * SCAN_BYTES + page);
        let expected = [(start, SCAN_BYTES), (SCAN_BYTES, 2 * SCAN_BYTES), (2 * SCAN_BYTES, end)];
        assert_eq!(parts_of(start, end), expected);
    }
}
