// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `cow` engine: every process is forked while it is frozen, and its memory read from the copy when the job runs
//! again ([`ckpt_sys::frozen_copy`]). See docs/adr/0008-copy-on-write-by-fork.md.
//!
//! What a fork does not keep (shared memory, MADV_DONTFORK, MADV_WIPEONFORK) is copied while the job is frozen, and so are
//! processes that can't be forked unseen.

use super::copy::{Pieces, keep};
use super::guard::Guard;
use super::kmod::{self, Changes, Kept};
use super::memory_limit::{Limits, Room};
use super::precopy::Compared;
use super::{Account, Engine, From, Piece, Prepared, Range, Sink, Snapshot, Source, pages, read_source};
use crate::dump::collect;
use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::model::Job;
use crate::model::memory::{Vma, read_smaps};
use crate::model::process::Process;
use crate::resource::Collected;
use crate::track::Same;
use ckpt_sys::frozen_copy::{CopyProcess, Fork, Forked};
use ckpt_sys::inject::{InjectError, Live};
use ckpt_sys::memory::Forced;
use ckpt_sys::task::last_cpu;
use ckpt_sys::{Errno, Pid};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Its name.
pub const NAME: &str = "cow";
const PIECE_BYTES: usize = 1 << 20;

/// The engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cow {
    /// Most bytes that may be duplicated; then the dump is given up.
    pub duplicate_limit_bytes: Option<u64>,
}

#[derive(Debug)]
struct Ready {
    device: bool,
    /// The job stays frozen: what the module does not keep is read where it is.
    still: bool,
    /// Why a process is not forked, by pid.
    obstacles: BTreeMap<i32, String>,
    needs_bytes: u64,
    duplicate_limit_bytes: Option<u64>,
}

impl Engine for Cow {
    fn name(&self) -> &'static str {
        NAME
    }

    fn prepare(&self, job: &Job, stays_frozen: bool) -> Result<Box<dyn Prepared>, DumpError> {
        self.prepare_with(job, stays_frozen, false)
    }
}

impl Cow {
    /// As [`Engine::prepare`]; `device`: the kernel module is asked first, and only what it refuses is forked.
    pub(super) fn prepare_with(
        &self,
        job: &Job,
        stays_frozen: bool,
        device: bool,
    ) -> Result<Box<dyn Prepared>, DumpError> {
        let duplicate_limit_bytes = self.duplicate_limit_bytes;
        let mut obstacles = BTreeMap::new();
        if stays_frozen {
            let still = Ready { device, still: true, obstacles, needs_bytes: 0, duplicate_limit_bytes };
            return Ok(Box::new(still));
        }
        if let Some(why) = host_obstacle() {
            obstacles.extend(job.live().map(|p| (p.pid, why.to_owned())));
        }
        let mut page_tables: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for p in job.live() {
            if let Some(room) = Limits::of(p.host).room() {
                let needed = page_tables.entry(room.group.clone()).or_default();
                *needed += fork_bytes(p);
                if let Some(why) = too_tight(&room, *needed) {
                    obstacles.insert(p.pid, why);
                }
            }
        }
        let copied = job.live().filter(|p| obstacles.contains_key(&p.pid));
        let needs_bytes = copied.flat_map(|p| &p.vmas).map(|v| v.anonymous_bytes + v.swap_bytes).sum();
        Ok(Box::new(Ready { device, still: false, obstacles, needs_bytes, duplicate_limit_bytes }))
    }
}

/// Why no process of this host is forked, if so.
pub fn host_obstacle() -> Option<&'static str> {
    is_strict(&std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default()).then_some(
        "memory is not overcommitted here (vm.overcommit_memory is 2): a fork would take what the job may want to \
         allocate",
    )
}

/// Strict accounting, by what /proc/sys/vm/overcommit_memory says.
fn is_strict(overcommit: &str) -> bool {
    overcommit.trim() == "2"
}

/// Bytes of kernel memory that a fork takes at once, charged to the process's control group.
fn fork_bytes(p: &Process) -> u64 {
    const VMA_BYTES: u64 = 256;
    const TASK_BYTES: u64 = 64 << 10;
    p.status.vmpte.unwrap_or(0) * 1024 + p.vmas.len() as u64 * VMA_BYTES + TASK_BYTES
}

