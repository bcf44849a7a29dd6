// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt rm`.

use anyhow::{Result, bail};

use crate::args::RmArgs;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// Runs the command.
pub fn run(_args: &RmArgs, _report: &Report) -> Result<ExitCode> {
    bail!("this build of ckpt has no 'rm'")
}
