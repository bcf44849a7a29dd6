// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads and verifies images, which are hostile input.
//!
//! [`Reader::open`] reads and checks the whole `records` file; page content is read and checked run by run. If the image
//! is incremental, it does so with every image of the chain below it and finds out which of them holds each page, so
//! that its user sees one image. Memory is taken only for bytes that are really in the files, so a small file cannot
//! ask for much.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::compression::Compression;
use crate::error::ReadError;
use crate::format::{
    self, FRAME_BYTES, HEADER_BYTES, HeaderInfo, KIND_PARENT, Listed, MAX_CHAIN_IMAGES, PARENT_BYTES, Parent,
    RECORDS_FILE, RunEntry,
};
use crate::image_file::{ImageFile, Stored, open_dir, open_file, short, take_header};

/// Stored runs of which pages are in use here and there, and that are kept so as to be read and checked once. Reading
/// in order needs one for each image of the chain.
const KEPT_RUNS: usize = 16;

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
    /// Which image of the chain has it, 0 being the newest.
    image: u16,
    /// Where the run begins in the unpacked content of `stored`, in bytes.
    skip: u32,
    stored: Stored,
}

impl Run {
    /// Bytes that its content takes on the disk, in whichever image of the chain: exact for a whole stored run, in
    /// proportion for a part of one.
    pub fn stored_bytes(&self) -> u64 {
        match self.stored.raw {
            0 => 0,
            raw => self.stored.padded() * self.bytes / u64::from(raw),
        }
    }

    /// Which image of [`Reader::images`] stores it.
    pub fn image(&self) -> usize {
        self.image.into()
    }

    fn is_whole(&self) -> bool {
        u64::from(self.stored.raw) == self.bytes
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

/// What [`Reader::verify`] has read; of a chain, of all its images together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Images: 1 for a full one, the length of the chain for an incremental one.
    pub images: u64,
    /// Records.
    pub records: u64,
    /// Page runs, those that say that nothing changed included.
    pub runs: u64,
    /// Pages with stored content.
    pub data_pages: u64,
    /// Pages listed as zero.
    pub zero_pages: u64,
    /// Bytes read and found right, of both files of each image.
    pub bytes: u64,
}

/// One image of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageInfo<'a> {
    /// Its directory, as messages call it.
    pub path: &'a str,
    /// Its header.
    pub header: &'a HeaderInfo,
    /// The image that it is built on, if it is incremental.
    pub parent: Option<Parent>,
    /// Size of its two files in bytes.
    pub bytes: u64,
}

/// An open image whose `records` file was found right. Methods take `&self`: threads may share it.
#[derive(Debug)]
pub struct Reader {
    /// The newest first; never empty.
    images: Vec<ImageFile>,
    records: Vec<Record>,
    runs: Vec<Run>,
    kept: Mutex<Vec<Kept>>,
}

/// A stored run, unpacked and checked: the image, the position in its `pages`, the content.
type Kept = (u16, u64, Arc<Vec<u8>>);

/// The header of the image in `dir`, without reading anything else.
///
/// # Errors
/// As for [`Reader::open`].
pub fn read_header(dir: &Path) -> Result<HeaderInfo, ReadError> {
    read_link(dir).map(|(header, _)| header)
}

/// The header of the image in `dir` and what it is built on, if it is incremental, without reading anything else.
///
/// # Errors
/// As for [`Reader::open`].
pub fn read_link(dir: &Path) -> Result<(HeaderInfo, Option<Parent>), ReadError> {
    let label = dir.display().to_string();
    read_link_at(&open_dir(dir, &label)?, &label)
}

