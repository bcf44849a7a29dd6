// SPDX-License-Identifier: MIT OR Apache-2.0
//! The flows that tests consist of. Each runs for every user of this run of the tests, and panics with a report of all
//! commands, outputs and logs when the guest does not confirm its own nonce.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::{
    Failure, Outcome, announce,
    fingerprint::Fingerprint,
    guest::{GUEST_DEADLINE, Guest, Talk, Verdict},
    job::{COMMAND_DEADLINE, Job, RunOptions},
    process::{HostProcess, poll_until},
    sandbox::Sandbox,
    stage::stage,
    user::{User, Users},
};

/// How long a guest whose kind was not restored is given to say OK, which would be wrong.
const BROKEN_GUEST_DEADLINE: Duration = Duration::from_secs(5);
/// How long traces of a dump may take to vanish after the command has returned.
const TRACE_DEADLINE: Duration = Duration::from_secs(5);
/// The environment variable by which a ckpt with the feature `test-hooks` leaves out the restore of a kind.
pub const SKIP_VARIABLE: &str = "CKPT_TEST_SKIP_RESTORE";
/// The environment variable by which a ckpt with the feature `test-hooks` uses another snapshot engine.
const ENGINE_VARIABLE: &str = "CKPT_TEST_ENGINE";

/// Runs `flow` in a fresh sandbox for each of `users`, and panics with everything known if it failed for any.
pub fn each_user(label: &str, users: Users, flow: impl Fn(&Sandbox) -> Outcome<()>) {
    let mut reports = String::new();
    for user in users.of_this_run(label) {
        let sandbox = match Sandbox::new(label, user) {
            Ok(sandbox) => sandbox,
            Err(failure) => panic!("{label} as {}: {failure}", user.name()),
        };
        // The job is killed when the flow returns, its record then holds the kill too: the report comes after.
        if let Err(failure) = flow(&sandbox) {
            reports.push_str(&format!(
                "\n=== {label} as {} failed: {failure}\n(kept: {})\n{}",
                user.name(),
                sandbox.root.display(),
                sandbox.report()
            ));
            // Kept for whoever looks into it: the next run removes it.
            std::mem::forget(sandbox);
        }
    }
    if !reports.is_empty() {
        panic!("{reports}");
    }
}

/// As [`each_user`], with a job of `guest` that is ready, and its nonce.
pub fn each_ready_job(
    label: &str,
    users: Users,
    guest: &Guest,
    flow: impl Fn(&Sandbox, &Job<'_>, &str) -> Outcome<()>,
) {
    each_user(label, users, |sandbox| with_ready_job(guest, sandbox, |job, nonce| flow(sandbox, job, nonce)));
}

fn skipped(guest: &Guest, sandbox: &Sandbox, why: &str) -> Outcome<()> {
    announce(&format!("skipped: {} as {}: {why}", guest.label(), sandbox.user.name()));
    Ok(())
}

fn judge(verdict: Option<Verdict>, guest: &Guest, sandbox: &Sandbox) -> Outcome<bool> {
    match verdict {
        Some(Verdict::Ok) => Ok(true),
        Some(Verdict::Skip(why)) => skipped(guest, sandbox, &why).map(|()| false),
        Some(Verdict::Fail(why)) => Err(Failure(format!("the guest says: {why}"))),
        None => Err(Failure(format!("the guest gave no verdict within {GUEST_DEADLINE:?}"))),
    }
}

/// The guest without ckpt: it must say OK, else it is the guest that is wrong.
///
/// # Panics
/// With a report, when it doesn't.
pub fn control(guest: &Guest) {
    each_user(&format!("{}-control", guest.label()), guest.users, |sandbox| control_flow(guest, sandbox));
}

fn control_flow(guest: &Guest, sandbox: &Sandbox) -> Outcome<()> {
    // A pid namespace of its own with a pid 1 that reaps: what orphans meet under ckpt, and all dies with it.
    let mut words: Vec<String> =
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"].map(String::from).to_vec();
    if sandbox.user == User::Plain {
        words.push("--map-current-user".to_owned());
    }
    words.push(stage().compile("reaper", false)?.to_string_lossy().into_owned());
    if guest.tty {
        return skipped(guest, sandbox, "control mode has no terminal");
    }
    words.extend(guest.command(sandbox)?);
    let running = sandbox.start(&words, &[])?;
    let talk = Talk::with(sandbox);
    let nonce = match talk.wait_ready()? {
        Ok(nonce) => nonce,
        Err(verdict) => return judge(Some(verdict), guest, sandbox).map(|_| ()),
    };
    talk.go()?;
    if judge(talk.wait_verdict(&nonce, GUEST_DEADLINE), guest, sandbox)? {
        talk.check_log(&nonce)?;
        let finished = running.finish(GUEST_DEADLINE)?;
        if finished.code != 0 {
            return Err(Failure(format!("the guest says OK but ends with status {}", finished.code)));
        }
    }
    Ok(())
}

/// Dump, SIGKILL of the whole job, restore, go: the guest confirms its nonce and all of its state.
///
/// # Panics
/// With a report, when it doesn't.
pub fn prove(guest: &Guest) {
    prove_generations(guest, 1);
}

/// Like [`prove`], linked statically, so without interceptor whether wanted or not.
///
/// # Panics
/// With a report, when the guest fails.
pub fn prove_static(guest: &Guest) {
    match guest.no_static {
        Some(why) => announce(&format!("skipped: {} linked statically: {why}", guest.label())),
        None => prove(&guest.clone().linked_statically()),
    }
}

/// Like [`prove`], through `generations` rounds of dump, kill and restore before go.
///
/// # Panics
/// With a report, when the guest fails.
pub fn prove_generations(guest: &Guest, generations: u32) {
    let label = format!("{}-restored-{generations}", guest.label());
    each_user(&label, guest.users, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            for _ in 0..generations {
                dump_and_kill(job, sandbox)?;
                job.restore(None, &[])?;
            }
            finish(guest, sandbox, job, nonce)
        })
    });
}

