// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hooks of the application (`include/ckpt-hooks.h`): callbacks around dumps, critical sections, dumps that it asks for, and what
//! restored copies are told. All but those that say so need the interceptor.

use std::{fs, mem::offset_of, path::Path, process::Command, time::Duration};

use ckpt_abi::hooks::{ANSWER_FAILED, HOOKS_OFFSET, Hooks, MOST_SECTIONS, answer};
use ckpt_abi::interceptor::Control;
use ckpt_engine::dump::control_word::ControlWord;
use ckpt_tests::{
    Failure, Outcome, announce,
    fingerprint::Fingerprint,
    guest::{GUEST_DEADLINE, Guest, Talk, passes},
    job::{COMMAND_DEADLINE, Job},
    process::{HostProcess, Running, poll_until},
    proof::{control, each_user, left_nothing_behind, prove, prove_static, with_ready_job},
    sandbox::Sandbox,
    user::Users,
};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// `ckpt dump`: something is not supported, or not now.
const REFUSED: i32 = 114;
/// `ckpt dump --strict`: a process was late.
const LATE: i32 = 119;
/// How long a process waits for the end of a dump, with a barrier of 0.1 s, and much more.
const LEFT_ALONE: Duration = Duration::from_secs(60);

fn expect(condition: bool, what: impl Into<String>) -> Outcome<()> {
    if condition { Ok(()) } else { Err(Failure(what.into())) }
}

fn events(sandbox: &Sandbox) -> Vec<String> {
    let text = fs::read_to_string(sandbox.work.join("events")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// The events without pids and whatever follows them.
fn names(events: &[String]) -> Vec<String> {
    events.iter().map(|e| e.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect()
}

/// Waits until so many events have happened, and then for no more than these.
fn expect_events(sandbox: &Sandbox, expected: &[&str]) -> Outcome<Vec<String>> {
    let got = poll_until(GUEST_DEADLINE, || {
        let got = events(sandbox);
        (got.len() >= expected.len()).then_some(got)
    });
    let got = got.unwrap_or_else(|| events(sandbox));
    expect(names(&got) == expected, format!("expected {expected:?}, got {got:?}"))?;
    Ok(got)
}

fn tell(sandbox: &Sandbox, name: &str) -> Outcome<()> {
    sandbox.record(&format!("({name})"));
    fs::write(sandbox.work.join(name), "").map_err(|error| Failure(format!("cannot create {name}: {error}")))
}

fn untell(sandbox: &Sandbox, name: &str) -> Outcome<()> {
    sandbox.record(&format!("(no {name})"));
    fs::remove_file(sandbox.work.join(name))
        .map_err(|error| Failure(format!("cannot remove {name}: {error}")))
}

/// Go, and the end of a job; the verdict is looked at later.
fn ended(sandbox: &Sandbox, job: &Job<'_>) -> Outcome<()> {
    Talk::with(sandbox).go()?;
    poll_until(GUEST_DEADLINE, || job.init().is_none().then_some(()))
        .ok_or_else(|| Failure(format!("{} does not end", job.name)))
}

/// Go, and the verdict.
fn finish(sandbox: &Sandbox, nonce: &str) -> Outcome<()> {
    passes(sandbox, nonce)?;
    Talk::with(sandbox).check_log(nonce)
}

fn callbacks(label: &str, flow: impl Fn(&Sandbox, &Job<'_>) -> Outcome<()>) {
    mode(label, &["callbacks"], flow);
}

fn mode(label: &str, args: &[&str], flow: impl Fn(&Sandbox, &Job<'_>) -> Outcome<()>) {
    let mut guest = Guest::new("hooks");
    guest.args = args.iter().copied().map(String::from).collect();
    each_user(&format!("hooks-{label}"), Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            flow(sandbox, job)?;
            finish(sandbox, nonce)
        })
    });
}

const DUMPED: [&str; 2] = ["dump b", "dump a"];
const RESUMED: [&str; 2] = ["resume a", "resume b"];
const RESTORED: [&str; 2] = ["restore a", "restore b"];

#[test]
fn the_guest_runs_without_ckpt() {
    control(&Guest::new("hooks"));
}

#[test]
fn without_interceptor_all_is_dumped_and_restored() {
    prove(&Guest::new("hooks").without_interceptor());
    prove(&Guest::new("hooks").arg("section").without_interceptor());
}

#[test]
fn linked_statically_all_is_dumped_and_restored() {
    prove_static(&Guest::new("hooks"));
}

#[test]
fn without_interceptor_nothing_is_called() {
    let guest = Guest::new("hooks").without_interceptor();
    each_user("hooks-alone", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            job.restore(None, &[])?;
            finish(sandbox, nonce)?;
            let got = events(sandbox);
            expect(got == ["alone"], format!("{got:?}"))
        })
    });
}

#[test]
fn each_dump_has_an_end() {
    callbacks("dump", |sandbox, job| {
        let init = job.init().ok_or_else(|| Failure::new("no init"))?;
        let before = Fingerprint::take(init);
        job.dump(&[])?;
        expect_events(sandbox, &[DUMPED, RESUMED].concat())?;
        left_nothing_behind(&before, init)?;
        job.dump(&["--engine", "copy"])?;
        expect_events(sandbox, &[DUMPED, RESUMED, DUMPED, RESUMED].concat()).map(drop)
    });
}

