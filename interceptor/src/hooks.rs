// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hooks of the application: what `include/ckpt-hooks.h` calls.
//!
//! # Purpose
//! Callbacks before a dump, after it and after a restore; critical sections; dumps that the application asks for; what a
//! restored process is to know of itself. `ckpt_abi::hooks` is how the dumper and the restorer take part.
//!
//! # The thread
//! The first registration, and nothing else, makes a thread. It sleeps without a timeout on the word that requests are
//! stored in, so that it costs nothing; whoever stores there from outside stops it for a moment by ptrace(2), and the
//! futex(2) that is started again after that finds another value. All signals are blocked in it, but for the two by which glibc
//! talks to its threads.
//!
//! # Fork
//! A child has a copy of all this and no thread. It notices at its next call, as its pid is not `owner`, and
//! begins anew: no registration, no critical section. The dumper looks at `owner`, too.
//!
//! # Limits
//! [`MOST`] registrations at a time. A callback that registers finds no room made for it by those that have gone. Signal handlers
//! may call only the functions of critical sections, see [`Depth`].

use crate::gate;
use crate::{ckpt_control, real};
use ckpt_abi::hooks::{
    AGREED, ANSWER_DUMPED, ANSWER_FAILED, ANSWER_NOBODY, ANSWER_RESTORED, DUMP_NOW_SIGNAL, Hooks,
    LAST_TICKET, NAME_BYTES, Phase, SECTION_BYTES, VETOED, answer_for, phase, request, sequence,
};
use ckpt_abi::interceptor::IN_FLIGHT_CRITICAL;
use core::ffi::{c_char, c_int, c_long, c_void};
use core::mem::size_of;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Most registrations at a time.
const MOST: usize = 64;

// The values of the header.
const OK: c_int = 0;
const DUMPED: c_int = 1;
const RESTORED: c_int = 2;
const FAILED: c_int = -2;
const TIMED_OUT: c_int = -3;
const NOBODY: c_int = -4;
const NOT_HERE: c_int = -5;
const INVALID: c_int = -6;
const SYSTEM: c_int = -7;

/// How often an answer is looked for: it comes from outside, and nobody wakes who waits for it.
const LOOK_NS: u64 = 10_000_000;

type OnDump = unsafe extern "C" fn(*mut c_void) -> c_int;
type OnResume = unsafe extern "C" fn(*mut c_void);
type OnRestore = unsafe extern "C" fn(*mut c_void, *const Restored);

/// `struct ckpt_hooks`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Callbacks {
    size: usize,
    user: *mut c_void,
    on_dump: Option<OnDump>,
    on_resume: Option<OnResume>,
    on_restore: Option<OnRestore>,
}

/// `struct ckpt_restored`.
#[repr(C)]
pub struct Restored {
    size: usize,
    restores: u32,
    of_checkpoint: u32,
    copy: u32,
    copies: u32,
    checkpoint: u64,
    name: [u8; NAME_BYTES],
}

/// A place for a registration; read and written under [`LOCK`].
struct Entry {
    /// 0 if the place is free.
    number: AtomicU32,
    /// Its `on_dump` has been called, and nothing since.
    dumped: AtomicU32,
    user: AtomicPtr<c_void>,
    on_dump: AtomicPtr<c_void>,
    on_resume: AtomicPtr<c_void>,
    on_restore: AtomicPtr<c_void>,
}

impl Entry {
    const fn free() -> Entry {
        Entry {
            number: AtomicU32::new(0),
            dumped: AtomicU32::new(0),
            user: AtomicPtr::new(core::ptr::null_mut()),
            on_dump: AtomicPtr::new(core::ptr::null_mut()),
            on_resume: AtomicPtr::new(core::ptr::null_mut()),
            on_restore: AtomicPtr::new(core::ptr::null_mut()),
        }
    }
}

/// In order of registration. What has gone leaves a free place, until all are free or places are needed, see [`close_up`].
static ENTRIES: [Entry; MOST] = [const { Entry::free() }; MOST];
/// How many places have been used.
static USED: AtomicU32 = AtomicU32::new(0);
static LAST_NUMBER: AtomicU32 = AtomicU32::new(0);
static LOCK: AtomicU32 = AtomicU32::new(0);
/// Number of the registration of which a callback runs.
static RUNNING: AtomicU32 = AtomicU32::new(0);
/// 1 while the thread goes through the registrations; read and written under [`LOCK`].
static WALKING: AtomicU32 = AtomicU32::new(0);
/// `owner` while a process takes the block over: this, and its pid.
const TAKING: u32 = 1 << 31;

