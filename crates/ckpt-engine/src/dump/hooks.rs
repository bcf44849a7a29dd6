// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hooks: the application's callbacks around a dump, its critical sections, and the dumps that it asks for itself.
//!
//! Format: `ckpt_abi::hooks`, in the control word of each process that carries the interceptor.
//!
//! A thread of the application that sleeps on a word in futex(2) is woken by writing to that word and stopping the thread for a
//! moment: the call is started again, compares, and returns. While the job is frozen writing is enough.
//!
//! Limits: a process that is stopped by job control can't answer. Nothing that is read is trusted but for whether it is waited
//! for, which is bounded.

use super::barrier::{BarrierPolicy, Late, LateList};
use super::control_word::ControlWord;
use super::freeze;
use crate::error::{DumpError, Refusals};
use crate::model::process::{children, read_proc};
use ckpt_abi::hooks::{
    ANSWER_DUMPED, ANSWER_FAILED, HOOKS_OFFSET, Hooks, MOST_SECTIONS, Phase, SECTION_BYTES, VETOED, answer,
    phase, request, sequence, unanswered,
};
use ckpt_abi::interceptor::{Control, IN_FLIGHT_CRITICAL};
use ckpt_sys::ptrace::{self, Stop};
use ckpt_sys::{Errno, Pid};
use std::mem::offset_of;
use std::time::{Duration, Instant};

/// How often it is looked whether callbacks have returned.
const LOOK: Duration = Duration::from_millis(1);
/// How long a thread may take to stop for a moment; it sleeps, or runs the application's code.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// What a dump may take besides waiting for processes, until they are told to go on; then they take the dumper for dead.
const DUMP_LIMIT: Duration = Duration::from_secs(20);

const fn at(field: usize) -> usize {
    HOOKS_OFFSET + field
}

/// A process that carries the interceptor.
#[derive(Debug)]
struct Member {
    pid: i32,
    word: ControlWord,
    /// The thread that runs its callbacks, as ckpt sees it; none if it has registered no hooks.
    thread: Option<Pid>,
    /// What is read there is of this process, not of the one that it was forked from.
    own: bool,
    /// What was last asked of it.
    asked: u32,
    /// The ticket by which it was waiting for a dump that it has asked for, when it was noted.
    ticket: Option<u32>,
}

impl Member {
    fn of(host: Pid) -> Option<Member> {
        let word = ControlWord::find(host)?;
        let pid = last_nspid(&format!("/proc/{host}/status"))?;
        // What a forked child has from its parent is not its own.
        let own = word.read_u32(at(offset_of!(Hooks, owner))).ok()? == pid as u32;
        let thread = word.read_u32(at(offset_of!(Hooks, thread))).ok().filter(|t| own && *t != 0);
        let thread = thread.and_then(|tid| host_thread(host, tid as i32));
        let asked = word.read_u32(at(offset_of!(Hooks, request))).ok()?;
        Some(Member { pid, word, thread, own, asked, ticket: None })
    }

    fn get(&self, field: usize) -> Option<u32> {
        self.word.read_u32(at(field)).ok()
    }

    fn set(&self, field: usize, value: u32) -> std::io::Result<()> {
        self.word.write(at(field), &value.to_le_bytes())
    }

    /// Stores a request.
    fn ask(&mut self, wanted: u32) {
        self.asked = wanted;
        // One that has ended or executed another program has nothing to do any more.
        let _ = self.set(offset_of!(Hooks, request), wanted);
    }

    /// The ticket of the call that waits for a dump.
    fn waits_by(&self) -> Option<u32> {
        let asking = self.get(offset_of!(Hooks, asking)).filter(|_| self.own)?;
        unanswered(asking, self.get(offset_of!(Hooks, answer))?)
    }

    /// Notes whether it waits.
    fn note(&mut self) {
        self.ticket = self.waits_by();
    }

