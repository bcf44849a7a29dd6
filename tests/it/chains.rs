// SPDX-License-Identifier: MIT OR Apache-2.0
//! Incremental checkpoints as the commands see them: restored, listed, checked, squashed (and killed at it), removed.
//!
//! The chain is made of a dump by hand: a full image in which half of the memory is wrong, and an incremental one with the
//! right content for that half. So a restore that takes a page from the wrong image does not work.

use std::{fs, path::Path};

use ckpt_image::{Parent, Reader, RunKind, Writer, ZeroPages, read_header, store::Store};
use ckpt_tests::{
    Failure, Outcome,
    guest::{Guest, passes},
    job::Job,
    process::Finished,
    proof::{each_user, with_ready_job},
    sandbox::Sandbox,
    user::Users,
};

/// The status for a checkpoint that others are built on.
const CONFLICT: i32 = 113;
/// The status for a checkpoint whose parent is not there.
const CORRUPT: i32 = 115;

fn failure(error: impl std::fmt::Display) -> Failure {
    Failure(error.to_string())
}

fn give(dir: &Path, sandbox: &Sandbox) -> Outcome<()> {
    sandbox.user.give(dir)?;
    for entry in fs::read_dir(dir).map_err(failure)?.flatten() {
        sandbox.user.give(&entry.path())?;
    }
    Ok(())
}

/// Makes checkpoints 2 and 3 of 1.
fn make_chain(job: &Job<'_>, sandbox: &Sandbox) -> Outcome<()> {
    let store = Store::open(&sandbox.store).map_err(failure)?;
    let source = Reader::open(&store.resolve(&job.name).map_err(failure)?).map_err(failure)?;
    let header = source.header();
    let mut base = None;
    for number in [2, 3] {
        let claim = store.claim(&job.name).map_err(failure)?;
        if claim.number() != Some(number) {
            return Err(Failure(format!("number {:?} instead of {number}", claim.number())));
        }
        let mut writer = match base {
            None => Writer::create(claim.dir(), header.cpu_features, header.compression),
            Some(base) => {
                Writer::create_incremental(claim.dir(), header.cpu_features, header.compression, base)
            }
        }
        .map_err(failure)?;
        for r in source.records() {
            writer.record(r.kind, r.version, r.owner, r.id, &r.body).map_err(failure)?;
        }
        let mut content = Vec::new();
        for (n, run) in source.objects().flat_map(|object| object.runs).enumerate() {
            let wrong_below = n % 2 == 0 && run.kind == RunKind::Data;
            if number == 3 && !wrong_below {
                writer.same(run.object, run.offset, run.bytes, run.object).map_err(failure)?;
                continue;
            }
            source.read_run(run, &mut content).map_err(failure)?;
            if wrong_below && number == 2 {
                content.iter_mut().for_each(|byte| *byte = !*byte);
            }
            writer.pages(run.object, run.offset, &content, ZeroPages::Record).map_err(failure)?;
        }
        writer.finish().map_err(failure)?;
        let path = claim.publish().map_err(failure)?;
        give(&path, sandbox)?;
        base = Some(Parent { id: read_header(&path).map_err(failure)?.id, number });
    }
    Ok(())
}

fn expect(finished: &Finished, code: i32, words: &[&str]) -> Outcome<()> {
    let said = format!("{}{}", finished.stdout, finished.stderr);
    if finished.code == code && words.iter().all(|word| said.contains(word)) {
        return Ok(());
    }
    Err(Failure(format!("expected status {code} and {words:?}:\n{}", finished.report())))
}

fn json(job: &Job<'_>, words: &[&str]) -> Outcome<serde_json::Value> {
    serde_json::from_str(&job.succeed(words, &[])?.stdout).map_err(failure)
}

#[test]
fn a_chain_by_its_commands() {
    each_user("chains", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("mem_private_anon"), sandbox, |job, nonce| {
            job.dump(&[])?;
            make_chain(job, sandbox)?;
            let [base, newest] = [2, 3].map(|n| format!("{}@{n}", job.name));
            job.kill()?;
            job.restore(Some(3), &[])?;
            job.kill()?;

            expect(&job.ckpt(&["list"], &[])?, 0, &["BUILT ON", "@2 (2 images)"])?;
            let listed = json(job, &["list", "--json"])?;
            if listed[2]["parent"] != 2 || listed[2]["images"] != 2 || !listed[1]["parent"].is_null() {
                return Err(Failure(format!("list --json does not show the chain: {listed}")));
            }
            let verified = json(job, &["verify", &newest, "--json"])?;
            if verified["images"].as_array().map(Vec::len) != Some(2) || verified["images"][0]["parent"] != 2
            {
                return Err(Failure(format!("verify --json does not show the chain: {verified}")));
            }
            expect(&job.ckpt(&["verify", &newest], &[])?, 0, &["2 images", "guest/2"])?;
            expect(&job.ckpt(&["inspect", &newest], &[])?, 0, &["guest/3", "guest/2", "in use"])?;
            expect(&job.ckpt(&["rm", &base], &[])?, CONFLICT, &[&newest, "ckpt squash"])?;

            let aside = sandbox.store.join("aside");
            let base_dir = sandbox.store.join(&job.name).join("2");
            fs::rename(&base_dir, &aside).map_err(failure)?;
            for words in [&["verify", &newest][..], &["restore", &newest, "--detach"]] {
                expect(&job.ckpt(words, &[])?, CORRUPT, &["guest/3", "guest/2", "is not there"])?;
            }
            expect(&job.ckpt(&["list"], &[])?, 0, &["@2 (missing)"])?;
            fs::rename(&aside, &base_dir).map_err(failure)?;

            // A part of it is missing.
            let pages = base_dir.join("pages");
            fs::rename(&pages, &aside).map_err(failure)?;
            for words in [&["verify", &newest][..], &["restore", &newest, "--detach"]] {
                expect(&job.ckpt(words, &[])?, CORRUPT, &["guest/3", "guest/2/pages", "needs it"])?;
            }
            fs::rename(&aside, &pages).map_err(failure)?;

            // Killed at every step, and then again, until there are no more.
            for at in 1.. {
                let at = at.to_string();
                let squashed = job.ckpt(&["squash", &newest], &[("CKPT_TEST_KILL_AT", &at)])?;
                job.succeed(&["verify", &newest], &[])?;
                if squashed.code == 0 {
                    break;
                }
                if squashed.code < 128 {
                    return Err(Failure(squashed.report()));
                }
            }
            let again = json(job, &["squash", &newest, "--json"])?;
            if again["images"] != 1 {
                return Err(Failure(format!("it is full, but: {again}")));
            }
            job.succeed(&["rm", &base], &[])?;
            expect(&job.ckpt(&["list"], &[])?, 0, &[&newest])?;
            job.restore(Some(3), &[])?;
            passes(sandbox, nonce)
        })
    });
}
