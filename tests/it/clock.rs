// SPDX-License-Identifier: MIT OR Apache-2.0
//! CLOCK_MONOTONIC and CLOCK_BOOTTIME go on from where they were at the dump.

use std::{fs, time::Duration};

use ckpt_tests::{
    Failure,
    guest::{GUEST_DEADLINE, Guest, Talk, Verdict},
    proof::{each_user, with_ready_job},
};

ckpt_tests::guest_tests! {
    clocks => Guest::new("clocks");
    /// Dumped on a host whose clocks are far ahead of those of the host that restores.
    from_longer_uptime => Guest::new("clocks").only_root().run_under(&[
        "unshare", "--time", "--fork", "--kill-child", "--monotonic", "1000000", "--boottime", "2000000", "--",
    ]), needs [kinds::CLOCK];
}

/// The time that the job is dead is missing from both clocks.
#[test]
fn stand_still_while_dead() {
    /// How long the job is at least dead. Not a wait for anything: the passing of this time is what is tested.
    const DEAD_TIME: Duration = Duration::from_millis(1500);
    let guest = Guest::new("clocks");
    each_user("clocks-dead", guest.users, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            std::thread::sleep(DEAD_TIME);
            job.restore(None, &[])?;
            let talk = Talk::with(sandbox);
            talk.go()?;
            match talk.wait_verdict(nonce, GUEST_DEADLINE) {
                Some(Verdict::Ok) => {}
                other => return Err(Failure(format!("the guest says {other:?}"))),
            }
            let missed = fs::read_to_string(sandbox.work.join("missed"))
                .map_err(|error| Failure(format!("the guest's file missed: {error}")))?;
            for (clock, missed) in ["monotonic", "boottime"].into_iter().zip(missed.split_whitespace()) {
                let missed_ns: i128 =
                    missed.parse().map_err(|error| Failure(format!("missed {missed:?}: {error}")))?;
                if missed_ns < DEAD_TIME.as_nanos() as i128 {
                    return Err(Failure(format!(
                        "the {clock} clock ran on while the job was dead: it missed {missed_ns} ns of at least \
                         {DEAD_TIME:?}"
                    )));
                }
            }
            Ok(())
        })
    });
}
