// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads and verifies images, which are hostile input.
//!
//! [`Reader::open`] reads and checks the whole `records` file; page content is read and checked run by run.
//! Memory is taken only for bytes that are really in the file, so a small file cannot ask for much.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::compression::{self, Compression};
use crate::error::ReadError;
use crate::format::{
    self, Digest, END_BYTES, End, FIRST_RESERVED_KIND, FORMAT_VERSION, FRAME_BYTES, HEADER_BYTES,
    HeaderFault, HeaderInfo, INTERNAL_VERSION, KIND_END, KIND_RUNS, MAX_RECORDS_FILE_BYTES,
    MAX_RUNS_PER_FRAME, PAGES_FILE, PAGES_HEADER_BYTES, RECORDS_FILE, RUN_BYTES, RunEntry,
};

/// A record, its body still encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it describes; numbers are assigned by the engine.
    pub kind: u16,
    /// Version of the body's layout.
    pub version: u16,
    /// Whom it belongs to; the meaning is the kind's.
    pub owner: u64,
    /// Which of the owner's; the meaning is the kind's.
    pub id: u64,
    /// The encoded body, see [`codec`](crate::codec).
    pub body: Vec<u8>,
}

/// What a run's pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Stored content.
    Data,
    /// All zero, nothing stored.
    Zero,
}

/// Consecutive pages of an object, at most 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The object.
    pub object: u64,
    /// Byte offset inside the object, a multiple of the page size.
    pub offset: u64,
    /// Length inside the object, in bytes.
    pub bytes: u64,
    /// Whether there is content.
    pub kind: RunKind,
    position: u64,
    checksum: u64,
    stored: u32,
    encoding: Compression,
}

impl Run {
    /// Where the run lies in the file `pages`, in bytes; only for data that is stored unpacked.
    pub fn raw_position(&self) -> Option<u64> {
        (self.kind == RunKind::Data && self.encoding == Compression::None).then_some(self.position)
    }

    /// Bytes that the run takes in the file `pages`, padding included.
    pub fn stored_bytes(&self) -> u64 {
        u64::from(self.stored) + format::padding(u64::from(self.stored)) as u64
    }

    fn from_entry(entry: &RunEntry) -> Self {
        Run {
            object: entry.object,
            offset: entry.offset,
            bytes: entry.raw_bytes() as u64,
            kind: if entry.zero { RunKind::Zero } else { RunKind::Data },
            position: entry.position,
            checksum: entry.checksum,
            stored: entry.stored,
            encoding: entry.encoding,
        }
    }
}

/// An object that has runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object<'a> {
    /// Its number.
    pub object: u64,
    /// Its runs by offset.
    pub runs: &'a [Run],
}

/// What [`Reader::verify`] has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// Records.
    pub records: u64,
    /// Page runs.
    pub runs: u64,
    /// Pages with stored content.
    pub data_pages: u64,
    /// Pages listed as zero.
    pub zero_pages: u64,
    /// Bytes read and found right, of both files.
    pub bytes: u64,
}

/// An open image whose `records` file was found right. Methods take `&self`: threads may share it.
#[derive(Debug)]
pub struct Reader {
    header: HeaderInfo,
    records: Vec<Record>,
    runs: Vec<Run>,
    records_file: File,
    pages_file: File,
    records_path: String,
    pages_path: String,
    records_bytes: u64,
    pages_bytes: u64,
}

/// The header of the image in `dir`, without reading anything else.
///
/// # Errors
/// As for [`Reader::open`].
pub fn read_header(dir: &Path) -> Result<HeaderInfo, ReadError> {
    let label = dir.display().to_string();
    let fd = open_dir(dir, &label)?;
    let path = format!("{label}/{RECORDS_FILE}");
    let (mut file, size) = open_file(&fd, RECORDS_FILE, &path)?;
    Ok(take_header(&mut file, &path, size)?.1)
}

impl Reader {
    /// Opens the image in `dir`; reads and checks all of `records` and the header and size of `pages`.
    ///
    /// # Errors
    /// Every [`ReadError`]; the image is not usable then.
    pub fn open(dir: &Path) -> Result<Reader, ReadError> {
        let label = dir.display().to_string();
        let fd = open_dir(dir, &label)?;
        Reader::open_at(fd, &label)
    }