/// Like [`prove`], but the job has been stopped by a signal before, and has gone on, and is dumped twice before it is killed.
///
/// # Panics
/// With a report, when the guest fails.
pub fn prove_dumped_again(guest: &Guest) {
    each_user(&format!("{}-again", guest.label()), guest.users, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            let processes = job.processes();
            let guests = processes.get(1..).unwrap_or_default();
            guests.iter().for_each(|p| p.signal(Signal::SIGSTOP));
            poll_until(COMMAND_DEADLINE, || guests.iter().all(|p| p.is_stopped()).then_some(()))
                .ok_or_else(|| Failure::new("the guest does not stop"))?;
            guests.iter().for_each(|p| p.signal(Signal::SIGCONT));
            job.dump(&[])?;
            dump_and_kill(job, sandbox)?;
            job.restore(None, &[])?;
            finish(guest, sandbox, job, nonce)
        })
    });
}

/// Dump and go on: the dump leaves nothing behind in the job, and the guest confirms its state.
///
/// # Panics
/// With a report, when it doesn't.
pub fn prove_goes_on(guest: &Guest) {
    let label = format!("{}-goes-on", guest.label());
    each_user(&label, guest.users, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            let init =
                job.init().ok_or_else(|| Failure::new("ckpt ps --json does not name the job's pid 1"))?;
            let before = (!guest.in_motion).then(|| Fingerprint::take(init));
            job.dump(&[])?;
            if let Some(before) = before {
                left_nothing_behind(&before, init)?;
            }
            finish(guest, sandbox, job, nonce)
        })
    });
}

/// Like [`prove`], with the dump by this snapshot engine, and with the interceptor or not as the guest has it.
///
/// # Panics
/// With a report, when the guest fails or another engine made the dump.
pub fn prove_with_engine(guest: &Guest, engine: &str) {
    let label = format!("{}-by-{engine}", guest.label());
    each_user(&label, guest.users, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            dump_by(job, engine, &[])?;
            job.kill()?;
            job.restore(None, &[])?;
            finish(guest, sandbox, job, nonce)
        })
    });
}

/// `ckpt dump` by the snapshot engine `engine`, followed by `options`. `spill` is for tests only.
///
/// # Errors
/// The command's report, or that another engine made the dump.
pub fn dump_by(job: &Job<'_>, engine: &str, options: &[&str]) -> Outcome<()> {
    let choice: &[&str] = if engine == "spill" { &[] } else { &["--engine", engine] };
    let words = [&["dump", &job.name, "--json"], choice, options].concat();
    let dumped = job.succeed(&words, &[(ENGINE_VARIABLE, engine)])?;
    let said: serde_json::Value = serde_json::from_str(&dumped.stdout)
        .map_err(|error| Failure(format!("no JSON: {error}\n{}", dumped.report())))?;
    if said.get("engine").and_then(serde_json::Value::as_str) == Some(engine) {
        return Ok(());
    }
    Err(Failure(format!(
        "not dumped by the engine {engine} (or ckpt was built without the feature test-hooks):\n{}",
        dumped.report()
    )))
}

