// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pages that exist in a process that stands still: which ones (PAGEMAP_SCAN, or /proc/pid/pagemap before Linux
//! 6.7), and their content.

use super::{Pages, Range, Sink, unread};
use crate::error::DumpError;
use crate::model::memory::{self, pagemap};
use ckpt_image::Origin;
use ckpt_sys::memory::{Forced, PAGE};
use ckpt_sys::pagemap::{FILE, PRESENT, Region, SWAPPED, ZERO, scan};
use ckpt_sys::{Errno, Pid};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::sync::Arc;

/// Address space that is looked at in one go where each page must be: 1 MiB of pagemap.
const LOOK_BYTES: u64 = 512 << 20;
/// Stretches that a scan gives in one go.
const REGIONS: usize = 4096;

/// The memory of a process.
#[derive(Debug)]
struct Memory {
    pid: i32,
    memory: Forced,
}

impl Origin for Memory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        // By /proc/pid/mem, which reaches pages that the process itself may not read. process_vm_readv(2) pins what it reads,
        // for which the kernel makes a private copy of every page that is shared by fork.
        let read = self.memory.read(addr, buf);
        let what = || format!("reading {} bytes of memory at {addr:#x}", buf.len());
        read.map_err(|source| DumpError::Process { pid: self.pid, what: what(), source }.into())
    }
}

/// Reads the memory of one process.
#[derive(Debug)]
pub struct Reader {
    pid: i32,
    memory: Arc<dyn Origin>,
    pagemap: File,
    /// Where there is no PAGEMAP_SCAN: the mappings that have private pages, end by start.
    inhabited: Option<BTreeMap<u64, u64>>,
}

impl Reader {
    /// For the process `host`, called `pid` in messages.
    ///
    /// # Errors
    /// As opening its files in /proc.
    pub fn open(host: Pid, pid: i32) -> Result<Reader, DumpError> {
        let memory = Forced::open(host).map_err(DumpError::process(pid, "opening its memory"))?;
        let pagemap = File::open(format!("/proc/{host}/pagemap"))
            .map_err(DumpError::process(pid, "opening pagemap"))?;
        let inhabited = match scan(&pagemap, 0, 0, PRESENT, 0, &mut [Region::default()]) {
            Err(Errno::ENOTTY) => {
                let vmas = memory::read_smaps(host.as_raw());
                let vmas = vmas.map_err(DumpError::process(pid, "reading smaps"))?;
                let private = vmas.iter().filter(|v| v.anonymous_bytes + v.swap_bytes > 0);
                Some(private.map(|v| (v.start, v.end)).collect())
            }
            _ => None,
        };
        Ok(Reader { pid, memory: Arc::new(Memory { pid, memory }), pagemap, inhabited })
    }

    /// Stretches with private pages from `start` on, as (address, bytes), and where the look ended, at `end` at most.
    fn private(&self, start: u64, end: u64) -> Result<(Vec<(u64, u64)>, u64), DumpError> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        if self.inhabited.is_some() {
            let end = end.min(start + LOOK_BYTES);
            let pages = pagemap(&self.pagemap, start, end)
                .map_err(DumpError::process(self.pid, "reading pagemap"))?;
            for (i, _) in pages.iter().enumerate().filter(|(_, e)| e.exists() && !e.is_file()) {
                join(&mut out, start + i as u64 * PAGE, PAGE);
            }
            return Ok((out, end));
        }
        let mut regions = [Region::default(); REGIONS];
        let (n, seen) = scan(&self.pagemap, start, end, PRESENT | SWAPPED, FILE | ZERO, &mut regions)
            .map_err(DumpError::errno(self.pid, "PAGEMAP_SCAN"))?;
        regions[..n].iter().for_each(|r| join(&mut out, r.start, r.end - r.start));
        Ok((out, seen))
    }

    /// Gives the pages of a range that are to be saved, in pieces of at most `piece` bytes.
    ///
    /// # Errors
    /// If a page can't be read, and those of the sink.
    pub fn read_range(&self, r: &Range, piece: usize, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        let end = r.addr + r.bytes;
        // A range may be a part of its mapping.
        let lies_in =
            |i: &BTreeMap<u64, u64>| i.range(..=r.addr).next_back().is_some_and(|(_, end)| r.addr < *end);
        if r.pages == Pages::Private && self.inhabited.as_ref().is_some_and(|i| !lies_in(i)) {
            return Ok(());
        }
        let mut at = r.addr;
        while at < end {
            let (stretches, seen) = match r.pages {
                Pages::All => (vec![(r.addr, r.bytes)], end),
                Pages::Private => self.private(at, end)?,
            };
            for (addr, bytes) in stretches {
                unread(&self.memory, (r.offset + (addr - r.addr), addr, bytes), piece, sink)?;
            }
            at = seen;
        }
        Ok(())
    }
}

/// Adds a stretch behind the others.
fn join(out: &mut Vec<(u64, u64)>, addr: u64, bytes: u64) {
    match out.last_mut() {
        Some((at, all)) if *at + *all == addr => *all += bytes,
        _ => out.push((addr, bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Piece;
    use super::*;

    #[test]
    fn a_part_of_a_mapping_is_read_without_pagemap_scan() {
        let memory = vec![7u8; 4 * PAGE as usize];
        let addr = (memory.as_ptr() as u64).next_multiple_of(PAGE) + PAGE;
        let mut reader = Reader::open(Pid::this(), 1).unwrap();
        reader.inhabited = Some(BTreeMap::from([(addr - PAGE, addr + PAGE)]));
        let range = |addr| Range { addr, bytes: PAGE, offset: 0, pages: Pages::Private, lost_in_fork: None };
        let read = |addr| {
            let mut bytes = 0;
            let count = &mut |piece: Piece<'_>| {
                bytes += if let Piece::Unread(unread) = piece { unread.bytes } else { 0 };
                Ok(())
            };
            reader.read_range(&range(addr), PAGE as usize, count).unwrap();
            bytes
        };
        assert_eq!(read(addr), PAGE as usize);
        assert_eq!(read(addr + PAGE), 0, "in no mapping with private pages");
    }
}
