// SPDX-License-Identifier: MIT OR Apache-2.0
//! Records the paths of inotify watches, which the kernel forgets: it knows inodes.
//!
//! A table in private memory, announced by the control word (`ckpt_abi::recorded`), takes each path once. Writers claim a
//! slot by making its sequence number odd, and never wait: threads, signal handlers and a fork at any moment find at worst a slot that
//! is never used again. A full table forgets an old path for a new one.

use crate::{ckpt_control, kernel, real};
use ckpt_abi::recorded::{LAYOUT, PATH_BYTES, PATH_SLOTS, PathSlot};
use core::ffi::{CStr, c_char, c_int};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// How far from its place a path is looked for.
const REACH: usize = 16;

static PATHS: [PathSlot; PATH_SLOTS] = [const {
    PathSlot {
        sequence: AtomicU32::new(0),
        length: AtomicU32::new(0),
        words: [const { AtomicU64::new(0) }; PATH_BYTES / 8],
    }
}; PATH_SLOTS];

/// Tells the dumper where the table is.
pub fn announce() {
    let [address, length, layout, ..] = &ckpt_control.watches;
    length.store(size_of_val(&PATHS) as u64, Ordering::Relaxed);
    layout.store(LAYOUT, Ordering::Relaxed);
    address.store(PATHS.as_ptr() as u64, Ordering::Release);
}

/// Eight bytes of a path, with zeros behind it.
fn word(path: &[u8], index: usize) -> u64 {
    let byte = |i: usize| u64::from(path.get(index * 8 + i).copied().unwrap_or(0));
    (0..8).fold(0, |word, i| word | byte(i) << (8 * i))
}

fn holds(slot: &PathSlot, path: &[u8]) -> bool {
    let sequence = slot.sequence.load(Ordering::Acquire);
    let same = sequence & 1 == 0
        && slot.length.load(Ordering::Relaxed) as usize == path.len()
        && (0..path.len().div_ceil(8)).all(|i| slot.words[i].load(Ordering::Relaxed) == word(path, i));
    fence(Ordering::Acquire);
    same && sequence != 0 && slot.sequence.load(Ordering::Relaxed) == sequence
}

/// Writes a path into a slot whose sequence number is `sequence`; false if somebody else was first.
fn store(slot: &PathSlot, sequence: u32, path: &[u8]) -> bool {
    let claimed = sequence.wrapping_add(1);
    let free = sequence & 1 == 0;
    if !free
        || slot.sequence.compare_exchange(sequence, claimed, Ordering::Acquire, Ordering::Relaxed).is_err()
    {
        return false;
    }
    fence(Ordering::Release);
    slot.length.store(path.len() as u32, Ordering::Relaxed);
    for i in 0..path.len().div_ceil(8) {
        slot.words[i].store(word(path, i), Ordering::Relaxed);
    }
    // 0 means that it was never used.
    let done = if claimed == u32::MAX { 2 } else { claimed + 1 };
    slot.sequence.store(done, Ordering::Release);
    true
}

fn record(path: &[u8]) {
    let hash =
        path.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    let slot = |i: usize| &PATHS[(hash as usize).wrapping_add(i) % PATH_SLOTS];
    if (0..REACH).any(|i| holds(slot(i), path)) {
        return;
    }
    let unused = |i: usize| slot(i).sequence.load(Ordering::Relaxed) == 0;
    let stored = (0..REACH).any(|i| unused(i) && store(slot(i), 0, path));
    // All taken: the first that nobody is writing to.
    let _ = stored || (0..REACH).any(|i| store(slot(i), slot(i).sequence.load(Ordering::Relaxed), path));
}

/// Records the path of a watch that has been added. One that is too long is left to the dumper to find.
fn record_as_absolute(path: &CStr) {
    let path = path.to_bytes();
    let mut buffer = [0u8; PATH_BYTES];
    let mut used = 0;
    if path.first() != Some(&b'/') {
        let arguments = [buffer.as_mut_ptr() as u64, PATH_BYTES as u64, 0, 0, 0, 0];
        // SAFETY: getcwd(2) fills at most as many bytes as it is told there are.
        let length = unsafe { kernel::call(libc::SYS_getcwd, arguments) };
        // With its NUL; "(unreachable)" if there is no path to it.
        if length < 2 || buffer[0] != b'/' {
            return;
        }
        used = length as usize - 1;
        if used > 1 {
            let Some(slash) = buffer.get_mut(used) else { return };
            *slash = b'/';
            used += 1;
        }
    }
    if let Some(room) = buffer.get_mut(used..used + path.len()) {
        // Not by memcpy: linked today, it would ask for libc 2.14.
        room.iter_mut().zip(path).for_each(|(to, from)| *to = core::hint::black_box(*from));
        record(&buffer[..used + path.len()]);
    }
}

/// Interposes `inotify_add_watch(2)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn inotify_add_watch(fd: c_int, path: *const c_char, mask: u32) -> c_int {
    let arguments = [fd as u64, path as u64, u64::from(mask), 0, 0, 0];
    let watch = match real::inotify_add_watch() {
        // SAFETY: the caller's.
        Some(next) => unsafe { next(fd, path, mask) },
        // SAFETY: the kernel checks the arguments.
        None => kernel::with_errno(unsafe { kernel::call(libc::SYS_inotify_add_watch, arguments) }) as c_int,
    };
    if watch >= 0 {
        // SAFETY: the kernel has read a path there just now.
        record_as_absolute(unsafe { CStr::from_ptr(path) });
    }
    watch
}
