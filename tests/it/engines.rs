// SPDX-License-Identifier: MIT OR Apache-2.0
//! The other snapshot engines, which share nothing with the default but the seam between them: guests restored from
//! their images, and the same pages from all for a job that stands still.

use std::{fs, path::Path};

use ckpt_tests::{
    Failure, Outcome, announce,
    guest::{GUEST_DEADLINE, Guest, passes},
    pages::{Pages, difference, pages_of},
    process::poll_until,
    proof::{self, dump_by, each_user, with_ready_job},
    user::Users,
};
use nix::sys::signal::Signal;

macro_rules! by_the_other_engines {
    ($($name:ident => $guest:expr;)+) => {
        $(mod $name {
            use super::*;
            #[test]
            fn kmod() { by_the_module(&$guest) }
            #[test]
            fn copy() { proof::prove_with_engine(&$guest, "copy") }
            #[test]
            fn spill() { proof::prove_with_engine(&$guest, "spill") }
        })+
    };
}

/// Where the kernel module is loaded: `scripts/vm --product`.
fn by_the_module(guest: &Guest) {
    if has_module(&guest.label()) {
        proof::prove_with_engine(guest, "kmod");
    }
}

fn has_module(test: &str) -> bool {
    let has = Path::new("/dev/ckpt").exists();
    if !has {
        announce(&format!("skipped: {test} by the engine kmod: the kernel module is not loaded"));
    }
    has
}

by_the_other_engines! {
    private_memory => Guest::new("mem_private_anon");
    private_memory_alone => Guest::new("mem_private_anon").without_interceptor();
    private_file => Guest::new("mem_private_file");
    shared_memory => Guest::new("mem_shared_anon");
    memfd => Guest::new("mem_memfd");
    deleted_shm => Guest::new("mem_deleted_shm");
    named_shm => Guest::new("mem_named_shm");
    stack => Guest::new("mem_stack");
    many_vmas => Guest::new("mem_many_vmas");
    advice => Guest::new("mem_madvise");
    deleted_file => Guest::new("file_deleted");
    workers => Guest::new("file_workers");
    threads => Guest::new("thread_registers");
    spliced => Guest::new("mem_spliced");
    moment => Guest::new("cow_moment").in_motion();
    moment_of_processes => Guest::new("moment_processes").in_motion();
}

#[test]
fn same_pages_from_all_engines() {
    for (source, interceptor) in [
        ("mem_shared_anon", true),
        ("mem_private_anon", false),
        ("mem_private_file", true),
        ("mem_madvise", true),
        ("thread_registers", true),
    ] {
        // Into a registered rseq area the kernel writes on which processor a thread came back from a stop.
        let mut guest = Guest::new(source).run_under(&["env", "GLIBC_TUNABLES=glibc.pthread.rseq=0"]);
        guest.interceptor = interceptor;
        each_user(&format!("engines-{source}"), Users::Both, |sandbox| {
            with_ready_job(&guest, sandbox, |job, nonce| {
                let processes = job.processes();
                let [_init, guests @ ..] = &processes[..] else {
                    return Err(Failure::new("the job does not run"));
                };
                for process in guests {
                    process.signal(Signal::SIGSTOP);
                }
                poll_until(GUEST_DEADLINE, || {
                    guests.iter().all(|process| process.is_stopped()).then_some(())
                })
                .ok_or_else(|| Failure::new("the guest does not stop"))?;
                let mut images = Vec::new();
                let engines = ["copy", "cow", "spill", "kmod"];
                for engine in engines.into_iter().filter(|e| *e != "kmod" || has_module(source)) {
                    let image = sandbox.root.join(engine);
                    dump_by(job, engine, &["--dir", &format!("{}/", image.display())])?;
                    images.push((engine, pages_of(&image)?));
                }
                for (engine, pages) in &images[1..] {
                    compare(&images[0].1, pages, engine)?;
                }
                for process in guests {
                    process.signal(Signal::SIGCONT);
                }
                passes(sandbox, nonce)
            })
        });
    }
}

fn compare(copied: &Pages, other: &Pages, engine: &str) -> Outcome<()> {
    let differing: Vec<String> = copied
        .keys()
        .chain(other.keys().filter(|page| !copied.contains_key(page)))
        .filter(|page| copied.get(page) != other.get(page))
        .map(|page| difference(*page, ("copy", copied.get(page)), (engine, other.get(page))))
        .collect();
    if copied.len() < 10 || !differing.is_empty() {
        return Err(Failure(format!(
            "{} of {} pages differ between copy and {engine}:\n{}",
            differing.len(),
            copied.len(),
            differing[..differing.len().min(20)].join("\n")
        )));
    }
    Ok(())
}

