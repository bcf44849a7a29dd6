// SPDX-License-Identifier: MIT OR Apache-2.0
//! The part of `ckpt dump --incremental` that has to do with store and init: which checkpoint may be built on, and what is left with
//! init for the next one.

use std::path::Path;

use anyhow::Result;
use ckpt_engine::track::{Incremental, Tracking};
use ckpt_image::store::Store;
use ckpt_image::{Parent, read_header, read_link};
use ckpt_job::{JobName, Kept};

use crate::report::Report;

/// Takes what is known about the job's writes. From here until [`leave`] nothing is left with init: a dump that fails or is killed makes the
/// next one a full one. `None` if the job's init can't keep it.
pub fn start(
    name: &JobName,
    store: &Store,
    max_chain: u64,
    soft_dirty: bool,
    report: &Report,
) -> Result<Option<Incremental>> {
    let kept = match ckpt_job::take(name, false) {
        Ok(kept) => kept,
        Err(ckpt_job::client::ClientError::Refused { errno: libc::ENOSYS, .. }) => {
            report.note("a full checkpoint: the job was started by an older ckpt, which can't keep track of its writes");
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let Some(kept) = kept else { return Ok(Some(Incremental { soft_dirty, ..Incremental::default() })) };
    let tracking = match Tracking::from_kept(&kept.note, kept.descriptors) {
        Ok(tracking) => tracking,
        Err(why) => {
            return Ok(Some(Incremental { full_because: Some(why), soft_dirty, ..Incremental::default() }));
        }
    };
    let full_because = match tracking.parent() {
        Some(parent) => why_not(name, store, parent, max_chain)?,
        None => None,
    };
    Ok(Some(Incremental { tracking, full_because, soft_dirty }))
}

/// Why a checkpoint can't be built on `parent`.
fn why_not(name: &JobName, store: &Store, parent: Parent, max_chain: u64) -> Result<Option<String>> {
    let numbers: Vec<u64> = store.list_job(name.as_str())?.iter().map(|c| c.number).collect();
    let number = parent.number;
    let directory = |number: u64| store.root().join(name.as_str()).join(number.to_string());
    if !read_header(&directory(number)).is_ok_and(|h| h.id == parent.id) {
        return Ok(Some(format!(
            "the last incremental checkpoint, {name}@{number}, is not in this store any more"
        )));
    }
    if let Some(newest) = numbers.last().filter(|n| **n != number) {
        return Ok(Some(format!("another checkpoint, {name}@{newest}, has been made since {name}@{number}")));
    }
    let mut images = 0;
    let mut next = Some(number);
    while let Some(number) = next {
        images += 1;
        if images >= max_chain {
            return Ok(Some(format!(
                "{images} checkpoints are built on each other (--max-chain {max_chain})"
            )));
        }
        match read_link(&directory(number)) {
            Ok((_, parent)) => next = parent.map(|p| p.number),
            Err(error) => return Ok(Some(error.to_string())),
        }
    }
    Ok(None)
}

/// Leaves what is known since the checkpoint that has just been published with the job's init.
pub fn leave(name: &JobName, tracking: Tracking, path: &Path, number: u64, report: &Report) {
    let left = read_header(path).map_err(anyhow::Error::from).and_then(|header| {
        let (note, descriptors) = tracking.into_kept(Parent { id: header.id, number });
        Ok(ckpt_job::keep(name, &Kept { descriptors, note })?)
    });
    if let Err(error) = left {
        // The checkpoint is complete, and the job may have ended.
        report.warning(&format!("the next incremental dump will be a full one: {error}"));
    }
}
