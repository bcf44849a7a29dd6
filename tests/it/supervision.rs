// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs that are dumped, ended and started again by themselves: `ckpt run` with --every, --dump-on, --recover, --resume.
#![forbid(unsafe_code)]

use std::{fs, time::Duration};

use ckpt_tests::{
    Failure, Outcome,
    job::COMMAND_DEADLINE,
    process::{Finished, HostProcess, Running, poll_until},
    proof::each_user,
    sandbox::Sandbox,
    stage::stage,
    user::Users,
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// How long what a supervisor does may take.
const DEADLINE: Duration = Duration::from_secs(240);
/// The statuses of ckpt.
const NOT_FOUND: i32 = 112;
const CONFLICT: i32 = 113;
const SAVED: i32 = 118;

/// A name, and how to reach the job that has it.
struct Named<'a> {
    sandbox: &'a Sandbox,
    name: String,
}

impl<'a> Named<'a> {
    fn new(sandbox: &'a Sandbox, name: &str) -> Named<'a> {
        Named { sandbox, name: name.to_owned() }
    }

    fn line(&self, words: &[&str]) -> Outcome<Vec<String>> {
        let ckpt = stage().ckpt()?.to_string_lossy().into_owned();
        Ok(std::iter::once(ckpt).chain(words.iter().map(|word| (*word).to_owned())).collect())
    }

    fn ckpt(&self, words: &[&str]) -> Outcome<Finished> {
        self.sandbox.execute(&self.line(words)?, &[], COMMAND_DEADLINE)
    }

    fn succeed(&self, words: &[&str]) -> Outcome<Finished> {
        expect(self.ckpt(words)?, 0)
    }

    /// `ckpt run --name NAME OPTIONS -- sh -c SCRIPT` beside the test; in the work directory.
    fn start(&self, options: &[&str], script: &str) -> Outcome<Running> {
        let script = format!("cd '{}'; {script}", self.sandbox.work.display());
        let head = ["run", "--no-interceptor", "--name", &self.name];
        // What it writes is for the test, and of no meaning to it.
        let keep: &[&str] = if script.contains(COUNTS) { &["--files", "keep"] } else { &[] };
        let words = [&head[..], keep, options, &["--", "sh", "-c", &script]].concat();
        self.sandbox.start(&self.line(&words)?, &[])
    }

    /// The same, detached; returns when it runs.
    fn run(&self, options: &[&str], script: &str) -> Outcome<()> {
        expect(self.start(&[options, &["--detach"]].concat(), script)?.finish(COMMAND_DEADLINE)?, 0).map(drop)
    }

    /// What `ckpt ps --json` says.
    fn ps(&self) -> Outcome<Option<Value>> {
        let listed = self.sandbox.start(&self.line(&["ps", "--json"])?, &[])?.finish(COMMAND_DEADLINE)?;
        let jobs: Vec<Value> = serde_json::from_str(&listed.stdout)
            .map_err(|error| Failure(format!("{error}: {}", listed.report())))?;
        Ok(jobs.into_iter().find(|job| job["name"] == self.name.as_str()))
    }

    /// Waits until `condition` holds for what `ps` says.
    fn until(&self, what: &str, mut condition: impl FnMut(&Value) -> bool) -> Outcome<Value> {
        let mut last = None;
        let found = poll_until(DEADLINE, || {
            last = self.ps().ok().flatten();
            last.clone().filter(|job| condition(job))
        });
        found.ok_or_else(|| Failure(format!("never: {what}; last: {last:?}\n{}", self.log())))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.sandbox.store.join(&self.name).join("log")).unwrap_or_default()
    }

    fn logged(&self, text: &str) -> Outcome<()> {
        poll_until(DEADLINE, || self.log().contains(text).then_some(()))
            .ok_or_else(|| Failure(format!("the log never says {text:?}:\n{}", self.log())))
    }

    /// Numbers of the checkpoints in the store.
    fn checkpoints(&self) -> Vec<u64> {
        let entries = fs::read_dir(self.sandbox.store.join(&self.name)).into_iter().flatten().flatten();
        let mut numbers: Vec<u64> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    }

    /// The processes of the job, init first.
    fn processes(&self) -> Outcome<Vec<HostProcess>> {
        let init = self.ps()?.and_then(|job| job["init_pid"].as_i64()).unwrap_or(0);
        let init = HostProcess::find(init as i32).ok_or_else(|| Failure::new("the job does not run"))?;
        Ok(init.tree())
    }

