// SPDX-License-Identifier: MIT OR Apache-2.0
//! How long each phase of a dump took.

use std::time::{Duration, Instant};

/// Durations in order. A name that comes twice is counted together.
#[derive(Debug, Clone)]
pub struct Phases {
    since: Instant,
    /// Names and durations.
    pub all: Vec<(&'static str, Duration)>,
}

impl Default for Phases {
    fn default() -> Phases {
        // Nothing is allocated while the job is frozen.
        Phases { since: Instant::now(), all: Vec::with_capacity(16) }
    }
}

impl Phases {
    /// The phase that ends now.
    pub fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        let took = now - std::mem::replace(&mut self.since, now);
        match self.all.iter_mut().find(|(n, _)| *n == name) {
            Some((_, sum)) => *sum += took,
            None => self.all.push((name, took)),
        }
    }
}
