// SPDX-License-Identifier: MIT OR Apache-2.0
//! TCP sockets: those without a connection come back, connections are refused or found reset, and a port that is taken is
//! named before anything is built.

use std::{fs, net::TcpListener};

use ckpt_tests::{
    Failure, Outcome,
    guest::{Guest, passes},
    job::Job,
    process::Finished,
    proof::{each_user, with_ready_job},
    user::{User, Users},
};

ckpt_tests::guest_tests! {
    sockets => Guest::new("tcp_sockets"), needs [kinds::TCP_SOCKET];
}

const CONFLICT: i32 = 113;
const REFUSED: i32 = 114;

fn expect(condition: bool, finished: &Finished) -> Outcome<()> {
    if condition { Ok(()) } else { Err(Failure(finished.report())) }
}

/// Dumps a guest with connections: refused unless it is asked for, and then it is not disturbed.
fn dump_connections(job: &Job<'_>) -> Outcome<()> {
    let refused = job.ckpt(&["dump", &job.name], &[])?;
    let named = |what: &str| refused.stderr.contains(what);
    let all = named("TCP connection of 127.0.0.1:")
        && named("established")
        && named("1 connections that are not accepted yet")
        && named("--tcp close");
    expect(refused.code == REFUSED && all, &refused)?;
    let check = job.ckpt(&["check", &job.name], &[])?;
    expect(check.code == REFUSED && check.stderr.contains("TCP connection"), &check)?;
    job.succeed(&["check", &job.name, "--tcp", "close"], &[])?;
    job.dump(&["--tcp", "close"]).map(drop)
}

#[test]
fn connections_of_the_running_job_are_kept() {
    each_user("tcp-kept", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("tcp_connections").arg("kept"), sandbox, |job, nonce| {
            dump_connections(job)?;
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn connections_of_a_restored_job_are_reset() {
    each_user("tcp-reset", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("tcp_connections").arg("reset"), sandbox, |job, nonce| {
            dump_connections(job)?;
            job.kill()?;
            job.restore(None, &[])?;
            // They are over: a dump has nothing to refuse.
            job.dump(&[])?;
            job.kill()?;
            job.restore(None, &[])?;
            passes(sandbox, nonce)
        })
    });
}

#[test]
fn a_taken_port_is_named_before_anything_is_built() {
    each_user("tcp-port", Users::Both, |sandbox| {
        with_ready_job(&Guest::new("tcp_sockets"), sandbox, |job, nonce| {
            job.dump(&[])?;
            let port = fs::read_to_string(sandbox.work.join("port")).unwrap_or_default();
            let what = format!("TCP port 127.0.0.1:{port}: ");
            let beside = job.ckpt(&["restore", &job.name, "--detach", "--name", "beside"], &[])?;
            let holder = format!("{what}the running job {} has it", job.name);
            expect(beside.code == CONFLICT && beside.stderr.contains(&holder), &beside)?;
            job.kill()?;
            let copies = job.ckpt(&["restore", &job.name, "--copies", "2"], &[])?;
            expect(copies.code == CONFLICT && copies.stderr.contains(&what), &copies)?;
            let taken = TcpListener::bind(format!("127.0.0.1:{port}"))
                .map_err(|e| Failure(format!("the port is not free: {e}")))?;
            let refused = job.ckpt(&["restore", &job.name, "--detach"], &[])?;
            let named = refused.stderr.lines().filter(|line| line.contains("TCP port")).count() == 1;
            expect(refused.code == CONFLICT && refused.stderr.contains(&what) && named, &refused)?;
            // A process of another user is not visible.
            let by = format!("process {} (", std::process::id());
            expect(sandbox.user != User::Root || refused.stderr.contains(&by), &refused)?;
            expect(job.init().is_none(), &refused)?;
            drop(taken);
            job.restore(None, &[])?;
            passes(sandbox, nonce)
        })
    });
}
