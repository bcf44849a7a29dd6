// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptors from outside the job: standard input and output of `ckpt run`, bound anew to those of `ckpt restore`.

use std::{fs, path::Path, time::Duration};

use ckpt_tests::{
    Failure, Outcome,
    guest::{GUEST_DEADLINE, Guest, Talk, Verdict},
    job::{Job, RunOptions},
    kinds,
    process::{Running, poll_until},
    proof::{SKIP_VARIABLE, each_user},
    sandbox::Sandbox,
    stage::stage,
    user::Users,
};

/// A FIFO held open by the test: what reads it sees the end of file once this is dropped.
fn fifo(sandbox: &Sandbox, path: &Path) -> Outcome<fs::File> {
    let failure = |error: &dyn std::fmt::Display| Failure(format!("{}: {error}", path.display()));
    let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
    nix::unistd::mkfifo(path, mode).map_err(|error| failure(&error))?;
    sandbox.user.give(path)?;
    // Both ends, so that nobody's open waits for the other.
    fs::File::options().read(true).write(true).open(path).map_err(|error| failure(&error))
}

/// Starts `cat INPUT | COMMAND | cat > OUTPUT`: the job's descriptors are ends of pipes that others hold.
fn start_piped(
    sandbox: &Sandbox,
    input: &Path,
    command: &[String],
    output: &Path,
    environment: &[(&str, &str)],
) -> Outcome<Running> {
    let command: Vec<String> = command.iter().map(|word| format!("'{word}'")).collect();
    let script = format!("cat '{}' | {} | cat > '{}'", input.display(), command.join(" "), output.display());
    sandbox.start(&["sh".to_owned(), "-c".to_owned(), script], environment)
}

/// What the tests of this module prove (see `guest_tests!`).
pub mod proven {
    /// Its restore cannot be left out unnoticed.
    pub const KINDS: &[&str] = &[super::kinds::EXTERNAL];
}

#[test]
fn standard_input_and_output() {
    each_user("external-pipes", Users::Both, |sandbox| across_a_restore(sandbox, &[]));
}

#[test]
fn standard_input_and_output_need_their_kind() {
    let label = format!("external-pipes-without-{}", kinds::EXTERNAL);
    each_user(&label, Users::Both, |sandbox| {
        match across_a_restore(sandbox, &[(SKIP_VARIABLE, kinds::EXTERNAL)]) {
            Err(_) => Ok(()),
            Ok(()) => Err(Failure::new("nothing is missing although the descriptors were not restored")),
        }
    });
}

/// A job between two pipes is dumped, killed and restored between two others, with `environment` for the restore.
fn across_a_restore(sandbox: &Sandbox, environment: &[(&str, &str)]) -> Outcome<()> {
    let ckpt = stage().ckpt()?.to_string_lossy().into_owned();
    let work = &sandbox.work;
    let store = sandbox.store.to_string_lossy().into_owned();
    let guest = Guest::new("external_pipe").command(sandbox)?;
    // The harness makes jobs detached; another one is the handle by which it drives this one.
    let handle = Job::run(sandbox, "handle", RunOptions::default(), &["sleep".to_owned(), "600".to_owned()])?;
    let first_in = fifo(sandbox, &work.join("in1"))?;
    let mut run: Vec<String> =
        [&ckpt, "run", "--name", "ext", "--store", &store, "--"].map(String::from).to_vec();
    run.extend(guest);
    let first = start_piped(sandbox, &work.join("in1"), &run, &work.join("out1"), &[])?;
    let nonce = match Talk::with(sandbox).wait_ready()? {
        Ok(nonce) => nonce,
        Err(verdict) => return Err(Failure(format!("the guest says: {verdict:?}"))),
    };
    let job = handle.adopt("ext");
    job.dump(&[])?;
    job.kill()?;
    drop(first_in);
    first.finish(Duration::from_secs(30))?;

    fs::write(work.join("in2"), "one\ntwo\nthree\n").map_err(|error| Failure(format!("in2: {error}")))?;
    let restore = [&ckpt, "restore", "ext"].map(String::from);
    let second = start_piped(sandbox, &work.join("in2"), &restore, &work.join("out2"), environment)?;
    let talk = Talk::with(sandbox);
    talk.go()?;
    // Where the restore fails there will be no verdict.
    let finished = second.finish(GUEST_DEADLINE)?;
    match talk.verdict(Some(&nonce)) {
        Some(Verdict::Ok) => {}
        other => return Err(Failure(format!("the guest says: {other:?}\n{}", finished.report()))),
    }
    let expected = format!("one {nonce}\ntwo {nonce}\nthree {nonce}\n");
    let mut got = String::new();
    poll_until(Duration::from_secs(10), || {
        got = fs::read_to_string(work.join("out2")).unwrap_or_default();
        (got == expected).then_some(())
    })
    .ok_or_else(|| Failure(format!("output of the restored job: expected {expected:?}, got {got:?}")))
}

#[test]
fn more_open_files_than_half_the_soft_limit() {
    each_user("external-many-files", Users::Both, |sandbox| {
        let ready = sandbox.work.join("ready");
        let script = format!(
            "for i in {{10..700}}; do eval \"exec $i</etc/passwd\"; done; read -r first <&700; echo ready > '{0}'; \
             until [ -e '{1}' ]; do sleep 0.02; done; read -r second <&700; \
             [ \"$second\" = \"$(sed -n 2p /etc/passwd)\" ] || exit 9; ulimit -S -n > '{2}'",
            ready.display(),
            sandbox.work.join("go").display(),
            sandbox.work.join("limit").display(),
        );
        let words = ["bash", "-c", &format!("ulimit -S -n 720; {script}")].map(String::from);
        let job = Job::run(sandbox, "many", RunOptions::default(), &words)?;
        let wait_for = |file: &str| {
            let path = sandbox.work.join(file);
            let text = || fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n'));
            poll_until(GUEST_DEADLINE, text).ok_or_else(|| Failure(format!("there is no {}", path.display())))
        };
        wait_for("ready")?;
        job.dump(&[])?;
        job.kill()?;
        let restored = job.ckpt_after("ulimit -S -n 720", &["restore", "many", "--detach"])?;
        if restored.code != 0 {
            return Err(Failure(restored.report()));
        }
        fs::write(sandbox.work.join("go"), "").map_err(|error| Failure(format!("go: {error}")))?;
        match wait_for("limit")?.trim() {
            "720" => Ok(()),
            other => Err(Failure(format!("the soft limit of the restored job is {other}"))),
        }
    });
}
