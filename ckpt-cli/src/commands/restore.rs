// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt restore`: bring a job back. The rebuilding itself happens in the job's new init ([`super::init`]).

use std::ffi::OsString;
use std::io::{self};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use ckpt_engine::error::RestoreError;
use ckpt_engine::restore::read::Image;
use ckpt_engine::restore::told::Told;
use ckpt_engine::restore::{FilePolicy, RestoreOptions, page_keeper, plan};
use ckpt_image::store::{Restoration, Store};
use ckpt_job::launch::LaunchEvent;
use ckpt_job::policy::Supervised;
use ckpt_job::spec::TimeTarget;
use ckpt_job::{Job, JobName, LaunchSpec, Registry, Work};

use crate::args::{AsCopy, FilesPolicy, RestoreArgs, TcpChoice};
use crate::commands::copies;
use crate::commands::run::{log_path, stay};
use crate::commands::{store_directory, supervise};
use crate::exit_code::ExitCode;
use crate::report::Report;

/// What init is told.
#[derive(serde::Serialize, serde::Deserialize)]
pub struct RestoreWork {
    /// The checkpoint's name in messages.
    pub label: String,
    /// The decisions.
    pub options: RestoreOptions,
    /// The second descriptor that is passed is the socket of a page keeper.
    pub lazy: bool,
    /// The last one is the gate to wait at before the job runs.
    pub gate: bool,
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

/// What to restore, and how.
pub struct Request<'a> {
    /// The checkpoint's directory.
    pub path: PathBuf,
    /// Another name for the job than it had.
    pub name: Option<JobName>,
    /// Where the restored job's checkpoints and its log go.
    pub store: PathBuf,
    /// What to do about changed files.
    pub files: Option<FilesPolicy>,
    /// Paths whose change is accepted.
    pub allow_changed: &'a [PathBuf],
    /// Put files back whose content is in the image.
    pub rollback_files: bool,
    /// What its dumps do about TCP connections.
    pub tcp: Option<TcpChoice>,
    /// It runs at once, and its memory comes when it is touched.
    pub lazy: bool,
    /// Nobody stays with the job.
    pub detach: bool,
    /// One of several copies.
    pub copy: Option<AsOneOf>,
    /// What a supervisor is to do.
    pub supervised: Option<Supervised>,
    /// It is its supervisor who starts the job again.
    pub by_supervisor: bool,
}

/// One of several copies that are restored together.
pub struct AsOneOf {
    /// Where to wait for the others.
    pub gate: OwnedFd,
    /// The kernel is to look for pages that they share.
    pub mergeable: bool,
    /// Which it is, from 1.
    pub number: u32,
    /// How many there are.
    pub copies: u32,
    /// How many times the checkpoint has been restored, this one included.
    pub of_checkpoint: u32,
}

/// A job that was restored.
pub struct Restored {
    /// It.
    pub job: Job,
    /// Its command.
    pub command: Vec<OsString>,
    /// The checkpoint's name in messages.
    pub label: String,
}

