// SPDX-License-Identifier: MIT OR Apache-2.0
//! All unsafe system calls of ckpt, one file per family.

pub mod local_socket;
pub mod namespace;
pub mod probe;
pub mod pty;
pub mod spawn;
