// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control word of a process that carries the interceptor, read and written from outside.
//!
//! Format: `ckpt_abi::interceptor`. It is found as a debugger finds libraries: the program's headers (AT_PHDR,
//! getauxval(3)) lead to the dynamic loader's list of objects (`struct r_debug`, `struct link_map` in `link.h`), and the
//! library's own dynamic section to its symbols (elf(5)). Nothing of the file is needed, which may be gone or another by
//! now; in a restored process the library is anonymous memory.
//!
//! Limits: nothing that is read is trusted: all loops and sizes are bounded, and addresses are only read from or, if a
//! control word is there, written to, in the same process. A process that is not dumpable, or has not got as far as its
//! constructors, counts as one without the interceptor.

use ckpt_abi::interceptor::{
    CONTROL_MAGIC, CONTROL_SIZE_BYTES, CONTROL_SYMBOL, ControlSnapshot, LIBRARY_NAME, STATE_LOADING,
    decode_control,
};
use ckpt_sys::Pid;
use ckpt_sys::memory::PAGE;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// One process's control word. It stays that of the program that ran when it was found: after an execve reading and
/// writing fail.
#[derive(Debug)]
pub struct ControlWord {
    memory: Memory,
    address: u64,
}

impl ControlWord {
    /// That of a process; none if it doesn't carry the interceptor, or another release of it.
    pub fn find(host: Pid) -> Option<ControlWord> {
        let path = format!("/proc/{host}/mem");
        // Only now: what is mapped is of one program, or nothing is found.
        let memory = Memory::File(File::options().read(true).write(true).open(path).ok()?);
        ControlWord::find_in(memory, host)
    }

    /// That of a process which is being restored and runs nothing yet. Its memory may come when it is touched, which is not the way of
    /// `/proc/PID/mem`: it asks for a page without waiting for it (userfaultfd(2)).
    pub fn find_restored(host: Pid) -> Option<ControlWord> {
        ControlWord::find_in(Memory::Calls(host), host)
    }

    fn find_in(memory: Memory, host: Pid) -> Option<ControlWord> {
        let address = control_address(&memory, host)?;
        let word = ControlWord { memory, address };
        word.snapshot().filter(|s| s.state != STATE_LOADING).map(|_| word)
    }

    /// All that is generally known of it; none if the process has executed another program, or ended.
    pub fn snapshot(&self) -> Option<ControlSnapshot> {
        let mut bytes = [0; CONTROL_SIZE_BYTES];
        self.read(0, &mut bytes).ok()?;
        decode_control(&bytes)
    }

    /// Whether the program that it belongs to is still there.
    fn is_there(&self) -> bool {
        matches!(self.read_u64(0), Ok(CONTROL_MAGIC))
    }

    /// Fills `buf` from `offset` (`offset_of!(Control, …)`).
    ///
    /// # Errors
    /// UnexpectedEof if the process has executed another program or ended; EINVAL beyond its end.
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(self.place(offset, buf.len())?, buf)
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// WriteZero if the process has executed another program or ended; EINVAL beyond its end.
    pub fn write(&self, offset: usize, buf: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(self.place(offset, buf.len())?, buf)
    }

    /// The four bytes at `offset`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_u32(&self, offset: usize) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes).map(|()| u32::from_le_bytes(bytes))
    }

    /// The eight bytes at `offset`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_u64(&self, offset: usize) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes).map(|()| u64::from_le_bytes(bytes))
    }

    /// Fills `buf` from any address of the process, which the caller has from the control word.
    ///
    /// # Errors
    /// EIO if nothing is mapped there.
    pub fn read_memory(&self, address: u64, buf: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(address, buf)
    }

    fn place(&self, offset: usize, bytes: usize) -> io::Result<u64> {
        match offset.checked_add(bytes) {
            Some(end) if end <= CONTROL_SIZE_BYTES => Ok(self.address + offset as u64),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// The memory of a process.
#[derive(Debug)]
enum Memory {
    /// /proc/pid/mem: that of one program, whatever the process does next.
    File(File),
    /// process_vm_readv(2) and process_vm_writev(2).
    Calls(Pid),
}

impl Memory {
    /// Reads as much as there is, at least a byte unless `buf` is empty.
    fn read_at(&self, address: u64, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Memory::File(file) => file.read_at(buf, address),
            Memory::Calls(pid) => {
                let mut done = 0;
                while done < buf.len() {
                    let at = address + done as u64;
                    let n = ((PAGE - at % PAGE) as usize).min(buf.len() - done);
                    match ckpt_sys::memory::read(*pid, at, &mut buf[done..done + n]) {
                        Ok(()) => done += n,
                        Err(_) if done > 0 => break,
                        Err(e) => return Err(e.into()),
                    }
                }
                Ok(done)
            }
        }
    }

    fn read_exact_at(&self, address: u64, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Memory::File(file) => file.read_exact_at(buf, address),
            Memory::Calls(pid) => Ok(ckpt_sys::memory::read(*pid, address, buf)?),
        }
    }

    fn write_all_at(&self, address: u64, buf: &[u8]) -> io::Result<()> {
        match self {
            Memory::File(file) => file.write_all_at(buf, address),
            Memory::Calls(pid) => Ok(ckpt_sys::memory::write(*pid, address, buf)?),
        }
    }
}

/// The control words of a job's processes, each looked for once in a dump.
#[derive(Debug, Default)]
pub struct ControlWords {
    found: HashMap<Pid, ControlWord>,
}

