// SPDX-License-Identifier: MIT OR Apache-2.0
//! `dump --with-files` and `restore --rollback-files`: a SQLite database and a log, killed after writing on.
#![forbid(unsafe_code)]

use std::{fs, path::Path, time::Duration};

use ckpt_tests::{
    Failure, Outcome,
    job::{Job, RunOptions},
    process::{Finished, poll_until},
    proof::each_user,
    sandbox::Sandbox,
    seed::{Random, count_from},
    stage::stage,
    user::Users,
};

const DEADLINE: Duration = Duration::from_secs(240);
const CONFLICT: i32 = 113;

fn io<T>(result: std::io::Result<T>, what: &str) -> Outcome<T> {
    result.map_err(|error| Failure(format!("{what}: {error}")))
}

/// The work directory, and what the ledger says there.
struct Ledger<'a>(&'a Sandbox);

impl Ledger<'_> {
    fn command(&self, mode: &str) -> Outcome<Vec<String>> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("apps/ledger.py");
        let program = stage().copy(&source, "ledger.py")?;
        let script = format!("cd '{}' && exec python3 '{}' {mode}", self.0.work.display(), program.display());
        Ok(["sh".to_owned(), "-c".to_owned(), script].to_vec())
    }

    fn path(&self, file: &str) -> std::path::PathBuf {
        self.0.work.join(file)
    }

    fn progress(&self) -> u64 {
        fs::read_to_string(self.path("progress")).unwrap_or_default().trim().parse().unwrap_or(0)
    }

    fn reaches(&self, count: u64) -> Outcome<u64> {
        poll_until(DEADLINE, || Some(self.progress()).filter(|now| *now >= count))
            .ok_or_else(|| Failure(format!("the ledger stays at {}, short of {count}", self.progress())))
    }

    /// In the middle of a transaction.
    fn hold(&self) -> Outcome<()> {
        io(fs::write(self.path("hold"), b""), "hold")?;
        poll_until(DEADLINE, || self.path("held").exists().then_some(()))
            .ok_or_else(|| Failure::new("never held"))
    }

    fn let_go(&self) {
        for file in ["hold", "held", "check", "verdict", "progress"] {
            let _ = fs::remove_file(self.path(file));
        }
    }

    /// What it says when it compares everything: the number of entries.
    fn verdict(&self) -> Outcome<u64> {
        io(fs::write(self.path("check"), b""), "check")?;
        let text = poll_until(DEADLINE, || fs::read_to_string(self.path("verdict")).ok())
            .ok_or_else(|| Failure::new("no verdict"))?;
        let count = text.strip_prefix("ok ").and_then(|count| count.parse().ok());
        count.ok_or_else(|| Failure(format!("the ledger says: {text}")))
    }

    /// Files that a rollback has kept or forgotten.
    fn named(&self, part: &str) -> Vec<String> {
        let entries = fs::read_dir(&self.0.work).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.contains(part)).collect()
    }
}

fn ready<'a>(sandbox: &'a Sandbox, mode: &str) -> Outcome<(Ledger<'a>, Job<'a>)> {
    let ledger = Ledger(sandbox);
    let job = Job::run(sandbox, "ledger", RunOptions::default(), &ledger.command(mode)?)?;
    ledger.reaches(30)?;
    Ok((ledger, job))
}

fn roll_back(job: &Job<'_>) -> Outcome<Finished> {
    job.succeed(&["restore", &job.name, "--detach", "--rollback-files"], &[])
}

