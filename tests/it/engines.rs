// SPDX-License-Identifier: MIT OR Apache-2.0
//! The second snapshot engine, which shares nothing with the first but the seam between them: guests restored from its
//! images, and the same pages from both for a job that stands still.

use ckpt_tests::{
    Failure,
    guest::{GUEST_DEADLINE, Guest, Talk, Verdict},
    pages::{difference, pages_of},
    process::poll_until,
    proof::{self, dump_by, each_user, with_ready_job},
    user::Users,
};
use nix::sys::signal::Signal;

macro_rules! by_second_engine {
    ($($name:ident => $guest:expr;)+) => {
        $(#[test]
        fn $name() { proof::prove_with_second_engine(&$guest) })+
    };
}

by_second_engine! {
    private_memory => Guest::new("mem_private_anon");
    private_memory_alone => Guest::new("mem_private_anon").without_interceptor();
    private_file => Guest::new("mem_private_file");
    shared_memory => Guest::new("mem_shared_anon");
    memfd => Guest::new("mem_memfd");
    deleted_shm => Guest::new("mem_deleted_shm");
    named_shm => Guest::new("mem_named_shm");
    stack => Guest::new("mem_stack");
    many_vmas => Guest::new("mem_many_vmas");
    deleted_file => Guest::new("file_deleted");
    workers => Guest::new("file_workers");
    threads => Guest::new("thread_registers");
}

#[test]
fn same_pages_from_both_engines() {
    for (source, interceptor) in
        [("mem_shared_anon", true), ("mem_private_anon", false), ("thread_registers", true)]
    {
        // Into a registered rseq area the kernel writes on which processor a thread came back from a stop.
        let mut guest = Guest::new(source).run_under(&["env", "GLIBC_TUNABLES=glibc.pthread.rseq=0"]);
        guest.interceptor = interceptor;
        each_user(&format!("engines-{source}"), Users::Both, |sandbox| {
            with_ready_job(&guest, sandbox, |job, nonce| {
                let processes = job.processes();
                let [_init, guests @ ..] = &processes[..] else {
                    return Err(Failure::new("the job does not run"));
                };
                for process in guests {
                    process.signal(Signal::SIGSTOP);
                }
                poll_until(GUEST_DEADLINE, || {
                    guests.iter().all(|process| process.is_stopped()).then_some(())
                })
                .ok_or_else(|| Failure::new("the guest does not stop"))?;
                let mut images = Vec::new();
                for engine in ["copy", "spill"] {
                    let image = sandbox.root.join(engine);
                    dump_by(job, engine, &["--dir", &format!("{}/", image.display())])?;
                    images.push(pages_of(&image)?);
                }
                let (copied, spilled) = (&images[0], &images[1]);
                let differing: Vec<String> = copied
                    .keys()
                    .chain(spilled.keys().filter(|page| !copied.contains_key(page)))
                    .filter(|page| copied.get(page) != spilled.get(page))
                    .map(|page| difference(*page, ("copy", copied.get(page)), ("spill", spilled.get(page))))
                    .collect();
                if copied.len() < 10 || !differing.is_empty() {
                    return Err(Failure(format!(
                        "{} of {} pages differ between the engines:\n{}",
                        differing.len(),
                        copied.len(),
                        differing[..differing.len().min(20)].join("\n")
                    )));
                }
                for process in guests {
                    process.signal(Signal::SIGCONT);
                }
                let talk = Talk::with(sandbox);
                talk.go()?;
                match talk.wait_verdict(nonce, GUEST_DEADLINE) {
                    Some(Verdict::Ok) => Ok(()),
                    other => Err(Failure(format!("the guest says: {other:?}"))),
                }
            })
        });
    }
}
