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
    self, Digest, End, FIRST_RESERVED_KIND, FORMAT_VERSION, Frame, HOST_ARCH, HeaderInfo, INTERNAL_VERSION,
    KIND_END, KIND_RUNS, MAX_BODY_BYTES, MAX_RECORDS_FILE_BYTES, MAX_RUN_PAGES, MAX_RUNS_PER_FRAME,
    PAGE_SIZE, PAGES_FILE, RECORDS_FILE, RUN_BYTES, RunEntry,
};

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
    covered: HashMap<u64, BTreeMap<u64, u64>>,
    summary: Summary,
    failed: bool,
}

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
            covered: HashMap::new(),
            summary: Summary::default(),
            failed: false,
        };
        writer.put_records(&header)?;
        writer.put_pages(&format::encode_pages_header(&info), 0)?;
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
        let page = PAGE_SIZE as u64;
        let end = offset
            .checked_add(bytes as u64)
            .filter(|_| offset.is_multiple_of(page) && (bytes as u64).is_multiple_of(page))
            .ok_or(WriteError::BadRange { object, offset, bytes })?;
        if bytes == 0 {
            return Ok(());
        }
        if !cover(self.covered.entry(object).or_default(), offset, end) {
            return Err(WriteError::Overlap { object, offset, bytes });
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
                    self.index_run(&RunEntry {
                        object,
                        offset: run_offset,
                        npages,
                        zero: true,
                        position: 0,
                        stored: 0,
                        encoding: Compression::None,
                        checksum: 0,
                    })?;
                }
            }
            start = stop;
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
        self.index_run(&RunEntry {
            object,
            offset,
            npages,
            zero: false,
            position,
            stored,
            encoding,
            checksum,
        })
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
        let result = self.frame(KIND_RUNS, INTERNAL_VERSION, 0, 0, &index);
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

/// Marks `start..end` as covered; false if a part of it was.
fn cover(map: &mut BTreeMap<u64, u64>, start: u64, end: u64) -> bool {
    let mut joined = (start, end);
    if let Some((&before, &before_end)) = map.range(..end).next_back() {
        if before_end > start {
            return false;
        }
        if before_end == start {
            joined.0 = before;
        }
    }
    if let Some(after_end) = map.remove(&end) {
        joined.1 = after_end;
    }
    map.insert(joined.0, joined.1);
    true
}
