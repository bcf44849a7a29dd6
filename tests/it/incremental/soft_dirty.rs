// SPDX-License-Identifier: MIT OR Apache-2.0
//! `dump --incremental --soft-dirty`: only where nothing better is to be had, as on Linux 6.1 without the kernel module. `scripts/vm
//! --product` runs these there, and lets none be skipped.

use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::*;

/// Without the module, and with trust in the kernel's bits.
const SOFT_DIRTY: [&str; 3] = ["--engine", "cow", "--soft-dirty"];
/// The same without that trust.
const ALONE: [&str; 2] = ["--engine", "cow"];

/// Whether soft-dirty bits are the best that there is here, as on Linux 6.1: `scripts/vm --product` has such a kernel.
fn uses_soft_dirty(test: &str) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|n| n.trim().parse::<u32>().ok());
    let why = match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < (6, 7) => match has_soft_dirty_bits() {
            true => return true,
            false => "this kernel has no soft-dirty bits",
        },
        _ => "this kernel has something better (Linux 6.7)",
    };
    announce(&format!("skipped: {test} by soft-dirty bits: {why}"));
    false
}

/// Found by doing, once: another test that clears the bits at the same time would spoil it.
fn has_soft_dirty_bits() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    let look = || -> std::io::Result<bool> {
        let mut page = vec![1u8; 4096];
        fs::write("/proc/self/clear_refs", "4")?;
        std::hint::black_box(&mut page)[0] = 2;
        let mut entry = [0; 8];
        fs::File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page.as_ptr() as u64 / 4096 * 8)?;
        Ok(u64::from_ne_bytes(entry) >> 55 & 1 == 1)
    };
    *HAS.get_or_init(|| look().unwrap_or(false))
}

/// That these bits alone, and for every process, tell what is written until the next dump.
fn by_soft_dirty(said: serde_json::Value) -> Outcome<serde_json::Value> {
    let tells = serde_json::json!(["soft-dirty"]);
    if said["writes_from"] != tells || said["notes"] != serde_json::json!([]) || said["engine"] == "kmod" {
        return Err(Failure(format!("not by soft-dirty bits alone: {said}")));
    }
    Ok(said)
}

/// That nothing is taken from an earlier checkpoint, and that it is said why, for the job and for each process with these words.
fn is_full(said: &serde_json::Value, words: &str) -> Outcome<()> {
    let notes = said["notes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let explained = notes.iter().all(|note| note.as_str().is_some_and(|note| note.contains(words)));
    if parent(said).is_some() || !said["full_because"].is_string() || count(said, "same_pages") != 0 {
        return Err(Failure(format!("not a full one with a reason: {said}")));
    }
    if notes.is_empty() || !explained {
        return Err(Failure(format!("not of every process: {words:?}: {said}")));
    }
    Ok(())
}

#[test]
fn a_chain_equals_a_full_checkpoint() {
    if !uses_soft_dirty("incremental-soft-dirty") {
        return;
    }
    each_user("incremental-soft-dirty", Users::Both, |sandbox| {
        let mut random = Random::announced(&format!("incremental-soft-dirty as {}", sandbox.user.name()));
        with_ready_job(&guest(&mut random, "steps"), sandbox, |job, nonce| {
            let first = by_soft_dirty(dump_and_compare(job, sandbox, &SOFT_DIRTY)?)?;
            if parent(&first).is_some() {
                return Err(Failure(format!("the first one has a parent: {first}")));
            }
            for number in 1..=steps() {
                step(sandbox, number)?;
                let said = by_soft_dirty(dump_and_compare(job, sandbox, &SOFT_DIRTY)?)?;
                let expected = format!("{}@{number}", job.name);
                // Pages that a process shares with the one it was forked from are not known to be the same.
                if parent(&said) != Some(&expected) || count(&said, "same_pages") < 100 {
                    return Err(Failure(format!("not built on {expected}: {said}")));
                }
            }
            job.kill()?;
            restore(job)?;
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn little_is_stored_when_little_has_changed() {
    if uses_soft_dirty("incremental-soft-dirty-size") {
        little_is_stored("incremental-soft-dirty-size", &SOFT_DIRTY);
    }
}

#[test]
fn used_if_asked_for_and_if_nobody_else_clears_them() {
    if !uses_soft_dirty("incremental-soft-dirty-doubt") {
        return;
    }
    each_user("incremental-soft-dirty-doubt", Users::Both, |sandbox| {
        let mut random =
            Random::announced(&format!("incremental-soft-dirty-doubt as {}", sandbox.user.name()));
        with_ready_job(&guest(&mut random, "steps"), sandbox, |job, nonce| {
            const NOT_ASKED: &str = "are used with --soft-dirty only";
            // The second one has a checkpoint to be built on, and no reason to be.
            is_full(&dump(job, &ALONE)?, NOT_ASKED)?;
            step(sandbox, 1)?;
            is_full(&dump(job, &ALONE)?, NOT_ASKED)?;
            by_soft_dirty(dump_and_compare(job, sandbox, &SOFT_DIRTY)?)?;
            step(sandbox, 2)?;
            for process in job.processes().iter().skip(1) {
                fs::write(format!("/proc/{}/clear_refs", process.pid), "4")
                    .map_err(|e| Failure(format!("clearing the bits of {process:?}: {e}")))?;
            }
            is_full(&dump_and_compare(job, sandbox, &SOFT_DIRTY)?, "somebody else has cleared")?;
            step(sandbox, 3)?;
            let said = by_soft_dirty(dump_and_compare(job, sandbox, &SOFT_DIRTY)?)?;
            if parent(&said).is_none() {
                return Err(Failure(format!("a full one: {said}")));
            }
            is_full(&dump(job, &ALONE)?, NOT_ASKED)?;
            job.kill()?;
            restore(job)?;
            passes(sandbox, nonce)
        })
    });
}
