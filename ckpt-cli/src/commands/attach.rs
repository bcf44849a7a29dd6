// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt attach`: connect this terminal to a job.

use anyhow::Result;

use crate::args::AttachArgs;
use crate::commands::run::end_of_attachment;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// Runs the command.
pub fn run(args: &AttachArgs, report: &Report) -> Result<ExitCode> {
    let end = ckpt_job::attachment::attach(&args.name, args.detach_key.0)?;
    Ok(end_of_attachment(&args.name, end, report))
}
