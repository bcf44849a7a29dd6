// SPDX-License-Identifier: MIT OR Apache-2.0
//! Freeze: PTRACE_SEIZE and INTERRUPT until the set of tasks is stable, then observe it again.
//!
//! Dropping a [`FrozenJob`] resumes the job, and so does the kernel if the dumper is killed.

use super::dumpable::MadeDumpable;
use super::phases::Phases;
use super::{barrier, discover, short_write};
use crate::error::{DumpError, Refusals};
use crate::model::Job;
use crate::model::continued::Calls;
use crate::model::process::{
    Frozen, Process, Task, children, children_of_thread, status_value, threads, threads_and_children,
};
use ckpt_sys::arch;
use ckpt_sys::inject::Padding;
use ckpt_sys::ptrace::{self, Stop};
use ckpt_sys::{Errno, Pid, libc};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How long a task may take to stop. A task in uninterruptible sleep (a dead network file system) takes for ever.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// More CPUs no kernel knows.
const MOST_CPUS: usize = 8192;

/// A job whose tasks are all stopped.
#[derive(Debug)]
pub struct FrozenJob {
    /// The job as it stands still.
    pub job: Job,
    /// Before `tasks`: they are put back before they are let go.
    pub(crate) opened: MadeDumpable,
    tasks: Tasks,
}

#[derive(Debug, Default)]
struct Tasks {
    stopped: BTreeMap<Pid, Stopped>,
    running: BTreeMap<Pid, Instant>,
}

/// A task that stands still.
#[derive(Debug)]
struct Stopped {
    /// The signal of a group stop, SIGTRAP otherwise.
    signal: i32,
    /// Its registers, which nobody else can change; none if it was killed meanwhile. That it is still the same task, [`Tasks::others`] finds out.
    registers: Option<arch::Registers>,
}

impl Stopped {
    fn registers(&self, tid: Pid) -> Result<arch::Registers, Errno> {
        self.registers.map_or_else(|| ptrace::registers(tid), Ok)
    }
}

/// All task ids below init, as ckpt sees them.
fn all_tasks(init: i32) -> Vec<Pid> {
    let mut out = Vec::new();
    let mut pending = children(init);
    while let Some(p) = pending.pop() {
        let (threads, children) = threads_and_children(p);
        out.extend(threads.into_iter().map(Pid::from_raw));
        pending.extend(children);
    }
    out
}

/// The threads of a job that was observed while all of its named tasks stood still, if it has no child that was not there. Such a one
/// would be among the children of init and of main threads, to which orphans go (PR_SET_CHILD_SUBREAPER; where the main thread has ended the
/// job is refused), or of threads that have children, which could add to them (CLONE_PARENT). A thread that had none and stands still has none.
fn threads_without_newcomers(job: &Job) -> Option<Vec<Pid>> {
    let known: BTreeSet<i32> = job.processes.iter().map(|p| p.host.as_raw()).collect();
    let is_new = |child: &i32| !known.contains(child);
    if children(job.info.init).iter().any(is_new) {
        return None;
    }
    let mut all = Vec::new();
    for p in &job.processes {
        let parents = p.threads.iter().filter(|t| t.is_parent || t.host == p.host);
        if parents.flat_map(|t| children_of_thread(p.host.as_raw(), t.host.as_raw())).any(|c| is_new(&c)) {
            return None;
        }
        all.extend(threads(p.host.as_raw()).ok()?.into_iter().map(Pid::from_raw));
    }
    Some(all)
}

fn is_zombie(tid: Pid) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{tid}/stat")).unwrap_or_default();
    text.rsplit(')').next().is_none_or(|s| s.trim_start().starts_with(['Z', 'X']) || s.is_empty())
}

/// Who traces a task, 0 for nobody.
fn tracer_of(tid: Pid) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    text.lines().find_map(|l| l.strip_prefix("TracerPid:")?.trim().parse().ok())
}

