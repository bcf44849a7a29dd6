// SPDX-License-Identifier: MIT OR Apache-2.0
//! Interval timers (setitimer(2)) and POSIX timers (timer_create(2)), with the time they had left.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::info_value;
use crate::model::process::{Process, read_proc_text};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::area::MAX_CALLS;
use ckpt_sys::inject::Query;
use ckpt_sys::libc;

/// Version of [`TimerRecord`].
pub const VERSION: u16 = 1;

/// A POSIX timer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PosixTimer {
    /// Its id in the process.
    pub id: i32,
    /// CLOCK_*.
    pub clock: i32,
    /// SIGEV_*.
    pub notify: i32,
    /// The signal.
    pub signal: i32,
    /// sigev_value.
    pub value: u64,
    /// The thread of SIGEV_THREAD_ID.
    pub tid: i32,
    /// `struct itimerspec`: interval and remaining time; all zero if disarmed.
    pub spec: [u64; 4],
}

/// Timers of a process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TimerRecord {
    /// `struct itimerval` of ITIMER_REAL, ITIMER_VIRTUAL and ITIMER_PROF: interval and remaining time.
    pub interval: [[u64; 4]; 3],
    /// By id.
    pub posix: Vec<PosixTimer>,
}

fn ask_interval(which: usize) -> Query {
    Query::filling(libc::SYS_getitimer, [which as u64, 0, 0, 0, 0, 0], 1, 32)
}

fn ask_posix(t: &PosixTimer) -> Query {
    Query::filling(libc::SYS_timer_gettime, [t.id as u64, 0, 0, 0, 0, 0], 1, 32)
}

/// The POSIX timers of a process, without the time they have left.
fn list(p: &Process) -> std::io::Result<Option<Vec<PosixTimer>>> {
    read_proc_text(format!("/proc/{}/timers", p.host)).map(|text| parse(&text))
}

/// The kind.
#[derive(Debug)]
pub struct TimerResource;

const SIGEV_THREAD_ID: i32 = 4;
/// CPU time of the process and of the thread itself, as the kernel names them (`include/linux/posix-timers.h`).
const PROCESS_CPU: i32 = -6;
const THREAD_CPU: i32 = -2;

fn words<const N: usize>(b: &[u8]) -> [u64; N] {
    std::array::from_fn(|i| u64::from_le_bytes(b[i * 8..i * 8 + 8].try_into().unwrap_or_default()))
}

/// Parses /proc/pid/timers (proc_pid_timers(5)); thread ids as ckpt sees them.
fn parse(text: &str) -> Option<Vec<PosixTimer>> {
    let mut out = Vec::new();
    let text = format!("\n{text}");
    for block in text.split("\nID: ").skip(1) {
        let id = block.lines().next()?.trim().parse().ok()?;
        let (signal, value) = info_value(block, "signal")?.split_once('/')?;
        let (how, who) = info_value(block, "notify")?.split_once('/')?;
        let (kind, tid) = who.split_once('.')?;
        let notify = match how {
            "none" => libc::SIGEV_NONE,
            _ if kind == "tid" => SIGEV_THREAD_ID,
            _ => libc::SIGEV_SIGNAL,
        };
        out.push(PosixTimer {
            id,
            clock: info_value(block, "ClockID")?.parse().ok()?,
            notify,
            signal: signal.parse().ok()?,
            value: u64::from_str_radix(value, 16).ok()?,
            tid: tid.parse().ok()?,
            spec: [0; 4],
        });
    }
    out.sort_by_key(|t| t.id);
    Some(out)
}

impl Resource for TimerResource {
    nothing_to_do! { claims, content, create, connect, finish }

