// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `spill` engine, for tests only: the copy goes to an unlinked temporary file, in pieces of one page. It shares
//! nothing with `copy` but the seam, and keeps that honest.

use super::{Account, Engine, Piece, Prepared, Sink, Snapshot, Source, read_source};
use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::model::Job;
use crate::resource::Collected;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

const PIECE_BYTES: usize = 4096;

/// The engine.
#[derive(Debug, Clone, Copy)]
pub struct Spill;

#[derive(Debug)]
struct Spilled {
    file: File,
    /// Per source: offset in its object, position in the file, length.
    pieces: Vec<Vec<(u64, u64, usize)>>,
}

fn err(source: std::io::Error) -> DumpError {
    DumpError::Process { pid: 0, what: "temporary file of the snapshot".into(), source }
}

impl Engine for Spill {
    fn name(&self) -> &'static str {
        "spill"
    }

    fn prepare(&self, _: &Job, _: bool) -> Result<Box<dyn Prepared>, DumpError> {
        Ok(Box::new(Spill))
    }
}

impl Prepared for Spill {
    fn needs_bytes(&self) -> u64 {
        0
    }

    fn snapshot(
        self: Box<Self>,
        _: &mut FrozenJob,
        collected: &Collected,
    ) -> Result<Box<dyn Snapshot>, DumpError> {
        let path = std::env::temp_dir().join(format!("ckpt-spill-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(err)?;
        std::fs::remove_file(&path).map_err(err)?;
        let mut out = std::io::BufWriter::new(&file);
        let (mut at, mut pieces) = (0u64, Vec::new());
        for s in &collected.sources {
            let mut list = Vec::new();
            read_source(s, PIECE_BYTES, &mut |piece| {
                let (offset, data) = match piece {
                    Piece::Data(offset, data) => (offset, data.to_vec()),
                    Piece::Unread(unread) => (unread.offset, unread.to_vec()?),
                    Piece::Zero(offset, bytes) => (offset, vec![0; bytes as usize]),
                };
                out.write_all(&data).map_err(err)?;
                list.push((offset, at, data.len()));
                at += data.len() as u64;
                Ok(())
            })?;
            pieces.push(list);
        }
        out.flush().map_err(err)?;
        drop(out);
        Ok(Box::new(Spilled { file, pieces }))
    }
}

impl Snapshot for Spilled {
    fn stream(&mut self, index: usize, _: &Source, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        let mut buf = vec![0u8; PIECE_BYTES];
        for &(offset, at, len) in &self.pieces[index] {
            self.file.read_exact_at(&mut buf[..len], at).map_err(err)?;
            sink(Piece::Data(offset, &buf[..len]))?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Account, DumpError> {
        Ok(Account { engine: "spill", ..Account::default() })
    }
}
