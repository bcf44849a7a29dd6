// SPDX-License-Identifier: MIT OR Apache-2.0
//! inotify instances: watches come back by path, and who can't know what happened meanwhile is told so.

use std::{fs, path::Path};

use ckpt_tests::{
    Failure, Outcome,
    guest::{Guest, passes},
    job::Job,
    proof::{each_user, prove_goes_on, with_ready_job},
    sandbox::Sandbox,
    user::{User, Users},
};

ckpt_tests::guest_tests! {
    watches => Guest::new("inotify"), needs [kinds::INOTIFY];
}

const CONFLICT: i32 = 113;
const REFUSED: i32 = 114;

fn write(path: &Path, text: &str) -> Outcome<()> {
    fs::write(path, text).map_err(|error| Failure(format!("{}: {error}", path.display())))
}

/// A guest that watches a directory of which nothing but the guest's memory tells.
fn elsewhere(label: &str, guest: &Guest, flow: impl Fn(&Job<'_>, &Sandbox, &str) -> Outcome<()>) {
    each_user(label, Users::Both, |sandbox| {
        let deep = sandbox.root.join("elsewhere/deep/down");
        fs::create_dir_all(&deep).map_err(|error| Failure(format!("{}: {error}", deep.display())))?;
        sandbox.user.give(&deep)?;
        write(&sandbox.work.join("where"), &deep.to_string_lossy())?;
        with_ready_job(guest, sandbox, |job, nonce| flow(job, sandbox, nonce))
    });
}

#[test]
fn recorded_paths_are_used() {
    elsewhere("inotify-recorded", &Guest::new("inotify").arg("elsewhere"), |job, sandbox, nonce| {
        for _ in 0..2 {
            job.dump(&[])?;
            job.kill()?;
            job.restore(None, &[])?;
        }
        passes(sandbox, nonce)
    });
}

/// Only root can find the path without its having been recorded.
#[test]
fn a_path_that_nobody_knows_is_refused() {
    let guest = Guest::new("inotify").arg("elsewhere").without_interceptor();
    elsewhere("inotify-unknown", &guest, |job, sandbox, nonce| {
        if sandbox.user == User::Root {
            job.dump(&[])?;
            job.kill()?;
            job.restore(None, &[])?;
            return passes(sandbox, nonce);
        }
        let refused = job.ckpt(&["dump", &job.name], &[])?;
        let named = refused.stderr.contains("inotify watch 1 of inode ")
            && refused.stderr.contains("whose path is not known");
        if refused.code != REFUSED || !named {
            return Err(Failure(refused.report()));
        }
        passes(sandbox, nonce)
    });
}

#[test]
fn queued_events_stay_in_the_running_job() {
    prove_goes_on(&Guest::new("inotify").arg("queued"));
}

#[test]
fn queued_events_become_an_overflow() {
    each_user("inotify-overflow", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("inotify").arg("overflow"), sandbox, |job, nonce| {
            for _ in 0..2 {
                let dumped = job.succeed(&["dump", &job.name], &[])?;
                if !dumped.stderr.contains("bytes of inotify events are not read yet") {
                    return Err(Failure(dumped.report()));
                }
                job.kill()?;
                job.restore(None, &[])?;
            }
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn changes_since_the_dump_become_an_overflow() {
    each_user("inotify-changed", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("inotify").arg("changed"), sandbox, |job, nonce| {
            job.dump(&[])?;
            job.kill()?;
            write(&sandbox.work.join("watched/dir/meanwhile"), "")?;
            job.restore(None, &[])?;
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn a_watched_directory_that_is_gone_is_named() {
    each_user("inotify-gone", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("inotify").arg("changed"), sandbox, |job, _| {
            job.dump(&[])?;
            job.kill()?;
            let dir = sandbox.work.join("watched/dir");
            fs::remove_dir(&dir).map_err(|error| Failure(error.to_string()))?;
            let refused = job.ckpt(&["restore", &job.name, "--detach"], &[])?;
            let named = refused.stderr.contains(&format!("{}: the job watches it (inotify)", dir.display()));
            if refused.code == CONFLICT && named { Ok(()) } else { Err(Failure(refused.report())) }
        })
    });
}
