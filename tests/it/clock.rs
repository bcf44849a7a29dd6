// SPDX-License-Identifier: MIT OR Apache-2.0
//! CLOCK_MONOTONIC and CLOCK_BOOTTIME go on from where they were at the dump.

use std::{fs, time::Duration};

use ckpt_tests::{
    Failure, Outcome,
    guest::{Guest, passes},
    kinds,
    proof::{SKIP_VARIABLE, each_user, with_ready_job},
    sandbox::Sandbox,
    user::Users,
};

ckpt_tests::guest_tests! {
    clocks => Guest::new("clocks");
    /// Dumped on a host whose clocks are far ahead of those of the host that restores.
    from_longer_uptime => Guest::new("clocks").only_root().run_under(&[
        "unshare", "--time", "--fork", "--kill-child", "--monotonic", "1000000", "--boottime", "2000000", "--",
    ]), needs [kinds::JOB];
}

/// How long the job is at least dead. Not a wait for anything: the passing of this time is what is tested.
const DEAD_TIME: Duration = Duration::from_millis(1500);

/// Dumps and kills the guest, restores it after [`DEAD_TIME`] with `environment`, and gives what its clocks missed, in ns:
/// monotonic, boottime.
fn missed_while_dead(sandbox: &Sandbox, environment: &[(&str, &str)]) -> Outcome<Vec<i128>> {
    let mut missed_ns = Vec::new();
    with_ready_job(&Guest::new("clocks"), sandbox, |job, nonce| {
        job.dump(&[])?;
        job.kill()?;
        std::thread::sleep(DEAD_TIME);
        job.restore(None, environment)?;
        passes(sandbox, nonce)?;
        let text = fs::read_to_string(sandbox.work.join("missed"))
            .map_err(|error| Failure(format!("the guest's file missed: {error}")))?;
        for word in text.split_whitespace() {
            missed_ns.push(word.parse().map_err(|error| Failure(format!("missed {word:?}: {error}")))?);
        }
        Ok(())
    })?;
    Ok(missed_ns)
}

fn stood_still(missed_ns: &[i128]) -> bool {
    missed_ns.len() == 2 && missed_ns.iter().all(|ns| *ns >= DEAD_TIME.as_nanos() as i128)
}

/// The time that the job is dead is missing from both clocks.
#[test]
fn stand_still_while_dead() {
    each_user("clocks-dead", Users::Both, |sandbox| {
        let missed_ns = missed_while_dead(sandbox, &[])?;
        if stood_still(&missed_ns) {
            return Ok(());
        }
        Err(Failure(format!(
            "a clock ran on while the job was dead: monotonic and boottime missed {missed_ns:?} ns of at least \
             {DEAD_TIME:?}"
        )))
    });
}

/// The clocks run on if the restore leaves the job's own record out.
#[test]
fn stand_still_while_dead_needs_its_kind() {
    each_user(
        &format!("clocks-dead-without-{}", kinds::JOB),
        Users::Both,
        |sandbox| match missed_while_dead(sandbox, &[(SKIP_VARIABLE, kinds::JOB)]) {
            Ok(missed_ns) if stood_still(&missed_ns) => Err(Failure(format!(
                "the clocks were restored by something else: they missed {missed_ns:?} ns"
            ))),
            _ => Ok(()),
        },
    );
}
