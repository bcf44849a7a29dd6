// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lazy restore: the job runs while most of its anonymous memory is still in the image.
//!
//! Two threads of the job's init share the work. One waits for page faults, and for news of fork, mremap, madvise and munmap, on a
//! userfaultfd of each process; the other fetches the working set of the last restore, then the rest. Each run is checked before
//! a page of it is used. When nothing is missing any more, all userfaultfds are closed and the image is no longer needed.
//!
//! What a process does with its addresses reaches us as events, and the process waits until its event has been read. Reading an
//! event and heeding it, and deciding on a page and making it, each happen under the lock of that memory: so a page is never
//! made from knowledge that an event has overtaken. While an event is unread the kernel makes no pages (EAGAIN).
//!
//! Lazy are private anonymous mappings. Shared memory is not: a mapping of it made later would be watched by nobody.
//! See docs/adr/0015-lazy-restore.md.

use super::build_tree::Build;
use super::fill_memory::{
    is_private_anonymous, is_wiped_in_copies, leave_semaphore_undo_list, stored, userfault_of,
};
use super::page_keeper::{Keeper, MANY};
use super::read::Image;
use super::working_set::WorkingSet;
use crate::error::RestoreError;
use crate::model::memory::read_smaps;
use crate::resource::memory_map::{MemoryMapRecord, VmaRecord};
use ckpt_image::{Run, RunKind};
use ckpt_sys::memory::PAGE;
use ckpt_sys::userfault::{Event, FEATURE_EVENTS, Userfault, memory_is_gone};
use ckpt_sys::{Errno, libc};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Mappings with no more stored bytes than this are filled at once: most are touched first, and a fault costs more.
const SMALL_BYTES: u64 = 256 << 10;
/// Most bytes of small mappings that are filled at once.
const MOST_SMALL_BYTES: u64 = 8 << 20;
/// How long after the start faults count as the working set.
const WORKING_SET_TIME: Duration = Duration::from_secs(5);
/// How long the kernel may refuse one page although no event explains it.
const MOST_PATIENCE: Duration = Duration::from_secs(30);
/// A moment for events to arrive.
const MOMENT: Duration = Duration::from_micros(100);

/// Addresses whose pages are still in the image: start to (end, offset in the object).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Missing {
    stretches: BTreeMap<u64, (u64, u64)>,
    /// Some stretch is not at the address that is its offset.
    displaced: bool,
}

impl Missing {
    fn insert(&mut self, start: u64, end: u64, offset: u64) {
        self.displaced |= start != offset;
        self.stretches.insert(start, (end, offset));
    }

    fn bytes(&self) -> u64 {
        self.stretches.iter().map(|(start, (end, _))| end - start).sum()
    }

    /// Where in the object the page at `addr` is.
    fn offset_of(&self, addr: u64) -> Option<u64> {
        let (start, (end, offset)) = self.stretches.range(..=addr).next_back()?;
        (addr < *end).then(|| offset + (addr - start))
    }

    /// Takes out what lies in the range; returns the stretches.
    fn take(&mut self, start: u64, end: u64) -> Vec<(u64, u64, u64)> {
        let first = self.stretches.range(..=start).next_back().filter(|(_, (e, _))| *e > start);
        let first = first.map_or(start, |(s, _)| *s);
        let touched: Vec<u64> = self.stretches.range(first..end.max(first)).map(|(s, _)| *s).collect();
        let mut out = Vec::new();
        for s in touched {
            let Some((e, offset)) = self.stretches.remove(&s) else { continue };
            let (from, to) = (s.max(start), e.min(end));
            if s < from {
                self.stretches.insert(s, (from, offset));
            }
            if to < e {
                self.stretches.insert(to, (e, offset + (to - s)));
            }
            out.push((from, to, offset + (from - s)));
        }
        out
    }

    /// Takes out what lies in the range; returns how many bytes.
    fn remove(&mut self, start: u64, end: u64) -> u64 {
        self.take(start, end).iter().map(|(from, to, _)| to - from).sum()
    }

    /// The bytes at `from` are at `to` now; what was at `to` is gone. Returns how many bytes are.
    fn moved(&mut self, from: u64, to: u64, bytes: u64) -> u64 {
        let there = self.take(from, from + bytes);
        let gone = self.remove(to, to + bytes);
        for (start, end, offset) in there {
            self.insert(to + (start - from), to + (end - from), offset);
        }
        gone
    }

