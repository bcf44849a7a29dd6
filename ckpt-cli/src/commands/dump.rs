// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt dump`: save all of a job. This process is the dumper: whatever kills it leaves the job running.

use std::num::NonZeroU64;

use anyhow::{Context as _, Result};
use ckpt_engine::dump::barrier::{BarrierPolicy, BarrierReport};
use ckpt_engine::dump::{DumpRequest, dump};
use ckpt_engine::error::DumpError;
use ckpt_engine::snapshot::Engine;
use ckpt_engine::snapshot::copy::Copy;
use ckpt_engine::snapshot::cow::Cow;
use ckpt_engine::snapshot::kmod::{self, Kmod};
use ckpt_engine::track;
use ckpt_image::store::{Claim, Store, free_bytes};
use ckpt_image::{Compression, WriteError};

use crate::args::{self, DumpArgs, EngineChoice};
use crate::commands::{incremental, job_info, store_directory};
use crate::exit_code::ExitCode;
use crate::report::Report;

#[derive(serde::Serialize)]
struct Outcome<'a> {
    checkpoint: &'a str,
    path: &'a std::path::Path,
    bytes: u64,
    pause_ns: u64,
    /// Each phase of the dump; those from "stop" to "resume" make up the pause.
    phases_ns: std::collections::BTreeMap<&'a str, u64>,
    processes: usize,
    threads: usize,
    memory_bytes: u64,
    engine: &'a str,
    /// The checkpoint that it is built on.
    parent: Option<String>,
    #[serde(flatten)]
    incremental: Option<Changes<'a>>,
    engine_reasons: &'a [String],
    held_bytes: u64,
    early_bytes: u64,
    duplicated_bytes: Option<u64>,
    /// Files and directories that were flushed (`--flush`).
    flushed_files: Option<usize>,
    barrier: &'a BarrierReport,
    warnings: &'a [String],
}

/// Of an incremental dump.
#[derive(serde::Serialize)]
struct Changes<'a> {
    dirty_pages: u64,
    same_pages: u64,
    full_because: Option<&'a str>,
    /// What tells which pages are written until the next one.
    writes_from: Vec<&'a str>,
    notes: &'a [String],
}

