// SPDX-License-Identifier: MIT OR Apache-2.0
//! AIO contexts: rings come back, and requests in flight are waited for, or named.

use std::fs;

use ckpt_tests::{
    Failure,
    guest::{GUEST_DEADLINE, Guest, passes},
    job::COMMAND_DEADLINE,
    process::poll_until,
    proof::{control, each_user, prove, prove_generations, prove_goes_on, prove_needs, with_ready_job},
    user::Users,
};

const REFUSED: i32 = 114;

/// What the guests of this module prove.
pub mod proven {
    /// Kinds whose restore can't be left out without a guest here noticing.
    pub const KINDS: &[&str] = &[ckpt_tests::kinds::AIO];
}

#[test]
fn contexts_control() {
    control(&Guest::new("aio"));
}

#[test]
fn contexts_go_on() {
    prove_goes_on(&Guest::new("aio"));
}

#[test]
fn contexts_restored() {
    prove(&Guest::new("aio"));
}

#[test]
fn contexts_through_generations() {
    prove_generations(&Guest::new("aio"), 3);
}

#[test]
fn contexts_need_their_kind() {
    prove_needs(ckpt_tests::kinds::AIO, &Guest::new("aio"));
}

/// Without the interceptor nobody knows whether requests are in flight: the dump is refused, and says so.
#[test]
fn what_was_not_counted_is_refused() {
    for guest in [Guest::new("aio"), Guest::new("aio").linked_statically()] {
        each_user("aio-uncounted", Users::Both, |sandbox| {
            with_ready_job(&guest.clone().without_interceptor(), sandbox, |job, nonce| {
                let refused = job.ckpt(&["dump", &job.name], &[])?;
                let named = refused.stderr.contains("pid 2: AIO context 0x")
                    && refused.stderr.contains("nobody knows how many of its requests are in flight");
                if refused.code != REFUSED || !named {
                    return Err(Failure(refused.report()));
                }
                passes(sandbox, nonce)
            })
        });
    }
}

#[test]
fn a_request_that_does_not_end_is_named() {
    each_user("aio-held", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("aio").arg("held"), sandbox, |job, nonce| {
            let refused = job.ckpt(&["dump", &job.name, "--barrier-timeout", "100ms"], &[])?;
            let named = refused.stderr.contains("pid 2: asynchronous I/O, 1 requests of AIO context 0x");
            if refused.code != REFUSED || !named {
                return Err(Failure(refused.report()));
            }
            let check = job.succeed(&["check", &job.name], &[])?;
            if !check.stdout.contains("pid 2 (aio): asynchronous I/O, 1 requests of AIO context 0x") {
                return Err(Failure(check.report()));
            }
            // Another one waits for it.
            let dump = job.start(&["dump", &job.name, "--barrier-timeout", "60s"], &[])?;
            let fire = sandbox.work.join("fire");
            fs::write(&fire, "").map_err(|error| Failure(format!("{}: {error}", fire.display())))?;
            poll_until(GUEST_DEADLINE, || sandbox.work.join("fired").exists().then_some(()))
                .ok_or_else(|| Failure::new("the guest does not fire"))?;
            let finished = dump.finish(COMMAND_DEADLINE)?;
            if finished.code != 0 {
                return Err(Failure(finished.report()));
            }
            job.kill()?;
            job.restore(None, &[])?;
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn requests_that_end_are_waited_for() {
    each_user("aio-busy", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("aio").arg("busy"), sandbox, |job, nonce| {
            for _ in 0..3 {
                job.dump(&["--barrier-timeout", "10s"])?;
                job.kill()?;
                // It has written on since.
                job.succeed(&["restore", &job.name, "--detach", "--files", "keep"], &[])?;
            }
            passes(sandbox, nonce)
        })
    });
}
