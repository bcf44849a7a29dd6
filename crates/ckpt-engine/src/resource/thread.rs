// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads: registers, alternate signal stack, the addresses that the kernel writes to when a thread ends, name.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::continued::Continued;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inject::Query;
use ckpt_sys::{Pid, arch, libc, ptrace};

/// Version of [`ThreadRecord`].
pub const VERSION: u16 = 1;

/// A thread. The record's owner is its tid, its id the pid.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ThreadRecord {
    /// General registers in the order of `user_regs_struct`.
    pub registers: [u64; 27],
    /// XSAVE area, standard format.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub mask: u64,
    /// No deliverable signal was pending.
    pub quiet: bool,
    /// `stack_t`: address, flags, size.
    pub alternate_stack: (u64, i32, u64),
    /// clear_child_tid address (set_tid_address(2)).
    pub tid_address: u64,
    /// Robust futex list: head, length.
    pub robust_list: (u64, u64),
    /// Name, up to 15 bytes.
    pub name: Vec<u8>,
}

fn ask_alternate_stack() -> Query {
    Query::filling(libc::SYS_sigaltstack, [0; 6], 1, 24)
}

fn ask_name() -> Query {
    Query::filling(libc::SYS_prctl, [libc::PR_GET_NAME as u64, 0, 0, 0, 0, 0], 1, 16)
}

fn ask_tid_address() -> Query {
    Query::filling(libc::SYS_prctl, [PR_GET_TID_ADDRESS, 0, 0, 0, 0, 0], 1, 8)
}

/// The kind.
#[derive(Debug)]
pub struct ThreadResource;

const PR_GET_TID_ADDRESS: u64 = 40;
const SS_ONSTACK: i32 = 1;

impl Resource for ThreadResource {
    nothing_to_do! { claims, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Thread
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::MemoryMap]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for p in job.live() {
            for t in p.threads.iter().filter_map(|t| t.frozen.as_ref().map(|f| (t.tid, f))) {
                if arch::is_compat(&t.1.registers) {
                    refusals.process(p.pid, format!("thread {} runs 32-bit code", t.0), "not supported");
                }
            }
        }
    }

    fn asks(&self, _: &Job, at: At<'_>) -> Vec<Query> {
        match at {
            At::Thread(..) => vec![ask_alternate_stack(), ask_tid_address(), ask_name()],
            _ => Vec::new(),
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Thread(p, t) = at else { return Ok(()) };
        let Some(frozen) = t.frozen.clone() else { return Ok(()) };
        let err = |what: &str| DumpError::errno(p.pid, format!("thread {}: {what}", t.tid));
        let xstate = ptrace::xstate(t.host).map_err(err("PTRACE_GETREGSET"))?;
        let robust_list = ckpt_sys::task::robust_list(t.host).map_err(err("get_robust_list"))?;
        let live = cx.live();
        let word = |b: &[u8], i: usize| u64::from_le_bytes(b[i..i + 8].try_into().unwrap_or_default());
        let (_, stack) = live.query::<24>(&ask_alternate_stack())?;
        let (_, tid) = live.query::<8>(&ask_tid_address())?;
        let (_, name) = live.query::<16>(&ask_name())?;
        let name = name.split(|b| *b == 0).next().unwrap_or_default().to_vec();
        let registers = match frozen.continued {
            Continued::Call(number) => arch::begun_anew(&frozen.registers, number),
            Continued::No => frozen.registers,
            Continued::Unknown => {
                cx.warnings.push(format!(
                    "pid {}, thread {}: it sleeps in a call that was interrupted before, and nothing tells which; in a restored job it \
                     returns EINTR",
                    p.pid, t.tid
                ));
                frozen.registers
            }
        };
        let record = ThreadRecord {
            registers: arch::registers_to_words(&registers),
            xstate,
            mask: frozen.mask,
            quiet: frozen.quiet,
            alternate_stack: (word(&stack, 0), word(&stack, 8) as i32 & !SS_ONSTACK, word(&stack, 16)),
            tid_address: word(&tid, 0),
            robust_list,
            name,
        };
        cx.put(Kind::Thread, VERSION, t.tid as u64, p.pid as u64, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let t: ThreadRecord = decode(record, VERSION)?;
        let r = arch::registers_from_words(&t.registers);
        Ok(format!("{} at {:#x}", String::from_utf8_lossy(&t.name), r.rip))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let (tid, pid) = (record.owner as i32, record.id as i32);
        if tid == pid {
            return Ok(());
        }
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let b = cx.area.batch();
        b.clone_task(Pid::from_raw(pid), flags as u64, 0, tid).map_err(RestoreError::remote(tid))?;
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let t: ThreadRecord = decode(record, VERSION)?;
        let tid = record.owner as i32;
        cx.run(tid, |b| {
            let (sp, flags, size) = t.alternate_stack;
            let stack = b.words(&[sp, flags as u32 as u64, size]);
            b.call("sigaltstack", libc::SYS_sigaltstack, &[stack, 0]);
            b.call("set_tid_address", libc::SYS_set_tid_address, &[t.tid_address]);
            if t.robust_list.0 != 0 {
                b.call("set_robust_list", libc::SYS_set_robust_list, &[t.robust_list.0, t.robust_list.1]);
            }
            let name = b.string(&t.name);
            b.call("prctl PR_SET_NAME", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name]);
        })?;
        Ok(())
    }
}
