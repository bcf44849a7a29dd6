// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tracking of writes between checkpoints, for incremental dumps.
//!
//! The rule: a page is *same* as in the parent only if it is there and has provably not been written to since a moment at or before
//! the parent's snapshot. What is new, moved, forked, executed, or not watched for any reason, is saved whole.
//!
//! 1. Before the freeze: processes that are not watched yet are *attached* ([`attach`]: a short stop), and their private memory is
//!    protected while they run ([`Tracker::begin`]).
//! 2. Just before the freeze what has been written is copied while the job runs ([`Tracker::copy_early`]).
//! 3. In the freeze, [`Tracker::snapshot`] scans once: pages written since are protected again in the same step and copied, if they
//!    are few; if they are many the snapshot engine keeps them. Mappings that are not watched are saved whole, and watched from now on.
//! 4. After the image has been published, the [`Tracking`] is left with the job's init until the next dump. A dumper that dies
//!    closes its descriptors: the kernel then ends all watching, and the next dump is a full one.
//!
//! Where the engine tracks by itself (the kernel module), it replaces the first three steps: [`Prepared::snapshot_changes`].

pub mod attach;
pub mod watch;

mod delta;
mod early;
mod flags;
mod held;
mod second;

pub use delta::Same;

use crate::dump::freeze::FrozenJob;
use crate::error::DumpError;
use crate::kind::Kind;
use crate::model::Job;
use crate::model::memory::Vma;
use crate::model::process::{Process, ProcessId};
use crate::resource::Collected;
use crate::snapshot::kmod::{Changes, Tracked};
use crate::snapshot::{From, Prepared, Snapshot};
use ckpt_image::Parent;
use ckpt_sys::device::Session;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use watch::Watch;

/// Why the first one is full, and one after tracking was lost.
const NOTHING_KNOWN: &str = "nothing is known of earlier writes: it is the first incremental dump since the job was started or restored, or \
                             one was killed";

/// Why one is full that would take nothing from the last one.
const NONE_WATCHED: &str = "the writes of none of its processes have been watched since the last one";

/// Why one is full after another engine's.
const OTHER_ENGINE: &str = "the engine of the last incremental dump watched writes in another way";

/// Version of the note that is left with init.
const NOTE_VERSION: u32 = 2;

/// One watched process.
#[derive(Debug)]
struct Watched {
    id: ProcessId,
    watch: Watch,
    /// The object of its private memory in the last checkpoint.
    object: Option<u64>,
}

/// What is watched, and since which checkpoint.
#[derive(Debug, Default)]
pub struct Tracking {
    /// The checkpoint that unwritten pages are those of; none before it is published.
    parent: Option<Parent>,
    processes: Vec<Watched>,
}

#[derive(Serialize, Deserialize)]
struct Note {
    version: u32,
    id: [u8; 16],
    number: u64,
    processes: Vec<ProcessNote>,
}

#[derive(Serialize, Deserialize)]
struct ProcessNote {
    #[serde(flatten)]
    id: ProcessId,
    object: Option<u64>,
    /// [`Watch::canary`] of one that needs no descriptor.
    canary: Option<u64>,
    /// [`Watch::generation`] of one whose descriptor is a session of the kernel module.
    generation: Option<u64>,
}

impl Tracking {
    /// From what was left with init.
    ///
    /// # Errors
    /// Why it can't be used, for a person.
    pub fn from_kept(note: &[u8], descriptors: Vec<OwnedFd>) -> Result<Tracking, String> {
        let note: Note = serde_json::from_slice(note)
            .map_err(|_| "what an older or newer ckpt left with the job is not understood".to_owned())?;
        let with_descriptor = note.processes.iter().filter(|p| p.canary.is_none()).count();
        if note.version != NOTE_VERSION || with_descriptor != descriptors.len() {
            return Err("what another ckpt left with the job is not understood".to_owned());
        }
        let mut descriptors = descriptors.into_iter();
        let mut processes = Vec::new();
        for p in note.processes {
            let watch = match (p.canary, &mut descriptors) {
                (Some(canary), _) => Watch::soft_dirty_since(canary),
                (None, all) => match all.next() {
                    Some(fd) => match p.generation {
                        Some(generation) => Watch::by_module(Session::adopt(fd), generation),
                        None => Watch::adopt(fd),
                    },
                    None => break,
                },
            };
            processes.push(Watched { id: p.id, watch, object: p.object });
        }
        let parent = Some(Parent { id: note.id, number: note.number });
        Ok(Tracking { parent, processes })
    }

