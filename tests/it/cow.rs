// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `cow` engine: the copy is of one moment, the job never sees it, it dies with the dumper and when it must, and what
//! a fork does not keep is copied while the job stands still.

use std::{fs, time::Duration, time::Instant};

use ckpt_tests::{
    Failure, Outcome, announce,
    fingerprint::Fingerprint,
    guest::{GUEST_DEADLINE, Guest, passes},
    job::Job,
    process::{HostProcess, Running, poll_until},
    proof::{each_user, left_nothing_behind, prove_with_engine, with_ready_job},
    sandbox::Sandbox,
    stage::stage,
    user::Users,
};
use nix::sys::signal::Signal;

/// So slow that a dump of some MiB lasts until the test has done with it, and notices an end of its copy soon.
const SLOWLY: &str = "--io-limit=256K";
/// So slow that a dump of anything lasts until it is killed.
const NEVER_DONE: &str = "--io-limit=1K";

fn expect(condition: bool, what: impl Into<String>) -> Outcome<()> {
    if condition { Ok(()) } else { Err(Failure(what.into())) }
}

fn end(sandbox: &Sandbox, nonce: &str) -> Outcome<()> {
    passes(sandbox, nonce)
}

/// Processes of the job that are frozen copies.
fn copies(job: &Job<'_>) -> Vec<HostProcess> {
    let is_copy = |p: &HostProcess| {
        fs::read_to_string(format!("/proc/{}/comm", p.pid)).is_ok_and(|name| name.trim() == "ckpt-copy")
    };
    job.processes().into_iter().filter(|p| is_copy(p) && p.is_alive()).collect()
}

/// Starts a dump, and gives it back when it is writing, with the copy that it writes.
fn start_slow_dump(job: &Job<'_>, rate: &str) -> Outcome<(Running, HostProcess)> {
    let dump = job.start(&["dump", &job.name, rate], &[])?;
    let copy = poll_until(GUEST_DEADLINE, || {
        // When nobody else is traced any more the job has been resumed.
        let traced = |p: &HostProcess| {
            let status = fs::read_to_string(format!("/proc/{}/status", p.pid)).unwrap_or_default();
            !status.contains("TracerPid:\t0")
        };
        let others = job.processes();
        let copies = copies(job);
        let copy = copies.first()?;
        others.iter().all(|p| p.pid == copy.pid || !traced(p)).then_some(*copy)
    })
    .ok_or_else(|| Failure::new("the dump makes no copy"))?;
    Ok((dump, copy))
}

fn dump_json(job: &Job<'_>, options: &[&str]) -> Outcome<serde_json::Value> {
    let dumped = job.succeed(&[&["dump", &job.name, "--json"], options].concat(), &[])?;
    serde_json::from_str(&dumped.stdout).map_err(|e| Failure(format!("no JSON: {e}\n{}", dumped.report())))
}

fn reasons(said: &serde_json::Value) -> String {
    said["engine_reasons"].to_string()
}

#[test]
fn a_checkpoint_is_of_one_moment() {
    each_user("cow-moment", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("cow_moment").in_motion(), sandbox, |job, nonce| {
            for _ in 0..3 {
                let said = dump_json(job, &["--io-limit=64M"])?;
                expect(said["engine"] == "cow", format!("not the default engine: {said}"))?;
                for why in ["MADV_DONTFORK", "MADV_WIPEONFORK"] {
                    expect(reasons(&said).contains(why), reasons(&said))?;
                }
                let duplicated = said["duplicated_bytes"].as_u64().unwrap_or(0);
                // It wrote to all of its 16 MiB many times over while that was being written.
                expect(duplicated >= 8 << 20, format!("duplicated: {duplicated}"))?;
                job.kill()?;
                job.restore(None, &[])?;
            }
            end(sandbox, nonce)
        })
    });
}

#[test]
fn all_processes_are_of_one_moment() {
    prove_with_engine(&Guest::new("moment_processes").in_motion(), "cow");
}

