// SPDX-License-Identifier: MIT OR Apache-2.0
//! User and group ids, supplementary groups and capabilities (credentials(7), capabilities(7)), per thread.
//!
//! Without privilege there is one user in the job's namespace and nothing to change but to drop the capabilities that
//! the restorer has there.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::process::status_value;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inject::Query;
use ckpt_sys::libc;

/// Version of [`CredentialRecord`].
pub const VERSION: u16 = 1;

/// Credentials of a thread.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CredentialRecord {
    /// Real, effective, saved, file system.
    pub uid: [u32; 4],
    /// Real, effective, saved, file system.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient.
    pub capabilities: [u64; 5],
    /// SECBIT_*.
    pub securebits: u32,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// PR_SET_PDEATHSIG, which a change of ids resets.
    pub parent_death_signal: i32,
}

/// The credentials in a status file (proc_pid_status(5)).
fn parse(status: &[u8], securebits: u32, parent_death_signal: i32) -> Option<CredentialRecord> {
    let value = |key: &str| status_value(status, key);
    let ids =
        |key: &str| -> Option<Vec<u32>> { value(key)?.split_whitespace().map(|n| n.parse().ok()).collect() };
    let set = |key: &str| u64::from_str_radix(value(key)?, 16).ok();
    Some(CredentialRecord {
        uid: ids("Uid")?.try_into().ok()?,
        gid: ids("Gid")?.try_into().ok()?,
        groups: ids("Groups")?.into_iter().map(|g| g as _).collect(),
        capabilities: [set("CapInh")?, set("CapPrm")?, set("CapEff")?, set("CapBnd")?, set("CapAmb")?],
        securebits,
        no_new_privs: value("NoNewPrivs")? != "0",
        parent_death_signal,
    })
}

fn ask_securebits() -> Query {
    Query::number(libc::SYS_prctl, [libc::PR_GET_SECUREBITS as u64, 0, 0, 0, 0, 0])
}

fn ask_parent_death_signal() -> Query {
    Query::filling(libc::SYS_prctl, [PR_GET_PDEATHSIG, 0, 0, 0, 0, 0], 1, 4)
}

/// The kind.
#[derive(Debug)]
pub struct CredentialResource;

const PR_GET_PDEATHSIG: u64 = 2;
const OVERFLOW_ID: u32 = 65534;

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

impl Resource for CredentialResource {
    nothing_to_do! { claims, probe, content, create, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Credential
    }