#[test]
fn a_restored_job_is_told() {
    callbacks("restored", |sandbox, job| {
        job.dump(&["--stop"])?;
        job.restore(None, &[])?;
        let got = expect_events(sandbox, &[DUMPED, RESTORED].concat())?;
        let told = "restores=1 of=1 copy=0/0 checkpoint=1 name=guest";
        expect(got[2].ends_with(told) && got[3].ends_with(told), format!("{got:?}"))
    });
}

#[test]
fn a_job_that_is_restored_lazily_is_told() {
    let guest = Guest::new("hooks").arg("callbacks").arg("8192");
    each_user("hooks-lazy", Users::OnlyRoot, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            job.dump(&["--stop"])?;
            // Nothing is fetched but what somebody waits for.
            let held = [("CKPT_TEST_PAGE_SERVER", "kill:/nonexistent")];
            job.succeed(&["restore", &job.name, "--detach", "--lazy"], &held)?;
            expect_events(sandbox, &[DUMPED, RESTORED].concat())?;
            finish(sandbox, nonce)
        })
    });
}

#[test]
fn hooks_that_are_registered_after_a_restore_are_not_told_of_it() {
    mode("later", &["later"], |sandbox, job| {
        job.dump(&["--stop"])?;
        job.restore(None, &[])?;
        tell(sandbox, "enlist")?;
        expect_events(sandbox, &["enlisted"])?;
        // What has been asked before comes before this.
        job.dump(&[])?;
        expect_events(sandbox, &["enlisted", "dump a", "resume a"]).map(drop)
    });
}

#[test]
fn generations_are_counted() {
    callbacks("generations", |sandbox, job| {
        let mut expected = Vec::new();
        for generation in 1..=3 {
            job.dump(&[])?;
            expected.extend([DUMPED, RESUMED].concat());
            expect_events(sandbox, &expected)?;
            job.kill()?;
            job.restore(None, &[])?;
            expected.extend(RESTORED);
            let got = expect_events(sandbox, &expected)?;
            let told = format!("restores={generation} of=1 copy=0/0 checkpoint={generation} name=guest");
            expect(got.last().is_some_and(|e| e.ends_with(&told)), format!("{got:?}"))?;
        }
        Ok(())
    });
}

#[test]
fn copies_are_told_which_they_are() {
    callbacks("copies", |sandbox, job| {
        job.dump(&["--stop"])?;
        job.restore(None, &[])?;
        expect_events(sandbox, &[DUMPED, RESTORED].concat())?;
        job.kill()?;
        job.succeed(&["restore", &job.name, "--copies", "2", "--name", "twin"], &[])?;
        let twins = [job.adopt("twin-1"), job.adopt("twin-2")];
        let mut got = poll_until(GUEST_DEADLINE, || Some(events(sandbox)).filter(|all| all.len() >= 8))
            .ok_or_else(|| Failure(format!("{:?}", events(sandbox))))?;
        let mut told: Vec<_> =
            got.drain(4..).filter_map(|e| Some(e.split_once("restores=")?.1.to_owned())).collect();
        told.sort();
        let first = "1 of=2 copy=1/2 checkpoint=1 name=twin-1";
        let second = "1 of=3 copy=2/2 checkpoint=1 name=twin-2";
        expect(told == [first, first, second, second], format!("{told:?}"))?;
        // One of them goes on while both are held here.
        twins[1].kill()?;
        ended(sandbox, &twins[0])
    });
}

#[test]
fn a_dump_that_fails_has_an_end_too() {
    callbacks("failed", |sandbox, job| {
        let mut expected = Vec::new();
        // Its files may not grow: it fails when the job runs again.
        let dump = format!("trap '' XFSZ; ulimit -f 1; {}", "true");
        let failed = job.ckpt_after(&dump, &["dump", &job.name])?;
        expect(failed.code != 0 && failed.code < 128, failed.report())?;
        expected.extend([DUMPED, RESUMED].concat());
        expect_events(sandbox, &expected)?;
        // An on_dump objects: the other one is not asked any more.
        tell(sandbox, "veto")?;
        let refused = job.ckpt(&["dump", &job.name], &[])?;
        let named = refused.stderr.contains("on_dump asks for no dump");
        expect(refused.code == REFUSED && named, refused.report())?;
        expected.extend(["dump b", "resume b"]);
        expect_events(sandbox, &expected)?;
        untell(sandbox, "veto")?;
        job.dump(&[])?;
        expected.extend([DUMPED, RESUMED].concat());
        expect_events(sandbox, &expected).map(drop)
    });
}

#[test]
fn a_check_says_that_hooks_decide() {
    callbacks("check", |sandbox, job| {
        let check = job.succeed(&["check", &job.name], &[])?;
        expect(check.stdout.contains("unless an on_dump objects: pid 2, with hooks"), check.report())?;
        expect(events(sandbox).is_empty(), format!("{:?}", events(sandbox)))
    });
    mode("check-closes", &["closes"], |sandbox, job| {
        let check = job.ckpt(&["check", &job.name], &[])?;
        let said = check.stderr.contains("after the on_dump of pid 2, with hooks, which may close");
        expect(check.code == REFUSED && said, check.report())?;
        job.dump(&[])?;
        expect_events(sandbox, &["dump a", "resume a"]).map(drop)
    });
}