#[test]
fn the_copy_is_not_seen() {
    each_user("cow-unseen", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("cow_unseen").in_motion(), sandbox, |job, nonce| {
            let (dump, copy) = start_slow_dump(job, NEVER_DONE)?;
            let read =
                |name: &str| fs::read_to_string(format!("/proc/{}/{name}", copy.pid)).unwrap_or_default();
            expect(
                read("oom_score_adj").trim() == "1000",
                format!("oom_score_adj: {}", read("oom_score_adj")),
            )?;
            let status = read("status");
            // All but SIGKILL and SIGSTOP.
            expect(
                status.contains("SigBlk:\tfffffffffffbfeff"),
                format!("not all signals are blocked:\n{status}"),
            )?;
            let open = fs::read_dir(format!("/proc/{}/fd", copy.pid)).map(Iterator::count).unwrap_or(99);
            expect(open == 0, format!("the copy has {open} descriptors"))?;
            fs::write(sandbox.work.join("close"), "").map_err(|e| Failure(e.to_string()))?;
            poll_until(GUEST_DEADLINE, || sandbox.work.join("closed").exists().then_some(()))
                .ok_or_else(|| Failure::new("the pipe did not end"))?;
            expect(copy.is_alive(), "the copy has gone too early for this test")?;
            // The dumper dies, and the copy with it.
            HostProcess::find(dump.pid()).into_iter().for_each(|p| p.signal(Signal::SIGKILL));
            poll_until(GUEST_DEADLINE, || (!copy.is_alive()).then_some(()))
                .ok_or_else(|| Failure::new("the copy outlives the dumper"))?;
            drop(dump);
            end(sandbox, nonce)
        })
    });
}

#[test]
fn no_copy_where_orphans_are_adopted() {
    for how in ["reaper", "child"] {
        each_user(&format!("cow-{how}"), Users::Both, |sandbox| {
            with_ready_job(&Guest::new("cow_unseen").arg(how).in_motion(), sandbox, |job, nonce| {
                let said = dump_json(job, &[])?;
                expect(said["engine"] == "copy", format!("engine: {said}"))?;
                expect(reasons(&said).contains("PR_SET_CHILD_SUBREAPER"), reasons(&said))?;
                job.kill()?;
                job.restore(None, &[])?;
                end(sandbox, nonce)
            })
        });
    }
}

#[test]
fn no_copy_where_no_more_processes_are_allowed() {
    each_user("cow-limit", Users::OnlyPlain, |sandbox| {
        with_ready_job(&Guest::new("cow_unseen").arg("limit").in_motion(), sandbox, |job, nonce| {
            let said = dump_json(job, &[])?;
            expect(said["engine"] == "copy", format!("engine: {said}"))?;
            expect(reasons(&said).contains("RLIMIT_NPROC"), reasons(&said))?;
            end(sandbox, nonce)
        })
    });
}

#[test]
fn a_dump_whose_copy_is_killed_fails() {
    each_user("cow-killed", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("cow_moment").in_motion(), sandbox, |job, nonce| {
            let (dump, copy) = start_slow_dump(job, SLOWLY)?;
            copy.signal(Signal::SIGKILL);
            let dump = dump.finish(GUEST_DEADLINE)?;
            expect(dump.code != 0 && dump.stderr.contains("frozen copy"), dump.report())?;
            let verified = job.ckpt(&["verify", &job.name], &[])?;
            expect(verified.code == 112, format!("half a checkpoint is there:\n{}", verified.report()))?;
            job.dump(&[])?;
            end(sandbox, nonce)
        })
    });
}

#[test]
fn more_duplicated_than_allowed() {
    each_user("cow-duplicate", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("cow_moment").in_motion(), sandbox, |job, nonce| {
            let dump = job.ckpt(&["dump", &job.name, SLOWLY, "--duplicate-limit", "2M"], &[])?;
            expect(
                dump.code != 0 && dump.stderr.contains("--duplicate-limit allows 2097152"),
                dump.report(),
            )?;
            expect(copies(job).is_empty(), "a copy is left")?;
            end(sandbox, nonce)
        })
    });
}

#[test]
fn writing_is_paced() {
    each_user("cow-pace", Users::OnlyPlain, |sandbox| {
        with_ready_job(&Guest::new("cow_moment").in_motion(), sandbox, |job, nonce| {
            let started = Instant::now();
            let said = dump_json(job, &["--io-limit=8M"])?;
            let bytes = said["bytes"].as_u64().unwrap_or(0);
            // The end of an image, its index, is not waited for.
            let least = Duration::from_secs_f64((bytes as f64 / f64::from(8 << 20)) * 0.9);
            expect(
                bytes > 16 << 20 && started.elapsed() >= least,
                format!("{bytes} bytes in {:?}", started.elapsed()),
            )?;
            end(sandbox, nonce)
        })
    });
}

