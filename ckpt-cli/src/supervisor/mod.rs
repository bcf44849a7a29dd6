// SPDX-License-Identifier: MIT OR Apache-2.0
//! The supervisor of a job: a process outside it that dumps it and starts it again.
//!
//! It does nothing itself that could fail in an unforeseen way: dumps and restarts are commands of ckpt that it starts, one at a time. It
//! hears of the job's end and of signals that are to make a dump through init's socket. Killed, it leaves the job as it is.

mod child;
mod journal;
mod probe;
mod recovery;
mod triggers;
mod usage;

use std::os::fd::{AsFd as _, RawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ckpt_abi::hooks::DUMP_NOW_SIGNAL;
use ckpt_engine::dump::hooks;
use ckpt_job::client::{Notice, Watch};
use ckpt_job::policy::{Policy, Supervised};
use ckpt_job::{ExitStatus, JobName, Registry};
use ckpt_sys::spawn;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};

use child::{Finished, Running};
use journal::Journal;
use recovery::Recovery;
use triggers::{Pulled, Triggers};

use crate::exit_code::ExitCode;

/// The pause before a dump is tried again that could not begin, or that the job's end depends on.
const RETRY: Duration = Duration::from_secs(1);
/// The pause before a dump is tried again that failed for another reason: something that is refused may be closed meanwhile.
const RETRY_FAILED: Duration = Duration::from_secs(10);

/// Why a dump is made that the application asks for.
const ASKED: &str = "the application asks for it";

/// A dump that is wanted.
#[derive(Clone, Debug)]
struct Wanted {
    why: String,
    stop: bool,
    /// Tried again by itself, at its next time.
    periodic: bool,
    /// By the application, which waits for it.
    asked: bool,
    not_before: Instant,
}

/// A dump that is being made.
struct Dumping {
    why: String,
    stop: bool,
    periodic: bool,
    asked: bool,
    /// Who waited for it when it was begun. Who has asked since gets a dump of its own.
    asking: hooks::Asking,
    command: Running,
}

/// How a run of the job ended, for the supervisor.
#[derive(Debug)]
enum End {
    /// For good.
    Final,
    /// By a failure that the job is to be recovered from.
    Failed,
    /// The supervisor is to go; the job stays.
    Leave,
}

struct Supervisor {
    registry: Registry,
    job: Supervised,
    journal: Journal,
    signals: SignalFd,
    /// That of the present run, here.
    init_pid: i32,
    /// What the job's next run gets besides the standard descriptors.
    inherited: Vec<RawFd>,
    wanted: Option<Wanted>,
    dumping: Option<Dumping>,
    pruning: Option<Running>,
    /// A checkpoint has been made since the removal that goes on began.
    prune_again: bool,
    next_periodic: Option<Instant>,
    triggers: Triggers,
    recovery: Recovery,
    /// Why the supervisor ended the job.
    unwell: Option<String>,
    leaving: bool,
}

/// The life of a supervisor; the arguments are the job's name and the number of the descriptor that holds its lock.
pub fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(2).collect();
    let result = (|| {
        let [name, lock] = arguments.as_slice() else {
            anyhow::bail!("it is for ckpt itself; see: ckpt supervise --help")
        };
        let lock = spawn::adopt_inherited(lock.parse()?)?;
        let name: JobName = name.parse()?;
        let mut supervisor = Supervisor::new(&name)?;
        let end = supervisor.supervise();
        if matches!(end, Ok(End::Final)) {
            supervisor.registry.end_supervision(&name)?;
        }
        drop(lock);
        end.map(drop)
    })();
    match result {
        Ok(()) => ExitCode::SUCCESS.into(),
        Err(error) => {
            // Seen only where the standard descriptors are those of ckpt run; the log has it, too, where there was one.
            eprintln!("ckpt: {}: {error:#}", crate::commands::supervise::SUPERVISE_ARGUMENT);
            ExitCode::FAILURE.into()
        }
    }
}

