// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the interceptor records because the kernel does not tell it: the paths by which inotify watches were added, and
//! how many requests were submitted to AIO contexts.
//!
//! # Format
//! [`crate::interceptor::Control::watches`] holds, as eight-byte words: address and length in bytes of the table of
//! paths, [`LAYOUT`], address and length in bytes of the table of contexts. Zero stands for none. The tables are in the
//! private memory of the process, so fork copies them and execve empties them.
//!
//! Table of paths: [`PATH_SLOTS`] slots of [`PATH_SLOT_BYTES`]: sequence number u32 (0: never used, odd: being written),
//! length in bytes u32, path. A path is absolute, as the process saw it when it added the watch. Which watch it belongs to
//! is not recorded: whoever reads it looks what is there now.
//!
//! Table of contexts: [`AIO_SLOTS`] slots of [`AIO_SLOT_BYTES`]: the context's address u64 (0: free), number of requests
//! that the kernel has accepted since io_setup(2) u64, calls of io_submit(2) under way u64, pid of the process that has made
//! it, as it sees itself, u64. A child has the slots of its parent, whose contexts are not its own.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// The layout described here.
pub const LAYOUT: u64 = 1;

/// Slots in the table of paths.
pub const PATH_SLOTS: usize = 4096;

/// Bytes of a slot in the table of paths.
pub const PATH_SLOT_BYTES: usize = 512;

/// Longest path that is recorded, in bytes.
pub const PATH_BYTES: usize = PATH_SLOT_BYTES - 8;

/// Slots in the table of contexts.
pub const AIO_SLOTS: usize = 64;

/// Bytes of a slot in the table of contexts.
pub const AIO_SLOT_BYTES: usize = 32;

/// A slot in the table of paths.
#[repr(C)]
#[derive(Debug)]
pub struct PathSlot {
    /// 0: never used; odd: being written.
    pub sequence: AtomicU32,
    /// Bytes of the path.
    pub length: AtomicU32,
    /// The path, eight bytes to a word.
    pub words: [AtomicU64; PATH_BYTES / 8],
}

/// A slot in the table of contexts.
#[repr(C)]
#[derive(Debug)]
pub struct AioSlot {
    /// The context, which is the address of its ring; 0: free.
    pub context: AtomicU64,
    /// Requests accepted.
    pub submitted: AtomicU64,
    /// Calls of io_submit(2) under way, which may not have counted theirs yet.
    pub busy: AtomicU64,
    /// Whose it is.
    pub pid: AtomicU64,
}

/// What a slot in the table of contexts says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AioCount {
    /// The context, which is the address of its ring.
    pub context: u64,
    /// Requests accepted.
    pub submitted: u64,
    /// Calls of io_submit(2) under way.
    pub busy: u64,
    /// Whose it is.
    pub pid: u64,
}

/// The paths in the bytes of a table. They come from an untrusted process; what makes no sense is left out.
pub fn paths(table: &[u8]) -> impl Iterator<Item = &[u8]> {
    table.chunks_exact(PATH_SLOT_BYTES).filter_map(|slot| {
        let sequence = u32::from_le_bytes(*slot.first_chunk()?);
        let length = u32::from_le_bytes(*slot.get(4..)?.first_chunk()?) as usize;
        let path = slot.get(8..8usize.checked_add(length)?)?;
        (sequence != 0 && sequence & 1 == 0 && path.first() == Some(&b'/') && !path.contains(&0))
            .then_some(path)
    })
}

/// The contexts in the bytes of a table, which come from an untrusted process.
pub fn contexts(table: &[u8]) -> impl Iterator<Item = AioCount> {
    table.chunks_exact(AIO_SLOT_BYTES).filter_map(|slot| {
        let word = |i: usize| Some(u64::from_le_bytes(*slot.get(8 * i..)?.first_chunk()?));
        let count = AioCount { context: word(0)?, submitted: word(1)?, busy: word(2)?, pid: word(3)? };
        (count.context != 0).then_some(count)
    })
}

// The layout is an ABI.
const _: () = {
    assert!(size_of::<PathSlot>() == PATH_SLOT_BYTES);
    assert!(core::mem::offset_of!(PathSlot, words) == 8);
    assert!(size_of::<AioSlot>() == AIO_SLOT_BYTES);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_makes_sense_is_a_path() {
        let mut table = [0u8; 5 * PATH_SLOT_BYTES];
        let slots = [(2u32, 2u32, b"/a"), (1, 2, b"/b"), (4, 9999, b"/c"), (6, 2, b"d/"), (8, 2, b"/e")];
        for (slot, (sequence, length, path)) in table.chunks_exact_mut(PATH_SLOT_BYTES).zip(slots) {
            slot[..4].copy_from_slice(&sequence.to_le_bytes());
            slot[4..8].copy_from_slice(&length.to_le_bytes());
            slot[8..10].copy_from_slice(path);
        }
        assert!(paths(&table).eq([&b"/a"[..], b"/e"]));
        assert_eq!(paths(&table[..PATH_SLOT_BYTES - 1]).count(), 0);
    }

    #[test]
    fn slots_that_are_free_are_no_contexts() {
        let mut table = [0u8; 2 * AIO_SLOT_BYTES];
        for (i, value) in [7u8, 5, 1, 9].into_iter().enumerate() {
            table[AIO_SLOT_BYTES + 8 * i] = value;
        }
        let found = AioCount { context: 7, submitted: 5, busy: 1, pid: 9 };
        assert!(contexts(&table).eq([found]));
    }
}