    /// Answers the call that was noted, unless it waits no longer or has been answered. `number` is that of a checkpoint.
    fn answer(&mut self, what: u32, number: Option<u64>) {
        // A later call doesn't take the answer, whenever it begins. That it is not written at all keeps the one that such a
        // call may have had meanwhile.
        let Some(ticket) = self.ticket.take().filter(|ticket| self.waits_by() == Some(*ticket)) else {
            return;
        };
        if let Some(number) = number {
            let _ = self.word.write(at(offset_of!(Hooks, answered_checkpoint)), &number.to_le_bytes());
        }
        let _ = self.set(offset_of!(Hooks, answer), answer(ticket, what));
    }

    fn has_answered(&self) -> bool {
        self.get(offset_of!(Hooks, acknowledged)).is_none_or(|value| value == self.asked)
    }
}

/// All processes below init, as ckpt sees them.
fn members(init: i32) -> Vec<Member> {
    let mut out = Vec::new();
    let mut pending = children(init);
    while let Some(host) = pending.pop() {
        pending.extend(children(host));
        out.extend(Member::of(Pid::from_raw(host)));
    }
    out
}

/// The pid in the innermost namespace that a status file tells (proc_pid_status(5)).
fn last_nspid(path: &str) -> Option<i32> {
    let text = read_proc(path).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines().find_map(|l| l.strip_prefix("NSpid:")?.split_whitespace().last()?.parse().ok())
}

fn host_thread(host: Pid, tid: i32) -> Option<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{host}/task")).ok()?;
    let mut ids = tasks.flatten().filter_map(|t| t.file_name().to_str()?.parse::<i32>().ok());
    ids.find(|t| last_nspid(&format!("/proc/{host}/task/{t}/status")) == Some(tid)).map(Pid::from_raw)
}

/// Stops a thread for a moment, so that a call in which it sleeps is started again. What it is besides asleep in futex(2) does
/// not matter: then it looks at the word by itself.
fn nudge(thread: Pid) -> Result<(), Errno> {
    // Without options: what it makes in a callback meanwhile is none of ours.
    ptrace::seize(thread, 0)?;
    let until = Instant::now() + STOP_LIMIT;
    let stopped = (|| {
        ptrace::interrupt(thread)?;
        loop {
            match ptrace::try_wait(thread)? {
                Some((_, Stop::Event { .. })) => {
                    // In a callback it may be in a call that the stop has ended.
                    let _ = freeze::reissue_interrupted_call(thread);
                    return Ok(());
                }
                Some((_, Stop::Signal(signal))) => ptrace::cont(thread, signal)?,
                Some((_, Stop::Gone(_))) => return Err(Errno::ESRCH),
                Some(_) => {
                    ptrace::cont(thread, 0)?;
                    ptrace::interrupt(thread)?;
                }
                None if Instant::now() > until => return Err(Errno::ETIMEDOUT),
                None => std::thread::yield_now(),
            }
        }
    })();
    // Not possible unless it stands still; else it is let go when this process ends.
    let _ = ptrace::detach(thread);
    stopped
}

/// How the application takes part in a dump. When dropped, every process whose `on_dump` may have been called has been told to go
/// on.
#[derive(Debug)]
pub struct Cooperation {
    policy: BarrierPolicy,
    members: Vec<Member>,
    /// Who did not answer.
    late: Vec<Late>,
    /// Processes that were asked have been told to go on since.
    over: bool,
}

impl Cooperation {
    /// Calls `on_dump` in all processes that have registered hooks, and waits until all have returned or the time is up. With a
    /// time of zero none is called.
    ///
    /// # Errors
    /// [`DumpError::Refused`] if an `on_dump` asks for no dump to be made; [`DumpError::Late`] if the time is up and the policy
    /// strict; [`DumpError::Interrupted`].
    pub fn begin(init: i32, policy: BarrierPolicy) -> Result<Cooperation, DumpError> {
        let mut this = Cooperation { policy, members: members(init), late: Vec::new(), over: false };
        this.ask()?;
        Ok(this)
    }

