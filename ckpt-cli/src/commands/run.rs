// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt run`: start an application as a job.

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use ckpt_image::store::Store;
use ckpt_job::attachment::AttachmentEnd;
use ckpt_job::launch::LaunchEvent;
use ckpt_job::policy::{Policy, Supervised};
use ckpt_job::{Job, JobName, LaunchError, LaunchSpec, Registry, RegistryError, Work};

use clap::ValueEnum as _;
use clap::builder::PossibleValue;

use crate::args::{RunArgs, TcpChoice};
use crate::commands::{restore, store_directory, supervise};
use crate::exit_code::{ExitCode, Usage};
use crate::report::{Report, chain};

/// Runs the command.
pub fn run(args: &RunArgs, report: &Report) -> Result<ExitCode> {
    supervise::divert(args.by_supervisor, report)?;
    let store = store_directory(&args.store)?;
    let interceptor = if args.no_interceptor { None } else { usable_interceptor(report) };
    let tty =
        args.tty || (!args.no_tty && !args.detach && io::stdin().is_terminal() && io::stdout().is_terminal());
    let window = ckpt_sys::pty::window_size(io::stdin().as_fd()).ok().map(|size| (size.rows, size.columns));
    let policy = match (args.by_supervisor, &args.name) {
        (Some(_), Some(name)) => Registry::open()?.supervised(name)?.policy,
        _ => policy(args),
    };
    if !policy.needs_supervisor() && args.supervision.is_about_dumps() {
        bail!(Usage(
            "--keep, --incremental, --compress, --engine, --io-limit and --flush are for dumps that ckpt makes on its own: give \
             --every, --dump-on, --dump-at or --dump-when, too"
        ));
    }
    let directory = std::env::current_dir().context("finding the working directory")?;
    let supervised = |name: &JobName| Supervised {
        name: name.clone(),
        policy: policy.clone(),
        store: store.clone(),
        log: log_path(&store, name),
        argv: args.command.clone(),
        environment: std::env::vars_os().collect(),
        directory: directory.clone(),
        tty,
        detach: args.detach,
        interceptor: !args.no_interceptor,
    };
    let spec = |name: JobName| LaunchSpec {
        log: log_path(&store, &name),
        supervised: policy.needs_supervisor().then(|| supervised(&name)),
        by_supervisor: args.by_supervisor.is_some(),
        with_files: args.with_files,
        tcp: args.tcp.map(TcpChoice::word),
        name,
        store: store.clone(),
        work: Work::Command { argv: args.command.clone(), environment: std::env::vars_os().collect() },
        tty,
        window,
        detach: args.detach,
        interceptor: interceptor.clone(),
        hostname: None,
        domainname: None,
        time: None,
        restored_from: None,
        restored_command: Vec::new(),
        mergeable: false,
    };
    let resumed = match &args.name {
        Some(name) if args.resume => {
            let supervised = policy.needs_supervisor().then(|| supervised(name));
            resume(args, name, &store, supervised, report)?
        }
        _ => None,
    };
    let mut job = match &args.name {
        _ if resumed.is_some() => resumed.context("resumed")?,
        Some(name) => launch(spec(name.clone()), report)?,
        None => loop {
            let name = free_name(&store)?;
            match launch(spec(name), report) {
                // Somebody made up the same name at the same time.
                Err(LaunchError::Registry(RegistryError::NameTaken(_))) => {}
                started => break started?,
            }
        },
    };
    begin_supervision(&mut job, report);
    if args.name.is_none() || args.detach {
        report.note(&format!("job {}", job.name));
    }
    if args.by_supervisor.is_some() {
        return Ok(ExitCode::SUCCESS);
    }
    if args.detach {
        report.note(&format!("output goes to {}", job.log.display()));
        return Ok(ExitCode::SUCCESS);
    }
    stay(job, report)
}

/// Restores the newest whole checkpoint of a name; `None` if there is none.
fn resume(
    args: &RunArgs,
    name: &JobName,
    store: &Path,
    supervised: Option<Supervised>,
    report: &Report,
) -> Result<Option<Job>> {
    let registry = Registry::open()?;
    if registry.is_live(name)? {
        bail!(RegistryError::NameTaken(name.clone()));
    }
    for entry in Store::open(store)?.list_job(name.as_str())?.iter().rev() {
        let label = format!("{name}@{}", entry.number);
        let request = restore::Request {
            path: entry.path.clone(),
            name: Some(name.clone()),
            store: store.to_owned(),
            files: args.files,
            allow_changed: &[],
            rollback_files: args.with_files,
            tcp: args.tcp,
            lazy: false,
            detach: args.detach,
            copy: None,
            supervised: supervised.clone(),
            by_supervisor: false,
        };
        match restore::start(request, report) {
            Ok(started) => {
                if started.command != args.command {
                    report.warning(&format!(
                        "{label} is a checkpoint of another command, which goes on: {}",
                        started
                            .command
                            .iter()
                            .map(|word| word.to_string_lossy())
                            .collect::<Vec<_>>()
                            .join(" ")
                    ));
                }
                report.note(&format!("job {name} goes on from {label}"));
                return Ok(Some(started.job));
            }
            Err(error) => match ExitCode::of_error(&error, ExitCode::OWN_FAILURE) {
                ExitCode::CORRUPT | ExitCode::NOT_FOUND => {
                    report.warning(&format!("{label} is skipped: {}", chain(&error)));
                }
                _ => return Err(error.context(format!("job {name} was not resumed from {label}"))),
            },
        }
    }
    Ok(None)
}

