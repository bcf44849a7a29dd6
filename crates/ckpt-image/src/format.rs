// SPDX-License-Identifier: MIT OR Apache-2.0
//! Version 1 of the image format: layout of headers, frames and run entries, as pure functions over bytes.
//!
//! `docs/image-format.md` is the description; this module is its one implementation. All integers are
//! little-endian, all checksums XXH3-64 with seed 0. Limits are the `MAX_*` constants.

use crate::compression::Compression;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Bytes of a page; the only page size of format version 1.
pub const PAGE_SIZE: usize = 4096;
/// The format version written, and the newest one read.
pub const FORMAT_VERSION: u32 = 1;
/// Name of the file with header and records.
pub const RECORDS_FILE: &str = "records";
/// Name of the file with page content.
pub const PAGES_FILE: &str = "pages";

/// Longest record body, in bytes.
pub const MAX_BODY_BYTES: usize = 64 << 20;
/// Largest `records` file, in bytes; memory for reading is proportional to what the file really holds.
pub const MAX_RECORDS_FILE_BYTES: u64 = 4 << 30;
/// Most pages in a run (1 MiB).
pub const MAX_RUN_PAGES: u32 = 256;
/// Most runs in one RUNS frame.
pub const MAX_RUNS_PER_FRAME: usize = 8192;
/// First kind number that belongs to the image itself.
pub const FIRST_RESERVED_KIND: u16 = 0xff00;
/// Kind of the frames that list page runs.
pub const KIND_RUNS: u16 = 0xff00;
/// Kind of the frame that names the parent of an incremental image; its first frame.
pub const KIND_PARENT: u16 = 0xff01;
/// Kind of the last frame.
pub const KIND_END: u16 = 0xffff;
/// Version of the PARENT and END frames, and of the RUNS frames of full images.
pub const INTERNAL_VERSION: u16 = 1;
/// Version of the RUNS frames of incremental images, which may list SAME runs.
pub const INCREMENTAL_RUNS_VERSION: u16 = 2;
/// Most images in a chain, the full one at its end included.
pub const MAX_CHAIN_IMAGES: usize = 128;

/// Size of the header of `records`, in every format version.
pub const HEADER_BYTES: usize = 256;
/// Size of the header of `pages`: one page, so that runs are page-aligned.
pub const PAGES_HEADER_BYTES: usize = PAGE_SIZE;
/// Size of a frame header.
pub const FRAME_BYTES: usize = 40;
/// Size of an entry in a RUNS frame.
pub const RUN_BYTES: usize = 48;
/// Size of the END frame's body.
pub const END_BYTES: usize = 32;
/// Size of the PARENT frame's body.
pub const PARENT_BYTES: usize = 24;

// The high byte, CR LF and ^Z show a transfer that stripped bits or converted line ends.
pub(crate) const RECORDS_MAGIC: [u8; 8] = *b"\x89CKPT\r\n\x1a";
pub(crate) const PAGES_MAGIC: [u8; 8] = *b"\x89CKPG\r\n\x1a";
pub(crate) const FRAME_MAGIC: [u8; 4] = *b"ckfr";

/// The machine this crate was built for, as an ELF `e_machine` number; 0 if it has none here.
pub const HOST_ARCH: u32 = if cfg!(target_arch = "x86_64") {
    62
} else if cfg!(target_arch = "aarch64") {
    183
} else {
    0
};

/// The header of an image, readable without decoding any record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderInfo {
    /// Format version.
    pub version: u32,
    /// Machine, as an ELF `e_machine` number.
    pub arch: u32,
    /// Page size in bytes.
    pub page_size: u32,
    /// Compression that runs may use.
    pub compression: Compression,
    /// When the dump began, nanoseconds since 1970-01-01 UTC.
    pub created_unix_ns: u64,
    /// Random number of this image, repeated in `pages`.
    pub id: [u8; 16],
    /// CPU features that the application may be using; their meaning is the engine's.
    pub cpu_features: [u8; 64],
}

impl HeaderInfo {
    /// The machine's name, or its number if it is an unknown one.
    pub fn arch_name(&self) -> String {
        match self.arch {
            62 => "x86_64".to_owned(),
            183 => "aarch64".to_owned(),
            other => format!("ELF machine {other}"),
        }
    }
}

