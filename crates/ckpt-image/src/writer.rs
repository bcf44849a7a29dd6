// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes an image: records and page runs, in any order, then the run index and the END frame.
//!
//! Memory use is small and does not grow with the amount of page content, except for one list entry per
//! contiguous stretch of an object, kept to notice pages that are written twice.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, IoSlice, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::compression::Compression;
use crate::error::WriteError;
use crate::format::{
    self, Digest, End, FIRST_RESERVED_KIND, FORMAT_VERSION, HOST_ARCH, HeaderInfo, INTERNAL_VERSION,
    KIND_END, KIND_PARENT, Listed, MAX_BODY_BYTES, MAX_CHAIN_IMAGES, PAGE_SIZE, PAGES_FILE, Parent,
    RECORDS_FILE, RunEntry,
};
use crate::pipeline::{BUFFER_BYTES, Batch, Buffer, BufferPool, Origin, Piece, Pipeline, Sink};
use crate::reader;

/// What to do with pages that are all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPages {
    /// Leave them out: a page of this object that is in no run reads as zero.
    Elide,
    /// List them as zero runs, for objects whose unlisted pages are something else (the content of a file).
    Record,
}

/// Creation time and random id of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The image id.
    pub id: [u8; 16],
    /// Nanoseconds since 1970-01-01 UTC.
    pub created_unix_ns: u64,
}

impl Identity {
    /// A fresh random id and the current time.
    ///
    /// # Errors
    /// When `/dev/urandom` cannot be read.
    pub fn fresh() -> io::Result<Self> {
        let mut id = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut id)?;
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Identity { id, created_unix_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX) })
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Summary {
    /// Records, without those of the image itself.
    pub records: u64,
    /// Page runs, zero runs included.
    pub runs: u64,
    /// Pages stored as data.
    pub data_pages: u64,
    /// Pages found zero, whether left out or listed.
    pub zero_pages: u64,
    /// Pages listed as those of the parent.
    pub same_pages: u64,
    /// Size of the `records` file in bytes.
    pub records_bytes: u64,
    /// Size of the `pages` file in bytes.
    pub pages_bytes: u64,
}

/// An image being written. Dropping it leaves an incomplete image, which no reader accepts.
///
/// Content is examined, packed and written by threads beside the caller's, in the order of the calls. So an error
/// may come with a later call, or with [`Writer::finish`].
pub struct Writer {
    dir: OwnedFd,
    label: PathBuf,
    pipeline: Pipeline,
    /// Small pieces on their way.
    batch: Batch,
    /// A SAME run that may still grow.
    same: Option<RunEntry>,
    same_pages: u64,
    covered: Covered,
    /// Pages of the parent's objects that are in use.
    covered_in_parent: Covered,
    parent: Option<Parent>,
    failed: bool,
}

/// Stretches by start and end, by object.
type Covered = HashMap<u64, BTreeMap<u64, u64>>;

impl Writer {
    /// Starts an image in `dir`, which exists and holds no image yet.
    ///
    /// # Errors
    /// [`WriteError::Io`] when the files cannot be created, also if they exist.
    pub fn create(
        dir: &Path,
        cpu_features: [u8; 64],
        compression: Compression,
    ) -> Result<Writer, WriteError> {
        let io = |action, source| WriteError::Io { path: dir.to_owned(), action, source };
        let fd = File::open(dir).map_err(|e| io("open the checkpoint directory", e))?;
        let identity = Identity::fresh().map_err(|e| io("get random bytes for its id", e))?;
        Writer::create_at(fd.into(), dir, cpu_features, compression, identity)
    }

    /// Starts an incremental image in `dir`, which exists, holds no image yet, and lies beside the complete checkpoint
    /// `parent`. Pages that are as they are in the parent are listed with [`Writer::same`].
    ///
    /// When this returns the file `records` names the parent, so that the parent is not removed any more, even while
    /// this image is incomplete.
    ///
    /// # Errors
    /// [`WriteError::Parent`] if there is no such parent beside `dir`, or if it ends a chain that is as long as a chain may
    /// be; [`WriteError::Io`] when the files cannot be created, also if they exist. A full image can be started in `dir` after a
    /// [`WriteError::Parent`].
    pub fn create_incremental(
        dir: &Path,
        cpu_features: [u8; 64],
        compression: Compression,
        parent: Parent,
    ) -> Result<Writer, WriteError> {
        let io = |action, source| WriteError::Io { path: dir.to_owned(), action, source };
        let fd = File::open(dir).map_err(|e| io("open the checkpoint directory", e))?;
        let identity = Identity::fresh().map_err(|e| io("get random bytes for its id", e))?;
        Writer::create_incremental_at(fd.into(), dir, cpu_features, compression, identity, parent)
    }

