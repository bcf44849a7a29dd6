// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt restore --lazy`: what an application does while its memory is missing, and how it ends if the memory can't come.
//!
//! `CKPT_TEST_PAGE_SERVER` keeps the rest of the memory from being fetched in the background, so that the guests meet it missing.

use std::{fs, path::Path};

use ckpt_tests::{
    Failure, Outcome,
    guest::{GUEST_DEADLINE, Guest, Talk, passes},
    job::{COMMAND_DEADLINE, Job},
    process::{Finished, poll_until},
    proof::{each_user, with_ready_job},
    sandbox::Sandbox,
    user::Users,
};

/// Memory comes only when somebody waits for it.
const HELD: (&str, &str) = ("CKPT_TEST_PAGE_SERVER", "hold");
/// The status for a damaged image.
const CORRUPT: i32 = 115;

fn restore(job: &Job<'_>, environment: &[(&str, &str)], options: &[&str]) -> Outcome<serde_json::Value> {
    let words = [&["restore", &job.name, "--detach", "--lazy", "--json"], options].concat();
    let restored = job.succeed(&words, environment)?;
    serde_json::from_str(&restored.stdout)
        .map_err(|error| Failure(format!("no JSON: {error}\n{}", restored.report())))
}

/// What `ckpt ps --json` says of the job's memory: null when nothing is missing.
fn missing_memory(job: &Job<'_>) -> Outcome<serde_json::Value> {
    let listed = job.succeed(&["ps", "--json"], &[])?;
    let jobs: serde_json::Value = serde_json::from_str(&listed.stdout)
        .map_err(|error| Failure(format!("no JSON: {error}\n{}", listed.report())))?;
    let own = jobs.as_array().into_iter().flatten().find(|j| j["name"] == job.name.as_str());
    own.map(|j| j["missing_memory"].clone()).ok_or_else(|| Failure(format!("no job in {}", listed.stdout)))
}

fn expect_lazy(said: &serde_json::Value) -> Outcome<()> {
    if said["lazy_bytes"].as_u64().unwrap_or(0) == 0 || !said["eager_because"].is_null() {
        return Err(Failure(format!("the restore was not lazy: {said}")));
    }
    Ok(())
}

fn expect_ok(job: &Job<'_>, sandbox: &Sandbox, nonce: &str) -> Outcome<()> {
    let waiter = job.start(&["wait", &job.name], &[])?;
    passes(sandbox, nonce)?;
    Talk::with(sandbox).check_log(nonce)?;
    let waited = waiter.finish(COMMAND_DEADLINE)?;
    if waited.code != 0 { Err(Failure(waited.report())) } else { Ok(()) }
}

/// Dump, kill, lazy restore in which nothing is fetched before it is waited for, and the guest does its part.
fn prove_lazy(guest: &Guest) {
    each_user(&format!("lazy-{}", guest.label()), Users::OnlyRoot, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            expect_lazy(&restore(job, &[HELD], &[])?)?;
            if missing_memory(job)?["missing_bytes"].as_u64().unwrap_or(0) == 0 {
                return Err(Failure::new("nothing is missing, so that the test shows nothing"));
            }
            expect_ok(job, sandbox, nonce)
        })
    });
}

/// A chain of three: the area as it was in the first, the rest from the newest, and the server reads each page from its own image.
#[test]
fn from_a_chain() {
    each_user("lazy-chain", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy").arg("fork"), sandbox, |job, nonce| {
            for number in 1..=3u64 {
                let said = job.succeed(&["dump", &job.name, "--incremental", "--json"], &[])?;
                let said: serde_json::Value =
                    serde_json::from_str(&said.stdout).map_err(|e| Failure(e.to_string()))?;
                let parent = (number > 1).then(|| format!("{}@{}", job.name, number - 1));
                if said["parent"].as_str() != parent.as_deref() {
                    return Err(Failure(format!("dump {number} is not built on {parent:?}: {said}")));
                }
            }
            job.kill()?;
            expect_lazy(&restore(job, &[HELD], &[])?)?;
            if missing_memory(job)?["missing_bytes"].as_u64().unwrap_or(0) < 8 << 20 {
                return Err(Failure::new("the area, which only the first image has, is not missing"));
            }
            expect_ok(job, sandbox, nonce)
        })
    });
}

macro_rules! while_missing {
    ($($name:ident => $guest:expr;)+) => {
        $(#[test]
        fn $name() { prove_lazy(&$guest) })+
    };
}

