// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt kill`: send a signal to a job.

use anyhow::Result;
use ckpt_abi::init_protocol::KillScope;

use crate::args::KillArgs;
use crate::exit_code::ExitCode;

/// Runs the command.
pub fn run(args: &KillArgs) -> Result<ExitCode> {
    let scope = if args.all { KillScope::Everything } else { KillScope::Job };
    ckpt_job::kill(&args.name, args.signal, scope)?;
    Ok(ExitCode::SUCCESS)
}
