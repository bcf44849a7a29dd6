// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshot: hands all sources to the engine. The job is resumed right after.

use super::freeze::FrozenJob;
use crate::error::DumpError;
use crate::resource::Collected;
use crate::snapshot::{Prepared, Snapshot};

/// Takes the snapshot.
///
/// # Errors
/// Those of the engine.
pub fn take(
    engine: Box<dyn Prepared>,
    frozen: &mut FrozenJob,
    collected: &Collected,
) -> Result<Box<dyn Snapshot>, DumpError> {
    engine.snapshot(frozen, collected)
}