    fn supervisor(&self) -> Outcome<HostProcess> {
        let job =
            self.until("a supervisor that says who it is", |job| supervision(job)["pid"].as_i64() > Some(0))?;
        let pid = supervision(&job)["pid"].as_i64().unwrap_or(0);
        HostProcess::find(pid as i32).ok_or_else(|| Failure(format!("there is no supervisor {pid}")))
    }

    fn work(&self, file: &str) -> String {
        fs::read_to_string(self.sandbox.work.join(file)).unwrap_or_default()
    }

    fn work_says(&self, file: &str, condition: impl Fn(&str) -> bool) -> Outcome<String> {
        poll_until(DEADLINE, || Some(self.work(file)).filter(|text| condition(text)))
            .ok_or_else(|| Failure(format!("{file} stays {:?}\n{}", self.work(file), self.log())))
    }

    /// Ends all of it; nothing may be left.
    fn end(&self) -> Outcome<()> {
        self.ckpt(&["kill", &self.name, "KILL"])?;
        self.gone()
    }

    /// Neither the job nor its supervisor nor anything in the registry is left.
    fn gone(&self) -> Outcome<()> {
        let mut left = String::new();
        let gone = poll_until(DEADLINE, || {
            let supervisors = supervisors_of(self.sandbox);
            // Asked last, as it sweeps what the supervisor leaves.
            let job = self.ps();
            left = format!("{job:?} {supervisors:?}");
            (supervisors.is_empty() && matches!(job, Ok(None))).then_some(())
        });
        gone.ok_or_else(|| Failure(format!("left behind: {left}\n{}", self.log())))?;
        let supervised = walk(&self.sandbox.runtime).into_iter().find(|path| path.contains(".supervised"));
        supervised.map_or(Ok(()), |path| Err(Failure(format!("left behind: {path}"))))
    }
}

impl Drop for Named<'_> {
    fn drop(&mut self) {
        let _ = self.ckpt(&["kill", &self.name, "KILL"]);
    }
}

fn walk(dir: &std::path::Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        all.push(entry.path().to_string_lossy().into_owned());
        all.extend(walk(&entry.path()));
    }
    all
}

/// Living supervisors whose environment names the sandbox.
fn supervisors_of(sandbox: &Sandbox) -> Vec<i32> {
    let needle = sandbox.root.as_os_str().as_encoded_bytes().to_vec();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let read = |pid: &i32, file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    pids.filter(|pid| read(pid, "comm").starts_with(b"ckpt-supervise"))
        .filter(|pid| read(pid, "environ").windows(needle.len()).any(|window| window == needle))
        .collect()
}

fn supervision(job: &Value) -> &Value {
    &job["supervision"]["state"]
}

fn dumps(job: &Value) -> u64 {
    supervision(job)["dumps"].as_u64().unwrap_or(0)
}

fn expect(finished: Finished, code: i32) -> Outcome<Finished> {
    if finished.code == code {
        Ok(finished)
    } else {
        Err(Failure(format!("expected status {code}:\n{}", finished.report())))
    }
}

fn expect_eq<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Outcome<()> {
    if found == expected { Ok(()) } else { Err(Failure(format!("{what}: {found:?}, not {expected:?}"))) }
}

/// Counts in the file `count`, for as long as it is let; `n` is only in memory, so that it tells what was restored. The file is written in
/// one piece and never truncated: whenever the job is stopped or killed there is a number in it.
const COUNTS: &str = "n=0; while :; do n=$((n+1)); echo $n 1<>count; sleep 0.02; done";

/// Behind the first line may be the rest of a longer number, of a run before.
fn counted(text: &str) -> Option<u64> {
    text.lines().next()?.parse().ok()
}

/// The number that [`COUNTS`] has come to.
fn count(job: &Named<'_>) -> Outcome<u64> {
    let text = job.work_says("count", |text| counted(text).is_some())?;
    Ok(counted(&text).unwrap_or(0))
}

/// What is in the file from now on is new. It stays where it is: a checkpoint may have it open.
fn forget_count(sandbox: &Sandbox) -> Outcome<()> {
    fs::write(sandbox.work.join("count"), b"").map_err(|error| Failure(format!("count: {error}")))
}

