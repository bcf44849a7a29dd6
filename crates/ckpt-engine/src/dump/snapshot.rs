// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshot: hands all sources to the engine. The job is resumed right after.

use super::freeze::FrozenJob;
use crate::error::DumpError;
use crate::model::memory::read_smaps;
use crate::resource::Collected;
use crate::snapshot::{Prepared, Snapshot};
use crate::track::Tracker;

/// Takes the snapshot, of an incremental dump through the tracker.
///
/// # Errors
/// Those of the engine.
pub fn take(
    engine: Box<dyn Prepared>,
    mut tracker: Option<&mut Tracker>,
    frozen: &mut FrozenJob,
    collected: &mut Collected,
) -> Result<Box<dyn Snapshot>, DumpError> {
    let snapshot = match &mut tracker {
        Some(tracker) => tracker.snapshot(engine, frozen, collected)?,
        None => engine.snapshot(frozen, collected)?,
    };
    for p in frozen.job.live().filter(|p| p.assumed_flags && !snapshot.keeps_mappings(p.pid)) {
        let vmas = match tracker.as_mut().and_then(|t| t.mappings(p)) {
            Some(vmas) => vmas,
            #[cfg(feature = "test-hooks")]
            None if std::env::var_os("CKPT_TEST_FLAGS_OF_PARTS").is_some() => {
                let source = std::io::Error::other("all of smaps would have to be read");
                return Err(DumpError::process(p.pid, "reading flags of parts of mappings")(source));
            }
            None => read_smaps(p.host.as_raw()).map_err(DumpError::process(p.pid, "reading smaps"))?,
        };
        collected.mappings.insert(p.pid, vmas);
    }
    Ok(snapshot)
}