    /// What is to be left with init, now that the checkpoint has been published: a note and descriptors.
    pub fn into_kept(self, published: Parent) -> (Vec<u8>, Vec<OwnedFd>) {
        let (mut processes, mut descriptors) = (Vec::new(), Vec::new());
        for p in self.processes {
            let (canary, generation) = (p.watch.canary(), p.watch.generation());
            processes.push(ProcessNote { id: p.id, object: p.object, canary, generation });
            descriptors.extend(p.watch.into_fd());
        }
        let Parent { id, number } = published;
        let note = Note { version: NOTE_VERSION, id, number, processes };
        // Numbers and arrays: there is nothing in it that JSON could not have.
        (serde_json::to_vec(&note).unwrap_or_default(), descriptors)
    }

    /// The checkpoint since which writes are known.
    pub fn parent(&self) -> Option<Parent> {
        self.parent
    }

    /// The processes whose mappings show that ckpt watches them.
    pub fn watched(&self) -> impl Iterator<Item = ProcessId> {
        self.processes.iter().filter(|p| p.watch.marks_mappings()).map(|p| p.id)
    }
}

/// What an incremental dump starts with.
#[derive(Debug, Default)]
pub struct Incremental {
    /// What is watched already.
    pub tracking: Tracking,
    /// Why the dump must be a full one although it is to be incremental.
    pub full_because: Option<String>,
    /// Where nothing better is to be had, trust soft-dirty bits, which miss some writes (docs/adr/0018-write-tracking.md).
    pub soft_dirty: bool,
}

/// What became of an incremental dump.
#[derive(Debug)]
pub struct Outcome {
    /// To be left with init when the checkpoint has been published.
    pub tracking: Tracking,
    /// The checkpoint that it is built on, if it is not a full one.
    pub parent: Option<Parent>,
    /// Why it is a full one.
    pub full_because: Option<String>,
    /// Pages of private memory that were saved.
    pub dirty_pages: u64,
    /// Pages that are as in the parent.
    pub same_pages: u64,
    /// What told which pages were written until the next dump: "kmod", "userfaultfd", "soft-dirty".
    pub sources: BTreeSet<&'static str>,
    /// Processes that are not watched, and why.
    pub notes: Vec<String>,
}

/// Tracking during one dump.
#[derive(Debug)]
pub struct Tracker {
    tracking: Tracking,
    parent: Option<Parent>,
    full_because: Option<String>,
    notes: Vec<String>,
    /// The engine tells what has been written.
    by_engine: bool,
    /// Room for the pages that were written, already touched.
    room: held::Room,
    /// What was copied there before the freeze, once that has been done.
    early: Option<early::Early>,
    pages: delta::Pages,
    /// By source: pages that are those of the parent.
    same: Vec<Vec<delta::Same>>,
    /// Ready to be read in the freeze.
    flags: Vec<(ProcessId, flags::Flags)>,
    /// Works, too, while the job stands still.
    second: second::Second,
}