fn hooks() -> &'static Hooks {
    &ckpt_control.hooks
}

fn pid() -> u32 {
    // SAFETY: getpid(2) has no preconditions.
    unsafe { libc::syscall(libc::SYS_getpid) as u32 }
}

fn tid() -> u32 {
    // SAFETY: gettid(2) has no preconditions.
    unsafe { libc::syscall(libc::SYS_gettid) as u32 }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn now_ns() -> u64 {
    let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes `at`. The call itself, not through the vDSO: it is rare.
    unsafe { libc::syscall(libc::SYS_clock_gettime, c_long::from(libc::CLOCK_MONOTONIC), &raw mut at) };
    at.tv_sec as u64 * 1_000_000_000 + at.tv_nsec as u64
}

/// Sleeps while `word` is `value`, at most so long; may return early.
fn sleep_while(word: &AtomicU32, value: u32, at_most_ns: Option<u64>) {
    let timeout = at_most_ns.map(|ns| libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as c_long,
    });
    let timeout = timeout.as_ref().map_or(core::ptr::null(), |t| &raw const *t);
    let operation = c_long::from(libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG);
    // SAFETY: futex(2) reads the word and the timeout, which live until it returns.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, c_long::from(value), timeout) };
}

fn wake_all(word: &AtomicU32) {
    let operation = c_long::from(libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG);
    // SAFETY: futex(2) only takes the word's address.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, c_long::from(c_int::MAX)) };
}

struct Locked;

impl Locked {
    fn new() -> Locked {
        while LOCK.compare_exchange_weak(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            sleep_while(&LOCK, 1, Some(1_000_000));
        }
        Locked
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        LOCK.store(0, Ordering::Release);
        wake_all(&LOCK);
    }
}

/// Makes the block that of this process, whose pid it returns: after a fork nothing in it holds.
fn own() -> u32 {
    let me = pid();
    if hooks().owner.load(Ordering::Acquire) == me {
        return me;
    }
    // A signal handler of this thread would wait for it for ever; and it may fork.
    let mut before: u64 = 0;
    set_mask(&u64::MAX, &raw mut before);
    let me = pid();
    take_over(me);
    set_mask(&before, core::ptr::null_mut());
    me
}

/// [`own`], if it is not that of this process yet.
fn take_over(me: u32) {
    loop {
        let owner = hooks().owner.load(Ordering::Acquire);
        if owner == me {
            return;
        }
        if owner == TAKING | me {
            // Another thread of this process is at it.
            sleep_while(&hooks().owner, owner, Some(1_000_000));
            continue;
        }
        // That of the parent, or the parent was at it when this process was forked.
        if hooks().owner.compare_exchange(owner, TAKING | me, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            continue;
        }
        for entry in &ENTRIES {
            entry.number.store(0, Ordering::Relaxed);
            entry.dumped.store(0, Ordering::Relaxed);
        }
        for word in [&USED, &LOCK, &RUNNING, &WALKING, &hooks().thread, &hooks().vetoed, &hooks().asking] {
            word.store(0, Ordering::Relaxed);
        }
        hooks().acknowledged.store(hooks().request.load(Ordering::Relaxed), Ordering::Relaxed);
        ckpt_control.in_flight[IN_FLIGHT_CRITICAL].store(0, Ordering::Relaxed);
        ckpt_control.sections.iter().for_each(|place| place.store(0, Ordering::Relaxed));
        hooks().owner.store(me, Ordering::Release);
        return;
    }
}

/// Sets the mask of signals of this thread; the one before is stored at `old` unless that is null.
fn set_mask(new: &u64, old: *mut u64) {
    let how = c_long::from(libc::SIG_SETMASK);
    // SAFETY: reads one mask, writes the other, which all callers have on their stacks; both have the kernel's eight bytes.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const *new, old, 8 as c_long) };
}

// --- Registrations ---