#[test]
fn a_dumper_that_is_killed_is_not_waited_for_for_ever() {
    callbacks("killed", |sandbox, job| {
        let moment = sandbox.root.join("out").join("before-freeze");
        sandbox.user.give(&sandbox.root.join("out"))?;
        let path = moment.to_string_lossy().into_owned();
        let words = ["dump", &job.name, "--barrier-timeout", "100ms"];
        let dumper = job.start(&words, &[("CKPT_TEST_BEFORE_FREEZE", &path)])?;
        poll_until(COMMAND_DEADLINE, || moment.exists().then_some(()))
            .ok_or_else(|| Failure::new("the dump did not come to its freeze"))?;
        send(&dumper, Signal::SIGKILL)?;
        let ended = dumper.finish(COMMAND_DEADLINE)?;
        expect(ended.code != 0, ended.report())?;
        expect_events(sandbox, &DUMPED)?;
        let expected = [DUMPED, RESUMED].concat();
        poll_until(LEFT_ALONE, || (events(sandbox).len() >= 4).then_some(()))
            .ok_or_else(|| Failure(format!("never: {:?}", events(sandbox))))?;
        expect_events(sandbox, &expected)?;
        job.dump(&[])?;
        expect_events(sandbox, &[DUMPED, RESUMED, DUMPED, RESUMED].concat()).map(drop)
    });
}

#[test]
fn a_dump_that_its_processes_have_given_up_is_no_strict_one() {
    callbacks("given-up", |sandbox, job| {
        sandbox.user.give(&sandbox.root.join("out"))?;
        let moment = sandbox.root.join("out").join("before-freeze");
        let path = moment.to_string_lossy().into_owned();
        let words = ["dump", &job.name, "--barrier-timeout", "100ms", "--strict"];
        let dumper = job.start(&words, &[("CKPT_TEST_BEFORE_FREEZE", &path)])?;
        poll_until(COMMAND_DEADLINE, || moment.exists().then_some(()))
            .ok_or_else(|| Failure::new("the dump did not come to its freeze"))?;
        let expected = [DUMPED, RESUMED].concat();
        poll_until(LEFT_ALONE, || (events(sandbox).len() >= expected.len()).then_some(()))
            .ok_or_else(|| Failure(format!("never: {:?}", events(sandbox))))?;
        fs::remove_file(&moment).map_err(|error| Failure(format!("letting it go on: {error}")))?;
        let dumped = dumper.finish(COMMAND_DEADLINE)?;
        let named = dumped.stderr.contains("what its on_resume has begun");
        expect(dumped.code == LATE && named, dumped.report())?;
        expect_events(sandbox, &expected).map(drop)
    });
}

fn send(dumper: &Running, signal: Signal) -> Outcome<()> {
    nix::sys::signal::kill(Pid::from_raw(dumper.pid()), signal)
        .map_err(|error| Failure(format!("{signal}: {error}")))
}

/// No directory of an unfinished checkpoint is there.
fn nothing_unfinished(sandbox: &Sandbox, job: &Job<'_>) -> Outcome<()> {
    let entries = fs::read_dir(sandbox.store.join(&job.name)).into_iter().flatten().flatten();
    let names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    expect(!names.iter().any(|name| name.ends_with(".partial")), format!("left: {names:?}"))
}

/// The dumper ends by its own will, with the signal's status, and leaves nothing.
fn interrupted(sandbox: &Sandbox, job: &Job<'_>, dumper: Running, signal: Signal) -> Outcome<()> {
    send(&dumper, signal)?;
    let ended = dumper.finish(COMMAND_DEADLINE)?;
    let said = ended.stderr.contains(&format!("interrupted by {signal}; the job runs on"));
    expect(ended.code == 128 + signal as i32 && said, ended.report())?;
    nothing_unfinished(sandbox, job)
}

#[test]
fn a_dump_that_is_interrupted_has_an_end_at_once() {
    mode("interrupted", &["guarded"], |sandbox, job| {
        let mut expected = Vec::new();
        // The process would wait for 20 s and twice this time by itself.
        let words = ["dump", &job.name, "--barrier-timeout", "200s"];
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            let dumper = job.start(&words, &[])?;
            expected.push("dump a");
            expect_events(sandbox, &expected)?;
            interrupted(sandbox, job, dumper, signal)?;
            expected.push("resume a");
            expect_events(sandbox, &expected)?;
        }
        tell(sandbox, "hold")?;
        let dumper = job.start(&words, &[])?;
        expected.push("dump a");
        expect_events(sandbox, &expected)?;
        interrupted(sandbox, job, dumper, Signal::SIGINT)?;
        untell(sandbox, "hold")?;
        expected.push("resume a");
        expect_events(sandbox, &expected)?;
        tell(sandbox, "leave")?;
        job.dump(&[])?;
        expected.extend(["dump a", "resume a"]);
        expect_events(sandbox, &expected).map(drop)
    });
}

#[test]
fn a_dump_that_is_interrupted_while_it_writes_leaves_nothing() {
    mode("interrupted-late", &["callbacks", "16384"], |sandbox, job| {
        let init = job.init().ok_or_else(|| Failure::new("no init"))?;
        let before = Fingerprint::take(init);
        // Minutes, if it is not interrupted.
        let dumper = job.start(&["dump", &job.name, "--io-limit", "50K"], &[])?;
        expect_events(sandbox, &[DUMPED, RESUMED].concat())?;
        interrupted(sandbox, job, dumper, Signal::SIGTERM)?;
        left_nothing_behind(&before, init)?;
        job.dump(&[]).map(drop)
    });
}

