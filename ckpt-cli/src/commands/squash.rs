// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt squash`: make an incremental checkpoint a full one, in place.

use anyhow::Result;
use ckpt_engine::dump::pace::Pace;
use ckpt_image::store::{Squash, Store};

use crate::args::SquashArgs;
use crate::commands::{compression, store_directory};
use crate::exit_code::ExitCode;
use crate::report::Report;

#[derive(serde::Serialize)]
struct Outcome<'a> {
    checkpoint: &'a str,
    /// Images that the chain had; 1: the checkpoint was a full one before.
    images: usize,
    bytes_before: u64,
    bytes: u64,
}

/// Runs the command.
pub fn run(args: &SquashArgs, report: &Report) -> Result<ExitCode> {
    let store = Store::open(&store_directory(&args.store)?)?;
    let (job, number) = store.checkpoint(&args.checkpoint)?;
    let name = format!("{job}@{number}");
    let pace = Pace::new(args.io_limit);
    let done = store.squash(
        &job,
        number,
        Squash {
            compression: args.compress.map(compression),
            progress: &mut |done, all| {
                pace.wait(done);
                report.progress(&format!("{name}: {} of {} MiB", done >> 20, all >> 20));
            },
            step: &mut ckpt_sys::hook::point,
            without_exchange: false,
        },
    )?;
    ckpt_sys::hook::report();
    if args.json {
        let (images, bytes_before, bytes) = (done.images, done.bytes_before, done.bytes);
        report.print_json(&Outcome { checkpoint: &name, images, bytes_before, bytes })?;
    } else if done.images == 1 {
        report.print(&format!("{name}: is a full checkpoint already"));
    } else {
        let size = done.bytes as f64 / 1_048_576.0;
        report
            .print(&format!("{name}: folded {} images into a full checkpoint of {size:.1} MiB", done.images));
    }
    Ok(ExitCode::SUCCESS)
}
