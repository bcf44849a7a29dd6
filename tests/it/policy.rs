// SPDX-License-Identifier: MIT OR Apache-2.0
//! What changed since the dump: output that grew is put back, all else is refused by name; and what ckpt does not
//! support is named before anything is touched.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use ckpt_tests::{
    Failure, Outcome,
    fingerprint::Fingerprint,
    guest::{GUEST_DEADLINE, Guest, Talk, passes},
    job::{Job, RunOptions},
    process::{Finished, poll_until},
    proof::{each_user, left_nothing_behind, with_ready_job},
    sandbox::Sandbox,
    user::Users,
};

/// `ckpt restore` or `dump`: a file has changed or is in use.
const CONFLICT: i32 = 113;
/// `ckpt dump`: something is not supported.
const REFUSED: i32 = 114;

fn expect(condition: bool, what: impl Into<String>) -> Outcome<()> {
    if condition { Ok(()) } else { Err(Failure(what.into())) }
}

/// Restores with `options`, whatever the status.
fn try_restore(job: &Job<'_>, options: &[&str]) -> Outcome<Finished> {
    job.ckpt(&[&["restore", job.name.as_str(), "--detach"], options].concat(), &[])
}

fn expect_restored(job: &Job<'_>, options: &[&str]) -> Outcome<Finished> {
    let finished = try_restore(job, options)?;
    expect(finished.code == 0, finished.report())?;
    Ok(finished)
}

/// A restore that must be refused because of `path`, with the options that would go on, leaving no process.
fn expect_refused(job: &Job<'_>, options: &[&str], path: &str) -> Outcome<Finished> {
    let finished = try_restore(job, options)?;
    expect(finished.code == CONFLICT, format!("expected status {CONFLICT}:\n{}", finished.report()))?;
    expect(
        finished.stderr.contains(path),
        format!("the message does not name {path}:\n{}", finished.report()),
    )?;
    expect(job.init().is_none(), "a refused restore left a job")?;
    Ok(finished)
}

/// Has the job write on, and waits until it has.
fn write_more(sandbox: &Sandbox) -> Outcome<()> {
    fs::write(sandbox.work.join("more"), "")
        .map_err(|error| Failure(format!("cannot create more: {error}")))?;
    poll_until(GUEST_DEADLINE, || sandbox.work.join("wrote").exists().then_some(()))
        .ok_or_else(|| Failure::new("the guest did not write on"))
}

fn forget_more(sandbox: &Sandbox) {
    let _ = fs::remove_file(sandbox.work.join("more"));
    let _ = fs::remove_file(sandbox.work.join("wrote"));
}

fn output(sandbox: &Sandbox) -> PathBuf {
    sandbox.work.join("output")
}

fn read(path: &PathBuf) -> Outcome<Vec<u8>> {
    fs::read(path).map_err(|error| Failure(format!("cannot read {}: {error}", path.display())))
}

/// Any file under `dir` whose content is `content`.
fn holds(dir: &std::path::Path, content: &[u8]) -> bool {
    fs::read_dir(dir).into_iter().flatten().flatten().any(|entry| {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => holds(&path, content),
            Ok(kind) if kind.is_file() => fs::read(&path).is_ok_and(|bytes| bytes == content),
            _ => false,
        }
    })
}

#[test]
fn control() {
    for mode in ["append", "sequential", "middle"] {
        ckpt_tests::proof::control(&Guest::new("file_writer").arg(mode));
    }
    ckpt_tests::proof::control(&Guest::new("sock_refused"));
}

/// The ordinary long job: it wrote on after the dump and died. It comes back without a question.
fn grown_output(mode: &str) {
    let guest = Guest::new("file_writer").arg(mode);
    each_user(&format!("policy-grown-{mode}"), Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            let at_dump = read(&output(sandbox))?;
            job.dump(&[])?;
            write_more(sandbox)?;
            job.kill()?;
            let grown = read(&output(sandbox))?;
            expect(grown.len() > at_dump.len(), "the output did not grow")?;
            forget_more(sandbox);

            let restored = expect_restored(job, &[])?;
            expect(
                read(&output(sandbox))? == at_dump,
                "the output was not put back to the length it had at the dump",
            )?;
            let tail = &grown[at_dump.len()..];
            expect(holds(&sandbox.store, tail), "the cut tail is not kept beside the checkpoint")?;
            let said = format!("{}{}", restored.stdout, restored.stderr);
            expect(said.contains("output"), format!("the cut file is not named:\n{}", restored.report()))?;
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn appended_output_is_put_back() {
    grown_output("append");
}

#[test]
fn sequential_output_is_put_back() {
    grown_output("sequential");
}

/// A log that was copied and emptied has grown beyond its old length again: that is no growth.
#[test]
fn rotated_output_is_refused() {
    let guest = Guest::new("file_writer").arg("append");
    each_user("policy-rotated", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, _| {
            let at_dump = read(&output(sandbox))?;
            job.dump(&[])?;
            job.kill()?;
            let rotated = vec![b'r'; at_dump.len() + 100];
            fs::write(output(sandbox), &rotated)
                .map_err(|error| Failure(format!("cannot write the output: {error}")))?;
            let path = output(sandbox).to_string_lossy().into_owned();
            expect_refused(job, &[], &path)?;
            expect_refused(job, &["--files", "rollback"], &path)?;
            expect(read(&output(sandbox))? == rotated, "a refused restore changed the file")?;
            expect_restored(job, &["--files", "keep"]).map(drop)
        })
    });
}

