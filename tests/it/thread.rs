// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads: registers, thread-local storage, robust lists, rseq, scheduling, waiting for each other.

ckpt_tests::guest_tests! {
    registers => Guest::new("thread_registers"), needs [kinds::THREAD];
    attributes => Guest::new("thread_attributes"), needs [kinds::SCHEDULER];
    waits => Guest::new("thread_waits"), needs [kinds::THREAD];
    robust_list => Guest::new("robust_list"), needs [kinds::THREAD];
    rseq => Guest::new("rseq"), needs [kinds::RSEQ];
}
