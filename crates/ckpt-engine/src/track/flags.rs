// SPDX-License-Identifier: MIT OR Apache-2.0
//! Flags of mappings, read in the freeze without looking at every page (docs/adr/0009-flags-of-mappings.md).
//!
//! For each mapping /proc/pid/smaps counts all pages, 13 ms/GiB, also where only the flags are wanted. Two facts help. A file of /proc that
//! was read up to some mapping goes on behind it when it is read later, and then shows what is there at that moment. And while a
//! part of a watched mapping is not watched, the kernel has three mappings in its place, the first as small as one likes, with the same flags.
//!
//! So before the job is stopped one descriptor is read up to each large mapping. In the freeze those mappings are parted; the first part of
//! each is read, and then the descriptor that goes on behind it.

use super::watch::{Watch, pagemap_of};
use crate::model::memory::{Vma, parse_smaps};
use crate::model::process::Process;
use std::fs::File;
use std::io::{ErrorKind, Read, Result};

/// Mappings with less memory are read whole.
const LARGE_BYTES: u64 = 16 << 20;
/// Large mappings that are spared, for to prepare each means to read all that is before it.
const MOST: usize = 8;
/// Boundaries of parts are multiples of this, so that no huge page is split.
const ALIGNMENT: u64 = 2 << 20;
/// Read at a time: less than what smaps tells of a mapping (600 bytes and more), so that the kernel never prepares more than one ahead.
const STEP_BYTES: usize = 256;
/// Begins the last line about a mapping.
const LAST_LINE: &[u8] = b"\nVmFlags:";

/// A mapping that is not to be read whole: bounds, and where its first two parts end.
#[derive(Debug)]
struct Large {
    start: u64,
    end: u64,
    first_end: u64,
    second_end: u64,
}

/// The smaps of a process, opened once for each stretch between large mappings.
#[derive(Debug)]
pub(super) struct Flags {
    large: Vec<Large>,
    stretches: Vec<Stretch>,
}

#[derive(Debug)]
struct Stretch {
    smaps: File,
    /// The rest of what is told of a mapping comes first.
    has_rest: bool,
}

impl Flags {
    /// Reads up to the large mappings of a running process. `None` if it has none.
    ///
    /// # Errors
    /// If it can't be read, or changes meanwhile.
    pub(super) fn prepare(p: &Process) -> Result<Option<Flags>> {
        let mut large: Vec<(usize, &Vma)> = (p.vmas.iter().enumerate())
            .filter(|(_, v)| v.has("uw") && !v.is_file() && v.anonymous_bytes >= LARGE_BYTES)
            .collect();
        large.sort_by_key(|(_, v)| std::cmp::Reverse(v.anonymous_bytes));
        large.truncate(MOST);
        large.sort_by_key(|(i, _)| *i);
        if large.is_empty() {
            return Ok(None);
        }
        let mut stretches = Vec::with_capacity(large.len() + 1);
        // The first begins with the first mapping, each other one behind a large one.
        for before in std::iter::once(None).chain(large.iter().map(|(_, v)| Some(*v))) {
            let mut smaps = File::open(format!("/proc/{}/smaps", p.host))?;
            if let Some(v) = before {
                read_into(&mut smaps, v.start)?;
            }
            stretches.push(Stretch { smaps, has_rest: before.is_some() });
        }
        let parts = |(_, v): (usize, &Vma)| {
            let first_end = (v.start / ALIGNMENT + 1) * ALIGNMENT;
            Large { start: v.start, end: v.end, first_end, second_end: first_end + ALIGNMENT }
        };
        Ok(Some(Flags { large: large.into_iter().map(parts).collect(), stretches }))
    }