#[test]
fn a_second_signal_ends_a_dump_that_does_not_heed_the_first() {
    callbacks("interrupted-twice", |sandbox, job| {
        let moment = sandbox.root.join("out").join("before-freeze");
        sandbox.user.give(&sandbox.root.join("out"))?;
        let dumper =
            job.start(&["dump", &job.name], &[("CKPT_TEST_BEFORE_FREEZE", &moment.to_string_lossy())])?;
        poll_until(COMMAND_DEADLINE, || moment.exists().then_some(()))
            .ok_or_else(|| Failure::new("the dump did not come to its freeze"))?;
        send(&dumper, Signal::SIGINT)?;
        send(&dumper, Signal::SIGTERM)?;
        let ended = dumper.finish(COMMAND_DEADLINE)?;
        expect(ended.code > 128 && moment.exists(), ended.report())?;
        // What is left goes with the next one.
        job.dump(&[])?;
        nothing_unfinished(sandbox, job)
    });
}

#[test]
fn the_next_dump_ends_that_of_a_dumper_that_was_killed() {
    callbacks("killed-again", |sandbox, job| {
        let moment = sandbox.root.join("out").join("before-freeze");
        sandbox.user.give(&sandbox.root.join("out"))?;
        let path = moment.to_string_lossy().into_owned();
        // Long enough that nobody gives it up by himself.
        let words = ["dump", &job.name, "--barrier-timeout", "60s"];
        let dumper = job.start(&words, &[("CKPT_TEST_BEFORE_FREEZE", &path)])?;
        poll_until(COMMAND_DEADLINE, || moment.exists().then_some(()))
            .ok_or_else(|| Failure::new("the dump did not come to its freeze"))?;
        send(&dumper, Signal::SIGKILL)?;
        dumper.finish(COMMAND_DEADLINE)?;
        job.dump(&[])?;
        expect_events(sandbox, &[DUMPED, RESUMED, DUMPED, RESUMED].concat()).map(drop)
    });
}

#[test]
fn who_does_not_answer_is_named() {
    callbacks("late", |sandbox, job| {
        tell(sandbox, "hold")?;
        let strict = job.ckpt(&["dump", &job.name, "--barrier-timeout", "300ms", "--strict"], &[])?;
        let named = strict.stderr.contains("(ckpt-hooks): its on_dump has been under way");
        expect(strict.code == LATE && named, strict.report())?;
        untell(sandbox, "hold")?;
        let mut expected = [DUMPED, RESUMED].concat();
        expect_events(sandbox, &expected)?;
        tell(sandbox, "hold")?;
        let dumped = job.dump(&["--barrier-timeout", "300ms"])?;
        expect(dumped.stderr.contains("its on_dump has been under way"), dumped.report())?;
        job.kill()?;
        // In the image the first of them has not returned.
        expected.push("dump b");
        expect_events(sandbox, &expected)?;
        untell(sandbox, "hold")?;
        job.restore(None, &[])?;
        expected.extend(["dump a", "restore a", "restore b"]);
        expect_events(sandbox, &expected).map(drop)
    });
}

#[test]
fn with_a_barrier_of_zero_nobody_is_asked() {
    callbacks("zero", |sandbox, job| {
        job.dump(&["--barrier-timeout", "0"])?;
        job.kill()?;
        job.restore(None, &[])?;
        expect_events(sandbox, &RESTORED).map(drop)
    });
}

/// Events by pid, in the order of pids.
fn by_process(sandbox: &Sandbox, count: usize) -> Outcome<Vec<Vec<String>>> {
    let got = poll_until(GUEST_DEADLINE, || Some(events(sandbox)).filter(|all| all.len() >= count))
        .ok_or_else(|| Failure(format!("fewer than {count}: {:?}", events(sandbox))))?;
    expect(got.len() == count, format!("more than {count}: {got:?}"))?;
    let mut all = std::collections::BTreeMap::<i32, Vec<String>>::new();
    for event in &got {
        let pid = event.split(' ').nth(2).and_then(|pid| pid.parse().ok()).unwrap_or(0);
        all.entry(pid).or_default().extend(names(std::slice::from_ref(event)));
    }
    Ok(all.into_values().collect())
}

#[test]
fn each_process_has_its_own() {
    mode("family", &["family"], |sandbox, job| {
        job.dump(&[])?;
        by_process(sandbox, 4)?;
        job.kill()?;
        job.restore(None, &[])?;
        let got = by_process(sandbox, 6)?;
        let expected = [["dump a", "resume a", "restore a"], ["dump b", "resume b", "restore b"]];
        expect(got == expected, format!("{got:?}"))
    });
}

#[test]
fn nothing_is_dumped_in_a_critical_section() {
    mode("section", &["section"], |sandbox, job| {
        let named =
            "it is in a critical section and must not be dumped; the one begun last is \"the outer one\"";
        for more in [&["--barrier-timeout", "300ms"][..], &["--barrier-timeout", "0"], &["--strict"]] {
            let refused = job.ckpt(&[&["dump", &job.name], more].concat(), &[])?;
            let said = refused.stderr.contains(named) && refused.stderr.contains("pid ");
            expect(refused.code == REFUSED && said, refused.report())?;
        }
        let check = job.succeed(&["check", &job.name], &[])?;
        expect(check.stdout.contains("a critical section (begun last: \"the outer one\")"), check.report())?;
        expect(events(sandbox).is_empty(), format!("{:?}", events(sandbox)))?;
        let dumper = job.start(&["dump", &job.name, "--barrier-timeout", "60s"], &[])?;
        tell(sandbox, "leave")?;
        let dumped = dumper.finish(COMMAND_DEADLINE)?;
        expect(dumped.code == 0, dumped.report())?;
        let left = events(sandbox);
        expect(left == ["left"], format!("dumped in the section: {left:?}"))?;
        job.kill()?;
        job.restore(None, &[]).map(drop)
    });
}