    /// As [`Reader::open`], for a directory already open (from another mount namespace, for example) that
    /// messages call `label`. Both files are opened here, the directory is not used afterwards.
    ///
    /// # Errors
    /// As for [`Reader::open`].
    pub fn open_at(dir: OwnedFd, label: &str) -> Result<Reader, ReadError> {
        let records_path = format!("{label}/{RECORDS_FILE}");
        let pages_path = format!("{label}/{PAGES_FILE}");
        let (records_file, records_bytes) = open_file(&dir, RECORDS_FILE, &records_path)?;
        let (pages_file, pages_bytes) = open_file(&dir, PAGES_FILE, &pages_path)?;
        let parsed = parse_records(&records_file, &records_path, records_bytes)?;
        let reader = Reader {
            header: parsed.header,
            records: parsed.records,
            runs: parsed.runs,
            records_file,
            pages_file,
            records_path,
            pages_path,
            records_bytes,
            pages_bytes: parsed.pages_bytes,
        };
        reader.check_pages_header()?;
        reader.check_pages_size(pages_bytes)?;
        Ok(reader)
    }

    /// The header.
    pub fn header(&self) -> &HeaderInfo {
        &self.header
    }

    /// All records in the order they were written.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The runs of `object` by offset; empty if it has none.
    pub fn runs(&self, object: u64) -> &[Run] {
        let from = self.runs.partition_point(|run| run.object < object);
        let to = self.runs.partition_point(|run| run.object <= object);
        &self.runs[from..to]
    }

    /// All objects that have runs, by number.
    pub fn objects(&self) -> impl Iterator<Item = Object<'_>> {
        self.runs.chunk_by(|a, b| a.object == b.object).map(|runs| Object { object: runs[0].object, runs })
    }

    /// Size of both files in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.records_bytes + self.pages_bytes
    }

    /// The open file `pages`, for filling memory from it directly at [`Run::raw_position`]; whoever does so
    /// goes without the checksum.
    pub fn pages_file(&self) -> &File {
        &self.pages_file
    }

    /// Reads the content of `run` into `buf`, which becomes exactly [`Run::bytes`] long. Keep `buf` from call
    /// to call. Its content after an error is unspecified.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] when checksum, padding or packing are wrong; [`ReadError::Io`].
    pub fn read_run(&self, run: &Run, buf: &mut Vec<u8>) -> Result<(), ReadError> {
        let raw = run.bytes as usize;
        if run.kind == RunKind::Zero {
            buf.clear();
            buf.resize(raw, 0);
            return Ok(());
        }
        let damaged = |offset: u64, what: String| ReadError::Damaged {
            path: self.pages_path.clone(),
            offset: run.position + offset,
            what: format!("{what} (object {:#x}, offset {:#x})", run.object, run.offset),
        };
        let (stored, padded) = (run.stored as usize, run.stored_bytes() as usize);
        // Packed bytes are read behind the place for the raw ones, so that one buffer does for both.
        let at = if run.encoding == Compression::None { 0 } else { raw };
        buf.resize((at + padded).max(raw), 0);
        let (head, tail) = buf.split_at_mut(at);
        self.pages_file
            .read_exact_at(&mut tail[..padded], run.position)
            .map_err(|e| short(e, &self.pages_path, run.position))?;
        if let Some(pad) = tail[stored..padded].iter().position(|byte| *byte != 0) {
            return Err(damaged((stored + pad) as u64, "padding is not zero".to_owned()));
        }
        if format::run_checksum(&tail[..stored], padded - stored) != run.checksum {
            return Err(damaged(0, "the checksum of the pages is wrong".to_owned()));
        }
        if run.encoding != Compression::None {
            compression::unpack(run.encoding, &tail[..stored], head)
                .map_err(|what| damaged(0, format!("the pages do not unpack: {what}")))?;
        }
        buf.truncate(raw);
        Ok(())
    }

    /// Reads all of both files again, padding and exact sizes included, and checks every byte. `progress` gets
    /// the bytes done and the total.
    ///
    /// # Errors
    /// The first fault found, see [`ReadError`].
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, ReadError> {
        let total = self.total_bytes();
        progress(0, total);
        let size = file_size(&self.records_file, &self.records_path)?;
        // Once more, because the file may have changed since it was opened.
        let again = parse_records(&self.records_file, &self.records_path, size)?;
        if again.header != self.header || again.records != self.records || again.runs != self.runs {
            return Err(ReadError::Damaged {
                path: self.records_path.clone(),
                offset: 0,
                what: "the file changed while it was open".to_owned(),
            });
        }
        drop(again);
        let mut done = self.records_bytes;
        progress(done, total);
        self.check_pages_header()?;
        self.check_pages_size(file_size(&self.pages_file, &self.pages_path)?)?;
        done += PAGES_HEADER_BYTES as u64;
        let mut report = VerifyReport {
            records: self.records.len() as u64,
            runs: self.runs.len() as u64,
            data_pages: 0,
            zero_pages: 0,
            bytes: total,
        };
        // In file order, so that the disk reads ahead; together the runs are the whole file.
        let mut order: Vec<&Run> = self.runs.iter().filter(|run| run.kind == RunKind::Data).collect();
        order.sort_unstable_by_key(|run| run.position);
        let mut buf = Vec::new();
        for run in order {
            self.read_run(run, &mut buf)?;
            report.data_pages += run.bytes / format::PAGE_SIZE as u64;
            done += run.stored_bytes();
            progress(done, total);
        }
        let zero = self.runs.iter().filter(|run| run.kind == RunKind::Zero);
        report.zero_pages = zero.map(|run| run.bytes / format::PAGE_SIZE as u64).sum();
        Ok(report)
    }

    fn check_pages_header(&self) -> Result<(), ReadError> {
        let mut bytes = [0; PAGES_HEADER_BYTES];
        self.pages_file.read_exact_at(&mut bytes, 0).map_err(|e| short(e, &self.pages_path, 0))?;
        let id = format::decode_pages_header(&bytes, &self.header)
            .map_err(|fault| header_error(fault, &self.pages_path))?;
        if id != self.header.id {
            return Err(ReadError::Mismatched { path: self.pages_path.clone() });
        }
        Ok(())
    }

    fn check_pages_size(&self, size: u64) -> Result<(), ReadError> {
        if size == self.pages_bytes {
            return Ok(());
        }
        Err(ReadError::Damaged {
            path: self.pages_path.clone(),
            offset: size.min(self.pages_bytes),
            what: format!("the file is {size} bytes long, it was written with {}", self.pages_bytes),
        })
    }
}

