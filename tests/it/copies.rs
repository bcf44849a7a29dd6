// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt restore --copies`: each copy is the whole job, and there are all of them or none.

use std::fs;
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use ckpt_tests::{
    Failure, Outcome, announce,
    guest::{GUEST_DEADLINE, Guest, Talk, passes},
    job::{Job, RunOptions},
    process::poll_until,
    proof::{each_user, with_ready_job},
    sandbox::Sandbox,
    user::Users,
};

/// The status for something that is in the way.
const CONFLICT: i32 = 113;
/// The status for a damaged image.
const CORRUPT: i32 = 115;
/// The area of the guest `mem_lazy`.
const MERGEABLE_PAGES: u64 = 2048;

fn json(text: &str) -> Outcome<serde_json::Value> {
    serde_json::from_str(text).map_err(|error| Failure(format!("no JSON: {error}\n{text}")))
}

fn live_names(job: &Job<'_>) -> Outcome<Vec<String>> {
    let listed = json(&job.succeed(&["ps", "--json"], &[])?.stdout)?;
    let jobs = listed.as_array().into_iter().flatten();
    Ok(jobs.filter_map(|j| Some(j["name"].as_str()?.to_owned())).collect())
}

/// The copies share a work directory: the first verdict wins, and the log has a line of each.
fn expect_all_ok(copies: &[Job<'_>], sandbox: &Sandbox, nonce: &str) -> Outcome<()> {
    passes(sandbox, nonce)?;
    for copy in copies {
        let waited = copy.ckpt(&["wait", &copy.name], &[])?;
        if waited.code != 0 {
            return Err(Failure(waited.report()));
        }
    }
    let ends = fs::read_to_string(sandbox.work.join("log")).unwrap_or_default();
    let ends = ends.lines().filter(|line| *line == format!("end {nonce}")).count();
    if ends != copies.len() {
        return Err(Failure(format!("{ends} of {} copies have come to their end", copies.len())));
    }
    Ok(())
}

fn prove_copies(label: &str, options: &[&str], users: Users) {
    let _as_it_is = MERGING.read().unwrap_or_else(PoisonError::into_inner);
    each_user(label, users, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy").arg("fork"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            let words = [&["restore", &job.name, "--copies", "3", "--json"], options].concat();
            let said = json(&job.succeed(&words, &[])?.stdout)?;
            let copies: Vec<Job<'_>> = (1..=3).map(|n| job.adopt(&format!("guest-{n}"))).collect();
            let named: Vec<&str> =
                said["copies"].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
            if named != ["guest-1", "guest-2", "guest-3"] {
                return Err(Failure(format!("{said}")));
            }
            let ksm = fs::read_to_string("/sys/kernel/mm/ksm/run").unwrap_or_default();
            let shared = said["memory_is_shared"] == true;
            if shared != (ksm.trim() == "1") || shared == said["not_shared_because"].is_string() {
                return Err(Failure(format!("KSM is {ksm:?}: {said}")));
            }
            let logs: std::collections::BTreeSet<&str> =
                said["copies"].as_array().into_iter().flatten().filter_map(|c| c["log"].as_str()).collect();
            if logs.len() != 3 {
                return Err(Failure(format!("not a log each: {said}")));
            }
            expect_all_ok(&copies, sandbox, nonce)
        })
    });
}

#[test]
fn each_is_the_whole_job() {
    prove_copies("copies", &[], Users::Both);
}

#[test]
fn lazily_too() {
    prove_copies("copies-lazy", &["--lazy"], Users::OnlyRoot);
}

#[test]
fn a_taken_name_is_found_before_anything_is_built() {
    each_user("copies-taken", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            let sleeper = ["sleep", "1000"].map(String::from);
            let other = Job::run(sandbox, "x-2", RunOptions::default(), &sleeper)?;
            let refused = job.ckpt(&["restore", &job.name, "--copies", "3", "--name", "x"], &[])?;
            if refused.code != CONFLICT || !refused.stderr.contains("x-2") || live_names(job)? != ["x-2"] {
                return Err(Failure(refused.report()));
            }
            other.kill()?;
            job.succeed(&["restore", &job.name, "--copies", "2", "--name", "x"], &[])?;
            let copies: Vec<Job<'_>> = (1..=2).map(|n| job.adopt(&format!("x-{n}"))).collect();
            expect_all_ok(&copies, sandbox, nonce)
        })
    });
}

#[test]
fn all_or_none() {
    each_user("copies-none", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            // A name whose log can't be written: that copy alone fails.
            fs::create_dir_all(sandbox.store.join("guest-2/log")).map_err(|e| Failure(e.to_string()))?;
            sandbox.user.give(&sandbox.store.join("guest-2"))?;
            let failed = job.ckpt(&["restore", &job.name, "--copies", "3"], &[])?;
            if failed.code == 0 || !failed.stderr.contains("copy guest-2 could not be restored") {
                return Err(Failure(failed.report()));
            }
            let left = live_names(job)?;
            if !left.is_empty() {
                return Err(Failure(format!("{left:?} run although another copy failed")));
            }
            // None of them has executed an instruction: the guests would have been the first to see `go`.
            Talk::with(sandbox).go()?;
            match Talk::with(sandbox).verdict(None) {
                None => Ok(()),
                Some(verdict) => Err(Failure(format!("a copy ran: {verdict:?}"))),
            }
        })
    });
}