/// The image that an incremental image is built on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Parent {
    /// Its image id.
    pub id: [u8; 16],
    /// Its checkpoint number: it is the directory with this name beside that of the incremental image. From 1.
    pub number: u64,
}

impl Parent {
    pub(crate) fn encode(&self) -> [u8; PARENT_BYTES] {
        let mut out = [0; PARENT_BYTES];
        out[..16].copy_from_slice(&self.id);
        out[16..].copy_from_slice(&self.number.to_le_bytes());
        out
    }

    /// Decodes the body of a PARENT frame.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() != PARENT_BYTES {
            return Err(format!("a parent record of {} bytes", bytes.len()));
        }
        match le_u64(bytes, 16) {
            0 => Err("a parent with the number 0".to_owned()),
            number => Ok(Parent { id: array(bytes, 0), number }),
        }
    }
}

/// What is wrong with a header; the reader adds the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HeaderFault {
    /// Magic is missing.
    Magic,
    /// Damaged at this offset.
    Damaged(u64, String),
    /// Version of a newer format.
    TooNew(u32),
    /// Understood but not supported.
    Unsupported(String),
}

pub(crate) fn le_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// `N` bytes at a fixed place of a block whose size the caller fixed; zeros past its end.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|byte| *byte != 0)
}

/// Bytes of padding after `len` bytes, up to a multiple of 8.
pub(crate) fn padding(len: u64) -> usize {
    (len.wrapping_neg() & 7) as usize
}

pub(crate) fn encode_header(info: &HeaderInfo) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[0..8].copy_from_slice(&RECORDS_MAGIC);
    out[8..12].copy_from_slice(&info.version.to_le_bytes());
    out[12..16].copy_from_slice(&(HEADER_BYTES as u32).to_le_bytes());
    out[16..20].copy_from_slice(&info.arch.to_le_bytes());
    out[20..24].copy_from_slice(&info.page_size.to_le_bytes());
    out[24..28].copy_from_slice(&info.compression.code().to_le_bytes());
    // 28..32: flags, none defined
    out[32..40].copy_from_slice(&info.created_unix_ns.to_le_bytes());
    out[40..56].copy_from_slice(&info.id);
    out[56..120].copy_from_slice(&info.cpu_features);
    let sum = xxh3_64(&out[..HEADER_BYTES - 8]);
    out[HEADER_BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
    out
}

/// Magic, checksum and version, which come at the same place in both files and in every format version.
fn check_envelope(bytes: &[u8], magic: &[u8; 8]) -> Result<(), HeaderFault> {
    if bytes.get(..8) != Some(magic) {
        return Err(HeaderFault::Magic);
    }
    let version = le_u32(bytes, 8);
    let body = bytes.len() - 8;
    if le_u64(bytes, body) != xxh3_64(&bytes[..body]) {
        let what = format!("the checksum of the header is wrong (it says format version {version})");
        return Err(HeaderFault::Damaged(body as u64, what));
    }
    if version > FORMAT_VERSION {
        return Err(HeaderFault::TooNew(version));
    }
    if version == 0 {
        return Err(HeaderFault::Damaged(8, "format version 0 does not exist".to_owned()));
    }
    if le_u32(bytes, 12) as usize != bytes.len() {
        let what = format!("header length {} instead of {}", le_u32(bytes, 12), bytes.len());
        return Err(HeaderFault::Damaged(12, what));
    }
    Ok(())
}

fn check_reserved(bytes: &[u8], from: usize, to: usize) -> Result<(), HeaderFault> {
    match first_nonzero(&bytes[from..to]) {
        None => Ok(()),
        Some(at) => Err(HeaderFault::Damaged((from + at) as u64, "reserved bytes are not zero".to_owned())),
    }
}

fn check_page_size(page_size: u32) -> Result<(), HeaderFault> {
    if page_size as usize == PAGE_SIZE {
        return Ok(());
    }
    Err(HeaderFault::Unsupported(format!(
        "pages of {page_size} bytes, this ckpt reads images with pages of {PAGE_SIZE}: restore on a machine like the one of the dump"
    )))
}