/// `changed` are the files that hold what was written on.
fn written_on(mode: &'static str, changed: [&'static str; 2]) {
    each_user(&format!("files-{mode}"), Users::Both, |sandbox| {
        let (ledger, job) = ready(sandbox, mode)?;
        let least = ledger.progress();
        job.dump(&["--with-files"])?;
        let most = ledger.reaches(ledger.progress() + 1)?;
        job.succeed(&["verify", &job.name], &[])?;
        let inspected = job.succeed(&["inspect", &job.name], &[])?;
        for what in ["content of", "data.db", "log.txt"] {
            if !inspected.stdout.contains(what) {
                return Err(Failure(format!("no {what}:\n{}", inspected.report())));
            }
        }
        // Writes on, is left in the middle of a transaction, and dies there. Twice, so that what was put back can be again.
        for round in 0..2 {
            ledger.reaches(most + 20)?;
            ledger.hold()?;
            job.crash()?;
            ledger.let_go();
            // Without being asked nothing is put back, and a database that has changed stands in the way.
            let refused = job.ckpt(&["restore", &job.name, "--detach"], &[])?;
            if refused.code != CONFLICT || !refused.stderr.contains("data.db") {
                return Err(Failure(refused.report()));
            }
            let restored = roll_back(&job)?;
            for file in changed {
                if !restored.stderr.contains(&format!("{file}.ckpt-replaced-")) {
                    return Err(Failure(format!("{file} is not named:\n{}", restored.report())));
                }
                if ledger.named(&format!("{file}.ckpt-replaced-")).len() != round + 1 {
                    return Err(Failure(format!("kept: {:?}", ledger.named("ckpt-replaced"))));
                }
            }
        }
        let count = ledger.verdict()?;
        if count < least {
            return Err(Failure(format!("{count} entries, and {least} at the dump")));
        }
        let left = ledger.named("ckpt-rollback");
        if left.is_empty() { Ok(()) } else { Err(Failure(format!("left behind: {left:?}"))) }
    });
}

#[test]
fn a_database_with_a_journal_goes_back() {
    written_on("delete", ["data.db", "log.txt"]);
}

#[test]
fn a_database_with_a_write_ahead_log_goes_back() {
    // The database itself is not written to before a checkpoint of its own.
    written_on("wal", ["data.db-wal", "log.txt"]);
}

/// Content of files is in each image of a chain, whole, and stays what it is when the chain is folded.
#[test]
fn a_squashed_chain_puts_back_the_files_of_its_newest() {
    each_user("files-chain", Users::Both, |sandbox| {
        let (ledger, job) = ready(sandbox, "delete")?;
        let mut least = 0;
        for number in 1..=3 {
            least = ledger.reaches(ledger.progress() + 5)?;
            let said = job.succeed(&["dump", &job.name, "--incremental", "--with-files", "--json"], &[])?;
            if (number > 1) == said.stdout.contains("\"parent\": null") {
                return Err(Failure(said.report()));
            }
        }
        ledger.reaches(ledger.progress() + 20)?;
        ledger.hold()?;
        job.crash()?;
        ledger.let_go();
        job.succeed(&["squash", &job.name], &[])?;
        for older in [2, 1] {
            job.succeed(&["rm", &format!("{}@{older}", job.name)], &[])?;
        }
        job.succeed(&["verify", &job.name], &[])?;
        roll_back(&job)?;
        let count = ledger.verdict()?;
        if count < least { Err(Failure(format!("{count} entries, and {least} at the dump"))) } else { Ok(()) }
    });
}

#[test]
fn files_that_were_replaced_or_removed_come_back() {
    each_user("files-replaced", Users::Both, |sandbox| {
        let files = Ledger(sandbox);
        // Not SQLite: that refuses to write to a database whose inode is another.
        let script = format!(
            "cd '{}'; printf old > data; exec 3<>data 4>>log; echo old >&4; : > ready; until [ -e go ]; do sleep 0.02; done; \
             printf new >&3; echo new >&4; : > done; until [ -e end ]; do sleep 0.02; done",
            sandbox.work.display()
        );
        let job = Job::run(sandbox, "replaced", RunOptions::default(), &["sh".into(), "-c".into(), script])?;
        let appears = |file: &str| {
            poll_until(DEADLINE, || files.path(file).exists().then_some(()))
                .ok_or_else(|| Failure(format!("no {file}")))
        };
        let text = |file: &str| fs::read_to_string(files.path(file)).unwrap_or_default();
        appears("ready")?;
        job.dump(&["--with-files", "--stop"])?;
        let copy = files.path("copy");
        io(fs::write(&copy, b"something else"), "copy")?;
        io(fs::rename(&copy, files.path("data")), "rename")?;
        io(fs::remove_file(files.path("log")), "remove")?;
        let restored = roll_back(&job)?;
        if !restored.stderr.contains("it had been removed") {
            return Err(Failure(restored.report()));
        }
        let kept = files.named("data.ckpt-replaced-");
        if kept.len() != 1 || text(&kept[0]) != "something else" {
            return Err(Failure(format!("kept {kept:?}")));
        }
        if (text("data").as_str(), text("log").as_str()) != ("old", "old\n") {
            return Err(Failure(format!("data {:?}, log {:?}", text("data"), text("log"))));
        }
        // What the job has open is what has the names.
        io(fs::write(files.path("go"), b""), "go")?;
        appears("done")?;
        if (text("data").as_str(), text("log").as_str()) != ("new", "old\nnew\n") {
            return Err(Failure(format!("data {:?}, log {:?}", text("data"), text("log"))));
        }
        // Nothing has changed since this one: nothing is put back, and neither is it by the next.
        job.dump(&["--stop", "--with-files"])?;
        for _ in 0..2 {
            let restored = roll_back(&job)?;
            if restored.stderr.contains("put back") {
                return Err(Failure(restored.report()));
            }
            job.kill()?;
        }
        let left = files.named("ckpt-rollback");
        if left.is_empty() { Ok(()) } else { Err(Failure(format!("left behind: {left:?}"))) }
    });
}

