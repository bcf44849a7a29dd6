// SPDX-License-Identifier: MIT OR Apache-2.0
//! `dump --incremental`: a chain is the same as a full checkpoint, page by page, whatever the job did in between; a guest restored from it
//! finds its memory as it was; and nothing that goes wrong on the way makes a page look unwritten that is not.
//!
//! CKPT_TEST_STEPS is the number of steps of each guest (8), CKPT_TEST_MOMENTS that of the kills (at most 12 here).

mod soft_dirty;

use std::{collections::BTreeMap, fs, path::Path};

use ckpt_image::Reader;
use ckpt_tests::{
    Failure, Outcome, announce,
    fingerprint::Fingerprint,
    guest::{GUEST_DEADLINE, Guest, passes},
    job::{COMMAND_DEADLINE, Job},
    pages::{difference, pages_of},
    process::poll_until,
    proof::{each_ready_job, each_user, left_nothing_behind, with_ready_job},
    sandbox::Sandbox,
    seed::{Random, count_from},
    stage::stage,
    user::Users,
};
use nix::sys::signal::Signal;

/// A build with the feature `test-hooks` takes written pages for unwritten with this.
const IGNORE_WRITES: &str = "CKPT_TEST_IGNORE_WRITES";

fn steps() -> u64 {
    count_from("CKPT_TEST_STEPS", 8)
}

fn guest(random: &mut Random, mode: &str) -> Guest {
    without_rseq(Guest::new("mem_changes").arg(&(random.number() >> 1).to_string()).arg(mode))
}

/// Into a registered rseq area the kernel writes on which processor a thread came back from a stop.
fn without_rseq(guest: Guest) -> Guest {
    guest.run_under(&["env", "GLIBC_TUNABLES=glibc.pthread.rseq=0"])
}