    /// All mappings of the process, which stands still and whose written pages have been looked for, with their flags. How much memory is
    /// in a large one is not told.
    ///
    /// # Errors
    /// If it can't be read, or is not what it was.
    pub(super) fn read(mut self, p: &Process, watch: &Watch) -> Result<Vec<Vma>> {
        let is_there = |l: &Large| {
            l.second_end < l.end && p.vmas.iter().any(|v| (v.start, v.end) == (l.start, l.end) && v.has("uw"))
        };
        if !self.large.iter().all(is_there) {
            return Err(changed());
        }
        let pagemap = pagemap_of(p.host)?;
        let text = self.part_and_read(0, &pagemap, watch)?;
        let mut vmas = parse_smaps(text.as_slice())?;
        for l in &self.large {
            // One that was not seen in its first part is not what it should be.
            let part = vmas.iter_mut().find(|v| (v.start, v.end) == (l.start, l.first_end));
            part.ok_or_else(changed)?.end = l.end;
        }
        let same = vmas.len() == p.vmas.len() && vmas.iter().zip(&p.vmas).all(|(v, o)| v.has_line_of(o));
        if same { Ok(vmas) } else { Err(changed()) }
    }

    /// Parts the large mappings from the `n`-th on, and reads all stretches.
    fn part_and_read(&mut self, n: usize, pagemap: &File, watch: &Watch) -> Result<Vec<u8>> {
        let Some(l) = self.large.get(n) else { return self.read_all() };
        let (start, end) = (l.first_end, l.second_end);
        watch.apart(pagemap, start, end, || self.part_and_read(n + 1, pagemap, watch))?
    }

    fn read_all(&mut self) -> Result<Vec<u8>> {
        let mut all = Vec::with_capacity(64 << 10);
        for (i, s) in self.stretches.iter_mut().enumerate() {
            let mut text = Vec::new();
            match self.large.get(i) {
                Some(l) => read_through(&mut s.smaps, l.start, s.has_rest, &mut text)?,
                None => {
                    s.smaps.read_to_end(&mut text)?;
                }
            }
            let rest = if s.has_rest { end_of_mapping(&text).ok_or_else(changed)? } else { 0 };
            all.extend_from_slice(&text[rest..]);
        }
        Ok(all)
    }
}

fn changed() -> std::io::Error {
    std::io::Error::new(ErrorKind::InvalidData, "its mappings are not those that were expected")
}

/// Where the first line begins that tells of the mapping at `start`.
fn head_of(text: &[u8], start: u64) -> Option<usize> {
    let head = format!("{start:08x}-");
    let is_head = |at: &usize| text[*at..].starts_with(head.as_bytes());
    let starts = text.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1);
    std::iter::once(0).chain(starts).find(is_head)
}

/// Where what is told of the first mapping ends.
fn end_of_mapping(text: &[u8]) -> Option<usize> {
    // The line may be cut at its start.
    let last = match text.starts_with(&LAST_LINE[1..]) {
        true => 0,
        false => text.windows(LAST_LINE.len()).position(|w| w == LAST_LINE)? + 1,
    };
    Some(last + text[last..].iter().position(|b| *b == b'\n')? + 1)
}

/// Reads the beginning, but not the end, of what is told of the mapping at `start`: the kernel has not prepared the next one yet.
fn read_into(smaps: &mut File, start: u64) -> Result<()> {
    let mut text = Vec::new();
    let mut step = [0; STEP_BYTES];
    loop {
        let n = smaps.read(&mut step)?;
        if n == 0 {
            return Err(changed());
        }
        text.extend_from_slice(&step[..n]);
        if let Some(head) = head_of(&text, start) {
            return if end_of_mapping(&text[head..]).is_none() { Ok(()) } else { Err(changed()) };
        }
        // All lines but the last one have been looked at.
        let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        text.drain(..whole);
    }
}

/// Reads until the mapping at `start` has been told of whole, and little of the next one. `has_rest`: what comes first is of a
/// mapping that was begun before, and may be that one.
fn read_through(smaps: &mut File, start: u64, has_rest: bool, text: &mut Vec<u8>) -> Result<()> {
    let mut step = [0; STEP_BYTES];
    let mut looked = 0;
    loop {
        let n = smaps.read(&mut step)?;
        if n == 0 {
            return Err(changed());
        }
        text.extend_from_slice(&step[..n]);
        if looked == 0 && has_rest {
            let Some(end) = end_of_mapping(text) else { continue };
            looked = end;
        }
        match head_of(&text[looked..], start) {
            Some(head) => {
                looked += head;
                if let Some(end) = end_of_mapping(&text[looked..]) {
                    text.truncate(looked + end);
                    return Ok(());
                }
            }
            None => looked = text.iter().rposition(|b| *b == b'\n').map_or(looked, |i| (i + 1).max(looked)),
        }
    }
}
