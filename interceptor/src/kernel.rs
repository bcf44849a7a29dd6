// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls without libc: they leave errno alone, and are not those that are interposed here.

/// Makes a system call; the result is a negative error number on failure.
///
/// # Safety
/// As the call's manual page says of its arguments. It must not be one that returns twice in the same memory (vfork) or on another
/// stack (clone).
pub unsafe fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let result;
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the caller's; the instruction changes rcx, r11 and the result only.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// The result in the way of libc: -1 and errno for a failure.
pub fn with_errno(result: i64) -> i64 {
    if (-4095..0).contains(&result) {
        // SAFETY: errno's address is valid in every thread.
        unsafe { *libc::__errno_location() = -result as i32 };
        return -1;
    }
    result
}
