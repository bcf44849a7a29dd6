// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshot: hands all sources to the engine. The job is resumed right after.

use super::freeze::FrozenJob;
use crate::error::DumpError;
use crate::resource::Collected;
use crate::snapshot::{Prepared, Snapshot};
use crate::track::Tracker;

/// Takes the snapshot, of an incremental dump through the tracker.
///
/// # Errors
/// Those of the engine.
pub fn take(
    engine: Box<dyn Prepared>,
    tracker: Option<&mut Tracker>,
    frozen: &mut FrozenJob,
    collected: &mut Collected,
) -> Result<Box<dyn Snapshot>, DumpError> {
    match tracker {
        Some(tracker) => tracker.snapshot(engine, frozen, collected),
        None => engine.snapshot(frozen, collected),
    }
}
