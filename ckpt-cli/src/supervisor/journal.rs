// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a supervisor tells: lines in the job's log, and its state for `ckpt ps`.

use std::fs::File;
use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ckpt_job::policy::Supervised;
use ckpt_job::supervision::{Event, SupervisorState};
use ckpt_job::{JobName, Registry};

/// Events that `ckpt ps --json` shows.
const KEPT_EVENTS: usize = 20;

/// Where a supervisor's words go.
#[derive(Debug)]
pub struct Journal {
    registry: Registry,
    name: JobName,
    log: Option<File>,
    state: SupervisorState,
}

/// Seconds since the epoch.
pub fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Journal {
    /// Goes on with what an earlier supervisor of the job has counted.
    pub fn open(registry: Registry, job: &Supervised) -> Journal {
        let mut state =
            registry.supervision(&job.name).ok().flatten().map(|known| known.state).unwrap_or_default();
        state.pid = std::process::id() as i32;
        state.restart_unix = None;
        let journal =
            Journal { registry, name: job.name.clone(), log: ckpt_job::open_log(&job.log).ok(), state };
        journal.publish();
        journal
    }

    fn publish(&self) {
        // Without room for it the job is supervised all the same.
        let _ = self.registry.write_supervisor_state(&self.name, &self.state);
    }

    /// Tells something.
    pub fn event(&mut self, what: &str) {
        let unix = now_unix();
        if let Some(log) = &mut self.log {
            let _ = writeln!(log, "ckpt supervisor: {}: {what}", utc(unix));
        }
        self.state.events.push(Event { unix, what: what.to_owned() });
        let surplus = self.state.events.len().saturating_sub(KEPT_EVENTS);
        self.state.events.drain(..surplus);
        self.publish();
    }

    /// Tells of a dump that succeeded.
    pub fn dumped(&mut self, checkpoint: &str, what: &str) {
        self.state.dumps += 1;
        self.state.last_checkpoint = Some(checkpoint.to_owned());
        self.event(what);
    }

    /// Tells of one that did not.
    pub fn dump_failed(&mut self, what: &str) {
        self.state.failed_dumps += 1;
        self.event(what);
    }

    /// Tells that this run of the job was its last.
    pub fn last_run(&mut self, run: Option<String>) {
        self.state.final_run = run;
        self.publish();
    }

    /// Tells that the job is started again after this time.
    pub fn restart_in(&mut self, after: Duration) {
        self.state.restart_unix = Some(now_unix() + after.as_secs());
        self.state.next_dump_unix = None;
        self.publish();
    }

    /// Tells that it was.
    pub fn restarted(&mut self, what: &str) {
        self.state.recoveries += 1;
        self.state.restart_unix = None;
        self.event(what);
    }

    /// Tells when the next periodic dump is due.
    pub fn next_dump(&mut self, after: Option<Duration>) {
        self.state.next_dump_unix = after.map(|after| now_unix() + after.as_secs());
        self.publish();
    }
}

/// A time as `2026-01-31T23:59:59Z`.
fn utc(unix: u64) -> String {
    let (days, second) = (unix / 86400, unix % 86400);
    // Days are counted from the first of March of the year 0, so that a leap day is the last day of its year.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    #[test]
    fn times() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(super::utc(unix), text);
        }
    }
}
