// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hidden command that is pid 1 of a job; see [`ckpt_job::init_main`].

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use ckpt_engine::error::RestoreError;
use ckpt_engine::restore::page_server::PageServer;
use ckpt_engine::restore::{RestoreRequest, rebuild};
use ckpt_job::{ExitStatus, InitContext, StartError, StartErrorClass, Started, Work, command, init_main};

use super::restore::RestoreWork;

/// Never returns.
pub fn run() -> ! {
    init_main(start)
}

fn start(context: &mut InitContext) -> Result<Started, StartError> {
    match &context.spec.work {
        Work::Command { .. } => command::start(context),
        Work::Restore(work) => {
            let work = serde_json::from_value(work.clone())
                .map_err(|e| StartError::new(StartErrorClass::Failure, format!("what to restore: {e}")))?;
            restore(context, work)
        }
    }
}

fn restore(context: &mut InitContext, work: RestoreWork) -> Result<Started, StartError> {
    if !context.fresh_proc {
        let text =
            "something covers part of /proc here, so that the job can't have its own: see `ckpt doctor`";
        return Err(StartError::new(StartErrorClass::HostCannot, text));
    }
    let dir = context.passed.first().and_then(|fd| fd.try_clone().ok());
    let dir = dir
        .ok_or_else(|| StartError::new(StartErrorClass::Failure, "the checkpoint's directory is not open"))?;
    let keeper = context.passed.get(1).filter(|_| work.lazy).and_then(|fd| fd.try_clone().ok());
    let gate = context.passed.get(1 + usize::from(work.lazy)).filter(|_| work.gate);
    let request = RestoreRequest {
        dir,
        keeper,
        label: work.label,
        options: work.options,
        external: context.external.iter().map(|e| (e.record.number, e.fd.as_raw_fd())).collect(),
        log: context.log.as_ref().map(|l| l.as_raw_fd()),
        terminal: context
            .pty
            .as_ref()
            .map(|p| (p.master.as_raw_fd(), p.slave_path.to_string_lossy().into_owned())),
    };
    let progress = context.progress.clone();
    let rebuilt = rebuild(&request).map_err(|e| failure(&e))?;
    if let Some(why) = &rebuilt.eager_because {
        progress.warning(&format!("restored as a whole, not lazily: {why}"));
    }
    if let Some(gate) = gate {
        super::copies::wait_at_gate(gate.as_fd())
            .map_err(|e| StartError::new(StartErrorClass::Failure, e.to_string()))?;
    }
    for w in &rebuilt.warnings {
        progress.warning(w);
    }
    Ok(Started {
        main_pid: rebuilt.main_pid,
        details: serde_json::json!({
            "phases_ns": rebuilt.phases_ns.iter().copied().collect::<std::collections::BTreeMap<_, _>>(),
            "lazy_bytes": rebuilt.page_server.as_ref().map_or(0, |s| s.missing_bytes().1),
            "eager_because": rebuilt.eager_because,
        }),
        fetching: rebuilt.page_server.clone().map(|s| Box::new(Fetching(s)) as Box<dyn ckpt_job::Fetching>),
        main_exited: rebuilt.main_status.and_then(ExitStatus::from_wait_status),
        release: Box::new(move || {
            ckpt_sys::hook::report();
            for said in rebuilt.resume().map_err(|e| failure(&e))? {
                progress.warning(&said);
            }
            Ok(())
        }),
    })
}

/// The engine's page server as init sees it.
struct Fetching(PageServer);

impl ckpt_job::Fetching for Fetching {
    fn missing_bytes(&self) -> (u64, u64) {
        self.0.missing_bytes()
    }

    fn outcome(&self) -> Option<Result<(), String>> {
        self.0.outcome()
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.0.ended()
    }

    fn hurry(&self) {
        self.0.hurry();
    }
}

fn failure(error: &RestoreError) -> StartError {
    use crate::exit_code::ExitCode;
    let class = match super::restore::code_of(error) {
        Some(ExitCode::CORRUPT) => StartErrorClass::Corrupt,
        Some(ExitCode::CONFLICT) => StartErrorClass::Conflict,
        Some(ExitCode::HOST_CANNOT) => StartErrorClass::HostCannot,
        Some(ExitCode::NOT_FOUND) => StartErrorClass::NotFound,
        _ => StartErrorClass::Failure,
    };
    StartError::new(class, error.to_string())
}
