// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counts the requests that are submitted to AIO contexts (`io_submit(2)`), which the kernel shows nowhere: with the number
//! of completions, which the ring of a context shows, that tells how many are in flight.
//!
//! Seen are libaio's functions, which return negative error numbers, and `syscall(2)` of libc. A context that was not set up through
//! these has no slot in the table (`ckpt_abi::recorded`), nor has one beyond its last slot, and a dumper takes neither for
//! idle. New requests wait at the gate while it is closed, so that those in flight come to an end.
//!
//! # Limits
//! A program that sets a context up through libc and submits to it by instructions of its own is counted wrongly.

use crate::{ckpt_control, gate, kernel, real};
use ckpt_abi::recorded::{AIO_SLOTS, AioSlot};
use core::ffi::{c_int, c_long, c_void};
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

static CONTEXTS: [AioSlot; AIO_SLOTS] = [const {
    AioSlot {
        context: AtomicU64::new(0),
        submitted: AtomicU64::new(0),
        busy: AtomicU64::new(0),
        pid: AtomicU64::new(0),
    }
}; AIO_SLOTS];

/// The next `syscall`, null if there is none yet.
static NEXT_SYSCALL: AtomicPtr<c_void> = AtomicPtr::new(core::ptr::null_mut());

/// Tells the dumper where the table is, and `syscall` where to go.
pub fn announce() {
    let [.., address, length, _, _, _] = &ckpt_control.watches;
    length.store(size_of_val(&CONTEXTS) as u64, Ordering::Relaxed);
    address.store(CONTEXTS.as_ptr() as u64, Ordering::Release);
    NEXT_SYSCALL.store(real::syscall().unwrap_or(core::ptr::null_mut()), Ordering::Release);
}

fn slot_of(context: u64) -> Option<&'static AioSlot> {
    CONTEXTS.iter().find(|s| context != 0 && s.context.load(Ordering::Acquire) == context)
}

/// # Safety
/// As io_setup(2).
unsafe fn set_up(requests: u64, context: *mut u64) -> i64 {
    // SAFETY: the caller's.
    let result = unsafe { kernel::call(libc::SYS_io_setup, [requests, context as u64, 0, 0, 0, 0]) };
    if result != 0 {
        return result;
    }
    // SAFETY: the kernel has written it there just now.
    let context = unsafe { context.read_unaligned() };
    // One of this address is over, or was the parent's. Nobody submits to the new one yet.
    let claim =
        |s: &&AioSlot| s.context.compare_exchange(0, u64::MAX, Ordering::Acquire, Ordering::Relaxed).is_ok();
    if let Some(slot) = slot_of(context).or_else(|| CONTEXTS.iter().find(claim)) {
        // SAFETY: takes nothing.
        let pid = unsafe { kernel::call(libc::SYS_getpid, [0; 6]) };
        slot.submitted.store(0, Ordering::Relaxed);
        slot.busy.store(0, Ordering::Relaxed);
        slot.pid.store(pid as u64, Ordering::Relaxed);
        slot.context.store(context, Ordering::Release);
    }
    0
}

/// # Safety
/// As io_submit(2).
unsafe fn submit(context: u64, count: i64, requests: *const *mut c_void) -> i64 {
    let slot = slot_of(context);
    let arguments = [context, count as u64, requests as u64, 0, 0, 0];
    gate::pass();
    if let Some(slot) = slot {
        slot.busy.fetch_add(1, Ordering::SeqCst);
    }
    // SAFETY: the caller's.
    let result = unsafe { kernel::call(libc::SYS_io_submit, arguments) };
    if let Some(slot) = slot {
        if result > 0 {
            slot.submitted.fetch_add(result as u64, Ordering::SeqCst);
        }
        slot.busy.fetch_sub(1, Ordering::SeqCst);
    }
    result
}

/// # Safety
/// As io_destroy(2).
unsafe fn destroy(context: u64) -> i64 {
    // SAFETY: the caller's.
    let result = unsafe { kernel::call(libc::SYS_io_destroy, [context, 0, 0, 0, 0, 0]) };
    if let Some(slot) = slot_of(context).filter(|_| result == 0) {
        // Unless it is that of a new one already.
        let _ = slot.context.compare_exchange(context, 0, Ordering::Release, Ordering::Relaxed);
    }
    result
}

/// Interposes libaio's `io_setup(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn io_setup(requests: c_int, context: *mut u64) -> c_int {
    // SAFETY: the caller's.
    unsafe { set_up(u64::from(requests as u32), context) as c_int }
}

/// Interposes libaio's `io_submit(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn io_submit(context: u64, count: c_long, requests: *const *mut c_void) -> c_int {
    // SAFETY: the caller's.
    unsafe { submit(context, count, requests) as c_int }
}

/// Interposes libaio's `io_destroy(3)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn io_destroy(context: u64) -> c_int {
    // SAFETY: the caller's.
    unsafe { destroy(context) as c_int }
}

/// `syscall(2)` with one of the numbers that are counted here.
unsafe extern "C" fn syscall_counted(number: c_long, a: u64, b: u64, c: u64) -> c_long {
    // SAFETY: the caller's.
    let result = unsafe {
        match number {
            libc::SYS_io_setup => set_up(a, b as *mut u64),
            libc::SYS_io_submit => submit(a, b as i64, c as *const *mut c_void),
            _ => destroy(a),
        }
    };
    kernel::with_errno(result)
}

/// What `syscall` of libc does with a result that is an error.
unsafe extern "C" fn failed(result: i64) -> c_long {
    kernel::with_errno(result)
}

/// Interposes `syscall(2)`. All but the numbers that are counted go to the next definition with stack and registers as they
/// came, or, before that is known, to the kernel as libc would do it.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn syscall() {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "cmp rdi, {setup}",
        "je {counted}",
        "cmp rdi, {submit}",
        "je {counted}",
        "cmp rdi, {destroy}",
        "je {counted}",
        "mov rax, [rip + {next}]",
        "test rax, rax",
        "jz 2f",
        "jmp rax",
        "2:",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov r10, r8",
        "mov r8, r9",
        "mov r9, [rsp + 8]",
        "syscall",
        "cmp rax, -4095",
        "jae 3f",
        "ret",
        "3:",
        "mov rdi, rax",
        "jmp {failed}",
        ".cfi_endproc",
        setup = const libc::SYS_io_setup,
        submit = const libc::SYS_io_submit,
        destroy = const libc::SYS_io_destroy,
        counted = sym syscall_counted,
        next = sym NEXT_SYSCALL,
        failed = sym failed,
    )
}
