// SPDX-License-Identifier: MIT OR Apache-2.0
//! The part of the control word by which dumper, restorer and init talk to the hooks of an application
//! (`include/ckpt-hooks.h`).
//!
//! # Format
//! [`Hooks`] lies at [`HOOKS_OFFSET`] in the control word, [`Copy`] at [`COPY_OFFSET`]. Both are zero at load.
//!
//! # Phases
//! An application that registers hooks has a thread that sleeps in futex(2) on `request`. Who wants something
//! of it stores a new value there, from outside: a sequence number and a [`Phase`], see [`request`]. The
//! thread notices when its call is restarted after a stop by ptrace(2), as futex compares the value again. When the
//! callbacks have returned it stores the same value in `acknowledged`.
//!
//! After [`Phase::Dump`] the thread waits no longer than `resume_after_ms`; then it takes the dumper for dead and goes
//! on as after [`Phase::Resume`].
//!
//! # Dumps that are asked for
//! Each call has a ticket of its own, which it stores in `asking`. An answer carries the ticket of the call that it is meant for, in the
//! same word, and counts for no other: a call may have given up, and another one wait, by the time a dump that had noted it is
//! complete. What `asking` and `answer` hold tells who waits: see [`unanswered`].
//!
//! # Critical sections
//! A thread in one has its id in one of the [`MOST_SECTIONS`] places of the control word, or is counted if none was free. An id whose
//! thread has ended, however it did, counts for nothing: its place is taken by the next that needs one, and made free by a
//! dumper while all stands still, as the id may be another thread's after a restore.
//!
//! # Limits
//! A forked child has the block of its parent, and none of its threads: what `owner` is not the pid of is as good as
//! zero. Nothing that is read from it is trusted.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// Where [`Hooks`] lies in the control word.
pub const HOOKS_OFFSET: usize = 128;
/// Its size in bytes.
pub const HOOKS_BYTES: usize = 128;
/// Where [`Copy`] lies in the control word.
pub const COPY_OFFSET: usize = 512;
/// Its size in bytes.
pub const COPY_BYTES: usize = 128;
/// Threads that may be in critical sections at a time without being counted.
pub const MOST_SECTIONS: usize = 64;
/// Bytes of a section's name, the NUL that ends it included.
pub const SECTION_BYTES: usize = 32;
/// Bytes of a job's name, the NUL that ends it included.
pub const NAME_BYTES: usize = 80;

/// What the callbacks are called for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Nothing yet.
    Idle = 0,
    /// A dump is about to be made: `on_dump`.
    Dump = 1,
    /// It has been made or has failed, and this is the job that was dumped: `on_resume`.
    Resume = 2,
    /// This is a restored job: `on_restore`.
    Restore = 3,
}

/// Makes a value of `request`.
pub const fn request(sequence: u32, phase: Phase) -> u32 {
    sequence << 2 | phase as u32
}

/// The sequence number in a value of `request`.
pub const fn sequence(value: u32) -> u32 {
    value >> 2
}

/// The phase in a value of `request`.
pub const fn phase(value: u32) -> Phase {
    match value & 3 {
        1 => Phase::Dump,
        2 => Phase::Resume,
        3 => Phase::Restore,
        _ => Phase::Idle,
    }
}

/// `vetoed`: no callback objected.
pub const AGREED: u32 = 0;
/// `vetoed`: an `on_dump` asked for the dump not to be made.
pub const VETOED: u32 = 1;

/// Answer: the job has been dumped; `answered_checkpoint` has its number.
pub const ANSWER_DUMPED: u32 = 1;
/// Answer: this is a restored job.
pub const ANSWER_RESTORED: u32 = 2;
/// Answer: the dump failed.
pub const ANSWER_FAILED: u32 = 3;
/// Answer: nobody makes dumps when the job asks for them.
pub const ANSWER_NOBODY: u32 = 4;

const ANSWER_BITS: u32 = 3;
/// The largest ticket; the least is 1.
pub const LAST_TICKET: u32 = u32::MAX >> ANSWER_BITS;

/// Makes a value of `answer`: `what` (`ANSWER_…`) for the call with that ticket.
pub const fn answer(ticket: u32, what: u32) -> u32 {
    ticket << ANSWER_BITS | what
}

/// `ANSWER_…` in a value of `answer` if it is for the call with that ticket.
pub const fn answer_for(ticket: u32, value: u32) -> Option<u32> {
    if value >> ANSWER_BITS == ticket { Some(value & ((1 << ANSWER_BITS) - 1)) } else { None }
}

/// The ticket of the call that waits, if one does that has no answer yet: of the values of `asking` and `answer`.
pub const fn unanswered(asking: u32, value: u32) -> Option<u32> {
    if asking == 0 || answer_for(asking, value).is_some() { None } else { Some(asking) }
}

/// The signal by which a process of the job asks init for a dump: queued (`rt_sigqueueinfo(2)`) with the address of its
/// control word as its value. It is the last of the real-time signals.
pub const DUMP_NOW_SIGNAL: i32 = 64;

