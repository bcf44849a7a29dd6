// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another process's memory: process_vm_readv(2), process_vm_writev(2) and /proc/pid/mem.

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

/// Bytes in a page.
pub const PAGE: u64 = 4096;

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

/// /proc/pid/mem: reaches pages that the process itself may not read or write.
#[derive(Debug)]
pub struct Forced(File);

impl Forced {
    /// Opens it, for writing too.
    ///
    /// # Errors
    /// As open(2); EACCES if the process may not be traced.
    pub fn open(pid: Pid) -> std::io::Result<Forced> {
        File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).map(Forced)
    }

    /// Fills `buf` from `addr`.
    ///
    /// # Errors
    /// EIO if nothing is mapped there.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(buf, addr)
    }

    /// Writes `buf` to `addr`, into a private copy of the page if the mapping is private.
    ///
    /// # Errors
    /// EIO if nothing is mapped there.
    pub fn write(&self, addr: u64, buf: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(buf, addr)
    }
}
