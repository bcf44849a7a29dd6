// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt check`: could this job be dumped now?

use anyhow::Result;
use ckpt_engine::dump::barrier::{Late, under_way};
use ckpt_engine::dump::hooks;
use ckpt_engine::error::{DumpError, Refusal};

use crate::args::CheckArgs;
use crate::commands::job_info;
use crate::exit_code::ExitCode;
use crate::report::Report;

#[derive(serde::Serialize)]
struct Outcome {
    possible: bool,
    memory_bytes: Option<u64>,
    refusals: Vec<Refusal>,
    /// What a dump would wait for.
    waits_for: Vec<Waited>,
    /// Processes that have registered hooks: what they do in them is not known beforehand.
    with_hooks: Vec<i32>,
}

#[derive(serde::Serialize)]
struct Waited {
    pid: i32,
    tid: i32,
    program: String,
    what: String,
}

/// Runs the command.
pub fn run(args: &CheckArgs, report: &Report) -> Result<ExitCode> {
    let info = job_info::of(&ckpt_job::status(&args.name)?, args.tcp)?;
    let with_hooks = hooks::registered(info.init);
    match ckpt_engine::dump::check(&info) {
        Ok(found) => {
            let waits_for = under_way(&found.job);
            if args.json {
                let waited = |l: Late| Waited { pid: l.pid, tid: l.tid, program: l.program, what: l.what };
                report.print_json(&Outcome {
                    possible: true,
                    memory_bytes: Some(found.memory_bytes),
                    refusals: Vec::new(),
                    waits_for: waits_for.into_iter().map(waited).collect(),
                    with_hooks,
                })?;
            } else {
                let (n, mib) = (found.job.live().count(), found.memory_bytes >> 20);
                report.print(&format!("{} could be dumped now: {n} processes, about {mib} MiB", args.name));
                if !waits_for.is_empty() {
                    report.print("once this is over, which a dump waits for (--barrier-timeout):");
                }
                waits_for
                    .iter()
                    .for_each(|l| report.print(&format!("  {}", l.subject().trim_end_matches(','))));
                if !with_hooks.is_empty() {
                    report.print(&format!("unless an on_dump objects: {}", pids(&with_hooks)));
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(DumpError::Refused(refusals)) if args.json => {
            let refusals = refusals.0;
            let waits_for = Vec::new();
            report.print_json(&Outcome {
                possible: false,
                memory_bytes: None,
                refusals,
                waits_for,
                with_hooks,
            })?;
            Ok(ExitCode::REFUSED)
        }
        Err(error @ DumpError::Refused(_)) if !with_hooks.is_empty() => {
            report.note(&format!(
                "a dump looks after the on_dump of {}, which may close what is named here",
                pids(&with_hooks)
            ));
            Err(error.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Processes that have registered hooks, in words.
fn pids(with_hooks: &[i32]) -> String {
    let words: Vec<String> = with_hooks.iter().map(i32::to_string).collect();
    format!("pid {}, with hooks", words.join(", "))
}
