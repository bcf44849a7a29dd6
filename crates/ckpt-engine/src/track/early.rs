// SPDX-License-Identifier: MIT OR Apache-2.0
//! Written pages are copied while the job runs, and in the freeze only those that were written once more.
//!
//! 1. They are protected again, while the job runs.
//! 2. All tasks are stopped once, for as long as that takes. The kernel fills pages that a call has pinned (direct I/O) without looking at
//!    their protection; no call that had pinned one before it was protected is still under way after that.
//! 3. They are copied, while the job runs. One that is still protected in the freeze is what it was then.

use super::Tracking;
use super::held::{LIMIT_BYTES, Place, Room};
use super::second::Second;
use super::watch::{Stretch, pagemap_of};
use crate::dump::freeze;
use crate::dump::phases::Phases;
use crate::error::DumpError;
use crate::model::Job;
use crate::model::memory::Vma;
use crate::model::process::{Process, ProcessId};
use crate::resource::aio;
use ckpt_sys::pagemap::{self, Region, ZERO};
use ckpt_sys::task;
use std::collections::BTreeMap;
use std::fs::File;

/// Less takes no longer to be copied in the freeze than a stop takes.
const WORTH_A_STOP_BYTES: u64 = 2 << 20;

/// What was copied.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// Of each process all that was protected, by address.
    protected: BTreeMap<ProcessId, Vec<Protected>>,
}

/// A stretch that was written, and has been protected since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Protected {
    addr: u64,
    bytes: u64,
    known: Known,
}

/// What is known of memory that has not been written since it was protected last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// It is what it was in the parent.
    Same,
    /// It has been copied.
    Copied(Place),
    /// It is zero, and need not have been in the parent.
    Zero,
    /// It may have been written after the parent, and has not been copied.
    Written,
}

/// Pages that have been written since the last checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// These.
    Written(Region),
    /// Which ones can't be told: address, bytes.
    Unknown(u64, u64),
}

/// Looks through a mapping as it was when the job was looked at; with `protect` what is written is protected in the same step.
fn look(pagemap: &File, start: u64, end: u64, protect: bool, sink: &mut dyn FnMut(Found)) {
    match pagemap::scan_writes(pagemap, start, end, protect) {
        Ok(found) => found.into_iter().map(Found::Written).for_each(sink),
        // Another mapping is there, or somewhere in it. What comes before that has been protected, and is not told.
        Err(_) => sink(Found::Unknown(start, end - start)),
    }
}

/// Tells what has been written, by process, in order. Mappings of files are left out: of their pages it is not known so easily.
fn written(tracking: &Tracking, job: &Job, protect: bool, sink: &mut dyn FnMut(&Process, Found)) {
    for w in tracking.processes.iter().filter(|w| w.object.is_some() && w.watch.marks_mappings()) {
        let Some(p) = job.live().find(|p| ProcessId::of(p) == w.id) else { continue };
        let Ok(pagemap) = pagemap_of(p.host) else { continue };
        for v in p.vmas.iter().filter(|v| v.has("uw") && !v.is_file()) {
            ckpt_sys::hook::point();
            look(&pagemap, v.start, v.end, protect, &mut |found| sink(p, found));
        }
    }
}

/// Copies what has been written, if it is not too little or too much. `room` is ready for what the freeze will have to copy.
///
/// # Errors
/// If it has been interrupted, or a task does not stop; the job runs on.
pub(super) fn copy(tracking: &Tracking, job: &Job, room: &mut Room) -> Result<Early, DumpError> {
    let mut out = Early::default();
    let mut bytes = 0;
    written(tracking, job, false, &mut |_, found| match found {
        Found::Written(r) if !r.is(ZERO) => bytes += r.end - r.start,
        _ => {}
    });
    if (WORTH_A_STOP_BYTES..=LIMIT_BYTES).contains(&bytes) {
        room.touch(bytes);
        written(tracking, job, true, &mut |p, found| out.add(p, found, room));
        DumpError::if_interrupted()?;
        if stop(job)? {
            let filled = room.fill(&Second::default());
            out.keep_only(|place| filled.has(place));
        } else {
            *room = Room::default();
            out.keep_only(|_| false);
        }
    }
    // Some more is written until the job stands still; of what has been copied, little once more.
    let later = if room.used_bytes() > 0 { bytes / 4 } else { 2 * bytes };
    room.touch((later + (1 << 20)).min(LIMIT_BYTES.saturating_sub(room.used_bytes())));
    Ok(out)
}

