// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `ckpt run` was told to do with a job on its own: when to dump it, how many checkpoints to keep, whether to restart it.
//!
//! Kept in the registry ([`crate::supervision`]), so that whoever supervises the job does what was asked, whatever happened to the
//! process that asked.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ExitStatus;
use crate::name::JobName;

/// A length of time, as `30s`, `10m`, `2h`, `1d`, `500ms` or several together (`1h30m`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// In milliseconds.
    pub ms: u64,
}

impl Span {
    /// As the standard library has it.
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.ms)
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        let wrong = || {
            format!("'{text}' is no length of time: give a number and a unit, as in 30s, 10m, 2h, 1d, 1h30m")
        };
        let mut rest = text;
        let mut ms: u64 = 0;
        while !rest.is_empty() {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
            let unit_end =
                rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |n| digits + n);
            let factor = match &rest[digits..unit_end] {
                "ms" => 1,
                "s" => 1000,
                "m" | "min" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => return Err(wrong()),
            };
            ms = number.checked_mul(factor).and_then(|part| ms.checked_add(part)).ok_or_else(wrong)?;
            rest = &rest[unit_end..];
        }
        if ms == 0 { Err(wrong()) } else { Ok(Span { ms }) }
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.ms.is_multiple_of(1000) {
            return write!(f, "{}ms", self.ms);
        }
        let s = self.ms / 1000;
        for (unit, seconds) in [("d", 86400), ("h", 3600), ("m", 60)] {
            if s >= seconds && s.is_multiple_of(seconds) {
                return write!(f, "{}{unit}", s / seconds);
            }
        }
        write!(f, "{s}s")
    }
}

/// A signal that makes a dump instead of reaching the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpOn {
    /// Its number.
    pub signal: u8,
    /// The job ends after it.
    pub stop: bool,
}

/// What a job has used up since its last dump, or that has changed, and makes the next one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Threshold {
    /// CPU time of all processes.
    Cpu(Span),
    /// Bytes that the job caused to be written to storage.
    Written(u64),
    /// Bytes that the job sent over TCP.
    Sent(u64),
    /// This file appeared or changed.
    Changed(PathBuf),
}

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Threshold, String> {
        match text.split_once(':') {
            Some(("cpu", value)) => Ok(Threshold::Cpu(value.parse()?)),
            Some(("written", value)) => Ok(Threshold::Written(parse_size(value)?)),
            Some(("sent", value)) => Ok(Threshold::Sent(parse_size(value)?)),
            Some(("changed", path)) if !path.is_empty() => Ok(Threshold::Changed(path.into())),
            _ => Err("give cpu:DURATION, written:SIZE, sent:SIZE or changed:PATH".to_owned()),
        }
    }
}

/// A number of bytes: `4096`, `64K`, `10M`, `1G`, `2T`, in powers of 1024.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("'{text}' is no size: give a number of bytes, or one with K, M, G or T, as in 512M, 10G");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let shift = match text[digits..].trim_end_matches("iB") {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(wrong)
}

/// When a job that ended is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recover {
    /// An exit status other than 0 counts as a failure, too.
    pub on_status: bool,
    /// How many times in a row without a new checkpoint.
    pub max: u32,
}

/// Recoveries in a row, if nothing else is asked for.
const DEFAULT_RECOVERIES: u32 = 10;

impl FromStr for Recover {
    type Err = String;

    fn from_str(text: &str) -> Result<Recover, String> {
        let wrong =
            || "give on-failure or on-abnormal, or one of them with a number, as in on-failure:5".to_owned();
        let (when, max) = match text.split_once(':') {
            Some((when, max)) => (when, max.parse().ok().filter(|max| *max > 0).ok_or_else(wrong)?),
            None => (text, DEFAULT_RECOVERIES),
        };
        match when {
            "on-failure" => Ok(Recover { on_status: true, max }),
            "on-abnormal" => Ok(Recover { on_status: false, max }),
            _ => Err(wrong()),
        }
    }
}

