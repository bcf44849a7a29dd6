// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `copy` engine: everything is copied into ckpt's own memory while the job is frozen.

use super::{Engine, Sink, Snapshot, Source, read_source};
use crate::error::DumpError;
use ckpt_image::ZeroPages;

const PIECE_BYTES: usize = 1 << 20;

/// The engine.
#[derive(Debug, Clone, Copy)]
pub struct Copy;

#[derive(Debug)]
struct Copied {
    sources: Vec<Vec<(u64, Vec<u8>)>>,
}

impl Engine for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn needs_bytes(&self, sources: &[Source]) -> u64 {
        sources.iter().map(Source::bytes).sum()
    }

    fn snapshot(&self, sources: &[Source]) -> Result<Box<dyn Snapshot>, DumpError> {
        let mut all = Vec::with_capacity(sources.len());
        for s in sources {
            let mut pieces = Vec::new();
            read_source(s, PIECE_BYTES, &mut |offset, data| {
                ckpt_sys::hook::point();
                // Memory nobody has written to need not be held, where it isn't stored either.
                if s.zeros == ZeroPages::Record || data.iter().any(|b| *b != 0) {
                    pieces.push((offset, data.to_vec()));
                }
                Ok(())
            })?;
            all.push(pieces);
        }
        Ok(Box::new(Copied { sources: all }))
    }
}

impl Snapshot for Copied {
    fn stream(&mut self, index: usize, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        // Memory is given back as it is written.
        for (offset, data) in std::mem::take(&mut self.sources[index]) {
            sink(offset, &data)?;
        }
        Ok(())
    }

    fn held_bytes(&self) -> u64 {
        self.sources.iter().flatten().map(|(_, d)| d.len() as u64).sum()
    }
}
