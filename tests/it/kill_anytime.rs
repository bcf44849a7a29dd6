// SPDX-License-Identifier: MIT OR Apache-2.0
//! SIGKILL on the dumper and on the restoring ckpt at any of its steps. Needs a ckpt with the feature `test-hooks`: there
//! CKPT_TEST_COUNT=FILE writes the number of steps, CKPT_TEST_KILL_AT=N ends the process at the N-th.
//! CKPT_TEST_MOMENTS is the number of moments of each (200).
#![forbid(unsafe_code)]

use std::{fs, path::Path, time::Duration};

use ckpt_tests::{
    Failure, Outcome, announce,
    fingerprint::Fingerprint,
    guest::{Guest, Talk, passes},
    job::Job,
    process::poll_until,
    proof::{each_user, left_nothing_behind, with_ready_job},
    sandbox::Sandbox,
    seed::{Random, count_from},
    user::Users,
};

/// How long what a killed command leaves may take to go.
const TRACE_DEADLINE: Duration = Duration::from_secs(10);

/// How often each is killed.
fn moments() -> u64 {
    count_from("CKPT_TEST_MOMENTS", 200)
}

/// Pids whose environment names this sandbox: all that ckpt and its jobs started there.
fn processes_of(sandbox: &Sandbox) -> Vec<i32> {
    let needle = sandbox.root.as_os_str().as_encoded_bytes().to_vec();
    let mut pids: Vec<i32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.windows(needle.len()).any(|window| window == needle)
        })
        .collect();
    pids.sort_unstable();
    pids
}

/// Runs `words` to its end once, counting its steps.
fn count_steps(job: &Job<'_>, sandbox: &Sandbox, words: &[&str]) -> Outcome<u64> {
    let file = sandbox.work.join("steps");
    let _ = fs::remove_file(&file);
    job.succeed(words, &[("CKPT_TEST_COUNT", &file.to_string_lossy())])?;
    let text = fs::read_to_string(&file).map_err(|error| {
        Failure(format!("ckpt counted no steps ({error}): it was built without the feature test-hooks"))
    })?;
    let steps = text.trim().parse().map_err(|error| Failure(format!("steps {text:?}: {error}")))?;
    if steps < 10 {
        Err(Failure(format!("only {steps} steps: too few places to be killed at")))
    } else {
        Ok(steps)
    }
}

/// No checkpoint of `job` up to `last` is half: each is whole or not there at all. Gives the number of whole ones.
fn whole_checkpoints(job: &Job<'_>, last: u64) -> Outcome<u64> {
    let mut whole = 0;
    for number in 1..=last {
        let verified = job.ckpt(&["verify", &format!("{}@{number}", job.name)], &[])?;
        match verified.code {
            0 => whole += 1,
            112 => {}
            _ => return Err(Failure(format!("a half checkpoint is to be seen:\n{}", verified.report()))),
        }
    }
    Ok(whole)
}

/// The guest's threads have gone on since the call: every one of its processes used the CPU or its verdict stands.
fn still_works(sandbox: &Sandbox) -> Outcome<()> {
    match Talk::with(sandbox).verdict(None) {
        None => Ok(()),
        Some(verdict) => Err(Failure(format!("the guest ended: {verdict:?}"))),
    }
}

#[test]
fn dump_killed_at_any_step() {
    dump_killed("kill-dump", &Guest::new("file_workers"), Users::Both, u64::MAX);
}

#[test]
fn dump_of_undumpable_killed_at_any_step() {
    // Only a plain user's dumper has to make them dumpable for the time being.
    let guest = Guest::new("file_workers").arg("undumpable");
    dump_killed("kill-undumpable", &guest, Users::OnlyPlain, 60);
}

#[test]
fn dump_of_a_job_with_hooks_killed_at_any_step() {
    // The guest looks whether each on_dump is followed by one on_resume or on_restore.
    dump_killed("kill-hooks", &Guest::new("hooks").arg("callbacks"), Users::Both, 40);
}