    /// Calls `on_dump` once more, for another attempt, if there has been an end of the first.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn again(&mut self) -> Result<(), DumpError> {
        if std::mem::take(&mut self.over) { self.ask() } else { Ok(()) }
    }

    /// Who did not answer in time.
    pub fn late(&self) -> Vec<Late> {
        self.late.clone()
    }

    fn ask(&mut self) -> Result<(), DumpError> {
        let limit = self.policy.timeout;
        self.late.clear();
        if limit.is_zero() {
            return Ok(());
        }
        let started = Instant::now();
        let resume_after_ms = u32::try_from((2 * limit + DUMP_LIMIT).as_millis()).unwrap_or(u32::MAX);
        let mut waited_for = Vec::new();
        for (n, m) in self.members.iter_mut().enumerate() {
            let Some(thread) = m.thread else { continue };
            let _ = m.set(offset_of!(Hooks, resume_after_ms), resume_after_ms);
            m.ask(request(sequence(m.asked).wrapping_add(1), Phase::Dump));
            // One that can't be woken is late.
            if !matches!(nudge(thread), Err(Errno::ESRCH)) {
                waited_for.push(n);
            }
            ckpt_sys::hook::point();
        }
        loop {
            DumpError::if_interrupted()?;
            waited_for.retain(|n| !self.members[*n].has_answered());
            if waited_for.is_empty() || started.elapsed() >= limit {
                break;
            }
            std::thread::sleep(LOOK);
        }
        ckpt_sys::hook::point();
        self.late.extend(waited_for.iter().map(|n| {
            let m = &self.members[*n];
            let name = m.thread.and_then(|t| read_proc(format!("/proc/{t}/comm")).ok()).unwrap_or_default();
            Late {
                pid: m.pid,
                tid: m.get(offset_of!(Hooks, thread)).map_or(m.pid, |tid| tid as i32),
                program: String::from_utf8_lossy(&name).trim_end().to_owned(),
                what: "its on_dump".to_owned(),
                for_ns: u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            }
        }));
        let mut refusals = Refusals::default();
        for m in self.members.iter().filter(|m| m.thread.is_some() && m.has_answered()) {
            if m.get(offset_of!(Hooks, vetoed)) == Some(VETOED) {
                let advice = "dump again when the application is ready for it";
                refusals.process(m.pid, "its on_dump asks for no dump to be made now", advice);
            }
        }
        refusals.check()?;
        self.refuse_late()
    }

    /// Looks, while the job stands still, whether a process has taken this dumper for dead and gone on: it is late, too.
    ///
    /// # Errors
    /// [`DumpError::Late`] if the policy is strict.
    pub fn still_holds(&mut self) -> Result<(), DumpError> {
        for m in self.members.iter().filter(|m| m.thread.is_some() && phase(m.asked) == Phase::Dump) {
            let (request, pid) = (m.get(offset_of!(Hooks, request)), m.pid);
            if request.is_some_and(|request| request != m.asked) {
                self.late.push(Late {
                    pid,
                    tid: m.get(offset_of!(Hooks, thread)).map_or(pid, |tid| tid as i32),
                    program: "ckpt-hooks".to_owned(),
                    what: "what its on_resume has begun, as nobody had frozen it,".to_owned(),
                    for_ns: 0,
                });
            }
        }
        self.refuse_late()
    }

    fn refuse_late(&self) -> Result<(), DumpError> {
        if self.policy.strict && !self.late.is_empty() {
            return Err(DumpError::Late { timeout: self.policy.timeout, late: LateList(self.late.clone()) });
        }
        Ok(())
    }

    /// While the job stands still and its memory has been taken: what it does first when it goes on is `on_resume`.
    pub fn end_while_frozen(&mut self) {
        self.tell_end();
    }

    /// Notes who waits for the dump that is being made. Call it while the job is frozen.
    pub fn note_asking(&mut self) {
        for m in &mut self.members {
            m.note();
        }
    }

    /// The checkpoint is there: tells those who have been waiting for it. Its number is 0 if it has none.
    pub fn published(&mut self, number: u64) {
        for m in &mut self.members {
            m.answer(ANSWER_DUMPED, Some(number));
        }
    }

    /// Those with hooks who have been asked and not been told to go on.
    fn tell_end(&mut self) -> Vec<Pid> {
        if std::mem::replace(&mut self.over, true) {
            return Vec::new();
        }
        let mut told = Vec::new();
        for m in &mut self.members {
            // After a failed start it may be that not all have been asked.
            if let Some(thread) = m.thread.filter(|_| phase(m.asked) == Phase::Dump) {
                m.ask(request(sequence(m.asked), Phase::Resume));
                told.push(thread);
            }
        }
        told
    }
}