fn open_dir(dir: &Path, label: &str) -> Result<OwnedFd, ReadError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(dir, flags, Mode::empty()).map_err(|errno| ReadError::Io {
        path: label.to_owned(),
        action: "open the checkpoint directory",
        source: errno.into(),
    })
}

fn open_file(dir: &OwnedFd, name: &str, path: &str) -> Result<(File, u64), ReadError> {
    // O_NONBLOCK: a FIFO put here must not block us before it is refused.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let fd = openat(dir.as_fd(), name, flags, Mode::empty()).map_err(|errno| ReadError::Io {
        path: path.to_owned(),
        action: "open the image file",
        source: errno.into(),
    })?;
    let file = File::from(fd);
    let size = file_size(&file, path)?;
    Ok((file, size))
}

/// Size of a regular file in bytes.
fn file_size(file: &File, path: &str) -> Result<u64, ReadError> {
    let meta = file.metadata().map_err(|source| ReadError::Io {
        path: path.to_owned(),
        action: "read the size",
        source,
    })?;
    if !meta.is_file() {
        return Err(ReadError::NotAnImage {
            path: path.to_owned(),
            what: "it is not a regular file".to_owned(),
        });
    }
    Ok(meta.len())
}

/// An error of an exact read: at the end of the file it means truncation.
fn short(source: io::Error, path: &str, offset: u64) -> ReadError {
    if source.kind() == io::ErrorKind::UnexpectedEof {
        return ReadError::Damaged {
            path: path.to_owned(),
            offset,
            what: "the file ends too early".to_owned(),
        };
    }
    ReadError::Io { path: path.to_owned(), action: "read", source }
}

fn header_error(fault: HeaderFault, path: &str) -> ReadError {
    let path = path.to_owned();
    match fault {
        HeaderFault::Magic => ReadError::NotAnImage { path, what: "the first bytes are others".to_owned() },
        HeaderFault::Damaged(offset, what) => ReadError::Damaged { path, offset, what },
        HeaderFault::TooNew(found) => {
            ReadError::TooNew { path, what: "the image format".to_owned(), found, supported: FORMAT_VERSION }
        }
        HeaderFault::Unsupported(what) => ReadError::Unsupported { path, what },
    }
}

fn take_header(
    input: &mut impl Read,
    path: &str,
    size: u64,
) -> Result<([u8; HEADER_BYTES], HeaderInfo), ReadError> {
    if size > MAX_RECORDS_FILE_BYTES {
        return Err(ReadError::Damaged {
            path: path.to_owned(),
            offset: MAX_RECORDS_FILE_BYTES,
            what: format!("the file has {size} bytes, the limit is {MAX_RECORDS_FILE_BYTES}"),
        });
    }
    let mut bytes = [0; HEADER_BYTES];
    input.read_exact(&mut bytes).map_err(|e| short(e, path, 0))?;
    let info = format::decode_header(&bytes).map_err(|fault| header_error(fault, path))?;
    Ok((bytes, info))
}

struct Parsed {
    header: HeaderInfo,
    records: Vec<Record>,
    runs: Vec<Run>,
    pages_bytes: u64,
}