/// `ckpt_hooks_register`.
///
/// # Safety
/// `callbacks` is null or points to a `struct ckpt_hooks` of the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ckpt_interceptor_hooks_register(callbacks: *const Callbacks) -> c_int {
    // SAFETY: the caller's; the size is its first field, and no field is read beyond it.
    let callbacks = unsafe {
        if callbacks.is_null() || *callbacks.cast::<usize>() < size_of::<Callbacks>() {
            return INVALID;
        }
        *callbacks
    };
    own();
    let locked = Locked::new();
    if ENTRIES.iter().all(|entry| entry.number.load(Ordering::Relaxed) == 0) {
        USED.store(0, Ordering::Relaxed);
    }
    if USED.load(Ordering::Relaxed) as usize == MOST && WALKING.load(Ordering::Relaxed) == 0 {
        close_up();
    }
    let at = USED.load(Ordering::Relaxed);
    let Some(entry) = ENTRIES.get(at as usize) else { return INVALID };
    if hooks().thread.load(Ordering::Acquire) == 0 && !start_thread() {
        return SYSTEM;
    }
    let number = LAST_NUMBER.load(Ordering::Relaxed) % c_int::MAX as u32 + 1;
    LAST_NUMBER.store(number, Ordering::Relaxed);
    let address = |function: Option<*mut c_void>| function.unwrap_or(core::ptr::null_mut());
    entry.user.store(callbacks.user, Ordering::Relaxed);
    entry.on_dump.store(address(callbacks.on_dump.map(|f| f as *mut c_void)), Ordering::Relaxed);
    entry.on_resume.store(address(callbacks.on_resume.map(|f| f as *mut c_void)), Ordering::Relaxed);
    entry.on_restore.store(address(callbacks.on_restore.map(|f| f as *mut c_void)), Ordering::Relaxed);
    entry.dumped.store(0, Ordering::Relaxed);
    entry.number.store(number, Ordering::Release);
    USED.store(at + 1, Ordering::Relaxed);
    drop(locked);
    number as c_int
}

/// Moves all registrations to the front, in their order. Called under [`LOCK`] while the thread does not go through them.
fn close_up() {
    let mut used = 0;
    for entry in &ENTRIES {
        let number = entry.number.swap(0, Ordering::Relaxed);
        if number == 0 {
            continue;
        }
        let to = &ENTRIES[used];
        to.dumped.store(entry.dumped.load(Ordering::Relaxed), Ordering::Relaxed);
        for (to, from) in [
            (&to.user, &entry.user),
            (&to.on_dump, &entry.on_dump),
            (&to.on_resume, &entry.on_resume),
            (&to.on_restore, &entry.on_restore),
        ] {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        to.number.store(number, Ordering::Relaxed);
        used += 1;
    }
    USED.store(used as u32, Ordering::Relaxed);
}

/// `ckpt_hooks_unregister`.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_interceptor_hooks_unregister(number: c_int) -> c_int {
    own();
    let Some(number) = u32::try_from(number).ok().filter(|n| *n > 0) else { return INVALID };
    {
        let _locked = Locked::new();
        let Some(entry) = ENTRIES.iter().find(|e| e.number.load(Ordering::Relaxed) == number) else {
            return INVALID;
        };
        entry.number.store(0, Ordering::Relaxed);
    }
    if tid() != hooks().thread.load(Ordering::Acquire) {
        while RUNNING.load(Ordering::Acquire) == number {
            sleep_while(&RUNNING, number, Some(LOOK_NS));
        }
    }
    OK
}

/// Makes the thread and waits until it is known. False if it can't be made.
fn start_thread() -> bool {
    let Some(create) = real::pthread_create() else { return false };
    // SIGCANCEL and SIGSETXID of glibc stay: setuid(2) waits until every thread has heeded the latter.
    let all: u64 = !(1 << 31 | 1 << 32);
    let mut before: u64 = 0;
    let mut thread: libc::pthread_t = 0;
    // What was asked while nobody looked is not for registrations made since: a restore asks without looking for a thread.
    hooks().acknowledged.store(hooks().request.load(Ordering::Relaxed), Ordering::Relaxed);
    // The new thread has the mask of this one.
    set_mask(&all, &raw mut before);
    // SAFETY: default attributes, and a function that needs no argument.
    let made = unsafe { create(&raw mut thread, core::ptr::null(), life, core::ptr::null_mut()) } == 0;
    set_mask(&before, core::ptr::null_mut());
    if made {
        while hooks().thread.load(Ordering::Acquire) == 0 {
            sleep_while(&hooks().thread, 0, Some(1_000_000));
        }
    }
    made
}

