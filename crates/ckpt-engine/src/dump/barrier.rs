// SPDX-License-Identifier: MIT OR Apache-2.0
//! Barrier: brings all processes of the job to a safe point, a moment at which nothing is half-way that can't be saved but
//! soon will be over. See docs/adr/0023-barrier-from-outside.md.
//!
//! Each [`Condition`] says what of one kind is under way in a process. While any is, the gates of all processes that carry
//! the interceptor are closed, so that nothing new of that kind begins, and what has begun is waited for, also in
//! processes that come meanwhile. Who does not arrive in time is named, and the job is frozen all the same.
//!
//! A call that passed the gate just before it was closed may be seen only when all stands still: what it leaves is refused
//! then as *passing* ([`Refusals::passing`](crate::error::Refusals::passing)), and the barrier is gone through again.
//!
//! The gates are opened while the job is frozen, so that no image and no resumed job has a closed one, and when the barrier
//! is dropped. A dumper that is killed leaves them closed for at most [`LEASE`].

use super::control_word::{ControlWord, ControlWords};
use super::hooks;
use crate::error::{DumpError, Refusals};
use crate::model::Job;
use crate::model::file::{info_value, infos};
use crate::model::process::{children, read_proc};
use ckpt_abi::interceptor::{Control, GATE_CLOSED, GATE_OPEN};
use ckpt_sys::Pid;
use ckpt_sys::task::{Shared, kcmp};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::mem::offset_of;
use std::time::{Duration, Instant};

/// How long a gate stays closed after the dumper has last said so.
pub const LEASE: Duration = Duration::from_secs(1);

/// After what part of it the lease is renewed.
const RENEWAL: Duration = Duration::from_millis(250);

/// How often the job is frozen again because something had passed the gate.
const MOST_ATTEMPTS: u32 = 6;

/// What a dump does about processes that are not at a safe point.
#[derive(Debug, Clone, Copy)]
pub struct BarrierPolicy {
    /// How long they are waited for, in all; zero to take them as they are.
    pub timeout: Duration,
    /// Dump nothing if one is late.
    pub strict: bool,
}

/// Something that was under way for too long.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Late {
    /// The process, as it sees itself.
    pub pid: i32,
    /// The thread, as it sees itself; the process's pid where none is known.
    pub tid: i32,
    /// The thread's name (proc_pid_comm(5)).
    pub program: String,
    /// What it is.
    pub what: String,
    /// How long it was watched, in nanoseconds.
    pub for_ns: u64,
}

impl Late {
    /// Who, and what it is.
    pub fn subject(&self) -> String {
        let thread = if self.tid == self.pid { String::new() } else { format!(" thread {}", self.tid) };
        format!("pid {}{thread} ({}): {}", self.pid, self.program, self.what)
    }
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.for_ns as f64 / 1e9;
        write!(f, "{} has been under way for {seconds:.1} s", self.subject())
    }
}

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct LateList(pub Vec<Late>);

impl fmt::Display for LateList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|late| write!(f, "\n  {late}"))
    }
}

/// What came of it.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct BarrierReport {
    /// How long was waited, in nanoseconds.
    pub waited_ns: u64,
    /// What was still under way when the job was frozen.
    pub late: LateList,
}

/// A process of the job, as the barrier looks at it while it runs.
#[derive(Debug)]
pub struct Member<'a> {
    /// Its pid, as ckpt sees it.
    pub host: Pid,
    /// Its parent in the job, as ckpt sees it.
    pub parent: Option<Pid>,
    /// If it carries the interceptor.
    pub word: Option<&'a ControlWord>,
}

/// Something under way in a thread.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pending {
    /// The thread, or the process where none is known, as ckpt sees it.
    pub task: Pid,
    /// What it is, as the subject of a sentence.
    pub what: String,
}