/// What one restore has cut back is what the next restore of the same checkpoint finds.
#[test]
fn second_restore_after_a_cut() {
    let guest = Guest::new("file_writer").arg("append");
    each_user("policy-cut-twice", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            let at_dump = read(&output(sandbox))?;
            job.dump(&[])?;
            write_more(sandbox)?;
            job.kill()?;
            forget_more(sandbox);
            expect_restored(job, &[])?;
            job.kill()?;
            expect_restored(job, &[])?;
            expect(read(&output(sandbox))? == at_dump, "the output is not as it was at the dump")?;
            passes(sandbox, nonce)
        })
    });
}

/// `dump --stop`: nothing of the job runs after its state was taken.
#[test]
fn stop_lets_nothing_run() {
    let guest = Guest::new("file_workers").in_motion();
    for round in 0..5 {
        each_user(&format!("policy-stop-{round}"), Users::Both, |sandbox| {
            with_ready_job(&guest, sandbox, |job, nonce| {
                job.dump(&["--stop"])?;
                expect(job.init().is_none(), "the job lives on after dump --stop")?;
                // A single write after the dump would be refused, as the files are written in place.
                expect_restored(job, &["--files", "refuse"])?;
                passes(sandbox, nonce)
            })
        });
    }
}

/// A job stopped twice has a second stop pending.
#[test]
fn stopped_twice() {
    let guest = Guest::new("file_writer").arg("append");
    each_user("policy-stopped-twice", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            for _ in 0..2 {
                job.succeed(&["kill", job.name.as_str(), "STOP"], &[])?;
            }
            job.dump(&[])?;
            job.kill()?;
            expect_restored(job, &[])?;
            job.succeed(&["kill", job.name.as_str(), "CONT"], &[])?;
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn grown_output_by_option() {
    let guest = Guest::new("file_writer").arg("append");
    each_user("policy-grown-options", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, _| {
            let at_dump = read(&output(sandbox))?;
            job.dump(&[])?;
            write_more(sandbox)?;
            job.kill()?;
            let grown = read(&output(sandbox))?;
            forget_more(sandbox);
            expect_refused(job, &["--files", "refuse"], "output")?;
            expect(read(&output(sandbox))? == grown, "a refused restore changed the file")?;
            expect_restored(job, &["--files", "keep"])?;
            expect(read(&output(sandbox))? == grown, "--files keep changed the file")?;
            job.kill()?;
            expect_restored(job, &["--files", "rollback"])?;
            expect(read(&output(sandbox))? == at_dump, "--files rollback did not put the file back")
        })
    });
}

#[test]
fn file_changed_in_the_middle_is_refused() {
    let guest = Guest::new("file_writer").arg("middle");
    each_user("policy-middle", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            job.dump(&[])?;
            write_more(sandbox)?;
            job.kill()?;
            forget_more(sandbox);
            let changed = read(&output(sandbox))?;
            let path = output(sandbox).to_string_lossy().into_owned();
            let refused = expect_refused(job, &[], &path)?;
            for option in ["--files", "--allow-changed"] {
                expect(
                    refused.stderr.contains(option),
                    format!("no word of {option}:\n{}", refused.report()),
                )?;
            }
            expect_refused(job, &["--files", "rollback"], &path)?;
            expect_refused(job, &["--allow-changed", "/nonexistent"], &path)?;
            expect_restored(job, &["--files", "keep"])?;
            job.kill()?;
            expect_restored(job, &["--allow-changed", &path])?;
            expect(read(&output(sandbox))? == changed, "--allow-changed changed the file")?;
            passes(sandbox, nonce)
        })
    });
}

/// A file that the job only reads, treated by `change` between dump and restore.
fn input_changed(label: &str, change: impl Fn(&PathBuf), goes_on_with_keep: bool) {
    let guest = Guest::new("file_writer").arg("reader");
    each_user(label, Users::Both, |sandbox| {
        let input = sandbox.work.join("input");
        fs::write(&input, vec![b'i'; 10_000])
            .map_err(|error| Failure(format!("cannot write input: {error}")))?;
        with_ready_job(&guest, sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            change(&input);
            let path = input.to_string_lossy().into_owned();
            expect_refused(job, &[], &path)?;
            expect_refused(job, &["--files", "rollback"], &path)?;
            if goes_on_with_keep {
                expect_restored(job, &["--files", "keep"])?;
                passes(sandbox, nonce)?;
            }
            Ok(())
        })
    });
}