/// Runs the command.
pub fn run(args: &RestoreArgs, report: &Report) -> Result<ExitCode> {
    supervise::divert(args.by_supervisor, report)?;
    if let Some(number) = args.copies {
        return copies::run(args, number, report);
    }
    let store = store_directory(&args.store)?;
    let spec = args.checkpoint.to_str().context("the checkpoint's name is not valid UTF-8")?;
    let by_supervisor = args.by_supervisor.is_some();
    let supervised = match &args.name {
        Some(name) if by_supervisor => Some(Registry::open()?.supervised(name)?),
        _ => None,
    };
    let request = Request {
        path: Store::open(&store)?.resolve(spec)?,
        name: args.name.clone(),
        store,
        files: args.files,
        allow_changed: &args.allow_changed,
        rollback_files: args.rollback_files,
        tcp: args.tcp,
        lazy: args.lazy,
        detach: args.detach,
        copy: match args.as_copy {
            None => None,
            Some(how) => {
                let [number, copies, of_checkpoint] = args.copy_number[..] else {
                    bail!("--as-copy is for ckpt itself; see --copies")
                };
                let mergeable = how == AsCopy::Mergeable;
                Some(AsOneOf { gate: copies::own_gate()?, mergeable, number, copies, of_checkpoint })
            }
        },
        supervised,
        by_supervisor,
    };
    let Restored { job, label, .. } = start(request, report)?;
    if by_supervisor {
        return Ok(ExitCode::SUCCESS);
    }
    let name = job.name.clone();
    if args.json {
        report.print_json(&Outcome {
            name: &name,
            checkpoint: &label,
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

/// Brings a job back; it runs when this returns.
///
/// # Errors
/// Then nothing is left of it.
pub fn start(request: Request<'_>, report: &Report) -> Result<Restored> {
    let Request {
        path,
        name,
        store,
        files,
        allow_changed,
        rollback_files,
        tcp,
        lazy,
        copy,
        detach,
        supervised,
        by_supervisor,
    } = request;
    let image = Image::open(&path)?;
    let name = match name {
        Some(name) => name,
        None => image.job.name.parse::<JobName>().map_err(|e| RestoreError::Record(e.to_string()))?,
    };
    let live: Vec<(String, i32)> =
        ckpt_job::live_jobs()?.into_iter().map(|j| (j.status.record.name.to_string(), j.init_pid)).collect();
    let conflicts = plan::live_conflicts(&image, &live)?;
    if !conflicts.0.is_empty() {
        return Err(RestoreError::Conflicts(conflicts).into());
    }
    let mut told =
        Told { checkpoint: number_of(&path).unwrap_or(0), name: name.to_string(), ..Told::default() };
    let noted = match &copy {
        Some(copy) => {
            (told.copy, told.copies, told.of_checkpoint) = (copy.number, copy.copies, copy.of_checkpoint);
            None
        }
        None => {
            let noted = note(&path, &image, 1, report)?;
            // Without a note it may be another one's memory.
            told.of_checkpoint = noted.as_ref().map_or(2, Restoration::number);
            noted
        }
    };
    let mut noted = Noted(noted);
    let work = RestoreWork {
        label: path.display().to_string(),
        options: RestoreOptions {
            files: match files {
                None => FilePolicy::Auto,
                Some(FilesPolicy::Keep) => FilePolicy::Keep,
                Some(FilesPolicy::Rollback) => FilePolicy::Rollback,
                Some(FilesPolicy::Refuse) => FilePolicy::Refuse,
            },
            allow_changed: allow_changed
                .iter()
                .map(|p| std::path::absolute(p).map(|p| p.to_string_lossy().into_owned()))
                .collect::<io::Result<_>>()?,
            mergeable: copy.as_ref().is_some_and(|copy| copy.mergeable),
            rollback_files,
            told,
        },
        lazy,
        gate: copy.is_some(),
    };
    let dir = std::fs::File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let window = ckpt_sys::pty::window_size(io::stdin().as_fd()).ok().map(|size| (size.rows, size.columns));
    let text = |bytes: &[u8]| (!bytes.is_empty()).then(|| OsString::from_vec(bytes.to_vec()));
    let launch = LaunchSpec {
        log: log_path(&store, &name),
        name,
        store,
        work: Work::Restore(serde_json::to_value(&work)?),
        tty: image.job.tty,
        window,
        detach,
        interceptor: None,
        hostname: text(&image.job.hostname),
        domainname: text(&image.job.domainname).filter(|d| d != "(none)"),
        time: (!ckpt_sys::hook::skipped("job")).then_some(TimeTarget {
            monotonic_ns: image.job.monotonic_ns,
            boottime_ns: image.job.boottime_ns,
        }),
        restored_from: Some(path.display().to_string()),
        restored_command: image.job.argv.iter().map(|a| String::from_utf8_lossy(a).into_owned()).collect(),
        mergeable: work.options.mergeable,
        supervised,
        by_supervisor,
        with_files: rollback_files,
        tcp: tcp.map(TcpChoice::word),
    };
    let command = image.job.argv.iter().map(|word| OsString::from_vec(word.clone())).collect();
    drop(image);
    let mut pass = vec![dir.into()];
    if lazy {
        pass.push(page_keeper::fork().context("preparing a lazy restore")?);
    }
    pass.extend(copy.map(|copy| copy.gate));
    let job = ckpt_job::launch(launch, pass, |event| match event {
        LaunchEvent::Progress(text) => report.progress(&text),
        LaunchEvent::Warning(text) => report.warning(&text),
    });
    report.clear();
    let job = job?;
    // It came about.
    noted.0 = None;
    Ok(Restored { job, command, label: work.label })
}

/// A note of a restore, taken back when dropped.
struct Noted(Option<Restoration>);

impl Drop for Noted {
    fn drop(&mut self) {
        if let Some(noted) = self.0.take() {
            noted.undo();
        }
    }
}

/// The number of a checkpoint in a store.
fn number_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.parse().ok().filter(|number| *number > 0)
}

/// Notes beside the checkpoint that it is restored so many times. `None` if that can't be: then it counts as one that was restored
/// before, and a warning says so if that makes a difference.
///
/// # Errors
/// If the image can't be read.
pub fn note(path: &Path, image: &Image, copies: u32, report: &Report) -> Result<Option<Restoration>> {
    let matters = plan::has_wiped_memory(image)?;
    match Restoration::note(path, copies, matters) {
        Ok(noted) => Ok(Some(noted)),
        Err(error) => {
            if matters {
                report.warning(&format!(
                    "{}: it can't be noted that it is restored ({error}): memory that is to be shared with no copy (MADV_WIPEONFORK) is \
                     wiped, as from the second restore on",
                    path.display()
                ));
            }
            Ok(None)
        }
    }
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