while_missing! {
    read_only => Guest::new("mem_lazy");
    fork => Guest::new("mem_lazy").arg("fork");
    fork_without_all => Guest::new("mem_lazy").arg("wipe");
    mremap => Guest::new("mem_lazy").arg("mremap");
    dontneed => Guest::new("mem_lazy").arg("dontneed");
    munmap => Guest::new("mem_lazy").arg("munmap");
    system_calls => Guest::new("mem_lazy").arg("calls");
    exec_beside => Guest::new("mem_lazy").arg("exec");
    racing_threads => Guest::new("mem_lazy").arg("threads");
    protections => Guest::new("mem_lazy").arg("protection");
    bare_pages => Guest::new("mem_lazy").arg("bare");
    exit_at_once => Guest::new("mem_lazy").arg("exit");
    private_memory => Guest::new("mem_private_anon");
    private_file => Guest::new("mem_private_file");
    shared_memory => Guest::new("mem_shared_anon");
    memfd => Guest::new("mem_memfd");
    locked => Guest::new("mem_mlock");
    stack => Guest::new("mem_stack");
    heap => Guest::new("mem_malloc");
    brk => Guest::new("mem_brk");
    reserve => Guest::new("mem_reserve");
    many_mappings => Guest::new("mem_many_vmas");
    huge_pages => Guest::new("mem_huge");
    threads => Guest::new("thread_registers");
    restartable_sequences => Guest::new("rseq");
    robust_futexes => Guest::new("robust_list");
    process_tree => Guest::new("process_tree");
    static_build => Guest::new("mem_lazy").arg("fork").linked_statically();
    alone => Guest::new("mem_lazy").arg("fork").without_interceptor();
}

/// Waits until nothing is missing.
fn wait_complete(job: &Job<'_>) -> Outcome<()> {
    poll_until(GUEST_DEADLINE, || match missing_memory(job) {
        Ok(missing) if missing.is_null() => Some(Ok(())),
        Ok(_) => None,
        Err(failure) => Some(Err(failure)),
    })
    .unwrap_or_else(|| Err(Failure::new("memory is still missing")))
}

/// Descriptors of children that have ended must not pile up in init.
#[test]
fn many_children_need_few_descriptors() {
    each_user("lazy-children", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy").arg("children"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            expect_lazy(&restore(job, &[HELD], &[])?)?;
            let processes = job.processes();
            let init = processes.first().ok_or_else(|| Failure::new("the job does not run"))?;
            let limited = std::process::Command::new("prlimit")
                .args(["--nofile=300:300", "--pid", &init.pid.to_string()])
                .status();
            if !limited.is_ok_and(|status| status.success()) {
                return Err(Failure::new("prlimit failed"));
            }
            expect_ok(job, sandbox, nonce)
        })
    });
}

#[test]
fn the_rest_comes_by_itself() {
    each_user("lazy-background", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            expect_lazy(&restore(job, &[], &[])?)?;
            wait_complete(job)?;
            // Nothing depends on the image any more, and nothing is left of what watched the memory.
            job.succeed(&["rm", &job.name], &[])?;
            let processes = job.processes();
            let [init, guests @ ..] = &processes[..] else {
                return Err(Failure::new("the job does not run"));
            };
            let watched = guests.iter().any(|process| {
                let smaps = fs::read_to_string(format!("/proc/{}/smaps", process.pid)).unwrap_or_default();
                smaps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" um"))
            });
            let holds = || {
                fs::read_dir(format!("/proc/{}/fd", init.pid)).into_iter().flatten().flatten().any(|fd| {
                    fs::read_link(fd.path()).is_ok_and(|to| {
                        let to = to.to_string_lossy().into_owned();
                        to.contains("userfaultfd")
                            || to.starts_with(&*sandbox.store.join("guest/1").to_string_lossy())
                    })
                })
            };
            // The threads that filled say that they are done, and then end.
            let held = poll_until(GUEST_DEADLINE, || (!holds()).then_some(())).is_none();
            if watched || held {
                return Err(Failure(format!("left behind: watched mappings {watched}, descriptors {held}")));
            }
            expect_ok(job, sandbox, nonce)
        })
    });
}

#[test]
fn a_removed_checkpoint_is_still_read() {
    each_user("lazy-removed", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            expect_lazy(&restore(job, &[HELD], &[])?)?;
            job.succeed(&["rm", &job.name], &[])?;
            expect_ok(job, sandbox, nonce)
        })
    });
}

