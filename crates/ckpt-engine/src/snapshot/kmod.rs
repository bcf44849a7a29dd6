// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `kmod` engine: `/dev/ckpt` keeps the private memory of every process in one walk of its page tables. What it doesn't
//! take (shared memory, pages under I/O) is copied while the job is frozen; a process that it refuses is forked or
//! copied as by [`super::cow`]. See docs/adr/0019-attach-by-injection.md.
//!
//! A helper in the process, which shares its memory and has descriptors of its own, attaches it; the session is taken out before the
//! helper exits. Whatever becomes of the dumper, the process never has it.

use super::cow::{Cow, Reasons};
use super::{Engine, Pages, Piece, Prepared, Range, Sink, unread};
use crate::dump::collect;
use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::kind::Kind;
use crate::model::Job;
use crate::model::process::{Process, ProcessId};
use crate::track::Same;
use ckpt_image::Origin;
use ckpt_sys::Errno;
use ckpt_sys::device::{self, KIND_COPY, KIND_DATA, KIND_FOREIGN, KIND_SAME, KIND_ZERO, Run, Session};
use ckpt_sys::memory::PAGE;
use ckpt_sys::task::Beside;
use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

/// Its name.
pub const NAME: &str = "kmod";
/// Runs that are asked for in one go.
const RUNS: usize = 1024;

/// The engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kmod;

/// Why the module is not used here, if so: it is not loaded, closed to this user, or of another version.
pub fn host_obstacle() -> Option<String> {
    match device::query() {
        Ok(_) => None,
        Err(Errno::ENOENT) => Some("the kernel module is not loaded".into()),
        Err(Errno::EACCES | Errno::EPERM) => {
            Some(format!("{} is closed to this user: join the group ckpt", device::PATH))
        }
        Err(Errno::EPROTO) => Some("the kernel module is of another version than this ckpt".into()),
        Err(e) => Some(format!("{}: {e}", device::PATH)),
    }
}

impl Engine for Kmod {
    fn name(&self) -> &'static str {
        NAME
    }

    fn prepare(&self, job: &Job, stays_frozen: bool) -> Result<Box<dyn Prepared>, DumpError> {
        Cow::default().prepare_with(job, stays_frozen, true)
    }
}

/// Whether the module tells what has been written since an earlier snapshot.
pub(super) fn tracks_writes() -> bool {
    device::query().is_ok_and(|q| device::tracks_writes(&q))
}

/// What the module knows of writes from one dump to the next.
#[derive(Debug, Default)]
pub struct Changes {
    /// The processes with a session. Before the snapshot: those of the last dump; after it: those of this one.
    pub processes: Vec<Tracked>,
    /// By source: pages that are those of the parent.
    pub same: Vec<Vec<Same>>,
    /// Bytes of private memory that are not.
    pub dirty_bytes: u64,
    /// Processes that are saved whole although they need not have been, and why.
    pub notes: Vec<String>,
}

/// A process whose writes the module tracks.
#[derive(Debug)]
pub struct Tracked {
    /// The process.
    pub id: ProcessId,
    /// Its session.
    pub session: Session,
    /// The generation that began with the last snapshot.
    pub generation: u64,
    /// The object of its private memory in the checkpoint of that snapshot, if another can be built on it.
    pub parent_object: Option<u64>,
}

/// What the module keeps, by address.
#[derive(Debug)]
struct Memory {
    pid: i32,
    snapshot: device::Snapshot,
}

impl Origin for Memory {
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let read = self.snapshot.read(at, buf);
        let what = || format!("reading {} bytes at {at:#x} from the kernel module", buf.len());
        read.map_err(|e| DumpError::process(self.pid, what())(e).into())
    }
}

/// The private memory of a process, kept by the module.
#[derive(Debug)]
pub struct Kept {
    memory: Arc<Memory>,
    /// Without what is as in this object of the parent.
    parent_object: Option<u64>,
}

/// A snapshot to be taken.
struct Wanted<'a> {
    process: &'a Process,
    session: Session,
    track: bool,
    /// Without what has not been written since.
    since: Option<u64>,
    parent_object: Option<u64>,
    /// The session is of an earlier dump.
    is_old: bool,
}

/// One that was taken.
struct Took {
    snapshot: device::Snapshot,
    taken: device::Taken,
    /// Without what has not been written.
    is_incremental: bool,
    /// Why not, or why nothing will be known of writes.
    note: Option<&'static str>,
    /// It is known what will be written.
    is_tracked: bool,
}