fn too_tight(room: &Room, needed_bytes: u64) -> Option<String> {
    (room.free_bytes < needed_bytes + room.reserve_bytes).then(|| {
        format!(
            "the memory limit of {} leaves {} KiB, too little to fork it",
            room.group.display(),
            room.free_bytes / 1024
        )
    })
}

/// Why a fork of a frozen process would be seen by the job.
fn seen_by(p: &Process, job: &Job, subreapers: &BTreeSet<i32>) -> Option<String> {
    let mut at = Some(p);
    while let Some(q) = at {
        if subreapers.contains(&q.pid) {
            return Some(format!("process {} adopts orphans (PR_SET_CHILD_SUBREAPER)", q.pid));
        }
        at = job.process(q.ppid);
    }
    None
}

/// What kept parts of the job from being forked.
#[derive(Debug, Default)]
pub(super) struct Reasons {
    /// Why the kernel module did not keep a process.
    not_kept: BTreeMap<i32, String>,
    processes: BTreeMap<i32, String>,
    /// Bytes by pid and cause.
    ranges: BTreeMap<(i32, &'static str), u64>,
}

impl Reasons {
    /// The kernel module did not keep this process.
    pub(super) fn not_kept(&mut self, pid: i32, why: String) {
        self.not_kept.insert(pid, why);
    }

    fn into_texts(self) -> Vec<String> {
        let not_kept = self
            .not_kept
            .iter()
            .map(|(pid, why)| format!("pid {pid} was not kept by the kernel module: {why}"));
        let processes = self
            .processes
            .iter()
            .map(|(pid, why)| format!("pid {pid} was copied while it stood still: {why}"));
        let ranges = self.ranges.iter().map(|((pid, why), bytes)| {
            format!("pid {pid}: {} KiB of {why} memory were copied while it stood still", bytes / 1024)
        });
        not_kept.chain(processes).chain(ranges).collect()
    }
}

/// A fork under way.
struct Pending {
    pid: i32,
    /// None: the injection that keeps the process dumpable is used.
    live: Option<Live>,
    memory: Forced,
    fork: Fork,
}

fn refused(errno: Errno) -> String {
    match errno {
        Errno::EAGAIN => "fork: no more processes are allowed (RLIMIT_NPROC, pids.max)".into(),
        Errno::ENOMEM => "fork: not enough memory (ENOMEM)".into(),
        e => format!("fork: {e}"),
    }
}

/// Forks all processes but those that are `kept` otherwise: starts all, then waits for all.
fn fork_all(
    frozen: &mut FrozenJob,
    collected: &Collected,
    kept: &BTreeMap<i32, Kept>,
    obstacles: &BTreeMap<i32, String>,
    reasons: &mut Reasons,
) -> Result<BTreeMap<i32, CopyProcess>, DumpError> {
    let FrozenJob { job, opened, .. } = frozen;
    let job = &*job;
    let mut pending = Vec::new();
    let mut beside = ckpt_sys::task::Beside::default();
    for p in job.live().filter(|p| !kept.contains_key(&p.pid)) {
        let obstacle = obstacles.get(&p.pid).cloned();
        let why = obstacle.or_else(|| seen_by(p, job, &collected.subreapers));
        if let Some(why) = why {
            reasons.processes.insert(p.pid, why);
            continue;
        }
        beside.on(last_cpu(p.host, p.host));
        let memory = Forced::open(p.host).map_err(DumpError::process(p.pid, "opening its memory"))?;
        let mut live = match opened.has(p.pid) {
            true => None,
            false => {
                let (padding, scratch) = (collect::padding_of(p)?, collect::scratch_of(p)?);
                Some(collect::open(p, &p.threads[0], &memory, padding, scratch)?)
            }
        };
        let Some(task) = live.as_mut().or_else(|| opened.get(p.pid).map(|o| &mut o.live)) else { continue };
        let started = match Fork::start(task, &memory) {
            Ok(Ok(fork)) => Ok(fork),
            Ok(Err(errno)) => Err(refused(errno)),
            Err(InjectError::NoRoom { .. }) => Err("there is no room for the code behind its vDSO".into()),
            Err(e) => return Err(e.into()),
        };
        match started {
            Ok(fork) => pending.push(Pending { pid: p.pid, live, memory, fork }),
            Err(why) => {
                reasons.processes.insert(p.pid, why);
                live.map_or(Ok(()), |l| l.close(&memory))?;
            }
        }
    }
    let mut copies = BTreeMap::new();
    for Pending { pid, mut live, memory, fork } in pending {
        let Some(task) = live.as_mut().or_else(|| opened.get(pid).map(|o| &mut o.live)) else { continue };
        beside.on(last_cpu(task.pid(), task.pid()));
        match fork.finish(task, &memory)? {
            Forked::Copy(copy) => {
                // Where memory runs out, it goes first.
                std::fs::write(format!("/proc/{}/oom_score_adj", copy.pid()), "1000")
                    .map_err(DumpError::process(pid, "writing oom_score_adj of its frozen copy"))?;
                copies.insert(pid, copy);
            }
            Forked::Refused(errno) => {
                reasons.processes.insert(pid, refused(errno));
            }
        }
        live.map_or(Ok(()), |l| l.close(&memory))?;
    }
    Ok(copies)
}

/// A part of a source.
#[derive(Debug)]
enum Part {
    /// Copied while the job was frozen.
    Held(Pieces),
    /// In the copy of the process.
    Forked(i32, Vec<Range>),
    /// Kept by the kernel module.
    Kept(i32, Range),
    /// Shared memory, copied before the freeze.
    Compared(Compared),
    /// In the process, which stays frozen.
    Still(Pid, i32, Range),
    /// All of the source, of a job that stays frozen.
    Whole,
}

impl Prepared for Ready {
    fn needs_bytes(&self) -> u64 {
        self.needs_bytes
    }