/// Signals queued for a task or its process, as a mask.
fn pending_signals(tid: Pid) -> Result<u64, Errno> {
    let mut pending = 0u64;
    for shared in [false, true] {
        for s in ptrace::queued_signals(tid, shared)? {
            let n = u32::from_le_bytes([s[0], s[1], s[2], s[3]]);
            pending |= 1u64.checked_shl(n.wrapping_sub(1)).unwrap_or(0);
        }
    }
    Ok(pending)
}

/// Some calls return EINTR because of the stop alone. They are issued again, at once, so that the application doesn't
/// see it whatever happens to the dumper next. The registers that it has then, unless it is gone.
pub(super) fn reissue_interrupted_call(tid: Pid) -> Result<Option<arch::Registers>, DumpError> {
    let step = || {
        let mut r = ptrace::registers(tid)?;
        if arch::interrupted(&r, true) == arch::Interrupted::ByUs
            && pending_signals(tid)? & !ptrace::signal_mask(tid)? == 0
        {
            r = arch::reissued(&r);
            ptrace::set_registers(tid, &r)?;
        }
        // An error here leaves a short count, which is no reason to give up.
        Ok(short_write::continue_write(tid, &r).ok().flatten().unwrap_or(r))
    };
    match step() {
        Ok(registers) => Ok(Some(registers)),
        Err(Errno::ESRCH) => Ok(None),
        Err(e) => Err(DumpError::errno(tid.as_raw(), "looking at an interrupted call")(e)),
    }
}

impl Tasks {
    fn seize(&mut self, tid: Pid, seized: &mut Vec<Pid>) -> Result<(), DumpError> {
        match ptrace::seize(tid, ptrace::LIVE_OPTIONS) {
            Ok(()) => {
                // Known before it is interrupted: whatever fails next, it is let go again.
                self.running.insert(tid, Instant::now());
                seized.push(tid);
                Ok(())
            }
            Err(Errno::ESRCH) => Ok(()),
            Err(Errno::EPERM) if is_zombie(tid) => Ok(()),
            Err(Errno::EPERM) if tracer_of(tid) == Some(std::process::id()) => {
                // Seized by the kernel when a task of ours cloned it.
                self.running.insert(tid, Instant::now());
                Ok(())
            }
            Err(e) => {
                let reason = match tracer_of(tid).filter(|t| *t != 0) {
                    Some(t) => {
                        format!("is being traced by process {t} (a debugger?); detach it and dump again")
                    }
                    None => format!("can't be traced: {e}"),
                };
                Err(DumpError::NotStopped { pid: tid.as_raw(), reason })
            }
        }
    }

