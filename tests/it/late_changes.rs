// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a job changes after it has been looked at and before it is frozen. Needs a ckpt with the feature `test-hooks`,
//! whose dump stops there and waits (CKPT_TEST_BEFORE_FREEZE).

use std::fs;

use ckpt_tests::{
    Failure, Outcome,
    guest::{GUEST_DEADLINE, Guest, Talk, Verdict},
    job::{COMMAND_DEADLINE, Job},
    process::poll_until,
    proof::{each_user, with_ready_job},
    sandbox::Sandbox,
    user::Users,
};

/// `ckpt dump`, held between *discover* and *freeze* while the guest changes.
fn dump_late(job: &Job<'_>, sandbox: &Sandbox, options: &[&str]) -> Outcome<()> {
    let held = sandbox.work.join("held");
    let words = [&["dump", job.name.as_str()], options].concat();
    let dump = job.start(&words, &[("CKPT_TEST_BEFORE_FREEZE", &held.to_string_lossy())])?;
    poll_until(COMMAND_DEADLINE, || held.exists().then_some(())).ok_or_else(|| {
        Failure::new(
            "the dump does not stop before it freezes (ckpt was built without the feature test-hooks?)",
        )
    })?;
    let change = sandbox.work.join("change");
    fs::write(&change, "").map_err(|error| Failure(format!("{}: {error}", change.display())))?;
    poll_until(GUEST_DEADLINE, || sandbox.work.join("changed").exists().then_some(()))
        .ok_or_else(|| Failure::new("the guest does not change"))?;
    fs::remove_file(&held).map_err(|error| Failure(format!("{}: {error}", held.display())))?;
    let finished = dump.finish(COMMAND_DEADLINE)?;
    if finished.code == 0 { Ok(()) } else { Err(Failure(finished.report())) }
}

fn prove(label: &str, guest: &Guest, options: &[&str]) {
    each_user(label, Users::Both, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            if options.contains(&"--incremental") {
                job.succeed(&["dump", &job.name, "--incremental"], &[])?;
            }
            dump_late(job, sandbox, options)?;
            job.kill()?;
            job.restore(None, &[])?;
            let talk = Talk::with(sandbox);
            talk.go()?;
            match talk.wait_verdict(nonce, GUEST_DEADLINE) {
                Some(Verdict::Ok) => Ok(()),
                other => Err(Failure(format!("the guest says: {other:?}"))),
            }
        })
    });
}

#[test]
fn saved_by_cow() {
    prove("late-cow", &Guest::new("late_changes"), &["--engine", "cow"]);
}

#[test]
fn saved_by_copy() {
    prove("late-copy", &Guest::new("late_changes"), &["--engine", "copy"]);
}

#[test]
fn memory_that_a_fork_would_lose_is_saved() {
    prove("late-wipe", &Guest::new("late_changes").arg("wipe"), &["--engine", "cow"]);
}

/// Pages are scanned and protected once more after a snapshot that is not used: what was written before that must not pass for
/// unwritten.
#[test]
fn saved_incrementally() {
    prove("late-incremental", &Guest::new("late_changes").arg("wipe"), &["--incremental"]);
}
