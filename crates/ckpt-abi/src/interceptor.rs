// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interceptor's control word: how a dumper recognises a process that carries the interceptor.
//!
//! # Format
//! `libckpt_interceptor.so` exports one data symbol, [`CONTROL_SYMBOL`], in its ELF dynamic symbol table.
//! It is a [`Control`]: one page of its own, in the library's private writable data, so that each process
//! has its own copy (fork copies it, execve starts afresh). A dumper finds it from outside, in the memory of
//! the process:
//! 1. the dynamic loader's list of objects (`DT_DEBUG` of the program, `struct r_debug` in `link.h`) has an
//!    object called [`LIBRARY_NAME`], with its load address;
//! 2. the symbol's value in the object's `.dynsym`, which is in its memory too, is added to it;
//! 3. the page is read and written through `/proc/PID/mem`.
//!
//! `/proc/PID/maps` names the library too, but not in a restored process, whose library is anonymous memory;
//! and its path may lead to another build by now.
//!
//! All fields are little-endian, the byte order of the only architecture there is.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 4 | version |
//! | 12 | 4 | size |
//! | 16 | 4 | state |
//! | 20 | 4 | flags; none so far |
//! | 24 | 8 | generation |
//! | 32 | 4 | gate: [`GATE_OPEN`] or [`GATE_CLOSED`]; written by the dumper only |
//! | 40 | 8 | when a closed gate counts as open: `CLOCK_MONOTONIC` as the process reads it, nanoseconds |
//! | 64 | 64 | sixteen counters of what is under way, by `IN_FLIGHT_…` |
//! | 128 | 128 | hooks, see [`crate::hooks`] |
//! | 256 | 64 | watches |
//! | 512 | 128 | what a restored process is told of itself, see [`crate::hooks`] |
//! | 640 | 256 | threads in critical sections, see [`crate::hooks`] |
//!
//! What is not listed is reserved and zero.
//!
//! # Limits
//! A reader must check `magic`, then `version`, then `size`, and treat a process where one of them is not
//! what it knows as a process without the interceptor. So are those with version 1, which had no gate, and with
//! version 2, which counted all threads in critical sections. The layout of a version never changes.

use crate::hooks::{COPY_BYTES, COPY_OFFSET, Copy, HOOKS_OFFSET, Hooks, MOST_SECTIONS};
use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, AtomicU64};

/// Name of the exported symbol.
pub const CONTROL_SYMBOL: &str = "ckpt_control";

/// File name of the library.
pub const LIBRARY_NAME: &str = "libckpt_interceptor.so";

/// Variable by which an application keeps the interceptor out of a program it starts: with the value `1`
/// in the environment handed to exec, the library is not added to `LD_PRELOAD`, and taken out if it is
/// there.
pub const OPT_OUT_VARIABLE: &str = "CKPT_NO_INTERCEPTOR";

/// First eight bytes of the control word: `CKPTCTL` and a zero byte, in memory order.
pub const CONTROL_MAGIC: u64 = u64::from_le_bytes(*b"CKPTCTL\0");

/// Version of the layout described here.
pub const CONTROL_VERSION: u32 = 3;

/// Size of the control word in bytes: one page, and aligned to one.
pub const CONTROL_SIZE_BYTES: usize = 4096;

/// `state`: mapped, but the dynamic loader has not yet run the library's constructor.
pub const STATE_LOADING: u32 = 0;

/// `state`: the constructor has run; the exec family is interposed.
pub const STATE_READY: u32 = 1;

/// `gate`: calls go on at once.
pub const GATE_OPEN: u32 = 0;

/// `gate`: the calls that must not be half-way when the process is frozen wait until it is open, or until
/// `gate_deadline_ns` has passed.
pub const GATE_CLOSED: u32 = 1;

/// Number of counters in `in_flight`.
pub const IN_FLIGHT_COUNT: usize = 16;

/// Index in `in_flight`: requests of asynchronous I/O (`io_submit`) that have not completed.
pub const IN_FLIGHT_AIO: usize = 2;

