// SPDX-License-Identifier: MIT OR Apache-2.0
//! What depends on the instruction set: register names, code that runs inside a tracee.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("ckpt supports x86_64 only: add an arch module for this instruction set");

mod x86_64;
pub use x86_64::*;
