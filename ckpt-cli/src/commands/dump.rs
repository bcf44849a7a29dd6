// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt dump`: save all of a job. This process is the dumper: whatever kills it leaves the job running.

use anyhow::{Context as _, Result};
use ckpt_engine::dump::{DumpRequest, dump};
use ckpt_engine::error::DumpError;
use ckpt_engine::snapshot::Engine;
use ckpt_engine::snapshot::copy::Copy;
use ckpt_image::store::{Claim, Store, free_bytes};
use ckpt_image::{Compression, WriteError};

use crate::args::{self, DumpArgs};
use crate::commands::{job_info, store_directory};
use crate::exit_code::ExitCode;
use crate::report::Report;

#[derive(serde::Serialize)]
struct Outcome<'a> {
    checkpoint: &'a str,
    path: &'a std::path::Path,
    bytes: u64,
    pause_ns: u64,
    processes: usize,
    threads: usize,
    memory_bytes: u64,
    engine: &'a str,
    warnings: &'a [String],
}

/// Runs the command.
pub fn run(args: &DumpArgs, report: &Report) -> Result<ExitCode> {
    let name = &args.name;
    let job = ckpt_job::status(name)?;
    let _lock = ckpt_job::lock_for_dump(name)?;
    let info = job_info::of(&job);
    // What may be unsupported is named before a directory is made for it.
    ckpt_engine::dump::check(&info)?;
    let claim = match &args.dir {
        Some(dir) => Claim::for_dir(dir)?,
        None => {
            let root = if args.store.store.is_some() {
                store_directory(&args.store)?
            } else {
                job.status.record.store.clone()
            };
            Store::open(&root)?.claim(name.as_str())?
        }
    };
    let engine = engine();
    let outcome = dump(DumpRequest {
        info,
        dir: claim.dir(),
        compression: match args.compress {
            args::Compression::None => Compression::None,
            args::Compression::Lz4 => Compression::Lz4,
            args::Compression::Zstd => Compression::Zstd,
        },
        engine,
        stop: args.stop,
        free_bytes: free_bytes(claim.dir())?,
        progress: &mut |done, all| {
            report.progress(&format!("{name}: {} of {} MiB", done >> 20, all >> 20));
        },
    });
    report.clear();
    let mut outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            // A claim that is dropped takes its directory with it.
            drop(claim);
            return Err(error).with_context(|| format!("job {name} was not dumped"));
        }
    };
    let number = claim.number();
    ckpt_sys::hook::point();
    let path = claim.publish()?;
    ckpt_sys::hook::point();
    if args.stop {
        outcome.stop_job();
        // Its name is free when this returns.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while ckpt_job::status(name).is_ok() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    ckpt_sys::hook::report();
    let checkpoint = number.map_or_else(|| path.display().to_string(), |n| format!("{name}@{n}"));
    let bytes = outcome.summary.records_bytes + outcome.summary.pages_bytes;
    for w in &outcome.warnings {
        report.warning(w);
    }
    if args.json {
        report.print_json(&Outcome {
            checkpoint: &checkpoint,
            path: &path,
            bytes,
            pause_ns: u64::try_from(outcome.pause.as_nanos()).unwrap_or(u64::MAX),
            processes: outcome.processes,
            threads: outcome.threads,
            memory_bytes: outcome.memory_bytes,
            engine: outcome.account.engine,
            warnings: &outcome.warnings,
        })?;
    } else {
        let pause = outcome.pause.as_secs_f64() * 1000.0;
        let (processes, threads) = (outcome.processes, outcome.threads);
        report.print(&format!(
            "{checkpoint}: {:.1} MiB, {processes} processes, {threads} threads, stood still for {pause:.1} ms",
            bytes as f64 / 1_048_576.0
        ));
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(not(feature = "test-hooks"))]
fn engine() -> &'static dyn Engine {
    &Copy
}

/// Tests may choose the second engine, which keeps the seam honest.
#[cfg(feature = "test-hooks")]
fn engine() -> &'static dyn Engine {
    if std::env::var_os("CKPT_TEST_ENGINE").is_some_and(|v| v == "spill") {
        return &ckpt_engine::snapshot::spill::Spill;
    }
    &Copy
}

/// The exit code for a failed dump.
pub fn code_of(error: &DumpError) -> Option<ExitCode> {
    match error {
        DumpError::Refused(_) => Some(ExitCode::REFUSED),
        DumpError::JobEnded => Some(ExitCode::NOT_FOUND),
        DumpError::Space { .. } => Some(ExitCode::NO_SPACE),
        DumpError::Image(WriteError::Io { source, .. }) if crate::exit_code::is_storage(source) => {
            Some(ExitCode::NO_SPACE)
        }
        _ => None,
    }
}
