// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interposed functions: every way of libc to start a program.
//!
//! Those that borrow the memory of their caller for it (`posix_spawn`, `posix_spawnp`, `vfork`) pass the gate first.
//!
//! Each completes the environment and calls the next definition of itself, or of the function that libc
//! documents it to be a front end of (`exec(3)`): `execv` and `execl` are `execve`, `execvp` and `execlp`
//! are `execvpe`, with `environ`. Search in `PATH`, the shell for scripts without `#!` and errno are
//! therefore those of libc.
//!
//! Rust cannot define C-variadic functions, so `execl`, `execlp` and `execle` are a few instructions that
//! lay the argument registers just below the arguments on the stack: the `argv` array, without a copy or a
//! limit.

use crate::environment::{Attempt, current, with_completed};
use crate::gate::{self, missing};
use crate::real;
use core::ffi::{c_char, c_int};

type Strings = *const *const c_char;

/// The result of an exec function, which returns only to say that it failed.
fn attempted(result: c_int) -> Attempt {
    // SAFETY: errno's address is valid in every thread.
    Attempt { result, too_big: result == -1 && unsafe { *libc::__errno_location() } == libc::E2BIG }
}

/// # Safety
/// As execve(2).
unsafe fn execve_completed(path: *const c_char, argv: Strings, envp: Strings) -> c_int {
    let Some(next) = real::execve() else { return missing() };
    // SAFETY: the arguments are the caller's, the environment is his or its completed copy.
    unsafe { with_completed(envp, |envp| attempted(next(path, argv, envp))) }
}

/// # Safety
/// As execvpe(3).
unsafe fn execvpe_completed(file: *const c_char, argv: Strings, envp: Strings) -> c_int {
    let Some(next) = real::execvpe() else { return missing() };
    // SAFETY: as execve_completed.
    unsafe { with_completed(envp, |envp| attempted(next(file, argv, envp))) }
}

/// Interposes `execve(2)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execve(path: *const c_char, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the caller's.
    unsafe { execve_completed(path, argv, envp) }
}

/// Interposes `execv(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execv(path: *const c_char, argv: Strings) -> c_int {
    // SAFETY: the caller's.
    unsafe { execve_completed(path, argv, current()) }
}

/// Interposes `execvp(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvp(file: *const c_char, argv: Strings) -> c_int {
    // SAFETY: the caller's.
    unsafe { execvpe_completed(file, argv, current()) }
}

/// Interposes `execvpe(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvpe(file: *const c_char, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the caller's.
    unsafe { execvpe_completed(file, argv, envp) }
}

/// Interposes `execveat(2)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execveat(
    directory: c_int,
    path: *const c_char,
    argv: Strings,
    envp: Strings,
    flags: c_int,
) -> c_int {
    let Some(next) = real::execveat() else { return missing() };
    // SAFETY: as execve_completed.
    unsafe { with_completed(envp, |envp| attempted(next(directory, path, argv, envp, flags))) }
}

/// Interposes `fexecve(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fexecve(fd: c_int, argv: Strings, envp: Strings) -> c_int {
    let Some(next) = real::fexecve() else { return missing() };
    if envp.is_null() {
        // Refused by libc, unlike by the kernel.
        // SAFETY: the caller's.
        return unsafe { next(fd, argv, envp) };
    }
    // SAFETY: as execve_completed.
    unsafe { with_completed(envp, |envp| attempted(next(fd, argv, envp))) }
}

/// # Safety
/// As posix_spawn(3), which `next` is one of.
unsafe fn spawn_completed(
    next: Option<real::Spawn>,
    pid: *mut libc::pid_t,
    path: *const c_char,
    actions: *const libc::posix_spawn_file_actions_t,
    attributes: *const libc::posix_spawnattr_t,
    argv: Strings,
    envp: Strings,
) -> c_int {
    let Some(next) = next else { return libc::ENOSYS };
    gate::pass();
    // SAFETY: as execve_completed. Not tried again when too big: the child has carried out the file
    // actions by then.
    unsafe {
        with_completed(envp, |envp| Attempt {
            result: next(pid, path, actions, attributes, argv, envp),
            too_big: false,
        })
    }
}

