// SPDX-License-Identifier: MIT OR Apache-2.0
//! `--keep N`: which checkpoints may go.

use anyhow::Result;
use ckpt_image::store::Store;
use std::path::Path;

/// Removes all but the newest `keep` checkpoints of a job. Says which.
///
/// # Errors
/// If the store cannot be read. What cannot be removed is left for the next time.
pub fn prune(store: &Path, job: &str, keep: u32) -> Result<Vec<u64>> {
    let store = Store::open(store)?;
    let numbers: Vec<u64> = store.list_job(job)?.iter().map(|entry| entry.number).collect();
    let mut removed = Vec::new();
    // From the newest on: what another was built on can go once that is gone, and not before.
    for number in older_than_newest(&numbers, keep).into_iter().rev() {
        if store.remove(job, number).is_ok() {
            removed.push(number);
        }
    }
    Ok(removed)
}

/// Of numbers in order, those before the last `keep`.
fn older_than_newest(numbers: &[u64], keep: u32) -> Vec<u64> {
    let kept = usize::try_from(keep).unwrap_or(usize::MAX);
    numbers[..numbers.len().saturating_sub(kept)].to_vec()
}

#[cfg(test)]
mod tests {
    use super::older_than_newest;

    #[test]
    fn the_newest_stay() {
        assert_eq!(older_than_newest(&[1, 2, 5, 9], 2), [1, 2]);
        assert!(older_than_newest(&[1, 2], 2).is_empty());
        assert!(older_than_newest(&[], 1).is_empty());
    }
}
