// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two files of one image, whatever it is built on: opening them, parsing `records`, reading stored runs.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::compression::{self, Compression};
use crate::error::ReadError;
use crate::format::{
    self, Digest, END_BYTES, End, EntryRules, FIRST_RESERVED_KIND, FORMAT_VERSION, FRAME_BYTES, HEADER_BYTES,
    HeaderFault, HeaderInfo, INCREMENTAL_RUNS_VERSION, INTERNAL_VERSION, KIND_END, KIND_PARENT, KIND_RUNS,
    Listed, MAX_RECORDS_FILE_BYTES, MAX_RUNS_PER_FRAME, PAGES_FILE, PAGES_HEADER_BYTES, Parent, RECORDS_FILE,
    RUN_BYTES, RunEntry,
};
use crate::reader::Record;

/// The open files of one image, whose `records` was found right.
#[derive(Debug)]
pub(crate) struct ImageFile {
    /// The directory, as messages call it.
    pub(crate) label: String,
    pub(crate) header: HeaderInfo,
    pub(crate) parent: Option<Parent>,
    pub(crate) pages: File,
    records: File,
    records_path: String,
    pages_path: String,
    pub(crate) records_bytes: u64,
    pub(crate) pages_bytes: u64,
    digest: u64,
}

/// Content as it lies in `pages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) position: u64,
    pub(crate) checksum: u64,
    /// Length without padding, in bytes.
    pub(crate) stored: u32,
    /// Length unpacked, in bytes.
    pub(crate) raw: u32,
    pub(crate) encoding: Compression,
}

impl Stored {
    pub(crate) fn padded(&self) -> u64 {
        u64::from(self.stored) + format::padding(u64::from(self.stored)) as u64
    }

    /// What an entry stores; nothing unless it is DATA.
    pub(crate) fn of(entry: &RunEntry) -> Stored {
        match entry.listed {
            Listed::Data { position, stored, encoding, checksum } => {
                Stored { position, checksum, stored, raw: entry.bytes() as u32, encoding }
            }
            _ => Stored { position: 0, checksum: 0, stored: 0, raw: 0, encoding: Compression::None },
        }
    }
}

/// What was read to check an image.
pub(crate) struct Checked {
    pub(crate) records: u64,
    pub(crate) runs: u64,
    pub(crate) data_pages: u64,
    pub(crate) zero_pages: u64,
}

