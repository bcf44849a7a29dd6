// SPDX-License-Identifier: MIT OR Apache-2.0
//! All unsafe system calls of ckpt, one file per family.
//!
//! Everything above this crate is safe Rust. What depends on the instruction set is in [`arch`].

pub mod arch;
pub mod area;
pub mod clock;
pub mod descriptor;
pub mod device;
pub mod frozen_copy;
pub mod hook;
pub mod inject;
pub mod inotify;
pub mod interruption;
pub mod local_socket;
pub mod memory;
pub mod namespace;
pub mod pagemap;
pub mod probe;
pub mod ptrace;
pub mod pty;
pub mod socket;
pub mod spawn;
pub mod task;
pub mod userfault;

pub use libc;
pub use nix::errno::Errno;
pub use nix::sys::signal::Signal;
pub use nix::unistd::Pid;
