// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt rm`: remove checkpoints.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use ckpt_image::store::Store;

use crate::args::RmArgs;
use crate::commands::store_directory;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// Runs the command.
pub fn run(args: &RmArgs, report: &Report) -> Result<ExitCode> {
    let store = Store::open(&store_directory(&args.store)?)?;
    // What does not exist is an error before anything is removed.
    let mut doomed: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    for spec in &args.checkpoints {
        let (job, number) = store.checkpoint(spec)?;
        let numbers = match spec.contains('@') {
            true => vec![number],
            false => store.list_job(&job)?.iter().map(|e| e.number).collect(),
        };
        doomed.entry(job).or_default().extend(numbers);
    }
    for (job, numbers) in doomed {
        // Incremental checkpoints before those that they are built on.
        for n in numbers.into_iter().rev() {
            store.remove(&job, n)?;
            report.print(&format!("removed {job}@{n}"));
        }
        store.sweep(&job)?;
    }
    Ok(ExitCode::SUCCESS)
}
