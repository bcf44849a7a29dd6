// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt doctor`: what this host allows.

use anyhow::{Result, bail};

use crate::args::DoctorArgs;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// Runs the command.
pub fn run(_args: &DoctorArgs, _report: &Report) -> Result<ExitCode> {
    bail!("this build of ckpt has no 'doctor'")
}
