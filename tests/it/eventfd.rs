// SPDX-License-Identifier: MIT OR Apache-2.0
//! Event counters.

ckpt_tests::guest_tests! {
    eventfd => Guest::new("eventfd"), needs [kinds::EVENTFD];
}
