// SPDX-License-Identifier: MIT OR Apache-2.0
//! Resource limits (getrlimit(2)).

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::process::read_proc_text;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inject::SCRATCH_BYTES;
use ckpt_sys::{Errno, Pid};

/// Version of [`LimitRecord`].
pub const VERSION: u16 = 1;
/// RLIM_NLIMITS.
const COUNT: usize = 16;
const NAMES: [&str; COUNT] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

const DATA: usize = 2;
const AS: usize = 9;

/// The bytes that the kernel lets a process map (mm/mmap.c, may_expand_vm); `None`: any number.
fn allowed(n: usize, soft: u64, hard: u64) -> Option<u64> {
    match n {
        // Nobody could use none at all: the hard one counts then.
        DATA if soft == 0 => Some(hard),
        DATA if std::fs::read_to_string("/sys/module/kernel/parameters/ignore_rlimit_data")
            .is_ok_and(|text| text.starts_with('Y')) =>
        {
            None
        }
        _ => Some(soft),
    }
}

/// Limits of a process by number: soft, hard; u64::MAX for none.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct LimitRecord {
    /// Soft, hard.
    pub limits: [(u64, u64); COUNT],
}

/// The kind.
#[derive(Debug)]
pub struct LimitResource;

/// Parses /proc/pid/limits, which shows the limits of other users' processes where prlimit(2) needs CAP_SYS_RESOURCE.
fn parse(text: &str) -> Option<[(u64, u64); COUNT]> {
    let titles = [
        "Max cpu time",
        "Max file size",
        "Max data size",
        "Max stack size",
        "Max core file size",
        "Max resident set",
        "Max processes",
        "Max open files",
        "Max locked memory",
        "Max address space",
        "Max file locks",
        "Max pending signals",
        "Max msgqueue size",
        "Max nice priority",
        "Max realtime priority",
        "Max realtime timeout",
    ];
    let value = |w: &str| if w == "unlimited" { Some(u64::MAX) } else { w.parse().ok() };
    let mut out = [(0, 0); COUNT];
    for (title, limit) in titles.iter().zip(&mut out) {
        let mut words = text.lines().find_map(|l| l.strip_prefix(title))?.split_whitespace();
        *limit = (value(words.next()?)?, value(words.next()?)?);
    }
    Some(out)
}

impl Resource for LimitResource {
    nothing_to_do! { claims, asks, content, create, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Limit
    }

    fn after(&self) -> &'static [Kind] {
        // A low limit of descriptors or memory must not hinder the rebuilding.
        &[Kind::FdTable, Kind::MemoryMap, Kind::FileLock, Kind::Epoll]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for p in job.live() {
            for (option, n, kib) in [("as", AS, p.status.vmsize), ("data", DATA, p.status.vmdata)] {
                // Not from /proc, where it takes long to make the text: the job may stand still.
                let Ok((soft, hard)) = ckpt_sys::task::limit(p.host, n as u32) else { continue };
                let used = kib.unwrap_or(0) << 10;
                let needed = used.saturating_add(SCRATCH_BYTES);
                // Asked last, as it may read a file.
                if needed > soft
                    && let Some(allowed) = allowed(n, soft, hard).filter(|allowed| needed > *allowed)
                {
                    let what = format!(
                        "it uses {used} of the {allowed} bytes that its {} allows, and a dump needs {SCRATCH_BYTES} bytes in it for a moment",
                        NAMES[n],
                    );
                    // With a colon the hard limit stays.
                    let keep = if needed > hard { "" } else { ":" };
                    let advice =
                        format!("raise the limit: prlimit --pid {} --{option}={needed}{keep}", p.host);
                    refusals.process(p.pid, what, advice);
                }
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        let text = read_proc_text(format!("/proc/{}/limits", p.host));
        let limits =
            parse(&text.map_err(DumpError::process(p.pid, "reading its limits"))?).ok_or_else(|| {
                DumpError::process(p.pid, "reading its limits")(std::io::Error::from(
                    std::io::ErrorKind::InvalidData,
                ))
            })?;
        cx.put(Kind::Limit, VERSION, p.pid as u64, 0, &LimitRecord { limits })
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let l: LimitRecord = decode(record, VERSION)?;
        let text = |v: u64| if v == u64::MAX { "unlimited".to_owned() } else { v.to_string() };
        let set = l.limits.iter().zip(NAMES).filter(|((soft, _), _)| *soft != u64::MAX);
        Ok(set.map(|((soft, _), n)| format!("{n} {}", text(*soft))).collect::<Vec<_>>().join(", "))
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let l: LimitRecord = decode(record, VERSION)?;
        let pid = record.owner as i32;
        let task = Pid::from_raw(pid);
        for (n, (soft, hard)) in l.limits.iter().enumerate() {
            match ckpt_sys::task::set_limit(task, n as u32, *soft, *hard) {
                Ok(()) => {}
                Err(Errno::EPERM) => {
                    // The host's hard limit is lower than that of the checkpoint and can't be raised without privilege.
                    let (_, most) =
                        ckpt_sys::task::limit(task, n as u32).map_err(RestoreError::errno(pid, NAMES[n]))?;
                    ckpt_sys::task::set_limit(task, n as u32, (*soft).min(most), most)
                        .map_err(RestoreError::errno(pid, NAMES[n]))?;
                    let text = format!("process {pid}: {} is {most} here and was {hard}", NAMES[n]);
                    cx.warnings.push(text);
                }
                Err(e) => return Err(RestoreError::errno(pid, NAMES[n])(e)),
            }
        }
        Ok(())
    }
}
