// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image of one checkpoint, and the store that holds checkpoints.
//!
//! A checkpoint is a directory with two image files: `records` (a fixed header, then framed and checksummed
//! records) and `pages` (memory content in checksummed runs). The bytes are described in
//! `docs/image-format.md`. This crate knows no resource kinds: a record is a kind number, a version, an owner,
//! an id and an opaque body, which [`codec`] turns into a struct.
//!
//! An image is hostile input. Memory used for reading is bounded by the size of the files and by the limits in
//! [`format`](mod@format); every read returns a typed error that names the file, the offset, what is wrong and what
//! to do.
#![forbid(unsafe_code)]

pub mod codec;
mod compression;
mod error;
pub mod format;
mod image_file;
mod pipeline;
mod reader;
pub mod store;
mod writer;

pub use compression::{Compression, UnknownCompression};
pub use error::{IoHint, ReadError, WriteError};
pub use format::{HeaderInfo, PAGE_SIZE, Parent};
pub use pipeline::{Buffer, BufferPool, Origin};
pub use reader::{ImageInfo, Object, Reader, Record, Run, RunKind, VerifyReport, read_header, read_link};
pub use writer::{Identity, Summary, Writer, ZeroPages};