impl Tracker {
    /// Watches all private memory of the running job, and protects what was not watched before. The job gets to know
    /// which processes are watched now. `by_engine`: the engine will do that by itself, and only what it knows is of use.
    ///
    /// # Errors
    /// What stopping a process gives; the job runs on.
    pub fn begin(job: &mut Job, start: Incremental, by_engine: bool) -> Result<Tracker, DumpError> {
        let Incremental { mut tracking, mut full_because, soft_dirty } = start;
        let mut notes = Vec::new();
        let others = tracking.processes.extract_if(.., |w| w.watch.generation().is_some() != by_engine);
        let others: Vec<ProcessId> = others.map(|w| w.id).collect();
        if tracking.processes.is_empty() && !others.is_empty() {
            full_because = full_because.or_else(|| Some(OTHER_ENGINE.to_owned()));
        } else {
            notes
                .extend(others.iter().map(|id| format!("pid {}: {OTHER_ENGINE}; it is saved whole", id.pid)));
        }
        tracking.processes.retain(|w| soft_dirty || w.watch.canary().is_none());
        tracking.processes.retain(|w| match job.live().find(|p| ProcessId::of(p) == w.id) {
            Some(p) if w.watch.is_doubtful(p.host) => {
                notes.push(format!(
                    "pid {}: somebody else has cleared its soft-dirty bits; it is saved whole",
                    w.id.pid
                ));
                false
            }
            // It has executed another program.
            Some(p) if w.watch.is_lost(p) => false,
            found => found.is_some(),
        });
        let is_of_use = full_because.is_none() && !tracking.processes.is_empty();
        let parent = tracking.parent.filter(|_| is_of_use);
        let full_because = match (parent, full_because) {
            (None, None) if tracking.parent.is_some() => Some(NONE_WATCHED.to_owned()),
            (None, None) => Some(NOTHING_KNOWN.to_owned()),
            (_, because) => because,
        };
        let mut t = Tracker {
            tracking,
            parent,
            full_because,
            notes,
            by_engine,
            room: held::Room::default(),
            early: None,
            pages: delta::Pages::default(),
            same: Vec::new(),
            flags: Vec::new(),
            second: second::Second::default(),
        };
        if t.parent.is_none() {
            // Unwritten pages are those of the coming checkpoint just as well.
            t.tracking.processes.iter_mut().for_each(|w| w.object = None);
        }
        if by_engine {
            job.info.tracked = Vec::new();
            return Ok(t);
        }
        let missing: Vec<ProcessId> = job.live().map(ProcessId::of).filter(|id| !t.is_watched(*id)).collect();
        if !missing.is_empty() {
            job.info.tracked = t.tracking.watched().collect();
            for (id, attached) in attach::attach(job, &missing, soft_dirty)? {
                match attached {
                    Ok(watch) => t.tracking.processes.push(Watched { id, watch, object: None }),
                    Err(why) => {
                        t.notes.push(format!("pid {}: {why}; its memory is saved whole each time", id.pid))
                    }
                }
            }
            // Protected while the job runs: what is written until it is frozen is written once more to the next checkpoint, not less.
            for w in t.tracking.processes.iter().filter(|w| missing.contains(&w.id)) {
                ckpt_sys::hook::point();
                if let Some(p) = job.live().find(|p| ProcessId::of(p) == w.id) {
                    w.watch.protect(p);
                }
            }
        }
        job.info.tracked = t.tracking.watched().collect();
        if t.parent.is_some() {
            t.second = second::Second::start();
            let watched = job.live().filter(|p| t.is_watched(ProcessId::of(p)));
            // What can't be prepared is read whole.
            let ready = watched.filter_map(|p| Some((ProcessId::of(p), flags::Flags::prepare(p).ok()??)));
            t.flags = ready.collect();
        }
        Ok(t)
    }

    fn is_watched(&self, id: ProcessId) -> bool {
        self.tracking.processes.iter().any(|w| w.id == id)
    }

    /// The checkpoint that the image is to be built on, if any.
    pub fn parent(&self) -> Option<Parent> {
        self.parent
    }

    /// The image has to be a full one after all.
    pub fn no_parent(&mut self, why: String) {
        self.parent = None;
        self.full_because = Some(why);
        self.tracking.processes.iter_mut().for_each(|w| w.object = None);
    }