/// Index in `in_flight`: requests of `io_uring` that have not completed.
pub const IN_FLIGHT_IO_URING: usize = 3;

/// Index in `in_flight`: threads in critical sections that have no place in `sections`.
pub const IN_FLIGHT_CRITICAL: usize = 4;

const RESERVED_BYTES: usize = CONTROL_SIZE_BYTES - COPY_OFFSET - COPY_BYTES - 4 * MOST_SECTIONS;

/// The control word, as it lies in the memory of a process that carries the interceptor.
///
/// The fields that change are atomics because the dumper writes them from outside the process.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Control {
    /// [`CONTROL_MAGIC`]; never changes.
    pub magic: u64,
    /// [`CONTROL_VERSION`]; never changes.
    pub version: u32,
    /// [`CONTROL_SIZE_BYTES`]; never changes.
    pub size_bytes: u32,
    /// [`STATE_LOADING`] or [`STATE_READY`]; written by the library.
    pub state: AtomicU32,
    /// Zero: no flag is defined.
    pub flags: AtomicU32,
    /// Zero at load; for the dumper, which may count the dumps of this process here. The library never
    /// writes it.
    pub generation: AtomicU64,
    /// [`GATE_OPEN`] or [`GATE_CLOSED`]; written by the dumper only.
    pub gate: AtomicU32,
    /// Zero.
    pub reserved0: u32,
    /// When a closed gate counts as open: `CLOCK_MONOTONIC` as the process reads it, in nanoseconds. It bounds
    /// what a dumper does that was killed.
    pub gate_deadline_ns: AtomicU64,
    /// Zero.
    pub reserved1: [u64; 2],
    /// What is under way, by `IN_FLIGHT_…`; written by the library only.
    pub in_flight: [AtomicU32; IN_FLIGHT_COUNT],
    /// Hooks of the application.
    pub hooks: Hooks,
    /// Paths of watched files.
    pub watches: [AtomicU64; 8],
    /// Zero.
    pub reserved2: [u8; COPY_OFFSET - 320],
    /// What a restored process is told of itself.
    pub copy: Copy,
    /// Thread ids, as the process sees them, of those in critical sections; 0 where a place is free. One that has ended is in none.
    pub sections: [AtomicU32; MOST_SECTIONS],
    /// Zero in this version.
    pub reserved: [u8; RESERVED_BYTES],
}

impl Control {
    /// The control word as it is in the library's file: constructor not yet run, gate open, nothing under way.
    pub const fn new() -> Self {
        Self {
            magic: CONTROL_MAGIC,
            version: CONTROL_VERSION,
            size_bytes: CONTROL_SIZE_BYTES as u32,
            state: AtomicU32::new(STATE_LOADING),
            flags: AtomicU32::new(0),
            generation: AtomicU64::new(0),
            gate: AtomicU32::new(GATE_OPEN),
            reserved0: 0,
            gate_deadline_ns: AtomicU64::new(0),
            reserved1: [0; 2],
            in_flight: [const { AtomicU32::new(0) }; IN_FLIGHT_COUNT],
            hooks: Hooks::new(),
            watches: [const { AtomicU64::new(0) }; 8],
            reserved2: [0; COPY_OFFSET - 320],
            copy: Copy::new(),
            sections: [const { AtomicU32::new(0) }; MOST_SECTIONS],
            reserved: [0; RESERVED_BYTES],
        }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

/// What a dumper learns from a process's control word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlSnapshot {
    /// [`STATE_LOADING`], [`STATE_READY`], or a state of a later release of the library.
    pub state: u32,
    /// The dumper's counter.
    pub generation: u64,
    /// [`GATE_OPEN`] or [`GATE_CLOSED`].
    pub gate: u32,
    /// When a closed gate counts as open, see [`Control::gate_deadline_ns`].
    pub gate_deadline_ns: u64,
    /// What is under way.
    pub in_flight: [u32; IN_FLIGHT_COUNT],
}

/// Decodes the bytes read at the symbol. `None` if they are not a control word of this version: too short,
/// another magic, version or size. The bytes come from an untrusted process and are only compared, never
/// followed.
pub fn decode_control(bytes: &[u8]) -> Option<ControlSnapshot> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    if u64_at(0)? != CONTROL_MAGIC
        || u32_at(8)? != CONTROL_VERSION
        || u32_at(12)? != CONTROL_SIZE_BYTES as u32
        || bytes.len() < CONTROL_SIZE_BYTES
    {
        return None;
    }
    let mut in_flight = [0; IN_FLIGHT_COUNT];
    for (index, count) in in_flight.iter_mut().enumerate() {
        *count = u32_at(offset_of!(Control, in_flight) + 4 * index)?;
    }
    Some(ControlSnapshot {
        state: u32_at(offset_of!(Control, state))?,
        generation: u64_at(offset_of!(Control, generation))?,
        gate: u32_at(offset_of!(Control, gate))?,
        gate_deadline_ns: u64_at(offset_of!(Control, gate_deadline_ns))?,
        in_flight,
    })
}

