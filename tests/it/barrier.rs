// SPDX-License-Identifier: MIT OR Apache-2.0
//! The barrier: what is half-way when a dump begins is waited for, and with the interceptor nothing of the kind begins
//! meanwhile. The guest `barrier` holds a posix_spawn half-way until its FIFO is opened here, so that it is known what a
//! dump finds.

use std::{fs, mem::offset_of, os::unix::fs::OpenOptionsExt, path::Path, time::Instant};

use ckpt_abi::interceptor::{Control, GATE_CLOSED, GATE_OPEN};
use ckpt_engine::dump::control_word::ControlWord;
use ckpt_tests::{
    Failure, Outcome,
    guest::{GUEST_DEADLINE, Guest, passes},
    job::{COMMAND_DEADLINE, Job},
    process::{Finished, HostProcess, Running, poll_until},
    proof::{each_ready_job, each_user},
    sandbox::Sandbox,
    user::Users,
};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Longer than any test takes to let the guest come to its safe point.
const LONG: &str = "45s";

fn touch(sandbox: &Sandbox, name: &str) -> Outcome<()> {
    let path = sandbox.work.join(name);
    fs::write(&path, "").map_err(|error| Failure(format!("{}: {error}", path.display())))
}

fn wait_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> Outcome<T> {
    poll_until(GUEST_DEADLINE, condition).ok_or_else(|| Failure(format!("not so in time: {what}")))
}

fn wait_for_file(sandbox: &Sandbox, name: &str) -> Outcome<()> {
    let path = sandbox.work.join(name);
    wait_for(&format!("{name} exists"), || path.exists().then_some(()))
}

/// Lets the posix_spawn of thread "first" end.
fn open_fifo(sandbox: &Sandbox) -> Outcome<()> {
    let path = sandbox.work.join("fifo");
    let open = || fs::File::options().write(true).custom_flags(nix::libc::O_NONBLOCK).open(&path).ok();
    wait_for("somebody opens the FIFO for reading", open).map(drop)
}

/// The guest's processes, its main one first.
fn guests(job: &Job<'_>) -> Vec<HostProcess> {
    job.processes().into_iter().skip(1).collect()
}

fn gate_of(process: HostProcess) -> Option<u32> {
    ControlWord::find(Pid::from_raw(process.pid))?.read_u32(offset_of!(Control, gate)).ok()
}

/// Waits until the dump has closed the gate of `process`.
fn wait_closed(process: HostProcess) -> Outcome<()> {
    wait_for("the gate is closed", || (gate_of(process) == Some(GATE_CLOSED)).then_some(()))
}

/// A thread called "second" that sleeps in futex(2), as the gate's waiters do and nobody else of the guest.
fn waits_at_the_gate(process: &HostProcess) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.pid)).into_iter().flatten().flatten();
    let text = |path: &Path, name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
    let futex = format!("{} ", nix::libc::SYS_futex);
    tasks.map(|t| t.path()).any(|t| text(&t, "comm") == "second\n" && text(&t, "syscall").starts_with(&futex))
}

fn wait_at_the_gate(job: &Job<'_>) -> Outcome<()> {
    wait_for("thread \"second\" waits at the gate", || {
        guests(job).iter().any(waits_at_the_gate).then_some(())
    })
}

fn start_dump(job: &Job<'_>, options: &[&str]) -> Outcome<Running> {
    job.start(&[&["dump", job.name.as_str(), "--json"], options].concat(), &[])
}

fn json(finished: &Finished) -> Outcome<serde_json::Value> {
    if finished.code != 0 {
        return Err(Failure(finished.report()));
    }
    serde_json::from_str(&finished.stdout)
        .map_err(|error| Failure(format!("no JSON: {error}\n{}", finished.report())))
}

/// Who was late, in the words of `dump --json`.
fn late(finished: &Finished) -> Outcome<Vec<serde_json::Value>> {
    let said = json(finished)?;
    let list = said.pointer("/barrier/late").and_then(serde_json::Value::as_array).cloned();
    list.ok_or_else(|| Failure(format!("no barrier.late:\n{}", finished.report())))
}

fn ensure(so: bool, what: &str, finished: &Finished) -> Outcome<()> {
    if so { Ok(()) } else { Err(Failure(format!("{what}\n{}", finished.report()))) }
}