/// Stops all tasks and lets them go again. False if something may still write to pages without a look at their protection.
///
/// # Errors
/// If a task does not stop. What holds it up would hold up the freeze as well, and it may still stop later: the dump must not go on.
fn stop(job: &Job) -> Result<bool, DumpError> {
    let frozen = match freeze::freeze(job, true, &mut Phases::default()) {
        Ok(frozen) => frozen,
        // All stood still, and run again.
        Err(DumpError::Refused(_)) => return Ok(false),
        Err(error) => return Err(error),
    };
    let asynchronous = |v: &Vma| v.name == aio::RING_NAME || v.name.contains("[io_uring]");
    let safe = !frozen.job.live().any(|p| p.vmas.iter().any(asynchronous));
    let resumed = frozen.resume().is_ok();
    task::make_way();
    Ok(safe && resumed)
}

impl Early {
    fn add(&mut self, p: &Process, found: Found, room: &mut Room) {
        let list = self.protected.entry(ProcessId::of(p)).or_default();
        let (addr, bytes, known) = match found {
            Found::Written(r) if r.is(ZERO) => (r.start, r.end - r.start, Known::Zero),
            Found::Written(r) if room.used_bytes() + (r.end - r.start) <= LIMIT_BYTES => {
                return room.place(p.host, p.pid, r.start, r.end - r.start, |addr, place| {
                    list.push(Protected { addr, bytes: place.bytes as u64, known: Known::Copied(place) });
                });
            }
            Found::Written(r) => (r.start, r.end - r.start, Known::Written),
            Found::Unknown(addr, bytes) => (addr, bytes, Known::Written),
        };
        list.push(Protected { addr, bytes, known });
    }

    fn keep_only(&mut self, copied: impl Fn(Place) -> bool) {
        for p in self.protected.values_mut().flatten() {
            if matches!(p.known, Known::Copied(place) if !copied(place)) {
                p.known = Known::Written;
            }
        }
    }
}

/// What is known of an unwritten stretch of a process, in parts: address, bytes.
pub(super) fn parts(early: Option<&Early>, id: Option<ProcessId>, s: &Stretch) -> Vec<(u64, u64, Known)> {
    let all = early.zip(id).and_then(|(early, id)| early.protected.get(&id)).map_or(&[][..], Vec::as_slice);
    let (mut out, mut at, end) = (Vec::new(), s.addr, s.addr + s.bytes);
    for p in &all[all.partition_point(|p| p.addr + p.bytes <= at)..] {
        let (from, to) = (p.addr.max(at), (p.addr + p.bytes).min(end));
        if from >= to {
            break;
        }
        if at < from {
            out.push((at, from - at, Known::Same));
        }
        let known = match p.known {
            Known::Copied(place) => Known::Copied(place.part(from - p.addr, to - from)),
            other => other,
        };
        out.push((from, to - from, known));
        at = to;
    }
    if at < end {
        out.push((at, end - at, Known::Same));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_sys::Pid;
    use ckpt_sys::memory::PAGE;

    #[test]
    fn unwritten_memory_is_parted_by_what_was_protected_last() {
        let id = ProcessId { pid: 2, started: 1 };
        let mut room = Room::default();
        let mut copied = Vec::new();
        room.place(Pid::this(), 2, 0, 3 * PAGE, |_, place| copied.push(place));
        let page = |n: u64, pages: u64, known| Protected { addr: n * PAGE, bytes: pages * PAGE, known };
        let list =
            vec![page(2, 3, Known::Copied(copied[0])), page(5, 1, Known::Written), page(9, 1, Known::Zero)];
        let early = Early { protected: BTreeMap::from([(id, list)]) };
        let parts_of = |n: u64, pages: u64| {
            let s = Stretch { addr: n * PAGE, bytes: pages * PAGE, unwritten: true, doubtful: false };
            let by_page = |(addr, bytes, known)| (addr / PAGE, bytes / PAGE, known);
            parts(Some(&early), Some(id), &s).into_iter().map(by_page).collect::<Vec<_>>()
        };
        let part = |skipped: u64, pages: u64| Known::Copied(copied[0].part(skipped * PAGE, pages * PAGE));
        assert_eq!(parts_of(0, 2), [(0, 2, Known::Same)]);
        assert_eq!(parts_of(3, 1), [(3, 1, part(1, 1))]);
        assert_eq!(
            parts_of(1, 9),
            [
                (1, 1, Known::Same),
                (2, 3, part(0, 3)),
                (5, 1, Known::Written),
                (6, 3, Known::Same),
                (9, 1, Known::Zero)
            ]
        );
        assert_eq!(parts_of(4, 3), [(4, 1, part(2, 1)), (5, 1, Known::Written), (6, 1, Known::Same)]);
        assert_eq!(parts_of(10, 5), [(10, 5, Known::Same)]);
        let s = Stretch { addr: 2 * PAGE, bytes: PAGE, unwritten: true, doubtful: false };
        assert_eq!(parts(Some(&early), None, &s), [(2 * PAGE, PAGE, Known::Same)]);
    }
}