    /// Starts an incremental image in the directory `dir`, called `label` in messages, with a given identity.
    ///
    /// # Errors
    /// As for [`Writer::create_incremental`].
    pub fn create_incremental_at(
        dir: OwnedFd,
        label: &Path,
        cpu_features: [u8; 64],
        compression: Compression,
        identity: Identity,
        parent: Parent,
    ) -> Result<Writer, WriteError> {
        let beside =
            openat(dir.as_fd(), "..", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(|errno| WriteError::Io {
                    path: label.to_owned(),
                    action: "open the directory that it is in",
                    source: errno.into(),
                })?;
        // Whoever removes checkpoints holds the names while he looks for children and hides what has none.
        let names_held = crate::store::hold_names(File::from(beside));
        check_parent(&dir, label, parent)?;
        let writer =
            Writer::start(dir, label, new_header(cpu_features, compression, identity), Some(parent))?;
        let mut sink = writer.pipeline.sink();
        let flushed = sink.records.flush();
        sink.written(RECORDS_FILE, flushed)?;
        drop(sink);
        // Where names cannot be held, one of the two sees the other.
        check_parent(&writer.dir, label, parent)?;
        drop(names_held);
        Ok(writer)
    }

    /// Starts an image in the directory `dir`, called `label` in messages, with a given identity.
    ///
    /// # Errors
    /// As for [`Writer::create`].
    pub fn create_at(
        dir: OwnedFd,
        label: &Path,
        cpu_features: [u8; 64],
        compression: Compression,
        identity: Identity,
    ) -> Result<Writer, WriteError> {
        Writer::start(dir, label, new_header(cpu_features, compression, identity), None)
    }

    /// Starts a full image with the header of another one, so that it can take its place: id, creation time, machine.
    pub(crate) fn create_in_place_of(
        dir: OwnedFd,
        label: &Path,
        header: &HeaderInfo,
        compression: Compression,
    ) -> Result<Writer, WriteError> {
        Writer::start(dir, label, HeaderInfo { version: FORMAT_VERSION, compression, ..header.clone() }, None)
    }

    fn start(
        dir: OwnedFd,
        label: &Path,
        info: HeaderInfo,
        parent: Option<Parent>,
    ) -> Result<Writer, WriteError> {
        let create = |name: &str| {
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
            openat(dir.as_fd(), name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from).map_err(|errno| {
                WriteError::Io { path: label.join(name), action: "create the file", source: errno.into() }
            })
        };
        let records = BufWriter::with_capacity(BUFFER_BYTES, create(RECORDS_FILE)?);
        let pages = create(PAGES_FILE)?;
        let compression = info.compression;
        let header = format::encode_header(&info);
        let mut sink = Sink {
            label: label.to_owned(),
            records,
            pages,
            digest: Digest::new(&header),
            index: Vec::new(),
            incremental: parent.is_some(),
            summary: Summary::default(),
            failed: false,
        };
        sink.put_records(&header)?;
        sink.put_pages(&mut [IoSlice::new(&format::encode_pages_header(&info))])?;
        if let Some(parent) = parent {
            sink.frame(KIND_PARENT, INTERNAL_VERSION, 0, 0, &parent.encode())?;
        }
        let pipeline = Pipeline::new(sink, compression).map_err(|source| WriteError::Io {
            path: label.to_owned(),
            action: "set up compression",
            source,
        })?;
        Ok(Writer {
            dir,
            label: label.to_owned(),
            pipeline,
            batch: Batch::default(),
            same: None,
            same_pages: 0,
            covered: HashMap::new(),
            covered_in_parent: HashMap::new(),
            parent,
            failed: false,
        })
    }

    /// Adds a record.
    ///
    /// # Errors
    /// [`WriteError::ReservedKind`], [`WriteError::RecordTooLong`], [`WriteError::TooManyRecords`] or
    /// [`WriteError::Io`].
    pub fn record(
        &mut self,
        kind: u16,
        version: u16,
        owner: u64,
        id: u64,
        body: &[u8],
    ) -> Result<(), WriteError> {
        if kind >= FIRST_RESERVED_KIND {
            return Err(WriteError::ReservedKind { kind });
        }
        if body.len() > MAX_BODY_BYTES {
            let (bytes, limit) = (body.len(), MAX_BODY_BYTES);
            return Err(WriteError::RecordTooLong { kind, owner, id, bytes, limit });
        }
        // Frames of the index may be on their way, and the order is to be that of the calls.
        self.settle()?;
        let mut sink = self.pipeline.sink();
        sink.summary.records += 1;
        sink.frame(kind, version, owner, id, body)
    }

    /// Adds content of `object` from byte `offset` on: whole pages, none of them given before. Runs are cut at
    /// zero pages and at 1 MiB, so data in pieces of 1 MiB is stored best. The data is copied once; see
    /// [`Writer::pages_owned`].
    ///
    /// # Errors
    /// [`WriteError::BadRange`], [`WriteError::Overlap`], which leave the image as it was; [`WriteError::TooManyRecords`] or
    /// [`WriteError::Io`].
    pub fn pages(
        &mut self,
        object: u64,
        offset: u64,
        data: &[u8],
        zeros: ZeroPages,
    ) -> Result<(), WriteError> {
        self.cover_pages(object, offset, data.len())?;
        for (i, piece) in data.chunks(BUFFER_BYTES).enumerate() {
            let offset = offset + (i * BUFFER_BYTES) as u64;
            let at = self.place(piece.len())?;
            let buffer = self.batch.buffer.get_or_insert_with(|| self.pipeline.pool.take());
            buffer[at.clone()].copy_from_slice(piece);
            self.add(Piece::Pages { object, offset, at, zeros, origin: None })?;
        }
        Ok(())
    }

    /// As [`Writer::pages`], for `bytes` (1 MiB at most) that are read from `at` of `origin` when they are written, by whatever
    /// thread. [`Writer::settle`] waits until they have been read.
    ///
    /// # Errors
    /// As for [`Writer::pages`], and [`WriteError::BadRange`] for more than 1 MiB. [`WriteError::Origin`], with this or a later
    /// call, if they can't be read: the image can't be completed.
    pub fn pages_from(
        &mut self,
        object: u64,
        offset: u64,
        bytes: usize,
        zeros: ZeroPages,
        origin: &Arc<dyn Origin>,
        at: u64,
    ) -> Result<(), WriteError> {
        if bytes > BUFFER_BYTES {
            return Err(WriteError::BadRange { object, offset, bytes: bytes as u64 });
        }
        self.cover_pages(object, offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let place = self.place(bytes)?;
        let origin = Some((Arc::clone(origin), at));
        self.add(Piece::Pages { object, offset, at: place, zeros, origin })
    }

    /// As [`Writer::pages`], for content in a buffer of [`Writer::buffers`], which is written from there without being
    /// copied and goes back to the pool then. The next buffer can be filled meanwhile.
    ///
    /// # Errors
    /// As for [`Writer::pages`].
    pub fn pages_owned(
        &mut self,
        object: u64,
        offset: u64,
        data: Buffer,
        zeros: ZeroPages,
    ) -> Result<(), WriteError> {
        self.cover_pages(object, offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        self.submit()?;
        let used = data.len();
        self.batch.buffer = Some(data);
        self.batch.used = used;
        self.add(Piece::Pages { object, offset, at: 0..used, zeros, origin: None })?;
        self.submit()
    }

    /// Buffers for [`Writer::pages_owned`]: a few of 1 MiB. All that are handed out at a time are those of one pool, so that
    /// memory stays bounded.
    pub fn buffers(&self) -> BufferPool {
        self.pipeline.pool.clone()
    }

    /// Lists `bytes` of `object` from byte `offset` on as those of the parent's object `parent_object` at the same offset.
    ///
    /// Whatever they are there they are here: content, zero, or, if the parent (with all that it is built on) does not list
    /// them, what pages are that no run lists. What has been dropped since the parent (`MADV_DONTNEED`, unmapped) must
    /// not be listed.
    ///
    /// No page may be given twice, be it with [`Writer::pages`]; nor may a page of the parent be used twice, for two
    /// objects: the second time it must be given as content.
    ///
    /// # Errors
    /// [`WriteError::Parent`] in a full image; [`WriteError::BadRange`], [`WriteError::Overlap`], which leave the image as it
    /// was; [`WriteError::TooManyRecords`] or [`WriteError::Io`].
    pub fn same(
        &mut self,
        object: u64,
        offset: u64,
        bytes: u64,
        parent_object: u64,
    ) -> Result<(), WriteError> {
        if self.parent.is_none() {
            let what = "it has no parent whose pages could be unchanged".to_owned();
            return Err(WriteError::Parent { path: self.label.clone(), what });
        }
        let end = end_of(object, offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let overlap = WriteError::Overlap { object, offset, bytes };
        let used = self.covered_in_parent.entry(parent_object).or_default();
        if !is_free(used, offset, end) || !cover(self.covered.entry(object).or_default(), offset, end) {
            return Err(overlap);
        }
        cover(used, offset, end);
        self.same_pages += bytes / PAGE_SIZE as u64;
        let listed = Listed::Same { parent_object };
        let mut at = offset;
        while at < end {
            // Stretches that touch become one run.
            let grows = |s: &RunEntry| {
                s.object == object && s.listed == listed && s.end() == at && s.npages < u32::MAX
            };
            if !self.same.as_ref().is_some_and(grows) {
                self.flush_same()?;
                self.same = Some(RunEntry { object, offset: at, npages: 0, listed });
            }
            if let Some(same) = &mut self.same {
                let npages = ((end - at) / PAGE_SIZE as u64).min(u64::from(u32::MAX - same.npages)) as u32;
                same.npages += npages;
                at += u64::from(npages) * PAGE_SIZE as u64;
            }
        }
        Ok(())
    }

    /// From now on no more than 1 MiB is on its way while more is given, so that [`Writer::bytes_written`] is nearly all.
    pub fn keep_up(&mut self) {
        self.pipeline.ahead = 1;
    }

    /// Bytes of both files so far, without what is still on its way there.
    pub fn bytes_written(&self) -> u64 {
        let sink = self.pipeline.sink();
        sink.summary.records_bytes + sink.summary.pages_bytes
    }

    /// Completes the image: run index, END frame, fsync of both files and of the directory.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`] if an earlier call failed; [`WriteError::Io`], after which the image must be
    /// thrown away.
    pub fn finish(mut self) -> Result<Summary, WriteError> {
        self.settle()?;
        let mut sink = self.pipeline.sink();
        sink.flush_index()?;
        let end = End {
            records: sink.summary.records,
            runs: sink.summary.runs,
            pages_bytes: sink.summary.pages_bytes,
            digest: sink.digest.value(),
        };
        sink.frame(KIND_END, INTERNAL_VERSION, 0, 0, &end.encode())?;
        let flushed = sink.records.flush();
        sink.written(RECORDS_FILE, flushed)?;
        // Pages first: a complete `records` file vouches for them.
        for (name, file) in [(PAGES_FILE, &sink.pages), (RECORDS_FILE, sink.records.get_ref())] {
            file.sync_all().map_err(|source| WriteError::Io {
                path: self.label.join(name),
                action: "bring to the disk",
                source,
            })?;
        }
        let summary = Summary { same_pages: self.same_pages, ..sink.summary };
        drop(sink);
        crate::store::sync_dir(&File::from(self.dir)).map_err(|source| WriteError::Io {
            path: self.label,
            action: "bring the directory to the disk",
            source,
        })?;
        Ok(summary)
    }

    fn cover_pages(&mut self, object: u64, offset: u64, bytes: usize) -> Result<(), WriteError> {
        let bytes = bytes as u64;
        let end = end_of(object, offset, bytes)?;
        if bytes > 0 && !cover(self.covered.entry(object).or_default(), offset, end) {
            return Err(WriteError::Overlap { object, offset, bytes });
        }
        Ok(())
    }

    /// Finds room in the batch.
    fn place(&mut self, bytes: usize) -> Result<Range<usize>, WriteError> {
        if self.batch.used + bytes > BUFFER_BYTES {
            self.submit()?;
        }
        let at = self.batch.used..self.batch.used + bytes;
        self.batch.used = at.end;
        Ok(at)
    }

    fn flush_same(&mut self) -> Result<(), WriteError> {
        match self.same.take() {
            Some(same) => self.add(Piece::Entry(same)),
            None => Ok(()),
        }
    }

    fn add(&mut self, piece: Piece) -> Result<(), WriteError> {
        if self.batch.add(piece) { self.submit() } else { Ok(()) }
    }

    /// Hands the pieces gathered so far over.
    fn submit(&mut self) -> Result<(), WriteError> {
        if self.batch.pieces.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batch);
        let result = if self.failed { Err(WriteError::Incomplete) } else { self.pipeline.submit(batch) };
        self.failed |= result.is_err();
        result
    }

    /// Waits until all that was given has been written.
    ///
    /// # Errors
    /// As for [`Writer::pages`].
    pub fn settle(&mut self) -> Result<(), WriteError> {
        self.flush_same()?;
        if self.failed {
            return Err(WriteError::Incomplete);
        }
        let batch = std::mem::take(&mut self.batch);
        let result = self.pipeline.wait(batch);
        self.failed |= result.is_err();
        result
    }
}

fn new_header(cpu_features: [u8; 64], compression: Compression, identity: Identity) -> HeaderInfo {
    HeaderInfo {
        version: FORMAT_VERSION,
        arch: HOST_ARCH,
        page_size: PAGE_SIZE as u32,
        compression,
        created_unix_ns: identity.created_unix_ns,
        id: identity.id,
        cpu_features,
    }
}

/// The parent lies beside `dir` and has the id, and the chain with the new image is not too long.
fn check_parent(dir: &OwnedFd, label: &Path, parent: Parent) -> Result<(), WriteError> {
    let wrong = |what: String| WriteError::Parent { path: label.to_owned(), what };
    let mut opened: Option<(OwnedFd, String)> = None;
    let mut next = Some(parent);
    for images in 1.. {
        let Some(parent) = next else { break };
        if images >= MAX_CHAIN_IMAGES {
            return Err(wrong(format!("its chain would have more than {MAX_CHAIN_IMAGES} images")));
        }
        let (child, child_label) = match &opened {
            Some((fd, label)) => (fd, label.clone()),
            None => (dir, label.display().to_string()),
        };
        let (fd, path) =
            reader::open_parent(child, &child_label, parent).map_err(|e| wrong(e.to_string()))?;
        let (header, grandparent) = reader::read_link_at(&fd, &path).map_err(|e| wrong(e.to_string()))?;
        if header.id != parent.id {
            return Err(wrong(format!("{path} is another checkpoint than the one it is built on")));
        }
        next = grandparent;
        opened = Some((fd, path));
    }
    Ok(())
}

/// Where a stretch of whole pages ends.
fn end_of(object: u64, offset: u64, bytes: u64) -> Result<u64, WriteError> {
    let page = PAGE_SIZE as u64;
    offset
        .checked_add(bytes)
        .filter(|_| offset.is_multiple_of(page) && bytes.is_multiple_of(page))
        .ok_or(WriteError::BadRange { object, offset, bytes })
}

/// No part of `start..end` is covered.
fn is_free(map: &BTreeMap<u64, u64>, start: u64, end: u64) -> bool {
    map.range(..end).next_back().is_none_or(|(_, before_end)| *before_end <= start)
}

/// Marks `start..end` as covered; false if a part of it was.
fn cover(map: &mut BTreeMap<u64, u64>, start: u64, end: u64) -> bool {
    if !is_free(map, start, end) {
        return false;
    }
    let mut joined = (start, end);
    if let Some((&before, &before_end)) = map.range(..end).next_back()
        && before_end == start
    {
        joined.0 = before;
    }
    if let Some(after_end) = map.remove(&end) {
        joined.1 = after_end;
    }
    map.insert(joined.0, joined.1);
    true
}
