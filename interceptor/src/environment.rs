// SPDX-License-Identifier: MIT OR Apache-2.0
//! The environment of a new program: `LD_PRELOAD` completed so that we are loaded again.
//!
//! The rules, in order:
//! - `CKPT_NO_INTERCEPTOR=1` in the environment, or our library no longer at its path (the loader would
//!   complain at every start): our path is taken out of `LD_PRELOAD` if it is there, nothing is added;
//! - `LD_PRELOAD` names our path: the environment is handed on untouched;
//! - otherwise our path is put before what `LD_PRELOAD` holds, or the variable is added at the end.
//!
//! The caller may be a signal handler, or a vfork child that shares its memory with its parent: the new
//! array and the one new string live on the stack, in a block of exactly their size; no malloc, no
//! mapping, no lock, and nothing here touches errno.
//!
//! Limits: an environment whose copy needs more than [`STACK_LIMIT_BYTES`] (some 4000 variables) is handed
//! on as it is.

use crate::real;
use core::ffi::{CStr, c_char, c_int, c_void};
use core::ptr;

/// Largest block taken from the caller's stack.
const STACK_LIMIT_BYTES: usize = 32 * 1024;

const PRELOAD: &[u8] = b"LD_PRELOAD=";
/// `ckpt_abi::interceptor::OPT_OUT_VARIABLE`, set.
const OPT_OUT: &CStr = c"CKPT_NO_INTERCEPTOR=1";

// Naming libc makes the library depend on it, so that the loader initialises libc first and finds it in
// any program.
#[link(name = "c")]
unsafe extern "C" {
    /// `environ(7)`.
    static environ: *const *const c_char;
}

/// The calling process's own environment, as the functions without an `envp` argument use it.
pub fn current() -> *const *const c_char {
    // SAFETY: reads the pointer once, as libc's own exec functions do.
    unsafe { (&raw const environ).read() }
}

/// Calls `exec` with the environment that the new program shall have, and returns what it returns.
///
/// `exec` may be called a second time, with `envp` itself, if the kernel found the completed environment
/// too big.
///
/// # Safety
/// `envp` is null or a NULL-terminated array of C strings.
pub unsafe fn with_completed(
    envp: *const *const c_char,
    mut exec: impl FnMut(*const *const c_char) -> Attempt,
) -> c_int {
    // SAFETY: the caller's.
    let Some(plan) = (unsafe { Plan::new(envp) }) else { return exec(envp).result };
    let size_bytes = plan.size_bytes();
    if size_bytes > STACK_LIMIT_BYTES {
        return exec(envp).result;
    }
    let mut attempt = Attempt { result: -1, too_big: false };
    on_stack(size_bytes, |block| {
        // SAFETY: the block has the size that the plan asked for and the alignment of a pointer.
        attempt = exec(unsafe { plan.build(block) });
    });
    if attempt.too_big { exec(envp).result } else { attempt.result }
}

/// The outcome of handing an environment to exec.
#[derive(Clone, Copy)]
pub struct Attempt {
    /// What the interposed function is to return.
    pub result: c_int,
    /// It failed with E2BIG and may be repeated.
    pub too_big: bool,
}

/// How `LD_PRELOAD` has to change.
struct Plan {
    envp: *const *const c_char,
    /// Number of variables in `envp`.
    count: usize,
    /// Where `LD_PRELOAD` is in `envp`.
    preload: Option<usize>,
    /// What it holds (empty if it is not there), and its length.
    old: *const u8,
    old_len: usize,
    path: &'static [u8],
    change: Change,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Add,
    Remove,
}

impl Plan {
    /// `None` if the environment stays as it is.
    ///
    /// # Safety
    /// As [`with_completed`].
    unsafe fn new(envp: *const *const c_char) -> Option<Self> {
        let path = real::own_path()?;
        let mut plan = Self {
            envp,
            count: 0,
            preload: None,
            old: ptr::null(),
            old_len: 0,
            path: path.to_bytes(),
            change: Change::Add,
        };
        let mut opted_out = false;
        if !envp.is_null() {
            // SAFETY: a NULL-terminated array of C strings, says the caller.
            unsafe {
                while !(*envp.add(plan.count)).is_null() {
                    let variable = *envp.add(plan.count);
                    if let Some(value) = value_of_preload(variable) {
                        // Of several, the loader takes the last.
                        plan.preload = Some(plan.count);
                        plan.old = value;
                        plan.old_len = libc::strlen(value.cast());
                    } else if *variable == OPT_OUT.as_ptr().read() {
                        opted_out |= CStr::from_ptr(variable) == OPT_OUT;
                    }
                    plan.count += 1;
                }
            }
        }
        let present = plan.entries().any(|entry| entry == plan.path);
        let wanted = !opted_out && is_readable(path);
        plan.change = match (present, wanted) {
            (true, true) | (false, false) => return None,
            (false, true) => Change::Add,
            (true, false) => Change::Remove,
        };
        Some(plan)
    }

    /// The value of `LD_PRELOAD`.
    fn old_value(&self) -> &[u8] {
        if self.preload.is_none() {
            return &[];
        }
        // SAFETY: `old` and `old_len` describe the string found in `envp`.
        unsafe { core::slice::from_raw_parts(self.old, self.old_len) }
    }

