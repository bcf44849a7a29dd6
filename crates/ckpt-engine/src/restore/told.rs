// SPDX-License-Identifier: MIT OR Apache-2.0
//! What restored processes are told of themselves: that they are copies, and which; their hooks are called (`on_restore`), and a
//! wait for a dump ends.
//!
//! Format: `ckpt_abi::hooks`, in the control word of each process that carries the interceptor.

use super::build_tree::Build;
use crate::dump::control_word::ControlWord;
use ckpt_abi::hooks::{
    ANSWER_RESTORED, COPY_OFFSET, Copy, HOOKS_OFFSET, Hooks, NAME_BYTES, Phase, answer, request, sequence,
    unanswered,
};
use ckpt_sys::Pid;
use std::mem::offset_of;

/// What is told of a restore.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Told {
    /// How many times the checkpoint has been restored, this time included. From 2 on, memory that is not to be shared with a forked child
    /// (MADV_WIPEONFORK) is not shared with the earlier ones either: it is zero.
    pub of_checkpoint: u32,
    /// Which of several copies that are restored together it is, from 1; 0 if there are no others.
    pub copy: u32,
    /// How many these are; 0 if there are no others.
    pub copies: u32,
    /// The checkpoint's number, 0 if it has none.
    pub checkpoint: u64,
    /// The job's name.
    pub name: String,
}

impl Told {
    /// Whether another job has, or has had, the same memory.
    pub fn is_copy(&self) -> bool {
        self.of_checkpoint > 1
    }
}

/// Tells a process that is complete but for its registers. What carries no interceptor, or another release of it, is not told.
pub fn tell(build: &Build<'_>, pid: i32) {
    if let Some(word) = ControlWord::find_restored(Pid::from_raw(pid)) {
        // An address that can't be written to is no control word.
        let _ = write(&word, pid, &build.request.options.told);
    }
}

fn write(word: &ControlWord, pid: i32, told: &Told) -> std::io::Result<()> {
    let copy = |field: usize| COPY_OFFSET + field;
    let hooks = |field: usize| HOOKS_OFFSET + field;
    let restores = word.read_u32(copy(offset_of!(Copy, restores)))?.saturating_add(1);
    let mut name = [0; NAME_BYTES];
    let bytes = &told.name.as_bytes()[..told.name.len().min(NAME_BYTES - 1)];
    name[..bytes.len()].copy_from_slice(bytes);
    word.write(copy(offset_of!(Copy, restores)), &restores.to_le_bytes())?;
    word.write(copy(offset_of!(Copy, of_checkpoint)), &told.of_checkpoint.to_le_bytes())?;
    word.write(copy(offset_of!(Copy, copy)), &told.copy.to_le_bytes())?;
    word.write(copy(offset_of!(Copy, copies)), &told.copies.to_le_bytes())?;
    word.write(copy(offset_of!(Copy, checkpoint)), &told.checkpoint.to_le_bytes())?;
    word.write(copy(offset_of!(Copy, name)), &name)?;
    if word.read_u32(hooks(offset_of!(Hooks, owner)))? != pid as u32 {
        return Ok(());
    }
    let asking = word.read_u32(hooks(offset_of!(Hooks, asking)))?;
    if let Some(ticket) = unanswered(asking, word.read_u32(hooks(offset_of!(Hooks, answer)))?) {
        word.write(hooks(offset_of!(Hooks, answered_checkpoint)), &told.checkpoint.to_le_bytes())?;
        word.write(hooks(offset_of!(Hooks, answer)), &answer(ticket, ANSWER_RESTORED).to_le_bytes())?;
    }
    // Without a thread nobody looks at it.
    let asked = word.read_u32(hooks(offset_of!(Hooks, request)))?;
    let wanted = request(sequence(asked).wrapping_add(1), Phase::Restore);
    word.write(hooks(offset_of!(Hooks, request)), &wanted.to_le_bytes())
}