/// Interposes `posix_spawn(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_spawn(
    pid: *mut libc::pid_t,
    path: *const c_char,
    actions: *const libc::posix_spawn_file_actions_t,
    attributes: *const libc::posix_spawnattr_t,
    argv: Strings,
    envp: Strings,
) -> c_int {
    // SAFETY: the caller's.
    unsafe { spawn_completed(real::posix_spawn(), pid, path, actions, attributes, argv, envp) }
}

/// Interposes `posix_spawnp(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_spawnp(
    pid: *mut libc::pid_t,
    file: *const c_char,
    actions: *const libc::posix_spawn_file_actions_t,
    attributes: *const libc::posix_spawnattr_t,
    argv: Strings,
    envp: Strings,
) -> c_int {
    // SAFETY: the caller's.
    unsafe { spawn_completed(real::posix_spawnp(), pid, file, actions, attributes, argv, envp) }
}

/// What to jump to from `vfork`: the next one, once the gate is open.
extern "C" fn vfork_target() -> real::Vfork {
    extern "C" fn none() -> libc::pid_t {
        missing()
    }
    gate::pass();
    real::vfork().unwrap_or(none)
}

/// Interposes `vfork(2)`. It returns twice on one stack, so nothing of ours may be on it any more when libc's is
/// entered: that one is jumped to, and returns to our caller.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn vfork() -> libc::pid_t {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "sub rsp, 8",
        ".cfi_adjust_cfa_offset 8",
        "call {target}",
        "add rsp, 8",
        ".cfi_adjust_cfa_offset -8",
        "jmp rax",
        ".cfi_endproc",
        target = sym vfork_target,
    )
}

/// What `execl` does once its arguments are an array.
unsafe extern "C" fn execl_collected(path: *const c_char, argv: Strings) -> c_int {
    // SAFETY: the caller's arguments, up to and with the NULL.
    unsafe { execve_completed(path, argv, current()) }
}

/// What `execlp` does once its arguments are an array.
unsafe extern "C" fn execlp_collected(file: *const c_char, argv: Strings) -> c_int {
    // SAFETY: as execl_collected.
    unsafe { execvpe_completed(file, argv, current()) }
}

/// What `execle` does once its arguments are an array: the environment follows the NULL.
unsafe extern "C" fn execle_collected(path: *const c_char, argv: Strings) -> c_int {
    // SAFETY: as execl_collected, and one more argument, which is an environment.
    unsafe {
        let mut end = argv;
        while !(*end).is_null() {
            end = end.add(1);
        }
        execve_completed(path, argv, (*end.add(1)).cast())
    }
}

/// Defines a C-variadic function `name(path, argument, …)` that calls `collected(path, array of
/// arguments)`.
///
/// On entry rsi, rdx, rcx, r8 and r9 hold the first five arguments, the return address lies at rsp and the
/// further arguments above it. The return address is taken off and the five pushed in its place, which
/// makes them contiguous with the others; it is kept below them and put back at the end. At the call rsp
/// is aligned to 16 bytes: 8 below such an address on entry, minus one word popped and six pushed.
macro_rules! variadic {
    ($(#[$doc:meta])* $name:ident => $collected:ident) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As the C function.
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name() {
            core::arch::naked_asm!(
                ".cfi_startproc",
                "pop rax",
                ".cfi_def_cfa_offset 0",
                ".cfi_register rip, rax",
                "push r9",
                "push r8",
                "push rcx",
                "push rdx",
                "push rsi",
                ".cfi_def_cfa_offset 40",
                "mov rsi, rsp",
                "push rax",
                ".cfi_def_cfa_offset 48",
                ".cfi_offset rip, -48",
                "call {collected}",
                "pop rcx",
                ".cfi_def_cfa_offset 40",
                ".cfi_register rip, rcx",
                "add rsp, 40",
                ".cfi_def_cfa_offset 0",
                "push rcx",
                ".cfi_def_cfa_offset 8",
                ".cfi_offset rip, -8",
                "ret",
                ".cfi_endproc",
                collected = sym $collected,
            )
        }
    };
}

variadic!(
    /// Interposes `execl(3)`.
    execl => execl_collected
);
variadic!(
    /// Interposes `execlp(3)`.
    execlp => execlp_collected
);
variadic!(
    /// Interposes `execle(3)`.
    execle => execle_collected
);
