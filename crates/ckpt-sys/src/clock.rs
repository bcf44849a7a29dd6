// SPDX-License-Identifier: MIT OR Apache-2.0
//! Clocks, in nanoseconds.

use nix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC of this process's time namespace.
pub fn monotonic_ns() -> i64 {
    read(ClockId::CLOCK_MONOTONIC)
}

/// CLOCK_BOOTTIME of this process's time namespace.
pub fn boottime_ns() -> i64 {
    read(ClockId::CLOCK_BOOTTIME)
}

fn read(id: ClockId) -> i64 {
    // clock_gettime fails only for unknown clocks.
    clock_gettime(id).map(|t| t.tv_sec() * 1_000_000_000 + t.tv_nsec()).unwrap_or(0)
}
