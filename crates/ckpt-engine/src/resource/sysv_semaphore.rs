// SPDX-License-Identifier: MIT OR Apache-2.0
//! System V semaphore sets of the job's IPC namespace (sysvipc(7)): identifier, key, permissions, values. They belong to
//! no process; one process is asked for all of them.
//!
//! What a process would undo when it ends (SEM_UNDO) is shown nowhere: a job that has semaphores is refused if a process
//! may have used that.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inject::{Query, RESULT_BYTES};
use ckpt_sys::task::{Shared, kcmp};
use ckpt_sys::{Pid, libc};

/// Version of [`SysvSemaphoreRecord`].
pub const VERSION: u16 = 1;

/// A set. The record's id is its identifier.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SysvSemaphoreRecord {
    /// IPC_PRIVATE (0) or what semget(2) was given.
    pub key: i32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions.
    pub mode: u32,
    /// By number in the set.
    pub values: Vec<u16>,
}

/// The kind.
#[derive(Debug)]
pub struct SysvSemaphoreResource;

/// Most semaphores of a set whose values fit into a scratch page.
const MOST: u64 = RESULT_BYTES / 2;
const SEM_STAT: u64 = 18;
const SEM_INFO: u64 = 19;
const GETALL: u64 = 13;
const SETALL: u64 = 17;

impl Resource for SysvSemaphoreResource {
    nothing_to_do! { claims, asks, content, connect, finish, arm }

    fn kind(&self) -> Kind {
        Kind::SysvSemaphore
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        if job.info.semaphore_sets == 0 {
            return;
        }
        let init = Pid::from_raw(job.info.init);
        for p in job.live() {
            // init has no undo list, and so has nobody who compares equal to it. Threads have one from the beginning, to
            // share it: what is in it can't be seen.
            if kcmp(init, p.host, Shared::SemaphoreUndo).is_ok_and(std::cmp::Ordering::is_ne) {
                let what = "it may have used the job's System V semaphores with SEM_UNDO (it has, or it has threads)";
                refusals.process(
                    p.pid,
                    what,
                    "not supported; remove the semaphores (ipcrm) if nobody needs them",
                );
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        if cx.job.info.semaphore_sets == 0 || cx.job.live().next().is_none_or(|first| first.pid != p.pid) {
            return Ok(());
        }
        let (last, _) =
            cx.live().query::<64>(&Query::filling(libc::SYS_semctl, [0, 0, SEM_INFO, 0, 0, 0], 3, 64))?;
        for index in 0..=last.max(0) {
            let stat = Query::filling(libc::SYS_semctl, [index as u64, 0, SEM_STAT, 0, 0, 0], 3, 104);
            let (id, ds) = cx.live().query::<104>(&stat)?;
            if id == -i64::from(libc::EINVAL) {
                continue;
            }
            let err = |what: String, errno: i64| {
                DumpError::process(p.pid, what)(std::io::Error::from_raw_os_error(-errno as i32))
            };
            if id < 0 {
                return Err(err(format!("System V semaphore set number {index}"), id));
            }
            let word = |i: usize| u32::from_le_bytes([ds[i], ds[i + 1], ds[i + 2], ds[i + 3]]);
            // struct semid64_ds: permissions first, the number of semaphores at byte 80.
            let count = u64::from(word(80));
            if count > MOST {
                return Err(err(
                    format!("System V semaphore set {id} with {count} semaphores"),
                    -i64::from(libc::E2BIG),
                ));
            }
            let all = Query::filling(libc::SYS_semctl, [id as u64, 0, GETALL, 0, 0, 0], 3, RESULT_BYTES);
            let (n, bytes) = cx.live().query::<{ RESULT_BYTES as usize }>(&all)?;
            if n < 0 {
                return Err(err(format!("values of System V semaphore set {id}"), n));
            }
            let values = bytes
                .chunks_exact(2)
                .take(count as usize)
                .map(|c| u16::from_le_bytes([c[0], c[1]]))
                .collect();
            let record = SysvSemaphoreRecord {
                key: word(0) as i32,
                uid: word(4),
                gid: word(8),
                mode: word(20) & 0o777,
                values,
            };
            cx.put(Kind::SysvSemaphore, VERSION, 0, id as u64, &record)?;
        }
        Ok(())
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let s: SysvSemaphoreRecord = decode(record, VERSION)?;
        Ok(format!("semaphore set {} with key {:#x}: {:?}", record.id, s.key, s.values))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: SysvSemaphoreRecord = decode(record, VERSION)?;
        let id = record.id;
        let Some(pid) = cx.live().first().copied() else { return Ok(()) };
        // The next set gets this identifier (sysctl documentation, kernel.sem_next_id).
        std::fs::write("/proc/sys/kernel/sem_next_id", id.to_string())
            .map_err(RestoreError::io(pid, format!("choosing semaphore identifier {id}")))?;
        let private = libc::IPC_PRIVATE;
        let flags = s.mode as i32 | if s.key == private { 0 } else { libc::IPC_CREAT | libc::IPC_EXCL };
        let args = [s.key as u64, s.values.len() as u64, flags as u64];
        let got = cx.call(pid, &format!("semget of set {id}"), libc::SYS_semget, &args)?;
        if got != id {
            return Err(RestoreError::Host(format!("the kernel gave semaphore identifier {got} for {id}")));
        }
        let bytes: Vec<u8> = s.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        cx.run(pid, |b| {
            let values = b.bytes(&bytes);
            b.call(format!("values of semaphore set {id}"), libc::SYS_semctl, &[id, 0, SETALL, values]);
            let mut ds = [0u8; 104];
            for (at, word) in [(4, s.uid), (8, s.gid), (20, s.mode)] {
                ds[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            let ds = b.bytes(&ds);
            b.call(
                format!("owner of semaphore set {id}"),
                libc::SYS_semctl,
                &[id, 0, libc::IPC_SET as u64, ds],
            );
        })?;
        Ok(())
    }
}