    /// Where the pages of a range of the object belong: address, offset, bytes.
    fn places(&self, offset: u64, end: u64) -> Vec<(u64, u64, u64)> {
        let mut out = Vec::new();
        let mut add = |start: u64, (stretch_end, at): (u64, u64)| {
            let (from, to) = (at.max(offset), (at + (stretch_end - start)).min(end));
            if from < to {
                out.push((start + (from - at), from, to - from));
            }
        };
        let first = self.stretches.range(..=offset).next_back().map_or(offset, |(s, _)| *s);
        if self.displaced {
            self.stretches.iter().for_each(|(s, v)| add(*s, *v));
        } else {
            self.stretches.range(first..end.max(first)).for_each(|(s, v)| add(*s, *v));
        }
        out
    }
}

/// What is known of the memory of a process.
#[derive(Debug)]
struct Memory {
    missing: Missing,
    /// There is no such memory any more: its processes have ended or executed another program.
    gone: bool,
}

/// The memory of a process, and of those that share it.
#[derive(Debug)]
struct Space {
    /// A process with this memory at the start, to ask for its mappings; none for a child.
    pid: Option<i32>,
    /// The object of the image that its pages are from.
    object: u64,
    userfault: Userfault,
    memory: Mutex<Memory>,
}

impl Space {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far a page or run came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivered {
    All,
    /// An event must be read first.
    NotYet,
}

#[derive(Debug)]
struct Shared {
    image: Arc<Image>,
    label: String,
    dir: std::os::fd::OwnedFd,
    keeper: Keeper,
    /// Only the thread that serves adds to it.
    spaces: Mutex<Vec<Arc<Space>>>,
    total_bytes: u64,
    missing_bytes: AtomicU64,
    resumed: Mutex<Option<Instant>>,
    /// Told of `resumed` and `hurry`.
    told: Condvar,
    hurry: AtomicBool,
    /// The filler believes that nothing is missing.
    believed_done: AtomicBool,
    wake_server: EventFd,
    outcome: OnceLock<Result<(), String>>,
    ended: EventFd,
    working_set: Mutex<WorkingSet>,
}

/// The page server of a job; its clones are the same.
#[derive(Debug, Clone)]
pub struct PageServer(Arc<Shared>);

/// Memory that lazy restores leave to the server. Locked memory has to be there, a stack is touched at once.
fn is_lazy(v: &VmaRecord) -> bool {
    is_private_anonymous(v) && v.has_pages && v.locked.is_none() && v.flags & libc::MAP_GROWSDOWN == 0
}

/// What the server is to do, before its threads run.
pub struct Prepared {
    spaces: Vec<Arc<Space>>,
}

impl Prepared {
    /// Stretches of a process that are left to the server: sorted, each within a mapping.
    pub fn left(&self, pid: i32) -> Vec<(u64, u64)> {
        let space = self.spaces.iter().find(|s| s.pid == Some(pid));
        space.map_or(Vec::new(), |s| s.lock().missing.stretches.iter().map(|(a, (b, _))| (*a, *b)).collect())
    }

