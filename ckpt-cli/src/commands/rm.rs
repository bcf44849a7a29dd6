// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt rm`: remove checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Result, bail};
use ckpt_engine::dump::pace::Pace;
use ckpt_image::store::{Keep, Store};

use crate::args::RmArgs;
use crate::commands::store_directory;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// Names of checkpoints, in the order in which it was done.
#[derive(Default, serde::Serialize)]
struct Outcome {
    removed: Vec<String>,
    /// Made full, so that what they were built on could go.
    squashed: Vec<String>,
    /// Not removed, because something that stays is built on them.
    needed: Vec<String>,
    /// Where that is now which restores had cut off the job's files, and was kept in a removed checkpoint.
    cut_ends: Vec<String>,
}

impl Outcome {
    fn cut_ends(&mut self, kept: &[PathBuf], args: &RmArgs, report: &Report) {
        for path in kept {
            let path = path.display().to_string();
            if !args.json {
                report.print(&format!("kept {path}, which a restore had cut off a file"));
            }
            self.cut_ends.push(path);
        }
    }
}

/// Runs the command.
pub fn run(args: &RmArgs, report: &Report) -> Result<ExitCode> {
    let store = Store::open(&store_directory(&args.store)?)?;
    let mut outcome = Outcome::default();
    let done = match args.keep {
        Some(keep) => keep_newest(args, keep, &store, &mut outcome, report),
        None => remove(args, &store, &mut outcome, report),
    };
    if args.json {
        // What was done before an error is told, too.
        report.print_json(&outcome)?;
    }
    done.map(|()| ExitCode::SUCCESS)
}

fn remove(args: &RmArgs, store: &Store, outcome: &mut Outcome, report: &Report) -> Result<()> {
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
            let kept = store.remove(&job, n)?;
            outcome.cut_ends(&kept, args, report);
            told(&mut outcome.removed, "removed", &job, &[n], args, report);
        }
        store.sweep(&job)?;
    }
    Ok(())
}

fn keep_newest(
    args: &RmArgs,
    keep: u32,
    store: &Store,
    outcome: &mut Outcome,
    report: &Report,
) -> Result<()> {
    if let Some(spec) = args.checkpoints.iter().find(|spec| spec.contains('@')) {
        bail!("--keep goes through all checkpoints of a job: {spec} is a single one; give the name alone");
    }
    let mut jobs = BTreeSet::new();
    for spec in &args.checkpoints {
        jobs.insert(store.checkpoint(spec)?.0);
    }
    let keep = Keep { newest: keep as usize, needed: args.keep_needed as usize };
    let pace = Pace::new(args.io_limit);
    let (mut before, mut last) = (0, 0);
    for job in jobs {
        let mut progress = |done, all| {
            // Each checkpoint that is squashed counts from 0.
            before += if done < last { last } else { 0 };
            last = done;
            pace.wait(before + done);
            report.progress(&format!("{job}: squashing, {} of {} MiB", done >> 20, all >> 20));
        };
        let done = store.prune(&job, keep, &mut progress)?;
        report.clear();
        told(&mut outcome.squashed, "squashed", &job, &done.squashed, args, report);
        told(&mut outcome.removed, "removed", &job, &done.removed, args, report);
        outcome.cut_ends(&done.kept, args, report);
        told(&mut outcome.needed, "still needed:", &job, &done.needed, args, report);
        store.sweep(&job)?;
    }
    Ok(())
}

fn told(list: &mut Vec<String>, what: &str, job: &str, numbers: &[u64], args: &RmArgs, report: &Report) {
    for number in numbers {
        let name = format!("{job}@{number}");
        if !args.json {
            report.print(&format!("{what} {name}"));
        }
        list.push(name);
    }
}
