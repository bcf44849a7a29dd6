// SPDX-License-Identifier: MIT OR Apache-2.0
//! End-to-end tests: one module per area, in it one entry per guest (see `guest_tests!`).
#![forbid(unsafe_code)]

mod clock;
mod interrupted;
mod process;
mod signal;
mod thread;