fn counts_on(job: &Named<'_>, from: u64) -> Outcome<u64> {
    let text = job.work_says("count", |text| counted(text).is_some_and(|n| n > from))?;
    Ok(counted(&text).unwrap_or(0))
}

#[test]
fn dumps_at_an_interval_and_keeps_the_newest() {
    each_user("supervise-every", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "every");
        job.run(&["--every", "100ms", "--keep", "2"], COUNTS)?;
        let seen = job.until("five dumps", |job| dumps(job) >= 5)?;
        expect_eq("supervised", seen["supervision"]["supervised"].as_bool(), Some(true))?;
        job.logged("dumped (every 100ms): every@3")?;
        job.end()?;
        let left = job.checkpoints();
        // A dump that the end came into may not have been pruned.
        if !(2..=3).contains(&left.len()) || left.first() < Some(&3) {
            return Err(Failure(format!("checkpoints {left:?}\n{}", job.log())));
        }
        for number in left {
            job.succeed(&["verify", &format!("every@{number}")])?;
        }
        Ok(())
    });
}

#[test]
fn a_chain_does_not_grow_long() {
    each_user("supervise-chain", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "chain");
        job.run(&["--every", "20ms", "--keep", "2", "--incremental", "--io-limit", "1G"], COUNTS)?;
        // Twice, so that what is built on a squashed one has been squashed, too.
        let squashed = || job.log().lines().filter(|line| line.contains(": squashed chain@")).count();
        poll_until(DEADLINE, || (squashed() >= 2).then_some(()))
            .ok_or_else(|| Failure(format!("never squashed twice:\n{}", job.log())))?;
        let counted = count(&job)?;
        counts_on(&job, counted)?;
        job.end()?;
        let left = job.checkpoints();
        // Kept, needed by them, and those that were made while the last removal went on.
        if left.len() > 2 + 8 + 8 || left.first() == Some(&1) {
            return Err(Failure(format!("checkpoints {left:?}\n{}", job.log())));
        }
        let listed = job.succeed(&["list", "--json"])?;
        let listed: Value = serde_json::from_str(&listed.stdout).map_err(|e| Failure(e.to_string()))?;
        let entries: Vec<&Value> = listed.as_array().into_iter().flatten().collect();
        if !entries.iter().any(|entry| entry["parent"].is_u64()) {
            return Err(Failure(format!("no checkpoint is built on another: {listed}")));
        }
        if let Some(long) = entries.iter().find(|entry| entry["images"].as_u64() > Some(16)) {
            return Err(Failure(format!("a long chain: {long}")));
        }
        for number in &left {
            job.succeed(&["verify", &format!("chain@{number}")])?;
        }
        // By hand, down to one that needs no other.
        let kept = job.succeed(&["rm", "chain", "--keep", "1", "--keep-needed", "0", "--json"])?;
        let kept: Value = serde_json::from_str(&kept.stdout).map_err(|e| Failure(e.to_string()))?;
        let newest = left.last().copied().unwrap_or(0);
        if job.checkpoints() != [newest] || kept["removed"].as_array().map(Vec::len) != Some(left.len() - 1) {
            return Err(Failure(format!("{:?} are left of {left:?}: {kept}", job.checkpoints())));
        }
        job.succeed(&["restore", "chain", "--detach", "--files", "keep"])?;
        counts_on(&job, counted)?;
        job.end()
    });
}

#[test]
fn options_without_effect_are_refused() {
    each_user("supervise-usage", Users::OnlyPlain, |sandbox| {
        let job = Named::new(sandbox, "usage");
        for options in [
            &["--keep", "2"][..],
            &["--incremental"],
            &["--flush"],
            &["--every", "5"],
            &["--dump-on", "KILL"],
            &["--dump-at", "cpu"],
            &["--health", "true"],
            &["--recover", "always"],
        ] {
            expect(job.start(options, "exit 0")?.finish(COMMAND_DEADLINE)?, 2)?;
        }
        expect(job.ckpt(&["supervise", "usage"])?, NOT_FOUND)?;
        Ok(())
    });
}

