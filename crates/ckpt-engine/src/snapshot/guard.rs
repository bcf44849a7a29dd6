// SPDX-License-Identifier: MIT OR Apache-2.0
//! Watches over frozen copies while the image is written: they go before the job is short of memory, and when more was
//! duplicated than is allowed. The dump then ends with an error; the job doesn't see anything of it.

use super::memory_limit::Limits;
use crate::error::DumpError;
use ckpt_sys::frozen_copy::CopyProcess;
use ckpt_sys::{Pid, libc};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the limits of control groups are looked at.
const PERIOD: Duration = Duration::from_millis(10);
/// Counting what is duplicated looks at every page of a copy: at most this part of the time.
const COUNTING_SHARE: u32 = 20;

/// The watch over all copies of a dump.
#[derive(Debug)]
pub struct Guard {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    copies: Vec<Pid>,
    duplicate_limit_bytes: Option<u64>,
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stop: bool,
    verdict: Option<Verdict>,
}

#[derive(Debug, Clone)]
enum Verdict {
    Tight { group: std::path::PathBuf, free_bytes: u64 },
    Duplicated { bytes: u64, limit_bytes: u64 },
}

impl Guard {
    /// For these copies; nothing is done before [`Guard::start`].
    pub fn new(copies: &BTreeMap<i32, CopyProcess>, duplicate_limit_bytes: Option<u64>) -> Guard {
        let copies = copies.values().map(CopyProcess::pid).collect();
        let (state, over) = (Mutex::default(), Condvar::new());
        Guard { shared: Arc::new(Shared { copies, duplicate_limit_bytes, state, over }), thread: None }
    }

    /// Begins to watch.
    pub fn start(&mut self) {
        let shared = Arc::clone(&self.shared);
        self.thread = Some(std::thread::spawn(move || shared.watch()));
    }

    /// Ends the watch. From here on copies may be reaped.
    pub fn stop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.over.notify_all();
        if let Some(thread) = self.thread.take() {
            // A watch that panicked has nothing to say.
            let _ = thread.join();
        }
    }

    /// Why the copies were killed, if it was the guard's doing.
    pub fn verdict(&self) -> Option<DumpError> {
        self.shared.lock().verdict.clone().map(|v| match v {
            Verdict::Tight { group, free_bytes } => DumpError::MemoryLimit { group, free_bytes },
            Verdict::Duplicated { bytes, limit_bytes } => DumpError::Duplicated { bytes, limit_bytes },
        })
    }

    /// Bytes that only the copies hold by now.
    pub fn duplicated_bytes(&self) -> u64 {
        self.shared.duplicated_bytes()
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        // Only now: it reads many files, and nobody stands still any more.
        let limits: Vec<Limits> = self.copies.iter().map(|copy| Limits::of(*copy)).collect();
        let mut next_count = Instant::now();
        let mut state = self.lock();
        while !state.stop && state.verdict.is_none() {
            drop(state);
            let verdict = tight(&limits).or_else(|| {
                let limit_bytes = self.duplicate_limit_bytes?;
                let now = Instant::now();
                if now < next_count {
                    return None;
                }
                let bytes = self.duplicated_bytes();
                next_count = Instant::now() + now.elapsed() * COUNTING_SHARE;
                (bytes > limit_bytes).then_some(Verdict::Duplicated { bytes, limit_bytes })
            });
            state = self.lock();
            if verdict.is_some() {
                // Told before they are killed, so that whoever finds them dead knows why.
                state.verdict = verdict;
                for copy in &self.copies {
                    let _ = ckpt_sys::task::kill(*copy, libc::SIGKILL);
                }
                return;
            }
            if !state.stop {
                state = self.over.wait_timeout(state, PERIOD).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    fn duplicated_bytes(&self) -> u64 {
        self.copies.iter().map(|copy| private_dirty_bytes(*copy)).sum()
    }
}

fn tight(limits: &[Limits]) -> Option<Verdict> {
    limits.iter().filter_map(Limits::room).find_map(|room| {
        let (group, free_bytes) = (room.group, room.free_bytes);
        (free_bytes < room.reserve_bytes).then_some(Verdict::Tight { group, free_bytes })
    })
}

/// Bytes that a process maps alone and that are not clean pages of a file (/proc/pid/smaps_rollup).
fn private_dirty_bytes(host: Pid) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{host}/smaps_rollup")).unwrap_or_default();
    let kib = text.lines().find_map(|l| l.strip_prefix("Private_Dirty:")?.split_whitespace().next());
    kib.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024
}
