// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt kill`: send a signal to a job.

use std::time::{Duration, Instant};

use anyhow::Result;
use ckpt_abi::init_protocol::KillScope;

use crate::args::KillArgs;
use crate::exit_code::ExitCode;

/// How long the processes of a killed job may take to disappear before `ckpt kill` returns all the same.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// Runs the command.
pub fn run(args: &KillArgs) -> Result<ExitCode> {
    let scope = if args.all { KillScope::Everything } else { KillScope::Job };
    ckpt_job::kill(&args.name, args.signal, scope)?;
    if i32::from(args.signal) == libc::SIGKILL {
        // Who kills a job wants its name back.
        let until = Instant::now() + GONE_LIMIT;
        while ckpt_job::status(&args.name).is_ok() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(ExitCode::SUCCESS)
}