#[test]
fn a_dump_first_fetches_what_is_missing() {
    each_user("lazy-dump", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy").arg("fork"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            for _ in 0..2 {
                expect_lazy(&restore(job, &[HELD], &[])?)?;
                job.dump(&[])?;
                if !missing_memory(job)?.is_null() {
                    return Err(Failure::new("memory is missing after a dump"));
                }
                job.kill()?;
                job.succeed(&["rm", &format!("{}@1", job.name)], &[])
                    .or_else(|_| job.succeed(&["list"], &[]))?;
            }
            expect_lazy(&restore(job, &[HELD], &[])?)?;
            expect_ok(job, sandbox, nonce)
        })
    });
}

/// init's threads must not give it what a dump compares the job's processes with (see `resource::sysv_semaphore`).
#[test]
fn a_dump_after_it_knows_who_has_no_semaphores_to_undo() {
    each_user("lazy-semaphores", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("sysv_semaphore"), sandbox, |job, nonce| {
            for _ in 0..2 {
                job.dump(&[])?;
                job.kill()?;
                expect_lazy(&restore(job, &[HELD], &[])?)?;
            }
            expect_ok(job, sandbox, nonce)
        })
    });
}

#[test]
fn the_working_set_is_kept_and_used() {
    each_user("lazy-working-set", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, nonce| {
            job.dump(&[])?;
            let file = sandbox.store.join("guest/1/working-set");
            let missing = |job: &Job<'_>| -> Outcome<u64> {
                Ok(missing_memory(job)?["missing_bytes"].as_u64().unwrap_or(0))
            };
            job.kill()?;
            let first = restore(job, &[HELD], &[])?;
            expect_lazy(&first)?;
            // The guest has run: it polls for `go`, so that some memory has been touched.
            poll_until(GUEST_DEADLINE, || {
                missing(job).ok().filter(|m| *m < first["lazy_bytes"].as_u64().unwrap_or(0))
            })
            .ok_or_else(|| Failure::new("the guest touches nothing"))?;
            job.dump(&["--dir", &format!("{}/", sandbox.root.join("other").display())])?;
            let text = fs::read_to_string(&file).map_err(|e| Failure(format!("no working set: {e}")))?;
            if text.lines().count() < 3 {
                return Err(Failure(format!("an empty working set: {text}")));
            }
            job.kill()?;
            // All of it is there before the guest waits for it. Nobody else fetches, so that the difference is the working set.
            let second = restore(job, &[("CKPT_TEST_PAGE_SERVER", "hold")], &[])?;
            poll_until(GUEST_DEADLINE, || {
                let total = second["lazy_bytes"].as_u64().unwrap_or(0);
                missing(job).ok().filter(|m| *m < total)
            })
            .ok_or_else(|| Failure::new("nothing of the working set has come"))?;
            job.kill()?;
            // Damaged, of another image, a directory: the restore does without.
            for nonsense in
                ["", "ckpt working set 1 of 00\nsum 0\n", &text.replace('1', "2"), &"9".repeat(100_000)]
            {
                fs::write(&file, nonsense).map_err(|e| Failure(e.to_string()))?;
                expect_lazy(&restore(job, &[HELD], &[])?)?;
                job.kill()?;
            }
            fs::remove_file(&file)
                .and_then(|()| fs::create_dir(&file))
                .map_err(|e| Failure(e.to_string()))?;
            expect_lazy(&restore(job, &[], &[])?)?;
            wait_complete(job)?;
            expect_ok(job, sandbox, nonce)
        })
    });
}

fn log_of(sandbox: &Sandbox) -> String {
    fs::read_to_string(sandbox.store.join("guest/log")).unwrap_or_default()
}

fn expect_no_verdict(sandbox: &Sandbox) -> Outcome<()> {
    match Talk::with(sandbox).verdict(None) {
        None => Ok(()),
        Some(verdict) => Err(Failure(format!("the guest ran on without its memory: {verdict:?}"))),
    }
}

/// What happens to the page server at the first page that is waited for after the guest was told to go.
fn when_it_goes(what: &str, sandbox: &Sandbox) -> String {
    format!("{what}:{}", sandbox.work.join("go").display())
}

