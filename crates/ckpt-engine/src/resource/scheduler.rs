// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scheduling policy, nice value, CPU affinity, I/O priority, timer slack, per thread (sched(7), ioprio_get(2)).

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inject::Query;
use ckpt_sys::task::SchedAttr;
use ckpt_sys::{Errno, Pid, libc};

/// Version of [`SchedulerRecord`].
pub const VERSION: u16 = 1;

/// Scheduling of a thread.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SchedulerRecord {
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// Runtime, deadline, period of SCHED_DEADLINE in nanoseconds.
    pub deadline: [u64; 3],
    /// CPU mask; empty if it was that of the job's init.
    pub affinity: Vec<u8>,
    /// ioprio_get(2).
    pub io_priority: i32,
    /// PR_GET_TIMERSLACK in nanoseconds.
    pub timer_slack_ns: u64,
}

fn ask_timer_slack() -> Query {
    Query::number(libc::SYS_prctl, [libc::PR_GET_TIMERSLACK as u64, 0, 0, 0, 0, 0])
}

/// The kind.
#[derive(Debug)]
pub struct SchedulerResource;

impl Resource for SchedulerResource {
    nothing_to_do! { claims, probe, content, create, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Scheduler
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Thread]
    }

    fn asks(&self, _: &Job, at: At<'_>) -> Vec<Query> {
        if matches!(at, At::Thread(..)) { vec![ask_timer_slack()] } else { Vec::new() }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Thread(p, t) = at else { return Ok(()) };
        let err = |what: &str| DumpError::errno(p.pid, format!("thread {}: {what}", t.tid));
        let a = ckpt_sys::task::sched_attr(t.host).map_err(err("sched_getattr"))?;
        let mask = ckpt_sys::task::affinity(t.host).map_err(err("sched_getaffinity"))?;
        // What init may use is what nobody in the job has restricted: on another host that may be other CPUs.
        if cx.out.init_affinity.is_empty() {
            let init = Pid::from_raw(cx.job.info.init);
            cx.out.init_affinity =
                ckpt_sys::task::affinity(init).map_err(err("sched_getaffinity of init"))?;
        }
        let nice = match a.policy as i32 {
            libc::SCHED_OTHER | libc::SCHED_BATCH => a.nice,
            // The others' it does not tell.
            _ => ckpt_sys::task::nice(t.host).map_err(err("getpriority"))?,
        };
        let slack = cx.live().number("prctl", &ask_timer_slack())?;
        let record = SchedulerRecord {
            policy: a.policy,
            flags: a.flags,
            nice,
            priority: a.priority,
            deadline: [a.runtime, a.deadline, a.period],
            affinity: if mask == cx.out.init_affinity { Vec::new() } else { mask },
            io_priority: ckpt_sys::task::io_priority(t.host).map_err(err("ioprio_get"))?,
            timer_slack_ns: slack,
        };
        cx.put(Kind::Scheduler, VERSION, t.tid as u64, p.pid as u64, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let s: SchedulerRecord = decode(record, VERSION)?;
        Ok(format!("policy {}, nice {}, priority {}", s.policy, s.nice, s.priority))
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: SchedulerRecord = decode(record, VERSION)?;
        let tid = record.owner as i32;
        let task = Pid::from_raw(tid);
        if !s.affinity.is_empty() {
            match ckpt_sys::task::set_affinity(task, &s.affinity) {
                Ok(()) => {}
                Err(Errno::EINVAL) => {
                    cx.warnings.push(format!("thread {tid}: none of the CPUs it was bound to exists here"))
                }
                Err(e) => return Err(RestoreError::errno(tid, "sched_setaffinity")(e)),
            }
        }
        let [runtime, deadline, period] = s.deadline;
        let attr = SchedAttr {
            policy: s.policy,
            flags: s.flags,
            nice: s.nice,
            priority: s.priority,
            runtime,
            deadline,
            period,
            ..SchedAttr::default()
        };
        let now = ckpt_sys::task::sched_attr(task).map_err(RestoreError::errno(tid, "sched_getattr"))?;
        if (now.policy, now.priority, now.flags) != (attr.policy, attr.priority, attr.flags) {
            match ckpt_sys::task::set_sched_attr(task, &attr) {
                Ok(()) => {}
                Err(Errno::EPERM) => {
                    cx.warnings
                        .push(format!("thread {tid}: no right to its scheduling policy {} here", s.policy));
                }
                Err(e) => return Err(RestoreError::errno(tid, "sched_setattr")(e)),
            }
        }
        if ckpt_sys::task::nice(task) != Ok(s.nice) {
            match ckpt_sys::task::set_nice(task, s.nice) {
                Ok(()) => {}
                Err(Errno::EACCES | Errno::EPERM) => {
                    cx.warnings.push(format!("thread {tid}: no right to its nice value {} here", s.nice));
                }
                Err(e) => return Err(RestoreError::errno(tid, "setpriority")(e)),
            }
        }
        if ckpt_sys::task::io_priority(task) != Ok(s.io_priority) {
            match ckpt_sys::task::set_io_priority(task, s.io_priority) {
                Ok(()) => {}
                Err(Errno::EPERM) => {
                    cx.warnings.push(format!("thread {tid}: no right to its I/O priority here"))
                }
                Err(e) => return Err(RestoreError::errno(tid, "ioprio_set")(e)),
            }
        }
        let args = [libc::PR_SET_TIMERSLACK as u64, s.timer_slack_ns, 0, 0, 0];
        cx.call(tid, "PR_SET_TIMERSLACK", libc::SYS_prctl, &args)?;
        Ok(())
    }
}
