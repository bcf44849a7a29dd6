// SPDX-License-Identifier: MIT OR Apache-2.0
//! How page content gets into an image: reading it, looking for zero pages, packing and checksums are the work of several threads.
//!
//! Content comes in batches of up to 1 MiB. A worker takes one, reads what has yet to be read, prepares it, and writes it when
//! it is its turn, while the others read and prepare the ones behind it. So the image is the same as if there were one thread, and
//! what is written is still in the cache of the processor that has read it.
//! Memory is bounded: each worker has one buffer, and of those of the pool, whoever wants one waits until one is free.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, IoSlice, Write};
use std::ops::{Deref, DerefMut, Range};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::compression::{Compression, Packer};
use crate::error::WriteError;
use crate::format::{
    self, Digest, Frame, INCREMENTAL_RUNS_VERSION, INTERNAL_VERSION, KIND_RUNS, Listed,
    MAX_RECORDS_FILE_BYTES, MAX_RUN_PAGES, MAX_RUNS_PER_FRAME, PAGE_SIZE, PAGES_FILE, RECORDS_FILE,
    RUN_BYTES, RunEntry,
};
use crate::writer::{Summary, ZeroPages};

/// Length of a buffer in bytes: that of the longest run.
pub(crate) const BUFFER_BYTES: usize = MAX_RUN_PAGES as usize * PAGE_SIZE;
/// Pieces in a batch, so that many small ones do not need much memory.
const MAX_PIECES: usize = 1024;
/// Origins in a batch: each may hold a descriptor.
const MAX_ORIGINS: usize = 8;
/// Batches on their way.
const MAX_AHEAD: u64 = 8;
/// More threads than these would need more memory than a dump is to take.
const MAX_WORKERS: usize = 8;
/// Buffers that a caller may hold while others are at work.
pub(crate) const CALLER_BUFFERS: usize = 4;
static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The buffers of a writer. Clones share them.
#[derive(Clone, Debug)]
pub struct BufferPool(Arc<PoolInner>);

#[derive(Debug)]
struct PoolInner {
    state: Mutex<PoolState>,
    freed: Condvar,
}

#[derive(Debug)]
struct PoolState {
    free: Vec<Box<[u8]>>,
    /// How many more may be made.
    to_make: usize,
}

/// Memory for page content, 1 MiB long at first. It goes back to its pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Box<[u8]>,
    len: usize,
    pool: BufferPool,
}

impl BufferPool {
    fn new(buffers: usize) -> Self {
        let state = PoolState { free: Vec::new(), to_make: buffers };
        BufferPool(Arc::new(PoolInner { state: Mutex::new(state), freed: Condvar::new() }))
    }

    /// A buffer of 1 MiB with unspecified content; waits until there is one. Writing frees those that were handed over;
    /// so a thread, or all threads together, must not hold more than four.
    pub fn take(&self) -> Buffer {
        let mut state = lock(&self.0.state);
        loop {
            let bytes = match state.free.pop() {
                Some(bytes) => bytes,
                None if state.to_make > 0 => {
                    state.to_make -= 1;
                    drop(state);
                    vec![0; BUFFER_BYTES].into_boxed_slice()
                }
                None => {
                    state = self.0.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            return Buffer { bytes, len: BUFFER_BYTES, pool: self.clone() };
        }
    }
}

impl Buffer {
    /// Its greatest length in bytes.
    pub const CAPACITY: usize = BUFFER_BYTES;

    /// Shortens (or, up to 1 MiB, lengthens) it to `len` bytes.
    ///
    /// # Panics
    /// If `len` is more than 1 MiB.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.bytes.len(), "a buffer has 1 MiB");
        self.len = len;
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        lock(&self.pool.0.state).free.push(bytes);
        self.pool.0.freed.notify_one();
    }
}

/// Something that content is read from, by any thread, when there is time for it.
pub trait Origin: Send + Sync + fmt::Debug {
    /// Fills `buf` from `at`, which is an address or an offset, as its owner sees it.
    ///
    /// # Errors
    /// Any error ends the image; it comes back as [`WriteError::Origin`].
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Something to be listed, in the order of the calls.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Content in the batch's buffer, or to be read to there.
    Pages {
        object: u64,
        offset: u64,
        at: Range<usize>,
        zeros: ZeroPages,
        origin: Option<(Arc<dyn Origin>, u64)>,
    },
    /// A SAME run.
    Entry(RunEntry),
}

impl Piece {
    fn origin(&self) -> Option<&Arc<dyn Origin>> {
        match self {
            Piece::Pages { origin: Some((origin, _)), .. } => Some(origin),
            _ => None,
        }
    }
}

/// Pieces whose content is in one buffer.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) pieces: Vec<Piece>,
    /// None: all is read from elsewhere, into the worker's.
    pub(crate) buffer: Option<Buffer>,
    pub(crate) used: usize,
    origins: usize,
}