pub(crate) fn read_link_at(dir: &OwnedFd, label: &str) -> Result<(HeaderInfo, Option<Parent>), ReadError> {
    use std::io::Read as _;
    let path = format!("{label}/{RECORDS_FILE}");
    let (mut file, size) = open_file(dir, RECORDS_FILE, &path)?;
    let header = take_header(&mut file, &path, size)?.1;
    // An image without any frame is one that is being written, and a full one.
    let mut first = [0; FRAME_BYTES + PARENT_BYTES];
    let got = size.saturating_sub(HEADER_BYTES as u64).min(first.len() as u64) as usize;
    file.read_exact(&mut first[..got]).map_err(|e| short(e, &path, HEADER_BYTES as u64))?;
    let damaged =
        |at: u64, what| ReadError::Damaged { path: path.clone(), offset: HEADER_BYTES as u64 + at, what };
    let (frame, body) = first.split_at(FRAME_BYTES);
    let Some(frame_bytes) = frame.first_chunk::<FRAME_BYTES>().filter(|_| got >= FRAME_BYTES) else {
        return Ok((header, None));
    };
    let frame = format::decode_frame(frame_bytes).map_err(|(at, what)| damaged(at, what))?;
    if frame.kind != KIND_PARENT {
        return Ok((header, None));
    }
    if frame.body_len as usize != PARENT_BYTES || got < first.len() {
        return Err(damaged(0, "a parent record of an impossible length".to_owned()));
    }
    format::check_frame(frame_bytes, &frame, body).map_err(|(at, what)| damaged(at, what))?;
    let parent = Parent::decode(body).map_err(|what| damaged(FRAME_BYTES as u64, what))?;
    Ok((header, Some(parent)))
}

/// Opens the directory of a parent: `../<number>` of that of its child, which is `child` and called `label`. Returns
/// what messages call it, too.
pub(crate) fn open_parent(
    child: &OwnedFd,
    label: &str,
    parent: Parent,
) -> Result<(OwnedFd, String), ReadError> {
    let number = parent.number.to_string();
    let child_path = Path::new(label);
    let path = match (child_path.file_name(), child_path.parent()) {
        (Some(_), Some(beside)) => beside.join(&number),
        _ => child_path.join("..").join(&number),
    };
    let path = path.display().to_string();
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    match openat(child.as_fd(), Path::new("..").join(&number).as_path(), flags, Mode::empty()) {
        Ok(dir) => Ok((dir, path)),
        Err(Errno::ENOENT) => Err(ReadError::ParentMissing { path: label.to_owned(), parent: path }),
        Err(errno) => Err(ReadError::Parent {
            path: label.to_owned(),
            source: Box::new(ReadError::Io {
                path,
                action: "open the checkpoint directory",
                source: errno.into(),
            }),
        }),
    }
}

/// Device and inode.
fn identity(of: std::io::Result<std::fs::Metadata>) -> Option<(u64, u64)> {
    of.ok().map(|meta| (meta.dev(), meta.ino()))
}

impl Reader {
    /// Opens the image in `dir`; reads and checks all of `records` and the header and size of `pages`. An incremental
    /// image takes those below it in the chain along: they lie in the directories `../<number>` of each other.
    ///
    /// # Errors
    /// Every [`ReadError`]; the image is not usable then.
    pub fn open(dir: &Path) -> Result<Reader, ReadError> {
        let label = dir.display().to_string();
        loop {
            let fd = File::from(open_dir(dir, &label)?);
            let identity = identity(fd.metadata());
            let opened = Reader::open_at(fd.into(), &label);
            // A squash has put another directory in its place, and is taking this one away: look there.
            if opened.is_err() && identity.is_some() && identity != self::identity(std::fs::metadata(dir)) {
                continue;
            }
            return opened;
        }
    }

    /// As [`Reader::open`], for a directory already open (from another mount namespace, for example) that
    /// messages call `label`. All files are opened here, also those of the chain, which are found from the descriptor;
    /// the directory is not used afterwards.
    ///
    /// # Errors
    /// As for [`Reader::open`].
    pub fn open_at(dir: OwnedFd, label: &str) -> Result<Reader, ReadError> {
        let (newest, parsed) = ImageFile::open(&dir, label)?;
        let records = parsed.records;
        let mut runs = Vec::new();
        let mut wanted = Vec::new();
        for entry in &parsed.entries {
            let (offset, end, object) = (entry.offset, entry.end(), entry.object);
            pick(entry, Wanted { source: object, offset, end, object }, 0, &mut runs, &mut wanted);
        }
        let mut images = vec![newest];
        let mut dir = dir;
        while let Some(child) = images.last()
            && let Some(parent) = child.parent
        {
            if images.len() >= MAX_CHAIN_IMAGES {
                let (path, limit) = (label.to_owned(), MAX_CHAIN_IMAGES);
                return Err(ReadError::ChainTooLong { path, limit });
            }
            let (parent_dir, parent_label) = open_parent(&dir, &child.label, parent)?;
            let below = |source| ReadError::Parent { path: label.to_owned(), source: Box::new(source) };
            let (image, parsed) = ImageFile::open(&parent_dir, &parent_label).map_err(below)?;
            if image.header.id != parent.id {
                let path = child.label.clone();
                return Err(ReadError::ParentMismatched { path, parent: parent_label });
            }
            // Numbers that fall cannot go round in a circle.
            if image.parent.is_some_and(|grandparent| grandparent.number >= parent.number) {
                return Err(below(
                    image.records_damaged("its parent has not a lower number than itself".to_owned()),
                ));
            }
            wanted.sort_unstable_by_key(|w: &Wanted| (w.source, w.offset));
            wanted = descend(&wanted, &parsed.entries, images.len() as u16, &mut runs);
            images.push(image);
            dir = parent_dir;
        }
        // Stable, because that is faster for sorted stretches one behind the other.
        runs.sort_by_key(|run| (run.object, run.offset));
        Ok(Reader { images, records, runs, kept: Mutex::default() })
    }

