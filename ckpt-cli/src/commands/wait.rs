// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt wait`: wait until a job has ended.

use anyhow::Result;

use crate::args::WaitArgs;
use crate::exit_code::ExitCode;

/// Runs the command.
pub fn run(args: &WaitArgs) -> Result<ExitCode> {
    Ok(ExitCode::of_job(ckpt_job::wait(&args.name, args.all)?.status))
}