    /// Copies what has been written while the job runs, as late as possible before the freeze, and once: a second time would not find
    /// what the first has protected.
    ///
    /// # Errors
    /// If it has been interrupted, or a task does not stop; the job runs on.
    pub fn copy_early(&mut self, job: &Job) -> Result<(), DumpError> {
        if !self.by_engine && self.parent.is_some() && self.early.is_none() {
            ckpt_sys::hook::before_copy();
            self.early = Some(early::copy(&self.tracking, job, &mut self.room)?);
        }
        Ok(())
    }

    /// The snapshot is not used, and another one will be taken: what was written before it is not known any more.
    pub fn begin_again(&mut self) {
        self.tracking.processes.iter_mut().for_each(|w| w.object = None);
        self.early = Some(early::Early::default());
    }

    /// Takes the snapshot of the frozen job: by `engine` all that is not known to be unwritten.
    ///
    /// # Errors
    /// Those of the engine, and of scanning.
    pub fn snapshot(
        &mut self,
        engine: Box<dyn Prepared>,
        frozen: &mut FrozenJob,
        collected: &mut Collected,
    ) -> Result<Box<dyn Snapshot>, DumpError> {
        let snapshot = if self.by_engine {
            self.snapshot_by_engine(engine, frozen, collected)?
        } else if self.parent.is_none() {
            engine.snapshot(frozen, collected)?
        } else {
            delta::snapshot(self, engine, frozen, collected)?
        };
        // From here on unwritten pages are those of this checkpoint, of these objects.
        for w in &mut self.tracking.processes {
            w.object = collected.sources.iter().find_map(|s| match &s.from {
                From::Process { pid, .. } if s.kind == Kind::MemoryMap && *pid == w.id.pid => Some(s.object),
                _ => None,
            });
        }
        Ok(snapshot)
    }

    /// The mappings of a process of the frozen job with their flags, after the snapshot, where that takes less time than to read them all.
    pub fn mappings(&mut self, p: &Process) -> Option<Vec<Vma>> {
        let id = ProcessId::of(p);
        let at = self.flags.iter().position(|(of, _)| *of == id)?;
        let watched = self.tracking.processes.iter().find(|w| w.id == id)?;
        self.flags.swap_remove(at).1.read(p, &watched.watch).ok()
    }

    fn snapshot_by_engine(
        &mut self,
        engine: Box<dyn Prepared>,
        frozen: &mut FrozenJob,
        collected: &Collected,
    ) -> Result<Box<dyn Snapshot>, DumpError> {
        let known = self.tracking.processes.drain(..).filter_map(|w| {
            let (session, generation) = w.watch.into_session()?;
            Some(Tracked { id: w.id, session, generation, parent_object: w.object })
        });
        let mut changes = Changes { processes: known.collect(), ..Changes::default() };
        let snapshot = engine.snapshot_changes(frozen, collected, &mut changes)?;
        let Changes { processes, same, dirty_bytes, notes } = changes;
        self.tracking.processes.extend(processes.into_iter().map(|t| Watched {
            id: t.id,
            watch: Watch::by_module(t.session, t.generation),
            object: None,
        }));
        let same_bytes = same.iter().flatten().map(|s| s.bytes).sum();
        self.pages = delta::Pages { dirty_bytes, same_bytes };
        self.same = same;
        self.notes.extend(notes);
        Ok(snapshot)
    }

    /// By source: pages that are those of the parent.
    pub fn same(&self) -> &[Vec<Same>] {
        &self.same
    }

    /// What became of it, once the image has been written.
    pub fn finish(self) -> Outcome {
        let delta::Pages { dirty_bytes, same_bytes } = self.pages;
        Outcome {
            sources: self.tracking.processes.iter().map(|w| w.watch.source()).collect(),
            tracking: Tracking { parent: None, processes: self.tracking.processes },
            parent: self.parent,
            full_because: self.full_because,
            dirty_pages: dirty_bytes / ckpt_sys::memory::PAGE,
            same_pages: same_bytes / ckpt_sys::memory::PAGE,
            notes: self.notes,
        }
    }
}