/// Runs the command.
pub fn run(args: &DumpArgs, report: &Report) -> Result<ExitCode> {
    let name = &args.name;
    // Each process that is forked takes a descriptor until all are.
    ckpt_engine::restore::page_keeper::raise_limit();
    ckpt_sys::descriptor::make_room();
    let job = ckpt_job::status(name)?;
    let _lock = ckpt_job::lock_for_dump(name)?;
    if job.status.missing_memory.is_some() {
        report.progress(&format!("{name}: waiting for memory that is still in the checkpoint it came from"));
        ckpt_job::settle(name)?;
        report.clear();
    }
    let engine = engine(args)?;
    let info = job_info::of(&job, args.tcp)?;
    let with_files = job.status.record.with_files;
    // What is unsupported is named before what is known of its writes is taken, which a refused dump would lose. With hooks, it may
    // yet be closed by an on_dump.
    if args.incremental && ckpt_engine::dump::hooks::registered(info.init).is_empty() {
        ckpt_engine::dump::check(&info)?;
    }
    let root = if args.store.store.is_some() {
        store_directory(&args.store)?
    } else {
        job.status.record.store.clone()
    };
    // From here on something would be left: the claimed directory, and an application that has heard of a dump.
    ckpt_sys::interruption::note();
    let mut incremental = None;
    let claim = match &args.dir {
        Some(dir) => Claim::for_dir(dir)?,
        None => {
            let store = Store::open(&root)?;
            if args.incremental {
                incremental = incremental::start(name, &store, args.max_chain, args.soft_dirty, report)?;
            }
            store.claim(name.as_str())?
        }
    };
    let outcome = dump(DumpRequest {
        info,
        dir: claim.dir(),
        compression: match args.compress {
            args::Compression::None => Compression::None,
            args::Compression::Lz4 => Compression::Lz4,
            args::Compression::Zstd => Compression::Zstd,
        },
        engine: engine.as_ref(),
        stop: args.stop,
        incremental,
        with_files: args.with_files || with_files,
        flush: args.flush,
        barrier: BarrierPolicy { timeout: args.barrier_timeout, strict: args.strict },
        io_limit: args.io_limit,
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
    ckpt_sys::hook::before_publish();
    DumpError::if_interrupted().with_context(|| format!("job {name} was not dumped"))?;
    ckpt_sys::hook::point();
    let path = claim.publish()?;
    ckpt_sys::hook::point();
    outcome.published(number);
    let checkpoint = number.map_or_else(|| path.display().to_string(), |n| format!("{name}@{n}"));
    if args.stop {
        // For whoever waits for the job's end; not worth an error, as the job is saved.
        let noted = ckpt_job::Registry::open().and_then(|registry| registry.write_saved(name, &checkpoint));
        if let Err(error) = noted {
            report.warning(&error.to_string());
        }
        outcome.stop_job();
        // Its name is free when this returns.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while ckpt_job::status(name).is_ok() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    let changes = outcome.incremental.take();
    let parent = changes.as_ref().and_then(|c| c.parent).map(|p| format!("{name}@{}", p.number));
    let mut said = Vec::new();
    let mut counts = (0, 0);
    let mut full_because = None;
    let mut writes_from = Vec::new();
    if let Some(track::Outcome {
        tracking, dirty_pages, same_pages, full_because: why, notes, sources, ..
    }) = changes
    {
        (counts, said, full_because) = ((dirty_pages, same_pages), notes, why);
        writes_from.extend(sources);
        if !args.stop
            && let Some(number) = number
        {
            incremental::leave(name, tracking, &path, number, report);
        }
    }
    ckpt_sys::hook::report();
    let bytes = outcome.summary.records_bytes + outcome.summary.pages_bytes;
    for w in &outcome.warnings {
        report.warning(w);
    }
    if args.engine == EngineChoice::Auto
        && let Some(why) = why_not_kmod(args)
    {
        outcome.account.reasons.push(format!("kmod: {why}"));
    }
    let account = &outcome.account;
    if args.json {
        let ns = |d: std::time::Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        report.print_json(&Outcome {
            checkpoint: &checkpoint,
            path: &path,
            bytes,
            pause_ns: ns(outcome.pause),
            phases_ns: outcome.phases.all.iter().map(|(name, took)| (*name, ns(*took))).collect(),
            processes: outcome.processes,
            threads: outcome.threads,
            memory_bytes: outcome.memory_bytes,
            engine: account.engine,
            engine_reasons: &account.reasons,
            held_bytes: account.held_bytes,
            early_bytes: account.early_bytes,
            duplicated_bytes: account.duplicated_bytes,
            parent,
            incremental: args.incremental.then_some(Changes {
                dirty_pages: counts.0,
                same_pages: counts.1,
                full_because: full_because.as_deref(),
                writes_from,
                notes: &said,
            }),
            flushed_files: outcome.flushed_files,
            barrier: &outcome.barrier,
            warnings: &outcome.warnings,
        })?;
    } else {
        let pause = outcome.pause.as_secs_f64() * 1000.0;
        let (processes, threads) = (outcome.processes, outcome.threads);
        let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
        let duplicated =
            account.duplicated_bytes.map_or("an unknown amount".to_owned(), |n| format!("{:.1} MiB", mib(n)));
        let early = match account.early_bytes {
            0 => String::new(),
            n => format!(" and {:.1} MiB before", mib(n)),
        };
        report.print(&format!(
            "{checkpoint}: {:.1} MiB, {processes} processes, {threads} threads, stood still for {pause:.1} ms\n\
             engine {}: {:.1} MiB copied while it stood still{early}, {duplicated} duplicated since",
            mib(bytes),
            account.engine,
            mib(account.held_bytes)
        ));
        if let Some(parent) = parent {
            let (dirty, same) = counts;
            report.print(&format!("built on {parent}: {dirty} pages changed, {same} are the same"));
        }
        if let Some(why) = full_because {
            report.print(&format!("a full checkpoint: {why}"));
        }
        said.iter().for_each(|line| report.note(line));
        account.reasons.iter().for_each(|reason| report.print(&format!("  {reason}")));
    }
    Ok(ExitCode::SUCCESS)
}

fn engine(args: &DumpArgs) -> Result<Box<dyn Engine>, DumpError> {
    // Tests may choose an engine that shares nothing with the others but the seam, and keeps that honest.
    #[cfg(feature = "test-hooks")]
    if std::env::var_os("CKPT_TEST_ENGINE").is_some_and(|v| v == "spill") {
        return Ok(Box::new(ckpt_engine::snapshot::spill::Spill));
    }
    match args.engine {
        EngineChoice::Auto if why_not_kmod(args).is_none() => Ok(Box::new(Kmod)),
        EngineChoice::Auto | EngineChoice::Cow => {
            let duplicate_limit_bytes = args.duplicate_limit.map(NonZeroU64::get);
            Ok(Box::new(Cow { duplicate_limit_bytes }))
        }
        EngineChoice::Kmod => match why_not_kmod(args) {
            None => Ok(Box::new(Kmod)),
            Some(why) => Err(DumpError::NoEngine { engine: kmod::NAME, why }),
        },
        EngineChoice::Copy => Ok(Box::new(Copy)),
    }
}

/// Why the kernel module is not used, if so.
fn why_not_kmod(args: &DumpArgs) -> Option<String> {
    match args.duplicate_limit {
        Some(_) => Some("--duplicate-limit is kept by the engine cow alone".to_owned()),
        None => kmod::host_obstacle(),
    }
}

/// The exit code for a failed dump.
pub fn code_of(error: &DumpError) -> Option<ExitCode> {
    match error {
        DumpError::Refused(_) => Some(ExitCode::REFUSED),
        DumpError::Late { .. } => Some(ExitCode::LATE),
        DumpError::Interrupted(signal) => Some(ExitCode(128u8.saturating_add(*signal as i32 as u8))),
        DumpError::JobEnded => Some(ExitCode::NOT_FOUND),
        DumpError::NoEngine { .. } => Some(ExitCode::HOST_CANNOT),
        DumpError::Space { .. } => Some(ExitCode::NO_SPACE),
        DumpError::Image(WriteError::Io { source, .. }) if crate::exit_code::is_storage(source) => {
            Some(ExitCode::NO_SPACE)
        }
        _ => None,
    }
}
