// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt ps`: show the live jobs.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use ckpt_job::LiveJob;

use crate::args::PsArgs;
use crate::exit_code::ExitCode;
use crate::report::{Report, table};

/// Runs the command.
pub fn run(args: &PsArgs, report: &Report) -> Result<ExitCode> {
    let jobs = ckpt_job::live_jobs()?;
    if args.json {
        report.print_json(&jobs)?;
        return Ok(ExitCode::SUCCESS);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let rows: Vec<Vec<String>> = jobs.iter().map(|job| row(job, now)).collect();
    report.print(&table(&["NAME", "PID", "STATE", "PROCS", "AGE", "TTY", "COMMAND"], &rows));
    Ok(ExitCode::SUCCESS)
}

fn row(job: &LiveJob, now: u64) -> Vec<String> {
    let status = &job.status;
    let record = &status.record;
    let state = match status.exit_status {
        None => match status.missing_memory {
            None => "running".to_owned(),
            Some(memory) => format!("fetching memory ({} MiB left)", memory.missing_bytes >> 20),
        },
        Some(exit) => format!("left behind ({})", exit.shell_code()),
    };
    let tty = match (record.tty, status.attached) {
        (false, _) => "-",
        (true, false) => "detached",
        (true, true) => "attached",
    };
    let command = record.command.join(" ");
    // Bytes that could move the cursor have no place in a table.
    let command = command.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    vec![
        record.name.to_string(),
        job.init_pid.to_string(),
        state,
        status.processes.to_string(),
        age(now.saturating_sub(record.started)),
        tty.to_owned(),
        command,
    ]
}

/// Seconds as a person says them: `12s`, `5m`, `3h20m`, `4d`.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ages_are_readable() {
        let ages = [0, 59, 60, 3599, 3600, 7321, 86399, 90000].map(super::age);
        assert_eq!(ages, ["0s", "59s", "1m", "59m", "1h00m", "2h02m", "23h59m", "1d1h"]);
    }
}
