// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes that are not dumpable (PR_SET_DUMPABLE, proc_pid(5)): while frozen they are made so.
//!
//! Their files in /proc belong to the host's root, and to a plain user's dumper are closed. An injection into the main
//! thread makes the process dumpable and stays open until the job is resumed: whatever becomes of the dumper, the
//! injected code puts the old value back before the thread goes on. Processes without a value that can be put back are
//! refused.

use super::collect::{bell, padding_of, scratch_of};
use crate::error::{DumpError, Refusals};
use crate::model::process::{Frozen, Process};
use crate::resource::process::is_filtered;
use ckpt_sys::inject::{Live, NO_CALL, Padding, Start};
use ckpt_sys::memory::Forced;
use ckpt_sys::{arch, libc};
use std::collections::BTreeMap;

/// A process that is dumpable for as long as this lives.
#[derive(Debug)]
pub struct Opened {
    /// Calls in its main thread.
    pub live: Live,
    /// State of the main thread before.
    pub frozen: Frozen,
    /// Where injections into its other threads may be.
    pub padding: Padding,
    /// The value it had (PR_GET_DUMPABLE).
    pub value: u32,
    memory: Forced,
}

/// The processes that were made dumpable, by pid as the job sees it. When dropped, all are as before.
#[derive(Debug, Default)]
pub struct MadeDumpable(BTreeMap<i32, Opened>);

impl MadeDumpable {
    /// True if this process is one of them.
    pub fn has(&self, pid: i32) -> bool {
        self.0.contains_key(&pid)
    }

    /// The injection into this process, if it is one of them.
    pub fn get(&mut self, pid: i32) -> Option<&mut Opened> {
        self.0.get_mut(&pid)
    }

    /// Makes a frozen process dumpable that is closed to the dumper. `leader` is the state of its main thread. False if
    /// it stays closed, with a refusal.
    ///
    /// # Errors
    /// If it could not be driven; it then goes on as before.
    pub fn open(&mut self, p: &Process, leader: Frozen, refusals: &mut Refusals) -> Result<bool, DumpError> {
        if !p.is_closed_now() {
            // It shares its memory with one that has been made dumpable; the next look tells.
            return Ok(true);
        }
        if is_filtered(p) || arch::is_compat(&leader.registers) {
            refusals.process(p.pid, "it is not dumpable, and no call may be made in it", "not supported");
            return Ok(false);
        }
        let memory = Forced::by_words(p.host);
        let padding = padding_of(p)?;
        let scratch = scratch_of(p)?;
        let Frozen { registers, mask, quiet, .. } = leader;
        let bell = bell(p, &leader);
        let start = |last| {
            Live::open(p.host, &memory, Start { padding, scratch, registers, mask, quiet, last, bell })
        };
        let prctl = |option: i32, value: u64| (libc::SYS_prctl, [option as u64, value, 0, 0, 0, 0]);
        let (get, get_args) = prctl(libc::PR_GET_DUMPABLE, 0);
        let mut live = start(NO_CALL)?;
        let value = live.call("PR_GET_DUMPABLE", get, get_args)?;
        live.close(&memory)?;
        if value != 0 {
            // 1 should have been readable, and 2 (fs.suid_dumpable) can't be set by anyone.
            let what = format!("its files in /proc are closed to you, and it is dumpable {value}");
            refusals.process(p.pid, what, "dump as root");
            return Ok(false);
        }
        let mut live = start(prctl(libc::PR_SET_DUMPABLE, value))?;
        let (set, set_args) = prctl(libc::PR_SET_DUMPABLE, 1);
        live.call("PR_SET_DUMPABLE", set, set_args)?;
        let beside = padding.beside();
        let value = value as u32;
        self.0.insert(p.pid, Opened { live, frozen: leader, padding: beside, value, memory });
        Ok(true)
    }

    /// Puts all back. A main thread that could not be driven any more is gone, or does it by itself.
    pub fn close(&mut self) {
        for o in std::mem::take(&mut self.0).into_values() {
            let _ = o.live.close(&o.memory);
        }
    }
}

impl Drop for MadeDumpable {
    fn drop(&mut self) {
        self.close();
    }
}