/// The life of the thread.
extern "C" fn life(_: *mut c_void) -> *mut c_void {
    // SAFETY: prctl(2) reads a name.
    unsafe {
        libc::syscall(libc::SYS_prctl, c_long::from(libc::PR_SET_NAME), c"ckpt-hooks".as_ptr(), 0, 0, 0)
    };
    let own = hooks();
    own.thread.store(tid(), Ordering::Release);
    wake_all(&own.thread);
    let mut deadline_ns = u64::MAX;
    loop {
        let before = own.acknowledged.load(Ordering::Relaxed);
        let mut wanted = own.request.load(Ordering::Acquire);
        if wanted == before {
            if phase(before) != Phase::Dump {
                sleep_while(&own.request, before, None);
                continue;
            }
            let now = now_ns();
            if now < deadline_ns {
                sleep_while(&own.request, before, Some(deadline_ns - now));
                continue;
            }
            // Nobody has said how the dump went: the dumper is dead.
            wanted = request(sequence(before), Phase::Resume);
            if own.request.compare_exchange(before, wanted, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
        }
        walking(1);
        match phase(wanted) {
            Phase::Dump => {
                // Left over by a dumper that died.
                resume();
                let agreed = dump();
                own.vetoed.store(if agreed { AGREED } else { VETOED }, Ordering::Relaxed);
                let after_ms = own.resume_after_ms.load(Ordering::Relaxed);
                deadline_ns = now_ns().saturating_add(u64::from(after_ms) * 1_000_000);
            }
            Phase::Resume => resume(),
            Phase::Restore => restore(),
            Phase::Idle => {}
        }
        walking(0);
        own.acknowledged.store(wanted, Ordering::Release);
    }
}

/// Says that the thread goes through the registrations: 1; or that it does no longer: 0.
fn walking(value: u32) {
    let _locked = Locked::new();
    WALKING.store(value, Ordering::Relaxed);
}

/// Calls `call` for a registration, if it is (still) there and `wanted`, with its function and its user pointer.
fn with_entry(
    entry: &Entry,
    wanted: impl FnOnce(&Entry) -> Option<*mut c_void>,
    call: impl FnOnce(*mut c_void, *mut c_void),
) {
    let (function, user) = {
        let _locked = Locked::new();
        let number = entry.number.load(Ordering::Relaxed);
        if number == 0 {
            return;
        }
        let Some(function) = wanted(entry).filter(|f| !f.is_null()) else { return };
        RUNNING.store(number, Ordering::Release);
        (function, entry.user.load(Ordering::Relaxed))
    };
    call(function, user);
    RUNNING.store(0, Ordering::Release);
    wake_all(&RUNNING);
}

/// Calls `on_dump` of all, the latest first, until one objects.
fn dump() -> bool {
    let used = (USED.load(Ordering::Acquire) as usize).min(MOST);
    let mut agreed = true;
    for entry in ENTRIES[..used].iter().rev() {
        let wanted = |e: &Entry| {
            e.dumped.store(1, Ordering::Relaxed);
            Some(e.on_dump.load(Ordering::Relaxed))
        };
        with_entry(entry, wanted, |function, user| {
            // SAFETY: the application registered a function of this type for this pointer.
            agreed = unsafe { core::mem::transmute::<*mut c_void, OnDump>(function)(user) } == 0;
        });
        if !agreed {
            return false;
        }
    }
    true
}

/// Calls `on_resume` of all whose turn to be dumped it was.
fn resume() {
    for entry in &ENTRIES[..(USED.load(Ordering::Acquire) as usize).min(MOST)] {
        let wanted = |e: &Entry| {
            (e.dumped.swap(0, Ordering::Relaxed) != 0).then(|| e.on_resume.load(Ordering::Relaxed))
        };
        with_entry(entry, wanted, |function, user| {
            // SAFETY: the application registered a function of this type for this pointer.
            unsafe { core::mem::transmute::<*mut c_void, OnResume>(function)(user) }
        });
    }
}

/// Calls `on_restore` of all.
fn restore() {
    let restored = Restored::of_this_process();
    for entry in &ENTRIES[..(USED.load(Ordering::Acquire) as usize).min(MOST)] {
        let wanted = |e: &Entry| {
            e.dumped.store(0, Ordering::Relaxed);
            Some(e.on_restore.load(Ordering::Relaxed))
        };
        with_entry(entry, wanted, |function, user| {
            // SAFETY: the application registered a function of this type for this pointer.
            unsafe { core::mem::transmute::<*mut c_void, OnRestore>(function)(user, &raw const restored) }
        });
    }
}

// --- Critical sections ---

/// Of a thread: how deep it is in critical sections, in which process that is.
///
/// # Signal handlers
/// One may begin and end sections wherever it interrupts this thread. It ends those that it begins, so that it leaves `depth` as it
/// was, but for a fork. What is to hold is that whoever is in a section is noted, and that nobody is whose `depth` stays 0:
/// - `place` is stored after the thread is noted and swapped out before it no longer is: who finds one there is noted, and one place
///   is given back once. Only who brings `depth` to 0 gives it back.
/// - [`Depth::enter`] raises `depth` first. A handler after that is nested: if there is no `place` yet, it notes the thread, and leaves
///   it noted, as `depth` stays above 0; [`Depth::note`] finds that.
/// - [`Depth::leave`] lowers `depth` first. To a handler after that its section is the outermost: it is noted, by what is still
///   there or anew, and at its end it gives `place` back, which is then not there for the one that it interrupted.
/// - Who waits at the gate has left before: `depth` is 0 and nothing noted, as if it had not begun. (A handler that waits between
///   the two steps by which the one that it interrupted ceases to be counted holds off that dump, not longer than the gate is closed.)
/// - A handler that forks within begin is noticed at its end, by the pid; within [`Depth::leave`] the child finds nothing to lower or to
///   give back.
#[repr(C)]
struct Depth {
    owner: AtomicU32,
    depth: AtomicU32,
    /// Where the thread is noted: one more than its index in `sections`; [`COUNTED`] if there was no room; 0 if it isn't.
    place: AtomicU32,
    tid: AtomicU32,
}

/// In no place, but counted in `in_flight`.
const COUNTED: u32 = u32::MAX;

impl Depth {
    /// Into a section, noted. Whether it is the outermost.
    fn enter(&self, me: u32) -> bool {
        let deeper = |depth: u32| Some(depth.saturating_add(1));
        let before = self.depth.fetch_update(Ordering::SeqCst, Ordering::SeqCst, deeper);
        self.note(me);
        before == Ok(0)
    }

    /// Out of a section. False if it was in none.
    fn leave(&self) -> bool {
        let before =
            self.depth.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |depth| depth.checked_sub(1));
        if before == Ok(1) {
            self.give_back(self.place.swap(0, Ordering::SeqCst));
        }
        before.is_ok()
    }

    /// Notes the thread, unless it is.
    fn note(&self, me: u32) {
        if self.place.load(Ordering::SeqCst) != 0 {
            return;
        }
        let taken = self.take(me);
        match self.place.compare_exchange(0, taken, Ordering::SeqCst, Ordering::SeqCst) {
            // By a handler, meanwhile: in the same place, or once too often.
            Err(held) if held != taken || held == COUNTED => self.give_back(taken),
            _ => {}
        }
    }

    /// Takes a place, or is counted.
    fn take(&self, me: u32) -> u32 {
        let places = &ckpt_control.sections;
        let tid = self.tid.load(Ordering::Relaxed);
        let swap = |place: &AtomicU32, from| {
            place.compare_exchange(from, tid, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        };
        // Taken by the one that a handler has interrupted, or left by a thread that had the same id.
        let own = |place: &AtomicU32| place.load(Ordering::Relaxed) == tid && swap(place, tid);
        let free = |place: &AtomicU32| place.load(Ordering::Relaxed) == 0 && swap(place, 0);
        let left = |place: &AtomicU32| {
            let other = place.load(Ordering::Relaxed);
            // SAFETY: tgkill(2) with signal 0 only looks whether there is such a thread.
            let is_there = unsafe {
                libc::syscall(libc::SYS_tgkill, c_long::from(me), c_long::from(other), 0 as c_long)
            } == 0;
            !is_there && swap(place, other)
        };
        let at = places.iter().position(own).or_else(|| places.iter().position(free));
        match at.or_else(|| places.iter().position(left)) {
            Some(at) => at as u32 + 1,
            None => {
                ckpt_control.in_flight[IN_FLIGHT_CRITICAL].fetch_add(1, Ordering::SeqCst);
                COUNTED
            }
        }
    }

    /// What [`Self::take`] returned, or 0.
    fn give_back(&self, place: u32) {
        if place == COUNTED {
            // Checked: in the child of a handler that has forked it may be 0 by now.
            let count = &ckpt_control.in_flight[IN_FLIGHT_CRITICAL];
            let _ = count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| count.checked_sub(1));
        } else if let Some(place) = ckpt_control.sections.get((place as usize).wrapping_sub(1)) {
            // A handler that was noted here, too, has given it back: it may be another thread's.
            let tid = self.tid.load(Ordering::Relaxed);
            let _ = place.compare_exchange(tid, 0, Ordering::SeqCst, Ordering::Relaxed);
        }
    }
}