/// What the choice of the kernel module depends on, and what becomes of that which it does not take.
mod module {
    use super::*;
    use ckpt_tests::{fingerprint::Fingerprint, job::Job, process::Finished, proof::left_nothing_behind};

    fn said_by(dumped: &Finished) -> Outcome<serde_json::Value> {
        serde_json::from_str(&dumped.stdout)
            .map_err(|e| Failure(format!("no JSON: {e}\n{}", dumped.report())))
    }

    pub(super) fn dump(job: &Job<'_>, options: &[&str]) -> Outcome<serde_json::Value> {
        said_by(&job.succeed(&[&["dump", &job.name, "--json"], options].concat(), &[])?)
    }

    /// By this engine, with these words among the reasons, or with none about the module.
    pub(super) fn is_by(said: &serde_json::Value, engine: &str, why: Option<&str>) -> Outcome<()> {
        let reasons = said["engine_reasons"].to_string();
        let right = why.map_or_else(|| !reasons.contains("kmod:"), |why| reasons.contains(why));
        match said["engine"] == engine && right {
            true => Ok(()),
            false => Err(Failure(format!("not by {engine} because of {why:?}: {said}"))),
        }
    }

    /// By the module, without an exception.
    pub(super) fn keeps_all(said: &serde_json::Value) -> Outcome<()> {
        is_by(said, "kmod", None)?;
        match said["engine_reasons"].to_string().contains("not kept") {
            false => Ok(()),
            true => Err(Failure(format!("not all is kept: {said}"))),
        }
    }

    pub(super) fn contains(said: &Finished, words: &str) -> Outcome<()> {
        match said.stdout.contains(words) || said.stderr.contains(words) {
            true => Ok(()),
            false => Err(Failure(format!("nothing of {words:?}:\n{}", said.report()))),
        }
    }

    #[test]
    fn is_chosen_where_it_is_loaded() {
        const NOT_LOADED: &str = "the kernel module is not loaded";
        each_user("engines-auto", Users::Both, |sandbox| {
            with_ready_job(&Guest::new("mem_private_anon"), sandbox, |job, nonce| {
                let doctor = job.ckpt(&["doctor", "--json"], &[])?;
                if Path::new("/dev/ckpt").exists() {
                    is_by(&dump(job, &[])?, "kmod", None)?;
                    is_by(&dump(job, &["--duplicate-limit=1G"])?, "cow", Some("kmod: --duplicate-limit"))?;
                    contains(&doctor, "/dev/ckpt keeps memory")?;
                    contains(&doctor, "kmod: a job goes on")?;
                } else {
                    is_by(&dump(job, &[])?, "cow", Some(&format!("kmod: {NOT_LOADED}")))?;
                    contains(&doctor, NOT_LOADED)?;
                    let refused = job.ckpt(&["dump", &job.name, "--engine", "kmod"], &[])?;
                    contains(&refused, NOT_LOADED)?;
                    if refused.code != 116 {
                        return Err(Failure(refused.report()));
                    }
                }
                // Asked for by name, another one has nothing to explain.
                is_by(&dump(job, &["--engine", "cow"])?, "cow", None)?;
                is_by(&dump(job, &["--engine", "copy"])?, "copy", None)?;
                passes(sandbox, nonce)
            })
        });
    }

    #[test]
    fn leaves_other_processes_to_the_others() {
        if !has_module("undumpable workers") {
            return;
        }
        let guest = Guest::new("file_workers").arg("undumpable");
        each_user("engines-undumpable", Users::Both, |sandbox| {
            with_ready_job(&guest, sandbox, |job, nonce| {
                // The leader is kept by it, the workers are not.
                is_by(&dump(job, &["--engine", "kmod"])?, "kmod", Some("was not kept by the kernel module"))?;
                job.kill()?;
                job.restore(None, &[])?;
                passes(sandbox, nonce)
            })
        });
    }

