// SPDX-License-Identifier: MIT OR Apache-2.0
//! The job as a whole: what a restore must know before it makes the namespaces.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::process::read_proc_text;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};

/// Version of [`JobRecord`].
pub const VERSION: u16 = 1;

/// The job.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct JobRecord {
    /// Its name.
    pub name: String,
    /// The main process; 0 if it has ended.
    pub main_pid: i32,
    /// Its wait status if it has ended.
    pub main_status: Option<i32>,
    /// Its command.
    pub argv: Vec<Vec<u8>>,
    /// It had a terminal of its own.
    pub tty: bool,
    /// Host name in its UTS namespace.
    pub hostname: Vec<u8>,
    /// NIS domain name.
    pub domainname: Vec<u8>,
    /// CLOCK_MONOTONIC of its time namespace at the dump, nanoseconds.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME of its time namespace at the dump, nanoseconds.
    pub boottime_ns: i64,
    /// Effective user id of the dumper.
    pub uid: u32,
    /// Kernel release it ran on.
    pub kernel: String,
}

/// The kind.
#[derive(Debug)]
pub struct JobResource;

/// Offsets of a process's time namespace: monotonic and boottime, nanoseconds.
pub fn time_offsets(host: i32) -> (i64, i64) {
    let text = read_proc_text(format!("/proc/{host}/timens_offsets")).unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        let mut n = line.split_whitespace().skip(1).filter_map(|w| w.parse::<i64>().ok());
        Some(n.next()? * 1_000_000_000 + n.next()?)
    };
    (of("monotonic").unwrap_or(0), of("boottime").unwrap_or(0))
}

impl Resource for JobResource {
    nothing_to_do! { after, claims, asks, content, create, connect, finish, arm }

    fn kind(&self) -> Kind {
        Kind::Job
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        if job.info.sysv_objects > 0 {
            let what = format!(
                "{} System V shared memory segments or message queues in the job's namespace",
                job.info.sysv_objects
            );
            refusals.process(0, what, "not supported; remove them (ipcrm) or wait until they are gone");
        }
        let queues = std::fs::read_dir(format!("/proc/{}/root/dev/mqueue", job.info.init));
        for q in queues.into_iter().flatten().flatten() {
            let what = format!("POSIX message queue {}", q.file_name().display());
            refusals.process(0, what, "not supported; remove it or wait until it is gone");
        }
        for p in job.live() {
            if p.vmas.iter().any(|v| v.end > ckpt_sys::arch::TASK_SIZE + 4096) {
                refusals.process(p.pid, "it maps memory beyond 47 bits", "not supported");
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Job = at else { return Ok(()) };
        let info = &cx.job.info;
        // Our own offsets count too, if ckpt itself runs in a time namespace.
        let (own, theirs) = (time_offsets(std::process::id() as i32), time_offsets(info.init));
        let uts = |file: &str| -> Vec<u8> {
            // /proc/sys/kernel shows the reader's namespace; init's status tells the job's.
            std::fs::read(format!("/proc/sys/kernel/{file}")).unwrap_or_default().trim_ascii_end().to_vec()
        };
        let record = JobRecord {
            name: info.name.clone(),
            main_pid: info.main_pid,
            main_status: info.main_status,
            argv: info.argv.clone(),
            tty: info.terminal.is_some(),
            hostname: info.hostname.clone().unwrap_or_else(|| uts("hostname")),
            domainname: info.domainname.clone().unwrap_or_else(|| uts("domainname")),
            monotonic_ns: ckpt_sys::clock::monotonic_ns() + theirs.0 - own.0,
            boottime_ns: ckpt_sys::clock::boottime_ns() + theirs.1 - own.1,
            uid: nix::unistd::geteuid().as_raw(),
            kernel: read_proc_text("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        };
        cx.put(Kind::Job, VERSION, 0, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let j: JobRecord = decode(record, VERSION)?;
        let argv: Vec<_> = j.argv.iter().map(|a| String::from_utf8_lossy(a).into_owned()).collect();
        Ok(format!("{}: {} (user {}, kernel {})", j.name, argv.join(" "), j.uid, j.kernel))
    }
}