impl Wanted<'_> {
    fn take(&self) -> Result<Took, Errno> {
        let mut note = None;
        if !self.track {
            let (snapshot, taken) = self.session.snapshot()?;
            return Ok(Took { snapshot, taken, is_incremental: false, note, is_tracked: false });
        }
        if self.since.is_some() {
            match self.session.snapshot_and_track(self.since) {
                Ok((snapshot, taken)) => {
                    return Ok(Took { snapshot, taken, is_incremental: true, note, is_tracked: true });
                }
                Err(Errno::ESTALE) => note = Some(STALE),
                // The kernel's own mapping has gone since; asked without a generation, it says whether that is all.
                Err(Errno::EOPNOTSUPP) => note = Some(NOT_TRACKED),
                Err(e) => return Err(e),
            }
        }
        match self.session.snapshot_and_track(None) {
            Ok((snapshot, taken)) => {
                Ok(Took { snapshot, taken, is_incremental: false, note, is_tracked: true })
            }
            Err(Errno::EOPNOTSUPP) => {
                let (snapshot, taken) = self.session.snapshot()?;
                let note = Some(NOT_TRACKED);
                Ok(Took { snapshot, taken, is_incremental: false, note, is_tracked: false })
            }
            Err(e) => Err(e),
        }
    }
}

const STALE: &str =
    "the kernel module has lost track of its writes (somebody else has cleared its soft-dirty bits)";
const NOT_TRACKED: &str =
    "the kernel module can't track its writes (the kernel's own mappings in it were moved)";

