// SPDX-License-Identifier: MIT OR Apache-2.0
//! io_uring is refused, and what is known of it is said.

use ckpt_tests::{
    Failure,
    guest::{GUEST_DEADLINE, Guest, Talk, Verdict},
    proof::{control, each_user, with_ready_job},
    user::Users,
};

const REFUSED: i32 = 114;

#[test]
fn refused_control() {
    control(&Guest::new("uring"));
}

#[test]
fn refused_with_what_is_in_flight() {
    each_user("uring", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("uring"), sandbox, |job, nonce| {
            let refused = job.ckpt(&["dump", &job.name], &[])?;
            let words =
                ["io_uring: 6 requests submitted, 1 more than completed, 1 polls armed", "is an io_uring"];
            let named = words.iter().all(|words| refused.stderr.contains(words));
            if refused.code != REFUSED || !named {
                return Err(Failure(refused.report()));
            }
            let talk = Talk::with(sandbox);
            talk.go()?;
            match talk.wait_verdict(nonce, GUEST_DEADLINE) {
                Some(Verdict::Ok) => Ok(()),
                other => Err(Failure(format!("the guest says {other:?}"))),
            }
        })
    });
}