#[test]
fn a_killed_supervisor_leaves_the_job_and_can_be_replaced() {
    each_user("supervise-killed", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "orphan");
        job.run(&["--every", "100ms", "--keep", "1", "--dump-on", "USR1"], COUNTS)?;
        job.until("a dump", |job| dumps(job) >= 1)?;
        let supervisor = job.supervisor()?;
        supervisor.signal(Signal::SIGKILL);
        let seen = job.until("unsupervised", |job| job["supervision"]["supervised"] == false)?;
        let shown = job.succeed(&["ps"])?;
        if !shown.stdout.contains("unsupervised") {
            return Err(Failure(shown.report()));
        }
        counts_on(&job, count(&job)?)?;
        // A signal for a dump does not reach the job, and says that nobody makes one.
        let refused = job.ckpt(&["kill", "orphan", "USR1"])?;
        if refused.code == 0 || !refused.stderr.contains("ckpt supervise orphan") {
            return Err(Failure(refused.report()));
        }
        job.succeed(&["supervise", "orphan"])?;
        let before = dumps(&seen);
        job.until("dumps again", |job| job["supervision"]["supervised"] == true && dumps(job) > before)?;
        let second = job.ckpt(&["supervise", "orphan"])?;
        if second.code == 0 {
            return Err(Failure(second.report()));
        }
        job.end()
    });
}

#[test]
fn resume_goes_on_from_the_newest_whole_checkpoint() {
    each_user("supervise-resume", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "resume");
        // Nothing there: a fresh start.
        job.run(&["--resume"], COUNTS)?;
        expect(job.start(&["--resume", "--detach"], COUNTS)?.finish(COMMAND_DEADLINE)?, CONFLICT)?;
        counts_on(&job, 20)?;
        job.succeed(&["dump", "resume"])?;
        counts_on(&job, count(&job)? + 20)?;
        job.succeed(&["dump", "resume"])?;
        let at_second = count(&job)?;
        job.end()?;
        job.run(&["--resume"], COUNTS)?;
        counts_on(&job, at_second)?;
        job.end()?;
        // The newest damaged: the one before, with a warning.
        let pages = sandbox.store.join("resume/2/records");
        let mut bytes = fs::read(&pages).map_err(|error| Failure(error.to_string()))?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        fs::write(&pages, bytes).map_err(|error| Failure(error.to_string()))?;
        forget_count(sandbox)?;
        let resumed = expect(job.start(&["--resume", "--detach"], COUNTS)?.finish(COMMAND_DEADLINE)?, 0)?;
        if !resumed.stderr.contains("resume@2 is skipped")
            || !resumed.stderr.contains("goes on from resume@1")
        {
            return Err(Failure(resumed.report()));
        }
        if count(&job)? < 20 {
            return Err(Failure(format!("it was started anew: {}", job.work("count"))));
        }
        job.end()?;
        // Without a whole one: a fresh start.
        fs::write(sandbox.store.join("resume/1/records"), b"x")
            .map_err(|error| Failure(error.to_string()))?;
        forget_count(sandbox)?;
        job.run(&["--resume"], "trap 'exit 9' USR1; echo 1 > count; while :; do sleep 0.02; done")?;
        expect_eq("a fresh count", count(&job)?, 1)?;
        // Signals reach it as if it had been started at once.
        let waiter = sandbox.start(&job.line(&["wait", "resume"])?, &[])?;
        job.succeed(&["kill", "resume", "USR1"])?;
        expect(waiter.finish(DEADLINE)?, 9)?;
        job.gone()
    });
}

#[test]
fn resume_does_not_start_anew_over_a_conflict() {
    each_user("supervise-conflict", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "conflict");
        let script = "exec 3<>data; echo one >&3; : > ready; while :; do sleep 0.02; done";
        fs::write(sandbox.work.join("data"), b"0").map_err(|error| Failure(error.to_string()))?;
        sandbox.user.give(&sandbox.work.join("data"))?;
        job.run(&[], script)?;
        poll_until(DEADLINE, || sandbox.work.join("ready").exists().then_some(()))
            .ok_or_else(|| Failure::new("the script does not start"))?;
        job.succeed(&["dump", "conflict"])?;
        job.end()?;
        fs::write(sandbox.work.join("data"), b"XXX\n").map_err(|error| Failure(error.to_string()))?;
        let refused =
            expect(job.start(&["--resume", "--detach"], script)?.finish(COMMAND_DEADLINE)?, CONFLICT)?;
        if !refused.stderr.contains("data") {
            return Err(Failure(refused.report()));
        }
        expect_eq("the job", job.ps()?.is_some(), false)?;
        job.run(&["--resume", "--files", "keep"], script)?;
        job.end()
    });
}