fn wait_for_end(job: &Job<'_>, sandbox: &Sandbox) -> Outcome<Finished> {
    let waiter = job.start(&["wait", &job.name], &[])?;
    Talk::with(sandbox).go()?;
    waiter.finish(COMMAND_DEADLINE)
}

/// Changes one byte of a page of the guest's area, whose pages are most of the file.
fn damage(pages: &Path) -> Outcome<()> {
    use std::os::unix::fs::FileExt;
    let failure = |e: std::io::Error| Failure(format!("{}: {e}", pages.display()));
    let file = fs::File::options().read(true).write(true).open(pages).map_err(failure)?;
    let bytes = file.metadata().map_err(failure)?.len();
    // Behind what is read first: every MiB from the middle on.
    let mut at = bytes / 2;
    while at < bytes {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).map_err(failure)?;
        file.write_all_at(&[byte[0] ^ 1], at).map_err(failure)?;
        at += 1 << 18;
    }
    Ok(())
}

#[test]
fn damage_found_late_ends_the_job() {
    each_user("lazy-damaged", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            expect_lazy(&restore(job, &[HELD], &[])?)?;
            damage(&sandbox.store.join("guest/1/pages"))?;
            let waited = wait_for_end(job, sandbox)?;
            let log = log_of(sandbox);
            if waited.code != CORRUPT || !log.contains("damaged while the job's memory") {
                return Err(Failure(format!("{}\nlog: {log}", waited.report())));
            }
            expect_no_verdict(sandbox)
        })
    });
}

#[test]
fn damage_found_in_the_background_ends_the_job() {
    each_user("lazy-damaged-background", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            expect_lazy(&restore(job, &[HELD], &[])?)?;
            damage(&sandbox.store.join("guest/1/pages"))?;
            // A dump completes the memory first; this one can't.
            let dumped = job.ckpt(&["dump", &job.name], &[])?;
            if dumped.code == 0 {
                return Err(Failure(dumped.report()));
            }
            let waited = wait_for_end(job, sandbox)?;
            if waited.code != CORRUPT {
                return Err(Failure(waited.report()));
            }
            expect_no_verdict(sandbox)
        })
    });
}

#[test]
fn a_panic_of_the_page_server_ends_the_job() {
    each_user("lazy-panic", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            expect_lazy(&restore(job, &[("CKPT_TEST_PAGE_SERVER", &when_it_goes("panic", sandbox))], &[])?)?;
            let waited = wait_for_end(job, sandbox)?;
            let log = log_of(sandbox);
            if waited.code != 125 || !log.contains("defect in the job's init") {
                return Err(Failure(format!("{}\nlog: {log}", waited.report())));
            }
            expect_no_verdict(sandbox)
        })
    });
}

#[test]
fn killing_the_page_server_ends_the_job() {
    each_user("lazy-killed", Users::OnlyRoot, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            expect_lazy(&restore(job, &[("CKPT_TEST_PAGE_SERVER", &when_it_goes("kill", sandbox))], &[])?)?;
            let processes = job.processes();
            let waited = wait_for_end(job, sandbox)?;
            // It may be gone before it is asked for.
            let told = ["killed as a whole", "no job named"].iter().any(|text| waited.stderr.contains(text));
            if waited.code == 0 || !told {
                return Err(Failure(waited.report()));
            }
            poll_until(GUEST_DEADLINE, || processes.iter().all(|p| !p.is_alive()).then_some(()))
                .ok_or_else(|| Failure::new("processes survive their page server"))?;
            expect_no_verdict(sandbox)
        })
    });
}

#[test]
fn without_the_privilege_the_restore_is_eager_and_says_why() {
    each_user("lazy-plain", Users::OnlyPlain, |sandbox| {
        with_ready_job(&Guest::new("mem_lazy").arg("fork"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            let restored = job.succeed(&["restore", &job.name, "--detach", "--lazy", "--json"], &[HELD])?;
            let said: serde_json::Value =
                serde_json::from_str(&restored.stdout).map_err(|error| Failure(error.to_string()))?;
            let why = said["eager_because"].as_str().unwrap_or_default();
            if said["lazy_bytes"] != 0 || !why.contains("CAP_SYS_PTRACE") || !restored.stderr.contains(why) {
                return Err(Failure(restored.report()));
            }
            if !missing_memory(job)?.is_null() {
                return Err(Failure::new("memory is missing"));
            }
            expect_ok(job, sandbox, nonce)
        })
    });
}