pub(crate) fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<HeaderInfo, HeaderFault> {
    check_envelope(bytes, &RECORDS_MAGIC)?;
    let flags = le_u32(bytes, 28);
    if flags != 0 {
        return Err(HeaderFault::Unsupported(format!(
            "the header has unknown flags {flags:#x}: use a newer ckpt"
        )));
    }
    check_reserved(bytes, 120, HEADER_BYTES - 8)?;
    check_page_size(le_u32(bytes, 20))?;
    let code = le_u32(bytes, 24);
    let compression = Compression::from_code(code).ok_or_else(|| {
        HeaderFault::Unsupported(format!("unknown compression number {code}: use a newer ckpt"))
    })?;
    Ok(HeaderInfo {
        version: le_u32(bytes, 8),
        arch: le_u32(bytes, 16),
        page_size: le_u32(bytes, 20),
        compression,
        created_unix_ns: le_u64(bytes, 32),
        id: array(bytes, 40),
        cpu_features: array(bytes, 56),
    })
}

pub(crate) fn encode_pages_header(info: &HeaderInfo) -> Vec<u8> {
    let mut out = vec![0; PAGES_HEADER_BYTES];
    out[0..8].copy_from_slice(&PAGES_MAGIC);
    out[8..12].copy_from_slice(&info.version.to_le_bytes());
    out[12..16].copy_from_slice(&(PAGES_HEADER_BYTES as u32).to_le_bytes());
    out[16..20].copy_from_slice(&info.page_size.to_le_bytes());
    out[20..24].copy_from_slice(&info.compression.code().to_le_bytes());
    out[24..40].copy_from_slice(&info.id);
    let sum = xxh3_64(&out[..PAGES_HEADER_BYTES - 8]);
    out[PAGES_HEADER_BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
    out
}

/// Checks the header of `pages` and returns its image id.
pub(crate) fn decode_pages_header(
    bytes: &[u8; PAGES_HEADER_BYTES],
    info: &HeaderInfo,
) -> Result<[u8; 16], HeaderFault> {
    check_envelope(bytes, &PAGES_MAGIC)?;
    check_reserved(bytes, 40, PAGES_HEADER_BYTES - 8)?;
    check_page_size(le_u32(bytes, 16))?;
    let (code, expected) = (le_u32(bytes, 20), info.compression.code());
    if code != expected {
        let what = format!("compression number {code}, `records` says {expected}");
        return Err(HeaderFault::Damaged(20, what));
    }
    Ok(array(bytes, 24))
}

/// A frame header without its magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u16,
    pub(crate) version: u16,
    pub(crate) owner: u64,
    pub(crate) id: u64,
    pub(crate) body_len: u32,
    pub(crate) checksum: u64,
}

impl Frame {
    /// Length of header, body and padding in bytes.
    pub(crate) fn total_bytes(&self) -> u64 {
        FRAME_BYTES as u64 + u64::from(self.body_len) + padding(u64::from(self.body_len)) as u64
    }
}

/// The frame around `body`, with its checksum filled in.
pub(crate) fn encode_frame(frame: &Frame, body: &[u8]) -> ([u8; FRAME_BYTES], u64) {
    let mut out = [0; FRAME_BYTES];
    out[0..4].copy_from_slice(&FRAME_MAGIC);
    out[4..6].copy_from_slice(&frame.kind.to_le_bytes());
    out[6..8].copy_from_slice(&frame.version.to_le_bytes());
    out[8..16].copy_from_slice(&frame.owner.to_le_bytes());
    out[16..24].copy_from_slice(&frame.id.to_le_bytes());
    out[24..28].copy_from_slice(&frame.body_len.to_le_bytes());
    // 28..32 reserved
    let sum = frame_checksum(&out, body, padding(body.len() as u64));
    out[32..40].copy_from_slice(&sum.to_le_bytes());
    (out, sum)
}

/// XXH3-64 over the frame header with a zero checksum field, the body and `pad` zero bytes.
fn frame_checksum(header: &[u8; FRAME_BYTES], body: &[u8], pad: usize) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&header[..32]);
    hash.update(&[0; 8]);
    hash.update(body);
    hash.update(&[0; 8][..pad]);
    hash.digest()
}

