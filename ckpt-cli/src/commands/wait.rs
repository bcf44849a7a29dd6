// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt wait`: wait until a job has ended.

use anyhow::Result;

use crate::args::WaitArgs;
use crate::exit_code::ExitCode;

/// Runs the command.
pub fn run(args: &WaitArgs) -> Result<ExitCode> {
    match ckpt_job::client::wait_through(&args.name, args.all) {
        (_, Some(_)) => Ok(ExitCode::SAVED),
        (ended, None) => Ok(ExitCode::of_job(ended?.status)),
    }
}