#[test]
fn shrunk_file_is_refused() {
    input_changed(
        "policy-shrunk",
        |path| drop(fs::File::options().write(true).open(path).unwrap().set_len(100)),
        true,
    );
}

#[test]
fn deleted_file_is_refused() {
    input_changed("policy-deleted", |path| fs::remove_file(path).unwrap(), false);
}

#[test]
fn grown_input_is_refused() {
    // It grew, but the job does not write it: nobody's output, so nobody may cut it.
    input_changed(
        "policy-grown-input",
        |path| fs::File::options().append(true).open(path).unwrap().write_all(b"more").unwrap(),
        true,
    );
}

#[test]
fn replaced_file_is_refused() {
    input_changed(
        "policy-replaced",
        |path| {
            fs::remove_file(path).unwrap();
            fs::write(path, vec![b'j'; 10_000]).unwrap();
        },
        true,
    );
}

/// A guest that runs from a copy of its own, which `change` treats between dump and restore.
fn executable_changed(label: &str, change: impl Fn(&Path), judge: impl Fn(&Job<'_>, &str) -> Outcome<()>) {
    let guest = Guest::new("file_writer").arg("append");
    each_user(label, Users::Both, |sandbox| {
        let program = sandbox.root.join("program");
        let mut command = guest.command(sandbox)?;
        fs::copy(&command[0], &program).map_err(|error| Failure(format!("cannot copy: {error}")))?;
        let path = program.to_string_lossy().into_owned();
        command[0] = path.clone();
        let job = Job::run(sandbox, "guest", RunOptions::default(), &command)?;
        let nonce = match Talk::with(sandbox).wait_ready()? {
            Ok(nonce) => nonce,
            Err(verdict) => return Err(Failure(format!("the guest says: {verdict:?}"))),
        };
        job.dump(&[])?;
        job.kill()?;
        change(&program);
        judge(&job, &path)?;
        if job.init().is_some() { passes(sandbox, &nonce) } else { Ok(()) }
    });
}

/// Puts a file with this content in the place of another: a new inode with new times.
fn replace(path: &Path, content: &[u8]) {
    let beside = path.with_extension("new");
    fs::write(&beside, content).unwrap();
    fs::set_permissions(&beside, fs::metadata(path).unwrap().permissions()).unwrap();
    fs::rename(&beside, path).unwrap();
}

/// The same ELF file with other bytes in its build-id note.
fn with_another_build_id(mut elf: Vec<u8>) -> Vec<u8> {
    // Lengths of name and id, NT_GNU_BUILD_ID, the name.
    let head = [&4u32.to_le_bytes()[..], &20u32.to_le_bytes(), &3u32.to_le_bytes(), b"GNU\0"].concat();
    let at = elf.windows(head.len()).position(|window| window == head).expect("a build-id of 20 bytes");
    elf[at + head.len()..][..20].iter_mut().for_each(|byte| *byte = !*byte);
    elf
}

#[test]
fn reinstalled_executable_is_accepted() {
    executable_changed(
        "policy-same-build",
        |path| replace(path, &fs::read(path).unwrap()),
        |job, path| {
            expect_refused(job, &["--files", "refuse"], path)?;
            expect_restored(job, &[]).map(drop)
        },
    );
}

#[test]
fn executable_of_another_build_is_refused() {
    executable_changed(
        "policy-other-build",
        |path| replace(path, &with_another_build_id(fs::read(path).unwrap())),
        |job, path| {
            let refused = expect_refused(job, &[], path)?;
            expect(refused.stderr.matches("build-id").count() == 2, refused.report())?;
            expect_refused(job, &["--files", "keep"], path)?;
            expect_restored(job, &["--allow-changed", path]).map(drop)
        },
    );
}

#[test]
fn executable_of_another_build_with_the_old_times_is_refused() {
    executable_changed(
        "policy-other-build-times",
        |path| {
            let modified = fs::metadata(path).unwrap().modified().unwrap();
            replace(path, &with_another_build_id(fs::read(path).unwrap()));
            fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
        },
        |job, path| {
            let refused = expect_refused(job, &[], path)?;
            expect(refused.stderr.matches("build-id").count() == 2, refused.report())
        },
    );
}

#[test]
fn file_written_by_another_live_job_is_a_conflict() {
    let guest = Guest::new("file_writer").arg("append");
    each_user("policy-two-jobs", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, _| {
            job.dump(&[])?;
            // The original still runs and writes: a second one beside it would mix its lines with those.
            let beside = job.ckpt(&["restore", &job.name, "--detach", "--name", "beside"], &[])?;
            let _adopted = job.adopt("beside");
            expect(beside.code == CONFLICT, format!("expected status {CONFLICT}:\n{}", beside.report()))?;
            expect(beside.stderr.contains("output"), format!("the file is not named:\n{}", beside.report()))?;
            expect(
                beside.stderr.contains(&job.name),
                format!("the other job is not named:\n{}", beside.report()),
            )
        })
    });
}

