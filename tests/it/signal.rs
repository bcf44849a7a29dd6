// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signals: actions, masks, pending ones, timers, interrupted system calls, stopped jobs.

ckpt_tests::guest_tests! {
    signal_actions => Guest::new("signal_actions"), needs [kinds::SIGNAL];
}
