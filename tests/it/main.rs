// SPDX-License-Identifier: MIT OR Apache-2.0
//! End-to-end tests: one module per area, in it one entry per guest (see `guest_tests!`).
#![forbid(unsafe_code)]

mod apps;
mod clock;
mod commands;
mod epoll;
mod eventfd;
mod external;
mod files;
mod image_damage;
mod interrupted;
mod kill_anytime;
mod locks;
mod memory;
mod pipes;
mod policy;
mod process;
mod seed;
mod signal;
mod sockets;
mod thread;
mod tty;