impl Batch {
    /// Adds a piece; true if the batch is full then.
    pub(crate) fn add(&mut self, piece: Piece) -> bool {
        if let Some(origin) = piece.origin()
            && !self.pieces.last().and_then(Piece::origin).is_some_and(|last| Arc::ptr_eq(last, origin))
        {
            self.origins += 1;
        }
        self.pieces.push(piece);
        self.pieces.len() >= MAX_PIECES || self.origins >= MAX_ORIGINS
    }
}

/// A batch ready to be written.
struct Prepared {
    /// All but the positions is right.
    entries: Vec<RunEntry>,
    zero_pages: u64,
    /// What goes into `pages`, one behind the other, with paddings: in the buffer, or of what is packed.
    stretches: Vec<Range<usize>>,
}

/// Memory of a worker, made when it is needed.
#[derive(Default)]
struct Room {
    buffer: Vec<u8>,
    packed: Vec<u8>,
}

/// Reads what has yet to be read.
fn fill(pieces: &[Piece], buffer: &mut [u8]) -> Result<(), WriteError> {
    for piece in pieces {
        if let Piece::Pages { at, origin: Some((origin, from)), .. } = piece {
            origin.read(*from, &mut buffer[at.clone()]).map_err(WriteError::Origin)?;
        }
    }
    Ok(())
}

/// Finds runs, packs them and computes checksums.
fn prepare(pieces: &[Piece], buffer: &[u8], packer: &mut Packer, packed: &mut Vec<u8>) -> Prepared {
    let mut out = Prepared { entries: Vec::new(), zero_pages: 0, stretches: Vec::new() };
    let packs = packer.compression() != Compression::None;
    packed.clear();
    for piece in pieces {
        let (object, offset, at, zeros) = match piece {
            Piece::Entry(entry) => {
                out.entries.push(*entry);
                continue;
            }
            Piece::Pages { object, offset, at, zeros, .. } => (*object, *offset, at.clone(), *zeros),
        };
        let data = &buffer[at.clone()];
        // Runs are maximal stretches of pages of one sort; a piece is not longer than a run may be.
        let mut start = 0;
        while start < data.len() {
            let zero = data[start..start + PAGE_SIZE] == ZERO_PAGE;
            let mut stop = start + PAGE_SIZE;
            while stop < data.len() && (data[stop..stop + PAGE_SIZE] == ZERO_PAGE) == zero {
                stop += PAGE_SIZE;
            }
            let npages = ((stop - start) / PAGE_SIZE) as u32;
            let entry = |listed| RunEntry { object, offset: offset + start as u64, npages, listed };
            if !zero {
                let listed = if packs {
                    pack(&data[start..stop], packer, packed)
                } else {
                    add_stretch(&mut out.stretches, at.start + start..at.start + stop);
                    stored(&data[start..stop], Compression::None, 0)
                };
                out.entries.push(entry(listed));
            } else {
                out.zero_pages += u64::from(npages);
                if zeros == ZeroPages::Record {
                    out.entries.push(entry(Listed::Zero));
                }
            }
            start = stop;
        }
    }
    if packs {
        out.stretches.push(0..packed.len());
    }
    out
}

fn add_stretch(stretches: &mut Vec<Range<usize>>, next: Range<usize>) {
    match stretches.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => stretches.push(next),
    }
}

/// Appends the packed form of a run, or the run itself where that is not longer, and padding.
fn pack(raw: &[u8], packer: &mut Packer, out: &mut Vec<u8>) -> Listed {
    let compression = packer.compression();
    let (bytes, encoding) = match packer.pack(raw) {
        Some(packed) => (packed, compression),
        None => (raw, Compression::None),
    };
    let pad = format::padding(bytes.len() as u64);
    out.extend_from_slice(bytes);
    out.extend_from_slice(&[0; 8][..pad]);
    stored(bytes, encoding, pad)
}

