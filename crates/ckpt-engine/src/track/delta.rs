// SPDX-License-Identifier: MIT OR Apache-2.0
//! What changed: found by one scan in the freeze. Few pages are copied there and then, which takes less time than a fork of
//! everything; of many the engine takes a snapshot.

use super::second::Second;
use super::watch::{Look, Stretch, push};
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
use std::sync::Arc;

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
pub(super) fn room(tracking: &Tracking, job: &Job) -> Room {
    let mut bytes = 0;
    for w in &tracking.processes {
        let Some(p) = job.live().find(|p| ProcessId::of(p) == w.id) else { continue };
        let Ok(pagemap) = File::open(format!("/proc/{}/pagemap", p.host)) else { continue };
        for v in p.vmas.iter().filter(|v| v.has("uw")) {
            if let Ok(Some(stretches)) = w.watch.look().scan(&pagemap, v.start, v.end, v.is_file(), false) {
                bytes += stretches.iter().filter(|s| !s.unwritten).map(|s| s.bytes).sum::<u64>();
            }
        }
    }
    // Some more are written until the job stands still.
    let bytes = (2 * bytes + (1 << 20)).min(HELD_LIMIT_BYTES) as usize;
    Room { blocks: (0..bytes.div_ceil(BLOCK_BYTES)).map(|_| Block::touched()).collect(), filling: 0 }
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
    let (mut dirty, mut same, mut looked) = (Vec::new(), Vec::new(), true);
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
    let mut room = std::mem::take(&mut t.room);
    for (source, plan) in collected.sources.iter().zip(&plans) {
        let from = match (&source.from, plan.as_ref().map(|p| &p.dirty)) {
            (From::File { fd, bytes }, _) => {
                let fd = fd.try_clone().map_err(DumpError::process(0, "duplicating a descriptor"))?;
                From::File { fd, bytes: *bytes }
            }
            (From::Process { host, pid, .. }, Some(Some(dirty))) => {
                let ranges = if few { Vec::new() } else { dirty.clone() };
                held.push(if few { room.place(*host, *pid, dirty) } else { Vec::new() });
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
    let blocks = room.fill(&t.second)?;
    t.same = plans.into_iter().map(|p| p.map_or_else(Vec::new, |p| p.same)).collect();
    let engine = if few { Copy.prepare(&frozen.job, true)? } else { engine };
    let all = std::mem::replace(&mut collected.sources, left);
    let inner = engine.snapshot(frozen, collected);
    let left = std::mem::replace(&mut collected.sources, all);
    Ok(Box::new(Delta { inner: inner?, left, held, blocks }))
}

/// Bytes that are copied at a time.
const BLOCK_BYTES: usize = 512 << 10;

/// Memory for copies.
#[derive(Debug, Default)]
pub(super) struct Room {
    blocks: Vec<Block>,
    /// The one that is being filled; all before it are full.
    filling: usize,
}

/// A part of it, and what is to be copied there.
#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    used: usize,
    /// One after the other.
    from: Vec<Copying>,
}

/// Memory of one process that is to be copied.
#[derive(Debug)]
struct Copying {
    host: Pid,
    pid: i32,
    /// As (address, bytes).
    stretches: Vec<(u64, u64)>,
}

/// Where a stretch is held.
#[derive(Debug, Clone, Copy)]
struct Held {
    /// In the object.
    offset: u64,
    block: usize,
    at: usize,
    bytes: usize,
}

impl Block {
    fn touched() -> Block {
        Block { bytes: vec![1; BLOCK_BYTES], used: 0, from: Vec::new() }
    }

    /// Copies what is to be here.
    fn fill(mut self) -> Result<Block, DumpError> {
        let mut rest = &mut self.bytes[..];
        for Copying { host, pid, stretches } in std::mem::take(&mut self.from) {
            let (now, later) = rest.split_at_mut(stretches.iter().map(|(_, bytes)| *bytes as usize).sum());
            copy(host, pid, &stretches, now)?;
            rest = later;
        }
        Ok(self)
    }
}

impl Room {
    /// Finds places for pages of a process.
    fn place(&mut self, host: Pid, pid: i32, ranges: &[Range]) -> Vec<Held> {
        let mut out = Vec::with_capacity(ranges.len());
        for r in ranges {
            let mut done = 0;
            while done < r.bytes {
                if self.blocks.get(self.filling).is_some_and(|b| b.used == BLOCK_BYTES) {
                    self.filling += 1;
                }
                if self.filling == self.blocks.len() {
                    self.blocks.push(Block { bytes: vec![0; BLOCK_BYTES], used: 0, from: Vec::new() });
                }
                let block = &mut self.blocks[self.filling];
                let bytes = (r.bytes - done).min((BLOCK_BYTES - block.used) as u64);
                match block.from.last_mut() {
                    Some(last) if last.host == host => last.stretches.push((r.addr + done, bytes)),
                    _ => block.from.push(Copying { host, pid, stretches: vec![(r.addr + done, bytes)] }),
                }
                let (offset, at) = (r.offset + done, block.used);
                out.push(Held { offset, block: self.filling, at, bytes: bytes as usize });
                block.used += bytes as usize;
                done += bytes;
            }
        }
        out
    }

    /// Copies all that has a place.
    fn fill(self, second: &Second) -> Result<Vec<Block>, DumpError> {
        ckpt_sys::hook::point();
        let used = self.blocks.into_iter().filter(|b| b.used > 0);
        second.all(used.map(|block| move || block.fill())).into_iter().collect()
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
    held: Vec<Vec<Held>>,
    blocks: Vec<Block>,
}

impl Snapshot for Delta {
    fn stream(&mut self, index: usize, _: &Source, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        for h in &self.held[index] {
            sink(Piece::Data(h.offset, &self.blocks[h.block].bytes[h.at..h.at + h.bytes]))?;
        }
        self.inner.stream(index, &self.left[index], sink)
    }

    fn finish(&mut self) -> Result<Account, DumpError> {
        let blocks = std::mem::take(&mut self.blocks);
        let mut account = self.inner.finish()?;
        account.held_bytes += blocks.iter().map(|b| b.used as u64).sum::<u64>();
        Ok(account)
    }
}

// Offsets and lengths are those of pages throughout.
const _: () = assert!(HELD_LIMIT_BYTES.is_multiple_of(PAGE));

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

    #[test]
    fn what_is_held_is_what_was_there() {
        // Bytes that tell where they are, in stretches that end anywhere in a block; more than there is room for.
        let memory: Vec<u8> = (0..3 * BLOCK_BYTES).map(|i| ((i / 7) ^ (i >> 13)) as u8).collect();
        let base = memory.as_ptr() as u64;
        let stretches = [(0, 5000), (9000, BLOCK_BYTES + 1), (BLOCK_BYTES + 20_000, BLOCK_BYTES), (100, 1)];
        let ranges: Vec<Range> =
            stretches.iter().map(|(at, n)| range(base + *at as u64, *n as u64)).collect();
        for second in [Second::start(), Second::default()] {
            let mut room = Room { blocks: vec![Block::touched()], filling: 0 };
            let mut held = room.place(Pid::this(), 1, &ranges[..2]);
            held.extend(room.place(Pid::this(), 1, &ranges[2..]));
            let blocks = room.fill(&second).unwrap();
            let mut next = ranges.iter().flat_map(|r| r.addr..r.addr + r.bytes);
            for h in held {
                let from = (h.offset - base) as usize;
                assert!(blocks[h.block].bytes[h.at..h.at + h.bytes] == memory[from..from + h.bytes]);
                assert!(next.by_ref().take(h.bytes).eq(h.offset..h.offset + h.bytes as u64));
            }
            assert_eq!(next.next(), None);
        }
    }
}