#[test]
fn the_policy_of_run_holds_for_dumps_and_recoveries() {
    each_user("files-recover", Users::Both, |sandbox| {
        let ledger = Ledger(sandbox);
        let ckpt = stage().ckpt()?.to_string_lossy().into_owned();
        let options = [
            "run",
            "--name",
            "policy",
            "--detach",
            "--with-files",
            "--recover",
            "on-failure",
            "--recover-delay",
            "10ms",
            "--",
        ];
        let line: Vec<String> = std::iter::once(ckpt.clone())
            .chain(options.iter().map(|word| (*word).to_owned()))
            .chain(ledger.command("delete")?)
            .collect();
        let started = sandbox.execute(&line, &[], DEADLINE)?;
        if started.code != 0 {
            return Err(Failure(started.report()));
        }
        ledger.reaches(30)?;
        let line = |words: &[&str]| {
            std::iter::once(ckpt.clone()).chain(words.iter().map(|w| (*w).to_owned())).collect::<Vec<_>>()
        };
        let dumped = sandbox.execute(&line(&["dump", "policy"]), &[], DEADLINE)?;
        if dumped.code != 0 {
            return Err(Failure(dumped.report()));
        }
        ledger.hold()?;
        let log = sandbox.store.join("policy/log");
        // It ends by itself, with a status that is a failure, and is brought back.
        let _ = fs::remove_file(ledger.path("held"));
        let _ = fs::remove_file(ledger.path("hold"));
        let said = || fs::read_to_string(&log).unwrap_or_default();
        poll_until(DEADLINE, || said().contains("restored from policy@1").then_some(()))
            .ok_or_else(|| Failure(format!("not recovered:\n{}", said())))?;
        let count = ledger.verdict()?;
        if count < 30 || ledger.named("data.db.ckpt-replaced-").is_empty() {
            return Err(Failure(format!("{count} entries; kept {:?}\n{}", ledger.named("ckpt"), said())));
        }
        let wait = sandbox.execute(&line(&["wait", "policy"]), &[], DEADLINE)?;
        if wait.code == 0 { Ok(()) } else { Err(Failure(wait.report())) }
    });
}

#[test]
fn a_rollback_killed_at_any_step_can_be_done_again() {
    each_user("files-kill", Users::Both, |sandbox| {
        let (ledger, job) = ready(sandbox, "delete")?;
        job.dump(&["--with-files"])?;
        let words = ["restore", job.name.as_str(), "--detach", "--rollback-files"];
        let steps_file = sandbox.work.join("steps");
        ledger.hold()?;
        job.crash()?;
        ledger.let_go();
        job.succeed(&words, &[("CKPT_TEST_COUNT", &steps_file.to_string_lossy())])?;
        let steps: u64 = io(fs::read_to_string(&steps_file), "steps")?.trim().parse().unwrap_or(0);
        if steps < 10 {
            return Err(Failure(format!("only {steps} steps")));
        }
        let mut random = Random::announced(&format!("files-kill as {}", sandbox.user.name()));
        for _ in 0..count_from("CKPT_TEST_MOMENTS", 200).min(30) {
            let before = ledger.progress();
            ledger.reaches(before + 3)?;
            ledger.hold()?;
            job.crash()?;
            ledger.let_go();
            let at = (1 + random.below(steps)).to_string();
            let killed = job.ckpt(&words, &[("CKPT_TEST_KILL_AT", &at)])?;
            if killed.code != 0 {
                job.succeed(&words, &[])?;
            }
        }
        ledger.verdict()?;
        let left = ledger.named("ckpt-rollback");
        if left.is_empty() { Ok(()) } else { Err(Failure(format!("left behind: {left:?}"))) }
    });
}