/// A job of the guest in that mode, whose changes depend on the random numbers.
fn with_changes(label: &str, how: &str, flow: impl Fn(&Sandbox, &Job<'_>, &str, &mut Random) -> Outcome<()>) {
    each_user(label, Users::Both, |sandbox| {
        let mut random = Random::announced(&format!("{label} as {}", sandbox.user.name()));
        with_ready_job(&guest(&mut random, how), sandbox, |job, nonce| flow(sandbox, job, nonce, &mut random))
    });
}

/// Lets the guest do its next step.
fn step(sandbox: &Sandbox, number: u64) -> Outcome<()> {
    let file = |name: String| sandbox.work.join(name);
    fs::write(file(format!("step{number}")), "").map_err(|e| Failure(format!("step {number}: {e}")))?;
    let done = file(format!("done{number}"));
    poll_until(GUEST_DEADLINE, || done.exists().then_some(()))
        .ok_or_else(|| Failure(format!("the guest does not finish step {number}")))
}

/// The kernel module is loaded: in `scripts/vm --product`.
fn has_module() -> bool {
    Path::new("/dev/ckpt").exists()
}

/// `ckpt dump --incremental --json`, followed by `options`. Where the kernel module is, by it and nothing else, unless they name an engine.
fn dump(job: &Job<'_>, options: &[&str]) -> Outcome<serde_json::Value> {
    let by_module = has_module() && !options.contains(&"--engine");
    let engine: &[&str] = if by_module { &["--engine", "kmod"] } else { &[] };
    let words = [&["dump", &job.name, "--incremental", "--json"], engine, options].concat();
    let dumped = job.succeed(&words, &[])?;
    let said: serde_json::Value = serde_json::from_str(&dumped.stdout)
        .map_err(|e| Failure(format!("no JSON: {e}\n{}", dumped.report())))?;
    let tells = serde_json::json!(["kmod"]);
    if by_module
        && (said["engine"] != "kmod"
            || said["writes_from"] != tells
            || said["notes"] != serde_json::json!([]))
    {
        return Err(Failure(format!("not by the module alone: {said}")));
    }
    Ok(said)
}

fn parent(said: &serde_json::Value) -> Option<&str> {
    said.get("parent").and_then(serde_json::Value::as_str)
}

fn count(said: &serde_json::Value, field: &str) -> u64 {
    said.get(field).and_then(serde_json::Value::as_u64).unwrap_or(u64::MAX)
}

/// Runs `what` while all processes of the job stand still.
fn standing_still<T>(job: &Job<'_>, what: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    let processes = job.processes();
    let guests = processes.get(1..).unwrap_or_default();
    guests.iter().for_each(|p| p.signal(Signal::SIGSTOP));
    poll_until(GUEST_DEADLINE, || guests.iter().all(|p| p.is_stopped()).then_some(()))
        .ok_or_else(|| Failure::new("the guest does not stop"))?;
    let result = what();
    guests.iter().for_each(|p| p.signal(Signal::SIGCONT));
    result
}

/// Dumps incrementally and fully at one moment, and compares the two.
fn dump_and_compare(job: &Job<'_>, sandbox: &Sandbox, options: &[&str]) -> Outcome<serde_json::Value> {
    standing_still(job, || {
        let said = dump(job, options)?;
        let path = said.get("path").and_then(serde_json::Value::as_str).unwrap_or_default();
        let full = sandbox.root.join("full");
        let _ = fs::remove_dir_all(&full);
        // By an engine that shares nothing with the one that is compared.
        let (dir, engine) = (format!("{}/", full.display()), if has_module() { "copy" } else { "auto" });
        job.succeed(&["dump", &job.name, "--engine", engine, "--dir", &dir], &[])?;
        let (chain, full) = (pages_of(path.as_ref())?, pages_of(&full)?);
        let keys: BTreeMap<_, ()> = chain.keys().chain(full.keys()).map(|k| (*k, ())).collect();
        let wrong: Vec<String> = keys
            .into_keys()
            .filter(|key| chain.get(key) != full.get(key))
            .map(|key| difference(key, ("chain", chain.get(&key)), ("full", full.get(&key))))
            .collect();
        if full.len() < 1000 || !wrong.is_empty() {
            return Err(Failure(format!(
                "{} of {} pages differ between the chain and a full checkpoint ({said}):\n{}",
                wrong.len(),
                full.len(),
                wrong[..wrong.len().min(20)].join("\n")
            )));
        }
        Ok(said)
    })
}

/// A restore of a job that stood still when it was dumped: it still does.
fn restore(job: &Job<'_>) -> Outcome<()> {
    job.restore(None, &[])?;
    job.processes().iter().skip(1).for_each(|p| p.signal(Signal::SIGCONT));
    Ok(())
}

#[test]
fn a_chain_equals_a_full_checkpoint() {
    with_changes("incremental-chain", "steps", |sandbox, job, nonce, _| {
        let first = dump_and_compare(job, sandbox, &[])?;
        if parent(&first).is_some() {
            return Err(Failure(format!("the first one has a parent: {first}")));
        }
        let mut same = 0;
        for number in 1..=steps() {
            step(sandbox, number)?;
            let said = dump_and_compare(job, sandbox, &[])?;
            let expected = format!("{}@{number}", job.name);
            if parent(&said) != Some(&expected) {
                return Err(Failure(format!("step {number} is not built on {expected}: {said}")));
            }
            same += count(&said, "same_pages");
        }
        // How many they are depends on the random numbers; without tracking there would be none.
        if same < 100 * steps() {
            return Err(Failure(format!("only {same} pages were the same in all")));
        }
        job.succeed(&["verify", &job.name], &[])?;
        job.kill()?;
        restore(job)?;
        // What the old job's tracking knew is worth nothing for the new one.
        let said = dump_and_compare(job, sandbox, &[])?;
        if parent(&said).is_some() || said.get("full_because").is_none_or(|why| !why.is_string()) {
            return Err(Failure(format!("the first one after a restore is not a full one: {said}")));
        }
        step(sandbox, steps() + 1)?;
        let said = dump_and_compare(job, sandbox, &[])?;
        if parent(&said).is_none() {
            return Err(Failure(format!("the second one after a restore is a full one: {said}")));
        }
        job.kill()?;
        restore(job)?;
        passes(sandbox, nonce)
    });
}

#[test]
fn a_guest_in_motion_is_restored_from_a_chain() {
    with_changes("incremental-motion", "free", |sandbox, job, nonce, _| {
        for _ in 0..steps() {
            dump(job, &[])?;
        }
        let said = dump(job, &["--stop"])?;
        if parent(&said).is_none() {
            return Err(Failure(format!("the last one is a full one: {said}")));
        }
        restore(job)?;
        passes(sandbox, nonce)
    });
}

#[test]
fn a_guest_notices_a_scan_that_is_ignored() {
    with_changes("incremental-control", "steps", |sandbox, job, nonce, _| {
        dump(job, &[])?;
        for number in 1..=2 {
            step(sandbox, number)?;
            job.succeed(&["dump", &job.name, "--incremental"], &[(IGNORE_WRITES, "1")])?;
        }
        job.kill()?;
        if job.restore(None, &[]).is_err() {
            return Ok(());
        }
        match passes(sandbox, nonce) {
            Err(_) => Ok(()),
            Ok(()) => Err(Failure::new(
                "the guest says OK although written pages were taken for unwritten (or ckpt was built without the \
                 feature test-hooks)",
            )),
        }
    });
}

#[test]
fn killed_at_any_step() {
    with_changes("incremental-kill", "steps", |sandbox, job, nonce, random| {
        let counter = sandbox.work.join("steps");
        dump(job, &[])?;
        let words = ["dump", job.name.as_str(), "--incremental"];
        job.succeed(&words, &[("CKPT_TEST_COUNT", &counter.to_string_lossy())])?;
        let text = fs::read_to_string(&counter)
            .map_err(|e| Failure(format!("no steps ({e}): built without the feature test-hooks?")))?;
        let all: u64 = text.trim().parse().map_err(|e| Failure(format!("steps {text:?}: {e}")))?;
        let moments = count_from("CKPT_TEST_MOMENTS", 12).min(12);
        announce(&format!("incremental-kill as {}: {moments} of {all} steps", sandbox.user.name()));
        for moment in 1..=moments {
            step(sandbox, moment)?;
            // Every other one is killed near its end, where the image is complete and not yet known to init.
            let at = if moment % 2 == 0 { all - random.below(all.min(6)) } else { 1 + random.below(all) };
            let context = |f: Failure| Failure(format!("dump {moment}, killed at step {at} of {all}: {f}"));
            job.ckpt(&words, &[("CKPT_TEST_KILL_AT", &at.to_string())])?;
            dump_and_compare(job, sandbox, &[]).map_err(context)?;
            let said = dump_and_compare(job, sandbox, &[]).map_err(context)?;
            if parent(&said).is_none() {
                return Err(context(Failure(format!("tracking does not begin again: {said}"))));
            }
        }
        job.kill()?;
        restore(job)?;
        passes(sandbox, nonce)
    });
}

#[test]
fn doubtful_tracking_makes_a_full_checkpoint() {
    with_changes("incremental-doubt", "steps", |sandbox, job, nonce, _| {
        let full = |options: &[&str], words: &str| {
            let said = dump_and_compare(job, sandbox, options)?;
            let why = said.get("full_because").and_then(serde_json::Value::as_str).unwrap_or_default();
            match parent(&said) {
                None if why.contains(words) => Ok(()),
                _ => Err(Failure(format!("not a full one because of {words:?}: {said}"))),
            }
        };
        let built_on = |number: u64| {
            let said = dump_and_compare(job, sandbox, &[])?;
            let expected = format!("{}@{number}", job.name);
            if parent(&said) == Some(&expected) {
                Ok(())
            } else {
                Err(Failure(format!("not built on {expected}: {said}")))
            }
        };
        full(&[], "first incremental dump")?;
        step(sandbox, 1)?;
        built_on(1)?;
        full(&["--max-chain", "2"], "--max-chain 2")?;
        built_on(3)?;
        // One that is not incremental leaves tracking alone, but is newer than what is tracked.
        job.dump(&[])?;
        step(sandbox, 2)?;
        full(&[], "has been made since")?;
        built_on(6)?;
        for number in [7, 6] {
            job.succeed(&["rm", &format!("{}@{number}", job.name)], &[])?;
        }
        step(sandbox, 3)?;
        full(&[], "not in this store")?;
        job.kill()?;
        restore(job)?;
        passes(sandbox, nonce)
    });
}

/// Memory of which so much is there that it is looked at in pieces, and so much changes that it is copied in pieces, by two threads.
#[test]
fn large_memory_is_right_at_the_borders_of_pieces() {
    each_user("incremental-spread", Users::Both, |sandbox| {
        with_ready_job(&without_rseq(Guest::new("mem_spread")), sandbox, |job, nonce| {
            dump_and_compare(job, sandbox, &[])?;
            for number in 1..=3 {
                step(sandbox, number)?;
                let said = dump_and_compare(job, sandbox, &[])?;
                let bytes = count(&said, "held_bytes") + count(&said, "early_bytes");
                let copied = has_module() || (3 << 20..32 << 20).contains(&bytes);
                if parent(&said).is_none() || !copied {
                    return Err(Failure(format!("step {number} was not copied: {said}")));
                }
            }
            job.kill()?;
            restore(job)?;
            passes(sandbox, nonce)
        })
    });
}

/// The kernel fills pages that were pinned before they were protected without lifting the protection: they must not be copied before that.
#[test]
fn memory_that_is_being_read_into_is_right() {
    each_user("incremental-direct", Users::OnlyRoot, |sandbox| {
        let directory = sandbox.root.join("slow");
        let file = directory.join("pages");
        let io = |what: &str, e: std::io::Error| Failure(format!("{what}: {e}"));
        fs::create_dir(&directory).map_err(|e| io("slow", e))?;
        let program =
            stage().copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("apps/slow_file.py"), "slow_file.py")?;
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let at = directory.to_string_lossy();
        let server = sandbox.start(&words(&["python3", &program.to_string_lossy(), &at]), &[])?;
        let served = || file.exists().then_some(());
        let result = poll_until(GUEST_DEADLINE, served)
            .ok_or_else(|| Failure::new("nothing is mounted"))
            .and_then(|()| {
                let guest = Guest::new("direct_reads").arg(&file.to_string_lossy()).in_motion();
                with_ready_job(&guest, sandbox, |job, nonce| {
                    let mut early = 0;
                    for number in 1..=steps() {
                        let said = dump(job, &["--engine", "cow"])?;
                        early = early.max(said["early_bytes"].as_u64().unwrap_or(0));
                        if number % 4 == 0 {
                            job.kill()?;
                            restore(job)?;
                        }
                    }
                    if early == 0 {
                        return Err(Failure::new("nothing was copied before a freeze"));
                    }
                    passes(sandbox, nonce)
                })
            });
        sandbox.execute(&words(&["umount", "--lazy", &at]), &[], COMMAND_DEADLINE)?;
        result.and(server.finish(COMMAND_DEADLINE).map(|_| ()))
    });
}

