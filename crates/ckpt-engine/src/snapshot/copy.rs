// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `copy` engine: everything is copied into ckpt's own memory while the job is frozen.

use super::precopy::Compared;
use super::{Account, Engine, Piece, Prepared, Sink, Snapshot, Source, private_bytes, read_source};
use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::model::Job;
use crate::resource::Collected;
use ckpt_image::ZeroPages;

const PIECE_BYTES: usize = 1 << 20;
/// Its name.
pub const NAME: &str = "copy";

/// The engine.
#[derive(Debug, Clone, Copy)]
pub struct Copy;

#[derive(Debug)]
struct Ready {
    needs_bytes: u64,
}

/// Pages by offset in their object.
pub type Pieces = Vec<(u64, Vec<u8>)>;

#[derive(Debug)]
struct Copied {
    sources: Vec<Held>,
    held_bytes: u64,
}

/// A source.
#[derive(Debug)]
enum Held {
    Pieces(Pieces),
    /// Shared memory, which was copied before.
    Compared(Compared),
}

impl Engine for Copy {
    fn name(&self) -> &'static str {
        NAME
    }

    fn prepare(&self, job: &Job, _: bool) -> Result<Box<dyn Prepared>, DumpError> {
        Ok(Box::new(Ready { needs_bytes: private_bytes(job) }))
    }
}

/// Keeps one piece of a source. Memory nobody has written to need not be held, where it isn't stored either.
///
/// # Errors
/// If it can't be read.
pub fn keep(pieces: &mut Pieces, source: &Source, piece: Piece<'_>) -> Result<(), DumpError> {
    ckpt_sys::hook::point();
    let record = source.zeros == ZeroPages::Record;
    let (offset, data) = match piece {
        Piece::Data(offset, data) => (offset, data.to_vec()),
        Piece::Unread(unread) => (unread.offset, unread.to_vec()?),
        Piece::Zero(offset, bytes) if record => (offset, vec![0; bytes as usize]),
        Piece::Zero(..) => return Ok(()),
    };
    if record || data.iter().any(|b| *b != 0) {
        pieces.push((offset, data));
    }
    Ok(())
}

impl Prepared for Ready {
    fn needs_bytes(&self) -> u64 {
        self.needs_bytes
    }

    fn snapshot(
        self: Box<Self>,
        _: &mut FrozenJob,
        collected: &Collected,
    ) -> Result<Box<dyn Snapshot>, DumpError> {
        let mut sources = Vec::with_capacity(collected.sources.len());
        let mut held_bytes = 0;
        for s in &collected.sources {
            if let Some(compared) = collected.precopied.compare(s, collected)? {
                held_bytes += compared.changed_bytes;
                sources.push(Held::Compared(compared));
                continue;
            }
            let mut pieces = Pieces::new();
            read_source(s, PIECE_BYTES, &mut |piece| keep(&mut pieces, s, piece))?;
            held_bytes += pieces.iter().map(|(_, d)| d.len() as u64).sum::<u64>();
            sources.push(Held::Pieces(pieces));
        }
        Ok(Box::new(Copied { sources, held_bytes }))
    }
}

impl Snapshot for Copied {
    fn stream(&mut self, index: usize, _: &Source, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        // Memory is given back as it is written.
        match std::mem::replace(&mut self.sources[index], Held::Pieces(Pieces::new())) {
            Held::Pieces(pieces) => {
                for (offset, data) in pieces {
                    sink(Piece::Data(offset, &data))?;
                }
            }
            Held::Compared(compared) => compared.stream(PIECE_BYTES, sink)?,
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Account, DumpError> {
        let duplicated_bytes = Some(0);
        Ok(Account { engine: NAME, held_bytes: self.held_bytes, duplicated_bytes, ..Account::default() })
    }
}