    /// Starts the threads. From here on missing pages of the blanks are served.
    ///
    /// # Errors
    /// If a descriptor or thread can't be made, or the keeper is gone.
    pub fn start(self, build: &Build<'_>, keeper: Keeper) -> Result<PageServer, RestoreError> {
        let err = |what: &'static str| RestoreError::io(1, what);
        keeper.watch_this_process().map_err(err("telling the keeper of init"))?;
        for s in &self.spaces {
            keeper.hold(s.userfault.as_fd()).map_err(err("giving a userfaultfd to the keeper"))?;
        }
        let total_bytes = self.spaces.iter().map(|s| s.lock().missing.bytes()).sum();
        let event = || {
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(RestoreError::errno(1, "eventfd"))
        };
        let dir = build.request.dir.try_clone().map_err(err("the checkpoint's directory"))?;
        let working_set = WorkingSet::load(&dir, &build.image.reader.header().id);
        let shared = Arc::new(Shared {
            image: build.image.clone(),
            label: build.request.label.clone(),
            dir,
            keeper,
            spaces: Mutex::new(self.spaces),
            total_bytes,
            missing_bytes: AtomicU64::new(total_bytes),
            resumed: Mutex::new(None),
            told: Condvar::new(),
            hurry: AtomicBool::new(false),
            believed_done: AtomicBool::new(false),
            wake_server: event()?,
            outcome: OnceLock::new(),
            ended: event()?,
            working_set: Mutex::new(working_set),
        });
        type Life = fn(&Shared) -> Result<(), String>;
        for (name, life) in [("ckpt-pages", Shared::serve as Life), ("ckpt-filler", Shared::fill_in as Life)]
        {
            let own = shared.clone();
            let thread = move || {
                if let Err(why) = life(&own) {
                    own.end(Err(why));
                }
            };
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(thread)
                .map_err(err("starting a thread of the page server"))?;
        }
        leave_semaphore_undo_list();
        Ok(PageServer(shared))
    }
}

/// Makes the userfaultfds and registers what is lazy; or says why this can't be, and nothing has changed.
///
/// # Errors
/// If a blank could not be driven.
pub fn prepare(
    build: &mut Build<'_>,
    records: &[(i32, MemoryMapRecord)],
) -> Result<Result<Prepared, String>, RestoreError> {
    let mut spaces = Vec::new();
    let mut small_left = if ckpt_sys::hook::page_server_held() { 0 } else { MOST_SMALL_BYTES };
    let is_copy = build.request.options.told.is_copy();
    let wiped = |v: &VmaRecord| is_copy && is_wiped_in_copies(v);
    for (pid, m) in records {
        let extents = stored(build.image.reader.runs(m.object));
        let mut missing = Missing::default();
        let mut mappings = Vec::new();
        for v in m.vmas.iter().filter(|v| is_lazy(v) && !wiped(v)) {
            let first = extents.partition_point(|(_, end)| *end <= v.start);
            let within: Vec<(u64, u64)> = extents[first..]
                .iter()
                .take_while(|(start, _)| *start < v.end)
                .map(|(start, end)| ((*start).max(v.start), (*end).min(v.end)))
                .collect();
            let bytes: u64 = within.iter().map(|(start, end)| end - start).sum();
            if bytes <= SMALL_BYTES.min(small_left) {
                small_left -= bytes;
                continue;
            }
            mappings.push((v, within));
        }
        if mappings.is_empty() {
            continue;
        }
        let userfault = match userfault_of(build, *pid, 0, FEATURE_EVENTS)? {
            Ok(u) => u,
            Err(Errno::EPERM) => {
                return Ok(Err("pages can be served safely only with CAP_SYS_PTRACE in the initial user namespace \
                               (userfaultfd(2): faults of the kernel, and UFFD_FEATURE_EVENT_FORK), which jobs of \
                               unprivileged users do not have"
                    .to_owned()));
            }
            Err(Errno::ENOSYS) => return Ok(Err("this kernel has no userfaultfd(2)".to_owned())),
            Err(Errno::EINVAL) => {
                let text = "this kernel's userfaultfd(2) does not tell of fork, mremap, madvise and munmap";
                return Ok(Err(text.to_owned()));
            }
            Err(e) => return Ok(Err(format!("userfaultfd(2) in process {pid}: {e}"))),
        };
        for (v, within) in mappings {
            // Another mapping of the process may be part of it: userfaultfds watch whole mappings and parts alike.
            if userfault.register(v.start, v.end - v.start).is_ok() {
                within.iter().for_each(|(start, end)| missing.insert(*start, *end, *start));
            }
        }
        spaces.push(Arc::new(Space {
            pid: Some(*pid),
            object: m.object,
            userfault,
            memory: Mutex::new(Memory { missing, gone: false }),
        }));
    }
    if spaces.is_empty() {
        return Ok(Err("there is too little anonymous memory for it to matter".to_owned()));
    }
    Ok(Ok(Prepared { spaces }))
}

impl PageServer {
    /// The job runs: the rest is fetched from now on.
    pub fn resumed(&self) {
        *self.0.lock_resumed() = Some(Instant::now());
        self.0.told.notify_all();
    }