    /// Stops these tasks and all that they make meanwhile.
    fn stop(&mut self, found: &[Pid]) -> Result<(), DumpError> {
        // First all are seized, which stops none.
        let mut seized = Vec::with_capacity(found.len());
        for tid in found {
            if !self.stopped.contains_key(tid) && !self.running.contains_key(tid) {
                self.seize(*tid, &mut seized)?;
            }
        }
        for tid in seized {
            match ptrace::interrupt(tid) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(e) => return Err(DumpError::errno(tid.as_raw(), "PTRACE_INTERRUPT")(e)),
            }
        }
        let started = Instant::now();
        while !self.running.is_empty() {
            self.reap_stops()?;
            if started.elapsed() > Duration::from_millis(20) {
                self.release_vfork_children()?;
                std::thread::sleep(Duration::from_micros(200));
            } else if !self.running.is_empty() {
                std::thread::yield_now();
            }
            if let Some((tid, _)) = self.running.iter().find(|(_, since)| since.elapsed() > STOP_LIMIT) {
                return Err(not_stopped(*tid));
            }
        }
        Ok(())
    }

    /// Tasks that stood still, but by now are others: a thread that executes a program takes over the id of its main thread. They have to
    /// be stopped, and looked at, anew.
    fn others<'a>(&mut self, processes: impl Iterator<Item = &'a Process>) -> Result<Vec<Pid>, DumpError> {
        let mut out = Vec::new();
        for tid in processes.flat_map(|p| &p.threads).map(|t| t.host) {
            match ptrace::is_in_event_stop(tid) {
                Ok(true) => continue,
                Ok(false) => self.go_on(tid, 0)?,
                Err(Errno::ESRCH) => {}
                Err(e) => return Err(DumpError::errno(tid.as_raw(), "PTRACE_GETSIGINFO")(e)),
            }
            self.stopped.remove(&tid);
            out.push(tid);
        }
        Ok(out)
    }

    /// Tasks of the job that do not stand still yet.
    fn missing(&self, job: &Job) -> Vec<Pid> {
        let running = |tid: &Pid| !self.stopped.contains_key(tid) && !is_zombie(*tid);
        let seen = || job.processes.iter().flat_map(|p| &p.threads).map(|t| t.host);
        let missing: Vec<Pid> = seen().filter(running).collect();
        if !missing.is_empty() {
            return missing;
        }
        // One that was made just before its maker was stopped may have handed on to another and ended while the list was
        // read. A second one that names nobody else is complete.
        let is_calm = !job.vanished && seen().all(|tid| self.stopped.contains_key(&tid));
        let second = if is_calm { threads_without_newcomers(job) } else { None };
        let second = second.unwrap_or_else(|| all_tasks(job.info.init));
        second.into_iter().filter(running).collect()
    }

    fn reap_stops(&mut self) -> Result<(), DumpError> {
        let running: Vec<Pid> = self.running.keys().copied().collect();
        for tid in running {
            match ptrace::try_wait(tid) {
                Ok(None) => {}
                Ok(Some((_, Stop::Event { signal }))) => {
                    let registers = reissue_interrupted_call(tid)?;
                    self.running.remove(&tid);
                    self.stopped.insert(tid, Stopped { signal, registers });
                }
                // A signal that was on its way: let it be delivered, the interrupt is still pending.
                Ok(Some((_, Stop::Signal(s)))) => self.go_on(tid, s)?,
                Ok(Some((_, Stop::Syscall))) => self.go_on(tid, 0)?,
                Ok(Some((_, Stop::Ptrace(event)))) => {
                    if matches!(
                        event,
                        libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK
                    ) {
                        // The new task is seized by the kernel and will report a stop of its own.
                        if let Ok(n) = ptrace::event_message(tid) {
                            self.running.entry(Pid::from_raw(n as i32)).or_insert_with(Instant::now);
                        }
                    }
                    self.go_on(tid, 0)?;
                    let _ = ptrace::interrupt(tid);
                }
                Ok(Some((_, Stop::Gone(_)))) | Err(Errno::ECHILD) => {
                    self.running.remove(&tid);
                }
                Err(e) => return Err(DumpError::errno(tid.as_raw(), "waitpid")(e)),
            }
        }
        Ok(())
    }

    fn go_on(&mut self, tid: Pid, signal: i32) -> Result<(), DumpError> {
        match ptrace::cont(tid, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(DumpError::errno(tid.as_raw(), "PTRACE_CONT")(e)),
        }
    }

    /// A vfork parent stops only when its child has called execve or exited: let a stopped child run on.
    fn release_vfork_children(&mut self) -> Result<(), DumpError> {
        let waiting: Vec<Pid> = self.running.keys().copied().collect();
        for tid in waiting {
            for child in children_of_thread(tid.as_raw(), tid.as_raw()) {
                let child = Pid::from_raw(child);
                let same = ckpt_sys::task::kcmp(tid, child, ckpt_sys::task::Shared::Memory);
                if same == Ok(std::cmp::Ordering::Equal) && self.stopped.remove(&child).is_some() {
                    self.running.insert(child, Instant::now());
                    self.go_on(child, 0)?;
                }
            }
        }
        Ok(())
    }

    fn registers(&self, tid: Pid) -> Result<arch::Registers, Errno> {
        self.stopped.get(&tid).map_or_else(|| ptrace::registers(tid), |s| s.registers(tid))
    }

    /// Reads what only a stopped task shows. Its status is of this stop.
    fn look(&self, calls: &Calls, t: &Task, pid: i32) -> Result<Frozen, DumpError> {
        let tid = t.host;
        let mut registers = self.registers(tid).map_err(DumpError::errno(pid, "PTRACE_GETREGS"))?;
        let mask = ptrace::signal_mask(tid).map_err(DumpError::errno(pid, "PTRACE_GETSIGMASK"))?;
        let set = |key| status_value(&t.status, key).and_then(|v| u64::from_str_radix(v, 16).ok());
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidData);
        let pending = set("SigPnd").zip(set("ShdPnd")).map(|(own, shared)| own | shared).ok_or_else(invalid);
        let pending =
            pending.map_err(DumpError::process(pid, format!("pending signals of thread {}", t.tid)))?;
        let rseq = ptrace::rseq(tid).map_err(DumpError::errno(pid, "PTRACE_GET_RSEQ_CONFIGURATION"))?;
        let rseq = Some(rseq).filter(|r| r.pointer != 0);
        let cpu = rseq.and_then(|r| leave_critical_section(tid, r.pointer, &mut registers));
        let continued = calls.of_stopped(tid, &registers);
        Ok(Frozen { registers, mask, quiet: pending & !mask == 0, rseq, cpu, continued })
    }

    /// A task may still be finishing the code of a dumper that was killed: it must be through before that is overwritten,
    /// and what it undoes is seen only afterwards. True if there was one.
    fn leave(&mut self, threads: &[Task], padding: Padding, pid: i32) -> Result<bool, DumpError> {
        let until = Instant::now() + STOP_LIMIT;
        let mut went_on = false;
        for t in threads {
            loop {
                let r = self.registers(t.host).map_err(DumpError::errno(pid, "PTRACE_GETREGS"))?;
                if !(padding.start..padding.write_places().start).contains(&r.rip) {
                    break;
                }
                if Instant::now() > until {
                    return Err(not_stopped(t.host));
                }
                went_on = true;
                self.stopped.remove(&t.host);
                self.running.insert(t.host, Instant::now());
                self.go_on(t.host, 0)?;
                ptrace::interrupt(t.host).map_err(DumpError::errno(pid, "PTRACE_INTERRUPT"))?;
                while self.running.contains_key(&t.host) {
                    self.reap_stops()?;
                }
            }
        }
        Ok(went_on)
    }

    fn let_go(&mut self) {
        for tid in std::mem::take(&mut self.stopped).into_keys() {
            let _ = ptrace::detach(tid);
        }
        for tid in std::mem::take(&mut self.running).into_keys() {
            // Detaching needs a stop; a task that does not stop now is let go when ckpt exits.
            let until = Instant::now() + Duration::from_millis(200);
            let _ = ptrace::interrupt(tid);
            while Instant::now() < until {
                match ptrace::try_wait(tid) {
                    Ok(Some((_, Stop::Gone(_)))) | Err(_) => break,
                    Ok(Some((_, Stop::Signal(s)))) => {
                        let _ = ptrace::cont(tid, s);
                    }
                    Ok(Some(_)) => {
                        let _ = ptrace::detach(tid);
                        break;
                    }
                    Ok(None) => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// Stops every task of the job, which looked like `before`, and observes what stands still. With `assume`, flags of
/// mappings are assumed to be what they were; [`crate::resource::memory_map::confirm`] finds out.
///
/// # Errors
/// [`DumpError::NotStopped`] names a task that does not stop; in each case the job runs on.
pub fn freeze(before: &Job, assume: bool, phases: &mut Phases) -> Result<FrozenJob, DumpError> {
    let mut tasks = Tasks::default();
    // What *discover* saw is stopped at once; only then does it matter what came since.
    let mut found: Vec<Pid> = before.live().flat_map(|p| &p.threads).map(|t| t.host).collect();
    let mut opened = MadeDumpable::default();
    let since = Instant::now();
    let (mut job, refusals) = loop {
        tasks.stop(&found)?;
        phases.end("stop");
        let mut refusals = Refusals::default();
        let job = Job::observe(&before.info, Some(before), assume, &mut refusals)?;
        // A task that runs may make others: no list is complete before all that it names stand still.
        found = tasks.missing(&job);
        if !found.is_empty() {
            continue;
        }
        // One that ended while it was read is a zombie by now, and no longer what was read.
        let ended = |t: &Task| !tasks.stopped.contains_key(&t.host);
        if job.live().flat_map(|p| &p.threads).any(ended) && since.elapsed() < STOP_LIMIT {
            std::thread::yield_now();
            continue;
        }
        // The main thread of a process that has been made dumpable is in a stop of the injection.
        found = tasks.others(job.live().filter(|p| !opened.has(p.pid)))?;
        if let Some(tid) = found.first() {
            if since.elapsed() > STOP_LIMIT {
                return Err(not_stopped(*tid));
            }
            continue;
        }
        let dispatching = refuse_dispatching(&job, &mut refusals)?;
        let mut look_again = false;
        for p in job.live().filter(|p| !opened.has(p.pid)) {
            if let Some(padding) = p.padding() {
                look_again |= tasks.leave(&p.threads, padding, p.pid)?;
            }
        }
        if !look_again {
            for p in job.live().filter(|p| p.closed && !dispatching.contains(&p.pid)) {
                let Some(leader) = p.threads.first() else { continue };
                look_again |= opened.open(p, tasks.look(&before.calls, leader, p.pid)?, &mut refusals)?;
            }
        }
        if !look_again {
            break (job, refusals);
        }
    };
    for p in job.processes.iter_mut().filter(|p| p.zombie.is_none()) {
        p.stopped = tasks.stopped.get(&p.host).is_some_and(|s| s.signal != libc::SIGTRAP);
        let made_dumpable = opened.get(p.pid);
        p.dumpable = made_dumpable.as_ref().map(|o| o.value);
        // The registers of its main thread are those of an injection now.
        let leader = made_dumpable.map(|o| o.frozen.clone());
        for t in &mut p.threads {
            t.frozen = match &leader {
                Some(frozen) if t.tid == p.pid => Some(frozen.clone()),
                _ => Some(tasks.look(&before.calls, t, p.pid)?),
            };
        }
    }
    phases.end("observe");
    discover::examine(&mut job, refusals)?;
    phases.end("examine");
    Ok(FrozenJob { job, opened, tasks })
}

/// Refuses processes in which no call may be made, as it would end in their handler of SIGSYS; their pids. Only a stopped
/// thread tells.
fn refuse_dispatching(job: &Job, refusals: &mut Refusals) -> Result<BTreeSet<i32>, DumpError> {
    let mut found = BTreeSet::new();
    for p in job.live() {
        for t in &p.threads {
            if ptrace::dispatches_calls(t.host)
                .map_err(DumpError::errno(p.pid, "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG"))?
            {
                let what = format!("thread {} dispatches system calls (PR_SET_SYSCALL_USER_DISPATCH)", t.tid);
                refusals.process(p.pid, what, "not supported");
                found.insert(p.pid);
            }
        }
    }
    Ok(found)
}

fn not_stopped(tid: Pid) -> DumpError {
    let lent = children(tid.as_raw()).into_iter().map(Pid::from_raw).find(|child| {
        ckpt_sys::task::kcmp(tid, *child, ckpt_sys::task::Shared::Memory) == Ok(std::cmp::Ordering::Equal)
    });
    let why = match lent {
        Some(child) => format!(
            "it waits for its vfork's child, pid {}, which neither executes a program nor exits. End that, or dump again \
             when it has done so",
            barrier::inner(child)
        ),
        None => {
            let state = std::fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
            format!(
                "it is in the kernel ({state}), which may wait for a file system that does not answer. Dump again when it \
                 is over"
            )
        }
    };
    let reason = format!("did not stop within {} s: {why}", STOP_LIMIT.as_secs());
    DumpError::NotStopped { pid: barrier::inner(barrier::process_of(tid)), reason }
}

/// A task inside a restartable sequence goes to its abort handler: the kernel would not send it there any more once
/// it has been seen outside (rseq(2), `struct rseq_cs`). Tells the CPU that its area names.
fn leave_critical_section(tid: Pid, area: u64, registers: &mut arch::Registers) -> Option<usize> {
    let word = |b: &[u8], i: usize| u64::from_le_bytes(b[i..i + 8].try_into().unwrap_or_default());
    // Two halves of CPU numbers, and the address of the sequence.
    let mut head = [0u8; 16];
    ckpt_sys::memory::read(tid, area, &mut head).ok()?;
    let (cpu, cs) = ((word(&head, 0) >> 32) as i32, word(&head, 8));
    let mut body = [0u8; 32];
    if cs != 0 && ckpt_sys::memory::read(tid, cs, &mut body).is_ok() {
        let (start, length, abort) = (word(&body, 8), word(&body, 16), word(&body, 24));
        if registers.rip.wrapping_sub(start) < length {
            registers.rip = abort;
        }
    }
    // Anything may stand there.
    usize::try_from(cpu).ok().filter(|cpu| *cpu < MOST_CPUS)
}

impl FrozenJob {
    /// Lets all tasks go on, and the job with them.
    ///
    /// # Errors
    /// None at present; tasks that are gone need no resuming.
    pub fn resume(mut self) -> Result<(), DumpError> {
        self.opened.close();
        self.tasks.let_go();
        Ok(())
    }

    /// Kills the job where it stands: none of its tasks executes another instruction.
    pub fn kill(self) {
        for p in &self.job.processes {
            let _ = ckpt_sys::task::kill(p.host, libc::SIGKILL);
        }
        let _ = ckpt_sys::task::kill(Pid::from_raw(self.job.info.init), libc::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::process::Keep;
    use std::collections::HashMap;
    use std::process::{Command, Stdio};

    fn observe(pid: i32) -> Process {
        Process::observe(pid, &HashMap::new(), None, false, &mut Keep::none()).unwrap().unwrap()
    }

    /// `init`, this process with its main thread and `thread` only, as other tests have threads and children of their own, and `child`.
    fn job(init: i32, thread: Pid, child: Option<Pid>) -> Job {
        let mut job = Job::default();
        job.info.init = init;
        let mut me = observe(std::process::id() as i32);
        me.threads.retain(|t| t.host == me.host || t.host == thread);
        job.processes.push(me);
        job.processes.extend(child.map(|c| observe(c.as_raw())));
        job
    }

    #[test]
    fn who_turns_up_after_the_first_list_is_in_the_second() {
        let shell = |script: &str| {
            Command::new("sh")
                .args(["-c", script])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut init = shell("read line");
        let before = job(init.id() as i32, Pid::this(), None);
        // A thread of a known process.
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            tell.send(ckpt_sys::task::this()).unwrap();
            let _ = ended.recv();
        });
        let tid = told.recv().unwrap();
        assert!(threads_without_newcomers(&before).unwrap().contains(&tid));
        // An orphan of a known process, which adopts orphans.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let mut parent = shell("sleep 100 >/dev/null 2>&1 & echo $!");
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(parent.stdout.take().unwrap()), &mut line)
            .unwrap();
        parent.wait().unwrap();
        let orphan = Pid::from_raw(line.trim().parse().unwrap());
        assert!(threads_without_newcomers(&before).is_none());
        // And one of init's.
        let mut init_of_another = job(std::process::id() as i32, Pid::this(), None);
        init_of_another.processes.clear();
        assert!(threads_without_newcomers(&init_of_another).is_none());
        nix::sys::prctl::set_child_subreaper(false).unwrap();
        ckpt_sys::task::kill(orphan, libc::SIGKILL).unwrap();
        ptrace::reap(orphan).unwrap();
        drop(end);
        thread.join().unwrap();
        // Another child of a thread that has one.
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut made = Vec::new();
            while asked.recv().is_ok() {
                made.push(shell("read line"));
                tell.send((ckpt_sys::task::this(), Pid::from_raw(made[made.len() - 1].id() as i32))).unwrap();
            }
            made.iter_mut().for_each(|child| {
                drop(child.stdin.take());
                child.wait().unwrap();
            });
        });
        let next = || {
            ask.send(()).unwrap();
            told.recv().unwrap()
        };
        let (maker, first) = next();
        let before = job(init.id() as i32, maker, Some(first));
        assert!(threads_without_newcomers(&before).is_some());
        next();
        assert!(threads_without_newcomers(&before).is_none());
        drop(ask);
        thread.join().unwrap();
        drop(init.stdin.take());
        init.wait().unwrap();
    }
}
