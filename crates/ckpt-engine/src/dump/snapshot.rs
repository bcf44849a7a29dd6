// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshot: hands all sources to the engine. The job is resumed right after.

use crate::error::DumpError;
use crate::snapshot::{Engine, Snapshot, Source};

/// Takes the snapshot.
///
/// # Errors
/// Those of the engine.
pub fn take(engine: &dyn Engine, sources: &[Source]) -> Result<Box<dyn Snapshot>, DumpError> {
    engine.snapshot(sources)
}
