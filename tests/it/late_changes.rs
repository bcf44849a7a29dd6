// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a job changes after it has been looked at and before it is frozen. Needs a ckpt with the feature `test-hooks`,
//! whose dump stops there and waits (CKPT_TEST_BEFORE_FREEZE).

use std::{fs, time::Duration};

use ckpt_tests::{
    Failure, Outcome, announce,
    guest::{GUEST_DEADLINE, Guest, Talk, Verdict, passes},
    job::{COMMAND_DEADLINE, Job},
    process::{Finished, poll_until},
    proof::each_ready_job,
    sandbox::Sandbox,
    user::Users,
};

/// Where a dump is held: before it freezes the job, or before it copies what was written.
const BEFORE_FREEZE: &str = "CKPT_TEST_BEFORE_FREEZE";
const BEFORE_COPY: &str = "CKPT_TEST_BEFORE_COPY";

/// `ckpt dump`, held between *discover* and *freeze* while the guest changes.
fn dump_late(job: &Job<'_>, sandbox: &Sandbox, options: &[&str], more: &[(&str, &str)]) -> Outcome<Finished> {
    dump_held(BEFORE_FREEZE, job, sandbox, options, more)
}

fn dump_held(
    place: &str,
    job: &Job<'_>,
    sandbox: &Sandbox,
    options: &[&str],
    more: &[(&str, &str)],
) -> Outcome<Finished> {
    let held = sandbox.work.join("held");
    let words = [&["dump", job.name.as_str()], options].concat();
    let held_at = held.to_string_lossy();
    let mut environment = vec![(place, held_at.as_ref())];
    environment.extend(more);
    let dump = job.start(&words, &environment)?;
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
    if finished.code == 0 { Ok(finished) } else { Err(Failure(finished.report())) }
}

