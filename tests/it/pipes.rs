// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pipes and FIFOs.

ckpt_tests::guest_tests! {
    data => Guest::new("pipe_data"), needs [kinds::PIPE];
    ends => Guest::new("pipe_ends"), needs [kinds::PIPE];
    blocked_write => Guest::new("pipe_blocked_write").beyond_limit(
        "a blocked write that is larger than the pipe may return short after a dump",
    );
    fifo => Guest::new("fifo"), needs [kinds::FIFO];
}