/// Something that must not be half-way when the job is frozen.
pub struct Condition {
    /// Its name, for whoever reads [`CONDITIONS`].
    pub name: &'static str,
    /// What of it is under way in a process. It is asked while the process runs, often, and for each process.
    pub pending: fn(&Member<'_>) -> Vec<Pending>,
}

/// All conditions.
pub const CONDITIONS: &[Condition] = &[
    Condition { name: "vfork", pending: lends_memory },
    Condition { name: "rights", pending: descriptors_on_their_way },
    Condition { name: "aio", pending: crate::resource::aio::pending },
    Condition { name: "io_uring", pending: crate::resource::fd::io_uring::pending },
    Condition { name: "section", pending: critical_section },
];

/// The parent of a vfork(2), which posix_spawn(3) and system(3) make, too, sleeps uninterruptibly until the child has called
/// execve or exited.
fn lends_memory(member: &Member<'_>) -> Vec<Pending> {
    let Some(parent) = member.parent else { return Vec::new() };
    if kcmp(parent, member.host, Shared::Memory) != Ok(std::cmp::Ordering::Equal) {
        return Vec::new();
    }
    let child = member.host.as_raw();
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let waits = |t: &std::fs::DirEntry| {
        let list = read_proc(t.path().join("children")).unwrap_or_default();
        String::from_utf8_lossy(&list).split_whitespace().any(|n| n.parse() == Ok(child))
    };
    let task = tasks.filter(waits).find_map(|t| t.file_name().to_str()?.parse().ok()).map(Pid::from_raw);
    let what = format!("a posix_spawn or vfork, whose child is pid {},", inner(member.host));
    vec![Pending { task: task.unwrap_or(parent), what }]
}

/// A critical section of the application. Unlike the others it is not taken as it is when the time is up: see
/// [`Barrier::refuse_sections`].
fn critical_section(member: &Member<'_>) -> Vec<Pending> {
    let name = member.word.and_then(|word| hooks::critical_section(word, member.host, || inner(member.host)));
    name.into_iter()
        .map(|name| Pending {
            task: member.host,
            what: format!("a critical section (begun last: \"{name}\")"),
        })
        .collect()
}

/// Descriptors that were sent to a socket and not received yet (unix(7), SCM_RIGHTS; `scm_fds` in fdinfo).
fn descriptors_on_their_way(member: &Member<'_>) -> Vec<Pending> {
    let on_their_way =
        |info: &str| info_value(info, "scm_fds").and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n > 0);
    infos(member.host, |target| target.starts_with(b"socket:"))
        .into_iter()
        .filter(|(_, info)| on_their_way(info))
        .map(|(number, _)| Pending {
            task: member.host,
            what: format!("the receiving of descriptors (SCM_RIGHTS) at unix socket fd {number}"),
        })
        .collect()
}

