// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads: registers, thread-local storage, robust lists, rseq, scheduling, waiting for each other.

ckpt_tests::guest_tests! {
    registers => Guest::new("thread_registers"), needs [kinds::THREAD];
    attributes => Guest::new("thread_attributes"), needs [kinds::SCHEDULER];
    waits => Guest::new("thread_waits"), needs [kinds::THREAD];
    robust_list => Guest::new("robust_list"), needs [kinds::THREAD];
    rseq => Guest::new("rseq"), needs [kinds::RSEQ];
}

/// A thread that executes a program takes over the id of the main thread, which may have been stopped by then. A dump may come at a moment
/// in which that can't be told apart from an end, but nothing else may fail, and the job goes on.
#[test]
fn execution_by_another_thread() {
    use ckpt_tests::{Failure, guest::Guest, guest::passes, proof::each_ready_job, user::Users};
    let guest = Guest::new("thread_exec").in_motion();
    each_ready_job("thread-exec", Users::Both, &guest, |sandbox, job, nonce| {
        let mut made = 0;
        for _ in 0..30 {
            let dumped = job.ckpt(&["dump", &job.name], &[])?;
            let is_passing =
                ["can't be traced", "main thread has ended", "the job ended", "executes a program"]
                    .iter()
                    .any(|words| dumped.stderr.contains(words));
            if dumped.code == 0 {
                made += 1;
            } else if !is_passing {
                return Err(Failure(dumped.report()));
            }
        }
        if made == 0 {
            return Err(Failure::new("no dump was made"));
        }
        job.kill()?;
        job.restore(None, &[])?;
        passes(sandbox, nonce)
    });
}