fn stored(bytes: &[u8], encoding: Compression, pad: usize) -> Listed {
    let checksum = format::run_checksum(bytes, pad);
    Listed::Data { position: 0, stored: bytes.len() as u32, encoding, checksum }
}

/// The files, and all that depends on the order of what is written.
pub(crate) struct Sink {
    pub(crate) label: PathBuf,
    pub(crate) records: BufWriter<File>,
    pub(crate) pages: File,
    pub(crate) digest: Digest,
    pub(crate) index: Vec<u8>,
    pub(crate) incremental: bool,
    pub(crate) summary: Summary,
    pub(crate) failed: bool,
}

impl Sink {
    fn put(&mut self, prepared: &Prepared, content: &[u8]) -> Result<(), WriteError> {
        let mut slices: Vec<IoSlice<'_>> =
            prepared.stretches.iter().map(|at| IoSlice::new(&content[at.clone()])).collect();
        let mut position = self.summary.pages_bytes;
        self.put_pages(&mut slices)?;
        self.summary.zero_pages += prepared.zero_pages;
        for entry in &prepared.entries {
            let mut entry = *entry;
            let padded = entry.stored_padded();
            if let Listed::Data { position: at, .. } = &mut entry.listed {
                *at = position;
                position += padded;
                self.summary.data_pages += u64::from(entry.npages);
            }
            self.index_run(&entry)?;
        }
        Ok(())
    }

    fn index_run(&mut self, entry: &RunEntry) -> Result<(), WriteError> {
        self.summary.runs += 1;
        self.index.extend_from_slice(&entry.encode());
        if self.index.len() >= MAX_RUNS_PER_FRAME * RUN_BYTES { self.flush_index() } else { Ok(()) }
    }

    pub(crate) fn flush_index(&mut self) -> Result<(), WriteError> {
        if self.index.is_empty() {
            return Ok(());
        }
        let mut index = std::mem::take(&mut self.index);
        let version = if self.incremental { INCREMENTAL_RUNS_VERSION } else { INTERNAL_VERSION };
        let result = self.frame(KIND_RUNS, version, 0, 0, &index);
        index.clear();
        self.index = index;
        result
    }