/// What a dump takes for itself does not depend on what it dumps.
#[test]
fn a_dump_takes_little_memory() {
    each_user("cow-memory", Users::OnlyPlain, |sandbox| {
        with_ready_job(&Guest::new("mem_large"), sandbox, |job, nonce| {
            let dump = |options: &[&str]| {
                let ckpt = stage().ckpt()?.to_string_lossy().into_owned();
                // In KiB: of all that can be written to, used or not.
                let line =
                    [&["sh", "-c", "ulimit -d 65536; exec \"$@\"", "sh", &ckpt, "dump", &job.name], options]
                        .concat();
                let line: Vec<String> = line.into_iter().map(String::from).collect();
                sandbox.execute(&line, &[], GUEST_DEADLINE)
            };
            for compression in ["none", "lz4", "zstd"] {
                let done = dump(&["--compress", compression])?;
                expect(done.code == 0, done.report())?;
            }
            let done = dump(&["--engine=copy"])?;
            expect(done.code != 0, "the limit does not hold, or the guest is too small")?;
            job.kill()?;
            job.restore(None, &[])?;
            end(sandbox, nonce)
        })
    });
}

/// A control group for one test, of version 1 or 2, removed at its end.
struct Group(std::path::PathBuf);

impl Group {
    fn new(limit: &str) -> Option<Group> {
        let (base, file) = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"]
            .into_iter()
            .zip(["memory.limit_in_bytes", "memory.max"])
            .find(|(base, _)| {
                fs::metadata(base).is_ok()
                    && (base.ends_with("memory")
                        || fs::read_to_string(format!("{base}/cgroup.subtree_control"))
                            .is_ok_and(|c| c.contains("memory")))
            })?;
        let dir = std::path::Path::new(base).join(format!("ckpt-test-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        let group = Group(dir);
        fs::write(group.0.join(file), limit).ok()?;
        Some(group)
    }

    fn add(&self, process: HostProcess) -> Outcome<()> {
        fs::write(self.0.join("cgroup.procs"), process.pid.to_string())
            .map_err(|e| Failure(format!("{}: {e}", self.0.display())))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        poll_until(GUEST_DEADLINE, || fs::remove_dir(&self.0).ok());
    }
}

#[test]
fn no_copy_where_memory_is_limited() {
    each_user("cow-memory", Users::OnlyRoot, |sandbox| {
        let Some(group) = Group::new("8388608") else {
            announce("skipped: cow-memory: no control group with a memory limit can be made here");
            return Ok(());
        };
        with_ready_job(&Guest::new("cow_unseen").in_motion(), sandbox, |job, nonce| {
            // Memory in use stays charged where it is; what is left in the group is less than what is kept free.
            let ballast = fs::write(group.0.join("memory.limit_in_bytes"), "4194304")
                .or_else(|_| fs::write(group.0.join("memory.max"), "4194304"));
            ballast.map_err(|e| Failure(format!("the limit: {e}")))?;
            for process in job.processes().into_iter().skip(1) {
                group.add(process)?;
            }
            let said = dump_json(job, &[])?;
            expect(said["engine"] == "copy", format!("engine: {said}"))?;
            expect(reasons(&said).contains("the memory limit of"), reasons(&said))?;
            end(sandbox, nonce)?;
            job.kill().or(Ok(()))
        })
    });
}

/// The soft limit of open files is no limit to the number of processes.
#[test]
fn more_processes_than_open_files() {
    each_user("cow-many", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("process_many"), sandbox, |job, nonce| {
            let dump = job.ckpt_after("ulimit -S -n 30", &["dump", &job.name, "--engine", "cow"])?;
            expect(dump.code == 0, dump.report())?;
            end(sandbox, nonce)
        })
    });
}

#[test]
fn nothing_is_left_behind() {
    each_user("cow-behind", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("file_workers"), sandbox, |job, nonce| {
            let init = job.init().ok_or_else(|| Failure::new("the job does not run"))?;
            let before = Fingerprint::take(init);
            let said = dump_json(job, &["--engine", "cow"])?;
            expect(said["engine"] == "cow", format!("engine: {said}"))?;
            left_nothing_behind(&before, init)?;
            end(sandbox, nonce)
        })
    });
}