impl Supervisor {
    fn new(name: &JobName) -> Result<Supervisor> {
        let registry = Registry::open()?;
        let job = registry.supervised(name)?;
        // The terminal that it was started from is not its own, and no directory is kept busy.
        let _ = nix::unistd::setsid();
        let _ = nix::sys::prctl::set_name(c"ckpt-supervise");
        let _ = std::env::set_current_dir("/");
        spawn::set_blocked_signals(!0).context("blocking signals")?;
        spawn::set_ignored(libc::SIGCHLD, false).context("SIGCHLD")?;
        let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("making a signalfd")?;
        let mut inherited = Vec::new();
        for record in ckpt_job::external::inherited()?.iter().filter(|record| record.number > 2) {
            if job.policy.recover.is_some() {
                spawn::set_close_on_exec(record.number, true)?;
                inherited.push(record.number);
            } else {
                // A pipe's reader is to see its end when the job closes it.
                spawn::close_inherited(record.number)?;
            }
        }
        let journal = Journal::open(registry.clone(), &job);
        Ok(Supervisor {
            registry,
            job,
            journal,
            signals,
            init_pid: 0,
            inherited,
            wanted: None,
            dumping: None,
            pruning: None,
            prune_again: false,
            next_periodic: None,
            triggers: Triggers::default(),
            recovery: Recovery::default(),
            unwell: None,
            leaving: false,
        })
    }

    fn policy(&self) -> &Policy {
        &self.job.policy
    }

    /// Through all runs of the job.
    fn supervise(&mut self) -> Result<End> {
        loop {
            let watch = match Watch::start(&self.registry, &self.job.name) {
                Ok(watch) => watch,
                Err(error) if self.registry.is_live(&self.job.name)? => return Err(error.into()),
                // It has ended already.
                Err(_) => match self.run_ended(None)? {
                    End::Failed if self.recover()? => continue,
                    _ => return Ok(End::Final),
                },
            };
            match self.run(&watch)? {
                End::Leave => {
                    self.journal.event("told to leave: the job goes on unsupervised");
                    return Ok(End::Leave);
                }
                End::Failed if self.recover()? => {}
                End::Failed | End::Final => return Ok(End::Final),
            }
        }
    }

    /// Through one run of the job.
    fn run(&mut self, watch: &Watch) -> Result<End> {
        self.schedule_periodic();
        self.init_pid = watch.init_pid;
        self.triggers = Triggers::new(&self.job, watch.init_pid);
        self.journal.event("supervising");
        self.unwell = None;
        self.leaving = false;
        if !hooks::Asking::of(self.init_pid).is_empty() {
            // Heard by a supervisor that is dead, or not at all.
            self.signalled(DUMP_NOW_SIGNAL);
        }
        let mut main_ended: Option<ExitStatus> = None;
        loop {
            if self.leaving && main_ended.is_none() && self.dumping.is_none() {
                return Ok(End::Leave);
            }
            self.see_to_dumps();
            self.see_to_pruning();
            self.pull_triggers(watch);
            self.wait(watch)?;
            self.take_signals();
            while let Some(notice) = watch.notice() {
                match notice {
                    Notice::DumpSignal(signal) => self.signalled(i32::from(signal)),
                    Notice::Ended(outcome) if outcome.job_ended => {
                        return self.run_ended(Some(outcome.status));
                    }
                    Notice::Ended(outcome) => {
                        main_ended = Some(outcome.status);
                        if self.is_failure(main_ended) {
                            // What it left behind is of no use without it.
                            let _ = watch.end_job();
                        } else {
                            let run = self.registry.run_of(&self.job.name);
                            self.journal.last_run(run);
                        }
                        if watch.wait_for_all().is_err() {
                            return self.run_ended(main_ended);
                        }
                    }
                    Notice::Lost => return self.run_ended(main_ended),
                }
            }
        }
    }

    /// Whether an end of the main process is one to recover from; `None`: the job was killed as a whole.
    fn is_failure(&self, status: Option<ExitStatus>) -> bool {
        let name = &self.job.name;
        let wished = self.registry.end_requested(name)
            || self.registry.saved(name).is_some()
            || self.wanted.as_ref().is_some_and(|wanted| wanted.stop);
        let failed = self.unwell.is_some() && self.policy().recover.is_some();
        !wished && (failed || self.policy().is_failure(status, self.job.tty))
    }

    /// The last process of the run is gone.
    fn run_ended(&mut self, status: Option<ExitStatus>) -> Result<End> {
        // It may have ended before it was asked to tell of its end.
        let status = match status {
            Some(status) => Some(status),
            None => self.registry.exit_status(&self.job.name)?,
        };
        // A dump that has all of the job's state may still be writing it; one that ended the job is about to say so.
        if let Some(mut dumping) = self.dumping.take() {
            let finished = dumping.command.wait();
            self.dump_finished(dumping, &finished);
        }
        self.next_periodic = None;
        let failed = self.is_failure(status);
        let how = match (self.registry.saved(&self.job.name), self.unwell.take(), status) {
            (Some(checkpoint), ..) => format!("saved in {checkpoint} and ended"),
            (None, Some(unwell), _) => unwell,
            (None, None, Some(status)) => format!("the main process {status}{}", self.triggers.oom_kills()),
            (None, None, None) => format!("the job was killed as a whole{}", self.triggers.oom_kills()),
        };
        self.journal.event(&how);
        self.triggers = Triggers::default();
        self.wanted = None;
        if failed {
            return Ok(End::Failed);
        }
        self.journal.last_run(self.registry.run_of(&self.job.name));
        // A job that is to be recovered doesn't wait for it.
        self.end_pruning();
        Ok(End::Final)
    }