/// Reads `records` from its start, whatever the position of `file`.
fn parse_records(file: &File, path: &str, size: u64) -> Result<Parsed, ReadError> {
    let mut input = BufReader::with_capacity(256 << 10, AtStart { file, position: 0 });
    let (header_bytes, header) = take_header(&mut input, path, size)?;
    let damaged = |offset: u64, what: String| ReadError::Damaged { path: path.to_owned(), offset, what };
    let mut digest = Digest::new(&header_bytes);
    let mut records = Vec::new();
    let mut runs: Vec<Run> = Vec::new();
    let mut next_position = PAGES_HEADER_BYTES as u64;
    let mut offset = HEADER_BYTES as u64;
    loop {
        let mut frame_bytes = [0; FRAME_BYTES];
        input.read_exact(&mut frame_bytes).map_err(|e| short(e, path, offset))?;
        let frame = format::decode_frame(&frame_bytes).map_err(|(at, what)| damaged(offset + at, what))?;
        let total = frame.total_bytes();
        // Only now is memory taken for the body: the file does hold that many bytes.
        if total > size.saturating_sub(offset) {
            return Err(damaged(offset, format!("a record of {total} bytes goes past the end of the file")));
        }
        let mut body = vec![0; (total - FRAME_BYTES as u64) as usize];
        input.read_exact(&mut body).map_err(|e| short(e, path, offset))?;
        format::check_frame(&frame_bytes, &frame, &body).map_err(|(at, what)| damaged(offset + at, what))?;
        body.truncate(frame.body_len as usize);
        let body_at = offset + FRAME_BYTES as u64;
        offset += total;
        if frame.kind < FIRST_RESERVED_KIND {
            digest.add(frame.checksum);
            let (kind, version, owner, id) = (frame.kind, frame.version, frame.owner, frame.id);
            records.push(Record { kind, version, owner, id, body });
            continue;
        }
        let name = match frame.kind {
            KIND_RUNS => "the page index",
            KIND_END => "the end record",
            other => {
                return Err(ReadError::Unsupported {
                    path: path.to_owned(),
                    what: format!(
                        "unknown record {other:#06x} version {} of a newer image format at byte {}: use a newer ckpt",
                        frame.version,
                        body_at - FRAME_BYTES as u64
                    ),
                });
            }
        };
        if frame.version > INTERNAL_VERSION {
            return Err(ReadError::TooNew {
                path: path.to_owned(),
                what: name.to_owned(),
                found: frame.version.into(),
                supported: INTERNAL_VERSION.into(),
            });
        }
        if frame.version != INTERNAL_VERSION || frame.owner != 0 || frame.id != 0 {
            return Err(damaged(body_at, format!("{name} has an impossible version, owner or id")));
        }
        if frame.kind == KIND_RUNS {
            digest.add(frame.checksum);
            let count = body.len() / RUN_BYTES;
            if count == 0 || count > MAX_RUNS_PER_FRAME || !body.len().is_multiple_of(RUN_BYTES) {
                return Err(damaged(body_at, format!("a page index of {} bytes", body.len())));
            }
            for (n, bytes) in body.chunks_exact(RUN_BYTES).enumerate() {
                let entry = RunEntry::decode(bytes, header.compression, next_position)
                    .map_err(|what| damaged(body_at + (n * RUN_BYTES) as u64, what))?;
                next_position = next_position
                    .checked_add(entry.stored_padded())
                    .ok_or_else(|| damaged(body_at, "page runs past the largest file".to_owned()))?;
                runs.push(Run::from_entry(&entry));
            }
            continue;
        }
        if body.len() != END_BYTES {
            return Err(damaged(body_at, format!("an end record of {} bytes", body.len())));
        }
        let found = End {
            records: records.len() as u64,
            runs: runs.len() as u64,
            pages_bytes: next_position,
            digest: digest.value(),
        };
        let expected = End::decode(&body);
        if found != expected {
            return Err(damaged(
                body_at,
                format!(
                    "{} records, {} page runs and {} bytes of pages are listed, but {}, {} and {} were written, or their order changed",
                    found.records,
                    found.runs,
                    found.pages_bytes,
                    expected.records,
                    expected.runs,
                    expected.pages_bytes
                ),
            ));
        }
        if offset != size {
            return Err(damaged(offset, format!("{} bytes follow the end record", size - offset)));
        }
        break;
    }
    runs.sort_unstable_by_key(|run| (run.object, run.offset));
    for pair in runs.windows(2) {
        if pair[0].object == pair[1].object && pair[0].offset + pair[0].bytes > pair[1].offset {
            return Err(damaged(
                0,
                format!("page runs overlap at offset {:#x} of object {:#x}", pair[1].offset, pair[1].object),
            ));
        }
    }
    Ok(Parsed { header, records, runs, pages_bytes: next_position })
}

/// Reads a file from its start without moving its position.
struct AtStart<'a> {
    file: &'a File,
    position: u64,
}

impl Read for AtStart<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}