/// Takes snapshots that don't depend on each other: one thread for each processor.
fn take_all(wanted: &[Wanted<'_>]) -> Vec<Result<Took, Errno>> {
    let take = |part: &[Wanted<'_>]| part.iter().map(Wanted::take).collect::<Vec<_>>();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(wanted.len());
    match threads {
        0 | 1 => take(wanted),
        n => std::thread::scope(|scope| {
            let parts: Vec<_> =
                wanted.chunks(wanted.len().div_ceil(n)).map(|part| scope.spawn(move || take(part))).collect();
            // A thread that panics ends the program.
            parts.into_iter().flat_map(|part| part.join().unwrap_or_default()).collect()
        }),
    }
}

/// Attaches all processes, then has the module keep the memory of each; with `changes`, only what has been written since. `reasons` gets
/// those that it does not keep.
pub(super) fn keep_all(
    frozen: &mut FrozenJob,
    reasons: &mut Reasons,
    mut changes: Option<&mut Changes>,
) -> Result<BTreeMap<i32, Kept>, DumpError> {
    let FrozenJob { job, opened, .. } = frozen;
    let track = changes.is_some();
    let mut known = changes.as_deref_mut().map(|c| std::mem::take(&mut c.processes)).unwrap_or_default();
    let mut refuse = |pid: i32, why: String, changes: Option<&mut Changes>| {
        if let Some(changes) = changes {
            changes.notes.push(format!("pid {pid}: {why}; its memory is saved whole each time"));
        }
        reasons.not_kept(pid, why);
    };
    let mut beside = Beside::default();
    let fresh = |process, session| Wanted {
        process,
        session,
        track,
        since: None,
        parent_object: None,
        is_old: false,
    };
    let mut wanted = Vec::new();
    for p in job.live() {
        let old = known.iter().position(|t| t.id == ProcessId::of(p)).map(|at| known.swap_remove(at));
        if opened.has(p.pid) {
            refuse(p.pid, NOT_DUMPABLE.into(), changes.as_deref_mut());
        } else if let Some(Tracked { session, generation, parent_object, .. }) = old {
            let since = parent_object.map(|_| generation);
            wanted.push(Wanted { process: p, session, track, since, parent_object, is_old: true });
        } else {
            match attach(p, &mut beside)? {
                Ok(session) => wanted.push(fresh(p, session)),
                Err(why) => refuse(p.pid, why, changes.as_deref_mut()),
            }
        }
    }
    let mut took: Vec<_> = take_all(&wanted).into_iter().zip(wanted).collect();
    for (took, wanted) in &mut took {
        // It has executed another program, or its credentials have changed. Where it can't be attached anew, the reason is given below.
        if wanted.is_old
            && matches!(took, Err(Errno::ESRCH | Errno::EACCES))
            && let Ok(session) = attach(wanted.process, &mut beside)?
        {
            *wanted = fresh(wanted.process, session);
            *took = wanted.take();
        }
    }
    let mut out = BTreeMap::new();
    for (took, wanted) in took {
        let pid = wanted.process.pid;
        match took {
            Ok(Took { snapshot, taken, is_incremental, note, is_tracked }) => {
                if let Some(changes) = changes.as_deref_mut() {
                    changes.notes.extend(note.map(|why| format!("pid {pid}: {why}; it is saved whole")));
                    changes.dirty_bytes += (taken.pages_data + taken.pages_copy) * PAGE;
                    let generation = taken.generation;
                    if is_tracked {
                        let (id, session) = (ProcessId::of(wanted.process), wanted.session);
                        changes.processes.push(Tracked { id, session, generation, parent_object: None });
                    }
                }
                let parent_object = wanted.parent_object.filter(|_| is_incremental);
                out.insert(pid, Kept { memory: Arc::new(Memory { pid, snapshot }), parent_object });
            }
            Err(errno) => refuse(pid, refused(errno), changes.as_deref_mut()),
        }
    }
    Ok(out)
}

const NOT_DUMPABLE: &str = "it is not dumpable";

fn refused(errno: Errno) -> String {
    match errno {
        Errno::EDQUOT => "it has more memory than RLIMIT_MEMLOCK allows you (ulimit -l)".into(),
        Errno::ENOSPC => "it has more memory than the module may keep (its parameter max_pages)".into(),
        Errno::EOPNOTSUPP => "a device or a virtual machine shares its memory".into(),
        Errno::EBUSY => "it has as many snapshots as it may have".into(),
        Errno::EACCES => NOT_DUMPABLE.into(),
        e => format!("snapshot: {e}"),
    }
}

/// Has a helper in a frozen process attach its memory. The inner error says why it was not done.
fn attach(p: &Process, beside: &mut Beside) -> Result<Result<Session, String>, DumpError> {
    let made = collect::make_descriptor(p, beside, &device::session_of(p.pid))?;
    let foreign = |e| format!("{} in it is not the module's ({e})", device::PATH);
    Ok(made
        .map_err(|why| format!("attaching it to {}: {why}", device::PATH))
        .and_then(|fd| Session::new(fd).map_err(foreign)))
}

/// Which pages are those of the parent.
#[cfg(not(feature = "test-hooks"))]
fn same_kinds() -> u32 {
    KIND_SAME
}

/// Tests may have writes ignored: their guests must then find wrong memory.
#[cfg(feature = "test-hooks")]
fn same_kinds() -> u32 {
    if std::env::var_os("CKPT_TEST_IGNORE_WRITES").is_some() { KIND_SAME | KIND_DATA } else { KIND_SAME }
}

impl Kept {
    fn runs(
        &self,
        start: u64,
        end: u64,
        kinds: u32,
        each: &mut dyn FnMut(u64, u64, u32) -> Result<(), DumpError>,
    ) -> Result<(), DumpError> {
        let mut runs = [Run::default(); RUNS];
        let mut at = start;
        while at < end {
            let Memory { pid, snapshot } = &*self.memory;
            let (n, next) = snapshot
                .runs(at, end, kinds, &mut runs)
                .map_err(DumpError::errno(*pid, "reading what the kernel module kept"))?;
            for r in &runs[..n] {
                each(r.va, u64::from(r.npages) * PAGE, r.kind)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Divides a range of a source, in order, into what the module keeps (true) and what must be copied from the process while it
    /// stands still. `same` gets what is as in the parent, and need be neither.
    ///
    /// # Errors
    /// If the module can't be asked.
    pub fn divide(
        &self,
        kind: Kind,
        range: &Range,
        same: &mut Vec<Same>,
    ) -> Result<Vec<(bool, Range)>, DumpError> {
        if range.pages == Pages::All {
            return Ok(vec![(false, *range)]);
        }
        let part = |start: u64, end: u64| Range {
            addr: start,
            bytes: end - start,
            offset: range.offset + (start - range.addr),
            ..*range
        };
        let parent_object = self.parent_object.filter(|_| kind == Kind::MemoryMap);
        let (mut out, mut at) = (Vec::new(), range.addr);
        let end = range.addr + range.bytes;
        let kinds = KIND_COPY | KIND_FOREIGN | same_kinds();
        self.runs(range.addr, end, kinds, &mut |va, bytes, kind| {
            if va > at {
                out.push((true, part(at, va)));
            }
            match parent_object.filter(|_| kind & same_kinds() != 0) {
                Some(parent_object) => {
                    same.push(Same { offset: part(va, va).offset, bytes, parent_object });
                }
                None => out.push((kind == KIND_DATA, part(va, va + bytes))),
            }
            at = va + bytes;
            Ok(())
        })?;
        if at < end {
            out.push((true, part(at, end)));
        }
        Ok(out)
    }

    /// Gives the pages of a range that [`Kept::divide`] found to be kept.
    ///
    /// # Errors
    /// If they can't be read, and those of the sink.
    pub fn read_range(&self, range: &Range, piece: usize, sink: &mut Sink<'_>) -> Result<(), DumpError> {
        let offset = |va: u64| range.offset + (va - range.addr);
        let origin = &(Arc::clone(&self.memory) as Arc<dyn Origin>);
        self.runs(range.addr, range.addr + range.bytes, KIND_DATA | KIND_ZERO, &mut |va, bytes, kind| {
            if kind == KIND_ZERO {
                return sink(Piece::Zero(offset(va), bytes));
            }
            unread(origin, (offset(va), va, bytes), piece, sink)
        })
    }
}
