// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hidden command that is pid 1 of a job; see [`ckpt_job::init_main`].

use ckpt_job::{InitContext, StartError, StartErrorClass, Started, Work, command, init_main};

/// Never returns.
pub fn run() -> ! {
    init_main(start)
}

fn start(context: &mut InitContext) -> Result<Started, StartError> {
    match context.spec.work {
        Work::Command { .. } => command::start(context),
        Work::Restore(_) => {
            Err(StartError::new(StartErrorClass::HostCannot, "this build of ckpt cannot restore"))
        }
    }
}