#[test]
fn a_section_ends_with_its_process() {
    mode("dies", &["dies"], |sandbox, job| {
        let refused = job.ckpt(&["dump", &job.name, "--barrier-timeout", "300ms"], &[])?;
        expect(refused.code == REFUSED, refused.report())?;
        tell(sandbox, "die")?;
        expect_events(sandbox, &["died"])?;
        job.dump(&["--strict"])?;
        job.kill()?;
        job.restore(None, &[]).map(drop)
    });
}

#[test]
fn a_section_ends_with_its_thread() {
    mode("ends", &["ends"], |sandbox, job| {
        let refused = job.ckpt(&["dump", &job.name, "--barrier-timeout", "300ms"], &[])?;
        let said = refused.stderr.contains("in a critical section");
        expect(refused.code == REFUSED && said, refused.report())?;
        tell(sandbox, "die")?;
        expect_events(sandbox, &["died"])?;
        job.dump(&["--strict"])?;
        let guest = job.processes().get(1).copied().ok_or_else(|| Failure::new("no guest"))?;
        let word = ControlWord::find(Pid::from_raw(guest.pid));
        let mut left = [1; 4 * MOST_SECTIONS];
        let read = word.map(|word| word.read(offset_of!(Control, sections), &mut left));
        expect(read.is_some_and(|read| read.is_ok()), "the control word can't be read")?;
        expect(left.iter().all(|byte| *byte == 0), format!("not forgotten: {left:?}"))?;
        job.kill()?;
        job.restore(None, &[]).map(drop)
    });
}

#[test]
fn short_sections_are_never_hit() {
    mode("steps", &["steps"], |_, job| {
        for _ in 0..4 {
            job.dump(&["--barrier-timeout", "20s"])?;
        }
        job.kill()?;
        job.restore(None, &[])?;
        job.dump(&["--barrier-timeout", "20s", "--engine", "copy"])?;
        job.kill()?;
        job.restore(None, &[]).map(drop)
    });
}

#[test]
fn sections_of_signal_handlers_are_sections() {
    mode("handlers", &["handlers"], |sandbox, job| {
        for _ in 0..2 {
            job.dump(&["--barrier-timeout", "20s"])?;
        }
        job.kill()?;
        job.restore(None, &[])?;
        tell(sandbox, "leave")
    });
}

// --- "Dump me now" ---

fn guest_now(sandbox: &Sandbox) -> Outcome<Vec<String>> {
    let mut guest = Guest::new("hooks");
    guest.args = ["now", "60000"].map(String::from).to_vec();
    guest.command(sandbox)
}

fn ready(sandbox: &Sandbox) -> Outcome<String> {
    Talk::with(sandbox).wait_ready()?.map_err(|verdict| Failure(format!("{verdict:?}")))
}

/// The dump that the guest asks for, and what it hears after it and after a restore from it.
fn asks(sandbox: &Sandbox, job: &Job<'_>, nonce: &str) -> Outcome<()> {
    tell(sandbox, "ask")?;
    let dumped = expect_events(sandbox, &["now 1"])?;
    expect(dumped == ["now 1 checkpoint=1 restores=0"], format!("{dumped:?}"))?;
    job.kill()?;
    job.restore(None, &[])?;
    let restored = expect_events(sandbox, &["now 1", "now 2"])?;
    expect(restored[1] == "now 2 checkpoint=1 restores=1", format!("{restored:?}"))?;
    finish(sandbox, nonce)
}

#[test]
fn the_application_asks_detached() {
    each_user("hooks-now-detached", Users::Both, |sandbox| {
        let job = Job::run_with(sandbox, "guest", &["--dump-on", "request"], &guest_now(sandbox)?)?;
        let nonce = ready(sandbox)?;
        asks(sandbox, &job, &nonce)
    });
}

#[test]
fn the_application_asks_attached() {
    each_user("hooks-now-attached", Users::Both, |sandbox| {
        let (job, running) =
            Job::run_attached(sandbox, "guest", &["--dump-on", "request"], &guest_now(sandbox)?)?;
        let nonce = ready(sandbox)?;
        asks(sandbox, &job, &nonce)?;
        running.finish(COMMAND_DEADLINE).map(drop)
    });
}

#[test]
fn the_application_asks_a_supervisor_that_is_there_for_something_else() {
    each_user("hooks-now-supervised", Users::Both, |sandbox| {
        let job = Job::run_with(sandbox, "guest", &["--every", "1d"], &guest_now(sandbox)?)?;
        let nonce = ready(sandbox)?;
        asks(sandbox, &job, &nonce)
    });
}

#[test]
fn an_application_that_nobody_hears_is_told_so() {
    mode("now-alone", &["now", "60000"], |sandbox, _| {
        tell(sandbox, "ask")?;
        let got = expect_events(sandbox, &["now -4"])?;
        expect(got == ["now -4 checkpoint=0 restores=0"], format!("{got:?}"))
    });
}

