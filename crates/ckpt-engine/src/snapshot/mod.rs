// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshot engines: how the frozen job's memory is kept until it has been written.
//!
//! An engine *prepares* while the job runs, takes the snapshot of all sources at once while it is frozen, and returns a
//! handle that outlives the freeze. Sources name whole mappings; which pages exist in them is the engine's to find out,
//! for a frozen copy after the job has been resumed.

pub mod copy;
pub mod cow;
mod guard;
pub mod kmod;
mod memory_limit;
pub mod pages;
pub mod precopy;
#[cfg(feature = "test-hooks")]
pub mod spill;

use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::kind::Kind;
use crate::model::Job;
use crate::model::memory::Vma;
use crate::resource::Collected;
use ckpt_image::{Origin, WriteError, ZeroPages};
use ckpt_sys::Pid;
use ckpt_sys::memory::PAGE;
use std::error::Error;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

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
        /// The page-aligned ranges, sorted by offset.
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

/// Pages of a process, within one mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Address.
    pub addr: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Offset in the object.
    pub offset: u64,
    /// Which of its pages are to be saved.
    pub pages: Pages,
    /// Why a fork of the process would not keep them as they are, if so.
    pub lost_in_fork: Option<&'static str>,
}

/// Which pages of a range are to be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Those that exist only in this process: anonymous ones, and private copies of a file's.
    Private,
    /// All.
    All,
}

impl Source {
    /// Whether its pages are read through a descriptor.
    pub fn is_file(&self) -> bool {
        matches!(self.from, From::File { .. })
    }

    /// An upper bound for the bytes to be kept.
    pub fn bytes(&self) -> u64 {
        match &self.from {
            From::Process { ranges, .. } => ranges.iter().map(|r| r.bytes).sum(),
            From::File { bytes, .. } => *bytes,
        }
    }
}

/// Whole pages of a source. A piece lies within one range of its source.
pub enum Piece<'a> {
    /// Offset in the object, data.
    Data(u64, &'a [u8]),
    /// Where they can be read; they need not be now.
    Unread(Unread<'a>),
    /// Offset in the object, length in bytes: zero pages.
    Zero(u64, u64),
}

/// A piece that has yet to be read. Where it is stays as it is until the snapshot is finished.
pub struct Unread<'a> {
    /// Offset in the object.
    pub offset: u64,
    /// Length in bytes: 1 MiB at most.
    pub bytes: usize,
    /// What reads it.
    pub origin: &'a Arc<dyn Origin>,
    /// From where.
    pub at: u64,
}

impl Unread<'_> {
    /// Reads it now, into as many bytes.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn read(&self, buf: &mut [u8]) -> Result<(), DumpError> {
        self.origin.read(self.at, buf).map_err(|e| WriteError::Origin(e).into())
    }

    /// Reads it now.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn to_vec(&self) -> Result<Vec<u8>, DumpError> {
        let mut data = vec![0; self.bytes];
        self.read(&mut data)?;
        Ok(data)
    }
}

/// Gives a stretch of `bytes` bytes that `origin` has from `at` on, in pieces of at most `piece` bytes. `offset` is that in the object.
fn unread(
    origin: &Arc<dyn Origin>,
    (offset, at, bytes): (u64, u64, u64),
    piece: usize,
    sink: &mut Sink<'_>,
) -> Result<(), DumpError> {
    let mut done = 0;
    while done < bytes {
        let bytes = (bytes - done).min(piece as u64) as usize;
        sink(Piece::Unread(Unread { offset: offset + done, bytes, origin, at: at + done }))?;
        done += bytes as u64;
    }
    Ok(())
}

/// A file's content; what is behind its end is zero.
#[derive(Debug)]
struct FileContent {
    file: File,
    /// Its length in bytes.
    bytes: u64,
    /// For messages.
    what: &'static str,
}

impl Origin for FileContent {
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let there = self.bytes.saturating_sub(at).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < there {
            let n = self.file.read_at(&mut buf[done..there], at + done as u64);
            match n.map_err(DumpError::process(0, self.what))? {
                0 => break,
                n => done += n,
            }
        }
        buf[done..].fill(0);
        Ok(())
    }
}

/// Gets the pieces of a source, in order.
pub type Sink<'a> = dyn FnMut(Piece<'_>) -> Result<(), DumpError> + 'a;

/// A snapshot engine.
pub trait Engine {
    /// Its name, as users give it.
    fn name(&self) -> &'static str;
    /// Looks at the running job and decides what it will do with it. `stays_frozen`: it will not be resumed before the
    /// snapshot has been written.
    ///
    /// # Errors
    /// Any error ends the dump before anything is stopped.
    fn prepare(&self, job: &Job, stays_frozen: bool) -> Result<Box<dyn Prepared>, DumpError>;
}