fn all_open(job: &Job<'_>) -> Outcome<()> {
    for process in guests(job) {
        if gate_of(process).is_some_and(|gate| gate != GATE_OPEN) {
            return Err(Failure(format!("the gate of process {} was left closed", process.pid)));
        }
    }
    Ok(())
}

fn restored(job: &Job<'_>, sandbox: &Sandbox, nonce: &str) -> Outcome<()> {
    job.kill()?;
    job.restore(None, &[])?;
    all_open(job)?;
    passes(sandbox, nonce)
}

fn flow(label: &str, guest: &Guest, flow: impl Fn(&Sandbox, &Job<'_>, &str) -> Outcome<()>) {
    each_ready_job(label, Users::Both, guest, flow);
}

fn guest(action: &str) -> Guest {
    Guest::new("barrier").arg(action)
}

/// While a posix_spawn is half-way a dump has begun, and the guest is told to do `action`: with the interceptor that waits
/// at the gate until the dump has frozen the job, and comes to its end in the job that runs on or is restored.
fn held(action: &str, options: &[&str], meanwhile: impl Fn(&Sandbox, &Job<'_>) -> Outcome<()>) {
    flow(&format!("barrier-held-{action}"), &guest(action), |sandbox, job, nonce| {
        let main = guests(job)[0];
        let dump = start_dump(job, &[&["--barrier-timeout", LONG], options].concat())?;
        wait_closed(main)?;
        touch(sandbox, "second")?;
        meanwhile(sandbox, job)?;
        wait_at_the_gate(job)?;
        if sandbox.work.join("done").exists() {
            return Err(Failure(format!("{action} did not wait at the gate")));
        }
        open_fifo(sandbox)?;
        let dumped = dump.finish(COMMAND_DEADLINE)?;
        ensure(late(&dumped)?.is_empty(), "somebody is said to be late", &dumped)?;
        // It runs on, and so does what was saved.
        wait_for_file(sandbox, "done")?;
        all_open(job)?;
        fs::remove_file(sandbox.work.join("done")).map_err(|error| Failure(error.to_string()))?;
        restored(job, sandbox, nonce)?;
        wait_for_file(sandbox, "done")
    });
}

/// As `held`, but nothing holds the action: it is done while the dump waits for the first posix_spawn, and the dump is made
/// all the same.
fn not_held(action: &str, guest: &Guest) {
    flow(&format!("barrier-not-held-{action}-{}", guest.interceptor), guest, |sandbox, job, nonce| {
        let dump = start_dump(job, &["--barrier-timeout", LONG])?;
        if guest.interceptor {
            wait_closed(guests(job)[0])?;
        }
        for name in ["second", "third", "signal"] {
            touch(sandbox, name)?;
        }
        wait_for_file(sandbox, "done")?;
        open_fifo(sandbox)?;
        let dumped = dump.finish(COMMAND_DEADLINE)?;
        ensure(late(&dumped)?.is_empty(), "somebody is said to be late", &dumped)?;
        restored(job, sandbox, nonce)
    });
}

fn nothing(_: &Sandbox, _: &Job<'_>) -> Outcome<()> {
    Ok(())
}

#[test]
fn posix_spawn_waits_at_the_gate() {
    held("posix_spawn", &[], nothing);
}

#[test]
fn posix_spawnp_waits_at_the_gate() {
    held("posix_spawnp", &["--engine", "copy"], nothing);
}

#[test]
fn vfork_waits_at_the_gate() {
    held("vfork", &[], nothing);
}

#[test]
fn sendmsg_with_descriptors_waits_at_the_gate() {
    held("sendmsg", &[], nothing);
}

#[test]
fn sendmmsg_with_descriptors_waits_at_the_gate() {
    held("sendmmsg", &[], nothing);
}

#[test]
fn a_child_forked_while_the_gate_is_closed_waits_at_it() {
    held("fork", &[], nothing);
}

#[test]
fn a_program_executed_while_the_gate_is_closed_gets_its_own_closed() {
    held("exec", &[], |sandbox, job| {
        let executed = |process: &HostProcess| {
            let words = fs::read_to_string(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            words.ends_with("executed\0")
        };
        wait_for("the new program's gate is closed", || {
            guests(job).into_iter().find(executed).filter(|p| gate_of(*p) == Some(GATE_CLOSED))
        })?;
        touch(sandbox, "third")
    });
}

#[test]
fn a_signal_handler_may_come_to_the_gate_of_a_waiter() {
    held("handler", &[], |sandbox, job| {
        wait_at_the_gate(job)?;
        touch(sandbox, "signal")?;
        wait_for_file(sandbox, "handled")?;
        wait_at_the_gate(job)?;
        if sandbox.work.join("handler-done").exists() {
            return Err(Failure::new("the handler did not wait"));
        }
        Ok(())
    });
}

#[test]
fn a_waiter_may_be_cancelled() {
    held("cancel", &[], |sandbox, job| {
        wait_at_the_gate(job)?;
        touch(sandbox, "signal")?;
        wait_for_file(sandbox, "handled")
    });
}

/// Nothing is left behind of a call that never came back.
#[test]
fn a_signal_handler_may_jump_out_of_the_gate() {
    flow("barrier-jump", &guest("jump"), |sandbox, job, nonce| {
        let dump = start_dump(job, &["--barrier-timeout", LONG])?;
        wait_closed(guests(job)[0])?;
        touch(sandbox, "second")?;
        wait_at_the_gate(job)?;
        touch(sandbox, "signal")?;
        wait_for_file(sandbox, "done")?;
        open_fifo(sandbox)?;
        let dumped = dump.finish(COMMAND_DEADLINE)?;
        ensure(late(&dumped)?.is_empty(), "somebody is said to be late", &dumped)?;
        restored(job, sandbox, nonce)
    });
}

/// What fails if the interceptor holds nothing: without it, each action is done at once.
#[test]
fn nothing_is_held_without_interceptor() {
    let spawning = ["posix_spawn", "posix_spawnp", "vfork", "fork", "exec", "handler"];
    for action in spawning.into_iter().chain(["sendmsg", "sendmmsg", "cancel"]) {
        not_held(action, &guest(action).without_interceptor());
    }
}

#[test]
fn what_need_not_wait_does_not() {
    // system(3) starts its program inside libc.
    for action in ["system", "plain", "wrong"] {
        not_held(action, &guest(action));
    }
}

/// Who is late is named, the dump refused, and the job runs on with its gate open.
#[test]
fn strict_refuses_and_names_who_is_late() {
    for guest in [guest("posix_spawn"), guest("posix_spawn").without_interceptor()] {
        flow(&format!("barrier-strict-{}", guest.interceptor), &guest, |sandbox, job, nonce| {
            let check = job.succeed(&["check", &job.name, "--json"], &[])?;
            let waited = json(&check)?["waits_for"][0].clone();
            let named = waited["pid"] == 2 && waited["tid"] == 3 && waited["program"] == "first";
            ensure(named, "check does not say who is waited for", &check)?;
            for timeout in ["0", "300ms"] {
                let words = ["dump", &job.name, "--strict", "--barrier-timeout", timeout];
                let refused = job.ckpt(&words, &[])?;
                ensure(refused.code == 119, "not refused as late", &refused)?;
                let who = "pid 2 thread 3 (first): a posix_spawn or vfork, whose child is pid ";
                ensure(refused.stderr.contains(who), &format!("it does not say {who:?}"), &refused)?;
                all_open(job)?;
            }
            touch(sandbox, "second")?;
            wait_for_file(sandbox, "done")?;
            open_fifo(sandbox)?;
            // Now that it is at a safe point.
            wait_for("a strict dump is made", || {
                let dumped = job.ckpt(&["dump", &job.name, "--strict"], &[]).ok()?;
                (dumped.code == 0).then_some(())
            })?;
            restored(job, sandbox, nonce)
        });
    }
}

/// Who is late is frozen all the same, and named. Needs a ckpt with the feature `test-hooks`.
#[test]
fn who_is_late_is_named_and_frozen_all_the_same() {
    for guest in [guest("posix_spawn"), guest("posix_spawn").without_interceptor()] {
        flow(&format!("barrier-late-{}", guest.interceptor), &guest, |sandbox, job, nonce| {
            let held = sandbox.work.join("held");
            let words = ["dump", &job.name, "--json", "--barrier-timeout", "200ms"];
            let dump = job.start(&words, &[("CKPT_TEST_BEFORE_FREEZE", &held.to_string_lossy())])?;
            wait_for_file(sandbox, "held")?;
            open_fifo(sandbox)?;
            fs::remove_file(&held).map_err(|error| Failure(error.to_string()))?;
            let dumped = dump.finish(COMMAND_DEADLINE)?;
            let late = late(&dumped)?;
            let field = |name: &str| late.first().and_then(|l| l.get(name)).cloned().unwrap_or_default();
            let named =
                late.len() == 1 && field("pid") == 2 && field("tid") == 3 && field("program") == "first";
            ensure(named, "not named, or somebody else", &dumped)?;
            ensure(field("for_ns").as_u64() >= Some(100_000_000), "not watched for so long", &dumped)?;
            let warned = json(&dumped)?["warnings"].to_string().contains("not at a safe point");
            ensure(warned, "no warning", &dumped)?;
            all_open(job)?;
            touch(sandbox, "second")?;
            restored(job, sandbox, nonce)
        });
    }
}

/// A vfork that has no end keeps its parent where nothing can stop it: both are named.
#[test]
fn a_vfork_without_end_is_named() {
    let guest = Guest::new("vfork_wait").arg("held").in_motion();
    flow("barrier-vfork-held", &guest, |sandbox, job, nonce| {
        let failed = job.ckpt(&["dump", &job.name, "--barrier-timeout", "0"], &[])?;
        let who = "pid 3: did not stop within 5 s: it waits for its vfork's child, pid 4, which neither";
        ensure(
            failed.code == 1 && failed.stderr.contains(who),
            &format!("it does not say {who:?}"),
            &failed,
        )?;
        touch(sandbox, "leave")?;
        job.dump(&["--barrier-timeout", LONG])?;
        restored(job, sandbox, nonce)
    });
}

/// The memory that it lends is watched for incremental dumps.
#[test]
fn a_vfork_of_a_watched_process_is_waited_for() {
    flow("barrier-vfork-watched", &Guest::new("vfork_wait").in_motion(), |sandbox, job, nonce| {
        for _ in 0..4 {
            job.dump(&["--incremental", "--barrier-timeout", LONG])?;
        }
        restored(job, sandbox, nonce)
    });
}

/// A dumper that is killed while it waits leaves the gate closed, but not for long.
#[test]
fn the_gate_opens_by_itself_when_the_dumper_is_killed() {
    flow("barrier-killed", &guest("posix_spawn"), |sandbox, job, nonce| {
        let main = guests(job)[0];
        let dump = start_dump(job, &["--barrier-timeout", LONG])?;
        wait_closed(main)?;
        touch(sandbox, "second")?;
        wait_at_the_gate(job)?;
        let dumper = HostProcess::find(dump.pid()).ok_or_else(|| Failure::new("the dumper has ended"))?;
        dumper.tree().into_iter().rev().for_each(|p| p.signal(Signal::SIGKILL));
        let killed = Instant::now();
        wait_for_file(sandbox, "done")?;
        let took = killed.elapsed();
        if gate_of(main) != Some(GATE_CLOSED) {
            return Err(Failure::new("somebody has opened the gate"));
        }
        sandbox.record(&format!("(it went on {took:?} after the kill)"));
        drop(dump);
        // The next one opens it, whether it has something to wait for or not.
        open_fifo(sandbox)?;
        wait_for_file(sandbox, "done")?;
        job.dump(&["--barrier-timeout", "0"])?;
        all_open(job)?;
        if gate_of(main) != Some(GATE_OPEN) {
            return Err(Failure::new("the gate was left closed by the next dump"));
        }
        restored(job, sandbox, nonce)
    });
}

/// The control word is found in a restored job, too, and its gate works there.
#[test]
fn the_gate_works_in_a_restored_job() {
    flow("barrier-restored", &guest("posix_spawn"), |sandbox, job, nonce| {
        open_fifo(sandbox)?;
        job.dump(&[])?;
        job.kill()?;
        job.restore(None, &[])?;
        let main = guests(job)[0];
        if gate_of(main) != Some(GATE_OPEN) {
            return Err(Failure::new("no control word, or a closed gate, in the restored job"));
        }
        // By hand, with a deadline that never comes.
        let word = ControlWord::find(Pid::from_raw(main.pid));
        let word = word.ok_or_else(|| Failure::new("no control word in the restored job"))?;
        let write = |offset, bytes: &[u8]| {
            word.write(offset, bytes).map_err(|error| Failure(format!("the control word: {error}")))
        };
        write(offset_of!(Control, gate_deadline_ns), &i64::MAX.to_le_bytes())?;
        write(offset_of!(Control, gate), &GATE_CLOSED.to_le_bytes())?;
        touch(sandbox, "second")?;
        wait_at_the_gate(job)?;
        write(offset_of!(Control, gate), &GATE_OPEN.to_le_bytes())?;
        wait_for_file(sandbox, "done")?;
        passes(sandbox, nonce)
    });
}

#[test]
fn without_interceptor_there_is_no_gate() {
    flow("barrier-none", &guest("plain").without_interceptor(), |sandbox, job, nonce| {
        if guests(job).into_iter().any(|p| gate_of(p).is_some()) {
            return Err(Failure::new("a control word without interceptor"));
        }
        touch(sandbox, "second")?;
        open_fifo(sandbox)?;
        job.dump(&[])?;
        restored(job, sandbox, nonce)
    });
}

/// Descriptors that are on their way are waited for, with and without interceptor.
#[test]
fn descriptors_on_their_way_are_waited_for() {
    for guest in [
        Guest::new("rights_on_their_way").arg("once"),
        Guest::new("rights_on_their_way").arg("once").without_interceptor(),
        Guest::new("rights_on_their_way").arg("once").linked_statically(),
    ] {
        let label = format!("barrier-rights-{}-{}", guest.interceptor, guest.is_static);
        flow(&label, &guest, |sandbox, job, nonce| {
            let check = job.succeed(&["check", &job.name], &[])?;
            let said =
                check.stdout.contains("): the receiving of descriptors (SCM_RIGHTS) at unix socket fd ");
            ensure(said, "it does not say what is waited for", &check)?;
            let refused = job.ckpt(&["dump", &job.name, "--barrier-timeout", "200ms"], &[])?;
            let said = refused.stderr.contains("descriptors on their way");
            ensure(refused.code == 114 && said, "not refused", &refused)?;
            let strict = job.ckpt(&["dump", &job.name, "--barrier-timeout", "200ms", "--strict"], &[])?;
            let said = strict.stderr.contains("receiving of descriptors (SCM_RIGHTS) at unix socket fd ");
            ensure(strict.code == 119 && said, "not refused as late", &strict)?;
            let dump = start_dump(job, &["--barrier-timeout", LONG])?;
            touch(sandbox, "receive")?;
            let dumped = dump.finish(COMMAND_DEADLINE)?;
            ensure(late(&dumped)?.is_empty(), "somebody is said to be late", &dumped)?;
            restored(job, sandbox, nonce)
        });
    }
}

/// Where there is always a descriptor on its way, only the interceptor makes a moment at which there is none.
#[test]
fn a_moment_without_descriptors_on_their_way_is_made() {
    let guest = Guest::new("rights_on_their_way").arg("always").in_motion();
    flow("barrier-always", &guest, |sandbox, job, nonce| {
        for _ in 0..5 {
            let dumped = job.dump(&["--json"])?;
            ensure(late(&dumped)?.is_empty(), "somebody is said to be late", &dumped)?;
            all_open(job)?;
        }
        restored(job, sandbox, nonce)
    });
    let guest = guest.without_interceptor();
    flow("barrier-always-without", &guest, |sandbox, job, nonce| {
        let refused = job.ckpt(&["dump", &job.name, "--barrier-timeout", "300ms"], &[])?;
        let said = refused.stderr.contains("descriptors on their way");
        ensure(refused.code == 114 && said, "not refused", &refused)?;
        passes(sandbox, nonce)
    });
}

/// Many dumps of a job that never stops starting programs and lending its memory: none is late with the interceptor.
#[test]
fn a_job_that_always_starts_programs() {
    let script = "while :; do /bin/true; done";
    each_user("barrier-make", Users::Both, |sandbox| {
        let words = ["/usr/bin/env", "sh", "-c", &format!("({script}) & ({script}) & {script}")];
        let job = Job::run(sandbox, "busy", Default::default(), &words.map(String::from))?;
        for _ in 0..5 {
            let dumped = job.dump(&["--json"])?;
            ensure(late(&dumped)?.is_empty(), "somebody is said to be late", &dumped)?;
        }
        Ok(())
    });
}
