// SPDX-License-Identifier: MIT OR Apache-2.0
//! Removing what is older than the newest checkpoints of a job, without breaking those that are kept.

use super::error::StoreError;
use super::squash::Squash;
use super::{CheckpointEntry, Store};
use std::path::PathBuf;

/// What to keep of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// So many of the newest checkpoints; at least one.
    pub newest: usize,
    /// So many older ones may stay only because the kept ones are built on them. With more, the kept ones that are built on
    /// older ones are squashed, which costs a full image each time: 0 makes it happen with every checkpoint.
    pub needed: usize,
}

/// What [`Store::prune`] did.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Pruned {
    /// Checkpoints that were made full.
    pub squashed: Vec<u64>,
    /// Checkpoints that were removed.
    pub removed: Vec<u64>,
    /// Checkpoints that are older than the ones to keep and stay, because something that stays is built on them.
    pub needed: Vec<u64>,
    /// Where that is now which restores had cut off the job's files, and was kept in a removed checkpoint.
    pub kept: Vec<PathBuf>,
}

impl Store {
    /// Removes the checkpoints of `job` that are older than the newest ones; squashes what must stay readable if too much
    /// would have to stay for it. Every step leaves all checkpoints whole that are to be kept, so it may be interrupted
    /// anywhere and called again. Nothing is removed if a kept checkpoint cannot be squashed. `progress` is that of a squash.
    ///
    /// # Errors
    /// [`StoreError::BadJobName`]; those of [`Store::squash`] and [`Store::remove`], but for a checkpoint that has come to
    /// be needed or was removed meanwhile.
    pub fn prune(
        &self,
        job: &str,
        keep: Keep,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Pruned, StoreError> {
        let entries = self.list_job(job)?;
        let kept_from = entries.len().saturating_sub(keep.newest.max(1));
        let (old, kept) = entries.split_at(kept_from);
        let mut pruned = Pruned { needed: needed(old, kept), ..Pruned::default() };
        if pruned.needed.len() > keep.needed {
            for entry in kept {
                let Some(parent) =
                    entry.parent.filter(|parent| old.iter().any(|o| o.number == parent.number))
                else {
                    continue;
                };
                debug_assert!(parent.number < entry.number);
                let how = Squash { compression: None, progress, step: &mut || (), without_exchange: false };
                self.squash(job, entry.number, how)?;
                pruned.squashed.push(entry.number);
            }
            pruned.needed.clear();
        }
        // Those that are built on others first.
        for entry in
            old.iter().rev().filter(|entry| !pruned.needed.contains(&entry.number)).collect::<Vec<_>>()
        {
            match self.remove(job, entry.number) {
                Ok(kept) => {
                    pruned.removed.push(entry.number);
                    pruned.kept.extend(kept);
                }
                // A dump that goes on is built on it.
                Err(StoreError::Needed { .. }) => pruned.needed.push(entry.number),
                Err(StoreError::NoSuchCheckpoint { .. } | StoreError::NoSuchJob { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        pruned.needed.sort_unstable();
        Ok(pruned)
    }
}

/// Which of `old` some of `kept` is built on, directly or not.
fn needed(old: &[CheckpointEntry], kept: &[CheckpointEntry]) -> Vec<u64> {
    let mut found: Vec<u64> = Vec::new();
    for entry in kept {
        let mut next = entry.parent;
        while let Some(parent) = next {
            let Some(entry) = old.iter().chain(kept).find(|entry| entry.number == parent.number) else {
                break;
            };
            if found.contains(&entry.number) {
                break;
            }
            if old.iter().any(|old| old.number == entry.number) {
                found.push(entry.number);
            }
            // Also ends if an image is damaged so that it goes round in a circle.
            next = entry.parent.filter(|grandparent| grandparent.number < parent.number);
        }
    }
    found
}
