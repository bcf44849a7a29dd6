// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt restore`: bring a job back. The rebuilding itself happens in the job's new init ([`super::init`]).

use std::ffi::OsString;
use std::io::{self};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStringExt as _;

use anyhow::{Context as _, Result};
use ckpt_engine::error::RestoreError;
use ckpt_engine::restore::read::Image;
use ckpt_engine::restore::{FilePolicy, RestoreOptions, page_keeper, plan};
use ckpt_image::store::Store;
use ckpt_job::launch::LaunchEvent;
use ckpt_job::spec::TimeTarget;
use ckpt_job::{JobName, LaunchSpec, Work};

use crate::args::{FilesPolicy, RestoreArgs};
use crate::commands::run::{log_path, stay};
use crate::commands::store_directory;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// What init is told.
#[derive(serde::Serialize, serde::Deserialize)]
pub struct RestoreWork {
    /// The checkpoint's name in messages.
    pub label: String,
    /// The decisions.
    pub options: RestoreOptions,
}

#[derive(serde::Serialize)]
struct Outcome<'a> {
    name: &'a JobName,
    checkpoint: &'a str,
    init_pid: i32,
    main_pid: i32,
    log: &'a std::path::Path,
    /// What init says of the restore: how long its phases took.
    #[serde(flatten)]
    details: &'a serde_json::Value,
}

/// Runs the command.
pub fn run(args: &RestoreArgs, report: &Report) -> Result<ExitCode> {
    let store = store_directory(&args.store)?;
    let spec = args.checkpoint.to_str().context("the checkpoint's name is not valid UTF-8")?;
    let path = Store::open(&store)?.resolve(spec)?;
    let image = Image::open(&path)?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => image.job.name.parse::<JobName>().map_err(|e| RestoreError::Record(e.to_string()))?,
    };
    let live: Vec<(String, i32)> =
        ckpt_job::live_jobs()?.into_iter().map(|j| (j.status.record.name.to_string(), j.init_pid)).collect();
    let conflicts = plan::live_conflicts(&image, &live)?;
    if !conflicts.0.is_empty() {
        return Err(RestoreError::Conflicts(conflicts).into());
    }
    let work = RestoreWork {
        label: path.display().to_string(),
        options: RestoreOptions {
            files: match args.files {
                None => FilePolicy::Auto,
                Some(FilesPolicy::Keep) => FilePolicy::Keep,
                Some(FilesPolicy::Rollback) => FilePolicy::Rollback,
                Some(FilesPolicy::Refuse) => FilePolicy::Refuse,
            },
            allow_changed: args
                .allow_changed
                .iter()
                .map(|p| std::path::absolute(p).map(|p| p.to_string_lossy().into_owned()))
                .collect::<io::Result<_>>()?,
        },
    };
    let dir = std::fs::File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let window = ckpt_sys::pty::window_size(io::stdin().as_fd()).ok().map(|size| (size.rows, size.columns));
    let text = |bytes: &[u8]| (!bytes.is_empty()).then(|| OsString::from_vec(bytes.to_vec()));
    let launch = LaunchSpec {
        log: log_path(&store, &name),
        name: name.clone(),
        store,
        work: Work::Restore(serde_json::to_value(&work)?),
        tty: image.job.tty,
        window,
        detach: args.detach,
        interceptor: None,
        hostname: text(&image.job.hostname),
        domainname: text(&image.job.domainname).filter(|d| d != "(none)"),
        time: (!ckpt_sys::hook::skipped("job")).then_some(TimeTarget {
            monotonic_ns: image.job.monotonic_ns,
            boottime_ns: image.job.boottime_ns,
        }),
        restored_from: Some(path.display().to_string()),
        restored_command: image.job.argv.iter().map(|a| String::from_utf8_lossy(a).into_owned()).collect(),
    };
    drop(image);
    let mut pass = vec![dir.into()];
    if args.lazy {
        pass.push(page_keeper::fork().context("preparing a lazy restore")?);
    }
    let job = ckpt_job::launch(launch, pass, |event| match event {
        LaunchEvent::Progress(text) => report.progress(&text),
        LaunchEvent::Warning(text) => report.warning(&text),
    });
    report.clear();
    let job = job?;
    if args.json {
        report.print_json(&Outcome {
            name: &name,
            checkpoint: &work.label,
            init_pid: job.init_pid,
            main_pid: job.main_pid,
            log: &job.log,
            details: &job.details,
        })?;
    }
    if args.detach {
        if !args.json {
            report.note(&format!("job {name} goes on; its output goes to {}", job.log.display()));
        }
        return Ok(ExitCode::SUCCESS);
    }
    stay(job, report)
}

/// The exit code for a checkpoint that can't be read.
pub fn code_of(error: &RestoreError) -> Option<ExitCode> {
    match error {
        RestoreError::Image(error) => super::verify::code_of(error),
        RestoreError::Record(_) => Some(ExitCode::CORRUPT),
        RestoreError::Conflicts(_) => Some(ExitCode::CONFLICT),
        RestoreError::Host(_) => Some(ExitCode::HOST_CANNOT),
        _ => None,
    }
}
