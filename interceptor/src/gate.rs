// SPDX-License-Identifier: MIT OR Apache-2.0
//! The gate: what must not be half-way when the process is frozen does not begin while a dumper has closed it.
//!
//! Behind the gate are starts by vfork (`posix_spawn`, `posix_spawnp`, `vfork`), whose parent can't be stopped
//! until the child has called execve, and the sending of descriptors (`sendmsg`, `sendmmsg` with SCM_RIGHTS),
//! which can't be saved until they are received. What is under way is not counted here: the dumper sees it from
//! outside, so that there is nothing that a cancelled thread, a longjmp out of a signal handler, a fork or a
//! thread's end could leave behind. One that looked at the gate just before it was closed is found by the
//! dumper when all stands still; it lets go then and waits once more.
//!
//! # What it promises to the application
//! Open, it costs one load. Closed, the caller sleeps, in slices of [`SLICE_NS`], as nobody wakes it; by system
//! calls alone, which take no lock, touch no errno, are no cancellation points and may be made in a signal
//! handler; a handler that runs meanwhile may come to the gate itself. A dumper that was killed leaves the gate
//! closed until its deadline, which is never far off.
//!
//! # Limits
//! Calls that do not go through the dynamic linker are not held: `system`, `popen`, programs that make system
//! calls themselves.

use crate::ckpt_control;
use ckpt_abi::interceptor::GATE_OPEN;
use core::arch::asm;
use core::ffi::{c_char, c_int, c_long, c_void};
use core::sync::atomic::Ordering;

/// How long a waiter may sleep after the gate was opened, in nanoseconds.
const SLICE_NS: i64 = 500_000;

/// A system call that leaves errno alone.
///
/// # Safety
/// That of the call.
unsafe fn syscall(number: c_long, arguments: [usize; 4]) -> isize {
    let result;
    // SAFETY: the x86-64 convention; the caller answers for what the call does to memory.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result
}

/// Whether a call that is behind the gate has to wait.
#[inline]
pub fn is_closed() -> bool {
    ckpt_control.gate.load(Ordering::SeqCst) != GATE_OPEN
}

/// Returns when the gate is open: at once, nearly always.
#[inline]
pub fn pass() {
    if is_closed() {
        wait();
    }
}

/// Waits until the gate is open, or its deadline has passed.
#[cold]
pub extern "C" fn wait() {
    loop {
        let gate = ckpt_control.gate.load(Ordering::SeqCst);
        if gate == GATE_OPEN || now_ns() >= ckpt_control.gate_deadline_ns.load(Ordering::Relaxed) {
            return;
        }
        let slice = libc::timespec { tv_sec: 0, tv_nsec: SLICE_NS };
        // SAFETY: sleeps while the word has that value, which it may have ceased to have; whatever ends the sleep,
        // the gate is looked at again.
        unsafe {
            let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
            let word = ckpt_control.gate.as_ptr() as usize;
            let arguments = [word, operation as usize, gate as usize, &raw const slice as usize];
            syscall(libc::SYS_futex, arguments);
        }
    }
}

/// CLOCK_MONOTONIC of the process's time namespace.
fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes `now`.
    unsafe {
        let clock = libc::CLOCK_MONOTONIC as usize;
        syscall(libc::SYS_clock_gettime, [clock, &raw mut now as usize, 0, 0]);
    }
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

/// Whether the eight bytes at `address` can be read. An address that can't is the kernel's to refuse.
fn is_readable(address: *const c_void) -> bool {
    const NO_SUCH_WAY: usize = usize::MAX;
    // SAFETY: rt_sigprocmask(2) reads the set before it finds that there is no such way to use it, and changes
    // nothing.
    let result = unsafe { syscall(libc::SYS_rt_sigprocmask, [NO_SUCH_WAY, address as usize, 0, 8]) };
    result == -(libc::EINVAL as isize)
}

/// Whether all of `T` at `address` can be read; it must be a number of words, and no longer than a page.
fn is_there<T>(address: *const T) -> bool {
    const { assert!(size_of::<T>().is_multiple_of(8) && size_of::<T>() >= 8 && size_of::<T>() <= 4096) };
    let last = address.cast::<c_char>().wrapping_add(size_of::<T>() - 8);
    is_readable(address.cast()) && is_readable(last.cast())
}

/// Longest control message that is looked through. The kernel takes no more (net.core.optmem_max) by default.
const CONTROL_LIMIT_BYTES: usize = 128 * 1024;

/// Whether descriptors are in the message. A message that the kernel will refuse may be said to have none.
fn carries_descriptors(message: *const libc::msghdr) -> bool {
    if !is_there(message) {
        return false;
    }
    // SAFETY: it was readable just now; an application that unmaps what it hands over at the same time has
    // undefined behaviour by itself.
    let (control, length) = unsafe { ((*message).msg_control, (*message).msg_controllen) };
    if control.is_null() || length > CONTROL_LIMIT_BYTES {
        return false;
    }
    let mut at = 0;
    while at + size_of::<libc::cmsghdr>() <= length {
        let header: *const libc::cmsghdr = control.cast::<c_char>().wrapping_add(at).cast();
        if !is_there(header) {
            return false;
        }
        // SAFETY: as above; no alignment is asked for.
        let header = unsafe { header.read_unaligned() };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            return true;
        }
        if header.cmsg_len < size_of::<libc::cmsghdr>() {
            return false;
        }
        let Some(next) = header.cmsg_len.checked_next_multiple_of(8).and_then(|n| at.checked_add(n)) else {
            return false;
        };
        at = next;
    }
    false
}

/// Holds the sending of `message` if it carries descriptors and the gate is closed.
#[inline]
pub fn pass_message(message: *const libc::msghdr) {
    if is_closed() && carries_descriptors(message) {
        wait();
    }
}

/// As [`pass_message`], for `count` messages that are sent with one call.
#[inline]
pub fn pass_messages(messages: *const libc::mmsghdr, count: u32) {
    /// UIO_MAXIOV: the kernel sends no more.
    const MOST: u32 = 1024;
    if is_closed() {
        let one = |i: u32| messages.wrapping_add(i as usize);
        let any = |i: u32| is_there(one(i)) && carries_descriptors(one(i).cast());
        if (0..count.min(MOST)).any(any) {
            wait();
        }
    }
}

/// The result of a function that this libc has not.
pub fn missing() -> c_int {
    // SAFETY: errno's address is valid in every thread.
    unsafe { *libc::__errno_location() = libc::ENOSYS };
    -1
}