// The layout is an ABI: it is checked in every build, not only in the tests.
const _: () = {
    assert!(core::mem::size_of::<Control>() == CONTROL_SIZE_BYTES);
    assert!(core::mem::align_of::<Control>() == CONTROL_SIZE_BYTES);
    assert!(offset_of!(Control, magic) == 0);
    assert!(offset_of!(Control, version) == 8);
    assert!(offset_of!(Control, size_bytes) == 12);
    assert!(offset_of!(Control, state) == 16);
    assert!(offset_of!(Control, flags) == 20);
    assert!(offset_of!(Control, generation) == 24);
    assert!(offset_of!(Control, gate) == 32);
    assert!(offset_of!(Control, gate_deadline_ns) == 40);
    assert!(offset_of!(Control, in_flight) == 64);
    assert!(offset_of!(Control, hooks) == HOOKS_OFFSET);
    assert!(offset_of!(Control, watches) == 256);
    assert!(offset_of!(Control, reserved2) == 320);
    assert!(offset_of!(Control, copy) == COPY_OFFSET);
    assert!(offset_of!(Control, sections) == 640);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> [u8; CONTROL_SIZE_BYTES] {
        let mut bytes = [0; CONTROL_SIZE_BYTES];
        bytes[..8].copy_from_slice(b"CKPTCTL\0");
        bytes[8] = 3;
        bytes[13] = 0x10;
        bytes[16] = 1;
        bytes[24] = 7;
        bytes[32] = 1;
        bytes[40..48].copy_from_slice(&[1, 2, 0, 0, 0, 0, 0, 0]);
        bytes[64] = 3;
        bytes[124] = 4;
        bytes
    }

    #[test]
    fn golden_bytes_decode() {
        let mut in_flight = [0; IN_FLIGHT_COUNT];
        (in_flight[0], in_flight[15]) = (3, 4);
        let expected = ControlSnapshot {
            state: STATE_READY,
            generation: 7,
            gate: GATE_CLOSED,
            gate_deadline_ns: 0x201,
            in_flight,
        };
        assert_eq!(decode_control(&golden()), Some(expected));
    }

    #[test]
    fn other_versions_are_not_taken_for_this_one() {
        for version in [0, 1, 2, 4] {
            let mut bytes = golden();
            bytes[8] = version;
            assert_eq!(decode_control(&bytes), None, "version {version}");
        }
    }

    #[test]
    fn anything_else_is_no_control_word() {
        for at in [0, 7, 8, 11, 12, 15] {
            let mut bytes = golden();
            bytes[at] ^= 0x40;
            assert_eq!(decode_control(&bytes), None, "byte {at}");
        }
        assert_eq!(decode_control(&golden()[..CONTROL_SIZE_BYTES - 1]), None);
        assert_eq!(decode_control(&golden()[..20]), None);
        assert_eq!(decode_control(&[]), None);
    }
}
