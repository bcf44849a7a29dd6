// SPDX-License-Identifier: MIT OR Apache-2.0
//! `dump --flush`: what the job has written is on the disk when the checkpoint is complete.

use ckpt_tests::{
    Failure,
    guest::{Guest, passes},
    proof::{each_user, with_ready_job},
    user::Users,
};

fn flushed(guest: &Guest) {
    each_user(&format!("flush-{}", guest.interceptor), Users::Both, |sandbox| {
        with_ready_job(guest, sandbox, |job, nonce| {
            let dumped = job.dump(&["--flush", "--json"])?;
            let said: serde_json::Value = serde_json::from_str(&dumped.stdout)
                .map_err(|error| Failure(format!("no JSON: {error}\n{}", dumped.report())))?;
            // Both files and their directory at least; and no word of one that was left out.
            let count = said.get("flushed_files").and_then(serde_json::Value::as_u64);
            let warnings = said.get("warnings").and_then(serde_json::Value::as_array);
            if count.is_none_or(|n| n < 3) || warnings.is_none_or(|all| !all.is_empty()) {
                return Err(Failure(format!("not all is flushed:\n{}", dumped.report())));
            }
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn files_are_on_the_disk() {
    flushed(&Guest::new("flush"));
}

#[test]
fn files_are_on_the_disk_without_interceptor() {
    flushed(&Guest::new("flush").without_interceptor());
}
