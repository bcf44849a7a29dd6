// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pace: writes no faster than allowed, for people who share a disk, and no longer than until a signal ends the dump.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// How often a waiter looks for signals.
const LOOK: Duration = Duration::from_millis(20);

/// An average rate that is not exceeded.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: Option<NonZeroU64>,
    started: Instant,
}

impl Pace {
    /// Begins now; without a limit it never waits.
    pub fn new(bytes_per_second: Option<NonZeroU64>) -> Pace {
        Pace { bytes_per_second, started: Instant::now() }
    }

    /// Whether there is a limit.
    pub fn is_limited(&self) -> bool {
        self.bytes_per_second.is_some()
    }

    /// Waits until `bytes` in all may have been written, or a signal has been noted.
    pub fn wait(&self, bytes: u64) {
        let Some(limit) = self.bytes_per_second else { return };
        let left = || due(bytes, limit).saturating_sub(self.started.elapsed());
        while !left().is_zero() && ckpt_sys::interruption::noted().is_none() {
            std::thread::sleep(left().min(LOOK));
        }
    }
}

/// Time from the start at which `bytes` may have been written.
fn due(bytes: u64, bytes_per_second: NonZeroU64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / bytes_per_second.get() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_bytes_per_second() {
        assert_eq!(due(3 << 20, NonZeroU64::new(2 << 20).unwrap()), Duration::from_millis(1500));
    }
}
