// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads: registers, thread-local storage, robust lists, rseq, scheduling.

ckpt_tests::guest_tests! {
    thread_registers => Guest::new("thread_registers"), needs [kinds::THREAD];
}
