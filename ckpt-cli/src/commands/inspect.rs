// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt inspect`.

use anyhow::{Result, bail};

use crate::args::InspectArgs;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// Runs the command.
pub fn run(_args: &InspectArgs, _report: &Report) -> Result<ExitCode> {
    bail!("this build of ckpt has no 'inspect'")
}