// Rust has no thread-local storage without its standard library. The model is initial-exec, as the library is there
// when the program starts.
core::arch::global_asm!(
    ".pushsection .tbss.ckpt_section_depth, \"awT\", @nobits",
    ".balign 8",
    ".globl ckpt_section_depth",
    ".hidden ckpt_section_depth",
    ".type ckpt_section_depth, @tls_object",
    "ckpt_section_depth:",
    ".zero 16",
    ".size ckpt_section_depth, 16",
    ".popsection",
);

/// That of the calling thread, in its present process.
fn depth(me: u32) -> &'static Depth {
    let at: *const Depth;
    // SAFETY: the address of a thread-local variable in the initial-exec model: the thread pointer and the offset that the
    // loader has put into the table of offsets. The variable is zero in a new thread, which is a valid `Depth`; it is there as
    // long as the thread, which alone uses it.
    let depth = unsafe {
        core::arch::asm!(
            "mov {at}, qword ptr fs:[0]",
            "add {at}, qword ptr [rip + ckpt_section_depth@GOTTPOFF]",
            at = out(reg) at,
            options(nostack, readonly),
        );
        &*at
    };
    if depth.owner.load(Ordering::SeqCst) != me {
        depth.depth.store(0, Ordering::SeqCst);
        depth.place.store(0, Ordering::SeqCst);
        depth.tid.store(tid(), Ordering::SeqCst);
        // Last: until then a handler does all this, too.
        depth.owner.store(me, Ordering::SeqCst);
    }
    depth
}