    /// Somebody waits for the end.
    pub fn hurry(&self) {
        self.0.hurry.store(true, Ordering::Relaxed);
        let _guard = self.0.lock_resumed();
        self.0.told.notify_all();
    }

    /// Bytes that are still in the image only, and how many there were at the start.
    pub fn missing_bytes(&self) -> (u64, u64) {
        (self.0.missing_bytes.load(Ordering::Relaxed), self.0.total_bytes)
    }

    /// How it ended: nothing depends on the image any more, or why the job can't go on. The job must be killed then, before
    /// this is dropped: what waits for a page would find zeros.
    pub fn outcome(&self) -> Option<Result<(), String>> {
        self.0.outcome.get().cloned()
    }

    /// Readable once there is an outcome.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.0.ended.as_fd()
    }
}

impl Shared {
    fn lock_resumed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.resumed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_spaces(&self) -> Vec<Arc<Space>> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn end(&self, how: Result<(), String>) {
        if how.is_err() && self.lock_resumed().is_none() {
            // A blank that waits for a page would wait for ever, and its tracer for it.
            let _ = ckpt_sys::spawn::send_signal(-1, libc::SIGKILL);
        }
        let _ = self.outcome.set(how);
        let _ = self.ended.write(1);
        let _ = self.wake_server.write(1);
    }