    fn snapshot(
        self: Box<Self>,
        frozen: &mut FrozenJob,
        collected: &Collected,
    ) -> Result<Box<dyn Snapshot>, DumpError> {
        if self.still {
            return Ok(Box::new(Still::of(frozen)));
        }
        self.take(frozen, collected, None)
    }

    fn tracks_writes(&self) -> bool {
        self.device && kmod::tracks_writes()
    }

    fn snapshot_changes(
        self: Box<Self>,
        frozen: &mut FrozenJob,
        collected: &Collected,
        changes: &mut Changes,
    ) -> Result<Box<dyn Snapshot>, DumpError> {
        self.take(frozen, collected, Some(changes))
    }
}

impl Ready {
    fn take(
        &self,
        frozen: &mut FrozenJob,
        collected: &Collected,
        mut changes: Option<&mut Changes>,
    ) -> Result<Box<dyn Snapshot>, DumpError> {
        let mut reasons = Reasons::default();
        let kept = if self.device {
            kmod::keep_all(frozen, &mut reasons, changes.as_deref_mut())?
        } else {
            BTreeMap::new()
        };
        let copies = if self.still {
            BTreeMap::new()
        } else {
            fork_all(frozen, collected, &kept, &self.obstacles, &mut reasons)?
        };
        let (mut parts, mut held_bytes) = (Vec::with_capacity(collected.sources.len()), 0);
        for source in &collected.sources {
            let mut same = Vec::new();
            parts.push(match collected.precopied.compare(source, collected)? {
                Some(compared) => {
                    held_bytes += compared.changed_bytes;
                    vec![Part::Compared(compared)]
                }
                None => {
                    let hold = Hold { still: self.still, copies: &copies, kept: &kept };
                    hold.source(source, &mut reasons, &mut held_bytes, &mut same)?
                }
            });
            if let Some(changes) = changes.as_deref_mut() {
                changes.same.push(same);
            }
        }
        let guard = Guard::new(&copies, self.duplicate_limit_bytes);
        let engine = match (kept.is_empty(), copies.is_empty()) {
            (false, _) => kmod::NAME,
            (true, false) => NAME,
            (true, true) => super::copy::NAME,
        };
        let account = Account { engine, reasons: reasons.into_texts(), held_bytes, ..Account::default() };
        let still = self.still.then(|| Still::of(frozen));
        Ok(Box::new(Copies { parts, account, guard, copies, kept, still, reader: None, settled: false }))
    }
}

/// What memory is kept by.
struct Hold<'a> {
    still: bool,
    copies: &'a BTreeMap<i32, CopyProcess>,
    kept: &'a BTreeMap<i32, Kept>,
}