/// Decodes a frame header; its checksum is checked by [`check_frame`] once the body is there.
pub(crate) fn decode_frame(bytes: &[u8; FRAME_BYTES]) -> Result<Frame, (u64, String)> {
    if bytes[0..4] != FRAME_MAGIC {
        return Err((0, "no record begins here".to_owned()));
    }
    if le_u32(bytes, 28) != 0 {
        return Err((28, "reserved bytes are not zero".to_owned()));
    }
    let frame = Frame {
        kind: le_u16(bytes, 4),
        version: le_u16(bytes, 6),
        owner: le_u64(bytes, 8),
        id: le_u64(bytes, 16),
        body_len: le_u32(bytes, 24),
        checksum: le_u64(bytes, 32),
    };
    if frame.body_len as usize > MAX_BODY_BYTES {
        return Err((24, format!("a record of {} bytes, the limit is {MAX_BODY_BYTES}", frame.body_len)));
    }
    Ok(frame)
}

/// Checks the checksum of a frame whose body and padding follow in `rest`.
pub(crate) fn check_frame(
    header: &[u8; FRAME_BYTES],
    frame: &Frame,
    rest: &[u8],
) -> Result<(), (u64, String)> {
    let body_len = frame.body_len as usize;
    if let Some(at) = first_nonzero(&rest[body_len..]) {
        return Err(((FRAME_BYTES + body_len + at) as u64, "padding is not zero".to_owned()));
    }
    if frame_checksum(header, &rest[..body_len], rest.len() - body_len) != frame.checksum {
        return Err((32, format!("the checksum of the record (kind {:#06x}) is wrong", frame.kind)));
    }
    Ok(())
}

/// What an entry of a RUNS frame says about its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listed {
    /// Their content is in `pages`.
    Data {
        position: u64,
        /// In bytes, without padding.
        stored: u32,
        encoding: Compression,
        checksum: u64,
    },
    /// They are zero.
    Zero,
    /// They are those of this object of the parent at the same offset.
    Same { parent_object: u64 },
}

/// One entry of a RUNS frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RunEntry {
    pub(crate) object: u64,
    pub(crate) offset: u64,
    pub(crate) npages: u32,
    pub(crate) listed: Listed,
}

/// XXH3-64 over the stored bytes of a run and `pad` zero bytes.
pub(crate) fn run_checksum(stored: &[u8], pad: usize) -> u64 {
    if pad == 0 {
        return xxh3_64(stored);
    }
    let mut hash = Xxh3::new();
    hash.update(stored);
    hash.update(&[0; 8][..pad]);
    hash.digest()
}

const RUN_DATA: u32 = 1;
const RUN_ZERO: u32 = 2;
const RUN_SAME: u32 = 3;

/// What entries of an image may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryRules {
    /// The header's compression.
    pub(crate) compression: Compression,
    /// SAME runs are allowed.
    pub(crate) incremental: bool,
}

