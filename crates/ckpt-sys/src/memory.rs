// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another process's memory: process_vm_readv(2), process_vm_writev(2), /proc/pid/mem and PTRACE_POKEDATA.

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// Memory that this host can give without swapping, in bytes (MemAvailable, proc_meminfo(5)); all there could be where that is not told.
pub fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.split_whitespace().next());
    kib.and_then(|n| n.parse::<u64>().ok()).map_or(u64::MAX, |n| n * 1024)
}

/// An empty file in memory, which nobody else sees.
///
/// # Errors
/// As memfd_create(2).
pub fn memory_file(name: &std::ffi::CStr) -> std::io::Result<File> {
    let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    Ok(File::from(fd))
}

/// Fills `buf` from `addr`.
///
/// # Errors
/// EFAULT if a byte of it can't be read by the process itself.
pub fn read(pid: Pid, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < buf.len() {
        let len = buf.len() - done;
        let remote = [RemoteIoVec { base: addr as usize + done, len }];
        match process_vm_readv(pid, &mut [IoSliceMut::new(&mut buf[done..])], &remote)? {
            0 => return Err(Errno::EFAULT),
            n => done += n,
        }
    }
    Ok(())
}

/// Fills `buf` from many stretches, given as (address, bytes), one after the other.
///
/// # Errors
/// EFAULT if a byte of it can't be read by the process itself, EINVAL if `buf` is not as long as all of them.
pub fn read_list(pid: Pid, list: &[(u64, u64)], buf: &mut [u8]) -> Result<(), Errno> {
    /// IOV_MAX.
    const MOST: usize = 1024;
    if list.iter().map(|(_, bytes)| bytes).sum::<u64>() != buf.len() as u64 {
        return Err(Errno::EINVAL);
    }
    let mut rest = buf;
    for part in list.chunks(MOST) {
        let bytes: u64 = part.iter().map(|(_, bytes)| bytes).sum();
        let (now, later) = rest.split_at_mut(bytes as usize);
        let remote: Vec<RemoteIoVec> = part
            .iter()
            .map(|(addr, bytes)| RemoteIoVec { base: *addr as usize, len: *bytes as usize })
            .collect();
        let mut done = process_vm_readv(pid, &mut [IoSliceMut::new(now)], &remote)?;
        // A call gives at most 2 GiB, and stops where it fails.
        let mut before = 0;
        for (addr, bytes) in part {
            let (from, to) = (before, before + *bytes as usize);
            if done < to {
                let skip = done.saturating_sub(from);
                read(pid, addr + skip as u64, &mut now[from + skip..to])?;
                done = to;
            }
            before = to;
        }
        rest = later;
    }
    Ok(())
}

/// Writes `buf` to `addr`, which must be writable by the process itself.
///
/// # Errors
/// EFAULT if a byte of it can't be written.
pub fn write(pid: Pid, addr: u64, buf: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < buf.len() {
        let remote = [RemoteIoVec { base: addr as usize + done, len: buf.len() - done }];
        match process_vm_writev(pid, &[IoSlice::new(&buf[done..])], &remote)? {
            0 => return Err(Errno::EFAULT),
            n => done += n,
        }
    }
    Ok(())
}

/// Access to pages that the process itself may not read or write.
#[derive(Debug)]
pub struct Forced(Way);

#[derive(Debug)]
enum Way {
    /// /proc/pid/mem.
    File(File),
    /// PTRACE_PEEKDATA and PTRACE_POKEDATA.
    Words(Pid),
}

impl Forced {
    /// Opens /proc/pid/mem, for writing too.
    ///
    /// # Errors
    /// As open(2); EACCES if the process may not be traced, or is not dumpable and its owner in /proc not mapped here.
    pub fn open(pid: Pid) -> std::io::Result<Forced> {
        let file = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Forced(Way::File(file)))
    }

    /// Word by word through ptrace(2): for a tracee, while it is stopped, whose /proc/pid/mem can't be opened.
    pub fn by_words(pid: Pid) -> Forced {
        Forced(Way::Words(pid))
    }

    /// Fills `buf` from `addr`.
    ///
    /// # Errors
    /// EIO if nothing is mapped there.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> std::io::Result<()> {
        match &self.0 {
            Way::File(f) => f.read_exact_at(buf, addr),
            Way::Words(pid) => {
                for (i, chunk) in buf.chunks_mut(8).enumerate() {
                    let word = crate::ptrace::peek(*pid, addr + i as u64 * 8)?.to_le_bytes();
                    chunk.copy_from_slice(&word[..chunk.len()]);
                }
                Ok(())
            }
        }
    }

    /// Writes `buf` to `addr`, into a private copy of the page if the mapping is private.
    ///
    /// # Errors
    /// EIO if nothing is mapped there.
    pub fn write(&self, addr: u64, buf: &[u8]) -> std::io::Result<()> {
        match &self.0 {
            Way::File(f) => f.write_all_at(buf, addr),
            Way::Words(pid) => {
                for (i, chunk) in buf.chunks(8).enumerate() {
                    let at = addr + i as u64 * 8;
                    let mut word = match chunk.len() {
                        8 => [0; 8],
                        _ => crate::ptrace::peek(*pid, at)?.to_le_bytes(),
                    };
                    word[..chunk.len()].copy_from_slice(chunk);
                    crate::ptrace::poke(*pid, at, u64::from_le_bytes(word))?;
                }
                Ok(())
            }
        }
    }
}