impl Hold<'_> {
    /// Copies what is not kept of a source. `same` gets what need not be, as another checkpoint has it.
    fn source(
        &self,
        source: &Source,
        reasons: &mut Reasons,
        held_bytes: &mut u64,
        same: &mut Vec<Same>,
    ) -> Result<Vec<Part>, DumpError> {
        let mut pieces = Pieces::new();
        let mut parts = Vec::new();
        let From::Process { host, pid, ranges } = &source.from else {
            if self.still {
                return Ok(vec![Part::Whole]);
            }
            read_source(source, PIECE_BYTES, &mut |piece| keep(&mut pieces, source, piece))?;
            *held_bytes += bytes_of(&pieces);
            return Ok(vec![Part::Held(pieces)]);
        };
        let forked = self.copies.contains_key(pid);
        let mut reader = None;
        let divided = match self.kept.get(pid) {
            None => ranges.iter().map(|r| (false, *r)).collect(),
            Some(kept) => {
                let mut all = Vec::with_capacity(ranges.len());
                for r in ranges {
                    all.extend(kept.divide(source.kind, r, same)?);
                }
                all
            }
        };
        for (is_kept, r) in &divided {
            if *is_kept {
                parts.push(Part::Kept(*pid, *r));
                continue;
            }
            if self.still {
                parts.push(Part::Still(*host, *pid, *r));
                continue;
            }
            if forked && r.lost_in_fork.is_none() {
                match parts.last_mut() {
                    Some(Part::Forked(_, list)) => list.push(*r),
                    _ => parts.push(Part::Forked(*pid, vec![*r])),
                }
                continue;
            }
            let reader = match &mut reader {
                Some(r) => r,
                none => none.insert(pages::Reader::open(*host, *pid)?),
            };
            reader.read_range(r, PIECE_BYTES, &mut |piece| keep(&mut pieces, source, piece))?;
            let bytes = bytes_of(&pieces);
            if bytes > 0 {
                if let (Some(why), true) = (r.lost_in_fork, forked) {
                    *reasons.ranges.entry((*pid, why)).or_default() += bytes;
                }
                *held_bytes += bytes;
                parts.push(Part::Held(std::mem::take(&mut pieces)));
            }
        }
        Ok(parts)
    }
}

fn bytes_of(pieces: &Pieces) -> u64 {
    pieces.iter().map(|(_, d)| d.len() as u64).sum()
}

/// Frozen copies, and what they don't have.
struct Copies {
    parts: Vec<Vec<Part>>,
    account: Account,
    /// Before the copies: it must not kill by a pid that is no longer theirs.
    guard: Guard,
    copies: BTreeMap<i32, CopyProcess>,
    kept: BTreeMap<i32, Kept>,
    still: Option<Still>,
    reader: Option<(i32, pages::Reader)>,
    settled: bool,
}

impl Copies {
    /// Waits until all copies stand.
    fn settle(&mut self) -> Result<(), DumpError> {
        if !self.settled {
            for (pid, copy) in &self.copies {
                copy.wait_for_stop().map_err(|_| DumpError::CopyLost { pid: *pid })?;
            }
            self.guard.start();
            self.settled = true;
        }
        Ok(())
    }

    /// Why a copy is not what it was.
    fn check(&self) -> Result<(), DumpError> {
        match self.copies.iter().find(|(_, c)| !c.is_whole()) {
            None => Ok(()),
            Some((pid, _)) => Err(self.guard.verdict().unwrap_or(DumpError::CopyLost { pid: *pid })),
        }
    }

    fn stream_forked(&mut self, pid: i32, ranges: &[Range], sink: &mut Sink<'_>) -> Result<(), DumpError> {
        let copy = self.copies.get(&pid).ok_or(DumpError::CopyLost { pid })?.pid();
        let reader = self.reader_of(copy, pid)?;
        ranges.iter().try_for_each(|r| reader.read_range(r, PIECE_BYTES, sink))
    }

    /// Reads the memory of `host`, which stands for the process `pid`.
    fn reader_of(&mut self, host: Pid, pid: i32) -> Result<&pages::Reader, DumpError> {
        let reader = match self.reader.take() {
            Some(last) if last.0 == pid => last,
            _ => (pid, pages::Reader::open(host, pid)?),
        };
        Ok(&self.reader.insert(reader).1)
    }
}

