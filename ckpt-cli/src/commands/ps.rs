// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt ps`: show the live jobs.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use ckpt_job::supervision::Supervision;
use ckpt_job::{JobName, LiveJob, Registry};

use crate::args::PsArgs;
use crate::exit_code::ExitCode;
use crate::report::{Report, table};

/// Runs the command.
pub fn run(args: &PsArgs, report: &Report) -> Result<ExitCode> {
    let jobs = ckpt_job::live_jobs()?;
    let waiting = waiting(&jobs)?;
    if args.json {
        let mut all = jobs.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
        all.extend(waiting.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?);
        report.print_json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut rows: Vec<Vec<String>> = jobs.iter().map(|job| row(job, now)).collect();
    rows.extend(waiting.iter().map(|job| waiting_row(job, now)));
    report.print(&table(&["NAME", "PID", "STATE", "PROCS", "AGE", "TTY", "DUMPS", "COMMAND"], &rows));
    Ok(ExitCode::SUCCESS)
}

/// A job that has failed and is about to be started again.
#[derive(serde::Serialize)]
struct WaitingJob {
    name: JobName,
    /// Always null: there is no process of it.
    init_pid: Option<i32>,
    command: Vec<String>,
    supervision: Supervision,
}

fn waiting(live: &[LiveJob]) -> Result<Vec<WaitingJob>> {
    let registry = Registry::open()?;
    let mut found = Vec::new();
    for name in registry.supervised_names()? {
        if live.iter().any(|job| job.status.record.name == name) || registry.is_live(&name)? {
            continue;
        }
        if let (Some(supervision), Ok(job)) = (registry.supervision(&name)?, registry.supervised(&name)) {
            let command = job.argv.iter().map(|word| word.to_string_lossy().into_owned()).collect();
            found.push(WaitingJob { name, init_pid: None, command, supervision });
        }
    }
    Ok(found)
}

fn waiting_row(job: &WaitingJob, now: u64) -> Vec<String> {
    let state = match job.supervision.state.restart_unix {
        Some(restart) => format!("restarts in {}", age(restart.saturating_sub(now))),
        None => "ended".to_owned(),
    };
    let dash = || "-".to_owned();
    let dumps = dumps(Some(&job.supervision), now);
    vec![job.name.to_string(), dash(), state, "0".to_owned(), dash(), dash(), dumps, shown(&job.command)]
}

/// Number of dumps by the supervisor, failures, and the next.
fn dumps(supervision: Option<&Supervision>, now: u64) -> String {
    let Some(Supervision { supervised, state }) = supervision else { return "-".to_owned() };
    let mut text = state.dumps.to_string();
    if state.failed_dumps > 0 {
        text.push_str(&format!(", {} failed", state.failed_dumps));
    }
    if let Some(next) = state.next_dump_unix.filter(|_| *supervised) {
        text.push_str(&format!(", next in {}", age(next.saturating_sub(now))));
    }
    text
}

fn shown(command: &[String]) -> String {
    // Bytes that could move the cursor have no place in a table.
    command.join(" ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn row(job: &LiveJob, now: u64) -> Vec<String> {
    let status = &job.status;
    let record = &status.record;
    let state = match status.exit_status {
        None => {
            let mut state = match status.missing_memory {
                None => "running".to_owned(),
                Some(memory) => format!("fetching memory ({} MiB left)", memory.missing_bytes >> 20),
            };
            if job.supervision.as_ref().is_some_and(|known| !known.supervised) {
                state.push_str(", unsupervised");
            }
            state
        }
        Some(exit) => format!("left behind ({})", exit.shell_code()),
    };
    let tty = match (record.tty, status.attached) {
        (false, _) => "-",
        (true, false) => "detached",
        (true, true) => "attached",
    };
    vec![
        record.name.to_string(),
        job.init_pid.to_string(),
        state,
        status.processes.to_string(),
        age(now.saturating_sub(record.started)),
        tty.to_owned(),
        dumps(job.supervision.as_ref(), now),
        shown(&record.command),
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
