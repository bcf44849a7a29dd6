// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signal actions (sigaction(2)). Masks belong to threads.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inject::Query;
use ckpt_sys::libc;

/// Version of [`SignalRecord`].
pub const VERSION: u16 = 1;

/// `struct kernel_sigaction` of one signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Action {
    /// Number.
    pub signal: u32,
    /// SIG_DFL (0), SIG_IGN (1) or an address.
    pub handler: u64,
    /// SA_*.
    pub flags: u64,
    /// sa_restorer.
    pub restorer: u64,
    /// Blocked meanwhile.
    pub mask: u64,
}

/// Actions that are not the default.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SignalRecord {
    /// By number.
    pub actions: Vec<Action>,
}

fn ask(signal: u32) -> Query {
    Query::filling(libc::SYS_rt_sigaction, [u64::from(signal), 0, 0, 8, 0, 0], 2, 32)
}

/// All signals with an action: SA_NOCLDWAIT, for one, has its effect with the default action too.
fn signals() -> impl Iterator<Item = u32> {
    (1..=64).filter(|n| ![libc::SIGKILL as u32, libc::SIGSTOP as u32].contains(n))
}

/// The kind.
#[derive(Debug)]
pub struct SignalResource;

impl Resource for SignalResource {
    nothing_to_do! { claims, probe, content, create, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Signal
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Thread]
    }

    fn asks(&self, _: &Job, at: At<'_>) -> Vec<Query> {
        if matches!(at, At::Process(_)) { signals().map(ask).collect() } else { Vec::new() }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        let mut actions = Vec::new();
        for signal in signals() {
            let (n, b) = cx.live().query::<32>(&ask(signal))?;
            if n < 0 {
                let source = std::io::Error::from_raw_os_error(-n as i32);
                return Err(DumpError::Process {
                    pid: p.pid,
                    what: format!("rt_sigaction {signal}"),
                    source,
                });
            }
            let word = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().unwrap_or_default());
            let action =
                Action { signal, handler: word(0), flags: word(8), restorer: word(16), mask: word(24) };
            if action != (Action { signal, handler: 0, flags: 0, restorer: 0, mask: 0 }) {
                actions.push(action);
            }
        }
        cx.put(Kind::Signal, VERSION, p.pid as u64, 0, &SignalRecord { actions })
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let s: SignalRecord = decode(record, VERSION)?;
        let handled: Vec<String> =
            s.actions.iter().filter(|a| a.handler > 1).map(|a| a.signal.to_string()).collect();
        let ignored: Vec<String> =
            s.actions.iter().filter(|a| a.handler == 1).map(|a| a.signal.to_string()).collect();
        Ok(format!("handled: {}; ignored: {}", handled.join(" "), ignored.join(" ")))
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: SignalRecord = decode(record, VERSION)?;
        cx.run(record.owner as i32, |b| {
            // Ignoring SIGCHLD for a moment flushes what the rebuilt zombies sent.
            let ignore = b.words(&[libc::SIG_IGN as u64, 0, 0, 0]);
            b.call("rt_sigaction", libc::SYS_rt_sigaction, &[libc::SIGCHLD as u64, ignore, 0, 8]);
            for signal in 1..=64u32 {
                if signal == libc::SIGKILL as u32 || signal == libc::SIGSTOP as u32 {
                    continue;
                }
                let found = s.actions.iter().find(|a| a.signal == signal);
                if signal == libc::SIGTRAP as u32 && found.is_some_and(|a| a.handler == libc::SIG_IGN as u64)
                {
                    // Batches end with a trap, which would reset an ignored action: left to *resume*.
                    continue;
                }
                let a = found.map_or([0; 4], |a| [a.handler, a.flags, a.restorer, a.mask]);
                let at = b.words(&a);
                b.call(
                    format!("rt_sigaction {signal}"),
                    libc::SYS_rt_sigaction,
                    &[u64::from(signal), at, 0, 8],
                );
            }
        })?;
        Ok(())
    }
}
