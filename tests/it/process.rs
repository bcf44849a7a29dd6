// SPDX-License-Identifier: MIT OR Apache-2.0
//! What belongs to a process: the tree, its names and argument areas, its attributes, limits.

use std::time::Duration;

use ckpt_tests::{
    Failure,
    guest::{Guest, passes},
    proof::{each_ready_job, each_user, with_ready_job},
    user::Users,
};

/// There is no room for the pages that a dump maps: it is refused, and says how to make some.
#[test]
fn memory_at_its_limit_is_refused_with_what_to_do() {
    for (which, name) in [("as", "RLIMIT_AS"), ("data", "RLIMIT_DATA")] {
        each_user(&format!("limits-{which}"), Users::Both, |sandbox| {
            with_ready_job(&Guest::new("limits").arg(which), sandbox, |job, nonce| {
                for command in ["check", "dump"] {
                    let refused = job.ckpt(&[command, &job.name], &[])?;
                    let advice = refused.stderr.split_once("raise the limit: ").map(|(_, advice)| advice);
                    let words: Vec<String> =
                        advice.unwrap_or_default().split_whitespace().map(String::from).collect();
                    if refused.code != 114 || !refused.stderr.contains(name) || words.is_empty() {
                        return Err(Failure(refused.report()));
                    }
                    if command == "dump" {
                        let raised = sandbox.execute(&words, &[], Duration::from_secs(10))?;
                        if raised.code != 0 {
                            return Err(Failure(raised.report()));
                        }
                    }
                }
                job.dump(&[])?;
                job.kill()?;
                job.restore(None, &[])?;
                passes(sandbox, nonce)
            })
        });
    }
}

/// The kernel reads it as none but the hard one: else nothing could run.
#[test]
fn no_data_allowed_is_no_limit() {
    let guest = Guest::new("mem_private_anon").run_under(&["sh", "-c", "ulimit -S -d 0; exec \"$@\"", "sh"]);
    each_ready_job("limits-no-data", Users::Both, &guest, |sandbox, job, nonce| {
        job.dump(&[])?;
        job.kill()?;
        job.restore(None, &[])?;
        passes(sandbox, nonce)
    });
}

ckpt_tests::guest_tests! {
    sysv_semaphore => Guest::new("sysv_semaphore"), needs [kinds::SYSV_SEMAPHORE];
    vfork_wait => Guest::new("vfork_wait").in_motion();
    process_tree => Guest::new("process_tree"), needs [kinds::PROCESS];
    zombie => Guest::new("zombie"), needs [kinds::PROCESS];
    names => Guest::new("process_names"), needs [kinds::THREAD, kinds::MEMORY_MAP];
    limits => Guest::new("limits"), needs [kinds::LIMIT];
    shm_file => Guest::new("shm_file"), needs [kinds::SHM_FILE];
    personality => Guest::new("attribute").arg("personality"), needs [kinds::ATTRIBUTE];
    no_new_privs => Guest::new("attribute").arg("no_new_privs"), needs [kinds::CREDENTIAL];
    dumpable => Guest::new("attribute").arg("dumpable"), needs [kinds::ATTRIBUTE];
    subreaper => Guest::new("attribute").arg("subreaper"), needs [kinds::ATTRIBUTE];
    umask => Guest::new("attribute").arg("umask"), needs [kinds::FS_CONTEXT];
    cwd => Guest::new("attribute").arg("cwd"), needs [kinds::FS_CONTEXT];
    root => Guest::new("attribute").arg("root").only_root(), needs [kinds::FS_CONTEXT];
    shared_fs => Guest::new("attribute").arg("shared_fs").may_be_refused("shares");
    keepcaps => Guest::new("attribute").arg("keepcaps"), needs [kinds::CREDENTIAL];
    securebits => Guest::new("attribute").arg("securebits").only_root(), needs [kinds::CREDENTIAL];
    credentials => Guest::new("attribute").arg("credentials").only_root(), needs [kinds::CREDENTIAL];
    capabilities => Guest::new("attribute").arg("capabilities").only_root(), needs [kinds::CREDENTIAL];
    timer_slack => Guest::new("attribute").arg("timer_slack"), needs [kinds::SCHEDULER];
    thp_disable => Guest::new("attribute").arg("thp_disable"), needs [kinds::ATTRIBUTE];
    oom_score_adj => Guest::new("attribute").arg("oom_score_adj"), needs [kinds::ATTRIBUTE];
    pdeathsig => Guest::new("attribute").arg("pdeathsig"), needs [kinds::CREDENTIAL];
    exit_signal => Guest::new("attribute").arg("exit_signal"), needs [kinds::PROCESS];
}