    /// The header.
    pub fn header(&self) -> &HeaderInfo {
        &self.images[0].header
    }

    /// The image that this one is built on, if it is incremental.
    pub fn parent(&self) -> Option<Parent> {
        self.images[0].parent
    }

    /// The images of the chain, the newest first: this one, and those that it is built on.
    pub fn images(&self) -> impl ExactSizeIterator<Item = ImageInfo<'_>> {
        self.images.iter().map(|image| ImageInfo {
            path: &image.label,
            header: &image.header,
            parent: image.parent,
            bytes: image.total_bytes(),
        })
    }

    /// All records in the order they were written.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The runs of `object` by offset; empty if it has none. Of a chain, the newest content of every page.
    pub fn runs(&self, object: u64) -> &[Run] {
        let from = self.runs.partition_point(|run| run.object < object);
        let to = self.runs.partition_point(|run| run.object <= object);
        &self.runs[from..to]
    }

    /// All objects that have runs, by number.
    pub fn objects(&self) -> impl Iterator<Item = Object<'_>> {
        self.runs.chunk_by(|a, b| a.object == b.object).map(|runs| Object { object: runs[0].object, runs })
    }

    /// Size of all files in bytes, those of the chain included.
    pub fn total_bytes(&self) -> u64 {
        self.images.iter().map(ImageFile::total_bytes).sum()
    }

    /// Where the content of `run` lies as it is: the file (`pages` of some image of the chain) and the position in
    /// bytes. Only for runs that are stored whole and unpacked; whoever reads them by himself has the checksum checked
    /// by [`Reader::check_run`].
    pub fn raw_location(&self, run: &Run) -> Option<(&File, u64)> {
        let raw = run.kind == RunKind::Data && run.stored.encoding == Compression::None && run.is_whole();
        raw.then(|| (&self.images[run.image()].pages, run.stored.position))
    }

    /// Checks content that was read at [`Reader::raw_location`].
    ///
    /// # Errors
    /// [`ReadError::Damaged`].
    pub fn check_run(&self, run: &Run, content: &[u8]) -> Result<(), ReadError> {
        self.images[run.image()].check(&run.stored, content, 0).map_err(|e| self.of_image(run, e))
    }

    /// Reads the content of `run` into `buf`, which becomes exactly [`Run::bytes`] long. Keep `buf` from call
    /// to call. Its content after an error is unspecified.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] when checksum, padding or packing are wrong; [`ReadError::Io`].
    pub fn read_run(&self, run: &Run, buf: &mut Vec<u8>) -> Result<(), ReadError> {
        buf.resize(run.bytes as usize, 0);
        self.read_run_into(run, buf)
    }

    /// As [`Reader::read_run`], into memory that is exactly [`Run::bytes`] long: unpacked runs are read right there and
    /// checked afterwards. Threads may do this at the same time.
    ///
    /// # Errors
    /// As for [`Reader::read_run`].
    ///
    /// # Panics
    /// If `buf` has another length.
    pub fn read_run_into(&self, run: &Run, buf: &mut [u8]) -> Result<(), ReadError> {
        assert_eq!(buf.len() as u64, run.bytes, "memory for a run is as long as the run");
        if run.kind == RunKind::Zero {
            buf.fill(0);
            return Ok(());
        }
        if run.is_whole() {
            return self.images[run.image()].read(&run.stored, buf).map_err(|e| self.of_image(run, e));
        }
        let whole = self.whole(run)?;
        buf.copy_from_slice(&whole[run.skip as usize..][..buf.len()]);
        Ok(())
    }

    /// The whole stored run of which `run` is a part, checked.
    fn whole(&self, run: &Run) -> Result<Arc<Vec<u8>>, ReadError> {
        let is = |kept: &Kept| kept.0 == run.image && kept.1 == run.stored.position;
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = lock();
        if let Some(at) = kept.iter().position(is) {
            kept[..=at].rotate_right(1);
            return Ok(Arc::clone(&kept[0].2));
        }
        drop(kept);
        let mut raw = vec![0; run.stored.raw as usize];
        self.images[run.image()].read(&run.stored, &mut raw).map_err(|e| self.of_image(run, e))?;
        let raw = Arc::new(raw);
        let mut kept = lock();
        // Another thread may have read the same; then there are two for a while.
        kept.insert(0, (run.image, run.stored.position, Arc::clone(&raw)));
        kept.truncate(KEPT_RUNS);
        Ok(raw)
    }

    /// Says for which page it was, and of which chain the damaged image is a part.
    fn of_image(&self, run: &Run, error: ReadError) -> ReadError {
        let error = match error {
            ReadError::Damaged { path, offset, what } => {
                let what = format!("{what} (object {:#x}, offset {:#x})", run.object, run.offset);
                ReadError::Damaged { path, offset, what }
            }
            other => other,
        };
        self.below(run.image(), error)
    }

    fn below(&self, image: usize, error: ReadError) -> ReadError {
        if image == 0 {
            return error;
        }
        ReadError::Parent { path: self.images[0].label.clone(), source: Box::new(error) }
    }

    /// Reads all of both files again, padding and exact sizes included, and checks every byte; of a chain, of all its
    /// images, whether all of their pages are still in use or not. `progress` gets the bytes done and the total.
    ///
    /// # Errors
    /// The first fault found, see [`ReadError`].
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, ReadError> {
        let total = self.total_bytes();
        progress(0, total);
        let mut report = VerifyReport::default();
        for (n, image) in self.images.iter().enumerate() {
            let before = report.bytes;
            let records = (n == 0).then_some(&self.records[..]);
            let checked = image
                .verify(records, &mut |done| progress(before + done, total))
                .map_err(|e| self.below(n, e))?;
            report.images += 1;
            report.records += checked.records;
            report.runs += checked.runs;
            report.data_pages += checked.data_pages;
            report.zero_pages += checked.zero_pages;
            report.bytes += image.total_bytes();
        }
        Ok(report)
    }
}

