// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shared memory is copied while the job runs, and compared with that copy in the freeze (docs/adr/0022-shared-memory-is-compared.md).

use super::{FileContent, From, Piece, Sink, Source, read_file, read_source, unread};
use crate::error::DumpError;
use crate::model::Job;
use crate::resource::{Collected, shared_memory};
use ckpt_image::{Origin, WriteError};
use ckpt_sys::memory::PAGE;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

/// Compared at a time: what is read stays in the processor's cache.
const STEP_BYTES: usize = 256 << 10;
/// Less is not worth a second thread.
const SHARED_WORK_BYTES: u64 = 8 << 20;

/// Device and inode.
type Identity = (u64, u64);

/// Copies of shared memory, made while the job ran.
#[derive(Debug, Clone, Default)]
pub struct Precopied {
    copies: BTreeMap<Identity, Arc<FileContent>>,
    /// Two threads compare.
    share_work: bool,
}

/// A source as it was in the freeze.
#[derive(Debug)]
pub struct Compared {
    copy: Arc<FileContent>,
    /// Offset and length in bytes of what there is.
    extents: Vec<(u64, u64)>,
    /// Bytes that had changed since they were copied.
    pub changed_bytes: u64,
}

fn err(what: &'static str) -> impl FnOnce(std::io::Error) -> DumpError {
    DumpError::process(0, what)
}

/// Which memory a source is of, if it is shared memory.
fn identity(source: &Source, collected: &Collected) -> Option<Identity> {
    match &source.from {
        From::File { fd, .. } => {
            let file = File::from(fd.try_clone().ok()?);
            file.metadata().ok().map(|m| (m.dev(), m.ino()))
        }
        From::Process { .. } => {
            let mut objects = collected.objects.iter();
            objects.find(|(_, object)| **object == source.object).map(|(identity, _)| *identity)
        }
    }
}

/// Copies the shared memory of a running job. What can't be read now, and what there is no room for, is left to the freeze.
pub fn precopy(job: &Job) -> Precopied {
    let share_work = std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
    let mut out = Precopied { share_work, ..Precopied::default() };
    // Holes count as well: an upper bound.
    let Ok(found) = shared_memory(job) else { return out };
    if found.sources.iter().map(Source::bytes).sum::<u64>() > ckpt_sys::memory::available_bytes() / 2 {
        return out;
    }
    for source in &found.sources {
        ckpt_sys::hook::point();
        let Some(identity) = identity(source, &found) else { continue };
        let Some(copy) = out.copies.get(&identity).cloned().or_else(|| memory_file().ok().map(Arc::new))
        else {
            continue;
        };
        let mut buffer = vec![0; STEP_BYTES];
        let copied = read_source(source, STEP_BYTES, &mut |piece| {
            let Piece::Unread(unread) = piece else { return Ok(()) };
            let buffer = &mut buffer[..unread.bytes];
            unread.read(buffer)?;
            // What is zero need not be held: that is what a hole reads as.
            if buffer.iter().all(|b| *b == 0) {
                return Ok(());
            }
            copy.file.write_all_at(buffer, unread.offset).map_err(err("copying shared memory"))
        });
        // One that ends before it has been read, or is truncated, is of no harm: it is compared.
        if copied.is_ok() {
            out.copies.insert(identity, copy);
        }
    }
    out
}

fn memory_file() -> std::io::Result<FileContent> {
    let file = ckpt_sys::memory::memory_file(c"ckpt-shared")?;
    Ok(FileContent { file, bytes: u64::MAX, what: "reading the copy of shared memory" })
}

impl Precopied {
    /// Brings the copy of a source of the frozen job up to date: pages that are not equal are copied. `None` if there is none.
    ///
    /// # Errors
    /// If a page can't be read or written.
    pub fn compare(&self, source: &Source, collected: &Collected) -> Result<Option<Compared>, DumpError> {
        let copy = identity(source, collected).and_then(|identity| self.copies.get(&identity));
        let Some(copy) = copy else { return Ok(None) };
        let mut out = Compared { copy: Arc::clone(copy), extents: Vec::new(), changed_bytes: 0 };
        match &source.from {
            From::File { fd, bytes } if self.share_work && *bytes >= SHARED_WORK_BYTES => {
                let middle = bytes / 2 / PAGE * PAGE;
                let mut second = Compared { copy: Arc::clone(copy), extents: Vec::new(), changed_bytes: 0 };
                let (a, b) = std::thread::scope(|scope| {
                    let other = scope
                        .spawn(|| second.update(&mut |sink| read_file(fd, middle..*bytes, STEP_BYTES, sink)));
                    let a = out.update(&mut |sink| read_file(fd, 0..middle, STEP_BYTES, sink));
                    (a, other.join())
                });
                a?;
                b.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                out.extents.append(&mut second.extents);
                out.changed_bytes += second.changed_bytes;
            }
            _ => out.update(&mut |sink| read_source(source, STEP_BYTES, sink))?,
        }
        Ok(Some(out))
    }
}

impl Compared {
    fn update(
        &mut self,
        read: &mut dyn FnMut(&mut Sink<'_>) -> Result<(), DumpError>,
    ) -> Result<(), DumpError> {
        let (mut now, mut then) = (vec![0; STEP_BYTES], vec![0; STEP_BYTES]);
        read(&mut |piece| {
            ckpt_sys::hook::point();
            let Piece::Unread(unread) = piece else { return Ok(()) };
            let (offset, bytes) = (unread.offset, unread.bytes);
            let (now, then) = (&mut now[..bytes], &mut then[..bytes]);
            unread.read(now)?;
            self.copy.read(offset, then).map_err(WriteError::Origin)?;
            let mut at = 0;
            while at < bytes {
                let mut end = at;
                while end < bytes && differs(now, then, end) {
                    end += PAGE as usize;
                }
                if end > at {
                    let changed = self.copy.file.write_all_at(&now[at..end], offset + at as u64);
                    changed.map_err(err("copying shared memory"))?;
                    self.changed_bytes += (end - at) as u64;
                }
                at = end + PAGE as usize;
            }
            match self.extents.last_mut() {
                Some((start, all)) if *start + *all == offset => *all += bytes as u64,
                _ => self.extents.push((offset, bytes as u64)),
            }
            Ok(())
        })
    }

    /// Gives all of it, in pieces of at most `piece` bytes.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn stream(&self, piece: usize, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        let origin = &(Arc::clone(&self.copy) as Arc<dyn Origin>);
        self.extents.iter().try_for_each(|(at, bytes)| unread(origin, (*at, *at, *bytes), piece, sink))
    }
}

fn differs(now: &[u8], then: &[u8], at: usize) -> bool {
    let page = at..at + PAGE as usize;
    // Tests may have it ignored: their guests must then find wrong memory.
    #[cfg(feature = "test-hooks")]
    if std::env::var_os("CKPT_TEST_IGNORE_WRITES").is_some() {
        return false;
    }
    now[page.clone()] != then[page]
}