thread_local! {
    /// Packed bytes on their way; at most 1 MiB.
    static PACKED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl ImageFile {
    /// Opens the image in `dir`; reads and checks `records` and the header and size of `pages`.
    pub(crate) fn open(dir: &OwnedFd, label: &str) -> Result<(ImageFile, Parsed), ReadError> {
        let records_path = format!("{label}/{RECORDS_FILE}");
        let pages_path = format!("{label}/{PAGES_FILE}");
        let (records, records_bytes) = open_file(dir, RECORDS_FILE, &records_path)?;
        let (pages, pages_bytes) = open_file(dir, PAGES_FILE, &pages_path)?;
        let parsed = parse_records(&records, &records_path, records_bytes)?;
        let image = ImageFile {
            label: label.to_owned(),
            header: parsed.header.clone(),
            parent: parsed.parent,
            pages,
            records,
            records_path,
            pages_path,
            records_bytes,
            pages_bytes: parsed.pages_bytes,
            digest: parsed.digest,
        };
        image.check_pages_header()?;
        image.check_pages_size(pages_bytes)?;
        Ok((image, parsed))
    }

    /// Size of both files in bytes.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.records_bytes + self.pages_bytes
    }

    /// An error about `records` as a whole.
    pub(crate) fn records_damaged(&self, what: String) -> ReadError {
        ReadError::Damaged { path: self.records_path.clone(), offset: 0, what }
    }

    /// Reads a run into `raw`, which is as long as the run, and checks it.
    pub(crate) fn read(&self, run: &Stored, raw: &mut [u8]) -> Result<(), ReadError> {
        if run.encoding == Compression::None {
            self.read_stored(run, raw)?;
            return self.check(run, raw, 0);
        }
        PACKED.with_borrow_mut(|packed| {
            packed.resize((run.padded() as usize).max(packed.len()), 0);
            let packed = &mut packed[..run.padded() as usize];
            self.read_stored(run, packed)?;
            let (stored, pad) = packed.split_at(run.stored as usize);
            if let Some(at) = pad.iter().position(|byte| *byte != 0) {
                return Err(self.run_damaged(run, stored.len() + at, "padding is not zero".to_owned()));
            }
            self.check(run, stored, pad.len())?;
            compression::unpack(run.encoding, stored, raw)
                .map_err(|what| self.run_damaged(run, 0, format!("the pages do not unpack: {what}")))
        })
    }

    /// Checks the stored bytes of a run, and `pad` zeros behind them.
    pub(crate) fn check(&self, run: &Stored, stored: &[u8], pad: usize) -> Result<(), ReadError> {
        if format::run_checksum(stored, pad) == run.checksum {
            return Ok(());
        }
        Err(self.run_damaged(run, 0, "the checksum of the pages is wrong".to_owned()))
    }

    fn read_stored(&self, run: &Stored, into: &mut [u8]) -> Result<(), ReadError> {
        self.pages.read_exact_at(into, run.position).map_err(|e| short(e, &self.pages_path, run.position))
    }

    fn run_damaged(&self, run: &Stored, at: usize, what: String) -> ReadError {
        ReadError::Damaged { path: self.pages_path.clone(), offset: run.position + at as u64, what }
    }

    /// Reads all of both files again and checks every byte; `progress` gets the bytes done so far.
    pub(crate) fn verify(
        &self,
        records: Option<&[Record]>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Checked, ReadError> {
        let size = file_size(&self.records, &self.records_path)?;
        // Once more, because the file may have changed since it was opened.
        let again = parse_records(&self.records, &self.records_path, size)?;
        if again.header != self.header
            || again.digest != self.digest
            || again.parent != self.parent
            || records.is_some_and(|records| records != again.records)
        {
            return Err(self.records_damaged("the file changed while it was open".to_owned()));
        }
        let mut done = self.records_bytes;
        progress(done);
        self.check_pages_header()?;
        self.check_pages_size(file_size(&self.pages, &self.pages_path)?)?;
        done += PAGES_HEADER_BYTES as u64;
        let (records, runs) = (again.records.len() as u64, again.entries.len() as u64);
        let mut checked = Checked { records, runs, data_pages: 0, zero_pages: 0 };
        for entry in &again.entries {
            match entry.listed {
                Listed::Data { .. } => checked.data_pages += u64::from(entry.npages),
                Listed::Zero => checked.zero_pages += u64::from(entry.npages),
                Listed::Same { .. } => {}
            }
        }
        // In file order, so that the disk reads ahead; together the runs are the whole file.
        let mut order: Vec<Stored> = again.entries.iter().map(Stored::of).filter(|run| run.raw > 0).collect();
        drop(again);
        order.sort_unstable_by_key(|run| run.position);
        let mut buf = Vec::new();
        for run in order {
            buf.resize(run.raw as usize, 0);
            self.read(&run, &mut buf)?;
            done += run.padded();
            progress(done);
        }
        Ok(checked)
    }

    fn check_pages_header(&self) -> Result<(), ReadError> {
        let mut bytes = [0; PAGES_HEADER_BYTES];
        self.pages.read_exact_at(&mut bytes, 0).map_err(|e| short(e, &self.pages_path, 0))?;
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

pub(crate) fn open_dir(dir: &Path, label: &str) -> Result<OwnedFd, ReadError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(dir, flags, Mode::empty()).map_err(|errno| ReadError::Io {
        path: label.to_owned(),
        action: "open the checkpoint directory",
        source: errno.into(),
    })
}

pub(crate) fn open_file(dir: &OwnedFd, name: &str, path: &str) -> Result<(File, u64), ReadError> {
    // O_NONBLOCK: a FIFO put here must not block us before it is refused.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let fd = openat(dir.as_fd(), name, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::ENOENT => ReadError::FileMissing { path: path.to_owned() },
        _ => ReadError::Io { path: path.to_owned(), action: "open the image file", source: errno.into() },
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
pub(crate) fn short(source: io::Error, path: &str, offset: u64) -> ReadError {
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

pub(crate) fn take_header(
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

/// All that `records` says.
pub(crate) struct Parsed {
    pub(crate) header: HeaderInfo,
    pub(crate) parent: Option<Parent>,
    pub(crate) records: Vec<Record>,
    /// Sorted by object and offset.
    pub(crate) entries: Vec<RunEntry>,
    pages_bytes: u64,
    /// Stands for all frames before END.
    digest: u64,
}

/// Reads `records` from its start, whatever the position of `file`.
fn parse_records(file: &File, path: &str, size: u64) -> Result<Parsed, ReadError> {
    let mut input = BufReader::with_capacity(256 << 10, AtStart { file, position: 0 });
    let (header_bytes, header) = take_header(&mut input, path, size)?;
    let damaged = |offset: u64, what: String| ReadError::Damaged { path: path.to_owned(), offset, what };
    let mut digest = Digest::new(&header_bytes);
    let mut records = Vec::new();
    let mut entries: Vec<RunEntry> = Vec::new();
    let mut parent = None;
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
            KIND_PARENT => "the parent record",
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
        let newest = if frame.kind == KIND_RUNS { INCREMENTAL_RUNS_VERSION } else { INTERNAL_VERSION };
        if frame.version > newest {
            return Err(ReadError::TooNew {
                path: path.to_owned(),
                what: name.to_owned(),
                found: frame.version.into(),
                supported: newest.into(),
            });
        }
        let version = match (frame.kind, parent) {
            (KIND_RUNS, Some(_)) => INCREMENTAL_RUNS_VERSION,
            _ => INTERNAL_VERSION,
        };
        if frame.version != version || frame.owner != 0 || frame.id != 0 {
            return Err(damaged(body_at, format!("{name} has an impossible version, owner or id")));
        }
        if frame.kind == KIND_PARENT {
            digest.add(frame.checksum);
            if body_at != (HEADER_BYTES + FRAME_BYTES) as u64 {
                return Err(damaged(body_at, "a parent record that is not the first one".to_owned()));
            }
            parent = Some(Parent::decode(&body).map_err(|what| damaged(body_at, what))?);
            continue;
        }
        if frame.kind == KIND_RUNS {
            digest.add(frame.checksum);
            let count = body.len() / RUN_BYTES;
            if count == 0 || count > MAX_RUNS_PER_FRAME || !body.len().is_multiple_of(RUN_BYTES) {
                return Err(damaged(body_at, format!("a page index of {} bytes", body.len())));
            }
            let rules = EntryRules { compression: header.compression, incremental: parent.is_some() };
            for (n, bytes) in body.chunks_exact(RUN_BYTES).enumerate() {
                let entry = RunEntry::decode(bytes, rules, next_position)
                    .map_err(|what| damaged(body_at + (n * RUN_BYTES) as u64, what))?;
                next_position = next_position
                    .checked_add(entry.stored_padded())
                    .ok_or_else(|| damaged(body_at, "page runs past the largest file".to_owned()))?;
                entries.push(entry);
            }
            continue;
        }
        if body.len() != END_BYTES {
            return Err(damaged(body_at, format!("an end record of {} bytes", body.len())));
        }
        let found = End {
            records: records.len() as u64,
            runs: entries.len() as u64,
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
    entries.sort_unstable_by_key(|entry| (entry.object, entry.offset));
    if let Some((object, offset)) = overlap(entries.iter().map(|e| (e.object, e.offset, e.end()))) {
        return Err(damaged(0, format!("page runs overlap at offset {offset:#x} of object {object:#x}")));
    }
    // So resolving a chain gives no more runs than its images list, however it was made.
    let mut used: Vec<(u64, u64, u64)> = Vec::new();
    for entry in &entries {
        if let Listed::Same { parent_object } = entry.listed {
            used.push((parent_object, entry.offset, entry.end()));
        }
    }
    used.sort_unstable();
    if let Some((object, offset)) = overlap(used.into_iter()) {
        return Err(damaged(
            0,
            format!("the pages at offset {offset:#x} of the parent's object {object:#x} are used twice"),
        ));
    }
    let digest = digest.value();
    Ok(Parsed { header, parent, records, entries, pages_bytes: next_position, digest })
}

/// Object and offset at which two of the sorted ranges (object, start, end) overlap.
fn overlap(ranges: impl Iterator<Item = (u64, u64, u64)>) -> Option<(u64, u64)> {
    let mut before: Option<(u64, u64)> = None;
    for (object, start, end) in ranges {
        if before.is_some_and(|(o, e)| o == object && e > start) {
            return Some((object, start));
        }
        before = Some((object, end));
    }
    None
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
