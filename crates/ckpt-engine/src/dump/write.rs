// SPDX-License-Identifier: MIT OR Apache-2.0
//! Write: records and page contents, after the job has been resumed.

use super::pace::Pace;
use crate::error::DumpError;
use crate::resource::{Collected, Content, Stored, in_order};
use crate::snapshot::{Account, Snapshot};
use crate::track::{Same, Tracker};
use ckpt_image::{Compression, Summary, WriteError, Writer};
use std::path::Path;

/// Creates the image's files in an empty directory: of an incremental image, if there is a parent to build it on.
///
/// # Errors
/// Those of the writer.
pub fn start(
    dir: &Path,
    compression: Compression,
    tracker: Option<&mut Tracker>,
) -> Result<Writer, DumpError> {
    let features = ckpt_sys::arch::cpu_features();
    if let Some(tracker) = tracker
        && let Some(parent) = tracker.parent()
    {
        match Writer::create_incremental(dir, features, compression, parent) {
            Err(e @ WriteError::Parent { .. }) => tracker.no_parent(e.to_string()),
            writer => return Ok(writer?),
        }
    }
    Ok(Writer::create(dir, features, compression)?)
}

/// Writes everything and syncs it.
///
/// # Errors
/// Those of the snapshot and the writer; the caller removes the directory.
pub fn write(
    mut writer: Writer,
    mut collected: Collected,
    snapshot: &mut dyn Snapshot,
    same: &[Vec<Same>],
    pace: &Pace,
    progress: &mut dyn FnMut(u64),
) -> Result<(Summary, Account), DumpError> {
    for r in &collected.records {
        ckpt_sys::hook::point();
        writer.record(r.kind as u16, r.version, r.owner, r.id, &r.body)?;
    }
    if pace.is_limited() {
        // Not seconds ahead of what is allowed.
        writer.keep_up();
    }
    let mut done = 0;
    let mut stored = Stored::default();
    stored.mappings = std::mem::take(&mut collected.mappings);
    let mut advance = |n: u64| {
        done += n;
        progress(done);
    };
    let mut contents = || {
        for r in in_order() {
            let mut cx = Content {
                snapshot: &mut *snapshot,
                sources: &collected.sources,
                same,
                deferred: &collected.deferred,
                kept: &collected.kept,
                stored: &mut stored,
                writer: &mut writer,
                pace,
                progress: &mut advance,
            };
            r.content(&mut cx)?;
        }
        // What has not been read yet must be, as long as it is there.
        Ok::<_, DumpError>(writer.settle()?)
    };
    let contents = contents();
    // What it holds is given back before the image is brought to the disk. That it was lost is the cause of any other error.
    let account = snapshot.finish()?;
    contents?;
    pace.wait(writer.bytes_written());
    DumpError::if_interrupted()?;
    ckpt_sys::hook::point();
    Ok((writer.finish()?, account))
}