    pub(crate) fn frame(
        &mut self,
        kind: u16,
        version: u16,
        owner: u64,
        id: u64,
        body: &[u8],
    ) -> Result<(), WriteError> {
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

    pub(crate) fn put_records(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if self.failed {
            return Err(WriteError::Incomplete);
        }
        let written = self.records.write_all(bytes);
        self.summary.records_bytes += bytes.len() as u64;
        self.written(RECORDS_FILE, written)
    }

    pub(crate) fn put_pages(&mut self, mut slices: &mut [IoSlice<'_>]) -> Result<(), WriteError> {
        if self.failed {
            return Err(WriteError::Incomplete);
        }
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut left = total;
        let mut written = Ok(());
        while left > 0 {
            match self.pages.write_vectored(slices) {
                Ok(0) => written = Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    left -= n;
                    IoSlice::advance_slices(&mut slices, n);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => written = Err(e),
            }
            break;
        }
        self.summary.pages_bytes += total as u64;
        self.written(PAGES_FILE, written)
    }

    pub(crate) fn written(&mut self, name: &str, result: io::Result<()>) -> Result<(), WriteError> {
        result.map_err(|source| {
            self.failed = true;
            WriteError::Io { path: self.label.join(name), action: "write", source }
        })
    }
}

/// The workers' common state.
struct Shared {
    queue: Mutex<Queue>,
    /// Something was put into the queue, or it was closed.
    work: Condvar,
    /// A batch was written.
    progress: Condvar,
    sink: Mutex<Sink>,
}

struct Queue {
    batches: VecDeque<(u64, Batch)>,
    closed: bool,
    submitted: u64,
    /// Number of the batch that is to be written next: so many were written.
    next: u64,
    /// A batch could not be written: the image is lost.
    failed: bool,
    error: Option<WriteError>,
}

impl Shared {
    fn work(&self, mut packer: Packer) {
        let mut room = Room::default();
        let mut queue = lock(&self.queue);
        loop {
            let Some((number, batch)) = queue.batches.pop_front() else {
                if queue.closed {
                    return;
                }
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let lost = queue.failed;
            drop(queue);
            let turn = || {
                let mut queue = lock(&self.queue);
                while queue.next != number {
                    queue = self.progress.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let result = if lost {
                Err(WriteError::Incomplete)
            } else {
                self.put(batch, &mut packer, &mut room, turn)
            };
            // Also of one that has failed before its turn.
            turn();
            queue = lock(&self.queue);
            queue.next += 1;
            if let Err(e) = result {
                queue.failed = true;
                queue.error.get_or_insert(e);
            }
            self.progress.notify_all();
        }
    }

    /// Prepares a batch, and writes it after its `turn` has come.
    fn put(
        &self,
        mut batch: Batch,
        packer: &mut Packer,
        room: &mut Room,
        turn: impl FnOnce(),
    ) -> Result<(), WriteError> {
        if batch.buffer.is_none() && batch.used > room.buffer.len() {
            room.buffer = vec![0; BUFFER_BYTES];
        }
        let buffer: &mut [u8] = match &mut batch.buffer {
            Some(buffer) => buffer,
            None => &mut room.buffer,
        };
        fill(&batch.pieces, buffer)?;
        let prepared = prepare(&batch.pieces, buffer, packer, &mut room.packed);
        let content = if packer.compression() == Compression::None { &*buffer } else { &room.packed };
        turn();
        lock(&self.sink).put(&prepared, content)
    }
}

/// The workers and what they write to.
pub(crate) struct Pipeline {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Not used by a thread yet.
    packers: Vec<Packer>,
    /// Batches that may be on their way.
    pub(crate) ahead: u64,
    pub(crate) pool: BufferPool,
}

impl Pipeline {
    pub(crate) fn new(sink: Sink, compression: Compression) -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // Without packing, one writes and one reads: no more is to be had of one file.
        let workers = if compression == Compression::None { cores.min(2) } else { cores.min(MAX_WORKERS) };
        let packers = (0..workers).map(|_| Packer::new(compression)).collect::<io::Result<Vec<_>>>()?;
        let queue = Queue {
            batches: VecDeque::new(),
            closed: false,
            submitted: 0,
            next: 0,
            failed: false,
            error: None,
        };
        let shared = Shared {
            queue: Mutex::new(queue),
            work: Condvar::new(),
            progress: Condvar::new(),
            sink: Mutex::new(sink),
        };
        let pool = BufferPool::new(workers + 2 + CALLER_BUFFERS);
        Ok(Pipeline { shared: Arc::new(shared), threads: Vec::new(), packers, ahead: MAX_AHEAD, pool })
    }

    /// The files; their content is that of all batches only after [`Pipeline::wait`].
    pub(crate) fn sink(&self) -> MutexGuard<'_, Sink> {
        lock(&self.shared.sink)
    }

    /// Hands a batch over. Errors of earlier ones show here or in [`Pipeline::wait`].
    pub(crate) fn submit(&mut self, batch: Batch) -> Result<(), WriteError> {
        for packer in std::mem::take(&mut self.packers) {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new()
                .name("ckpt-writer".to_owned())
                .spawn(move || shared.work(packer))
                .map_err(|source| WriteError::Io {
                    path: self.sink().label.clone(),
                    action: "start a thread to write it",
                    source,
                });
            match thread {
                Ok(thread) => self.threads.push(thread),
                // One is enough.
                Err(_) if !self.threads.is_empty() => {}
                Err(e) => return Err(e),
            }
        }
        let mut queue = lock(&self.shared.queue);
        // Those whose content is not in a buffer of the pool are not bounded by it.
        while queue.submitted - queue.next >= self.ahead {
            queue = self.shared.progress.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let number = queue.submitted;
        queue.submitted += 1;
        queue.batches.push_back((number, batch));
        let error = queue.error.take();
        drop(queue);
        self.shared.work.notify_one();
        error.map_or(Ok(()), Err)
    }

    /// Waits until everything has been written, `last` included.
    pub(crate) fn wait(&mut self, last: Batch) -> Result<(), WriteError> {
        if !last.pieces.is_empty() {
            match self.packers.first_mut() {
                // Nothing has been handed over, and so little is not worth a thread.
                Some(packer) => {
                    return self.shared.put(last, packer, &mut Room::default(), || ());
                }
                None => self.submit(last)?,
            }
        }
        let mut queue = lock(&self.shared.queue);
        while queue.next < queue.submitted {
            queue = self.shared.progress.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.error.take().map_or(Ok(()), Err)
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let mut queue = lock(&self.shared.queue);
        queue.closed = true;
        // Of an image that is given up, nothing more need be written.
        let dropped = std::mem::take(&mut queue.batches);
        drop(queue);
        drop(dropped);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}