#[test]
fn an_application_hears_of_a_dump_that_fails() {
    each_user("hooks-now-failed", Users::OnlyPlain, |sandbox| {
        let job = Job::run_with(sandbox, "guest", &["--dump-on", "request"], &guest_now(sandbox)?)?;
        let nonce = ready(sandbox)?;
        // Nothing can be made in the store.
        let allow = |mode: u32| {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(sandbox.store.join("guest"), fs::Permissions::from_mode(mode))
                .map_err(|error| Failure(format!("chmod: {error}")))
        };
        allow(0o500)?;
        tell(sandbox, "ask")?;
        let got = expect_events(sandbox, &["now -2"]);
        allow(0o700)?;
        got?;
        job.dump(&[])?;
        finish(sandbox, &nonce)
    });
}

/// The supervisor of a job, which stands still.
fn stopped_supervisor(job: &Job<'_>) -> Outcome<HostProcess> {
    let supervisor = poll_until(GUEST_DEADLINE, || {
        let listed = job.succeed(&["ps", "--json"], &[]).ok()?;
        let jobs: serde_json::Value = serde_json::from_str(&listed.stdout).ok()?;
        let pid = jobs.as_array()?.first()?["supervision"]["state"]["pid"].as_i64().filter(|pid| *pid > 0)?;
        HostProcess::find(pid as i32)
    })
    .ok_or_else(|| Failure::new("no supervisor"))?;
    supervisor.signal(Signal::SIGSTOP);
    Ok(supervisor)
}

/// Waits until the guest, which has one thread, sleeps in futex(2): in its call for a dump, and nowhere else.
fn wait_for_call(job: &Job<'_>) -> Outcome<()> {
    let all = job.processes();
    let asks = || {
        all.iter().any(|p| {
            let call = fs::read_to_string(format!("/proc/{}/syscall", p.pid)).unwrap_or_default();
            call.split(' ').next() == Some(&nix::libc::SYS_futex.to_string())
        })
    };
    poll_until(GUEST_DEADLINE, || asks().then_some(()))
        .ok_or_else(|| Failure::new("the guest does not ask for a dump"))
}

/// Ends the guest's call as a dump does that has failed.
fn end_call(job: &Job<'_>) -> Outcome<()> {
    let guest = job.processes().get(1).copied().ok_or_else(|| Failure::new("no guest"))?;
    let word = ControlWord::find(Pid::from_raw(guest.pid)).ok_or_else(|| Failure::new("no control word"))?;
    let at = |field: usize| HOOKS_OFFSET + field;
    word.read_u32(at(offset_of!(Hooks, asking)))
        .and_then(|ticket| {
            let failed = answer(ticket, ANSWER_FAILED);
            word.write(at(offset_of!(Hooks, answer)), &failed.to_le_bytes())
        })
        .map_err(|error| Failure(format!("the control word: {error}")))
}

#[test]
fn an_answer_is_for_the_call_that_was_dumped() {
    each_user("hooks-now-twice", Users::OnlyRoot, |sandbox| {
        let words = Guest::new("hooks").arg("twice").command(sandbox)?;
        let job = Job::run_with(sandbox, "guest", &["--dump-on", "request"], &words)?;
        let nonce = ready(sandbox)?;
        let supervisor = stopped_supervisor(&job)?;
        let [before, after] =
            ["before-freeze", "before-publish"].map(|name| sandbox.root.join("out").join(name));
        let paths = [&before, &after].map(|path| path.to_string_lossy().into_owned());
        let held =
            [("CKPT_TEST_BEFORE_FREEZE", paths[0].as_str()), ("CKPT_TEST_BEFORE_PUBLISH", paths[1].as_str())];
        let dumper = job.start(&["dump", &job.name], &held)?;
        let comes_to = |moment: &Path| {
            poll_until(COMMAND_DEADLINE, || moment.exists().then_some(()))
                .ok_or_else(|| Failure(format!("the dump did not come to {}", moment.display())))
        };
        let let_go = |moment: &Path| {
            fs::remove_file(moment).map_err(|error| Failure(format!("letting it go on: {error}")))
        };
        comes_to(&before)?;
        tell(sandbox, "ask")?;
        wait_for_call(&job)?;
        let_go(&before)?;
        comes_to(&after)?;
        // The call that the checkpoint has ends before it is published, and another one waits then.
        end_call(&job)?;
        expect_events(sandbox, &["first -2"])?;
        wait_for_call(&job)?;
        let_go(&after)?;
        let dumped = dumper.finish(COMMAND_DEADLINE)?;
        expect(dumped.code == 0, dumped.report())?;
        job.dump(&[])?;
        let mut expected = ["first -2 checkpoint=0", "second 1 checkpoint=2"].map(str::to_owned).to_vec();
        expect_events(sandbox, &["first -2", "second 1"])?;
        expect(events(sandbox) == expected, format!("{:?}", events(sandbox)))?;
        supervisor.signal(Signal::SIGCONT);
        job.kill()?;
        job.restore(Some(1), &[])?;
        expected.push("first 2 checkpoint=1".to_owned());
        expect_events(sandbox, &["first -2", "second 1", "first 2"])?;
        expect(events(sandbox) == expected, format!("{:?}", events(sandbox)))?;
        finish(sandbox, &nonce)
    });
}