    fn schedule_periodic(&mut self) {
        let every = self.policy().every.map(|span| span.duration());
        self.next_periodic = every.map(|every| Instant::now() + every);
        self.journal.next_dump(every);
    }

    /// Asks for a dump; of several asked for at a time one is made, and the job ends after it if one of them says so.
    fn want(&mut self, why: impl Into<String>, stop: bool, periodic: bool) {
        let wanted = Wanted { why: why.into(), stop, periodic, asked: false, not_before: Instant::now() };
        match &mut self.wanted {
            Some(present) if present.stop || !stop && !present.periodic => {}
            present => {
                let asked = present.as_ref().is_some_and(|present| present.asked);
                *present = Some(Wanted { asked, ..wanted });
            }
        }
    }

    fn see_to_dumps(&mut self) {
        if let Some(mut dumping) = self.dumping.take() {
            match dumping.command.finished() {
                Some(finished) => self.dump_finished(dumping, &finished),
                None => self.dumping = Some(dumping),
            }
        }
        let now = Instant::now();
        if self.next_periodic.is_some_and(|due| due <= now) {
            self.next_periodic = None;
            let every = self.policy().every.map(|every| every.to_string()).unwrap_or_default();
            self.want(format!("every {every}"), false, true);
        }
        if self.dumping.is_none()
            && let Some(wanted) = self.wanted.take_if(|wanted| wanted.not_before <= now)
        {
            self.start_dump(wanted);
        }
    }

    fn start_dump(&mut self, wanted: Wanted) {
        let asking = if wanted.asked { hooks::Asking::of(self.init_pid) } else { hooks::Asking::default() };
        if wanted.asked && wanted.why == ASKED && !wanted.stop && asking.is_empty() {
            // Another dump has come before, or who asked does not wait any more.
            if self.next_periodic.is_none() {
                self.schedule_periodic();
            }
            return;
        }
        let mut command = self.ckpt();
        command.arg("dump").arg(self.job.name.as_str()).arg("--json").args(&self.job.policy.dump_options);
        if wanted.stop {
            command.arg("--stop");
        }
        match Running::start(command, false) {
            Ok(command) => {
                let Wanted { why, stop, periodic, asked, .. } = wanted;
                self.dumping = Some(Dumping { why, stop, periodic, asked, asking, command });
            }
            Err(error) => {
                self.journal.dump_failed(&format!("dump ({}): starting it: {error}", wanted.why));
                self.wanted = Some(Wanted { not_before: Instant::now() + RETRY, ..wanted });
            }
        }
    }

    fn dump_finished(&mut self, mut dumping: Dumping, finished: &Finished) {
        let why = &dumping.why;
        let answer: Option<serde_json::Value> = serde_json::from_str(&finished.stdout).ok();
        let checkpoint = answer.as_ref().and_then(|answer| answer["checkpoint"].as_str());
        if let (0, Some(checkpoint)) = (finished.code, checkpoint) {
            let pause_ms =
                answer.as_ref().and_then(|answer| answer["pause_ns"].as_f64()).unwrap_or(0.0) / 1e6;
            self.recovery.progress();
            self.triggers.dumped();
            self.journal.dumped(
                checkpoint,
                &format!("dumped ({why}): {checkpoint}, stood still for {pause_ms:.1} ms"),
            );
            self.prune();
        } else {
            self.journal.dump_failed(&format!("dump ({why}): failed: {}", one_line(&finished.stderr)));
            // Another dump goes on, or the job's end waits for this one.
            let soon = dumping.stop || finished.code == i32::from(ExitCode::CONFLICT.0);
            if dumping.asked && !soon {
                dumping.asking.tell_failure();
            }
            if soon || !dumping.periodic && why != ASKED {
                let not_before = Instant::now() + if soon { RETRY } else { RETRY_FAILED };
                let Dumping { stop, periodic, asked, .. } = dumping;
                let again = Wanted { why: why.clone(), stop, periodic, asked, not_before };
                // The job's end is not forgotten for another dump that was asked for meanwhile.
                if stop {
                    self.wanted = Some(again);
                } else {
                    self.wanted.get_or_insert(again).asked |= asked;
                }
            }
        }
        if self.next_periodic.is_none() {
            self.schedule_periodic();
        }
    }