/// Everything asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Dump at this interval.
    pub every: Option<Span>,
    /// How many checkpoints to keep.
    pub keep: Option<u32>,
    /// Options of every dump, as `ckpt dump` takes them.
    pub dump_options: Vec<String>,
    /// Options of every removal of old checkpoints, as `ckpt rm --keep` takes them.
    pub prune_options: Vec<String>,
    /// Options of every restore, as `ckpt restore` takes them.
    pub restore_options: Vec<String>,
    /// Signals that make a dump.
    pub dump_on: Vec<DumpOn>,
    /// Thresholds that make one.
    pub dump_at: Vec<Threshold>,
    /// A command that makes one whenever it succeeds.
    pub dump_when: Option<String>,
    /// Whether a job that fails is started again.
    pub recover: Option<Recover>,
    /// The pause before the first recovery; doubles with each further one.
    pub recover_delay: Option<Span>,
    /// A command that fails when the job is not well.
    pub health: Option<String>,
    /// How often in a row it has to fail.
    pub health_failures: Option<u32>,
    /// How often the commands are run.
    pub probe_every: Option<Span>,
    /// How long each may take.
    pub probe_timeout: Option<Span>,
    /// A job that does nothing for so long hangs.
    pub hang_after: Option<Span>,
}

impl Policy {
    /// Whether somebody has to do something for it while the job runs.
    pub fn needs_supervisor(&self) -> bool {
        self.every.is_some()
            || !self.dump_on.is_empty()
            || !self.dump_at.is_empty()
            || self.dump_when.is_some()
            || self.recover.is_some()
    }

    /// Whether a job whose main process ended so is started again; `None`: it was killed as a whole.
    pub fn is_failure(&self, status: Option<ExitStatus>, has_terminal: bool) -> bool {
        let Some(recover) = self.recover else { return false };
        match status {
            None => true,
            Some(ExitStatus::Exited(code)) => code != 0 && recover.on_status,
            // A terminal's keys are a person's wish.
            Some(ExitStatus::Signalled(signal)) => {
                !(has_terminal && [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP].contains(&i32::from(signal)))
            }
        }
    }
}

/// What a supervisor needs to know of its job to dump and to start it again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Supervised {
    /// The job.
    pub name: JobName,
    /// What to do.
    pub policy: Policy,
    /// Where its checkpoints go.
    pub store: PathBuf,
    /// Where its output goes while nobody is attached; the supervisor adds lines of its own.
    pub log: PathBuf,
    /// The command.
    pub argv: Vec<OsString>,
    /// Its environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Its working directory at the start.
    pub directory: PathBuf,
    /// With a terminal of its own.
    pub tty: bool,
    /// Started with its output going to the log.
    pub detach: bool,
    /// Whether the interceptor is preloaded.
    pub interceptor: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        for (text, ms) in
            [("30s", 30_000), ("10m", 600_000), ("2h", 7_200_000), ("1h30m", 5_400_000), ("250ms", 250)]
        {
            assert_eq!(text.parse(), Ok(Span { ms }), "{text}");
        }
        for text in ["", "0s", "5", "m", "-1s", "1x", "99999999999999999999s", "400000000000000d"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
        let shown = ["90s", "10m", "48h", "250ms"].map(|text| text.parse::<Span>().unwrap().to_string());
        assert_eq!(shown, ["90s", "10m", "2d", "250ms"]);
    }

    #[test]
    fn thresholds_and_sizes() {
        assert_eq!("cpu:2h".parse(), Ok(Threshold::Cpu(Span { ms: 7_200_000 })));
        assert_eq!("written:10G".parse(), Ok(Threshold::Written(10 << 30)));
        assert_eq!("sent:1MiB".parse(), Ok(Threshold::Sent(1 << 20)));
        assert_eq!("changed:/a:b".parse(), Ok(Threshold::Changed("/a:b".into())));
        for text in
            ["cpu", "cpu:", "written:0", "sent:1X", "changed:", "read:1", "written:99999999999999999999"]
        {
            assert!(text.parse::<Threshold>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_a_failure() {
        let policy = |text: &str| Policy { recover: Some(text.parse().unwrap()), ..Policy::default() };
        let (failure, abnormal) = (policy("on-failure:3"), policy("on-abnormal"));
        assert_eq!(failure.recover, Some(Recover { on_status: true, max: 3 }));
        assert!(failure.is_failure(Some(ExitStatus::Exited(1)), false));
        assert!(!abnormal.is_failure(Some(ExitStatus::Exited(1)), false));
        assert!(abnormal.is_failure(Some(ExitStatus::Signalled(9)), true));
        assert!(abnormal.is_failure(Some(ExitStatus::Signalled(2)), false));
        assert!(!abnormal.is_failure(Some(ExitStatus::Signalled(2)), true));
        assert!(abnormal.is_failure(None, false));
        assert!(!failure.is_failure(Some(ExitStatus::Exited(0)), false));
        assert!(!Policy::default().is_failure(None, false));
        for text in ["", "always", "on-failure:", "on-failure:0", "on-failure:x"] {
            assert!(text.parse::<Recover>().is_err(), "{text}");
        }
    }
}
