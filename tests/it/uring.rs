// SPDX-License-Identifier: MIT OR Apache-2.0
//! io_uring is refused, and what is known of it is said. One with something in flight is waited for: it may soon be closed.

use std::{fs, mem::offset_of};

use ckpt_abi::interceptor::{Control, GATE_CLOSED};
use ckpt_engine::dump::control_word::ControlWord;
use ckpt_tests::{
    Failure,
    guest::{GUEST_DEADLINE, Guest, passes},
    job::COMMAND_DEADLINE,
    process::poll_until,
    proof::{control, each_user, with_ready_job},
    user::Users,
};
use nix::unistd::Pid;

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
            passes(sandbox, nonce)
        })
    });
}

/// The request completes and the ring is closed while the barrier waits: the gate, which it closes before it looks, tells when it does.
#[test]
fn what_is_in_flight_is_waited_for() {
    each_user("uring-closes", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("uring").arg("closes"), sandbox, |job, nonce| {
            let check = job.succeed(&["check", &job.name], &[])?;
            if !check.stdout.contains("): asynchronous I/O of io_uring fd ") {
                return Err(Failure(check.report()));
            }
            let none = job.ckpt(&["dump", &job.name, "--barrier-timeout", "0"], &[])?;
            if none.code != REFUSED {
                return Err(Failure(none.report()));
            }
            let dump = job.start(&["dump", &job.name, "--barrier-timeout", "200s", "--json"], &[])?;
            let guest = job.processes().get(1).copied().ok_or_else(|| Failure::new("no guest"))?;
            let word =
                ControlWord::find(Pid::from_raw(guest.pid)).ok_or_else(|| Failure::new("no interceptor"))?;
            let closed = || word.read_u32(offset_of!(Control, gate)).is_ok_and(|gate| gate == GATE_CLOSED);
            poll_until(GUEST_DEADLINE, || closed().then_some(()))
                .ok_or_else(|| Failure::new("the barrier is never reached"))?;
            fs::write(sandbox.work.join("event"), "").map_err(|e| Failure(e.to_string()))?;
            let dumped = dump.finish(COMMAND_DEADLINE)?;
            if dumped.code != 0 {
                return Err(Failure(dumped.report()));
            }
            job.kill()?;
            job.restore(None, &[])?;
            passes(sandbox, nonce)
        })
    });
}