    fn kind(&self) -> Kind {
        Kind::Timer
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Thread]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for p in job.live() {
            match list(p).unwrap_or_default() {
                None => refusals.process(p.pid, "its POSIX timers can't be read", "not supported"),
                Some(list) => {
                    let own = |c: i32| c >= 0 || c == PROCESS_CPU || c == THREAD_CPU && p.threads.len() == 1;
                    for t in list.iter().filter(|t| !own(t.clock)) {
                        let what =
                            format!("timer {} runs on the CPU clock of some thread or other process", t.id);
                        refusals.process(p.pid, what, "not supported");
                    }
                }
            }
        }
    }

    fn asks(&self, _: &Job, at: At<'_>) -> Vec<Query> {
        let At::Process(p) = at else { return Vec::new() };
        let posix = list(p).ok().flatten().unwrap_or_default();
        (0..3).map(ask_interval).chain(posix.iter().map(ask_posix)).collect()
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        let mut interval = [[0; 4]; 3];
        for (which, value) in interval.iter_mut().enumerate() {
            let (_, b) = cx.live().query::<32>(&ask_interval(which))?;
            *value = words(&b);
        }
        let posix = list(p).map_err(DumpError::process(p.pid, "reading its timers"))?;
        let mut posix = posix.unwrap_or_default();
        for t in &mut posix {
            let (_, b) = cx.live().query::<32>(&ask_posix(t))?;
            t.spec = words(&b);
            t.tid = cx.job.inner_tid(t.tid).unwrap_or(p.pid);
        }
        if posix.is_empty() && interval == [[0; 4]; 3] {
            return Ok(());
        }
        cx.put(Kind::Timer, VERSION, p.pid as u64, 0, &TimerRecord { interval, posix })
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let t: TimerRecord = decode(record, VERSION)?;
        let running = t.interval.iter().filter(|i| i[2] | i[3] != 0).count();
        Ok(format!("{running} interval timers running, {} POSIX timers", t.posix.len()))
    }

    fn arm(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let pid = record.owner as i32;
        let timers: TimerRecord = decode(record, VERSION)?;
        // Ids are given out in order: the ones between are taken and given back.
        let mut next = 0;
        for t in &timers.posix {
            while next <= t.id {
                let (_, out) = cx.run(pid, |b| {
                    let mut event = [0u64; 8];
                    event[0] = t.value;
                    event[1] = t.signal as u32 as u64 | (t.notify as u64) << 32;
                    event[2] = if t.notify == SIGEV_THREAD_ID { t.tid as u64 } else { 0 };
                    let event = b.words(&event);
                    let out = b.words(&[0]);
                    b.call("timer_create", libc::SYS_timer_create, &[t.clock as u64, event, out]);
                    out
                })?;
                let mut id = [0u8; 4];
                cx.area.batch().read(out, &mut id);
                let id = i32::from_le_bytes(id);
                if id > t.id {
                    return Err(RestoreError::Host(format!(
                        "process {pid}: the kernel gave timer id {id} for {}",
                        t.id
                    )));
                }
                if id < t.id {
                    cx.call(pid, "timer_delete", libc::SYS_timer_delete, &[id as u64])?;
                }
                next = id + 1;
            }
        }
        for chunk in timers.posix.chunks(MAX_CALLS) {
            cx.run(pid, |b| {
                for t in chunk.iter().filter(|t| t.spec[2] | t.spec[3] != 0) {
                    let spec = b.words(&t.spec);
                    b.call("timer_settime", libc::SYS_timer_settime, &[t.id as u64, 0, spec, 0]);
                }
            })?;
        }
        cx.run(pid, |b| {
            for (which, value) in timers.interval.iter().enumerate().filter(|(_, v)| **v != [0; 4]) {
                // With an interval and no time left it has expired and its signal is pending: the kernel starts it
                // again when that is delivered. It expires at once here, and then is in the same state.
                let expired = value[2] | value[3] == 0;
                let value = b.words(&[value[0], value[1], value[2], if expired { 1 } else { value[3] }]);
                b.call("setitimer", libc::SYS_setitimer, &[which as u64, value, 0]);
            }
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_parse() {
        let text = "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/tid.2634\nClockID: 0\nID: 0\nsignal: 14/0\n\
                    notify: none/pid.2634\nClockID: 1\n";
        let t = parse(text).unwrap();
        assert_eq!((t[0].id, t[0].notify, t[0].clock), (0, libc::SIGEV_NONE, 1));
        assert_eq!((t[1].id, t[1].notify, t[1].signal, t[1].tid), (1, SIGEV_THREAD_ID, 60, 2634));
        assert_eq!(t[1].value, 0x7fff_86e4_52a8);
    }
}