    /// What `LD_PRELOAD` names; spaces and colons separate (`ld.so(8)`).
    fn entries(&self) -> impl Iterator<Item = &[u8]> {
        self.old_value().split(|byte| matches!(byte, b' ' | b':')).filter(|entry| !entry.is_empty())
    }

    /// Bytes for the array with one more variable and its NULL, and for the string with its NUL.
    fn size_bytes(&self) -> usize {
        let array = self.count.saturating_add(2).saturating_mul(size_of::<*const c_char>());
        array.saturating_add(PRELOAD.len() + self.path.len() + 2).saturating_add(self.old_len)
    }

    /// Writes the new array and string into `block` and returns the array.
    ///
    /// # Safety
    /// `block` has [`Self::size_bytes`] bytes and the alignment of a pointer.
    unsafe fn build(&self, block: *mut u8) -> *const *const c_char {
        let array = block.cast::<*const c_char>();
        // SAFETY: `size_bytes` counts every byte written: the old variables, one more and the NULL, then
        // the string.
        unsafe {
            if self.count > 0 {
                ptr::copy(self.envp, array, self.count);
            }
            let string = array.add(self.count + 2).cast::<u8>();
            let mut end = append(string, PRELOAD);
            match self.change {
                Change::Add => {
                    end = append(end, self.path);
                    if self.old_len > 0 {
                        end = append(end, b":");
                        end = append(end, self.old_value());
                    }
                }
                Change::Remove => {
                    let value = end;
                    for entry in self.entries().filter(|entry| *entry != self.path) {
                        if end != value {
                            end = append(end, b":");
                        }
                        end = append(end, entry);
                    }
                    if end == value {
                        // It held nothing but us: the variable goes too.
                        let at = self.preload.unwrap_or(self.count);
                        ptr::copy(array.add(at + 1), array.add(at), self.count - at - 1);
                        array.add(self.count - 1).write(ptr::null());
                        return array;
                    }
                }
            }
            end.write(0);
            array.add(self.preload.unwrap_or(self.count)).write(string.cast());
            let count = self.count + usize::from(self.preload.is_none());
            array.add(count).write(ptr::null());
        }
        array
    }
}

/// Copies `bytes` to `to` and returns the address behind them. By `memmove`, here and elsewhere: linked
/// today, `memcpy` would ask for libc 2.14, everything else for 2.2.5.
///
/// # Safety
/// `to` has room.
unsafe fn append(to: *mut u8, bytes: &[u8]) -> *mut u8 {
    // SAFETY: the caller's.
    unsafe {
        // Unless it is hidden where this comes from, the compiler may see that memcpy would do.
        ptr::copy(core::hint::black_box(bytes.as_ptr()), to, bytes.len());
        to.add(bytes.len())
    }
}

/// Where the value begins, if the variable is `LD_PRELOAD`.
///
/// # Safety
/// A C string.
unsafe fn value_of_preload(variable: *const c_char) -> Option<*const u8> {
    let bytes = variable.cast::<u8>();
    for (at, expected) in PRELOAD.iter().enumerate() {
        // SAFETY: reading stops at the first difference, at the latest at the NUL.
        if unsafe { *bytes.add(at) } != *expected {
            return None;
        }
    }
    // SAFETY: the prefix was there, so the NUL lies behind it.
    Some(unsafe { bytes.add(PRELOAD.len()) })
}

/// Whether the loader could open the library, seen from the process's own root directory. `access(2)` is
/// what the loader itself calls at each start, so that no system call filter that lets programs start
/// refuses it.
fn is_readable(path: &CStr) -> bool {
    let result: isize;
    // SAFETY: access reads the path and changes nothing; called directly, it leaves errno alone.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_access as isize => result,
            in("rdi") path.as_ptr(),
            in("rsi") libc::R_OK as isize,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack, readonly),
        );
    }
    result == 0
}

/// Calls `f` with a block of `size_bytes` on the stack, aligned to 16 bytes.
fn on_stack<F: FnMut(*mut u8)>(size_bytes: usize, mut f: F) {
    extern "C" fn call<F: FnMut(*mut u8)>(block: *mut u8, f: *mut c_void) {
        // SAFETY: `f` is the closure that `on_stack` holds while this runs.
        unsafe { (*f.cast::<F>())(block) }
    }
    // SAFETY: `call::<F>` matches the closure passed with it; the block lies on the stack until it returns.
    unsafe { call_with_block(size_bytes, call::<F>, (&raw mut f).cast()) }
}

/// Takes `size_bytes` from the stack and calls `function(block, argument)`. One access per page on the way
/// down, as compilers do for large frames, so that a guard page is hit and never jumped over.
///
/// # Safety
/// `function` accepts `argument`.
#[unsafe(naked)]
unsafe extern "C" fn call_with_block(
    size_bytes: usize,
    function: extern "C" fn(*mut u8, *mut c_void),
    argument: *mut c_void,
) {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "mov rax, rsi",
        "mov rsi, rdx",
        "2:",
        "cmp rdi, 4096",
        "jb 3f",
        "sub rsp, 4096",
        "or qword ptr [rsp], 0",
        "sub rdi, 4096",
        "jmp 2b",
        "3:",
        "sub rsp, rdi",
        "and rsp, -16",
        "mov rdi, rsp",
        "call rax",
        "leave",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
    )
}