/// An engine that has looked at the running job.
pub trait Prepared {
    /// Bytes of ckpt's own memory that it will need until the snapshot is dropped.
    fn needs_bytes(&self) -> u64;
    /// Takes the snapshot of all sources at once. All tasks are stopped; injected calls may be made in them.
    ///
    /// # Errors
    /// Any error ends the dump; the job runs on.
    fn snapshot(
        self: Box<Self>,
        frozen: &mut FrozenJob,
        collected: &Collected,
    ) -> Result<Box<dyn Snapshot>, DumpError>;
    /// Whether it knows by itself what has been written since an earlier snapshot: [`Prepared::snapshot_changes`].
    fn tracks_writes(&self) -> bool {
        false
    }
    /// As [`Prepared::snapshot`], without what is known to be as it was; `changes` gets to know what that is, and what to start from the
    /// next time.
    ///
    /// # Errors
    /// As [`Prepared::snapshot`].
    fn snapshot_changes(
        self: Box<Self>,
        frozen: &mut FrozenJob,
        collected: &Collected,
        _changes: &mut kmod::Changes,
    ) -> Result<Box<dyn Snapshot>, DumpError> {
        self.snapshot(frozen, collected)
    }
}

/// A snapshot that outlives the freeze. Dropping it frees what it holds.
pub trait Snapshot {
    /// Gives the pages of the `index`-th source, which is `source`. Called once for each.
    ///
    /// # Errors
    /// Those of the sink, and of reading back.
    fn stream(&mut self, index: usize, source: &Source, sink: &mut Sink<'_>) -> Result<(), DumpError>;
    /// Whether [`Snapshot::mappings`] can tell those of this process.
    fn keeps_mappings(&self, _pid: i32) -> bool {
        false
    }
    /// The mappings of a process as they were when it was frozen, with their flags, from a copy of it. Flags of locked
    /// memory don't survive in a copy.
    ///
    /// # Errors
    /// If the copy was lost.
    fn mappings(&mut self, pid: i32) -> Result<Vec<Vma>, DumpError> {
        Err(DumpError::CopyLost { pid })
    }
    /// Called after the last source: what it took. The snapshot is not needed any more.
    ///
    /// # Errors
    /// If something of it was lost before it could be read.
    fn finish(&mut self) -> Result<Account, DumpError>;
}

/// What a snapshot took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// The engine that kept most of the memory.
    pub engine: &'static str,
    /// Why a better one was not used, for the job or a part of it.
    pub reasons: Vec<String>,
    /// Bytes that were copied while the job was frozen.
    pub held_bytes: u64,
    /// Bytes that were copied shortly before that, and not written to since.
    pub early_bytes: u64,
    /// Bytes of memory that the job and the frozen copy held twice or the copy alone at the end, because the job wrote to
    /// or freed them in the meantime.
    /// None: part of it is kept by the kernel module, which doesn't tell.
    pub duplicated_bytes: Option<u64>,
}

/// An upper bound for the private memory of a job that runs, in bytes.
pub fn private_bytes(job: &Job) -> u64 {
    job.live().flat_map(|p| &p.vmas).map(|v| v.anonymous_bytes + v.swap_bytes).sum()
}

/// Reads a source while the job is frozen, in pieces of at most `piece` bytes.
///
/// # Errors
/// If a page can't be read.
pub fn read_source(source: &Source, piece: usize, sink: &mut Sink<'_>) -> Result<(), DumpError> {
    match &source.from {
        // Its files need not be opened for nothing.
        From::Process { ranges, .. } if ranges.is_empty() => Ok(()),
        From::Process { host, pid, ranges } => {
            let reader = pages::Reader::open(*host, *pid)?;
            ranges.iter().try_for_each(|r| reader.read_range(r, piece, sink))
        }
        From::File { fd, bytes } => read_file(fd, 0..*bytes, piece, sink),
    }
}

/// Reads all data of a part of a file that begins with a page, in whole pages.
///
/// # Errors
/// If it can't be read, and those of the sink.
pub fn read_file(
    fd: &OwnedFd,
    part: std::ops::Range<u64>,
    piece: usize,
    sink: &mut Sink<'_>,
) -> Result<(), DumpError> {
    let what = "reading a file's content";
    let err = |e: std::io::Error| DumpError::process(0, what)(e);
    let file = File::from(fd.try_clone().map_err(err)?);
    let std::ops::Range { start: mut at, end: bytes } = part;
    let content = Arc::new(FileContent { file, bytes, what });
    let (file, origin) = (&content.file, &(Arc::clone(&content) as Arc<dyn Origin>));
    while at < bytes {
        // Holes are not read, which would fill them in shared memory.
        let Some(data) = ckpt_sys::descriptor::next_data(file, at).map_err(|e| err(e.into()))? else {
            break;
        };
        at = data / PAGE * PAGE;
        if at >= bytes {
            break;
        }
        let end = ckpt_sys::descriptor::next_hole(file, data).map_err(|e| err(e.into()))?.min(bytes);
        while at < end {
            let padded = ((end - at).min(piece as u64) as usize).next_multiple_of(PAGE as usize);
            sink(Piece::Unread(Unread { offset: at, bytes: padded, origin, at }))?;
            at += padded as u64;
        }
    }
    Ok(())
}
