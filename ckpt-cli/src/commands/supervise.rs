// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt supervise`, and how every supervisor is started. The supervisor itself is [`crate::supervisor`].

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use ckpt_job::policy::Supervised;
use ckpt_job::{JobName, Registry};

use crate::args::SuperviseArgs;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// The first argument that makes the program a supervisor.
pub const SUPERVISE_ARGUMENT: &str = "__supervise";

/// Runs the command.
pub fn run(args: &SuperviseArgs, report: &Report) -> Result<ExitCode> {
    let registry = Registry::open()?;
    ckpt_job::status(&args.name)?;
    let job = registry.supervised(&args.name)?;
    let Some(lock) = registry.lock_supervision(&args.name)? else {
        return Err(ckpt_job::RegistryError::Supervised(args.name.clone()).into());
    };
    start(&args.name, lock, keeps_descriptors(&job))?;
    report.note(&format!("job {} is supervised again", args.name));
    Ok(ExitCode::SUCCESS)
}

/// For a command that a supervisor started: its messages go to this descriptor, as stderr is the job's.
///
/// # Errors
/// If it is not open.
pub fn divert(messages: Option<RawFd>, report: &Report) -> Result<()> {
    if let Some(fd) = messages {
        report.divert(File::from(ckpt_sys::spawn::adopt_inherited(fd)?));
    }
    Ok(())
}

/// Which of the standard descriptors a supervisor has to keep for its job's next run.
pub fn keeps_descriptors(job: &Supervised) -> impl Fn(RawFd) -> bool {
    let inherits = job.policy.recover.is_some() && !job.detach;
    let tty = job.tty;
    move |fd| {
        use std::io::IsTerminal as _;
        inherits
            && !ckpt_sys::spawn::started_with_fd_closed(fd)
            && (!tty || (fd == 2 && !io::stderr().is_terminal()))
    }
}

/// Starts the supervisor of a job, which holds `lock` from now on. It has this process's descriptors; of the standard ones those that it
/// keeps.
///
/// # Errors
/// As fork and exec.
pub fn start(name: &JobName, lock: File, keeps: impl Fn(RawFd) -> bool) -> Result<()> {
    let program = std::env::current_exe().context("finding the program that supervises")?;
    let mut command = Command::new(program);
    command.arg(SUPERVISE_ARGUMENT).arg(name.as_str()).arg(lock.as_raw_fd().to_string());
    let stdio = |fd| if keeps(fd) { Stdio::inherit() } else { Stdio::null() };
    command.stdin(stdio(0)).stdout(stdio(1)).stderr(stdio(2));
    ckpt_sys::spawn::clean_start(&mut command, vec![lock.as_raw_fd()], false);
    command.spawn().context("starting the job's supervisor")?;
    Ok(())
}
