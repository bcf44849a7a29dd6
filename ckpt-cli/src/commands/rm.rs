// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt rm`: remove checkpoints.

use anyhow::{Context as _, Result};
use ckpt_image::store::Store;

use crate::args::RmArgs;
use crate::commands::store_directory;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// Runs the command.
pub fn run(args: &RmArgs, report: &Report) -> Result<ExitCode> {
    let store = Store::open(&store_directory(&args.store)?)?;
    for spec in &args.checkpoints {
        // What does not exist is an error before anything is removed for this argument.
        store.resolve(spec)?;
        let (job, number) = match spec.split_once('@') {
            Some((job, n)) => (job, Some(n.parse::<u64>().with_context(|| format!("{spec}: no number"))?)),
            None => (spec.as_str(), None),
        };
        let numbers: Vec<u64> = match number {
            Some(n) => vec![n],
            None => store.list_job(job)?.iter().map(|e| e.number).collect(),
        };
        for n in numbers {
            store.remove(job, n)?;
            report.print(&format!("removed {job}@{n}"));
        }
        store.sweep(job)?;
    }
    Ok(ExitCode::SUCCESS)
}