#[test]
fn restored_side_by_side() {
    // Without a file in common, one checkpoint gives as many jobs as wanted.
    let guest = Guest::new("mem_malloc");
    each_user("policy-side-by-side", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            job.dump(&[])?;
            let mut copies = Vec::new();
            for name in ["copy-a", "copy-b"] {
                job.succeed(&["restore", &job.name, "--detach", "--name", name], &[])?;
                let copy = job.adopt(name);
                expect(copy.init().is_some(), format!("{name} does not run"))?;
                copies.push(copy);
            }
            let waiters: Vec<_> =
                copies.iter().map(|copy| copy.start(&["wait", &copy.name], &[])).collect::<Outcome<_>>()?;
            passes(sandbox, nonce)?;
            for waiter in waiters {
                let finished = waiter.finish(Duration::from_secs(30))?;
                expect(finished.code == 0, finished.report())?;
            }
            Ok(())
        })
    });
}

#[test]
fn unsupported_is_named_all_at_once_and_nothing_touched() {
    let guest = Guest::new("sock_refused");
    each_user("policy-unsupported", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            let init = job.init().ok_or_else(|| Failure::new("the job does not run"))?;
            let before = Fingerprint::take(init);
            for command in ["check", "dump"] {
                let refused = job.ckpt(&[command, &job.name], &[])?;
                expect(refused.code == REFUSED, format!("expected status {REFUSED}:\n{}", refused.report()))?;
                let said = format!("{}{}", refused.stdout, refused.stderr);
                let held = read(&sandbox.work.join("held"))?;
                for line in String::from_utf8_lossy(&held).lines() {
                    let words: Vec<&str> = line.split(' ').collect();
                    let [pid, fd, kind] = words[..] else { return Err(Failure(format!("held: {line}"))) };
                    let named = said.lines().any(|said_line| {
                        let numbers: Vec<&str> = said_line
                            .split(|c: char| !c.is_ascii_digit())
                            .filter(|word| !word.is_empty())
                            .collect();
                        said_line.to_lowercase().contains(&kind.to_lowercase())
                            && numbers.contains(&pid)
                            && (fd == "-1" || numbers.contains(&fd))
                    });
                    expect(
                        named,
                        format!("no line names {kind} of pid {pid}, fd {fd}:\n{}", refused.report()),
                    )?;
                }
                left_nothing_behind(&before, init)?;
            }
            let list = job.ckpt(&["verify", &job.name], &[])?;
            expect(list.code == 112, format!("a refused dump left a checkpoint:\n{}", list.report()))?;
            passes(sandbox, nonce)
        })
    });
}

/// What has its system calls dispatched to itself can't be made to do one by ckpt, and it is no worse for the attempt.
#[test]
fn dispatched_system_calls_are_refused_and_nothing_touched() {
    for mode in ["dumpable", "undumpable"] {
        let guest = Guest::new("syscall_dispatch").arg(mode);
        each_user(&format!("policy-dispatch-{mode}"), Users::Both, |sandbox| {
            with_ready_job(&guest, sandbox, |job, nonce| {
                let refused = job.ckpt(&["dump", &job.name], &[])?;
                expect(refused.code == REFUSED, format!("expected status {REFUSED}:\n{}", refused.report()))?;
                let said = refused.stderr.contains("PR_SET_SYSCALL_USER_DISPATCH");
                expect(said, format!("the reason is not named:\n{}", refused.report()))?;
                passes(sandbox, nonce)
            })
        });
    }
}

#[test]
fn same_name_twice_is_a_conflict() {
    let guest = Guest::new("mem_brk");
    each_user("policy-same-name", Users::Both, |sandbox| {
        with_ready_job(&guest, sandbox, |job, nonce| {
            let store = sandbox.store.to_string_lossy().into_owned();
            let again =
                job.ckpt(&["run", "--name", &job.name, "--store", &store, "--detach", "--", "true"], &[])?;
            expect(again.code == CONFLICT, format!("expected status {CONFLICT}:\n{}", again.report()))?;
            expect(again.stderr.contains(&job.name), again.report())?;
            let options = RunOptions { interceptor: true, tty: false };
            let missing = Job::run(sandbox, "missing", options, &["/nonexistent/program".to_owned()]);
            expect(missing.is_err(), "a program that does not exist was run")?;
            passes(sandbox, nonce)
        })
    });
}