impl Drop for Cooperation {
    fn drop(&mut self) {
        for thread in self.tell_end() {
            // One that can't be woken goes on by itself, later.
            let _ = nudge(thread);
        }
    }
}

/// The processes of the job that have registered hooks, as they see themselves.
pub fn registered(init: i32) -> Vec<i32> {
    members(init).iter().filter(|m| m.thread.is_some()).map(|m| m.pid).collect()
}

/// The processes of a job that wait for a dump that they have asked for.
#[derive(Debug, Default)]
pub struct Asking(Vec<Member>);

impl Asking {
    /// Those that wait now.
    pub fn of(init: i32) -> Asking {
        let mut all = members(init);
        all.iter_mut().for_each(Member::note);
        all.retain(|m| m.ticket.is_some());
        Asking(all)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Tells those that still wait that the dump has failed. Who has asked since is not told.
    pub fn tell_failure(&mut self) {
        for m in &mut self.0 {
            m.answer(ANSWER_FAILED, None);
        }
    }
}

/// The critical section that a process has begun last, by its name, which may be empty. `None` if it is in none. That one may have
/// ended, with another thread's going on. `pid` is that which it sees itself. Sure only if it stands still: of a running process a thread
/// may be overlooked.
pub fn critical_section(word: &ControlWord, host: Pid, pid: impl FnOnce() -> i32) -> Option<String> {
    let counted = word.read_u32(offset_of!(Control, in_flight) + 4 * IN_FLIGHT_CRITICAL).ok()? != 0;
    let threads: Vec<i32> = places(word)?.into_iter().filter(|tid| *tid != 0).collect();
    if !counted && threads.is_empty()
        || word.read_u32(at(offset_of!(Hooks, owner))).ok()? != u32::try_from(pid()).ok()?
    {
        return None;
    }
    if !counted && !living_threads(host).iter().any(|tid| threads.contains(tid)) {
        return None;
    }
    let mut name = [0; SECTION_BYTES];
    word.read(at(offset_of!(Hooks, section)), &mut name).ok()?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).collect())
}

/// Makes the places free of threads that have ended in critical sections. `word` is that of a process which stands still and is in none.
pub fn forget_sections(word: &ControlWord) {
    for (n, _) in places(word).iter().flatten().enumerate().filter(|(_, tid)| **tid != 0) {
        let _ = word.write(offset_of!(Control, sections) + 4 * n, &[0; 4]);
    }
}

/// Threads in critical sections; 0 for a free place.
fn places(word: &ControlWord) -> Option<Vec<i32>> {
    let mut bytes = [0; 4 * MOST_SECTIONS];
    word.read(offset_of!(Control, sections), &mut bytes).ok()?;
    Some(bytes.as_chunks::<4>().0.iter().map(|tid| i32::from_le_bytes(*tid)).collect())
}

/// The threads of a process that have not ended, as they see themselves.
fn living_threads(host: Pid) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{host}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|t| living(&read_proc(t.path().join("status")).ok()?)).collect()
}

/// The innermost id in a thread's status, unless it has ended: a main thread that has stays until all have.
fn living(status: &[u8]) -> Option<i32> {
    let text = String::from_utf8_lossy(status);
    let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)).map(str::trim);
    if value("State:")?.starts_with(['Z', 'X']) {
        return None;
    }
    value("NSpid:")?.split_whitespace().last()?.parse().ok()
}

/// Why a process is not dumped that is in a critical section: what, and what to do.
pub fn refusal_of_section(name: &str) -> (String, &'static str) {
    let what =
        format!("it is in a critical section and must not be dumped; the one begun last is \"{name}\"");
    (what, "dump again when it is over, or give it more time: --barrier-timeout")
}
