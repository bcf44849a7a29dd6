// SPDX-License-Identifier: MIT OR Apache-2.0
//! What makes a dump besides time and signals, and what tells that a job is not well.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use ckpt_job::policy::{Supervised, Threshold};

use super::probe::{Answer, Probe};
use super::usage::{SentCounter, Usage, of_job};

/// How often usage and files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// The default of --probe-every and --probe-timeout.
const PROBE: Duration = Duration::from_secs(30);

/// What a look found.
#[derive(Debug, PartialEq, Eq)]
pub enum Pulled {
    /// A dump is to be made, for this reason.
    Dump(String),
    /// The job is to be ended and recovered, for this reason.
    Unwell(String),
    /// Something to tell.
    Note(String),
}

/// Everything that is looked at in one run of a job.
#[derive(Debug, Default)]
pub struct Triggers {
    init: i32,
    thresholds: Vec<Watched>,
    sent: Option<SentCounter>,
    look: Option<(Instant, Duration)>,
    when: Option<Probe>,
    health: Option<(Probe, u32)>,
    failures: u32,
    hang: Option<Hang>,
    oom_kills_before: u64,
}

#[derive(Debug)]
struct Watched {
    threshold: Threshold,
    /// What had been used up at the last dump.
    since: u64,
    file: Option<FileState>,
}

#[derive(Debug)]
struct Hang {
    after: Duration,
    usage: Usage,
    since: Instant,
}

/// By what a change of a file is noticed; `None`: it is not there.
type FileState = Option<(u64, u64, u64, i64, i64)>;

fn file_state(path: &Path) -> FileState {
    let status = std::fs::metadata(path).ok()?;
    Some((status.dev(), status.ino(), status.len(), status.mtime(), status.mtime_nsec()))
}

/// OOM kills of this host since it was started.
fn oom_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

impl Triggers {
    /// Those of a job whose run begins now.
    pub fn new(job: &Supervised, init: i32) -> Triggers {
        let policy = &job.policy;
        let every = policy.probe_every.map_or(PROBE, |span| span.duration());
        let timeout = policy.probe_timeout.map_or(PROBE, |span| span.duration());
        let probe =
            |command: &Option<String>| command.clone().map(|command| Probe::new(command, every, timeout));
        let usage = of_job(init);
        let hang =
            policy.hang_after.map(|after| Hang { after: after.duration(), usage, since: Instant::now() });
        let look = hang.as_ref().map(|hang| (hang.after / 4).min(LOOK));
        let look = if policy.dump_at.is_empty() { look } else { Some(look.unwrap_or(LOOK)) };
        let counts_sent = policy.dump_at.iter().any(|threshold| matches!(threshold, Threshold::Sent(_)));
        let mut triggers = Triggers {
            init,
            thresholds: Vec::new(),
            sent: counts_sent.then(SentCounter::default),
            look: look.map(|interval| (Instant::now() + interval, interval)),
            when: probe(&policy.dump_when),
            health: probe(&policy.health).map(|probe| (probe, policy.health_failures.unwrap_or(3))),
            failures: 0,
            hang,
            oom_kills_before: oom_kills(),
        };
        for threshold in &policy.dump_at {
            let threshold = match threshold {
                Threshold::Changed(path) => Threshold::Changed(job.directory.join(path)),
                other => other.clone(),
            };
            let file = if let Threshold::Changed(path) = &threshold { Some(file_state(path)) } else { None };
            let since = triggers.used(&threshold, usage);
            triggers.thresholds.push(Watched { threshold, since, file });
        }
        triggers
    }

    fn used(&mut self, threshold: &Threshold, usage: Usage) -> u64 {
        match threshold {
            Threshold::Cpu(_) => usage.cpu_ms,
            Threshold::Written(_) => usage.written,
            Threshold::Sent(_) => self.sent.as_mut().map_or(0, |sent| sent.look(self.init)),
            Threshold::Changed(_) => 0,
        }
    }

    /// When there is something to do, unless a child ends before.
    pub fn next(&self) -> Option<Instant> {
        let probes = [self.when.as_ref(), self.health.as_ref().map(|(probe, _)| probe)];
        let look = self.look.map(|(due, _)| due);
        probes.into_iter().flatten().map(Probe::next).chain(look).min()
    }

    /// A dump was made: amounts are counted from here on.
    pub fn dumped(&mut self) {
        let usage = of_job(self.init);
        let mut thresholds = std::mem::take(&mut self.thresholds);
        for watched in &mut thresholds {
            watched.since = self.used(&watched.threshold, usage);
        }
        self.thresholds = thresholds;
    }

    /// Looks at everything that is due.
    pub fn turn(&mut self, job: &Supervised, dumping: bool) -> Vec<Pulled> {
        let mut pulled = Vec::new();
        if let Some(probe) = &mut self.when
            && probe.turn(job, self.init) == Some(Answer::Yes)
        {
            pulled.push(Pulled::Dump("--dump-when".to_owned()));
        }
        // A job that stands still has no answer.
        if let Some((probe, most)) = self.health.as_mut().filter(|_| !dumping) {
            match probe.turn(job, self.init) {
                None => {}
                Some(Answer::Yes) => self.failures = 0,
                Some(Answer::No(why)) => {
                    self.failures += 1;
                    let text = format!(
                        "the health command failed ({} of {most}): {}",
                        self.failures,
                        why.trim_end()
                    );
                    if self.failures >= *most {
                        self.failures = 0;
                        pulled.push(Pulled::Unwell(text));
                    } else {
                        pulled.push(Pulled::Note(text));
                    }
                }
            }
        }
        if let Some((due, interval)) = self.look
            && due <= Instant::now()
        {
            self.look = Some((Instant::now() + interval, interval));
            self.look_at_usage(dumping, &mut pulled);
        }
        pulled
    }

    fn look_at_usage(&mut self, dumping: bool, pulled: &mut Vec<Pulled>) {
        let usage = of_job(self.init);
        let mut thresholds = std::mem::take(&mut self.thresholds);
        for watched in &mut thresholds {
            let used = self.used(&watched.threshold, usage).saturating_sub(watched.since);
            let reached = match &watched.threshold {
                Threshold::Cpu(span) => (used >= span.ms).then(|| format!("{used} ms of CPU time")),
                Threshold::Written(bytes) => (used >= *bytes).then(|| format!("{used} bytes written")),
                Threshold::Sent(bytes) => (used >= *bytes).then(|| format!("{used} bytes sent")),
                Threshold::Changed(path) => {
                    let now = file_state(path);
                    let changed = now.is_some() && watched.file.is_some_and(|before| before != now);
                    watched.file = Some(now);
                    changed.then(|| format!("{} changed", path.display()))
                }
            };
            if let Some(why) = reached {
                // Counted from here on, should the dump fail, too.
                watched.since += used;
                pulled.push(Pulled::Dump(why));
            }
        }
        self.thresholds = thresholds;
        if let Some(hang) = &mut self.hang {
            if usage != hang.usage || dumping {
                (hang.usage, hang.since) = (usage, Instant::now());
            } else if hang.since.elapsed() >= hang.after {
                hang.since = Instant::now();
                pulled.push(Pulled::Unwell(format!("no sign of life for {:?}", hang.after)));
            }
        }
    }

    /// A remark if the kernel's OOM killer was at work during this run.
    pub fn oom_kills(&self) -> String {
        if self.init == 0 {
            return String::new();
        }
        match oom_kills().saturating_sub(self.oom_kills_before) {
            0 => String::new(),
            n => format!(" (this host's OOM killer was at work meanwhile: {n} processes)"),
        }
    }
}