/// `ckpt_critical_begin`.
///
/// # Safety
/// `name` is null or a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ckpt_interceptor_critical_begin(name: *const c_char) -> c_int {
    loop {
        let me = own();
        let depth = depth(me);
        // Noted first: either the dumper sees that, or this sees the gate that it has closed.
        if !depth.enter(me) {
            return OK;
        }
        if pid() != me {
            // A handler has forked, and this is the child, with this thread alone. All anew, also what the handler has done there.
            hooks().owner.store(0, Ordering::SeqCst);
            depth.owner.store(0, Ordering::SeqCst);
            continue;
        }
        if !gate::is_closed() || now_ns() >= ckpt_control.gate_deadline_ns.load(Ordering::Relaxed) {
            break;
        }
        depth.leave();
        gate::wait();
    }
    let mut bytes = [0u8; SECTION_BYTES];
    if !name.is_null() {
        for (at, byte) in bytes[..SECTION_BYTES - 1].iter_mut().enumerate() {
            // SAFETY: not beyond the NUL.
            *byte = unsafe { *name.add(at) } as u8;
            if *byte == 0 {
                break;
            }
        }
    }
    for (word, bytes) in hooks().section.iter().zip(bytes.as_chunks::<4>().0) {
        word.store(u32::from_ne_bytes(*bytes), Ordering::Relaxed);
    }
    OK
}

/// `ckpt_critical_end`.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_interceptor_critical_end() -> c_int {
    if depth(own()).leave() { OK } else { NOT_HERE }
}

// --- "Dump me now" ---

/// How many tickets have been given out. A forked child goes on counting.
static TICKETS: AtomicU32 = AtomicU32::new(0);

