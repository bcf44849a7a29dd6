// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attributes of a process: personality(2), and from prctl(2) dumpable, child subreaper, THP disable; oom_score_adj.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::process::read_proc_text;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inject::Query;
use ckpt_sys::libc;

/// Version of [`AttributeRecord`].
pub const VERSION: u16 = 1;

/// Attributes of a process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct AttributeRecord {
    /// personality(2).
    pub personality: u32,
    /// PR_GET_DUMPABLE: 0, 1, or 2 for a core readable by root only.
    pub dumpable: u32,
    /// PR_SET_CHILD_SUBREAPER.
    pub subreaper: bool,
    /// PR_SET_THP_DISABLE.
    pub thp_disabled: bool,
    /// /proc/pid/oom_score_adj.
    pub oom_score_adj: i32,
}

fn ask(option: i32) -> Query {
    Query::number(libc::SYS_prctl, [option as u64, 0, 0, 0, 0, 0])
}

fn ask_subreaper() -> Query {
    Query::filling(libc::SYS_prctl, [libc::PR_GET_CHILD_SUBREAPER as u64, 0, 0, 0, 0, 0], 1, 4)
}

fn ask_personality() -> Query {
    Query::number(libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0, 0])
}

/// The kind.
#[derive(Debug)]
pub struct AttributeResource;

impl Resource for AttributeResource {
    nothing_to_do! { claims, probe, content, create, connect }

    fn kind(&self) -> Kind {
        Kind::Attribute
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Thread]
    }

    fn asks(&self, _: &Job, at: At<'_>) -> Vec<Query> {
        match at {
            At::Process(_) => vec![
                ask(libc::PR_GET_DUMPABLE),
                ask(libc::PR_GET_THP_DISABLE),
                ask_subreaper(),
                ask_personality(),
            ],
            _ => Vec::new(),
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        let read = |name: &str| read_proc_text(format!("/proc/{}/{name}", p.host));
        let oom = read("oom_score_adj").map_err(DumpError::process(p.pid, "reading oom_score_adj"))?;
        let live = cx.live();
        let dumpable = match p.dumpable {
            // It is dumpable only for now.
            Some(before) => before,
            None => live.number("prctl", &ask(libc::PR_GET_DUMPABLE))? as u32,
        };
        let thp_disabled = live.number("prctl", &ask(libc::PR_GET_THP_DISABLE))? != 0;
        let (_, reaper) = live.query::<4>(&ask_subreaper())?;
        let personality = live.number("personality", &ask_personality())? as u32;
        let subreaper = i32::from_le_bytes(reaper) != 0;
        if subreaper {
            cx.out.subreapers.insert(p.pid);
        }
        let record = AttributeRecord {
            personality,
            dumpable,
            subreaper,
            thp_disabled,
            oom_score_adj: oom.trim().parse().unwrap_or(0),
        };
        cx.put(Kind::Attribute, VERSION, p.pid as u64, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let a: AttributeRecord = decode(record, VERSION)?;
        let (personality, dumpable, oom) = (a.personality, a.dumpable, a.oom_score_adj);
        Ok(format!("personality {personality:#x}, dumpable {dumpable}, oom_score_adj {oom}"))
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let a: AttributeRecord = decode(record, VERSION)?;
        let pid = record.owner as i32;
        let path = format!("/proc/{pid}/oom_score_adj");
        let now = std::fs::read_to_string(&path).unwrap_or_default();
        if now.trim().parse() != Ok(a.oom_score_adj)
            && let Err(e) = std::fs::write(&path, a.oom_score_adj.to_string())
        {
            let text = format!("process {pid}: oom_score_adj {} can't be set here: {e}", a.oom_score_adj);
            cx.warnings.push(text);
        }
        cx.run(pid, |b| {
            b.call("personality", libc::SYS_personality, &[u64::from(a.personality)]);
            if a.subreaper {
                let option = libc::PR_SET_CHILD_SUBREAPER as u64;
                b.call("PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, &[option, 1, 0, 0, 0]);
            }
            if a.thp_disabled {
                b.call("PR_SET_THP_DISABLE", libc::SYS_prctl, &[libc::PR_SET_THP_DISABLE as u64, 1, 0, 0, 0]);
            }
        })?;
        Ok(())
    }

    fn arm(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let a: AttributeRecord = decode(record, VERSION)?;
        let pid = record.owner as i32;
        // A change of ids resets it, and what isn't dumpable can be opened no more: last of all.
        if a.dumpable < 2 {
            let args = [libc::PR_SET_DUMPABLE as u64, u64::from(a.dumpable), 0, 0, 0];
            cx.call(pid, "PR_SET_DUMPABLE", libc::SYS_prctl, &args)?;
        } else {
            let text = format!("process {pid} was dumpable by root only and is not dumpable at all now");
            cx.warnings.push(text);
            cx.call(pid, "PR_SET_DUMPABLE", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 0, 0, 0, 0])?;
        }
        Ok(())
    }
}
