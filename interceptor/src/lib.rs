// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interceptor: the part of ckpt that lives inside every dynamic process of a job, by `LD_PRELOAD`.
//!
//! # Purpose
//! - It stays loaded across execve, posix_spawn and the like, also when the application hands on a cleaned
//!   environment (`exec`, `environment`).
//! - It exports the control word by which a dumper recognises it (`ckpt_abi::interceptor` is its
//!   description).
//! - It records what the kernel does not tell: paths of inotify watches (`inotify`), requests
//!   submitted to AIO contexts (`aio`).
//! - It holds back, while a dumper has closed the gate in it, calls that must not be half-way when the process
//!   is frozen (`gate`, `message`).
//!
//! # What it promises to the application
//! At load it opens no fd, starts no thread, installs no signal handler and allocates nothing. Afterwards
//! it holds no lock and no state that fork, vfork, signals or a concurrent exec could catch half-written:
//! all it keeps are pointers that are stored once and never change, counters, a table of paths whose slots say
//! whether they are complete, and the gate, which only a dumper writes.
//!
//! # Limits
//! - Programs that call the kernel past libc (`syscall(SYS_execve, …)`), and `system`, `popen` and
//!   `wordexp`, whose exec is inside libc, are not seen: they keep the library only as far as the
//!   environment does. A process without the library is dumped by ptrace alone.
//! - setuid programs ignore it, as the dynamic loader makes them.
//! - It is kept only if `LD_PRELOAD` named it by an absolute path, and only for programs of its own
//!   architecture; the loader of another (32-bit) one prints that it ignores the library.
// Empty as a test harness of its own, which `cargo test NAME` builds in spite of `test = false`: it would
// bring a second panic handler and interpose the harness's own execs. The tests are in tests/.
#![cfg(all(target_arch = "x86_64", not(test)))]
#![no_std]

mod aio;
mod environment;
mod exec;
mod gate;
mod hooks;
mod inotify;
mod kernel;
mod message;
mod real;

use ckpt_abi::interceptor::{Control, STATE_READY};
use core::ffi::{c_char, c_int};
use core::sync::atomic::Ordering;

/// The control word, found by a dumper under this name.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static ckpt_control: Control = Control::new();

/// Run by the dynamic loader before `main`.
extern "C" fn constructor(_argc: c_int, _argv: *const *const c_char, _envp: *const *const c_char) {
    real::resolve();
    inotify::announce();
    aio::announce();
    ckpt_control.state.store(STATE_READY, Ordering::Release);
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn(c_int, *const *const c_char, *const *const c_char) = constructor;

/// Nothing here is meant to panic; should it, the process must not go on with a half-made exec.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: `ud2` raises SIGILL and does not return.
    unsafe { core::arch::asm!("ud2", options(noreturn, nomem, nostack)) }
}

// The precompiled `core` refers to an unwinder, which nothing here calls. The symbols are hidden:
// exported, they would stand in for those of a preloaded-into program that links libstd dynamically.
core::arch::global_asm!(
    ".pushsection .text.ckpt_no_unwinder, \"ax\", @progbits",
    ".globl rust_eh_personality",
    ".hidden rust_eh_personality",
    ".type rust_eh_personality, @function",
    "rust_eh_personality:",
    ".globl _Unwind_Resume",
    ".hidden _Unwind_Resume",
    ".type _Unwind_Resume, @function",
    "_Unwind_Resume:",
    "ud2",
    ".size rust_eh_personality, . - rust_eh_personality",
    ".size _Unwind_Resume, . - _Unwind_Resume",
    ".popsection",
);
