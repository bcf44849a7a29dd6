// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes an image: records and page runs, in any order, then the run index and the END frame.
//!
//! Memory use is small and does not grow with the amount of page content, except for one list entry per
//! contiguous stretch of an object, kept to notice pages that are written twice.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::compression::{Compression, Packer};
use crate::error::WriteError;
use crate::format::{
    self, Digest, End, FIRST_RESERVED_KIND, FORMAT_VERSION, Frame, HOST_ARCH, HeaderInfo,
    INCREMENTAL_RUNS_VERSION, INTERNAL_VERSION, KIND_END, KIND_PARENT, KIND_RUNS, Listed, MAX_BODY_BYTES,
    MAX_CHAIN_IMAGES, MAX_RECORDS_FILE_BYTES, MAX_RUN_PAGES, MAX_RUNS_PER_FRAME, PAGE_SIZE, PAGES_FILE,
    Parent, RECORDS_FILE, RUN_BYTES, RunEntry,
};
use crate::reader;

/// Small runs are gathered to writes of this size.
const BUFFER_BYTES: usize = 1 << 20;
static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

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
pub struct Writer {
    dir: OwnedFd,
    label: PathBuf,
    records: BufWriter<File>,
    pages: BufWriter<File>,
    packer: Option<Packer>,
    compression: Compression,
    digest: Digest,
    index: Vec<u8>,
    /// A SAME run that may still grow.
    same: Option<RunEntry>,
    covered: Covered,
    /// Pages of the parent's objects that are in use.
    covered_in_parent: Covered,
    parent: Option<Parent>,
    summary: Summary,
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
        let mut writer = Writer::start(dir, label, cpu_features, compression, identity, Some(parent))?;
        let flushed = writer.records.flush();
        writer.written(RECORDS_FILE, flushed)?;
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
        Writer::start(dir, label, cpu_features, compression, identity, None)
    }

    fn start(
        dir: OwnedFd,
        label: &Path,
        cpu_features: [u8; 64],
        compression: Compression,
        identity: Identity,
        parent: Option<Parent>,
    ) -> Result<Writer, WriteError> {
        let create = |name: &str| {
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
            openat(dir.as_fd(), name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
                .map(|fd| BufWriter::with_capacity(BUFFER_BYTES, File::from(fd)))
                .map_err(|errno| WriteError::Io {
                    path: label.join(name),
                    action: "create the file",
                    source: errno.into(),
                })
        };
        let records = create(RECORDS_FILE)?;
        let pages = create(PAGES_FILE)?;
        let packer = Packer::new(compression).map_err(|source| WriteError::Io {
            path: label.to_owned(),
            action: "set up compression",
            source,
        })?;
        let info = HeaderInfo {
            version: FORMAT_VERSION,
            arch: HOST_ARCH,
            page_size: PAGE_SIZE as u32,
            compression,
            created_unix_ns: identity.created_unix_ns,
            id: identity.id,
            cpu_features,
        };
        let header = format::encode_header(&info);
        let mut writer = Writer {
            dir,
            label: label.to_owned(),
            records,
            pages,
            packer: Some(packer),
            compression,
            digest: Digest::new(&header),
            index: Vec::new(),
            same: None,
            covered: HashMap::new(),
            covered_in_parent: HashMap::new(),
            parent,
            summary: Summary::default(),
            failed: false,
        };
        writer.put_records(&header)?;
        writer.put_pages(&format::encode_pages_header(&info), 0)?;
        if let Some(parent) = parent {
            writer.frame(KIND_PARENT, INTERNAL_VERSION, 0, 0, &parent.encode())?;
        }
        Ok(writer)
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
        self.summary.records += 1;
        self.frame(kind, version, owner, id, body)
    }

    /// Adds content of `object` from byte `offset` on: whole pages, none of them given before. Runs are cut at
    /// zero pages and at 1 MiB, so data in pieces of 1 MiB is stored best.
    ///
    /// # Errors
    /// [`WriteError::BadRange`], [`WriteError::Overlap`], [`WriteError::TooManyRecords`] or [`WriteError::Io`].
    pub fn pages(
        &mut self,
        object: u64,
        offset: u64,
        data: &[u8],
        zeros: ZeroPages,
    ) -> Result<(), WriteError> {
        let bytes = data.len();
        let end = end_of(object, offset, bytes as u64)?;
        if bytes == 0 {
            return Ok(());
        }
        if !cover(self.covered.entry(object).or_default(), offset, end) {
            return Err(WriteError::Overlap { object, offset, bytes: bytes as u64 });
        }
        // Runs are maximal stretches of pages of one sort, cut to the size limit.
        let limit = MAX_RUN_PAGES as usize * PAGE_SIZE;
        let mut start = 0;
        while start < bytes {
            let zero = data[start..start + PAGE_SIZE] == ZERO_PAGE;
            let mut stop = start + PAGE_SIZE;
            while stop < bytes && stop - start < limit && (data[stop..stop + PAGE_SIZE] == ZERO_PAGE) == zero
            {
                stop += PAGE_SIZE;
            }
            let npages = ((stop - start) / PAGE_SIZE) as u32;
            let run_offset = offset + start as u64;
            if !zero {
                self.data_run(object, run_offset, npages, &data[start..stop])?;
            } else {
                self.summary.zero_pages += u64::from(npages);
                if zeros == ZeroPages::Record {
                    self.index_run(&RunEntry { object, offset: run_offset, npages, listed: Listed::Zero })?;
                }
            }
            start = stop;
        }
        Ok(())
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
        self.summary.same_pages += bytes / PAGE_SIZE as u64;
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

    /// Bytes of both files so far, buffered ones included.
    pub fn bytes_written(&self) -> u64 {
        self.summary.records_bytes + self.summary.pages_bytes
    }

    /// Completes the image: run index, END frame, fsync of both files and of the directory.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`] if an earlier call failed; [`WriteError::Io`], after which the image must be
    /// thrown away.
    pub fn finish(mut self) -> Result<Summary, WriteError> {
        self.flush_same()?;
        self.flush_index()?;
        let end = End {
            records: self.summary.records,
            runs: self.summary.runs,
            pages_bytes: self.summary.pages_bytes,
            digest: self.digest.value(),
        };
        self.frame(KIND_END, INTERNAL_VERSION, 0, 0, &end.encode())?;
        if self.failed {
            return Err(WriteError::Incomplete);
        }
        let Writer { dir, label, mut records, mut pages, summary, .. } = self;
        // Pages first: a complete `records` file vouches for them.
        for (name, file) in [(PAGES_FILE, &mut pages), (RECORDS_FILE, &mut records)] {
            let io = |action| {
                let path = label.join(name);
                move |source| WriteError::Io { path, action, source }
            };
            file.flush().map_err(io("write"))?;
            file.get_ref().sync_all().map_err(io("bring to the disk"))?;
        }
        crate::store::sync_dir(&File::from(dir)).map_err(|source| WriteError::Io {
            path: label,
            action: "bring the directory to the disk",
            source,
        })?;
        Ok(summary)
    }

    fn data_run(&mut self, object: u64, offset: u64, npages: u32, raw: &[u8]) -> Result<(), WriteError> {
        // Taken out for the call, because the packed bytes borrow from it.
        let mut packer = self.packer.take();
        let packed = packer.as_mut().and_then(|packer| packer.pack(raw));
        let encoding = if packed.is_some() { self.compression } else { Compression::None };
        let result = self.put_run(object, offset, npages, encoding, packed.unwrap_or(raw));
        self.packer = packer;
        self.summary.data_pages += u64::from(npages);
        result
    }

    fn put_run(
        &mut self,
        object: u64,
        offset: u64,
        npages: u32,
        encoding: Compression,
        stored: &[u8],
    ) -> Result<(), WriteError> {
        let position = self.summary.pages_bytes;
        let pad = format::padding(stored.len() as u64);
        let checksum = format::run_checksum(stored, pad);
        self.put_pages(stored, pad)?;
        let stored = stored.len() as u32;
        let listed = Listed::Data { position, stored, encoding, checksum };
        self.index_run(&RunEntry { object, offset, npages, listed })
    }

    fn flush_same(&mut self) -> Result<(), WriteError> {
        match self.same.take() {
            Some(same) => self.index_run(&same),
            None => Ok(()),
        }
    }

    fn index_run(&mut self, entry: &RunEntry) -> Result<(), WriteError> {
        self.summary.runs += 1;
        self.index.extend_from_slice(&entry.encode());
        if self.index.len() >= MAX_RUNS_PER_FRAME * RUN_BYTES { self.flush_index() } else { Ok(()) }
    }

    fn flush_index(&mut self) -> Result<(), WriteError> {
        if self.index.is_empty() {
            return Ok(());
        }
        let mut index = std::mem::take(&mut self.index);
        let version = if self.parent.is_some() { INCREMENTAL_RUNS_VERSION } else { INTERNAL_VERSION };
        let result = self.frame(KIND_RUNS, version, 0, 0, &index);
        index.clear();
        self.index = index;
        result
    }

    fn frame(&mut self, kind: u16, version: u16, owner: u64, id: u64, body: &[u8]) -> Result<(), WriteError> {
        let frame = Frame { kind, version, owner, id, body_len: body.len() as u32, checksum: 0 };
        if self.summary.records_bytes + frame.total_bytes() > MAX_RECORDS_FILE_BYTES {
            self.failed = true;
            return Err(WriteError::TooManyRecords { limit: MAX_RECORDS_FILE_BYTES });
        }
        let (header, checksum) = format::encode_frame(&frame, body);
        self.digest.add(checksum);
        self.put_records(&header)?;
        self.put_records(body)?;
        self.put_records(&[0; 8][..format::padding(body.len() as u64)])
    }

    fn put_records(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if self.failed {
            return Err(WriteError::Incomplete);
        }
        let written = self.records.write_all(bytes);
        self.summary.records_bytes += bytes.len() as u64;
        self.written(RECORDS_FILE, written)
    }

    fn put_pages(&mut self, bytes: &[u8], pad: usize) -> Result<(), WriteError> {
        if self.failed {
            return Err(WriteError::Incomplete);
        }
        let written = self.pages.write_all(bytes).and_then(|()| self.pages.write_all(&[0; 8][..pad]));
        self.summary.pages_bytes += (bytes.len() + pad) as u64;
        self.written(PAGES_FILE, written)
    }

    fn written(&mut self, name: &str, result: io::Result<()>) -> Result<(), WriteError> {
        result.map_err(|source| {
            self.failed = true;
            WriteError::Io { path: self.label.join(name), action: "write", source }
        })
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
