// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the engine needs to know of a live job, from what its init says.

use anyhow::{Result, bail};
use ckpt_engine::model::{ExternalInfo, JobInfo, TcpPolicy};
use ckpt_engine::track::Tracking;
use ckpt_job::LiveJob;
use clap::ValueEnum as _;

use crate::args::TcpChoice;

/// The processes that ckpt watches for writes, as an incremental dump left them with init. An init that can't keep them has none.
fn tracked(name: &ckpt_job::JobName) -> Vec<ckpt_engine::model::process::ProcessId> {
    let kept = ckpt_job::take(name, true).ok().flatten();
    let tracking = kept.and_then(|k| Tracking::from_kept(&k.note, k.descriptors).ok());
    tracking.iter().flat_map(Tracking::watched).collect()
}

/// The engine's view of a job. `tcp` is what this command says of TCP connections.
pub fn of(job: &LiveJob, tcp: Option<TcpChoice>) -> Result<JobInfo> {
    let s = &job.status;
    let r = &s.record;
    let said = match (tcp, &r.tcp) {
        (None, Some(word)) => match TcpChoice::from_str(word, false) {
            Ok(choice) => Some(choice),
            Err(_) => {
                bail!("the job was started with --tcp {word}, which this ckpt does not know; say --tcp")
            }
        },
        (said, _) => said,
    };
    Ok(JobInfo {
        name: r.name.to_string(),
        init: job.init_pid,
        main_pid: if s.main_running { r.main_pid } else { 0 },
        main_status: s.exit_status.map(ckpt_job::ExitStatus::to_wait_status),
        argv: r.command.iter().map(|a| a.as_bytes().to_vec()).collect(),
        external: r
            .external
            .iter()
            .map(|e| ExternalInfo {
                number: e.number,
                dev: e.device,
                ino: e.inode,
                access: e.flags & libc::O_ACCMODE,
            })
            .collect(),
        log: Some(r.log.clone()),
        terminal: r.terminal.as_ref().map(|t| t.to_string_lossy().into_owned()),
        hostname: Some(s.hostname.as_bytes().to_vec()),
        domainname: Some(s.domainname.as_bytes().to_vec()),
        sysv_objects: s.sysv_objects,
        semaphore_sets: s.semaphore_sets,
        tracked: tracked(&r.name),
        mergeable: r.mergeable,
        tcp: match said {
            None | Some(TcpChoice::Refuse) => TcpPolicy::Refuse,
            Some(TcpChoice::Close) => TcpPolicy::Close,
        },
    })
}
