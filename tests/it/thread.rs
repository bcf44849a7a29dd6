// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads: registers, thread-local storage, robust lists, rseq, scheduling, waiting for each other.

ckpt_tests::guest_tests! {
    registers => Guest::new("thread_registers"), needs [kinds::THREAD];
    attributes => Guest::new("thread_attributes"), needs [kinds::SCHEDULER];
    waits => Guest::new("thread_waits"), needs [kinds::THREAD];
    robust_list => Guest::new("robust_list"), needs [kinds::THREAD];
    rseq => Guest::new("rseq"), needs [kinds::RSEQ];
}

/// A thread that executes a program takes over the id of the main thread, which may have been stopped by then. A dump that comes in the middle
/// of that may be refused, but it must not take one for the other, and the job goes on.
#[test]
fn execution_by_another_thread() {
    use ckpt_tests::{Failure, guest::GUEST_DEADLINE, guest::Guest, guest::passes};
    use ckpt_tests::{process::poll_until, proof::each_ready_job, user::Users};
    let guest = Guest::new("thread_exec").in_motion();
    each_ready_job("thread-exec", Users::Both, &guest, |sandbox, job, nonce| {
        for _ in 0..30 {
            let dumped = job.ckpt(&["dump", &job.name], &[])?;
            if ["No such process", "not implemented"].iter().any(|words| dumped.stderr.contains(words)) {
                return Err(Failure(dumped.report()));
            }
        }
        let made = || job.ckpt(&["dump", &job.name], &[]).ok().filter(|dumped| dumped.code == 0);
        poll_until(GUEST_DEADLINE, made).ok_or_else(|| Failure::new("no dump is made"))?;
        job.kill()?;
        job.restore(None, &[])?;
        passes(sandbox, nonce)
    });
}
