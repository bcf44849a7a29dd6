// SPDX-License-Identifier: MIT OR Apache-2.0
//! A large write to a pipe or unix stream socket that blocks half-way returns what it has done when its task is stopped,
//! which the application would not have seen. The task is pointed at a few instructions behind the vDSO that write the
//! rest and return the sum. They stay there: they are part of the process's state from then on, and are saved with it.

use crate::model::file::info_value;
use crate::model::memory::vdso_of;
use crate::model::process::{padding_behind, read_proc_text};
use ckpt_sys::arch::{self, PartialWrite, Registers, WRITE_BLOCK_BYTES};
use ckpt_sys::inject::Padding;
use ckpt_sys::memory::{self, Forced};
use ckpt_sys::{Pid, libc, ptrace};

/// Lets a stopped task write the rest of a write that the stop cut short; the registers that it has then, if they are others.
/// Where that can't be done (no place is left) the application sees a short count, which write(2) allows.
pub fn continue_write(tid: Pid, r: &Registers) -> std::io::Result<Option<Registers>> {
    let Some(short) = arch::short_write(r) else { return Ok(None) };
    if !blocks(tid, arch::first_argument(r)) || ptrace::dispatches_calls(tid)? {
        return Ok(None);
    }
    let Some(padding) = padding_of(tid) else { return Ok(None) };
    let places = places(&padding);
    let read = |at: u64| {
        let mut block = [0; WRITE_BLOCK_BYTES];
        memory::read(tid, at, &mut block).map(|()| block)
    };
    // Stopped in such a block already: its sum goes on, in a new place, so that one write to the registers decides.
    let within = places.iter().find(|at| (**at..**at + WRITE_BLOCK_BYTES as u64).contains(&r.rip));
    let before = match within {
        Some(at) => arch::read_write_block(&read(*at)?),
        None => None,
    };
    let whole = match before {
        Some(b) => PartialWrite { done: b.done + short.done, ..b },
        None => short,
    };
    for at in places {
        if read(at)? == [0; WRITE_BLOCK_BYTES] {
            Forced::open(tid)?.write(at, &arch::write_block(&whole))?;
            let rest = arch::write_rest(r, at, short.done);
            ptrace::set_registers(tid, &rest)?;
            return Ok(Some(rest));
        }
    }
    Ok(None)
}

/// What stands in the places of a process, if anything does: address and bytes.
///
/// # Errors
/// If it can't be read.
pub fn saved(host: Pid, padding: &Padding) -> Result<Option<(u64, Vec<u8>)>, ckpt_sys::Errno> {
    let range = padding.write_places();
    let mut bytes = vec![0u8; (range.end - range.start) as usize];
    memory::read(host, range.start, &mut bytes)?;
    Ok(bytes.iter().any(|b| *b != 0).then_some((range.start, bytes)))
}

fn places(padding: &Padding) -> Vec<u64> {
    let range = padding.write_places();
    let n = (range.end - range.start) / WRITE_BLOCK_BYTES as u64;
    (0..n).map(|i| range.start + i * WRITE_BLOCK_BYTES as u64).collect()
}

/// A blocking pipe, FIFO or socket: there a stop cuts a write short.
fn blocks(tid: Pid, fd: u64) -> bool {
    let link = std::fs::read_link(format!("/proc/{tid}/fd/{fd}")).unwrap_or_default();
    let link = link.to_string_lossy();
    let info = read_proc_text(format!("/proc/{tid}/fdinfo/{fd}")).unwrap_or_default();
    let flags =
        info_value(&info, "flags").and_then(|f| i32::from_str_radix(f, 8).ok()).unwrap_or(libc::O_NONBLOCK);
    let fifo = || {
        use std::os::unix::fs::FileTypeExt;
        std::fs::metadata(format!("/proc/{tid}/fd/{fd}")).is_ok_and(|m| m.file_type().is_fifo())
    };
    flags & libc::O_NONBLOCK == 0 && (link.starts_with("pipe:") || link.starts_with("socket:") || fifo())
}

fn padding_of(tid: Pid) -> Option<Padding> {
    padding_behind(vdso_of(tid.as_raw())?)
}
