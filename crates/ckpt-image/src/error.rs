// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors of reading and of writing an image.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why an image could not be read. Messages say which file, where, what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}{}", IoHint(source))]
    Io {
        /// The file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The directory lacks a file of the image.
    #[error(
        "{path}: damaged: there is no such file in the checkpoint's directory; put it back, or restore an older checkpoint (`ckpt list` shows what there is)"
    )]
    FileMissing {
        /// The file.
        path: String,
    },
    /// The file does not begin like an image of ckpt.
    #[error("{path}: not a ckpt image ({what}); name a checkpoint directory, `ckpt list` shows them")]
    NotAnImage {
        /// The file.
        path: String,
        /// What was found instead.
        what: String,
    },
    /// Written by a newer ckpt.
    #[error(
        "{path}: {what} has version {found}, this ckpt reads up to {supported}: use the ckpt that wrote it, or a newer one"
    )]
    TooNew {
        /// The file.
        path: String,
        /// Which part of it.
        what: String,
        /// Version found.
        found: u32,
        /// Newest version known here.
        supported: u32,
    },
    /// Well-formed, but for something this ckpt does not do.
    #[error("{path}: {what}")]
    Unsupported {
        /// The file.
        path: String,
        /// What it asks for and what to do.
        what: String,
    },
    /// The bytes are not what was written.
    #[error(
        "{path}: damaged at byte {offset}: {what}; restore an older checkpoint, or copy this one again from where it is whole"
    )]
    Damaged {
        /// The file.
        path: String,
        /// Where, in bytes from the start of the file.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// An incremental checkpoint whose parent is not there.
    #[error(
        "{path}: an incremental checkpoint, and the one it is built on, {parent}, is not there; put it back, or restore a checkpoint that does not need it (`ckpt list` shows what each one needs)"
    )]
    ParentMissing {
        /// The incremental checkpoint.
        path: String,
        /// Where its parent should be.
        parent: String,
    },
    /// An incremental checkpoint beside which another checkpoint has the number of its parent.
    #[error(
        "{path}: an incremental checkpoint, built on another one than what is now {parent}; put the right one back, or restore a checkpoint that does not need it"
    )]
    ParentMismatched {
        /// The incremental checkpoint.
        path: String,
        /// What is found in its parent's place.
        parent: String,
    },
    /// A chain of more images than one may have.
    #[error(
        "{path}: a chain of more than {limit} incremental checkpoints, which ckpt does not write; restore another checkpoint"
    )]
    ChainTooLong {
        /// The newest checkpoint of the chain.
        path: String,
        /// The most images a chain may have.
        limit: usize,
    },
    /// A checkpoint on which an incremental one is built cannot be read.
    #[error("{source} (the incremental checkpoint {path} needs it)")]
    Parent {
        /// The incremental checkpoint that was asked for.
        path: String,
        /// What is wrong with the one below it.
        source: Box<ReadError>,
    },
    /// `records` and `pages` come from different checkpoints.
    #[error(
        "{path}: belongs to another checkpoint than the `records` file beside it; put the right one back"
    )]
    Mismatched {
        /// The `pages` file.
        path: String,
    },
}

/// Why an image could not be written. The image is useless then and [`Writer::finish`](crate::Writer::finish)
/// refuses to complete it.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}{}", IoHint(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The record is larger than an image may hold.
    #[error(
        "record kind {kind:#06x} of process {owner}, id {id:#x}, is {bytes} bytes long, the limit is {limit}"
    )]
    RecordTooLong {
        /// Kind of the record.
        kind: u16,
        /// Its owner.
        owner: u64,
        /// Its id.
        id: u64,
        /// Its length in bytes.
        bytes: usize,
        /// The longest body allowed, in bytes.
        limit: usize,
    },
    /// The kind number belongs to the image itself.
    #[error("record kind {kind:#06x} is reserved for the image format (0xff00 to 0xffff)")]
    ReservedKind {
        /// The kind.
        kind: u16,
    },
    /// Offset or length is no multiple of the page size, or beyond the end of the address space.
    #[error(
        "pages of object {object:#x} at {offset:#x}, {bytes} bytes: not whole pages, or past the largest offset"
    )]
    BadRange {
        /// The object.
        object: u64,
        /// Byte offset inside it.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// The same page of an object was given twice, or one of the parent used twice.
    #[error(
        "pages of object {object:#x} at {offset:#x}, {bytes} bytes: some of them were written, or used, before"
    )]
    Overlap {
        /// The object.
        object: u64,
        /// Byte offset inside it.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// The `records` file would become larger than readers accept.
    #[error("the image would need more than {limit} bytes of records: dump fewer processes at a time")]
    TooManyRecords {
        /// The largest `records` file, in bytes.
        limit: u64,
    },
    /// The image is incremental and its parent cannot be one, or it is full and cannot have unchanged pages.
    #[error("{path}: cannot be written as an incremental checkpoint: {what}")]
    Parent {
        /// The directory of the image.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Content could not be read where it was to be read from.
    #[error(transparent)]
    Origin(Box<dyn std::error::Error + Send + Sync>),
    /// An earlier write failed, so the image cannot be completed.
    #[error("the image is incomplete: an earlier write to it failed")]
    Incomplete,
}

/// Displays what to do about an I/O error, as a continuation of its message; nothing if there is no advice.
pub struct IoHint<'a>(pub &'a io::Error);

impl fmt::Display for IoHint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use nix::errno::Errno;
        let hint = match self.0.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOSPC) => {
                "; the file system is full: free space (`ckpt rm` removes old checkpoints) or choose another with --store or --dir"
            }
            Some(Errno::EDQUOT) => {
                "; your quota there is used up: remove old checkpoints with `ckpt rm` or choose another place with --store or --dir"
            }
            Some(Errno::EROFS) => {
                "; the file system is mounted read-only: choose another with --store or --dir"
            }
            Some(Errno::EACCES | Errno::EPERM) => "; check who owns it and its mode",
            Some(Errno::ENOENT) => "; check the path, `ckpt list` shows what there is",
            Some(Errno::EFBIG) => "; a file size limit is in force: see `ulimit -f`",
            Some(Errno::EIO) => "; the device reports an error: see `dmesg`",
            Some(Errno::ESTALE) => "; the network file system lost the file: try again",
            Some(Errno::EMFILE | Errno::ENFILE) => "; too many files are open: see `ulimit -n`",
            Some(Errno::ELOOP) => "; it is a symbolic link, which is not followed",
            _ => return Ok(()),
        };
        f.write_str(hint)
    }
}
