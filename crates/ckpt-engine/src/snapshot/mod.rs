// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshot engines: how the frozen job's memory is kept until it has been written.
//!
//! An engine is given all sources at once while the job is frozen, and returns a handle that outlives the freeze.

pub mod copy;
#[cfg(feature = "test-hooks")]
pub mod spill;

use crate::error::DumpError;
use crate::kind::Kind;
use ckpt_image::ZeroPages;
use ckpt_sys::Pid;
use std::os::fd::OwnedFd;

/// Pages to be saved as (part of) one object.
#[derive(Debug)]
pub struct Source {
    /// The kind whose *content* writes them.
    pub kind: Kind,
    /// The object's number in the image.
    pub object: u64,
    /// How zero pages are stored.
    pub zeros: ZeroPages,
    /// Where they are.
    pub from: From,
}

/// Where pages are.
#[derive(Debug)]
pub enum From {
    /// In a process's memory.
    Process {
        /// Its pid as ckpt sees it.
        host: Pid,
        /// Its pid as the job sees it, for messages.
        pid: i32,
        /// The page-aligned ranges.
        ranges: Vec<Range>,
    },
    /// In a file: all data in it.
    File {
        /// Open for reading; its position is not touched.
        fd: OwnedFd,
        /// Length in bytes.
        bytes: u64,
    },
}

/// Pages of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Address.
    pub addr: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Offset in the object.
    pub offset: u64,
}

impl Source {
    /// An upper bound for the bytes to be kept.
    pub fn bytes(&self) -> u64 {
        match &self.from {
            From::Process { ranges, .. } => ranges.iter().map(|r| r.bytes).sum(),
            From::File { bytes, .. } => *bytes,
        }
    }
}

/// Gets (offset in the object, data: whole pages).
pub type Sink<'a> = dyn FnMut(u64, &[u8]) -> Result<(), DumpError> + 'a;

/// A snapshot engine.
pub trait Engine {
    /// Its name, as users give it.
    fn name(&self) -> &'static str;
    /// Bytes of memory it needs until the snapshot is dropped.
    fn needs_bytes(&self, sources: &[Source]) -> u64;
    /// Takes the snapshot. The job is frozen.
    ///
    /// # Errors
    /// Any error ends the dump; the job runs on.
    fn snapshot(&self, sources: &[Source]) -> Result<Box<dyn Snapshot>, DumpError>;
}

/// A snapshot that outlives the freeze.
pub trait Snapshot {
    /// Gives all pages of the `index`-th source, in order.
    ///
    /// # Errors
    /// Those of the sink, and of reading back.
    fn stream(&mut self, index: usize, sink: &mut Sink<'_>) -> Result<(), DumpError>;
    /// Bytes of memory held for it.
    fn held_bytes(&self) -> u64;
}

/// Reads a source while the job is frozen, in pieces of at most `piece` bytes.
///
/// # Errors
/// If a page can't be read.
pub fn read_source(source: &Source, piece: usize, sink: &mut Sink<'_>) -> Result<(), DumpError> {
    match &source.from {
        From::Process { host, pid, ranges } => {
            let forced = ckpt_sys::memory::Forced::open(*host)
                .map_err(DumpError::process(*pid, "opening its memory"))?;
            let mut buf = vec![0u8; piece];
            for r in ranges {
                let mut done = 0;
                while done < r.bytes {
                    let n = (r.bytes - done).min(piece as u64) as usize;
                    let addr = r.addr + done;
                    // Pages the process itself may not read are reached through /proc/pid/mem.
                    if ckpt_sys::memory::read(*host, addr, &mut buf[..n]).is_err() {
                        let what = format!("reading {n} bytes of memory at {addr:#x}");
                        forced.read(addr, &mut buf[..n]).map_err(DumpError::process(*pid, what))?;
                    }
                    sink(r.offset + done, &buf[..n])?;
                    done += n as u64;
                }
            }
            Ok(())
        }
        From::File { fd, bytes } => read_file(fd, *bytes, piece, sink),
    }
}

/// Reads all data of a file, in whole pages.
///
/// # Errors
/// If it can't be read, and those of the sink.
pub fn read_file(fd: &OwnedFd, bytes: u64, piece: usize, sink: &mut Sink<'_>) -> Result<(), DumpError> {
    use ckpt_sys::memory::PAGE;
    use std::os::unix::fs::FileExt;
    let err =
        |e: std::io::Error| DumpError::Process { pid: 0, what: "reading a file's content".into(), source: e };
    let file = std::fs::File::from(fd.try_clone().map_err(err)?);
    let mut buf = vec![0u8; piece];
    let mut at = 0;
    while at < bytes {
        // Holes are not read, which would fill them in shared memory.
        let Some(data) = ckpt_sys::descriptor::next_data(&file, at).map_err(|e| err(e.into()))? else {
            break;
        };
        at = data / PAGE * PAGE;
        let end = ckpt_sys::descriptor::next_hole(&file, data).map_err(|e| err(e.into()))?.min(bytes);
        while at < end {
            let n = ((end - at).min(piece as u64)) as usize;
            let padded = n.next_multiple_of(PAGE as usize);
            buf[..padded].fill(0);
            let mut got = 0;
            while got < n {
                match file.read_at(&mut buf[got..n], at + got as u64).map_err(err)? {
                    0 => break,
                    k => got += k,
                }
            }
            sink(at, &buf[..padded])?;
            at += padded as u64;
        }
    }
    Ok(())
}
