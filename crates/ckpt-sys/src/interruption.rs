// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signals that would end ckpt are noted, so that what was begun can be undone first.
//!
//! A thread waits for them; all others have them blocked. The first one is noted, the next ends ckpt as if nothing had been noted.
//! Signals that are ignored stay so (nohup(1), `&` in a script).

use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::signal::{SigSet, Signal};

/// The signal that was noted; 0 if none was.
static NOTED: AtomicI32 = AtomicI32::new(0);

/// From now on signals are noted. Call it while there is one thread: others would still be ended by them.
pub fn note() {
    let ending = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];
    let set: SigSet = ending.into_iter().filter(|signal| !is_ignored(*signal)).collect();
    if set.thread_block().is_err() {
        return;
    }
    let waiting = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Ok(signal) = set.wait() {
            NOTED.store(signal as i32, Ordering::Relaxed);
        }
        // Here the next one finds somebody to end.
        let _ = set.thread_unblock();
        loop {
            std::thread::park();
        }
    });
    if waiting.is_err() {
        let _ = set.thread_unblock();
    }
}

/// The signal that was noted, if one was.
pub fn noted() -> Option<Signal> {
    Signal::try_from(NOTED.load(Ordering::Relaxed)).ok()
}

fn is_ignored(signal: Signal) -> bool {
    // SAFETY: sigaction is plain old data; zeroed is a valid value.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action, sigaction(2) only writes the present one to `now`.
    let asked = unsafe { libc::sigaction(signal as i32, std::ptr::null(), &raw mut now) };
    asked == 0 && now.sa_sigaction == libc::SIG_IGN
}