#[test]
fn a_signal_makes_a_dump_and_ends_the_job() {
    each_user("supervise-signal", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "signal");
        let options = ["--dump-on", "USR1", "--dump-on", "TERM:stop", "--resume"];
        let foreground = job.start(&options, COUNTS)?;
        count(&job)?;
        let send = |pid: i32, signal: Signal| {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)
                .map_err(|errno| Failure(errno.to_string()))
        };
        // By every way that there is.
        job.succeed(&["kill", "signal", "USR1"])?;
        job.until("the dump by ckpt kill", |job| dumps(job) == 1)?;
        send(job.processes()?[0].pid, Signal::SIGUSR1)?;
        job.until("the dump by init", |job| dumps(job) == 2)?;
        job.supervisor()?.signal(Signal::SIGUSR1);
        job.until("the dump by the supervisor", |job| dumps(job) == 3)?;
        let run = job.until("ckpt run", |_| true)?;
        expect_eq("supervised", run["supervision"]["supervised"].as_bool(), Some(true))?;
        // setpriv stands between the test and a plain user's ckpt only until it executes it.
        send(foreground.pid(), Signal::SIGTERM)?;
        let ended = expect(foreground.finish(DEADLINE)?, SAVED)?;
        if !ended.stderr.contains("signal@4") {
            return Err(Failure(ended.report()));
        }
        job.gone()?;
        expect(job.ckpt(&["wait", "signal"])?, SAVED)?;
        let at_end = count(&job)?;
        let foreground = job.start(&options, COUNTS)?;
        counts_on(&job, at_end)?;
        job.succeed(&["dump", "signal", "--stop"])?;
        expect(foreground.finish(DEADLINE)?, SAVED)?;
        job.gone()
    });
}

#[test]
fn a_failed_job_is_started_again() {
    each_user("supervise-recover", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "recover");
        let options = ["--recover", "on-failure:5", "--recover-delay", "10ms"];
        let foreground = job.start(&options, &format!("echo $$ >> starts; {COUNTS}"))?;
        count(&job)?;
        let recoveries = |n: u64| {
            job.until("a recovery", move |job| {
                supervision(job)["recoveries"] == n
                    && job["init_pid"].as_i64().is_some()
                    && job["main_running"] == true
            })
        };
        // Without a checkpoint: anew.
        job.processes()?[1].signal(Signal::SIGKILL);
        recoveries(1)?;
        job.work_says("starts", |text| text.lines().count() == 2)?;
        counts_on(&job, 10)?;
        job.succeed(&["dump", "recover"])?;
        let at_dump = count(&job)?;
        // From it, whether the main process is killed or all of the job.
        job.processes()?[1].signal(Signal::SIGSEGV);
        recoveries(2)?;
        counts_on(&job, at_dump)?;
        job.succeed(&["dump", "recover"])?;
        job.processes()?[0].signal(Signal::SIGKILL);
        recoveries(3)?;
        counts_on(&job, at_dump)?;
        expect_eq("starts", job.work("starts").lines().count(), 2)?;
        // The command line has seen them all.
        let said = || {
            let outputs = fs::read_dir(sandbox.root.join("out")).into_iter().flatten().flatten();
            let texts = outputs.map(|entry| fs::read_to_string(entry.path()).unwrap_or_default());
            texts.map(|text| text.matches("failed and was restored from").count()).sum::<usize>()
        };
        poll_until(DEADLINE, || (said() == 2).then_some(()))
            .ok_or_else(|| Failure(format!("{} of 2 recoveries are told\n{}", said(), job.log())))?;
        // Somebody's wish is no failure.
        job.succeed(&["kill", "recover", "TERM"])?;
        let ended = expect(foreground.finish(DEADLINE)?, 128 + Signal::SIGTERM as i32)?;
        if ended.stderr.matches("failed and was restored from").count() != 2
            || !ended.stderr.contains("failed and was started anew")
        {
            return Err(Failure(ended.report()));
        }
        job.gone()
    });
}

