// SPDX-License-Identifier: MIT OR Apache-2.0
//! Record bodies: structs to bytes and back, with bincode 2, little-endian and fixed width.
//!
//! The only module that names bincode. Types derive [`Encode`] and [`Decode`] from here and say where the
//! generated code finds the library:
//!
//! ```
//! use ckpt_image::codec::{self, Decode, Encode};
//!
//! #[derive(Encode, Decode, PartialEq, Debug)]
//! #[bincode(crate = "ckpt_image::codec::bincode")]
//! struct PipeV1 { capacity_bytes: u32, unread: Vec<u8> }
//!
//! let pipe = PipeV1 { capacity_bytes: 65536, unread: b"abc".to_vec() };
//! let body = codec::encode(&pipe).unwrap();
//! assert_eq!(codec::decode::<PipeV1>(&body).unwrap(), pipe);
//! ```
//!
//! (The attribute is not needed in a crate that depends on bincode itself.)
//!
//! Limits: a body is at most [`MAX_BODY_BYTES`] long; while decoding, containers may claim at most
//! [`DECODE_LIMIT_BYTES`] of memory ahead of the bytes that fill them. Record types must not contain
//! containers of zero-sized elements (their count costs no bytes, so it would not be bounded) and must not be
//! recursive (the depth would not be bounded).

use crate::format::MAX_BODY_BYTES;

#[doc(hidden)]
pub use bincode;
pub use bincode::{Decode, Encode};

/// The most memory that length prefixes may claim before their elements were read, in bytes.
pub const DECODE_LIMIT_BYTES: usize = 4 * MAX_BODY_BYTES;

/// Why a record body could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The value cannot be expressed.
    #[error("cannot encode a {what}: {source}")]
    Encode {
        /// Name of the type.
        what: &'static str,
        /// The reason.
        source: Box<bincode::error::EncodeError>,
    },
    /// Encoded, it is longer than a body may be.
    #[error("a {what} of {bytes} bytes is too long for a record, the limit is {MAX_BODY_BYTES}")]
    TooLong {
        /// Name of the type.
        what: &'static str,
        /// Length in bytes.
        bytes: usize,
    },
    /// The bytes are no such value.
    #[error(
        "cannot decode a {what} from {bytes} bytes: {source}; the checkpoint was not written by this format version"
    )]
    Decode {
        /// Name of the type.
        what: &'static str,
        /// Length of the body in bytes.
        bytes: usize,
        /// The reason.
        source: Box<bincode::error::DecodeError>,
    },
    /// Bytes are left over after the value.
    #[error(
        "a {what} ends after {used} of {bytes} bytes; the checkpoint was not written by this format version"
    )]
    Trailing {
        /// Name of the type.
        what: &'static str,
        /// Bytes that the value took.
        used: usize,
        /// Length of the body in bytes.
        bytes: usize,
    },
}

type Config = bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Fixint,
    bincode::config::Limit<DECODE_LIMIT_BYTES>,
>;

fn config() -> Config {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<DECODE_LIMIT_BYTES>()
}

/// The last part of a type's path, for messages.
fn name_of<T>() -> &'static str {
    let path = std::any::type_name::<T>();
    let end = path.find('<').unwrap_or(path.len());
    path[..end].rfind("::").map_or(path, |at| &path[at + 2..])
}

/// Encodes a record body.
///
/// # Errors
/// [`CodecError::TooLong`] beyond [`MAX_BODY_BYTES`]; [`CodecError::Encode`] if a part of the value has no
/// encoding (a path that is not UTF-8, for example).
pub fn encode<T: Encode>(value: &T) -> Result<Vec<u8>, CodecError> {
    let what = name_of::<T>();
    let body = bincode::encode_to_vec(value, config())
        .map_err(|source| CodecError::Encode { what, source: Box::new(source) })?;
    if body.len() > MAX_BODY_BYTES {
        return Err(CodecError::TooLong { what, bytes: body.len() });
    }
    Ok(body)
}

/// Decodes a record body, which must be used up exactly.
///
/// # Errors
/// [`CodecError::Decode`] and [`CodecError::Trailing`] when the bytes are not exactly one such value.
pub fn decode<T: Decode<()>>(body: &[u8]) -> Result<T, CodecError> {
    let what = name_of::<T>();
    let bytes = body.len();
    let (value, used) = bincode::decode_from_slice(body, config()).map_err(|source| CodecError::Decode {
        what,
        bytes,
        source: Box::new(source),
    })?;
    if used != bytes {
        return Err(CodecError::Trailing { what, used, bytes });
    }
    Ok(value)
}