    fn no_longer_missing(&self, bytes: u64) {
        self.missing_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn forget(&self, memory: &mut Memory) {
        self.no_longer_missing(memory.missing.bytes());
        *memory = Memory { missing: Missing::default(), gone: true };
    }

    /// The run of an object that holds the page at `offset`.
    fn run_at(&self, object: u64, offset: u64) -> Result<&Run, String> {
        let runs = self.image.reader.runs(object);
        let next = runs.partition_point(|r| r.offset + r.bytes <= offset);
        runs.get(next)
            .filter(|r| r.offset <= offset)
            .ok_or_else(|| format!("defect: no page at {offset:#x} of object {object}"))
    }

    fn read(&self, run: &Run, buf: &mut Vec<u8>) -> Result<(), String> {
        self.image.reader.read_run(run, buf).map_err(|e| {
            format!(
                "the checkpoint {} was found damaged while the job's memory was still being fetched from it: {e}",
                self.label
            )
        })
    }

    // ---- The thread that serves ----

    fn serve(&self) -> Result<(), String> {
        let mut waiting: Vec<(Arc<Space>, u64)> = Vec::new();
        let mut buf = Vec::new();
        let mut since = Instant::now();
        let mut many = MANY;
        loop {
            let mut spaces = self.all_spaces();
            if spaces.len() >= many {
                // A script forks thousands of children that soon end: their descriptors must not pile up.
                for s in &spaces {
                    let mut memory = s.lock();
                    if !memory.gone && memory_is_gone(s.userfault.as_fd()) {
                        self.forget(&mut memory);
                    }
                }
                spaces.retain(|s| !s.lock().gone);
                self.spaces.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&spaces);
                many = MANY.max(2 * spaces.len());
            }
            let live: Vec<&Arc<Space>> = spaces.iter().filter(|s| !s.lock().gone).collect();
            let mut polled = vec![PollFd::new(self.wake_server.as_fd(), PollFlags::POLLIN)];
            polled.extend(live.iter().map(|s| PollFd::new(s.userfault.as_fd(), PollFlags::POLLIN)));
            let timeout = if waiting.is_empty() { PollTimeout::NONE } else { PollTimeout::from(1u8) };
            match poll(&mut polled, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(format!("waiting for page faults: {e}")),
            }
            let ready: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or(false)).collect();
            drop(polled);
            if ready[0] {
                let _ = self.wake_server.read();
                if self.outcome.get().is_some() {
                    return Ok(());
                }
                if self.believed_done.load(Ordering::Acquire) {
                    // A child of what misses nothing misses nothing, so that events unread by now don't matter.
                    if spaces.iter().all(|s| s.lock().missing.stretches.is_empty()) {
                        drop((spaces, waiting));
                        self.finish();
                        return Ok(());
                    }
                    self.believed_done.store(false, Ordering::Release);
                    let _guard = self.lock_resumed();
                    self.told.notify_all();
                }
            }
            for (s, _) in live.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
                self.take_events(s, &mut waiting)?;
            }
            if waiting.is_empty() {
                since = Instant::now();
                continue;
            }
            let before = waiting.len();
            let mut left = Vec::new();
            for (space, addr) in waiting {
                if self.serve_fault(&space, addr, &mut buf)? == Delivered::NotYet {
                    left.push((space, addr));
                }
            }
            waiting = left;
            if waiting.len() < before {
                since = Instant::now();
            } else if since.elapsed() > MOST_PATIENCE {
                return Err(format!("defect: a page at {:#x} can't be made", waiting[0].1));
            }
        }
    }

    fn take_events(&self, space: &Arc<Space>, waiting: &mut Vec<(Arc<Space>, u64)>) -> Result<(), String> {
        let mut memory = space.lock();
        loop {
            let event =
                space.userfault.event().map_err(|e| format!("reading an event of userfaultfd: {e}"))?;
            match event {
                None => return Ok(()),
                Some(Event::Fault(addr)) => waiting.push((space.clone(), addr)),
                Some(Event::Fork(userfault)) => self.add_child(space, &memory, userfault)?,
                Some(Event::Remap { from, to, bytes }) => {
                    self.no_longer_missing(memory.missing.moved(from, to, bytes));
                    // Who waits for a page at the old place has lost it.
                    let _ = space.userfault.wake(from, bytes);
                }
                Some(Event::Remove(start, end) | Event::Unmap(start, end)) => {
                    self.no_longer_missing(memory.missing.remove(start, end));
                    let _ = space.userfault.wake(start, end - start);
                }
                Some(Event::Unknown(n)) => return Err(format!("unknown event {n:#x} of userfaultfd")),
            }
        }
    }

    /// The memory of a child. It has what the parent has at this moment, but for mappings that it doesn't get or gets empty.
    fn add_child(&self, parent: &Space, memory: &Memory, userfault: Userfault) -> Result<(), String> {
        let mut missing = memory.missing.clone();
        if let Some(pid) = parent.pid.filter(|_| !missing.stretches.is_empty()) {
            // The parent waits in fork(2): these are the mappings that were copied.
            let mappings = read_smaps(pid)
                .map_err(|e| format!("reading the mappings of pid {pid}, which forks: {e}"))?;
            for v in mappings.iter().filter(|v| v.has("wf") || v.has("dc")) {
                missing.remove(v.start, v.end);
            }
        }
        self.keeper
            .hold(userfault.as_fd())
            .map_err(|e| format!("giving a child's userfaultfd to the keeper: {e}"))?;
        self.missing_bytes.fetch_add(missing.bytes(), Ordering::Relaxed);
        let memory = Mutex::new(Memory { missing, gone: false });
        let child = Space { pid: None, object: parent.object, userfault, memory };
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::new(child));
        Ok(())
    }

    fn serve_fault(&self, space: &Space, addr: u64, buf: &mut Vec<u8>) -> Result<Delivered, String> {
        let mut memory = space.lock();
        let Some(offset) = memory.missing.offset_of(addr) else {
            return match space.userfault.zero(addr, PAGE).1 {
                Ok(()) => Ok(Delivered::All),
                Err(Errno::EAGAIN) => Ok(Delivered::NotYet),
                Err(Errno::ESRCH) => {
                    self.forget(&mut memory);
                    Ok(Delivered::All)
                }
                // It is there by now, or not mapped any more: who waits will see.
                Err(Errno::EEXIST | Errno::ENOENT | Errno::EINVAL) => {
                    let _ = space.userfault.wake(addr, PAGE);
                    Ok(Delivered::All)
                }
                Err(e) => Err(format!("making a page at {addr:#x}: {e}")),
            };
        };
        drop(memory);
        let run = self.run_at(space.object, offset)?;
        self.read(run, buf)?;
        let resumed = *self.lock_resumed();
        ckpt_sys::hook::page_server();
        if resumed.is_some_and(|r| r.elapsed() < WORKING_SET_TIME) {
            self.lock_working_set().touched(run.object, run.offset);
        }
        let delivered = self.deliver(space, run, buf, Some(addr))?;
        if delivered == Delivered::All {
            let _ = space.userfault.wake(addr, PAGE);
        }
        Ok(delivered)
    }

    fn lock_working_set(&self) -> MutexGuard<'_, WorkingSet> {
        self.working_set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the pages of a run that are missing in a space, that at `first` before the others.
    fn deliver(
        &self,
        space: &Space,
        run: &Run,
        content: &[u8],
        first: Option<u64>,
    ) -> Result<Delivered, String> {
        let mut memory = space.lock();
        let mut places = memory.missing.places(run.offset, run.offset + run.bytes);
        if let Some((offset, addr)) = first.and_then(|addr| Some((memory.missing.offset_of(addr)?, addr))) {
            places.insert(0, (addr, offset, PAGE));
        }
        let mut delivered = Delivered::All;
        for (addr, offset, bytes) in places {
            let (mut addr, mut offset, end) = (addr, offset, addr + bytes);
            // Whole places at first; page by page where a boundary between mappings has come to lie within.
            let mut most = u64::MAX;
            while addr < end {
                if memory.missing.offset_of(addr) != Some(offset) {
                    (addr, offset) = (addr + PAGE, offset + PAGE);
                    continue;
                }
                let n = most.min(end - addr);
                let (done, result) = match run.kind {
                    RunKind::Data => {
                        let at = (offset - run.offset) as usize;
                        space.userfault.copy(addr, &content[at..at + n as usize])
                    }
                    RunKind::Zero => space.userfault.zero(addr, n),
                };
                let made = match result {
                    Ok(()) => done,
                    Err(Errno::EEXIST) => {
                        let _ = space.userfault.wake(addr, PAGE);
                        PAGE
                    }
                    Err(Errno::EAGAIN) => return Ok(Delivered::NotYet),
                    Err(Errno::ENOENT | Errno::EINVAL) if n > PAGE => {
                        most = PAGE;
                        0
                    }
                    // Not mapped any more: an event says so soon.
                    Err(Errno::ENOENT) => {
                        delivered = Delivered::NotYet;
                        (addr, offset) = (addr + PAGE, offset + PAGE);
                        continue;
                    }
                    Err(Errno::ESRCH) => {
                        self.forget(&mut memory);
                        return Ok(Delivered::All);
                    }
                    Err(e) => return Err(format!("making {n} bytes of memory at {addr:#x}: {e}")),
                };
                self.no_longer_missing(memory.missing.remove(addr, addr + made));
                (addr, offset) = (addr + made, offset + made);
            }
        }
        Ok(delivered)
    }

    /// Nothing is missing: lets go of everything.
    fn finish(&self) {
        self.keep_working_set();
        // The keeper's copies first: memory is watched until the last one is closed, and then by nobody who would serve it. Faults
        // that come meanwhile wait for the close.
        self.keeper.dismiss();
        let spaces = std::mem::take(&mut *self.spaces.lock().unwrap_or_else(PoisonError::into_inner));
        for mut space in spaces {
            // The filler may be looking at one.
            while let Err(shared) = Arc::try_unwrap(space) {
                std::thread::sleep(MOMENT);
                space = shared;
            }
        }
        self.end(Ok(()));
    }

    fn keep_working_set(&self) {
        // For the next restore only: where it can't be written, that one does without.
        let _ = self.lock_working_set().save(&self.dir);
    }

    // ---- The thread that fills in ----

    fn fill_in(&self) -> Result<(), String> {
        let mut buf = Vec::new();
        let first: Vec<(u64, u64)> = self.lock_working_set().runs().to_vec();
        for (object, offset) in first {
            let Ok(run) = self.run_at(object, offset) else { continue };
            for space in self.all_spaces().iter().filter(|s| s.object == object) {
                self.fill_run(space, run, &mut buf, &mut None)?;
            }
        }
        let held = |this: &Shared| ckpt_sys::hook::page_server_held() && !this.hurry.load(Ordering::Relaxed);
        let mut resumed = self.lock_resumed();
        let started = loop {
            match *resumed {
                Some(at) if !held(self) => break at,
                _ => resumed = self.told.wait(resumed).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(resumed);
        let mut kept = false;
        loop {
            let mut patience = None;
            for space in self.all_spaces() {
                for run in self.image.reader.runs(space.object) {
                    if self.outcome.get().is_some() {
                        return Ok(());
                    }
                    self.fill_run(&space, run, &mut buf, &mut patience)?;
                    if !kept && started.elapsed() > WORKING_SET_TIME {
                        self.keep_working_set();
                        kept = true;
                    }
                }
            }
            let mut resumed = self.lock_resumed();
            if self.missing_bytes.load(Ordering::Relaxed) == 0 {
                self.believed_done.store(true, Ordering::Release);
                let _ = self.wake_server.write(1);
                while self.believed_done.load(Ordering::Acquire) && self.outcome.get().is_none() {
                    // The end is told by the outcome, with nobody to notify: looked at now and then.
                    let (guard, _) = self
                        .told
                        .wait_timeout(resumed, Duration::from_millis(20))
                        .unwrap_or_else(PoisonError::into_inner);
                    resumed = guard;
                }
            }
            drop(resumed);
            if self.outcome.get().is_some() {
                return Ok(());
            }
        }
    }

    /// Fills in what a space misses of a run, waiting for events to be read.
    fn fill_run(
        &self,
        space: &Space,
        run: &Run,
        buf: &mut Vec<u8>,
        patience: &mut Option<Instant>,
    ) -> Result<(), String> {
        let needed = |m: &Memory| !m.missing.places(run.offset, run.offset + run.bytes).is_empty();
        if !needed(&space.lock()) {
            return Ok(());
        }
        self.read(run, buf)?;
        while self.deliver(space, run, buf, None)? == Delivered::NotYet {
            if self.outcome.get().is_some() {
                return Ok(());
            }
            let since = *patience.get_or_insert_with(Instant::now);
            if since.elapsed() > MOST_PATIENCE {
                return Err(format!("defect: pages of object {} can't be made", run.object));
            }
            std::thread::sleep(MOMENT);
        }
        *patience = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(stretches: &[(u64, u64)]) -> Missing {
        let mut m = Missing::default();
        stretches.iter().for_each(|(s, e)| m.insert(*s, *e, *s));
        m
    }

    #[test]
    fn stretches_are_cut_and_found() {
        let mut m = missing(&[(0x1000, 0x9000), (0x20000, 0x21000)]);
        assert_eq!(m.remove(0x3000, 0x5000), 0x2000);
        assert_eq!(m.remove(0x3000, 0x5000), 0);
        assert_eq!(m.offset_of(0x2000), Some(0x2000));
        assert_eq!(m.offset_of(0x3000), None);
        assert_eq!(m.offset_of(0x5000), Some(0x5000));
        assert_eq!(m.offset_of(0x9000), None);
        assert_eq!(m.bytes(), 0x7000);
        assert_eq!(m.places(0x2000, 0x6000), [(0x2000, 0x2000, 0x1000), (0x5000, 0x5000, 0x1000)]);
        assert_eq!(m.remove(0, 0x30000), 0x7000);
        assert_eq!(m, Missing { stretches: BTreeMap::new(), displaced: false });
    }

    #[test]
    fn moved_stretches_keep_their_offset() {
        let mut m = missing(&[(0x1000, 0x5000), (0x10000, 0x12000)]);
        // Onto a part of the second one, which is gone then.
        assert_eq!(m.moved(0x2000, 0x11000, 0x2000), 0x1000);
        assert_eq!(m.offset_of(0x2000), None);
        assert_eq!(m.offset_of(0x1000), Some(0x1000));
        assert_eq!(m.offset_of(0x4000), Some(0x4000));
        assert_eq!(m.offset_of(0x10000), Some(0x10000));
        assert_eq!(m.offset_of(0x11000), Some(0x2000));
        assert_eq!(m.offset_of(0x12000), Some(0x3000));
        assert_eq!(m.places(0x2000, 0x4000), [(0x11000, 0x2000, 0x2000)]);
        // Back again, and a bit of it dropped.
        assert_eq!(m.moved(0x11000, 0x2000, 0x2000), 0);
        assert_eq!(m.remove(0x3000, 0x4000), 0x1000);
        assert_eq!(
            m.places(0, 0x100000),
            [
                (0x1000, 0x1000, 0x1000),
                (0x2000, 0x2000, 0x1000),
                (0x4000, 0x4000, 0x1000),
                (0x10000, 0x10000, 0x1000)
            ]
        );
    }
}