/// Between the application's hooks and ckpt.
#[repr(C)]
#[derive(Debug)]
pub struct Hooks {
    /// What is asked for; the futex that the thread sleeps on. Written by the dumper and the restorer; by the thread
    /// only when it takes the dumper for dead.
    pub request: AtomicU32,
    /// The last value of `request` that has been dealt with.
    pub acknowledged: AtomicU32,
    /// [`AGREED`] or [`VETOED`]: of the last [`Phase::Dump`].
    pub vetoed: AtomicU32,
    /// Thread id of the thread, as the process sees it; 0 without one.
    pub thread: AtomicU32,
    /// Pid of the process that all of this is of, as it sees it.
    pub owner: AtomicU32,
    /// How many milliseconds after `on_dump` the thread goes on by itself. Written by the dumper.
    pub resume_after_ms: AtomicU32,
    /// The ticket of a thread that waits for a dump that it has asked for; 0 if none does.
    pub asking: AtomicU32,
    /// What became of it, see [`answer`]; a futex. Written from outside only.
    pub answer: AtomicU32,
    /// The number of the checkpoint in case of [`ANSWER_DUMPED`] and [`ANSWER_RESTORED`]. Written before `answer`, and read only
    /// after an answer for the reader's ticket; nobody writes it then, as dumps are made one at a time and note who waits.
    pub answered_checkpoint: AtomicU64,
    /// Zero.
    pub reserved0: [AtomicU32; 6],
    /// Name of the critical section that was begun last, cut to fit, padded with zeros.
    pub section: [AtomicU32; SECTION_BYTES / 4],
    /// Zero.
    pub reserved1: [AtomicU32; 8],
}

/// What a restored process is told of itself. Written by the restorer, zero in a job that was never restored.
#[repr(C)]
#[derive(Debug)]
pub struct Copy {
    /// How many restores lie between this process and its start.
    pub restores: AtomicU32,
    /// How many times its checkpoint had been restored, this time included: from 2 on there are, or were, others.
    pub of_checkpoint: AtomicU32,
    /// Which of the copies that were restored together it is, from 1; 0 if it was not restored with others.
    pub copy: AtomicU32,
    /// How many these are; 0 if it was not restored with others.
    pub copies: AtomicU32,
    /// The number of the checkpoint; 0 if it has none.
    pub checkpoint: AtomicU64,
    /// Zero.
    pub reserved: [AtomicU32; 6],
    /// Name of the restored job, padded with zeros.
    pub name: [AtomicU32; NAME_BYTES / 4],
}

impl Hooks {
    /// As it is at load.
    pub const fn new() -> Self {
        Self {
            request: AtomicU32::new(0),
            acknowledged: AtomicU32::new(0),
            vetoed: AtomicU32::new(AGREED),
            thread: AtomicU32::new(0),
            owner: AtomicU32::new(0),
            resume_after_ms: AtomicU32::new(0),
            asking: AtomicU32::new(0),
            answer: AtomicU32::new(0),
            answered_checkpoint: AtomicU64::new(0),
            reserved0: [const { AtomicU32::new(0) }; 6],
            section: [const { AtomicU32::new(0) }; SECTION_BYTES / 4],
            reserved1: [const { AtomicU32::new(0) }; 8],
        }
    }
}

impl Default for Hooks {
    fn default() -> Self {
        Self::new()
    }
}

impl Copy {
    /// As it is at load.
    pub const fn new() -> Self {
        Self {
            restores: AtomicU32::new(0),
            of_checkpoint: AtomicU32::new(0),
            copy: AtomicU32::new(0),
            copies: AtomicU32::new(0),
            checkpoint: AtomicU64::new(0),
            reserved: [const { AtomicU32::new(0) }; 6],
            name: [const { AtomicU32::new(0) }; NAME_BYTES / 4],
        }
    }
}

impl Default for Copy {
    fn default() -> Self {
        Self::new()
    }
}

const _: () = {
    assert!(core::mem::size_of::<Hooks>() == HOOKS_BYTES);
    assert!(core::mem::offset_of!(Hooks, request) == 0);
    assert!(core::mem::offset_of!(Hooks, acknowledged) == 4);
    assert!(core::mem::offset_of!(Hooks, vetoed) == 8);
    assert!(core::mem::offset_of!(Hooks, thread) == 12);
    assert!(core::mem::offset_of!(Hooks, owner) == 16);
    assert!(core::mem::offset_of!(Hooks, resume_after_ms) == 20);
    assert!(core::mem::offset_of!(Hooks, asking) == 24);
    assert!(core::mem::offset_of!(Hooks, answer) == 28);
    assert!(core::mem::offset_of!(Hooks, answered_checkpoint) == 32);
    assert!(core::mem::offset_of!(Hooks, section) == 64);
    assert!(core::mem::size_of::<Copy>() == COPY_BYTES);
    assert!(core::mem::offset_of!(Copy, copy) == 8);
    assert!(core::mem::offset_of!(Copy, checkpoint) == 16);
    assert!(core::mem::offset_of!(Copy, name) == 48);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_for_one_ticket() {
        for ticket in [1, 2, LAST_TICKET] {
            assert_eq!(unanswered(ticket, 0), Some(ticket));
            for what in [ANSWER_DUMPED, ANSWER_RESTORED, ANSWER_FAILED, ANSWER_NOBODY] {
                let value = answer(ticket, what);
                assert_eq!(answer_for(ticket, value), Some(what));
                assert_eq!(unanswered(ticket, value), None);
                assert_eq!(answer_for(ticket - 1, value), None);
                assert_eq!(unanswered(ticket % LAST_TICKET + 1, value), Some(ticket % LAST_TICKET + 1));
            }
        }
        assert_eq!(unanswered(0, answer(1, ANSWER_DUMPED)), None);
    }

    #[test]
    fn requests_survive_packing() {
        for wanted in [Phase::Idle, Phase::Dump, Phase::Resume, Phase::Restore] {
            for number in [0, 1, u32::MAX >> 2] {
                let value = request(number, wanted);
                assert_eq!((sequence(value), phase(value)), (number, wanted));
            }
        }
    }
}
