// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pipes and FIFOs.

ckpt_tests::guest_tests! {
    data => Guest::new("pipe_data"), needs [kinds::PIPE];
    ends => Guest::new("pipe_ends"), needs [kinds::PIPE];
    blocked_write => Guest::new("pipe_blocked_write"), needs [kinds::PIPE];
    fifo => Guest::new("fifo"), needs [kinds::FIFO];
}