    #[test]
    fn keeps_no_more_than_may_be_locked() {
        if !has_module("RLIMIT_MEMLOCK") {
            return;
        }
        each_user("engines-memlock", Users::OnlyPlain, |sandbox| {
            with_ready_job(&Guest::new("mem_private_anon"), sandbox, |job, nonce| {
                for incremental in [&[][..], &["--incremental"]] {
                    let words = [&["dump", &job.name, "--engine", "kmod", "--json"], incremental].concat();
                    let said = said_by(&job.ckpt_after("ulimit -l 64", &words)?)?;
                    is_by(&said, "cow", Some("RLIMIT_MEMLOCK"))?;
                }
                job.kill()?;
                job.restore(None, &[])?;
                passes(sandbox, nonce)
            })
        });
    }

    pub(super) fn has_note(said: &serde_json::Value, words: &str) -> Outcome<()> {
        match said["notes"].to_string().contains(words) {
            true => Ok(()),
            false => Err(Failure(format!("no note of {words:?}: {said}"))),
        }
    }

    #[test]
    fn keeps_a_process_whose_credentials_have_changed_since() {
        if !has_module("changed credentials") {
            return;
        }
        each_user("engines-credentials", Users::OnlyRoot, |sandbox| {
            with_ready_job(&Guest::new("mem_refused").arg("drops"), sandbox, |job, nonce| {
                let incremental = ["--engine", "kmod", "--incremental"];
                keeps_all(&dump(job, &incremental)?)?;
                refused::step(sandbox)?;
                for _ in 0..2 {
                    let said = dump(job, &incremental)?;
                    keeps_all(&said)?;
                    if said["parent"].is_null() || said["notes"] != serde_json::json!([]) {
                        return Err(Failure(format!("not built on the one before: {said}")));
                    }
                }
                job.kill()?;
                job.restore(None, &[])?;
                passes(sandbox, nonce)
            })
        });
    }

    #[test]
    fn leaves_nothing_in_the_process() {
        if !has_module("nothing left") {
            return;
        }
        each_user("engines-nothing-left", Users::Both, |sandbox| {
            with_ready_job(&Guest::new("mem_private_anon"), sandbox, |job, nonce| {
                let init = job.init().ok_or_else(|| Failure::new("the job does not run"))?;
                let before = Fingerprint::take(init);
                dump_by(job, "kmod", &[])?;
                left_nothing_behind(&before, init)?;
                // Between these two a session stays open, with init.
                for _ in 0..2 {
                    dump_by(job, "kmod", &["--incremental"])?;
                    left_nothing_behind(&before, init)?;
                }
                passes(sandbox, nonce)
            })
        });
    }
}

/// Processes that the module refuses, beside others that it keeps.
mod refused {
    use super::module::{contains, dump, has_note, is_by, keeps_all};
    use super::*;
    use ckpt_tests::{job::Job, sandbox::Sandbox, stage::stage};

    fn file(sandbox: &Sandbox, name: &str) -> Outcome<String> {
        let read = || fs::read_to_string(sandbox.work.join(name)).ok();
        poll_until(GUEST_DEADLINE, read).ok_or_else(|| Failure(format!("the guest makes no file {name}")))
    }

    /// Has both processes of the guest change their memory.
    pub(super) fn step(sandbox: &Sandbox) -> Outcome<()> {
        fs::write(sandbox.work.join("step"), "").map_err(|e| Failure(e.to_string()))?;
        file(sandbox, "done")?;
        file(sandbox, "child-done").map(drop)
    }

    /// The guest's child is not kept because of `why`, its parent is. The child is forked, or copied because of `not_forked`.
    fn is_kept_without_the_child(
        job: &Job<'_>,
        sandbox: &Sandbox,
        (why, not_forked): (&str, Option<&str>),
    ) -> Outcome<()> {
        let child = file(sandbox, "refused")?;
        let not_kept = format!("pid {child} was not kept by the kernel module: {why}");
        let copied = not_forked.map(|why| format!("pid {child} was copied while it stood still: {why}"));
        let check = |said: &serde_json::Value| {
            is_by(said, "kmod", Some(&not_kept))?;
            let reasons = said["engine_reasons"].to_string();
            let right = match &copied {
                Some(copied) => reasons.contains(copied),
                None => !reasons.contains("stood still"),
            };
            // Of the others, nothing but what the module never keeps.
            let held = said["held_bytes"].as_u64().unwrap_or(0);
            match right
                && reasons.matches("was not kept").count() == 1
                && (held >= 8 << 20) == copied.is_some()
            {
                true => Ok(()),
                false => Err(Failure(format!("not the child alone, copied: {copied:?}: {said}"))),
            }
        };
        let incremental = ["--engine", "kmod", "--incremental"];
        check(&dump(job, &incremental)?)?;
        step(sandbox)?;
        let said = dump(job, &incremental)?;
        check(&said)?;
        has_note(&said, &format!("pid {child}: {why}; its memory is saved whole each time"))?;
        if said["parent"].is_null() {
            return Err(Failure(format!("not built on the one before: {said}")));
        }
        let full = job.dump(&["--engine", "kmod"])?;
        contains(&full, &not_kept)?;
        copied.map_or(Ok(()), |copied| contains(&full, &copied))?;
        // The guest is restored from the chain, in which the child's memory has changed.
        job.succeed(&["rm", &format!("{}@3", job.name)], &[])?;
        job.kill()?;
        job.restore(None, &[]).map(drop)
    }

