// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the bytes of a page run are packed: not at all, as one LZ4 block, or as one Zstandard frame.

use std::fmt;
use std::str::FromStr;

/// Zstandard level for dumps: the fastest one, because the dump competes with the application for the CPU.
const ZSTD_LEVEL: i32 = 1;

/// Compression of the page runs of an image (`--compress`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Compression {
    /// Runs are stored as they are, page-aligned.
    #[default]
    None,
    /// LZ4 block format: cheap, modest ratio.
    Lz4,
    /// One Zstandard frame per run: more CPU, better ratio.
    Zstd,
}

/// `--compress` was given a word that names no compression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown compression {0:?}: choose none, lz4 or zstd")]
pub struct UnknownCompression(pub String);

impl Compression {
    /// The number that stands for it in the image.
    pub(crate) fn code(self) -> u32 {
        match self {
            Compression::None => 0,
            Compression::Lz4 => 1,
            Compression::Zstd => 2,
        }
    }

    /// The compression for a number found in an image.
    pub(crate) fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Compression::None),
            1 => Some(Compression::Lz4),
            2 => Some(Compression::Zstd),
            _ => None,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::None => "none",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        })
    }
}

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "none" => Ok(Compression::None),
            "lz4" => Ok(Compression::Lz4),
            "zstd" => Ok(Compression::Zstd),
            _ => Err(UnknownCompression(word.to_owned())),
        }
    }
}

/// Compresses runs one by one, reusing its context and its buffer.
pub(crate) struct Packer {
    compression: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    buffer: Vec<u8>,
}

impl Packer {
    pub(crate) fn new(compression: Compression) -> std::io::Result<Self> {
        let zstd = match compression {
            Compression::Zstd => Some(zstd::bulk::Compressor::new(ZSTD_LEVEL)?),
            _ => None,
        };
        Ok(Packer { compression, zstd, buffer: Vec::new() })
    }

    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    /// The packed form of `raw`, or `None` when packing would not make it smaller.
    pub(crate) fn pack(&mut self, raw: &[u8]) -> Option<&[u8]> {
        // A result that does not fit into less than the raw size is useless, so that is all the room there is.
        let room = raw.len().saturating_sub(8);
        let packed_len = match self.compression {
            Compression::None => return None,
            Compression::Lz4 => {
                self.buffer.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
                lz4_flex::block::compress_into(raw, &mut self.buffer).ok()?
            }
            Compression::Zstd => {
                self.buffer.resize(room, 0);
                self.zstd.as_mut()?.compress_to_buffer(raw, &mut self.buffer[..]).ok()?
            }
        };
        (packed_len <= room).then(|| &self.buffer[..packed_len])
    }
}

/// Unpacks `packed` into exactly `raw`.
///
/// # Errors
/// A message when the bytes are malformed or hold another length than `raw`.
pub(crate) fn unpack(compression: Compression, packed: &[u8], raw: &mut [u8]) -> Result<(), String> {
    let expected = raw.len();
    let got = match compression {
        Compression::None => {
            if packed.len() != expected {
                return Err(format!("holds {} bytes instead of {expected}", packed.len()));
            }
            raw.copy_from_slice(packed);
            expected
        }
        Compression::Lz4 => lz4_flex::block::decompress_into(packed, raw).map_err(|e| format!("lz4: {e}"))?,
        Compression::Zstd => {
            zstd::bulk::decompress_to_buffer(packed, raw).map_err(|e| format!("zstd: {e}"))?
        }
    };
    if got == expected { Ok(()) } else { Err(format!("unpacks to {got} bytes instead of {expected}")) }
}