/// Starts the supervisor of a job that is to get one. The job goes on without, if need be.
pub fn begin_supervision(job: &mut Job, report: &Report) {
    let Some(lock) = job.supervision.take() else { return };
    let started = Registry::open()
        .and_then(|registry| registry.supervised(&job.name))
        .map_err(anyhow::Error::from)
        .and_then(|supervised| supervise::start(&job.name, lock, supervise::keeps_descriptors(&supervised)));
    if let Err(error) = started {
        report.warning(&format!(
            "job {} runs unsupervised: {error:#}; try: ckpt supervise {}",
            job.name, job.name
        ));
    }
}

/// What the options ask for.
fn policy(run: &RunArgs) -> Policy {
    let option = |name: &str, value: Option<PossibleValue>| {
        value.map(|value| [name.to_owned(), value.get_name().to_owned()]).into_iter().flatten()
    };
    let args = &run.supervision;
    let switch = |name: &str, on: bool| on.then(|| name.to_owned());
    let compress = option("--compress", args.compress.and_then(|method| method.to_possible_value()));
    let engine = option("--engine", args.engine.and_then(|engine| engine.to_possible_value()));
    let io_limit = args.io_limit.map(|rate| ["--io-limit".to_owned(), rate.to_string()]);
    let io_limit = || io_limit.clone().into_iter().flatten();
    let restore_options = option("--files", run.files.and_then(|files| files.to_possible_value()));
    let tcp = option("--tcp", run.tcp.and_then(|tcp| tcp.to_possible_value()));
    let rollback = switch("--rollback-files", run.with_files);
    Policy {
        every: args.every,
        keep: args.keep,
        dump_options: compress
            .chain(engine)
            .chain(io_limit())
            .chain(switch("--incremental", args.incremental))
            .chain(switch("--flush", args.flush))
            .collect(),
        prune_options: io_limit().collect(),
        restore_options: restore_options.chain(tcp).chain(rollback).collect(),
        dump_on: args.dump_on.clone(),
        dump_at: args.dump_at.clone(),
        dump_when: args.dump_when.clone(),
        recover: args.recover,
        recover_delay: Some(args.recover_delay),
        health: args.health.clone(),
        health_failures: Some(args.health_failures),
        probe_every: Some(args.probe_every),
        probe_timeout: Some(args.probe_timeout),
        hang_after: args.hang_after,
    }
}

fn launch(spec: LaunchSpec, report: &Report) -> Result<Job, LaunchError> {
    let started = ckpt_job::launch(spec, Vec::new(), |event| match event {
        LaunchEvent::Progress(text) => report.progress(&text),
        LaunchEvent::Warning(text) => report.warning(&text),
    });
    report.clear();
    started
}

/// Stays with a job in the foreground; ends with its status.
pub fn stay(job: Job, report: &Report) -> Result<ExitCode> {
    let name = job.name.clone();
    let again = || {
        // It may have ended again already.
        let from = ckpt_job::status(&name).map(|job| job.status.record.restored_from);
        let how = match from {
            Ok(Some(checkpoint)) => format!("was restored from {checkpoint}"),
            Ok(None) => "was started anew".to_owned(),
            Err(_) => "was started again".to_owned(),
        };
        report.note(&format!("job {name} failed and {how}"));
    };
    let end = ckpt_job::foreground(job, again)?;
    Ok(end_of_attachment(&name, end, report))
}

/// What the end of an attachment means for the exit code, and for the person.
pub fn end_of_attachment(name: &JobName, end: AttachmentEnd, report: &Report) -> ExitCode {
    match end {
        AttachmentEnd::Exited(outcome) => ExitCode::of_job(outcome.status),
        AttachmentEnd::TakenOver => {
            report.note(&format!("another terminal is attached to job {name} now; it goes on"));
            ExitCode::SUCCESS
        }
        AttachmentEnd::Saved => {
            let checkpoint = Registry::open().ok().and_then(|registry| registry.saved(name));
            report.note(&format!(
                "job {name} was saved in {} and ended; go on with: ckpt restore {name}, or ckpt run --resume",
                checkpoint.as_deref().unwrap_or("a checkpoint")
            ));
            ExitCode::SAVED
        }
        AttachmentEnd::Detached => {
            report.note(&format!("detached; job {name} goes on"));
            ExitCode::SUCCESS
        }
    }
}

/// Where a job's output goes while nobody is attached.
pub fn log_path(store: &Path, name: &JobName) -> PathBuf {
    store.join(name).join("log")
}

/// A made-up name that neither a live job nor a job in the store has.
pub fn free_name(store: &Path) -> Result<JobName, RegistryError> {
    let registry = Registry::open()?;
    Ok(ckpt_job::made_up_name(|name| registry.entry(name).exists() || store.join(name).exists()))
}

fn usable_interceptor(report: &Report) -> Option<PathBuf> {
    let Some(path) = find_interceptor() else {
        report.warning(
            "libckpt_interceptor.so is neither beside ckpt nor in ../lib/ckpt: the job runs without it and can be dumped all the same; --no-interceptor says that this is intended",
        );
        return None;
    };
    // LD_PRELOAD separates paths by colons and spaces and has no way to quote them (ld.so(8)).
    if path.to_str().is_none_or(|text| text.contains([':', ' ', '\t', '\n'])) {
        report.warning(&format!(
            "{}: the path holds a colon or a space, which LD_PRELOAD cannot express: the job runs without ckpt's interceptor",
            path.display()
        ));
        return None;
    }
    Some(path)
}

/// The interceptor: beside this program, or in ../lib/ckpt.
pub fn find_interceptor() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let directory = program.parent()?;
    let candidates = [
        directory.join("libckpt_interceptor.so"),
        directory.parent().unwrap_or(directory).join("lib/ckpt/libckpt_interceptor.so"),
    ];
    candidates.into_iter().find(|candidate| candidate.is_file())
}
