// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory for copies of written pages, touched before it is needed, and the copying.

use super::second::Second;
use crate::error::DumpError;
use ckpt_sys::Pid;
use ckpt_sys::memory::{Forced, PAGE};

/// Bytes of written pages that are copied at most. More than this is left to the snapshot engine.
pub(super) const LIMIT_BYTES: u64 = 32 << 20;

/// Bytes that are copied at a time.
const BLOCK_BYTES: usize = 512 << 10;

/// Memory for copies.
#[derive(Debug, Default)]
pub(super) struct Room {
    blocks: Vec<Block>,
    /// The one that is being filled; all before it are full, or closed.
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

/// Where a part of a stretch is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    block: usize,
    at: usize,
    pub(super) bytes: usize,
}

impl Place {
    /// What follows its first `skipped` bytes, `bytes` of it.
    pub(super) fn part(self, skipped: u64, bytes: u64) -> Place {
        Place { at: self.at + skipped as usize, bytes: bytes as usize, ..self }
    }
}

impl Block {
    /// Copies what is to be here.
    fn fill(mut self) -> (Block, Result<(), DumpError>) {
        let mut rest = &mut self.bytes[..];
        for Copying { host, pid, stretches } in std::mem::take(&mut self.from) {
            let (now, later) = rest.split_at_mut(stretches.iter().map(|(_, bytes)| *bytes as usize).sum());
            if let Err(error) = copy(host, pid, &stretches, now) {
                return (self, Err(error));
            }
            rest = later;
        }
        (self, Ok(()))
    }
}

impl Room {
    /// Touches so much memory for what is still to come.
    pub(super) fn touch(&mut self, bytes: u64) {
        let touched = || Block { bytes: vec![1; BLOCK_BYTES], used: 0, from: Vec::new() };
        self.blocks.extend((0..bytes.div_ceil(BLOCK_BYTES as u64)).map(|_| touched()));
    }

    /// Bytes that have a place.
    pub(super) fn used_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.used as u64).sum()
    }

    /// Finds places for `bytes` bytes at `addr`, one behind the other.
    pub(super) fn place(
        &mut self,
        host: Pid,
        pid: i32,
        addr: u64,
        bytes: u64,
        mut sink: impl FnMut(u64, Place),
    ) {
        let mut done = 0;
        while done < bytes {
            if self.blocks.get(self.filling).is_some_and(|b| b.used == BLOCK_BYTES) {
                self.filling += 1;
            }
            if self.filling == self.blocks.len() {
                self.blocks.push(Block { bytes: vec![0; BLOCK_BYTES], used: 0, from: Vec::new() });
            }
            let block = &mut self.blocks[self.filling];
            let most = (bytes - done).min((BLOCK_BYTES - block.used) as u64);
            match block.from.last_mut() {
                Some(last) if last.host == host => last.stretches.push((addr + done, most)),
                _ => block.from.push(Copying { host, pid, stretches: vec![(addr + done, most)] }),
            }
            sink(addr + done, Place { block: self.filling, at: block.used, bytes: most as usize });
            block.used += most as usize;
            done += most;
        }
    }

    /// Copies all that has got a place since the last time. What has come of it tells [`Filled::has`].
    pub(super) fn fill(&mut self, second: &Second) -> Filled {
        let blocks = std::mem::take(&mut self.blocks);
        let (blocks, results) =
            second.all(blocks.into_iter().map(|block| move || block.fill())).into_iter().unzip();
        self.blocks = blocks;
        // What comes next begins a block of its own.
        self.filling = self.blocks.iter().take_while(|b| b.used > 0).count();
        Filled(results)
    }

    /// Gives back what is not used.
    pub(super) fn shrink(&mut self) {
        let used = self.blocks.iter().take_while(|b| b.used > 0).count();
        self.blocks.truncate(used);
    }

    /// What is held there.
    pub(super) fn get(&self, place: Place) -> &[u8] {
        &self.blocks[place.block].bytes[place.at..place.at + place.bytes]
    }
}

/// What has been copied.
pub(super) struct Filled(Vec<Result<(), DumpError>>);

impl Filled {
    /// Whether what has this place was copied.
    pub(super) fn has(&self, place: Place) -> bool {
        self.0.get(place.block).is_some_and(Result::is_ok)
    }

    /// # Errors
    /// The first that there was.
    pub(super) fn all(self) -> Result<(), DumpError> {
        self.0.into_iter().collect()
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

// Offsets and lengths are those of pages throughout.
const _: () = assert!(LIMIT_BYTES.is_multiple_of(PAGE));

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that tell where they are.
    fn memory() -> Vec<u8> {
        (0..3 * BLOCK_BYTES).map(|i| ((i / 7) ^ (i >> 13)) as u8).collect()
    }

    #[test]
    fn what_is_held_is_what_was_there() {
        // In stretches that end anywhere in a block; more than there is room for.
        let memory = memory();
        let base = memory.as_ptr() as u64;
        let stretches = [(0, 5000), (9000, BLOCK_BYTES + 1), (BLOCK_BYTES + 20_000, BLOCK_BYTES), (100, 1)];
        for second in [Second::start(), Second::default()] {
            let mut room = Room::default();
            room.touch(1);
            let mut held = Vec::new();
            // By twos, as before the freeze and in it.
            for two in stretches.chunks(2) {
                for (at, n) in two {
                    room.place(Pid::this(), 1, base + *at as u64, *n as u64, |addr, place| {
                        held.push((addr, place))
                    });
                }
                let filled = room.fill(&second);
                assert!(held.iter().all(|(_, place)| filled.has(*place)));
                filled.all().unwrap();
            }
            let mut next = stretches.iter().flat_map(|(at, n)| *at..at + n);
            for (addr, place) in held {
                let from = (addr - base) as usize;
                assert!(room.get(place) == &memory[from..from + place.bytes]);
                assert!(next.by_ref().take(place.bytes).eq(from..from + place.bytes));
            }
            assert_eq!(next.next(), None);
            assert_eq!(room.used_bytes(), stretches.iter().map(|(_, n)| *n as u64).sum::<u64>());
        }
    }

    #[test]
    fn what_can_not_be_read_is_not_there() {
        let memory = memory();
        let mut room = Room::default();
        let mut held = Vec::new();
        // Nothing is mapped at the start of address space; a block later something is.
        for (addr, bytes) in [(0, BLOCK_BYTES as u64), (memory.as_ptr() as u64, PAGE)] {
            room.place(Pid::this(), 1, addr, bytes, |_, place| held.push(place));
        }
        let filled = room.fill(&Second::default());
        assert_eq!(held.iter().map(|place| filled.has(*place)).collect::<Vec<_>>(), [false, true]);
        assert!(filled.all().is_err());
        assert!(room.get(held[1].part(8, 16)) == &memory[8..24]);
    }
}