impl RunEntry {
    /// Length inside the object, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.npages) * PAGE_SIZE as u64
    }

    /// Where it ends inside the object; decoding and writing make sure that it does not overflow.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.bytes()
    }

    /// Bytes in `pages`, padding included.
    pub(crate) fn stored_padded(&self) -> u64 {
        match self.listed {
            Listed::Data { stored, .. } => u64::from(stored) + padding(u64::from(stored)) as u64,
            _ => 0,
        }
    }

    pub(crate) fn encode(&self) -> [u8; RUN_BYTES] {
        let (kind, position, stored, encoding, checksum) = match self.listed {
            Listed::Data { position, stored, encoding, checksum } => {
                (RUN_DATA, position, stored, encoding, checksum)
            }
            Listed::Zero => (RUN_ZERO, 0, 0, Compression::None, 0),
            Listed::Same { parent_object } => (RUN_SAME, parent_object, 0, Compression::None, 0),
        };
        let mut out = [0; RUN_BYTES];
        out[0..8].copy_from_slice(&self.object.to_le_bytes());
        out[8..16].copy_from_slice(&self.offset.to_le_bytes());
        out[16..20].copy_from_slice(&self.npages.to_le_bytes());
        out[20..24].copy_from_slice(&kind.to_le_bytes());
        out[24..32].copy_from_slice(&position.to_le_bytes());
        out[32..36].copy_from_slice(&stored.to_le_bytes());
        out[36..40].copy_from_slice(&encoding.code().to_le_bytes());
        out[40..48].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Decodes and checks one entry; `next_position` is where the next DATA run must lie in `pages`.
    pub(crate) fn decode(bytes: &[u8], rules: EntryRules, next_position: u64) -> Result<Self, String> {
        let (object, offset, npages) = (le_u64(bytes, 0), le_u64(bytes, 8), le_u32(bytes, 16));
        let (position, stored, checksum) = (le_u64(bytes, 24), le_u32(bytes, 32), le_u64(bytes, 40));
        let (kind, code) = (le_u32(bytes, 20), le_u32(bytes, 36));
        if !(matches!(kind, RUN_DATA | RUN_ZERO) || kind == RUN_SAME && rules.incremental) {
            return Err(format!("page run of unknown type {kind}"));
        }
        let compression = rules.compression;
        let encoding = Compression::from_code(code)
            .filter(|encoding| *encoding == Compression::None || *encoding == compression)
            .ok_or_else(|| format!("page run packed with number {code} in an image with {compression}"))?;
        // What stores nothing may be of any length.
        if npages == 0 || npages > MAX_RUN_PAGES && kind != RUN_SAME {
            return Err(format!("page run of {npages} pages, allowed are 1 to {MAX_RUN_PAGES}"));
        }
        let raw = u64::from(npages) * PAGE_SIZE as u64;
        if !offset.is_multiple_of(PAGE_SIZE as u64) || offset.checked_add(raw).is_none() {
            return Err(format!("page run at impossible offset {offset:#x} of object {object:#x}"));
        }
        let entry = |listed| RunEntry { object, offset, npages, listed };
        if kind != RUN_DATA {
            if stored != 0 || checksum != 0 || encoding != Compression::None {
                return Err("a run of zero or unchanged pages claims stored bytes".to_owned());
            }
            if kind == RUN_SAME {
                return Ok(entry(Listed::Same { parent_object: position }));
            }
            if position != 0 {
                return Err("a run of zero pages claims a position".to_owned());
            }
            return Ok(entry(Listed::Zero));
        }
        let fits = match encoding {
            Compression::None => u64::from(stored) == raw,
            _ => stored > 0 && u64::from(stored) < raw,
        };
        if !fits {
            return Err(format!("page run of {raw} bytes stored in {stored}"));
        }
        if position != next_position {
            return Err(format!("page run at position {position} of `pages`, expected at {next_position}"));
        }
        Ok(entry(Listed::Data { position, stored, encoding, checksum }))
    }
}

/// Body of the END frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) records: u64,
    pub(crate) runs: u64,
    pub(crate) pages_bytes: u64,
    pub(crate) digest: u64,
}

impl End {
    pub(crate) fn encode(&self) -> [u8; END_BYTES] {
        let mut out = [0; END_BYTES];
        out[0..8].copy_from_slice(&self.records.to_le_bytes());
        out[8..16].copy_from_slice(&self.runs.to_le_bytes());
        out[16..24].copy_from_slice(&self.pages_bytes.to_le_bytes());
        out[24..32].copy_from_slice(&self.digest.to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        End {
            records: le_u64(bytes, 0),
            runs: le_u64(bytes, 8),
            pages_bytes: le_u64(bytes, 16),
            digest: le_u64(bytes, 24),
        }
    }
}

/// XXH3-64 over the checksum of the header and those of all frames before END, in file order: pins their
/// number and order, so that a removed, repeated or exchanged frame is noticed.
pub(crate) struct Digest(Xxh3);

impl Digest {
    pub(crate) fn new(header: &[u8; HEADER_BYTES]) -> Self {
        let mut hash = Xxh3::new();
        hash.update(&header[HEADER_BYTES - 8..]);
        Digest(hash)
    }

    pub(crate) fn add(&mut self, frame_checksum: u64) {
        self.0.update(&frame_checksum.to_le_bytes());
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.digest()
    }
}