#[test]
fn output_and_status_come_from_all_runs() {
    each_user("supervise-output", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "output");
        // Fails twice, then ends well.
        let script = "echo run >> runs; echo run; case $(wc -l < runs) in 3) exit 0;; *) exit 3;; esac";
        let options = ["--recover", "on-failure:5", "--recover-delay", "10ms"];
        let ended = expect(job.start(&options, script)?.finish(DEADLINE)?, 0)?;
        expect_eq("output", ended.stdout.as_str(), "run\nrun\nrun\n")?;
        job.gone()?;
        // Given up after so many.
        let options = ["--recover", "on-failure:2", "--recover-delay", "10ms"];
        let ended = expect(job.start(&options, "echo run; exit 7")?.finish(DEADLINE)?, 7)?;
        expect_eq("output", ended.stdout.as_str(), "run\nrun\nrun\n")?;
        job.logged("gave up after 2 recoveries")?;
        job.gone()?;
        // A status is not abnormal.
        let options = ["--recover", "on-abnormal", "--recover-delay", "10ms"];
        expect(job.start(&options, "exit 7")?.finish(DEADLINE)?, 7)?;
        job.gone()?;
        // What waits hears of the last run only.
        job.run(
            &["--recover", "on-failure:1", "--recover-delay", "10ms"],
            "echo run >> waited; until [ -e go ]; do sleep 0.02; done; exit 5",
        )?;
        let waiter = sandbox.start(&job.line(&["wait", "output"])?, &[])?;
        job.work_says("waited", |text| text.lines().count() == 1)?;
        fs::write(sandbox.work.join("go"), b"").map_err(|error| Failure(error.to_string()))?;
        expect(waiter.finish(DEADLINE)?, 5)?;
        expect_eq("runs", job.work("waited").lines().count(), 2)?;
        job.gone()
    });
}

#[test]
fn a_checkpoint_that_fails_twice_is_skipped() {
    each_user("supervise-skip", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "skip");
        // The second checkpoint is of a state that fails once it goes on.
        let script = "until [ -e one ]; do sleep 0.02; done; : > reached; until [ -e two ]; do sleep 0.02; done; \
                      : > doomed; until [ -e go ]; do sleep 0.02; done; echo fail >> fails; exit 4";
        job.run(&["--recover", "on-failure:5", "--recover-delay", "10ms"], script)?;
        let touch = |file: &str| {
            fs::write(sandbox.work.join(file), b"").map_err(|error| Failure(format!("{file}: {error}")))
        };
        let appears = |file: &str| {
            poll_until(DEADLINE, || sandbox.work.join(file).exists().then_some(()))
                .ok_or_else(|| Failure(format!("no {file}\n{}", job.log())))
        };
        job.until("it runs", |job| job["main_running"] == true)?;
        job.succeed(&["dump", "skip"])?;
        touch("one")?;
        appears("reached")?;
        touch("two")?;
        appears("doomed")?;
        job.succeed(&["dump", "skip"])?;
        for file in ["one", "two", "reached", "doomed"] {
            fs::remove_file(sandbox.work.join(file)).map_err(|error| Failure(format!("{file}: {error}")))?;
        }
        touch("go")?;
        job.logged("skipping it")?;
        job.logged("restored from skip@1 (recovery 3 of 5)")?;
        expect_eq("failures", job.work("fails").lines().count(), 3)?;
        // It waits where the first checkpoint was made.
        touch("one")?;
        appears("reached")?;
        job.end()
    });
}

#[test]
fn a_job_that_waits_for_its_recovery_has_its_name_and_can_be_ended() {
    each_user("supervise-waiting", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "waiting");
        let options = ["--recover", "on-failure", "--recover-delay", "1h"];
        let foreground = job.start(&options, "exit 6")?;
        let seen = job.until("it waits", |job| supervision(job)["restart_unix"].as_u64().is_some())?;
        expect_eq("init", seen["init_pid"].is_null(), true)?;
        let shown = job.succeed(&["ps"])?;
        if !shown.stdout.contains("restarts in") {
            return Err(Failure(shown.report()));
        }
        let taken = expect(job.start(&["--detach"], "exit 0")?.finish(COMMAND_DEADLINE)?, CONFLICT)?;
        if !taken.stderr.contains("start it again") {
            return Err(Failure(taken.report()));
        }
        job.succeed(&["kill", "waiting"])?;
        expect(foreground.finish(DEADLINE)?, 6)?;
        job.gone()
    });
}