/// The image of a job that hardly changes holds hardly anything, though the chain holds all.
#[test]
fn little_is_stored_when_little_has_changed() {
    little_is_stored("incremental-size", &[]);
}

fn little_is_stored(label: &str, options: &[&str]) {
    each_ready_job(label, Users::Both, &Guest::new("mem_private_anon"), |sandbox, job, nonce| {
        let first = dump(job, options)?;
        let second = dump(job, options)?;
        let path = second.get("path").and_then(serde_json::Value::as_str).unwrap_or_default();
        let reader = Reader::open(path.as_ref()).map_err(|e| Failure(e.to_string()))?;
        if parent(&second).is_none() || reader.images().len() != 2 {
            return Err(Failure(format!("not incremental: {second}")));
        }
        if count(&second, "bytes") * 3 > count(&first, "bytes") {
            return Err(Failure(format!("{first}\n{second}")));
        }
        job.kill()?;
        restore(job)?;
        passes(sandbox, nonce)
    });
}

/// Each dump attaches anew, as the one before was killed. The guest waits for children all the time, and has none.
#[test]
fn attaching_is_not_seen() {
    each_user("incremental-unseen", Users::Both, |sandbox| {
        let label = format!("incremental-unseen as {}", sandbox.user.name());
        let mut random = Random::announced(&label);
        with_ready_job(&Guest::new("cow_unseen").in_motion(), sandbox, |job, nonce| {
            let init = job.init().ok_or_else(|| Failure::new("the job does not run"))?;
            let before = Fingerprint::take(init);
            let counter = sandbox.work.join("steps");
            let words = ["dump", job.name.as_str(), "--incremental"];
            // One that attaches and one that need not.
            let mut all = u64::MAX;
            for _ in 0..2 {
                job.succeed(&words, &[("CKPT_TEST_COUNT", &counter.to_string_lossy())])?;
                let text = fs::read_to_string(&counter)
                    .map_err(|e| Failure(format!("no steps ({e}): built without the feature test-hooks?")))?;
                let steps = text.trim().parse().map_err(|e| Failure(format!("steps {text:?}: {e}")))?;
                all = all.min(steps);
            }
            let moments = count_from("CKPT_TEST_MOMENTS", 40).min(40);
            announce(&format!("{label}: {moments} of {all} steps"));
            for _ in 0..moments {
                // Before the image is complete: the next one has nothing to go on from.
                let at = 1 + random.below(all.saturating_sub(6));
                let killed = job.ckpt(&words, &[("CKPT_TEST_KILL_AT", &at.to_string())])?;
                let context = |f: Failure| Failure(format!("killed at step {at} of {all}: {f}"));
                if killed.code == 0 {
                    return Err(context(Failure::new("it was not")));
                }
                left_nothing_behind(&before, init).map_err(context)?;
            }
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn a_process_that_can_not_be_attached_is_saved_whole() {
    each_ready_job(
        "incremental-limit",
        Users::OnlyPlain,
        &Guest::new("cow_unseen").arg("limit").in_motion(),
        |sandbox, job, nonce| {
            for number in 0..2 {
                let dumped = job.succeed(&["dump", &job.name, "--incremental", "--json"], &[])?;
                let said: serde_json::Value =
                    serde_json::from_str(&dumped.stdout).map_err(|e| Failure(e.to_string()))?;
                let notes = said["notes"].to_string();
                if !notes.contains("RLIMIT_NPROC") || said["same_pages"] != 0 {
                    return Err(Failure(format!("dump {number}: {said}")));
                }
            }
            job.kill()?;
            job.restore(None, &[])?;
            passes(sandbox, nonce)
        },
    );
}