impl ControlWords {
    /// That of a process as it is now: if it has executed another program since it was asked for, that of the new one.
    pub fn get(&mut self, host: Pid) -> Option<&ControlWord> {
        if !self.found.get(&host).is_some_and(ControlWord::is_there) {
            self.found.remove(&host);
            self.found.insert(host, ControlWord::find(host)?);
        }
        self.found.get(&host)
    }
}

// Program headers and dynamic sections: elf(5).
const AT_PHDR: u64 = 3;
const AT_PHNUM: u64 = 5;
const PT_DYNAMIC: u32 = 2;
const PT_PHDR: u32 = 6;
const DT_NULL: u64 = 0;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_DEBUG: u64 = 21;
const PROGRAM_HEADER_BYTES: usize = 56;
const SYMBOL_BYTES: usize = 24;
/// Longest list of objects that is followed. A preloaded library is among the first.
const MOST_OBJECTS: usize = 4096;
/// Most entries of a dynamic section, and most symbols of the library.
const MOST_ENTRIES: usize = 256;

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// As many of `most` bytes as are readable at `address`.
fn read_some(memory: &Memory, address: u64, most: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; most];
    // Nothing of a process lies above; larger numbers would be errors of another kind.
    let address = i64::try_from(address).ok()? as u64;
    let n = memory.read_at(address, &mut bytes).ok()?;
    bytes.truncate(n);
    Some(bytes)
}

/// Tags and values of a dynamic section.
fn dynamic_section(memory: &Memory, address: u64) -> Option<Vec<(u64, u64)>> {
    let bytes = read_some(memory, address, 16 * MOST_ENTRIES)?;
    let pairs = bytes.chunks_exact(16).filter_map(|c| Some((u64_at(c, 0)?, u64_at(c, 8)?)));
    Some(pairs.take_while(|(tag, _)| *tag != DT_NULL).collect())
}

fn value(section: &[(u64, u64)], tag: u64) -> Option<u64> {
    section.iter().find(|(t, _)| *t == tag).map(|(_, v)| *v)
}

/// Address of `struct r_debug`.
fn loader_debug(memory: &Memory, host: Pid) -> Option<u64> {
    let auxv = std::fs::read(format!("/proc/{host}/auxv")).ok()?;
    let pairs: Vec<(u64, u64)> =
        auxv.chunks_exact(16).filter_map(|c| Some((u64_at(c, 0)?, u64_at(c, 8)?))).collect();
    let (at, count) = (value(&pairs, AT_PHDR)?, value(&pairs, AT_PHNUM)?);
    let count = usize::try_from(count).ok()?.min(MOST_ENTRIES);
    let bytes = read_some(memory, at, count * PROGRAM_HEADER_BYTES)?;
    let headers: Vec<(u32, u64)> = bytes
        .chunks_exact(PROGRAM_HEADER_BYTES)
        .filter_map(|h| Some((u32_at(h, 0)?, u64_at(h, 16)?)))
        .collect();
    let address = |kind| headers.iter().find(|(k, _)| *k == kind).map(|(_, a)| *a);
    // A program without PT_PHDR is loaded where it was linked to.
    let base = address(PT_PHDR).map_or(0, |linked| at.wrapping_sub(linked));
    let section = dynamic_section(memory, base.wrapping_add(address(PT_DYNAMIC)?))?;
    value(&section, DT_DEBUG).filter(|d| *d != 0)
}

/// Load address and address of the dynamic section of the interceptor.
fn library(memory: &Memory, host: Pid) -> Option<(u64, u64)> {
    let debug = read_some(memory, loader_debug(memory, host)?, 16)?;
    let mut next = u64_at(&debug, 8)?;
    for _ in 0..MOST_OBJECTS {
        if next == 0 {
            break;
        }
        // l_addr, l_name, l_ld, l_next.
        let object = read_some(memory, next, 32)?;
        let name = read_some(memory, u64_at(&object, 8)?, 4096).unwrap_or_default();
        let name = name.split(|b| *b == 0).next().unwrap_or_default();
        if name.rsplit(|b| *b == b'/').next() == Some(LIBRARY_NAME.as_bytes()) {
            return Some((u64_at(&object, 0)?, u64_at(&object, 16)?));
        }
        next = u64_at(&object, 24)?;
    }
    None
}

/// Address of the control word, if the library is there.
fn control_address(memory: &Memory, host: Pid) -> Option<u64> {
    let (base, dynamic) = library(memory, host)?;
    let section = dynamic_section(memory, dynamic)?;
    // The loader has turned offsets into addresses.
    let table = |tag| value(&section, tag).map(|v| if v < base { base.wrapping_add(v) } else { v });
    let (symbols, strings) = (table(DT_SYMTAB)?, table(DT_STRTAB)?);
    let table = read_some(memory, symbols, SYMBOL_BYTES * MOST_ENTRIES)?;
    let names = read_some(memory, strings, 1 << 14)?;
    let named = |symbol: &&[u8]| {
        let name = u32_at(symbol, 0).and_then(|at| names.get(at as usize..));
        name.and_then(|n| n.strip_prefix(CONTROL_SYMBOL.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    };
    let symbol = table.chunks_exact(SYMBOL_BYTES).find(named)?;
    let address = base.wrapping_add(u64_at(symbol, 8)?);
    address.is_multiple_of(CONTROL_SIZE_BYTES as u64).then_some(address)
}