#[test]
fn usage_files_and_commands_make_dumps() {
    each_user("supervise-triggers", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "triggers");
        let spin = "while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; done";
        job.run(&["--dump-at", "cpu:200ms"], spin)?;
        job.logged("of CPU time): triggers@2")?;
        job.end()?;
        let write = "while :; do dd if=/dev/zero of=big bs=64k count=16 conv=fsync 2>/dev/null; done";
        job.run(&["--dump-at", "written:2M"], write)?;
        job.logged("bytes written): triggers@")?;
        job.end()?;
        let path = sandbox.work.join("watched");
        job.run(&["--dump-at", &format!("changed:{}", path.display())], COUNTS)?;
        job.until("it is looked at", |job| supervision(job)["events"][0]["what"] == "supervising")?;
        fs::write(&path, b"1").map_err(|error| Failure(error.to_string()))?;
        job.logged("watched changed): triggers@")?;
        job.end()?;
        let marker = sandbox.work.join("now");
        let when = format!("test \"$CKPT_JOB\" = triggers && rm '{}'", marker.display());
        job.run(&["--dump-when", &when, "--probe-every", "50ms"], COUNTS)?;
        let before = job.checkpoints().len();
        fs::write(&marker, b"").map_err(|error| Failure(error.to_string()))?;
        job.logged("dumped (--dump-when): triggers@")?;
        expect_eq("checkpoints", job.checkpoints().len(), before + 1)?;
        job.end()
    });
}

#[test]
fn bytes_sent_make_a_dump_once_the_job_can_be_dumped() {
    each_user("supervise-sent", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "sent");
        let io = |error: std::io::Error| Failure(error.to_string());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(io)?;
        let port = listener.local_addr().map_err(io)?.port();
        let reader = std::thread::spawn(move || {
            let (mut from, _) = listener.accept()?;
            std::io::copy(&mut from, &mut std::io::sink())
        });
        let script = format!(
            "exec python3 -c 'import os, socket, time\n\
             s = socket.create_connection((\"127.0.0.1\", {port}))\n\
             s.sendall(bytes(300000))\n\
             while not os.path.exists(\"close\"): time.sleep(0.02)\n\
             s.close()\n\
             while True: time.sleep(1)'"
        );
        job.run(&["--dump-at", "sent:200K"], &script)?;
        // A job with a connection cannot be dumped: the dump is made as soon as it can be.
        job.logged("dump (300000 bytes sent): failed")?;
        fs::write(sandbox.work.join("close"), b"").map_err(io)?;
        job.logged("dumped (300000 bytes sent): sent@")?;
        job.end()?;
        match reader.join() {
            Ok(Ok(300_000)) => Ok(()),
            other => Err(Failure(format!("received: {other:?}"))),
        }
    });
}

#[test]
fn a_job_that_is_not_well_is_recovered() {
    each_user("supervise-health", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "health");
        let recover = ["--recover", "on-abnormal:3", "--recover-delay", "10ms"];
        let sick = sandbox.work.join("sick");
        // Once it has failed, the job is well again.
        let command = format!("test ! -e '{}'", sick.display());
        let health = ["--health", &command, "--probe-every", "50ms", "--health-failures", "2"];
        let script = format!("rm -f sick; {COUNTS}");
        job.run(&[&recover[..], &health].concat(), &script)?;
        count(&job)?;
        fs::write(&sick, b"").map_err(|error| Failure(error.to_string()))?;
        job.logged("the health command failed (2 of 2)")?;
        job.logged("started anew (recovery 1 of 3)")?;
        job.end()?;
        // One that never answers.
        let health = [
            "--health",
            "sleep 1000",
            "--probe-every",
            "50ms",
            "--probe-timeout",
            "100ms",
            "--health-failures",
            "1",
        ];
        job.run(&[&recover[..], &health].concat(), COUNTS)?;
        job.logged("no answer within 100ms")?;
        job.end()?;
        // One that does nothing any more.
        let hang = ["--hang-after", "300ms"];
        let script = "echo run >> runs; [ $(wc -l < runs) -gt 1 ] || exec sleep 1000; while :; do :; done";
        job.run(&[&recover[..], &hang].concat(), script)?;
        job.logged("no sign of life for 300ms")?;
        job.work_says("runs", |text| text.lines().count() == 2)?;
        job.end()
    });
}