#[test]
fn damage_is_told_with_its_status() {
    each_user("copies-damaged", Users::OnlyPlain, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            let pages = sandbox.store.join("guest/1/pages");
            let mut bytes = fs::read(&pages).map_err(|e| Failure(e.to_string()))?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&pages, bytes).map_err(|e| Failure(e.to_string()))?;
            let failed = job.ckpt(&["restore", &job.name, "--copies", "2"], &[])?;
            if failed.code != CORRUPT || !live_names(job)?.is_empty() {
                return Err(Failure(failed.report()));
            }
            Ok(())
        })
    });
}

#[test]
fn a_file_that_all_would_write_is_a_conflict() {
    each_user("copies-files", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("file_writer"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            let refused = job.ckpt(&["restore", &job.name, "--copies", "2"], &[])?;
            if refused.code != CONFLICT || !refused.stderr.contains("several copies would write") {
                return Err(Failure(refused.report()));
            }
            // One alone writes to it alone.
            job.succeed(&["restore", &job.name, "--copies", "1"], &[])?;
            job.adopt("guest-1").kill()
        })
    });
}

#[test]
fn killing_the_command_leaves_none_or_all() {
    each_user("copies-killed", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            let running = job.start(&["restore", &job.name, "--copies", "4"], &[])?;
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(running.pid()),
                nix::sys::signal::Signal::SIGKILL,
            )
            .map_err(|errno| Failure(format!("kill: {errno}")))?;
            // Whatever moment that was: all have been told to run, or none.
            let settled = poll_until(GUEST_DEADLINE, || {
                live_names(job).ok().filter(|names| names.is_empty() || names.len() == 4)
            });
            for n in 1..=4 {
                drop(job.adopt(&format!("guest-{n}")));
            }
            settled.map(drop).ok_or_else(|| Failure::new("some copies run and others do not"))
        })
    });
}

#[test]
fn what_ckpt_made_mergeable_is_not_recorded() {
    let ksm = fs::read_to_string("/sys/kernel/mm/ksm/run").unwrap_or_default();
    if ksm.trim() != "1" {
        announce("skipped: what_ckpt_made_mergeable_is_not_recorded: KSM is off here");
        return;
    }
    each_user("copies-flags", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("mem_madvise"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            job.succeed(&["restore", &job.name, "--copies", "1"], &[])?;
            let copy = job.adopt("guest-1");
            copy.dump(&[])?;
            copy.kill()?;
            // The guest compares its flags with those it set.
            copy.restore(None, &[])?;
            expect_all_ok(std::slice::from_ref(&copy), sandbox, nonce)
        })
    });
}

/// How the kernel merges equal pages is the whole machine's: whoever asks for it waits for whoever sets it.
static MERGING: RwLock<()> = RwLock::new(());

/// Merging turned on, as fast as it goes; as it was when dropped.
struct Merging {
    before: Vec<(&'static str, String)>,
    _alone: RwLockWriteGuard<'static, ()>,
}

impl Merging {
    /// `None` where this machine or this user can't.
    fn turn_on() -> Option<Merging> {
        let alone = MERGING.write().unwrap_or_else(PoisonError::into_inner);
        let mut merging = Merging { before: Vec::new(), _alone: alone };
        for (name, value) in [("pages_to_scan", "100000"), ("sleep_millisecs", "1"), ("run", "1")] {
            let path = Merging::path(name);
            merging.before.push((name, fs::read_to_string(&path).ok()?));
            fs::write(&path, value).ok()?;
        }
        Some(merging)
    }

    fn path(name: &str) -> String {
        format!("/sys/kernel/mm/ksm/{name}")
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        for (name, value) in self.before.iter().rev() {
            let _ = fs::write(Merging::path(name), value.trim());
        }
    }
}

#[test]
fn unmodified_memory_is_shared_where_the_kernel_merges_equal_pages() {
    let Some(_merging) = Merging::turn_on() else {
        announce(
            "skipped: copies share memory: only the host's root may turn KSM on, where the kernel has it",
        );
        return;
    };
    each_user("copies-shared", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy").arg("fork"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            let said = json(&job.succeed(&["restore", &job.name, "--copies", "3", "--json"], &[])?.stdout)?;
            if said["memory_is_shared"] != true {
                return Err(Failure(format!("{said}")));
            }
            let copies: Vec<Job<'_>> = (1..=3).map(|n| job.adopt(&format!("guest-{n}"))).collect();
            let mut pids = Vec::new();
            for copy in &copies {
                pids.extend(copy.processes().iter().map(|process| process.pid));
            }
            // Three times the guest's area is there; each page of it is merged in all of them or one or two are not yet.
            let mut merged = 0;
            let all = poll_until(GUEST_DEADLINE, || {
                let of = |pid| -> Option<u64> {
                    fs::read_to_string(format!("/proc/{pid}/ksm_merging_pages")).ok()?.trim().parse().ok()
                };
                merged = pids.iter().filter_map(of).sum();
                (merged >= 2 * MERGEABLE_PAGES).then_some(())
            });
            if all.is_none() {
                return Err(Failure(format!("{merged} pages are merged")));
            }
            expect_all_ok(&copies, sandbox, nonce)
        })
    });
}