/// `ckpt_dump_now`.
///
/// # Safety
/// `checkpoint` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ckpt_interceptor_dump_now(timeout_ms: u32, checkpoint: *mut u64) -> c_int {
    let me = own();
    let own = hooks();
    if depth(me).depth.load(Ordering::Relaxed) > 0 || tid() == own.thread.load(Ordering::Relaxed) {
        return NOT_HERE;
    }
    // SAFETY: neither call has preconditions.
    let (dumpable, user) = unsafe {
        let dumpable = libc::syscall(libc::SYS_prctl, c_long::from(libc::PR_GET_DUMPABLE), 0, 0, 0, 0);
        (dumpable, libc::syscall(libc::SYS_geteuid))
    };
    if dumpable != 1 && user != 0 {
        // Its memory is closed to whoever would answer.
        return SYSTEM;
    }
    let began_ns = now_ns();
    let left_ns = || match timeout_ms {
        0 => u64::MAX,
        ms => (u64::from(ms) * 1_000_000).saturating_sub(now_ns() - began_ns),
    };
    let ticket = TICKETS.fetch_add(1, Ordering::Relaxed) % LAST_TICKET + 1;
    // One thread at a time. From here on it waits for all others to see: `answer` is for an earlier ticket.
    while let Err(other) = own.asking.compare_exchange(0, ticket, Ordering::AcqRel, Ordering::Relaxed) {
        match left_ns() {
            0 => return TIMED_OUT,
            ns => sleep_while(&own.asking, other, Some(ns.min(LOOK_NS))),
        }
    }
    let answer = if ask_init() { wait_for_answer(ticket, left_ns) } else { SYSTEM };
    if matches!(answer, DUMPED | RESTORED) && !checkpoint.is_null() {
        // SAFETY: the caller's.
        unsafe { *checkpoint = own.answered_checkpoint.load(Ordering::Relaxed) };
    }
    own.asking.store(0, Ordering::Release);
    wake_all(&own.asking);
    answer
}

fn ask_init() -> bool {
    /// `siginfo_t` of a queued signal.
    #[repr(C)]
    struct Queued {
        signal: c_int,
        errno: c_int,
        code: c_int,
        padding: c_int,
        pid: u32,
        uid: u32,
        value: u64,
        rest: [u64; 12],
    }
    const _: () = assert!(size_of::<Queued>() == 128);
    let info = Queued {
        signal: DUMP_NOW_SIGNAL,
        errno: 0,
        code: libc::SI_QUEUE,
        padding: 0,
        pid: pid(),
        // SAFETY: getuid(2) has no preconditions.
        uid: unsafe { libc::syscall(libc::SYS_getuid) as u32 },
        value: &raw const ckpt_control as u64,
        rest: [0; 12],
    };
    // SAFETY: rt_sigqueueinfo(2) reads the 128 bytes.
    let sent = unsafe {
        let signal = c_long::from(DUMP_NOW_SIGNAL);
        libc::syscall(libc::SYS_rt_sigqueueinfo, 1 as c_long, signal, &raw const info)
    };
    sent == 0
}

fn wait_for_answer(ticket: u32, left_ns: impl Fn() -> u64) -> c_int {
    let answer = &hooks().answer;
    loop {
        let seen = answer.load(Ordering::Acquire);
        match answer_for(ticket, seen) {
            Some(ANSWER_DUMPED) => return DUMPED,
            Some(ANSWER_RESTORED) => return RESTORED,
            Some(ANSWER_FAILED) => return FAILED,
            Some(ANSWER_NOBODY) => return NOBODY,
            _ => {}
        }
        match left_ns() {
            0 => return TIMED_OUT,
            ns => sleep_while(answer, seen, Some(ns.min(LOOK_NS))),
        }
    }
}

// --- Restored copies ---

impl Restored {
    fn of_this_process() -> Restored {
        let told = &ckpt_control.copy;
        let mut name = [0; NAME_BYTES];
        for (bytes, word) in name.as_chunks_mut::<4>().0.iter_mut().zip(&told.name) {
            *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        name[NAME_BYTES - 1] = 0;
        Restored {
            size: size_of::<Restored>(),
            restores: told.restores.load(Ordering::Relaxed),
            of_checkpoint: told.of_checkpoint.load(Ordering::Relaxed),
            copy: told.copy.load(Ordering::Relaxed),
            copies: told.copies.load(Ordering::Relaxed),
            checkpoint: told.checkpoint.load(Ordering::Relaxed),
            name,
        }
    }
}

/// `ckpt_get_restored`.
///
/// # Safety
/// `restored` is null or points to a `struct ckpt_restored` of the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ckpt_interceptor_restored(restored: *mut Restored) -> c_int {
    // SAFETY: the caller's; the size is its first field.
    unsafe {
        if restored.is_null() || *restored.cast::<usize>() < size_of::<Restored>() {
            return INVALID;
        }
        let size = *restored.cast::<usize>();
        *restored = Restored { size, ..Restored::of_this_process() };
    }
    OK
}
