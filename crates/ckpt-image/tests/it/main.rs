// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of the image and the store; they need no privilege, and say so where they skip something.

mod chain;
mod golden;
mod hostile;
mod round_trip;
mod scratch;
mod squash;
mod store;
