// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commands as scripts and people use them: JSON, names, statuses.

use std::time::Duration;

use ckpt_tests::{
    Failure, Outcome,
    guest::{Guest, Talk, passes},
    job::{Job, RunOptions},
    process::Finished,
    proof::{each_ready_job, each_user},
    user::Users,
};

/// The status for a job, checkpoint or file that does not exist.
const NOT_FOUND: i32 = 112;
/// The status for wrong usage.
const USAGE: i32 = 2;

fn expect_code(finished: &Finished, code: i32) -> Outcome<()> {
    if finished.code == code {
        return Ok(());
    }
    Err(Failure(format!("expected status {code}:\n{}", finished.report())))
}

fn json(job: &Job<'_>, words: &[&str]) -> Outcome<serde_json::Value> {
    let finished = job.succeed(words, &[])?;
    serde_json::from_str(&finished.stdout)
        .map_err(|error| Failure(format!("no JSON: {error}\n{}", finished.report())))
}

#[test]
fn compressions() {
    each_ready_job(
        "command-compress",
        Users::Both,
        &Guest::new("mem_private_anon"),
        |sandbox, job, nonce| {
            for method in ["none", "lz4", "zstd"] {
                job.dump(&["--compress", method])?;
                job.kill()?;
                job.succeed(&["verify", &job.name], &[])?;
                job.restore(None, &[])?;
            }
            passes(sandbox, nonce)
        },
    );
}

#[test]
fn dump_stop_ends_the_job() {
    each_ready_job("command-stop", Users::Both, &Guest::new("mem_malloc"), |sandbox, job, nonce| {
        job.dump(&["--stop"])?;
        if job.init().is_some() {
            return Err(Failure::new("the job still runs after dump --stop"));
        }
        job.restore(None, &[])?;
        passes(sandbox, nonce)
    });
}

#[test]
fn older_checkpoint_by_number() {
    each_ready_job("command-numbers", Users::Both, &Guest::new("file_workers"), |sandbox, job, nonce| {
        for _ in 0..3 {
            job.dump(&[])?;
        }
        job.kill()?;
        job.restore(Some(2), &[])?;
        job.kill()?;
        job.succeed(&["rm", &format!("{}@3", job.name)], &[])?;
        expect_code(&job.ckpt(&["restore", &format!("{}@3", job.name), "--detach"], &[])?, NOT_FOUND)?;
        expect_code(&job.ckpt(&["verify", &format!("{}@3", job.name)], &[])?, NOT_FOUND)?;
        job.restore(Some(1), &[])?;
        passes(sandbox, nonce)
    });
}

#[test]
fn json_of_a_running_job_and_its_checkpoint() {
    each_ready_job("command-json", Users::Both, &Guest::new("file_workers"), |sandbox, job, nonce| {
        let jobs = json(job, &["ps", "--json"])?;
        if !jobs.to_string().contains(&format!("\"{}\"", job.name)) {
            return Err(Failure(format!("ps --json does not name the job: {jobs}")));
        }
        job.dump(&[])?;
        let checkpoints = json(job, &["list", "--json"])?;
        if !checkpoints.to_string().contains(&job.name) {
            return Err(Failure(format!("list --json does not name the checkpoint: {checkpoints}")));
        }
        let inspected = json(job, &["inspect", &job.name, "--json"])?;
        if !inspected.to_string().contains("file_workers") {
            return Err(Failure(format!("inspect --json does not name the program: {inspected}")));
        }
        let read = job.succeed(&["inspect", &job.name], &[])?;
        if !read.stdout.contains("file_workers") {
            return Err(Failure(format!("inspect does not name the program:\n{}", read.report())));
        }
        job.succeed(&["check", &job.name], &[])?;
        passes(sandbox, nonce)
    });
}

#[test]
fn statuses_of_jobs() {
    each_user("command-statuses", Users::Both, |sandbox| {
        for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)] {
            let go = sandbox.work.join("go").to_string_lossy().into_owned();
            let _ = std::fs::remove_file(&go);
            let program = format!("until [ -e '{go}' ]; do sleep 0.02; done; {script}");
            let command = ["sh".to_owned(), "-c".to_owned(), program];
            let job = Job::run(sandbox, "status", RunOptions::default(), &command)?;
            let waiter = job.start(&["wait", &job.name], &[])?;
            Talk::with(sandbox).go()?;
            expect_code(&waiter.finish(Duration::from_secs(30))?, code)?;
        }
        Ok(())
    });
}

#[test]
fn what_does_not_exist() {
    each_ready_job("command-missing", Users::Both, &Guest::new("mem_brk"), |sandbox, job, nonce| {
        for words in [
            &["dump", "nobody"][..],
            &["restore", "nobody", "--detach"],
            &["verify", "nobody"],
            &["inspect", "nobody"],
            &["check", "nobody"],
            &["kill", "nobody"],
            &["rm", "nobody"],
            &["verify", "./nowhere/"],
        ] {
            let finished = job.ckpt(words, &[])?;
            expect_code(&finished, NOT_FOUND)?;
            if !finished.stderr.contains("nobody") && !finished.stderr.contains("nowhere") {
                return Err(Failure(format!(
                    "the message does not name what is missing:\n{}",
                    finished.report()
                )));
            }
        }
        for words in [&["frobnicate"][..], &["dump"], &["dump", &job.name, "--compress", "rot13"]] {
            expect_code(&job.ckpt(words, &[])?, USAGE)?;
        }
        passes(sandbox, nonce)
    });
}

#[test]
fn signal_reaches_the_job() {
    each_user("command-kill", Users::Both, |sandbox| {
        let marker = sandbox.work.join("ready").to_string_lossy().into_owned();
        let program = format!("trap 'exit 9' USR1; : > '{marker}'; while :; do sleep 0.02; done");
        let command = ["sh".to_owned(), "-c".to_owned(), program];
        let job = Job::run(sandbox, "signalled", RunOptions::default(), &command)?;
        Talk::with(sandbox).wait_ready()?.map_err(|verdict| Failure(format!("{verdict:?}")))?;
        let waiter = job.start(&["wait", &job.name], &[])?;
        job.succeed(&["kill", &job.name, "USR1"], &[])?;
        expect_code(&waiter.finish(Duration::from_secs(30))?, 9)
    });
}
