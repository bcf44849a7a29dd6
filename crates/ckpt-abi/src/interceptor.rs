// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interceptor's control word: how a dumper recognises a process that carries the interceptor.
//!
//! # Format
//! `libckpt_interceptor.so` exports one data symbol, [`CONTROL_SYMBOL`], in its ELF dynamic symbol table.
//! It is a [`Control`]: one page of its own, in the library's private writable data, so that each process
//! has its own copy (fork copies it, execve starts afresh). A dumper finds it from outside:
//! 1. the mapping of the library in `/proc/PID/maps`, at file offset 0, gives the load address;
//! 2. the symbol's value in the file's `.dynsym` is added to it;
//! 3. the page is read (and, with the process frozen, written) through `/proc/PID/mem`.
//!
//! All fields are little-endian, the byte order of the only architecture there is.
//!
//! # Limits
//! A reader must check `magic`, then `version`, then `size`, and treat a process where one of them is not
//! what it knows as a process without the interceptor. Reserved bytes are zero in version 1. The layout of
//! a version never changes.

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
pub const CONTROL_VERSION: u32 = 1;

/// Size of the control word in bytes: one page, and aligned to one.
pub const CONTROL_SIZE_BYTES: usize = 4096;

/// `state`: mapped, but the dynamic loader has not yet run the library's constructor.
pub const STATE_LOADING: u32 = 0;

/// `state`: the constructor has run; the exec family is interposed.
pub const STATE_READY: u32 = 1;

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
    /// Zero; keeps `generation` aligned.
    pub reserved0: u32,
    /// Zero at load; for the dumper, which may count the dumps of this process here. The library never
    /// writes it.
    pub generation: AtomicU64,
    /// Zero in this version.
    pub reserved: [u8; CONTROL_SIZE_BYTES - 32],
}

impl Control {
    /// The control word as it is in the library's file: version 1, constructor not yet run.
    pub const fn new() -> Self {
        Self {
            magic: CONTROL_MAGIC,
            version: CONTROL_VERSION,
            size_bytes: CONTROL_SIZE_BYTES as u32,
            state: AtomicU32::new(STATE_LOADING),
            reserved0: 0,
            generation: AtomicU64::new(0),
            reserved: [0; CONTROL_SIZE_BYTES - 32],
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
}

/// Decodes the bytes read at the symbol. `None` if they are not a version 1 control word: too short,
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
    Some(ControlSnapshot { state: u32_at(16)?, generation: u64_at(24)? })
}

// The layout is an ABI: it is checked in every build, not only in the tests.
const _: () = {
    assert!(core::mem::size_of::<Control>() == CONTROL_SIZE_BYTES);
    assert!(core::mem::align_of::<Control>() == CONTROL_SIZE_BYTES);
    assert!(core::mem::offset_of!(Control, magic) == 0);
    assert!(core::mem::offset_of!(Control, version) == 8);
    assert!(core::mem::offset_of!(Control, size_bytes) == 12);
    assert!(core::mem::offset_of!(Control, state) == 16);
    assert!(core::mem::offset_of!(Control, generation) == 24);
    assert!(core::mem::offset_of!(Control, reserved) == 32);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> [u8; CONTROL_SIZE_BYTES] {
        let mut bytes = [0; CONTROL_SIZE_BYTES];
        bytes[..8].copy_from_slice(b"CKPTCTL\0");
        bytes[8] = 1;
        bytes[13] = 0x10;
        bytes[16] = 1;
        bytes[24] = 7;
        bytes
    }

    #[test]
    fn golden_bytes_decode() {
        assert_eq!(decode_control(&golden()), Some(ControlSnapshot { state: STATE_READY, generation: 7 }));
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