    fn after(&self) -> &'static [Kind] {
        // The last things that need the restorer's capabilities come before.
        &[
            Kind::Thread,
            Kind::FileLock,
            Kind::Attribute,
            Kind::Scheduler,
            Kind::FsContext,
            Kind::MemoryMap,
            Kind::Limit,
        ]
    }

    fn asks(&self, _: &Job, at: At<'_>) -> Vec<Query> {
        match at {
            At::Thread(..) => vec![ask_securebits(), ask_parent_death_signal()],
            _ => Vec::new(),
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Thread(p, t) = at else { return Ok(()) };
        let securebits = cx.live().number("prctl", &ask_securebits())?;
        let (_, signal) = cx.live().query::<4>(&ask_parent_death_signal())?;
        let parsed = parse(&t.status, securebits as u32, i32::from_le_bytes(signal));
        let record = parsed.ok_or_else(|| {
            let source = std::io::Error::from(std::io::ErrorKind::InvalidData);
            DumpError::process(p.pid, format!("credentials of thread {}", t.tid))(source)
        })?;
        cx.put(Kind::Credential, VERSION, t.tid as u64, p.pid as u64, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let c: CredentialRecord = decode(record, VERSION)?;
        Ok(format!("user {}, group {}, effective capabilities {:#x}", c.uid[1], c.gid[1], c.capabilities[2]))
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let c: CredentialRecord = decode(record, VERSION)?;
        let tid = record.owner as i32;
        let now = procfs::process::Process::new(tid)
            .and_then(|p| p.status())
            .map_err(|e| RestoreError::Record(format!("thread {tid}: {e}")))?;
        let now_uid = [now.ruid, now.euid, now.suid, now.fuid];
        let now_gid = [now.rgid, now.egid, now.sgid, now.fgid];
        let mut groups = now.groups.clone();
        let mut wanted = c.groups.clone();
        groups.sort_unstable();
        wanted.sort_unstable();
        wanted.dedup();
        groups.dedup();
        let missing: Vec<&u32> =
            wanted.iter().filter(|g| **g != OVERFLOW_ID && !groups.contains(g)).collect();
        let privileged = nix::unistd::geteuid().is_root();
        if !privileged && !missing.is_empty() && !groups.contains(&OVERFLOW_ID) {
            let text = format!("the job was in the groups {missing:?} and you are not, so it can't be again");
            return Err(RestoreError::Host(text));
        }
        let last = (0..64u64).rev().find(|n| now.capbnd.unwrap_or(0) & (1 << n) != 0);
        cx.run(tid, |b| {
            for cap in (0..=last.unwrap_or(0)).filter(|n| c.capabilities[3] & (1 << n) == 0) {
                b.call("PR_CAPBSET_DROP", libc::SYS_prctl, &[libc::PR_CAPBSET_DROP as u64, cap]);
            }
            // Ids change without a side effect on capabilities.
            let no_fixup = 1u64 << 2;
            if now_uid != c.uid || now_gid != c.gid || (privileged && groups != wanted) {
                b.call("PR_SET_SECUREBITS", libc::SYS_prctl, &[libc::PR_SET_SECUREBITS as u64, no_fixup]);
            }
            if privileged && groups != wanted {
                let list = b.bytes(&bytes_of(&wanted));
                b.call("setgroups", libc::SYS_setgroups, &[wanted.len() as u64, list]);
            }
            let ids = |v: [u32; 4]| [u64::from(v[0]), u64::from(v[1]), u64::from(v[2])];
            if now_gid != c.gid {
                b.call("setresgid", libc::SYS_setresgid, &ids(c.gid));
                b.call("setfsgid", libc::SYS_setfsgid, &[u64::from(c.gid[3])]);
            }
            if now_uid != c.uid {
                b.call("setresuid", libc::SYS_setresuid, &ids(c.uid));
                b.call("setfsuid", libc::SYS_setfsuid, &[u64::from(c.uid[3])]);
            }
            let clear = [libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0, 0, 0];
            b.call("PR_CAP_AMBIENT", libc::SYS_prctl, &clear);
            let [inheritable, permitted, effective, _, ambient] = c.capabilities;
            if now.capeff & (1 << 8) != 0 {
                b.call(
                    "PR_SET_SECUREBITS",
                    libc::SYS_prctl,
                    &[libc::PR_SET_SECUREBITS as u64, u64::from(c.securebits)],
                );
            }
            let header = b.bytes(&bytes_of(&[0x2008_0522, 0]));
            let halves = |s: u32| [effective, permitted, inheritable].map(|v| (v >> s) as u32);
            let data = b.bytes(&bytes_of(&[halves(0), halves(32)].concat()));
            b.call("capset", libc::SYS_capset, &[header, data]);
            for cap in (0..64u64).filter(|n| ambient & (1 << n) != 0) {
                let raise = [libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_RAISE as u64, cap, 0, 0];
                b.call("PR_CAP_AMBIENT_RAISE", libc::SYS_prctl, &raise);
            }
            if c.no_new_privs {
                b.call(
                    "PR_SET_NO_NEW_PRIVS",
                    libc::SYS_prctl,
                    &[libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0],
                );
            }
            let signal = c.parent_death_signal as u64;
            b.call("PR_SET_PDEATHSIG", libc::SYS_prctl, &[libc::PR_SET_PDEATHSIG as u64, signal, 0, 0, 0]);
        })?;
        Ok(())
    }
}
