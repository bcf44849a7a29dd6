// SPDX-License-Identifier: MIT OR Apache-2.0
//! End-to-end tests: one module per area, in it one entry per guest (see `guest_tests!`).
#![forbid(unsafe_code)]

mod aio;
mod barrier;
mod chains;
mod clock;
mod commands;
mod copies;
mod cow;
mod engines;
mod epoll;
mod eventfd;
mod external;
mod files;
mod flush;
mod hooks;
mod image_damage;
mod incremental;
mod inotify;
mod interrupted;
mod late_changes;
mod lazy;
mod locks;
mod memory;
mod pipes;
mod policy;
mod process;
mod signal;
mod sockets;
mod tcp;
mod thread;
mod tty;
mod uring;

/// A kind of the registry without a guest that misses it would be a kind that nobody knows to be restored.
#[test]
fn every_kind_has_a_guest_that_needs_it() {
    let proven = [
        aio::proven::KINDS,
        clock::proven::KINDS,
        epoll::proven::KINDS,
        eventfd::proven::KINDS,
        external::proven::KINDS,
        files::proven::KINDS,
        inotify::proven::KINDS,
        locks::proven::KINDS,
        memory::proven::KINDS,
        pipes::proven::KINDS,
        process::proven::KINDS,
        signal::proven::KINDS,
        sockets::proven::KINDS,
        tcp::proven::KINDS,
        thread::proven::KINDS,
        tty::proven::KINDS,
        // No guest is restored with it unasked: with_files.rs has its tests.
        &[ckpt_tests::kinds::SAVED_FILE],
    ]
    .concat();
    let registered = ckpt_engine::resource::REGISTRY.iter().map(|resource| resource.kind().name());
    let missing: Vec<&str> = registered.filter(|kind| !proven.contains(kind)).collect();
    assert!(missing.is_empty(), "no guest needs {missing:?}: see tests/README.md, \"Adding a kind\"");
}