    const SHARED: &str = "a device or a virtual machine shares its memory";

    #[test]
    fn leaves_memory_that_a_device_shares_to_the_others() {
        if !has_module("a device shares memory") {
            return;
        }
        let guest = Guest::new("mem_refused").arg("device");
        // Children of one that adopts orphans are not forked either.
        let cases =
            [(guest.clone(), Users::Both, None), (guest.arg("adopts"), Users::OnlyPlain, Some("process "))];
        for (guest, users, not_forked) in cases {
            each_user(&guest.label(), users, |sandbox| {
                with_ready_job(&guest, sandbox, |job, nonce| {
                    is_kept_without_the_child(job, sandbox, (SHARED, not_forked))?;
                    passes(sandbox, nonce)
                })
            });
        }
    }

    #[test]
    fn leaves_a_process_to_the_others_that_has_snapshots_enough() {
        if !has_module("two snapshots") {
            return;
        }
        each_user("engines-busy", Users::Both, |sandbox| {
            let program = stage().compile("holder", false)?;
            let words = [program.as_path(), &sandbox.work].map(|path| path.to_string_lossy().into_owned());
            let holder = sandbox.start(&words, &[])?;
            with_ready_job(&Guest::new("mem_refused").arg("session"), sandbox, |job, nonce| {
                let why = "it has as many snapshots as it may have";
                is_kept_without_the_child(job, sandbox, (why, None))?;
                // The restored one has none.
                keeps_all(&dump(job, &[])?)?;
                fs::write(sandbox.work.join("release"), "").map_err(|e| Failure(e.to_string()))?;
                let ended = holder.finish(GUEST_DEADLINE)?;
                if ended.code != 0 {
                    return Err(Failure(ended.report()));
                }
                passes(sandbox, nonce)
            })
        });
    }
}

/// What changes the module for everybody. Run where nobody else uses it, with CKPT_TEST_ALONE set.
mod alone {
    use super::module::{contains, dump, has_note, is_by, keeps_all};
    use super::*;

    const MAX_PAGES: &str = "/sys/module/ckpt/parameters/max_pages";

    /// What the module may keep of all processes, set to something else while this lives.
    struct MaxPages(String);

    impl MaxPages {
        fn set(pages: &str) -> Outcome<MaxPages> {
            let failed = |e: std::io::Error| Failure(format!("{MAX_PAGES}: {e}"));
            let old = MaxPages(fs::read_to_string(MAX_PAGES).map_err(failed)?);
            fs::write(MAX_PAGES, pages).map_err(failed)?;
            Ok(old)
        }
    }

    impl Drop for MaxPages {
        fn drop(&mut self) {
            let _ = fs::write(MAX_PAGES, &self.0);
        }
    }

    #[test]
    fn keeps_no_more_than_max_pages() {
        if !has_module("max_pages") {
            return;
        }
        if std::env::var_os("CKPT_TEST_ALONE").is_none() {
            announce("skipped: max_pages: others may be using the module (CKPT_TEST_ALONE is not set)");
            return;
        }
        const WHY: &str = "it has more memory than the module may keep (its parameter max_pages)";
        each_user("engines-max-pages", Users::Both, |sandbox| {
            with_ready_job(&Guest::new("mem_private_anon"), sandbox, |job, nonce| {
                let limit = MaxPages::set("16")?;
                let said = dump(job, &["--engine", "kmod", "--incremental"])?;
                is_by(&said, "cow", Some(WHY))?;
                has_note(&said, WHY)?;
                contains(&job.dump(&["--engine", "kmod"])?, WHY)?;
                is_by(&dump(job, &[])?, "cow", Some(WHY))?;
                drop(limit);
                job.kill()?;
                job.restore(None, &[])?;
                keeps_all(&dump(job, &[])?)?;
                passes(sandbox, nonce)
            })
        });
    }
}