#[test]
fn a_terminal_is_attached_again() {
    each_user("supervise-tty", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "tty");
        let options = ["--tty", "--recover", "on-failure:2", "--recover-delay", "10ms"];
        let script = "tty -s || exit 0; echo run >> runs; echo \"run $(wc -l < runs)\"; [ $(wc -l < runs) -gt 1 ] || kill -KILL $$; \
                      until [ -e go ]; do sleep 0.02; done; echo done";
        let foreground = job.start(&options, script)?;
        job.work_says("runs", |text| text.lines().count() == 2)?;
        job.until("it is attached again", |job| job["attached"] == true && job["main_running"] == true)?;
        fs::write(sandbox.work.join("go"), b"").map_err(|error| Failure(error.to_string()))?;
        let ended = expect(foreground.finish(DEADLINE)?, 0)?;
        if !ended.stdout.contains("run 1") || !ended.stdout.contains("done") {
            return Err(Failure(ended.report()));
        }
        job.gone()
    });
}

#[test]
fn dumper_and_command_line_may_die_at_any_moment() {
    each_user("supervise-kills", Users::Both, |sandbox| {
        let job = Named::new(sandbox, "kills");
        let options =
            ["--every", "20ms", "--keep", "2", "--recover", "on-failure:3", "--recover-delay", "10ms"];
        let foreground = job.start(&options, COUNTS)?;
        count(&job)?;
        let supervisor = job.supervisor()?;
        let mut random =
            ckpt_tests::seed::Random::announced(&format!("supervise-kills as {}", sandbox.user.name()));
        for _ in 0..10 {
            // The dumper is the supervisor's child; at a moment that no one chose.
            let dumper = poll_until(DEADLINE, || supervisor.tree().get(1).copied())
                .ok_or_else(|| Failure(format!("no dump\n{}", job.log())))?;
            for _ in 0..random.below(20_000) {
                std::hint::spin_loop();
            }
            dumper.signal(Signal::SIGKILL);
        }
        // The command line: the job and its supervisor go on.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(foreground.pid()), Signal::SIGKILL)
            .map_err(|errno| Failure(errno.to_string()))?;
        drop(foreground);
        let before = job.until("dumps", |job| dumps(job) >= 2)?;
        job.until("more dumps", |job| dumps(job) > dumps(&before))?;
        expect_eq("supervised", before["supervision"]["supervised"].as_bool(), Some(true))?;
        let at = count(&job)?;
        counts_on(&job, at)?;
        job.processes()?[0].signal(Signal::SIGKILL);
        job.until("a recovery", |job| supervision(job)["recoveries"] == 1 && job["main_running"] == true)?;
        counts_on(&job, at)?;
        job.end()?;
        for number in job.checkpoints() {
            job.succeed(&["verify", &format!("kills@{number}")])?;
        }
        Ok(())
    });
}

#[test]
fn the_unit_template_is_valid() {
    let unit = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/systemd/ckpt@.service");
    let text = fs::read_to_string(unit).unwrap_or_else(|error| panic!("{error}"));
    // Every option that it gives must be one of this ckpt's.
    let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/ckpt "));
    let options = line.unwrap_or_default().split(' ').filter(|word| word.starts_with("--") && word.len() > 2);
    let ckpt = stage().ckpt().unwrap_or_else(|failure| panic!("{failure}"));
    let help = std::process::Command::new(&ckpt).args(["run", "--help"]).output();
    let help = String::from_utf8_lossy(&help.unwrap_or_else(|error| panic!("{error}")).stdout).into_owned();
    let mut seen = 0;
    for option in options {
        assert!(help.contains(option), "{option} is not in:\n{help}");
        seen += 1;
    }
    assert!(seen >= 5, "{text}");
    if std::process::Command::new("systemd-analyze").arg("--version").output().is_err() {
        ckpt_tests::announce("skipped: systemd-analyze verify: there is no systemd-analyze here");
        return;
    }
    // It looks for the program.
    let copy = stage().root.join("ckpt@.service");
    let text = text.replace("/usr/local/bin/ckpt", &ckpt.to_string_lossy());
    fs::write(&copy, text).unwrap_or_else(|error| panic!("{error}"));
    let instance = stage().root.join("ckpt@simulation.service");
    let _ = fs::remove_file(&instance);
    std::os::unix::fs::symlink(&copy, &instance).unwrap_or_else(|error| panic!("{error}"));
    let verified = std::process::Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&instance)
        .output()
        .unwrap_or_else(|error| panic!("{error}"));
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    let about_it: Vec<&str> = said.lines().filter(|line| line.contains("ckpt@")).collect();
    assert!(verified.status.success() && about_it.is_empty(), "{said}");
    for file in [copy, instance] {
        let _ = fs::remove_file(file);
    }
}