#[test]
fn a_new_supervisor_hears_who_waits() {
    each_user("hooks-now-orphan", Users::Both, |sandbox| {
        let job = Job::run_with(sandbox, "guest", &["--dump-on", "request"], &guest_now(sandbox)?)?;
        let nonce = ready(sandbox)?;
        let supervisor = stopped_supervisor(&job)?;
        tell(sandbox, "ask")?;
        wait_for_call(&job)?;
        supervisor.signal(Signal::SIGKILL);
        poll_until(GUEST_DEADLINE, || (!supervisor.is_alive()).then_some(()))
            .ok_or_else(|| Failure::new("the supervisor stays"))?;
        job.succeed(&["supervise", &job.name], &[])?;
        expect_events(sandbox, &["now 1"])?;
        finish(sandbox, &nonce)
    });
}

#[test]
fn a_dump_by_somebody_else_will_do() {
    each_user("hooks-now-other", Users::Both, |sandbox| {
        let job = Job::run_with(sandbox, "guest", &["--dump-on", "request"], &guest_now(sandbox)?)?;
        let nonce = ready(sandbox)?;
        let supervisor = stopped_supervisor(&job)?;
        tell(sandbox, "ask")?;
        // Asked for by now or not, one of these dumps is the first after that.
        let answered = poll_until(GUEST_DEADLINE, || {
            job.dump(&[]).ok()?;
            Some(events(sandbox)).filter(|all| !all.is_empty())
        });
        supervisor.signal(Signal::SIGCONT);
        expect(answered.is_some_and(|all| all[0].starts_with("now 1 ")), format!("{:?}", events(sandbox)))?;
        finish(sandbox, &nonce)
    });
}

// --- The examples ---

