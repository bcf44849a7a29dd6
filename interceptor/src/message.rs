// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interposed functions that send descriptors to another process (unix(7), SCM_RIGHTS): they pass the gate
//! first. Receiving is not held: a dumper waits for it.

use crate::{gate, real};
use core::ffi::{c_int, c_uint};

/// Interposes `sendmsg(2)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmsg(fd: c_int, message: *const libc::msghdr, flags: c_int) -> isize {
    gate::pass_message(message);
    let Some(next) = real::sendmsg() else { return gate::missing() as isize };
    // SAFETY: the caller's.
    unsafe { next(fd, message, flags) }
}

/// Interposes `sendmmsg(2)`.
///
/// # Safety
/// As the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmmsg(
    fd: c_int,
    messages: *mut libc::mmsghdr,
    count: c_uint,
    flags: c_int,
) -> c_int {
    gate::pass_messages(messages, count);
    let Some(next) = real::sendmmsg() else { return gate::missing() };
    // SAFETY: the caller's.
    unsafe { next(fd, messages, count, flags) }
}
