// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fill: page contents go into the blanks' mappings and the shared objects, each run checked before it is used.
//!
//! Runs are read, checked and placed by several threads, each with one buffer of a run. Pages of anonymous memory are made by
//! UFFDIO_COPY, which takes half the time of writing into pages that fault one by one and never makes more pages than are stored.
//! Where the kernel would use a huge page, and all of it is stored, the pages are written: the first write makes the huge page.
//! What userfaultfd can't fill (private mappings of files) is written as well.

use super::build_tree::Build;
use super::page_keeper::Keeper;
use super::page_server;
use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::decode;
use crate::resource::memory_map::{Backing, MemoryMapRecord, VmaRecord};
use ckpt_image::{Reader, Run};
use ckpt_sys::userfault::{self, Userfault};
use ckpt_sys::{Errno, Pid, libc};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of a huge page.
const HUGE: u64 = 2 << 20;
/// Most threads that fill: beyond these the memory is the limit.
const MOST_THREADS: usize = 8;
/// Most runs that a thread takes at once.
const NEIGHBOURS: usize = 8;

/// How the pages of a stretch of addresses are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// By UFFDIO_COPY.
    Copy,
    /// By the page server, later.
    Leave,
    /// By writing.
    Write,
    /// Not at all: they stay zero.
    Never,
}

/// The memory of a process that is being filled.
struct Space {
    pid: i32,
    userfault: Option<Userfault>,
    /// Sorted, each within one mapping; what is not named is written.
    stretches: Vec<(u64, u64, Way)>,
}

impl Space {
    /// Where the way of `addr` ends, at most `end`, and what it is.
    fn way(&self, addr: u64, end: u64) -> (u64, Way) {
        let next = self.stretches.partition_point(|(_, stretch_end, _)| *stretch_end <= addr);
        match self.stretches.get(next) {
            Some((start, stretch_end, way)) if *start <= addr => (end.min(*stretch_end), *way),
            Some((start, ..)) => (end.min(*start), Way::Write),
            None => (end, Way::Write),
        }
    }

    fn leaves_all_of(&self, run: &Run) -> bool {
        let (mut at, end) = (run.offset, run.offset + run.bytes);
        while at < end {
            match self.way(at, end) {
                (next, Way::Leave | Way::Never) => at = next,
                _ => return false,
            }
        }
        true
    }

    fn place(&self, start: u64, content: &[u8]) -> Result<(), Errno> {
        let (mut at, end) = (start, start + content.len() as u64);
        while at < end {
            let (next, way) = self.way(at, end);
            let part = &content[(at - start) as usize..(next - start) as usize];
            match (way, &self.userfault) {
                (Way::Leave | Way::Never, _) => {}
                (Way::Copy, Some(u)) => {
                    let (mut to, mut left) = (at, part);
                    while !left.is_empty() {
                        let (done, result) = u.copy(to, left);
                        result?;
                        to += done;
                        left = &left[done as usize..];
                    }
                }
                (Way::Copy | Way::Write, _) => {
                    ckpt_sys::memory::write(Pid::from_raw(self.pid), at, part)?;
                }
            }
            at = next;
        }
        Ok(())
    }
}