/// Pages of `object` of the newest image that are those of `source` in the image looked at, at the same offsets.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    source: u64,
    /// First byte, and the one after the last.
    offset: u64,
    end: u64,
    object: u64,
}

/// Takes from `entries`, those of the `image`-th image, what is wanted of them, and returns what they say is to be found
/// in its parent. Both are sorted, and neither overlaps.
///
/// What is wanted and not listed is left out: it is what pages are that no image lists.
fn descend(wanted: &[Wanted], entries: &[RunEntry], image: u16, runs: &mut Vec<Run>) -> Vec<Wanted> {
    let mut next = Vec::new();
    let mut first = 0;
    for want in wanted {
        while let Some(entry) = entries.get(first)
            && (entry.object < want.source || entry.object == want.source && entry.end() <= want.offset)
        {
            first += 1;
        }
        for entry in &entries[first..] {
            if entry.object != want.source || entry.offset >= want.end {
                break;
            }
            pick(entry, *want, image, runs, &mut next);
        }
    }
    next
}

/// Takes what both list. They overlap.
fn pick(entry: &RunEntry, want: Wanted, image: u16, runs: &mut Vec<Run>, next: &mut Vec<Wanted>) {
    let (offset, end) = (entry.offset.max(want.offset), entry.end().min(want.end));
    let object = want.object;
    let (skip, stored) = ((offset - entry.offset) as u32, Stored::of(entry));
    let run = |kind| Run { object, offset, bytes: end - offset, kind, image, skip, stored };
    match entry.listed {
        Listed::Same { parent_object } => next.push(Wanted { source: parent_object, offset, end, object }),
        Listed::Zero => runs.push(run(RunKind::Zero)),
        Listed::Data { .. } => runs.push(run(RunKind::Data)),
    }
}
