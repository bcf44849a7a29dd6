// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signals: actions, masks, pending ones, timers, stopped jobs.

ckpt_tests::guest_tests! {
    actions => Guest::new("signal_actions"), needs [kinds::SIGNAL];
    pending => Guest::new("pending_signals"), needs [kinds::PENDING_SIGNAL];
    interval_timers => Guest::new("interval_timers").in_motion(), needs [kinds::TIMER];
    posix_timers => Guest::new("posix_timers").in_motion(), needs [kinds::TIMER];
    stopped_and_reported => Guest::new("stopped").arg("reported"), needs [kinds::SIGNAL];
    stopped_unreported => Guest::new("stopped").arg("unreported"), needs [kinds::SIGNAL];
}