/// Where a run goes.
enum Target<'a> {
    Memory(&'a Space),
    /// A file or shared object of this many bytes.
    File(&'a std::fs::File, u64),
}

/// Fills everything; or leaves anonymous memory to the page server, which runs when this returns, if that was asked for and can be.
///
/// # Errors
/// Damage in the image, or memory that can't be written.
pub fn fill(build: &mut Build<'_>) -> Result<(), RestoreError> {
    let mut records = Vec::new();
    if !ckpt_sys::hook::skipped(Kind::MemoryMap.name()) {
        for r in build.image.of_kind(Kind::MemoryMap) {
            let m: MemoryMapRecord = decode(r, crate::resource::memory_map::VERSION)?;
            records.push((r.owner as i32, m));
        }
    }
    let mut prepared = None;
    if build.request.keeper.is_some() {
        match page_server::prepare(build, &records)? {
            Ok(p) => prepared = Some(p),
            Err(why) => build.eager_because = Some(why),
        }
    }
    let huge_pages = HugePages::of_host();
    let is_copy = build.request.options.told.is_copy();
    let wiped = |v: &&VmaRecord| is_copy && is_wiped_in_copies(v);
    let mut spaces = Vec::new();
    for (pid, m) in &records {
        let extents = stored(build.image.reader.runs(m.object));
        let mut space = Space { pid: *pid, userfault: None, stretches: Vec::new() };
        if let Some(prepared) = &prepared {
            let left = prepared.left(*pid);
            space.stretches = left.into_iter().map(|(start, end)| (start, end, Way::Leave)).collect();
            space.stretches.extend(m.vmas.iter().filter(wiped).map(|v| (v.start, v.end, Way::Never)));
            space.stretches.sort_unstable_by_key(|(start, ..)| *start);
        } else if !extents.is_empty() {
            // Without it everything is written.
            space.userfault = userfault_of(build, *pid, userfault::USER_MODE_ONLY, 0)?.ok();
        }
        if prepared.is_none() {
            for v in m.vmas.iter().filter(|v| is_private_anonymous(v)) {
                if wiped(&v) {
                    space.stretches.push((v.start, v.end, Way::Never));
                    continue;
                }
                let Some(u) = &space.userfault else { continue };
                for (start, end) in small_pages((v.start, v.end), &extents, huge_pages.used_for(v)) {
                    // What can't be registered is written.
                    if u.register(start, end - start).is_ok() {
                        space.stretches.push((start, end, Way::Copy));
                    }
                }
            }
        }
        spaces.push((space, m.object));
    }
    let mut objects = Vec::new();
    if !ckpt_sys::hook::skipped(Kind::SharedObject.name()) {
        for (object, (pid, fd)) in &build.objects {
            let path = format!("/proc/{pid}/fd/{fd}");
            let err = || RestoreError::io(*pid, format!("filling shared object {object}"));
            let file = std::fs::File::options().write(true).open(path).map_err(err())?;
            let bytes = file.metadata().map_err(err())?.len();
            objects.push((*object, file, bytes));
        }
    }
    let reader = &build.image.reader;
    let mut items = Vec::new();
    for (space, object) in &spaces {
        let runs = reader.runs(*object).iter().filter(|run| !space.leaves_all_of(run));
        items.extend(runs.map(|run| (run, Target::Memory(space))));
    }
    for (object, file, bytes) in &objects {
        items.extend(reader.runs(*object).iter().map(|run| (run, Target::File(file, *bytes))));
    }
    in_parallel(reader, &items)?;
    drop(spaces);
    if let (Some(prepared), Some(keeper)) = (prepared, &build.request.keeper) {
        let keeper = keeper.try_clone().map_err(RestoreError::io(1, "the keeper's socket"))?;
        build.page_server = Some(prepared.start(build, Keeper::new(keeper))?);
    }
    Ok(())
}

/// Writes the runs of an object into a file, not beyond its length.
///
/// # Errors
/// Damage in the image, or a full file system.
pub fn fill_file(
    build: &Build<'_>,
    file: &std::fs::File,
    object: u64,
    bytes: u64,
) -> Result<(), RestoreError> {
    fill_from(build.image, file, object, bytes)
}

/// The same, without anything being built.
///
/// # Errors
/// As [`fill_file`].
pub fn fill_from(
    image: &super::read::Image,
    file: &std::fs::File,
    object: u64,
    bytes: u64,
) -> Result<(), RestoreError> {
    let reader = &image.reader;
    let items: Vec<_> = reader.runs(object).iter().map(|run| (run, Target::File(file, bytes))).collect();
    in_parallel(reader, &items)
}

/// Reads, checks and places runs, in several threads if there are several runs. Their memory is one run each.
fn in_parallel(reader: &Reader, items: &[(&Run, Target<'_>)]) -> Result<(), RestoreError> {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = cpus.min(MOST_THREADS).min(items.len());
    // Neighbours go to one thread: two that write to the same huge page for the first time would both clear one.
    let at_once = (items.len() / (4 * threads.max(1))).clamp(1, NEIGHBOURS);
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        let mut buf = Vec::new();
        while let Some(rest) =
            items.get(next.fetch_add(at_once, Ordering::Relaxed)..).filter(|r| !r.is_empty())
        {
            for (run, target) in rest.iter().take(at_once) {
                ckpt_sys::hook::point();
                if let Err(e) = place(reader, run, target, &mut buf) {
                    next.store(items.len(), Ordering::Relaxed);
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                    return;
                }
            }
        }
    };
    std::thread::scope(|s| {
        for _ in 1..threads {
            // Without more threads this one does it all.
            let _ = std::thread::Builder::new().spawn_scoped(s, work);
        }
        work();
    });
    leave_semaphore_undo_list();
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Leaves the list of semaphore operations to undo that this thread came to share when it made another (CLONE_SYSVSEM): a dump knows
/// by init, which has none, who in the job has none (see `resource::sysv_semaphore`).
pub fn leave_semaphore_undo_list() {
    // It has no way to fail that leaves the list.
    let _ = nix::sched::unshare(nix::sched::CloneFlags::CLONE_SYSVSEM);
}

fn place(reader: &Reader, run: &Run, target: &Target<'_>, buf: &mut Vec<u8>) -> Result<(), RestoreError> {
    reader.read_run(run, buf)?;
    match target {
        Target::Memory(space) => {
            let what = format!("filling {} bytes at {:#x}", buf.len(), run.offset);
            space.place(run.offset, buf).map_err(RestoreError::errno(space.pid, what))
        }
        Target::File(file, bytes) => {
            let n = bytes.saturating_sub(run.offset).min(buf.len() as u64) as usize;
            file.write_all_at(&buf[..n], run.offset)
                .map_err(RestoreError::io(0, format!("writing {n} bytes of shared object {}", run.object)))
        }
    }
}

/// Private memory of no file, which is what userfaultfd fills.
pub fn is_private_anonymous(v: &VmaRecord) -> bool {
    v.backing == Backing::Anonymous && v.flags & libc::MAP_SHARED == 0
}

/// Memory that only one process is to have, as where random generators keep their state: a forked child finds zeros there, and so does a
/// second job that is restored from the same checkpoint.
pub fn is_wiped_in_copies(v: &VmaRecord) -> bool {
    is_private_anonymous(v) && v.advice.contains(&libc::MADV_WIPEONFORK)
}

/// What runs cover together: sorted, neighbours joined.
pub fn stored(runs: &[Run]) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for run in runs {
        let end = run.offset + run.bytes;
        match out.last_mut() {
            Some(last) if last.1 == run.offset => last.1 = end,
            _ => out.push((run.offset, end)),
        }
    }
    out
}

/// Parts of a mapping with stored pages that are to be filled page by page: with `huge`, not the huge pages that are stored wholly.
fn small_pages(mapping: (u64, u64), extents: &[(u64, u64)], huge: bool) -> Vec<(u64, u64)> {
    let first = extents.partition_point(|(_, end)| *end <= mapping.0);
    let within = extents[first..].iter().take_while(|(start, _)| *start < mapping.1);
    let within = within.map(|(start, end)| ((*start).max(mapping.0), (*end).min(mapping.1)));
    // One registration for all that is between two stretches of huge pages.
    let mut out: Vec<(u64, u64)> = Vec::new();
    let mut add = |start: u64, end: u64, joins: bool| match out.last_mut() {
        _ if start >= end => {}
        Some(last) if joins => last.1 = end,
        _ => out.push((start, end)),
    };
    let mut joins = false;
    for (start, end) in within {
        let (from, to) = (start.next_multiple_of(HUGE), end / HUGE * HUGE);
        if huge && from < to {
            add(start, from, joins);
            add(to, end, false);
            joins = to < end;
        } else {
            add(start, end, joins);
            joins = true;
        }
    }
    out
}

/// What the host uses huge pages for (Documentation/admin-guide/mm/transhuge.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HugePages {
    Always,
    /// Where madvise(2) asks for them.
    Advised,
    Never,
}

impl HugePages {
    fn of_host() -> HugePages {
        let setting = |name: &str| {
            let path = format!("/sys/kernel/mm/transparent_hugepage/{name}");
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let chosen = text.split_whitespace().find_map(|w| w.strip_prefix('[')?.strip_suffix(']'));
            chosen.unwrap_or("inherit").to_owned()
        };
        let of_size = setting("hugepages-2048kB/enabled");
        let chosen = if of_size == "inherit" { setting("enabled") } else { of_size };
        match chosen.as_str() {
            "always" => HugePages::Always,
            "madvise" => HugePages::Advised,
            _ => HugePages::Never,
        }
    }

    fn used_for(self, v: &VmaRecord) -> bool {
        match self {
            HugePages::Always => !v.advice.contains(&libc::MADV_NOHUGEPAGE),
            HugePages::Advised => v.advice.contains(&libc::MADV_HUGEPAGE),
            HugePages::Never => false,
        }
    }
}

/// A userfaultfd for the memory of a blank, made there; or why there is none.
///
/// # Errors
/// If the blank could not be driven.
pub fn userfault_of(
    build: &mut Build<'_>,
    pid: i32,
    flags: u64,
    features: u64,
) -> Result<Result<Userfault, Errno>, RestoreError> {
    let task = Pid::from_raw(pid);
    let flags = flags | (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let made = {
        let mut b = build.area.batch();
        b.call("userfaultfd", libc::SYS_userfaultfd, &[flags]);
        let (results, _) = b.run_raw(task).map_err(RestoreError::remote(pid))?;
        results[0]
    };
    if made < 0 {
        return Ok(Err(Errno::from_raw(-made as i32)));
    }
    let fetched = ckpt_sys::task::pidfd_open(task)
        .and_then(|pidfd| ckpt_sys::task::pidfd_getfd(pidfd.as_fd(), made as i32));
    build.call(pid, "close", libc::SYS_close, &[made as u64])?;
    Ok(fetched.and_then(|fd| Userfault::start(fd, features)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    #[test]
    fn whole_huge_pages_are_left_to_writes() {
        let of = |extents: &[(u64, u64)], huge| small_pages((M, 20 * M), extents, huge);
        assert_eq!(of(&[], true), []);
        assert_eq!(of(&[(3 * M, 5 * M), (9 * M, 9 * M + 4096)], false), [(3 * M, 9 * M + 4096)]);
        // No block of 2 MiB is stored wholly.
        assert_eq!(of(&[(3 * M, 5 * M)], true), [(3 * M, 5 * M)]);
        // 4-8 are; what is before and after them is registered apart, and together with what follows.
        assert_eq!(of(&[(3 * M, 9 * M), (10 * M, 11 * M)], true), [(3 * M, 4 * M), (8 * M, 11 * M)]);
        // Pages outside the mapping are another's.
        assert_eq!(of(&[(0, 30 * M)], true), [(M, 2 * M)]);
        assert_eq!(of(&[(0, 30 * M)], false), [(M, 20 * M)]);
        // Nothing but huge pages in the middle: two stretches.
        assert_eq!(of(&[(M, 4 * M), (6 * M, 8 * M), (9 * M, 10 * M)], true), [(M, 2 * M), (9 * M, 10 * M)]);
    }

    #[test]
    fn ways_cover_everything() {
        let stretches = vec![(10, 20, Way::Copy), (20, 30, Way::Leave), (40, 50, Way::Copy)];
        let s = Space { pid: 0, userfault: None, stretches };
        let mut seen = Vec::new();
        let mut at = 5;
        while at < 60 {
            let (next, way) = s.way(at, 60);
            seen.push((next, way));
            at = next;
        }
        use Way::*;
        let expected = [(10, Write), (20, Copy), (30, Leave), (40, Write), (50, Copy), (60, Write)];
        assert_eq!(seen, expected);
        assert_eq!(s.way(12, 15), (15, Copy));
    }
}