fn prove(label: &str, guest: &Guest, options: &[&str]) {
    each_ready_job(label, Users::Both, guest, |sandbox, job, nonce| {
        if options.contains(&"--incremental") {
            job.succeed(&["dump", &job.name, "--incremental"], &[])?;
        }
        dump_late(job, sandbox, options, &[])?;
        job.kill()?;
        job.restore(None, &[])?;
        passes(sandbox, nonce)
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

/// Flags of large mappings are read without a look at all of their pages, and yet are those of the moment; and the mappings stay in one
/// piece. With CKPT_TEST_FLAGS_OF_PARTS the dump fails where it would have to look at all.
#[test]
fn flags_of_large_mappings_are_those_of_the_moment() {
    const IN_PARTS: &[(&str, &str)] = &[("CKPT_TEST_FLAGS_OF_PARTS", "1")];
    let guest = Guest::new("late_changes").arg("large");
    each_ready_job("late-flags", Users::Both, &guest, |sandbox, job, nonce| {
        let words = ["dump", job.name.as_str(), "--incremental"];
        let about = |file: &str| {
            let main = job.processes().get(1).map_or(0, |p| p.pid);
            fs::read_to_string(format!("/proc/{main}/{file}"))
                .map_err(|error| Failure(format!("{file} of the guest: {error}")))
        };
        job.succeed(&words, &[])?;
        if !about("smaps")?.contains(" uw ") {
            announce("skipped: late-flags: nothing is watched by userfaultfd here");
            return Ok(());
        }
        // What the first one made of the mappings stays.
        let before = about("maps")?;
        job.succeed(&words, IN_PARTS)?;
        if about("maps")? != before {
            return Err(Failure(format!("mappings were\n{before}and are\n{}", about("maps")?)));
        }
        dump_late(job, sandbox, &words[2..], IN_PARTS)?;
        job.kill()?;
        job.restore(None, &[])?;
        passes(sandbox, nonce)
    });
}

/// Shared memory is copied before the freeze. What anybody writes to it after that must be in the checkpoint.
fn prove_shared(label: &str, options: &[&str]) {
    prove(label, &Guest::new("shared_late"), options);
}

#[test]
fn shared_memory_is_that_of_the_moment_by_cow() {
    prove_shared("late-shared-cow", &["--engine", "cow"]);
}

#[test]
fn shared_memory_is_that_of_the_moment_by_copy() {
    prove_shared("late-shared-copy", &["--engine", "copy"]);
}

#[test]
fn shared_memory_is_that_of_the_moment_incrementally() {
    prove_shared("late-shared-incremental", &["--incremental"]);
}

/// With CKPT_TEST_IGNORE_WRITES what differs passes for equal, which the guest must notice.
#[test]
fn a_guest_notices_a_comparison_that_is_ignored() {
    each_ready_job("late-shared-control", Users::Both, &Guest::new("shared_late"), |sandbox, job, nonce| {
        dump_late(job, sandbox, &[], &[("CKPT_TEST_IGNORE_WRITES", "1")])?;
        job.kill()?;
        notices(job, sandbox, nonce, "pages that had changed were not copied")
    });
}

/// A guest with wrong memory that says nothing for so long hangs.
const HANGS: Duration = Duration::from_secs(8);

/// Restores the job: it must not be well.
fn notices(job: &Job<'_>, sandbox: &Sandbox, nonce: &str, what: &str) -> Outcome<()> {
    // Its own memory may be wrong, too.
    if job.restore(None, &[]).is_err() {
        return Ok(());
    }
    let talk = Talk::with(sandbox);
    talk.go()?;
    match talk.wait_verdict(nonce, HANGS) {
        Some(Verdict::Ok) => Err(Failure(format!("the guest says OK although {what}"))),
        _ => Ok(()),
    }
}

/// An incremental dump of `written_late`, held there, and what it says.
fn dump_written(
    place: &str,
    job: &Job<'_>,
    sandbox: &Sandbox,
    more: &[(&str, &str)],
) -> Outcome<serde_json::Value> {
    let options = ["--incremental", "--engine", "cow"];
    job.succeed(&[&["dump", job.name.as_str()], &options[..]].concat(), &[])?;
    fs::write(sandbox.work.join("step1"), "").map_err(|error| Failure(format!("step1: {error}")))?;
    poll_until(GUEST_DEADLINE, || sandbox.work.join("done1").exists().then_some(()))
        .ok_or_else(|| Failure::new("the guest does not do its step"))?;
    let dumped = dump_held(place, job, sandbox, &[&options[..], &["--json"]].concat(), more)?;
    let said: serde_json::Value = serde_json::from_str(&dumped.stdout)
        .map_err(|error| Failure(format!("no JSON: {error}\n{}", dumped.report())))?;
    let bytes = |field: &str| said[field].as_u64().unwrap_or(0);
    if said["writes_from"] != serde_json::json!(["userfaultfd"]) {
        announce("skipped: late-written: nothing is watched by userfaultfd here");
    } else if bytes("early_bytes") < 4 << 20 {
        return Err(Failure(format!("little was copied before the freeze: {said}")));
    } else if bytes("held_bytes") < 1 << 20 && more.is_empty() {
        return Err(Failure(format!("little was copied in the freeze: {said}")));
    }
    Ok(said)
}

fn prove_written(label: &str, place: &str) {
    each_ready_job(label, Users::Both, &Guest::new("written_late"), |sandbox, job, nonce| {
        dump_written(place, job, sandbox, &[])?;
        job.kill()?;
        job.restore(None, &[])?;
        passes(sandbox, nonce)
    });
}

/// What was written is copied before the freeze. What is written to it, or done with its mapping, after that must be in the checkpoint.
#[test]
fn written_memory_is_that_of_the_moment() {
    prove_written("late-written", BEFORE_FREEZE);
}

/// Mappings are not what they were when the job was looked at: some of what is protected can't be told then.
#[test]
fn written_memory_of_other_mappings_is_that_of_the_moment() {
    prove_written("late-mappings", BEFORE_COPY);
}

/// With CKPT_TEST_IGNORE_WRITES what was written once more passes for what was copied, which the guest must notice.
#[test]
fn a_guest_notices_copies_that_are_too_old() {
    let guest = Guest::new("written_late");
    each_ready_job("late-written-control", Users::Both, &guest, |sandbox, job, nonce| {
        if dump_written(BEFORE_FREEZE, job, sandbox, &[("CKPT_TEST_IGNORE_WRITES", "1")])?["parent"].is_null()
        {
            return Ok(());
        }
        job.kill()?;
        notices(job, sandbox, nonce, "pages that had been written once more were not copied")
    });
}