/// Demands that a job looks as it did at `before`; what a finished command leaves may take a moment to go.
///
/// # Errors
/// The differences.
pub fn left_nothing_behind(before: &Fingerprint, init: HostProcess) -> Outcome<()> {
    let mut diff = String::new();
    poll_until(TRACE_DEADLINE, || {
        diff = before.diff(&Fingerprint::take(init));
        diff.is_empty().then_some(())
    })
    .ok_or_else(|| Failure(format!("the dump left something behind (- before, + after):\n{diff}")))
}

/// The guest, which passes when all is restored (`restored`), does not when the restore leaves out the kind named `kind`:
/// so the guest does look at it, and the engine does restore it there.
///
/// # Panics
/// With a report, when the guest passes.
pub fn prove_needs(kind: &str, guest: &Guest) {
    let label = format!("{}-without-{kind}", guest.label());
    each_user(&label, guest.users, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            dump_and_kill(job, sandbox)?;
            if job.restore(None, &[(SKIP_VARIABLE, kind)]).is_err() {
                return Ok(());
            }
            // Without some kinds the job does not come far.
            let init = job.init();
            let talk = Talk::with(sandbox);
            talk.go()?;
            let verdict = poll_until(BROKEN_GUEST_DEADLINE, || {
                let ended = init.is_none_or(|init| !init.is_alive());
                // Looked at after the end: a job that ended may have spoken just before.
                talk.verdict(Some(nonce)).map(Some).or_else(|| ended.then_some(None))
            })
            .flatten();
            match verdict {
                Some(Verdict::Ok) => Err(Failure(format!(
                    "the guest says OK although the restore of {kind} was left out: it doesn't check it (or ckpt was \
                     built without the feature test-hooks)"
                ))),
                _ => Ok(()),
            }
        })
    });
}

/// Starts the guest as a job, waits until it is ready and hands both over; the job is killed afterwards.
///
/// # Errors
/// The job's, the guest's or those of `flow`.
pub fn with_ready_job(
    guest: &Guest,
    sandbox: &Sandbox,
    flow: impl FnOnce(&Job<'_>, &str) -> Outcome<()>,
) -> Outcome<()> {
    let command = guest.command(sandbox)?;
    let options = RunOptions { interceptor: guest.interceptor, tty: guest.tty };
    let job = Job::run_under(&guest.run_under, sandbox, "guest", options, &command)?;
    match Talk::with(sandbox).wait_ready()? {
        Ok(nonce) => match flow(&job, &nonce) {
            Err(Failure(what)) if guest.may_be_refused.is_some_and(|words| is_refusal(&what, words)) => {
                let words = guest.may_be_refused.unwrap_or_default();
                let named = what.lines().filter(|line| line.to_lowercase().contains(words));
                let why = named.map(str::trim).collect::<Vec<_>>().join("; ");
                skipped(guest, sandbox, &format!("ckpt refuses it: {why}"))
            }
            result => result,
        },
        Err(verdict) => judge(Some(verdict), guest, sandbox).map(|_| ()),
    }
}

/// Whether a failed dump says that it doesn't support what the guest is about (status 114 is ckpt's for a refusal).
fn is_refusal(what: &str, words: &str) -> bool {
    what.starts_with("$ ")
        && what.contains(" dump ")
        && what.contains("[status 114]")
        && what.to_lowercase().contains(words)
}

/// Dumps the running job, sees that it still waits for go, and kills all of it.
fn dump_and_kill(job: &Job<'_>, sandbox: &Sandbox) -> Outcome<()> {
    job.dump(&[])?;
    if let Some(verdict) = Talk::with(sandbox).verdict(None) {
        return Err(Failure(format!("the guest did not survive the dump: {verdict:?}")));
    }
    if job.init().is_none() {
        return Err(Failure::new("the job is gone after the dump that should leave it running"));
    }
    job.kill()
}

/// Go, verdict, log, and the exit status as `ckpt wait` tells it.
fn finish(guest: &Guest, sandbox: &Sandbox, job: &Job<'_>, nonce: &str) -> Outcome<()> {
    let waiter = job.start(&["wait", &job.name], &[])?;
    let talk = Talk::with(sandbox);
    talk.go()?;
    if judge(talk.wait_verdict(nonce, GUEST_DEADLINE), guest, sandbox)? {
        talk.check_log(nonce)?;
        let waited = waiter.finish(COMMAND_DEADLINE)?;
        if waited.code != 0 {
            return Err(Failure(format!(
                "the guest says OK, but its exit status is told wrongly:\n{}",
                waited.report()
            )));
        }
    }
    Ok(())
}
