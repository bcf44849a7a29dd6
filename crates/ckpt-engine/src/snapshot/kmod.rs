// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `kmod` engine: `/dev/ckpt` keeps the private memory of every process in one walk of its page tables. What it doesn't
//! take (shared memory, pages under I/O) is copied while the job is frozen; a process that it refuses is forked or
//! copied as by [`super::cow`]. See docs/adr/0019-attach-by-injection.md.
//!
//! A process attaches its own memory: open, ioctl and close are injected into its main thread, and the session is taken
//! out in between. Whatever becomes of the dumper, the injected code closes the descriptor before the process goes on.

use super::cow::{Cow, Reasons};
use super::{Engine, Pages, Piece, Prepared, Range, Sink};
use crate::dump::collect;
use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::model::Job;
use crate::model::process::Process;
use crate::resource::process::is_filtered;
use ckpt_sys::device::{self, KIND_COPY, KIND_DATA, KIND_FOREIGN, KIND_ZERO, Run, Session};
use ckpt_sys::memory::{Forced, PAGE};
use ckpt_sys::task::{Beside, last_cpu, pidfd_getfd, pidfd_open};
use ckpt_sys::{Errno, arch, libc};
use std::collections::BTreeMap;
use std::os::fd::AsFd;

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

/// The private memory of a process, kept by the module.
#[derive(Debug)]
pub struct Kept {
    pid: i32,
    snapshot: device::Snapshot,
}

/// Attaches all processes, then has the module keep the memory of each. `reasons` gets those that it does not keep.
pub(super) fn keep_all(
    frozen: &mut FrozenJob,
    reasons: &mut Reasons,
) -> Result<BTreeMap<i32, Kept>, DumpError> {
    let FrozenJob { job, opened, .. } = frozen;
    let mut sessions = Vec::new();
    let mut beside = Beside::default();
    for p in job.live() {
        let attached = if opened.has(p.pid) { Err(NOT_DUMPABLE.into()) } else { attach(p, &mut beside)? };
        match attached {
            Ok(session) => sessions.push((p.pid, session)),
            Err(why) => reasons.not_kept(p.pid, why),
        }
    }
    // Walks don't depend on each other: one thread for each processor.
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(sessions.len());
    let take = |sessions: &[(i32, Session)]| -> Vec<(i32, Result<device::Snapshot, Errno>)> {
        sessions.iter().map(|(pid, s)| (*pid, s.snapshot().map(|(snapshot, _)| snapshot))).collect()
    };
    let taken = match threads {
        0 | 1 => take(&sessions),
        n => std::thread::scope(|scope| {
            let parts: Vec<_> = sessions
                .chunks(sessions.len().div_ceil(n))
                .map(|part| scope.spawn(move || take(part)))
                .collect();
            // A thread that panics ends the program.
            parts.into_iter().flat_map(|part| part.join().unwrap_or_default()).collect()
        }),
    };
    let mut out = BTreeMap::new();
    for (pid, snapshot) in taken {
        match snapshot {
            Ok(snapshot) => _ = out.insert(pid, Kept { pid, snapshot }),
            Err(errno) => reasons.not_kept(pid, refused(errno)),
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

/// Has a frozen process attach its memory. The inner error says why it was not done.
fn attach(p: &Process, beside: &mut Beside) -> Result<Result<Session, String>, DumpError> {
    let leader = p.threads.first().and_then(|t| t.frozen.as_ref());
    if is_filtered(p) {
        return Ok(Err("it runs under a seccomp filter".into()));
    }
    if leader.is_none_or(|f| arch::is_compat(&f.registers)) {
        return Ok(Err("its main thread runs 32-bit code".into()));
    }
    // The kernel gives the lowest number that is free; all who share the table stand still.
    let free = p.free_descriptor();
    let close = (libc::SYS_close, [free as u64, 0, 0, 0, 0, 0]);
    beside.on(last_cpu(p.host, p.host));
    let memory = Forced::open(p.host).map_err(DumpError::process(p.pid, "opening its memory"))?;
    let (padding, scratch) = (collect::padding_of(p)?, collect::scratch_of(p)?);
    let mut live = collect::open_undone_by(p, &p.threads[0], &memory, padding, scratch, close)?;
    let path = live.scratch()?;
    let mut text = device::PATH.as_bytes().to_vec();
    text.push(0);
    memory.write(path, &text).map_err(DumpError::process(p.pid, "writing its scratch page"))?;
    let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
    let opened = live.raw(libc::SYS_openat, [libc::AT_FDCWD as u64, path, flags, 0, 0, 0])?;
    let mut session = Err(format!("opening {} in it: {}", device::PATH, Errno::from_raw(-opened as i32)));
    if opened == i64::from(free) {
        let (nr, args) = device::attach_call(free);
        session = match live.raw(nr, args)? {
            0 => take_out(p, free).map_err(|e| format!("taking its session out: {e}")),
            n => Err(refused(Errno::from_raw(-n as i32))),
        };
    } else if opened >= 0 {
        live.raw(libc::SYS_close, [opened as u64, 0, 0, 0, 0, 0])?;
        session = Err("its descriptors are not what /proc shows".into());
    }
    if opened != i64::from(free) {
        live.nothing_to_undo();
    }
    live.close(&memory)?;
    Ok(session)
}

fn take_out(p: &Process, fd: i32) -> Result<Session, Errno> {
    let pidfd = pidfd_open(p.host)?;
    pidfd_getfd(pidfd.as_fd(), fd).map(Session::new)
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
            let (n, next) = self
                .snapshot
                .runs(at, end, kinds, &mut runs)
                .map_err(DumpError::errno(self.pid, "reading what the kernel module kept"))?;
            for r in &runs[..n] {
                each(r.va, u64::from(r.npages) * PAGE, r.kind)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Divides a range, in order, into what the module keeps (true) and what must be copied from the process while it
    /// stands still.
    ///
    /// # Errors
    /// If the module can't be asked.
    pub fn divide(&self, range: &Range) -> Result<Vec<(bool, Range)>, DumpError> {
        if range.pages == Pages::All {
            return Ok(vec![(false, *range)]);
        }
        let part = |start: u64, end: u64| Range {
            addr: start,
            bytes: end - start,
            offset: range.offset + (start - range.addr),
            ..*range
        };
        let (mut out, mut at) = (Vec::new(), range.addr);
        let end = range.addr + range.bytes;
        self.runs(range.addr, end, KIND_COPY | KIND_FOREIGN, &mut |va, bytes, _| {
            if va > at {
                out.push((true, part(at, va)));
            }
            out.push((false, part(va, va + bytes)));
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
        self.runs(range.addr, range.addr + range.bytes, KIND_DATA | KIND_ZERO, &mut |va, bytes, kind| {
            if kind == KIND_ZERO {
                return sink(Piece::Zero(offset(va), bytes));
            }
            let mut done = 0;
            while done < bytes {
                let n = (bytes - done).min(piece as u64) as usize;
                let at = va + done;
                sink(Piece::Unread(offset(at), n, &mut |buf| {
                    let what = || format!("reading {n} bytes at {at:#x} from the kernel module");
                    self.snapshot.read(at, buf).map_err(|e| DumpError::process(self.pid, what())(e))
                }))?;
                done += n as u64;
            }
            Ok(())
        })
    }
}