/// Runs an example to its end under ckpt, and its checkpoint once more.
fn example(label: &str, command: impl Fn(&Sandbox) -> Outcome<Vec<String>>) {
    each_user(label, Users::Both, |sandbox| {
        let mut words = command(sandbox)?;
        words.push("15".into());
        let alone = sandbox.execute(&words, &[], COMMAND_DEADLINE)?;
        expect(alone.code == 0 && alone.stdout.contains("without ckpt"), alone.report())?;
        let log = sandbox.store.join("example/log");
        let text = || fs::read_to_string(&log).unwrap_or_default();
        // What it says until it is done, behind what the log had before.
        let says = |before: usize| {
            let done =
                |text: String| text.get(before..).filter(|new| new.contains("done\n")).map(str::to_owned);
            poll_until(COMMAND_DEADLINE, || done(text()))
                .ok_or_else(|| Failure(format!("it is never done:\n{}", text())))
        };
        let job = Job::run_with(sandbox, "example", &["--dump-on", "request"], &words)?;
        let said = says(0)?;
        expect(said.contains("dumped: checkpoint 1") && said.contains("step 15"), said)?;
        for copy in [false, true] {
            ended(sandbox, &job)?;
            let before = text().len();
            // The log has grown.
            job.succeed(&["restore", &job.name, "--detach", "--files", "keep"], &[])?;
            let said = says(before)?;
            let whole = said.contains("restored from checkpoint 1") && said.contains("step 15");
            let told = said.contains("a copy: new random numbers");
            expect(whole && told == copy, format!("copy {copy}:\n{said}"))?;
        }
        Ok(())
    });
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

#[test]
fn example_in_c() {
    example("hooks-example-c", |sandbox| {
        let program = sandbox.root.join("steps");
        let include = repository().join("include");
        let built = Command::new("gcc")
            .args(["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-pthread", "-I"])
            .arg(&include)
            .arg("-o")
            .arg(&program)
            .arg(repository().join("examples/hooks/steps.c"))
            .output()
            .map_err(|error| Failure(format!("gcc: {error}")))?;
        expect(built.status.success(), String::from_utf8_lossy(&built.stderr))?;
        Ok(vec![program.to_string_lossy().into_owned()])
    });
}

#[test]
fn example_in_python() {
    if !Path::new("/usr/bin/python3").exists() {
        announce("skipped: example_in_python: there is no /usr/bin/python3");
        return;
    }
    example("hooks-example-python", |sandbox| {
        // The checkout may be closed to the user.
        let script = sandbox.work.join("steps.py");
        fs::copy(repository().join("examples/hooks/steps.py"), &script)
            .map_err(|error| Failure(format!("copying the example: {error}")))?;
        Ok(vec!["/usr/bin/python3".into(), script.to_string_lossy().into_owned()])
    });
}

/// The header in all its languages and ways to be linked, in a program that runs by itself.
#[test]
fn the_header_can_be_used_without_ckpt() {
    let dir = std::env::temp_dir().join(format!("ckpt-tests-header-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let source = dir.join("alone.c");
    let text = "#include <ckpt-hooks.h>\n#include <dlfcn.h>\n\
        int main(void) { struct ckpt_hooks h = { sizeof(h), 0, 0, 0, 0 };\n\
        return !(ckpt_hooks_register(&h) == CKPT_NOT_UNDER_CKPT && ckpt_critical_begin(\"x\") == CKPT_NOT_UNDER_CKPT &&\n\
        ckpt_restore_count() == CKPT_NOT_UNDER_CKPT && ckpt_dump_now(0, 0) == CKPT_NOT_UNDER_CKPT &&\n\
        ckpt_hooks_unregister(1) == CKPT_NOT_UNDER_CKPT && ckpt_critical_end() == CKPT_NOT_UNDER_CKPT); }\n";
    fs::write(&source, text).unwrap();
    let ways: [(&str, &[&str]); 6] = [
        ("gcc", &["-std=c99"]),
        ("gcc", &["-std=c17", "-O2", "-no-pie"]),
        ("gcc", &["-O2", "-static"]),
        ("g++", &["-x", "c++", "-std=c++11"]),
        ("g++", &["-x", "c++", "-std=c++20", "-O2"]),
        ("clang", &["-std=c99", "-O2"]),
    ];
    for (compiler, flags) in ways {
        let program = dir.join("alone");
        let mut command = Command::new(compiler);
        command.args(flags).args(["-pedantic", "-Wall", "-Wextra", "-Werror", "-I"]);
        command.arg(repository().join("include")).arg("-o").arg(&program).arg(&source);
        let built = match command.output() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                announce(&format!("skipped: the header with {compiler}, which is not there"));
                continue;
            }
            built => built.unwrap(),
        };
        assert!(built.status.success(), "{command:?}: {}", String::from_utf8_lossy(&built.stderr));
        assert!(Command::new(&program).status().unwrap().success(), "{command:?}");
    }
    fs::remove_dir_all(&dir).unwrap();
}

// --- Memory that no copy is to share ---

/// KiB of memory of the guest: little is not left to a page server.
const SMALL: &str = "64";
const LARGE: &str = "4096";

fn wipes(label: &str, kib: &str, users: Users, flow: impl Fn(&Sandbox, &Job<'_>) -> Outcome<()>) {
    for interceptor in [true, false] {
        let mut guest = Guest::new("hooks").arg("wipe").arg(kib);
        guest.interceptor = interceptor;
        each_user(&format!("wipe-{label}-{interceptor}"), users, |sandbox| {
            with_ready_job(&guest, sandbox, |job, nonce| {
                flow(sandbox, job)?;
                finish(sandbox, nonce)
            })
        });
    }
}

#[test]
fn the_first_restore_keeps_all_memory() {
    wipes("first", LARGE, Users::Both, |_, job| {
        job.dump(&[])?;
        // One that comes to nothing does not count: the name is taken.
        let refused = job.ckpt(&["restore", &job.name, "--detach"], &[])?;
        expect(refused.code != 0, refused.report())?;
        job.kill()?;
        job.restore(None, &[]).map(drop)
    });
}

#[test]
fn a_first_restore_that_is_lazy_keeps_all_memory() {
    wipes("first-lazy", LARGE, Users::OnlyRoot, |_, job| {
        job.dump(&["--stop"])?;
        job.succeed(&["restore", &job.name, "--detach", "--lazy"], &[]).map(drop)
    });
}

fn second(label: &str, kib: &str, users: Users, options: &[&str]) {
    wipes(label, kib, users, |sandbox, job| {
        job.dump(&["--stop"])?;
        job.restore(None, &[])?;
        job.kill()?;
        tell(sandbox, "wiped")?;
        let words = [&["restore", &job.name, "--detach"], options].concat();
        job.succeed(&words, &[]).map(drop)
    });
}

#[test]
fn the_second_restore_wipes_memory() {
    second("second", SMALL, Users::Both, &[]);
    second("second-large", LARGE, Users::Both, &[]);
}

#[test]
fn a_second_restore_that_is_lazy_wipes_memory() {
    second("second-lazy", LARGE, Users::OnlyRoot, &["--lazy"]);
    second("second-lazy-small", SMALL, Users::OnlyRoot, &["--lazy"]);
}

#[test]
fn a_new_checkpoint_begins_anew() {
    wipes("anew", SMALL, Users::Both, |_, job| {
        job.dump(&[])?;
        job.dump(&["--stop"])?;
        job.restore(Some(2), &[])?;
        // Its own first restore, of a job that was restored itself.
        job.dump(&["--stop"])?;
        job.restore(Some(3), &[]).map(drop)
    });
}

#[test]
fn all_copies_but_the_first_are_wiped() {
    wipes("copies", SMALL, Users::Both, |sandbox, job| {
        job.dump(&["--stop"])?;
        job.succeed(&["restore", &job.name, "--copies", "2"], &[])?;
        let (first, second) = (job.adopt("guest-1"), job.adopt("guest-2"));
        first.kill()?;
        tell(sandbox, "wiped")?;
        ended(sandbox, &second)
    });
    wipes("copies-first", SMALL, Users::Both, |sandbox, job| {
        job.dump(&["--stop"])?;
        job.succeed(&["restore", &job.name, "--copies", "2"], &[])?;
        let (first, second) = (job.adopt("guest-1"), job.adopt("guest-2"));
        second.kill()?;
        ended(sandbox, &first)
    });
}

#[test]
fn what_cannot_be_noted_is_wiped() {
    wipes("read-only", SMALL, Users::OnlyPlain, |sandbox, job| {
        use std::os::unix::fs::PermissionsExt;
        job.dump(&["--stop"])?;
        let dir = sandbox.store.join("guest/1");
        let allow = |mode: u32| {
            fs::set_permissions(&dir, fs::Permissions::from_mode(mode))
                .map_err(|error| Failure(format!("chmod: {error}")))
        };
        allow(0o500)?;
        tell(sandbox, "wiped")?;
        let restored = job.restore(None, &[]);
        allow(0o700)?;
        let restored = restored?;
        let said = restored.stderr.contains("it can't be noted that it is restored");
        expect(said, restored.report())
    });
}
