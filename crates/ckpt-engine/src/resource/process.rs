// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process tree: ids, parents, sessions, process groups, threads, zombies. Rebuilt by
//! [`crate::restore::build_tree`].

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::process::{Process, read_proc_text};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inject::Query;
use ckpt_sys::{Pid, libc};

/// Version of [`ProcessRecord`].
pub const VERSION: u16 = 1;

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProcessRecord {
    /// Its pid.
    pub pid: i32,
    /// Its parent, 1 for init.
    pub ppid: i32,
    /// Its process group.
    pub pgid: i32,
    /// Its session.
    pub sid: i32,
    /// The signal its parent gets when it ends.
    pub exit_signal: i32,
    /// Wait status if it has ended and not been waited for.
    pub zombie: Option<i32>,
    /// Stopped by job control.
    pub stopped: bool,
    /// Children that are stopped and whose stop it has not been told of by wait(2) yet.
    pub untold_stops: Vec<i32>,
    /// Its threads, the leader first.
    pub threads: Vec<i32>,
    /// Name of the leader.
    pub comm: Vec<u8>,
}

impl ProcessRecord {
    /// A stand-in for the leader of a session or of a group in session `sid`.
    pub fn ghost(pid: i32, sid: i32) -> ProcessRecord {
        ProcessRecord {
            pid,
            ppid: 1,
            pgid: pid,
            sid,
            exit_signal: libc::SIGCHLD,
            zombie: None,
            stopped: false,
            untold_stops: Vec::new(),
            threads: vec![pid],
            comm: Vec::new(),
        }
    }
}

/// Whether a child has stopped and its parent not been told, asked in the parent without taking the answer away.
fn ask_untold(child: i32) -> Query {
    let options = (libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT) as u64;
    Query::filling(libc::SYS_waitid, [u64::from(libc::P_PID), child as u64, 0, options, 0, 0], 2, 128)
}

/// Children of a process that job control has stopped.
fn stopped_children(job: &Job, p: &Process) -> Vec<i32> {
    let none = p.zombie.is_some();
    job.live().filter(|c| !none && c.ppid == p.pid && c.stopped).map(|c| c.pid).collect()
}

/// The kind.
#[derive(Debug)]
pub struct ProcessResource;

impl Resource for ProcessResource {
    nothing_to_do! { claims, content, connect, finish, arm }

    fn kind(&self) -> Kind {
        Kind::Process
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Job]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        let nesting = nesting(job);
        let namespace = |pid: Pid, ns: &str| std::fs::read_link(format!("/proc/{pid}/ns/{ns}")).ok();
        let namespaces = ["user", "mnt", "ipc", "uts", "net", "cgroup", "time"]
            .map(|ns| (ns, namespace(Pid::from_raw(job.info.init), ns)));
        for p in &job.processes {
            let s = &p.status;
            if p.zombie.is_some() && p.threads.len() > 1 {
                refusals.process(p.pid, "its main thread has ended and others run on", "not supported");
            }
            if is_filtered(p) {
                refusals.process(
                    p.pid,
                    "it runs under a seccomp filter",
                    "not supported; start it without its sandbox",
                );
            }
            if s.nspid.as_ref().is_some_and(|n| n.len() != nesting) {
                refusals.process(
                    p.pid,
                    "it is in a pid namespace of its own",
                    "nested containers are not supported",
                );
            }
            for (ns, of_init) in &namespaces {
                // The links of a process that is just ending are gone.
                let own = namespace(p.host, ns);
                if p.zombie.is_none() && own.is_some() && own != *of_init {
                    let what = format!("it is in a {ns} namespace of its own");
                    refusals.process(p.pid, what, "nested containers are not supported");
                }
            }
        }
    }

    fn asks(&self, job: &Job, at: At<'_>) -> Vec<Query> {
        match at {
            At::Process(p) => stopped_children(job, p).into_iter().map(ask_untold).collect(),
            _ => Vec::new(),
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        let mut untold_stops = Vec::new();
        for child in stopped_children(cx.job, p) {
            let (n, info) = cx.live().query::<128>(&ask_untold(child))?;
            // si_signo is SIGCHLD if there is something to tell.
            if n == 0 && info[0] != 0 {
                untold_stops.push(child);
            }
        }
        let threads =
            if p.zombie.is_some() { vec![p.pid] } else { p.threads.iter().map(|t| t.tid).collect() };
        let record = ProcessRecord {
            pid: p.pid,
            ppid: p.ppid,
            pgid: p.pgid,
            sid: p.sid,
            exit_signal: p.stat.exit_signal.filter(|s| *s >= 0).unwrap_or(libc::SIGCHLD),
            zombie: p.zombie,
            stopped: p.stopped,
            untold_stops,
            threads,
            comm: p.stat.comm.as_bytes().to_vec(),
        };
        cx.put(Kind::Process, VERSION, p.pid as u64, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let p: ProcessRecord = decode(record, VERSION)?;
        let state = match (p.zombie, p.stopped) {
            (Some(status), _) => format!(", ended with status {status:#x}"),
            (_, true) => ", stopped".to_owned(),
            _ => String::new(),
        };
        let name = String::from_utf8_lossy(&p.comm).into_owned();
        let (parent, group, session, n) = (p.ppid, p.pgid, p.sid, p.threads.len());
        Ok(format!("{name}: parent {parent}, group {group}, session {session}, {n} threads{state}"))
    }

    fn create(&self, _: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        // The tree has been built from all of these records at once; here the ids are checked.
        let p: ProcessRecord = decode(record, VERSION)?;
        if p.zombie.is_some() {
            return Ok(());
        }
        let now = procfs::process::Process::new(p.pid).and_then(|q| q.stat());
        let now = now.map_err(|e| RestoreError::Record(format!("process {}: {e}", p.pid)))?;
        if (now.ppid, now.pgrp, now.session) != (p.ppid, p.pgid, p.sid) {
            return Err(RestoreError::Record(format!(
                "process {}: parent, group and session came out as {:?} instead of {:?}",
                p.pid,
                (now.ppid, now.pgrp, now.session),
                (p.ppid, p.pgid, p.sid)
            )));
        }
        Ok(())
    }
}

/// Whether a process runs under seccomp. Filters that ckpt itself runs under are the host's doing, and will be there at
/// the restore.
pub fn is_filtered(p: &Process) -> bool {
    match p.status.seccomp.unwrap_or(0) {
        0 => false,
        1 => true,
        _ => seccomp_filters(p.host) > seccomp_filters(Pid::this()),
    }
}

/// Number of seccomp filters a process runs under.
fn seccomp_filters(pid: Pid) -> u32 {
    let text = read_proc_text(format!("/proc/{pid}/status")).unwrap_or_default();
    text.lines().find_map(|l| l.strip_prefix("Seccomp_filters:")?.trim().parse().ok()).unwrap_or(0)
}

/// How many pid namespaces the job's processes are in, seen from here.
fn nesting(job: &Job) -> usize {
    let init = procfs::process::Process::new(job.info.init).and_then(|p| p.status());
    init.ok().and_then(|s| s.nspid).map_or(0, |n| n.len())
}
