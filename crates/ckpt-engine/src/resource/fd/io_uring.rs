// SPDX-License-Identifier: MIT OR Apache-2.0
//! io_uring(7): not supported (docs/support.md), but a ring on which something is in flight may soon be closed. So such a one is waited
//! for at the barrier, and refused only if it is still there when the job stands still.
//!
//! Limits: the kernel tells how far a ring got (`io_uring_show_fdinfo`), not what is in flight: a request may complete many times or
//! never. One that completes many times makes a ring look idle, which is refused at once; one that never does makes it be waited for in vain.

use crate::dump::barrier::{Member, Pending};
use crate::model::file::{info_value, infos};

/// What /proc/pid/fd leads to.
pub const TARGET: &str = "anon_inode:[io_uring]";

/// What to do about one.
pub const ADVICE: &str = "io_uring is not supported; many programs can do without it by an option";

/// What fdinfo tells of a ring.
struct Seen {
    submitted: u32,
    completed: u32,
    /// Armed polls.
    polls: u32,
    files: u32,
    buffers: u32,
}

fn seen(info: &str) -> Option<Seen> {
    let number = |key| info_value(info, key).and_then(|v| v.parse::<u32>().ok());
    // The list has a line for each, up to the next list.
    let polls = info.lines().skip_while(|l| *l != "PollList:").skip(1);
    Some(Seen {
        submitted: number("CachedSqHead")?,
        completed: number("CachedCqTail")?,
        polls: polls.take_while(|l| l.trim_start().starts_with("op=")).count() as u32,
        files: number("UserFiles").unwrap_or(0),
        buffers: number("UserBufs").unwrap_or(0),
    })
}

impl Seen {
    /// Requests that were submitted and have not completed, as far as can be told.
    fn missing(&self) -> u32 {
        u32::try_from(self.submitted.wrapping_sub(self.completed) as i32).unwrap_or(0)
    }
}

/// Whether something seems to be in flight on a ring with this fdinfo.
pub fn is_busy(info: &str) -> bool {
    seen(info).is_some_and(|s| s.missing() > 0 || s.polls > 0)
}

/// A ring in words.
pub fn words(info: &str) -> String {
    let Some(s) = seen(info) else { return "io_uring".into() };
    let more = [(s.polls, "polls armed"), (s.files, "files registered"), (s.buffers, "buffers registered")];
    let more: String =
        more.into_iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!(", {n} {what}")).collect();
    match s.missing() {
        0 => format!("io_uring: {} requests submitted, {} completions{more}", s.submitted, s.completed),
        n => format!("io_uring: {} requests submitted, {n} more than completed{more}", s.submitted),
    }
}

/// Rings with something in flight, for the barrier.
pub fn pending(member: &Member<'_>) -> Vec<Pending> {
    let rings = infos(member.host, |target| target == TARGET.as_bytes());
    rings
        .into_iter()
        .filter(|(_, info)| is_busy(info))
        .map(|(number, _)| Pending {
            task: member.host,
            what: format!("asynchronous I/O of io_uring fd {number}, which has to be closed then,"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "pos:\t0\nflags:\t02000002\nSqMask:\t0x7\nCachedSqHead:\t6\nCqTail:\t5\nCachedCqTail:\t5\n\
        UserFiles:\t0\nUserBufs:\t0\nPollList:\n  op=6, task_works=0\nCqOverflowList:\n";

    #[test]
    fn what_is_in_flight_is_seen() {
        assert!(is_busy(INFO));
        assert_eq!(words(INFO), "io_uring: 6 requests submitted, 1 more than completed, 1 polls armed");
        let idle = INFO.replace("Tail:\t5", "Tail:\t6").replace("  op=6, task_works=0\n", "");
        assert!(!is_busy(&idle));
        assert_eq!(words(&idle), "io_uring: 6 requests submitted, 6 completions");
        // The counters are 32 bits wide and begin anew.
        let wrapped = INFO.replace("SqHead:\t6", "SqHead:\t1").replace("Tail:\t5", "Tail:\t4294967295");
        assert!(words(&wrapped).contains("2 more"), "{}", words(&wrapped));
        assert_eq!((is_busy(""), words("").as_str()), (false, "io_uring"));
    }
}