    /// Thresholds, probes and signs of life.
    fn pull_triggers(&mut self, watch: &Watch) {
        for pulled in self.triggers.turn(&self.job, self.dumping.is_some()) {
            match pulled {
                Pulled::Dump(why) => self.want(why, false, false),
                Pulled::Note(what) => self.journal.event(&what),
                Pulled::Unwell(why) => {
                    self.journal.event(&format!("{why}: ending the job"));
                    self.unwell = Some(why);
                    let _ = watch.end_job();
                }
            }
        }
    }

    /// Has old checkpoints removed. A command does it, beside the job and its dumps: folding a chain takes as long as a full dump.
    fn prune(&mut self) {
        let Some(keep) = self.policy().keep else { return };
        if self.pruning.is_some() {
            self.prune_again = true;
            return;
        }
        let mut command = self.ckpt();
        command.arg("rm").arg("--json").arg("--keep").arg(keep.to_string());
        command.args(&self.policy().prune_options).arg(format!("--store={}", self.job.store.display()));
        command.arg(self.job.name.as_str());
        match Running::start(command, false) {
            Ok(running) => self.pruning = Some(running),
            Err(error) => self.journal.event(&format!("removing old checkpoints: starting it: {error}")),
        }
    }

    fn pruned(&mut self, finished: &Finished) {
        let answer: Option<serde_json::Value> = serde_json::from_str(&finished.stdout).ok();
        let names = |what: &str| -> Vec<&str> {
            let list = answer.as_ref().and_then(|answer| answer[what].as_array());
            list.into_iter().flatten().filter_map(|name| name.as_str()).collect()
        };
        for (what, names) in [("squashed", names("squashed")), ("removed", names("removed"))] {
            if !names.is_empty() {
                self.journal.event(&format!("{what} {}", names.join(", ")));
            }
        }
        if finished.code != 0 {
            self.journal.event(&format!("removing old checkpoints: failed: {}", one_line(&finished.stderr)));
        }
        if std::mem::take(&mut self.prune_again) {
            self.prune();
        }
    }

    fn see_to_pruning(&mut self) {
        if let Some(finished) = self.pruning.as_mut().and_then(Running::finished) {
            self.pruning = None;
            self.pruned(&finished);
        }
    }

    /// Until no removal goes on.
    fn end_pruning(&mut self) {
        while let Some(mut pruning) = self.pruning.take() {
            let finished = pruning.wait();
            self.pruned(&finished);
        }
    }

    fn ckpt(&self) -> Command {
        // Not by its path: that may be another version meanwhile, or none.
        let mut command = Command::new("/proc/self/exe");
        command.current_dir(&self.job.directory);
        command
    }

    /// Waits until there may be something to do.
    fn wait(&self, watch: &Watch) -> Result<()> {
        let wanted = self.wanted.as_ref().filter(|_| self.dumping.is_none()).map(|wanted| wanted.not_before);
        let due = [wanted, self.next_periodic, self.triggers.next()].into_iter().flatten().min();
        let timeout = due.map_or(PollTimeout::NONE, |due| {
            // Rounded up, so that it is due then.
            let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut polled = [
            PollFd::new(watch.socket(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno).context("poll"),
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            self.signalled(info.ssi_signo as i32);
        }
    }

    /// A signal that init handed on, or that was sent to this process itself.
    fn signalled(&mut self, signal: i32) {
        let asked = self.policy().dump_on.iter().find(|dump| i32::from(dump.signal) == signal).copied();
        if signal == DUMP_NOW_SIGNAL {
            self.want(ASKED, asked.is_some_and(|asked| asked.stop), false);
            if let Some(wanted) = &mut self.wanted {
                wanted.asked = true;
                // Somebody waits.
                wanted.not_before = Instant::now();
            }
        } else if let Some(asked) = asked {
            let name = nix::sys::signal::Signal::try_from(signal)
                .map_or_else(|_| format!("signal {signal}"), |signal| signal.as_str().to_owned());
            self.want(name, asked.stop, false);
        } else if [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT].contains(&signal) {
            self.leaving = true;
        }
    }
}

/// A message on one line, not too long for a list.
pub(crate) fn one_line(text: &str) -> String {
    const MOST: usize = 500;
    let lines: Vec<&str> = text.lines().map(|line| line.trim_start_matches("ckpt: ").trim()).collect();
    let line = lines.join("; ");
    line.chars().take(MOST).collect()
}