fn dump_killed(label: &str, guest: &Guest, users: Users, most: u64) {
    each_user(label, users, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            let mut random = Random::announced(&format!("{label} as {}", sandbox.user.name()));
            let init = job.init().ok_or_else(|| Failure::new("the job does not run"))?;
            let steps = count_steps(job, sandbox, &["dump", &job.name])?;
            let before = Fingerprint::take(init);
            let population = processes_of(sandbox);
            let moments = moments().min(most);
            announce(&format!("{label} as {}: {moments} of {steps} steps", sandbox.user.name()));
            for moment in 0..moments {
                let at = 1 + random.below(steps);
                let context = |failure: Failure| {
                    Failure(format!("dump {moment}, killed at step {at} of {steps}: {failure}"))
                };
                let killed = job.ckpt(&["dump", &job.name], &[("CKPT_TEST_KILL_AT", &at.to_string())])?;
                if killed.code == 0 {
                    // The step of this dump may come after the checkpoint is complete.
                    announce(&format!("{label}: step {at} ended a dump that was done"));
                }
                still_works(sandbox).map_err(context)?;
                left_nothing_behind(&before, init).map_err(context)?;
                poll_until(TRACE_DEADLINE, || (processes_of(sandbox) == population).then_some(()))
                    .ok_or_else(|| {
                        context(Failure(format!(
                            "processes: {population:?} before, {:?} after",
                            processes_of(sandbox)
                        )))
                    })?;
                job.dump(&[]).map_err(context)?;
                still_works(sandbox).map_err(context)?;
            }
            let whole = whole_checkpoints(job, 2 * moments + 2)?;
            if whole < moments + 1 {
                return Err(Failure(format!(
                    "{whole} checkpoints after {moments} dumps between the kills and one before"
                )));
            }
            job.kill()?;
            job.restore(None, &[])?;
            passes(sandbox, nonce)
        })
    });
}

/// Every file below `dir` with its length and modification time, but for the notes of how often a checkpoint was restored.
fn inventory(dir: &Path) -> Vec<(String, u64, Option<std::time::SystemTime>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            all.extend(inventory(&entry.path()));
        } else if entry.file_name() != ckpt_image::store::RESTORED_FILE {
            all.push((entry.path().to_string_lossy().into_owned(), metadata.len(), metadata.modified().ok()));
        }
    }
    all.sort();
    all
}

#[test]
fn restore_killed_at_any_step() {
    each_user("kill-restore", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("file_workers"), sandbox, |job, nonce| {
            let mut random = Random::announced(&format!("kill-restore as {}", sandbox.user.name()));
            job.dump(&[])?;
            job.kill()?;
            let words = ["restore", job.name.as_str(), "--detach"];
            let steps = count_steps(job, sandbox, &words)?;
            job.kill()?;
            let image = inventory(&sandbox.store);
            let moments = moments();
            announce(&format!("kill-restore as {}: {moments} of {steps} steps", sandbox.user.name()));
            for moment in 0..moments {
                let at = 1 + random.below(steps);
                let context = |failure: Failure| {
                    Failure(format!("restore {moment}, killed at step {at} of {steps}: {failure}"))
                };
                let killed = job.ckpt(&words, &[("CKPT_TEST_KILL_AT", &at.to_string())])?;
                if killed.code == 0 {
                    announce(&format!("kill-restore: step {at} ended a restore that was done"));
                    job.kill().map_err(context)?;
                }
                poll_until(TRACE_DEADLINE, || processes_of(sandbox).is_empty().then_some(())).ok_or_else(
                    || context(Failure(format!("processes are left: {:?}", processes_of(sandbox)))),
                )?;
                if job.init().is_some() {
                    return Err(context(Failure::new("a registry entry is left")));
                }
                if inventory(&sandbox.store) != image {
                    return Err(context(Failure::new("the store was changed")));
                }
                job.succeed(&["verify", &job.name], &[]).map_err(context)?;
                job.restore(None, &[]).map_err(context)?;
                still_works(sandbox).map_err(context)?;
                if moment + 1 < moments {
                    job.kill().map_err(context)?;
                }
            }
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn command_line_killed_during_a_dump() {
    // Whoever waits for the dump may die: the job doesn't care, and can be dumped again.
    each_user("kill-cli", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("file_workers"), sandbox, |job, nonce| {
            for _ in 0..10 {
                let dump = job.start(&["dump", &job.name], &[])?;
                drop(dump);
                still_works(sandbox)?;
            }
            // A dump that outlived its command may still be under way: the next is told so, or waits.
            poll_until(Duration::from_secs(60), || job.dump(&[]).ok())
                .ok_or_else(|| Failure::new("the job can no longer be dumped"))?;
            passes(sandbox, nonce)
        })
    });
}
