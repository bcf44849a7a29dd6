// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt list`: the checkpoints in the store.

use std::time::UNIX_EPOCH;

use anyhow::Result;
use ckpt_image::store::{CheckpointEntry, Store, built_on};

use crate::args::ListArgs;
use crate::commands::store_directory;
use crate::exit_code::ExitCode;
use crate::report::{Report, table};

#[derive(serde::Serialize)]
struct Row<'a> {
    checkpoint: String,
    job: &'a str,
    number: u64,
    path: &'a std::path::Path,
    bytes: u64,
    created_unix: u64,
    /// Number of the checkpoint that it is built on.
    parent: Option<u64>,
    /// Images that a restore of it reads; none: one of them is missing.
    images: Option<usize>,
}

fn created(e: &CheckpointEntry) -> u64 {
    e.created.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn images(e: &CheckpointEntry, entries: &[CheckpointEntry]) -> Option<usize> {
    built_on(e, entries).map(|below| below.len() + 1)
}

/// Runs the command.
pub fn run(args: &ListArgs, report: &Report) -> Result<ExitCode> {
    let store = Store::open(&store_directory(&args.store)?)?;
    let entries = match &args.name {
        Some(name) => store.list_job(name.as_str())?,
        None => store.list()?,
    };
    if args.json {
        let rows: Vec<Row<'_>> = entries
            .iter()
            .map(|e| Row {
                checkpoint: format!("{}@{}", e.job, e.number),
                job: &e.job,
                number: e.number,
                path: &e.path,
                bytes: e.bytes,
                created_unix: created(e),
                parent: e.parent.map(|p| p.number),
                images: images(e, &entries),
            })
            .collect();
        report.print_json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let now = std::time::SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let rows: Vec<Vec<String>> = entries
        .iter()
        .map(|e| {
            let size = format!("{:.1} MiB", e.bytes as f64 / 1_048_576.0);
            let built_on = match (e.parent, images(e, &entries)) {
                (None, _) => String::new(),
                (Some(parent), Some(images)) => format!("@{} ({images} images)", parent.number),
                (Some(parent), None) => format!("@{} (missing)", parent.number),
            };
            vec![format!("{}@{}", e.job, e.number), size, age(now.saturating_sub(created(e))), built_on]
        })
        .collect();
    let mut header = vec!["CHECKPOINT", "SIZE", "AGE"];
    if entries.iter().any(|e| e.parent.is_some()) {
        header.push("BUILT ON");
    }
    report.print(&table(&header, &rows));
    Ok(ExitCode::SUCCESS)
}

fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}
