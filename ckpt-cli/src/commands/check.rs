// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt check`: could this job be dumped now?

use anyhow::Result;
use ckpt_engine::error::{DumpError, Refusal};

use crate::args::CheckArgs;
use crate::commands::job_info;
use crate::exit_code::ExitCode;
use crate::report::Report;

#[derive(serde::Serialize)]
struct Outcome {
    possible: bool,
    memory_bytes: Option<u64>,
    refusals: Vec<Refusal>,
}

/// Runs the command.
pub fn run(args: &CheckArgs, report: &Report) -> Result<ExitCode> {
    let info = job_info::of(&ckpt_job::status(&args.name)?, args.tcp)?;
    match ckpt_engine::dump::check(&info, false) {
        Ok(found) => {
            if args.json {
                let memory_bytes = Some(found.memory_bytes);
                report.print_json(&Outcome { possible: true, memory_bytes, refusals: Vec::new() })?;
            } else {
                let (n, mib) = (found.job.live().count(), found.memory_bytes >> 20);
                report.print(&format!("{} could be dumped now: {n} processes, about {mib} MiB", args.name));
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(DumpError::Refused(refusals)) if args.json => {
            report.print_json(&Outcome { possible: false, memory_bytes: None, refusals: refusals.0 })?;
            Ok(ExitCode::REFUSED)
        }
        Err(error) => Err(error.into()),
    }
}