/// The last of the ids in a task's status: that which it has for itself. 0 if it is gone.
pub(crate) fn inner(task: Pid) -> i32 {
    let text = read_proc(format!("/proc/{task}/status")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let ids = text.lines().find_map(|l| l.strip_prefix("NSpid:"));
    ids.and_then(|ids| ids.split_whitespace().last()?.parse().ok()).unwrap_or(0)
}

/// The id of a task's process, as ckpt sees it.
pub(super) fn process_of(task: Pid) -> Pid {
    let text = read_proc(format!("/proc/{task}/status")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let id = text.lines().find_map(|l| l.strip_prefix("Tgid:")?.trim().parse().ok());
    id.map_or(task, Pid::from_raw)
}

/// What a dump would wait for now. Nobody has watched it.
pub fn under_way(job: &Job) -> Vec<Late> {
    let mut barrier = Barrier::new(job, BarrierPolicy { timeout: Duration::ZERO, strict: false });
    let members = barrier.members();
    let pending = barrier.pending(&members);
    pending.iter().map(|p| barrier.late(p)).filter(|l| l.pid != 0).collect()
}

/// The barrier of one dump.
#[derive(Debug)]
pub struct Barrier {
    init: i32,
    policy: BarrierPolicy,
    /// Set when the waiting begins.
    until: Option<Instant>,
    words: ControlWords,
    /// What a process of the job reads as CLOCK_MONOTONIC, less what is read here, in nanoseconds.
    clock_offset_ns: i64,
    /// Processes that were looked at.
    seen: HashSet<Pid>,
    /// Those whose gate was closed, and when last.
    closed: HashMap<Pid, Instant>,
    /// When each was first seen to be under way.
    since: HashMap<Pending, Instant>,
    attempts: u32,
    report: BarrierReport,
}

impl Barrier {
    /// A barrier for a job.
    pub fn new(job: &Job, policy: BarrierPolicy) -> Barrier {
        Barrier {
            init: job.info.init,
            policy,
            until: None,
            words: ControlWords::default(),
            clock_offset_ns: crate::resource::job::time_offsets(job.info.init).0,
            seen: HashSet::new(),
            closed: HashMap::new(),
            since: HashMap::new(),
            attempts: 0,
            report: BarrierReport::default(),
        }
    }

    /// Waits until nothing is under way, or the time is up. The time is the same for all calls of it.
    ///
    /// # Errors
    /// [`DumpError::Late`] if the time is up and the policy is strict; [`DumpError::Interrupted`].
    pub fn wait(&mut self) -> Result<(), DumpError> {
        let started = Instant::now();
        let until = *self.until.get_or_insert(started + self.policy.timeout);
        if self.attempts > 0 {
            // Something had passed the gate; it takes a moment to arrive.
            std::thread::sleep(Duration::from_millis(1 << self.attempts.min(6)));
        }
        self.attempts += 1;
        let late = loop {
            DumpError::if_interrupted()?;
            let members = self.members();
            for (host, _) in &members {
                if self.policy.timeout.is_zero() {
                    self.open_one(*host);
                } else {
                    self.close(*host);
                }
                self.seen.insert(*host);
            }
            ckpt_sys::hook::point();
            let now = Instant::now();
            let pending = self.pending(&members);
            self.since.retain(|p, _| pending.contains(p));
            for p in &pending {
                self.since.entry(p.clone()).or_insert(now);
            }
            if now >= until {
                break pending;
            }
            if !pending.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            } else if self.members().iter().all(|(host, _)| self.seen.contains(host)) {
                break pending;
            }
            // One that was forked before its parent's gate was closed has an open one: it is gone through once more.
        };
        if !late.is_empty() {
            self.refuse(self.seen.iter().map(|host| (*host, inner(*host))).collect(), Refusals::process)?;
        }
        // A task that is gone was there a moment ago.
        self.report.late = LateList(late.iter().map(|p| self.late(p)).filter(|l| l.pid != 0).collect());
        self.report.waited_ns += u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if self.policy.strict && !self.report.late.0.is_empty() {
            return Err(DumpError::Late { timeout: self.policy.timeout, late: self.report.late.clone() });
        }
        Ok(())
    }

    /// Whether it makes sense to wait once more after a freeze in which something was found half-way.
    pub fn may_wait(&self) -> bool {
        self.attempts < MOST_ATTEMPTS && self.until.is_some_and(|until| Instant::now() < until)
    }

    /// Looks whether a process of a job that stands still is in a critical section, as one may be that passed the gate just before
    /// that was closed, and forgets those that ended with their threads.
    ///
    /// # Errors
    /// [`DumpError::Refused`] with them, as passing.
    pub fn refuse_sections(&mut self, job: &Job) -> Result<(), DumpError> {
        let passing = |r: &mut Refusals, pid, what, advice| r.passing(pid, None, what, advice);
        self.refuse(job.live().map(|p| (p.host, p.pid)).collect(), passing)?;
        for p in job.live() {
            if let Some(word) = self.words.get(p.host) {
                hooks::forget_sections(word);
            }
        }
        Ok(())
    }

    fn refuse(
        &mut self,
        processes: Vec<(Pid, i32)>,
        add: impl Fn(&mut Refusals, i32, String, &'static str),
    ) -> Result<(), DumpError> {
        let mut refusals = Refusals::default();
        for (host, pid) in processes {
            let name = self.words.get(host).and_then(|word| hooks::critical_section(word, host, || pid));
            if let Some(name) = name {
                let (what, advice) = hooks::refusal_of_section(&name);
                add(&mut refusals, pid, what, advice);
            }
        }
        refusals.check()
    }

    /// Opens all gates of a job that stands still.
    pub fn open(&mut self, job: &Job) {
        for p in job.live() {
            // A newcomer may have a closed one from its parent; other programs than were seen start with an open one.
            if self.closed.contains_key(&p.host) || !self.seen.contains(&p.host) {
                self.open_one(p.host);
            }
        }
        self.closed.clear();
    }

    /// What came of it.
    pub fn report(&self) -> BarrierReport {
        self.report.clone()
    }

    /// All processes of the job that can be seen now, each with its parent.
    fn members(&self) -> Vec<(Pid, Option<Pid>)> {
        let mut all = Vec::new();
        let mut ahead: Vec<(i32, Option<Pid>)> = children(self.init).into_iter().map(|c| (c, None)).collect();
        while let Some((host, parent)) = ahead.pop() {
            let host_pid = Pid::from_raw(host);
            all.push((host_pid, parent));
            ahead.extend(children(host).into_iter().map(|c| (c, Some(host_pid))));
        }
        all
    }

    fn pending(&mut self, members: &[(Pid, Option<Pid>)]) -> Vec<Pending> {
        let mut all = Vec::new();
        for (host, parent) in members {
            let member = Member { host: *host, parent: *parent, word: self.words.get(*host) };
            all.extend(CONDITIONS.iter().flat_map(|c| (c.pending)(&member)));
        }
        all
    }

    fn late(&self, pending: &Pending) -> Late {
        let task = pending.task;
        let name = read_proc(format!("/proc/{task}/comm")).unwrap_or_default();
        let since = self.since.get(pending).map(Instant::elapsed).unwrap_or_default();
        Late {
            pid: inner(process_of(task)),
            tid: inner(task),
            program: String::from_utf8_lossy(&name).trim_end().to_owned(),
            what: pending.what.clone(),
            for_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Closes the gate of a process, if it has one, or keeps it closed.
    fn close(&mut self, host: Pid) {
        let Some(word) = self.words.get(host) else { return };
        let gate = word.read_u32(offset_of!(Control, gate));
        if self.closed.get(&host).is_some_and(|last| last.elapsed() < RENEWAL)
            && gate.is_ok_and(|g| g == GATE_CLOSED)
        {
            return;
        }
        let deadline = ckpt_sys::clock::monotonic_ns() + self.clock_offset_ns + LEASE.as_nanos() as i64;
        // First the deadline: the gate is not closed without one. An execve meanwhile opens it by itself.
        let written = word
            .write(offset_of!(Control, gate_deadline_ns), &deadline.to_le_bytes())
            .and_then(|()| word.write(offset_of!(Control, gate), &GATE_CLOSED.to_le_bytes()));
        if written.is_ok() {
            self.closed.insert(host, Instant::now());
        }
    }

    /// Opens the gate of a process; also one that it has from its parent, or from a dumper that was killed.
    fn open_one(&mut self, host: Pid) {
        let ours = self.closed.remove(&host).is_some();
        let Some(word) = self.words.get(host) else { return };
        let gate = offset_of!(Control, gate);
        if ours || word.read_u32(gate).is_ok_and(|g| g != GATE_OPEN) {
            // With the deadline: the page is as it was. An error is the process's end.
            let _ = word
                .write(gate, &GATE_OPEN.to_le_bytes())
                .and_then(|()| word.write(offset_of!(Control, gate_deadline_ns), &0u64.to_le_bytes()));
        }
    }
}

impl Drop for Barrier {
    fn drop(&mut self) {
        if self.closed.is_empty() {
            return;
        }
        // Twice, for what a process forked before its own was opened.
        for _ in 0..2 {
            for (host, _) in self.members() {
                self.open_one(host);
            }
        }
    }
}