impl Snapshot for Copies {
    fn stream(&mut self, index: usize, source: &Source, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        self.settle()?;
        for part in std::mem::take(&mut self.parts[index]) {
            match part {
                // Memory is given back as it is written.
                Part::Held(pieces) => {
                    for (offset, data) in pieces {
                        sink(Piece::Data(offset, &data))?;
                    }
                }
                Part::Compared(compared) => compared.stream(PIECE_BYTES, sink)?,
                Part::Kept(pid, range) => {
                    let Some(kept) = self.kept.get(&pid) else { return Err(DumpError::CopyLost { pid }) };
                    kept.read_range(&range, PIECE_BYTES, sink)?;
                }
                Part::Still(host, pid, range) => {
                    self.reader_of(host, pid)?.read_range(&range, PIECE_BYTES, sink)?;
                }
                Part::Whole => read_source(source, PIECE_BYTES, sink)?,
                Part::Forked(pid, ranges) => {
                    let done = self.stream_forked(pid, &ranges, sink);
                    // A copy that was killed is the cause of any other error.
                    self.check()?;
                    done?;
                }
            }
        }
        Ok(())
    }

    fn keeps_mappings(&self, pid: i32) -> bool {
        self.copies.contains_key(&pid)
    }

    fn mappings(&mut self, pid: i32) -> Result<Vec<Vma>, DumpError> {
        self.settle()?;
        let copy = self.copies.get(&pid).ok_or(DumpError::CopyLost { pid })?;
        let vmas = read_smaps(copy.pid().as_raw());
        // One that was killed has none.
        self.check()?;
        vmas.map_err(DumpError::process(pid, "reading smaps of its frozen copy"))
    }

    fn finish(&mut self) -> Result<Account, DumpError> {
        if self.settled {
            self.check()?;
        }
        if let Some(still) = &self.still {
            still.check()?;
            self.account.duplicated_bytes = Some(0);
        } else if self.kept.is_empty() {
            self.account.duplicated_bytes = Some(self.guard.duplicated_bytes());
        }
        // What was duplicated may have been lost with a copy that ends at this moment.
        if self.settled {
            self.check()?;
        }
        self.guard.stop();
        self.reader = None;
        self.copies.clear();
        self.kept.clear();
        Ok(std::mem::take(&mut self.account))
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.guard.stop();
    }
}

/// The snapshot of a job that stays frozen: its memory is read where it is.
#[derive(Debug)]
struct Still {
    /// A thread of each of its processes, as ckpt sees it, and the process as the job sees it.
    processes: Vec<(Pid, i32)>,
}

impl Still {
    fn of(frozen: &FrozenJob) -> Still {
        let thread = |p: &Process| p.threads.first().map_or(p.host, |t| t.host);
        Still { processes: frozen.job.live().map(|p| (thread(p), p.pid)).collect() }
    }

    /// Whether all still stand: the memory of one that was killed reads as having no pages.
    fn check(&self) -> Result<(), DumpError> {
        match self.processes.iter().find(|(thread, _)| ckpt_sys::ptrace::registers(*thread).is_err()) {
            None => Ok(()),
            Some((_, pid)) => {
                let what = "it was killed by somebody else while its memory was read";
                Err(DumpError::errno(*pid, what)(Errno::ESRCH))
            }
        }
    }
}

impl Snapshot for Still {
    fn stream(&mut self, _: usize, source: &Source, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        read_source(source, PIECE_BYTES, sink)
    }

    fn finish(&mut self) -> Result<Account, DumpError> {
        self.check()?;
        let reasons = vec!["the job stays frozen until it ends: its memory is read where it is".to_owned()];
        Ok(Account { engine: NAME, reasons, duplicated_bytes: Some(0), ..Account::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_strict_accounting_forbids_a_fork() {
        assert!(is_strict("2\n"));
        assert!(!is_strict("0\n") && !is_strict("1\n") && !is_strict(""));
    }

    #[test]
    fn a_tight_limit_forbids_a_fork() {
        let room = |free_bytes| Room { group: "/g".into(), free_bytes, reserve_bytes: 16 << 20 };
        assert_eq!(too_tight(&room(20 << 20), 2 << 20), None);
        assert!(too_tight(&room(17 << 20), 2 << 20).is_some());
    }
}
