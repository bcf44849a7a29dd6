// SPDX-License-Identifier: MIT OR Apache-2.0
//! The seam between the pipeline and the kinds of kernel resource: one kind, one file, one line in [`REGISTRY`].
//!
//! A kind handles its own records at each step of the pipeline: *probe* while the job runs and again when it is frozen,
//! *collect* when it is frozen, *content* after it has been resumed, *describe* for people; *create*, *connect* to
//! other objects, *finish* (positions, locks, protections) and *arm* (timers) when it is restored. No step has a
//! default: a kind that forgets one does not compile.

pub mod aio;
pub mod attribute;
pub mod credential;
pub mod fd;
pub mod fs_context;
pub mod job;
pub mod limit;
pub mod memory_map;
pub mod pending_signal;
pub mod process;
pub mod rseq;
pub mod saved_file;
pub mod scheduler;
pub mod shared_object;
pub mod shm_file;
pub mod signal;
pub mod sysv_semaphore;
pub mod thread;
pub mod timer;

use crate::dump::pace::Pace;
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::model::memory::Vma;
use crate::model::process::{Process, Task};
use crate::restore::build_tree::Build;
use crate::snapshot::precopy::Precopied;
use crate::snapshot::{From, Piece, Snapshot, Source, Unread};
use crate::track::Same;
use ckpt_image::codec::{self, Decode, Encode};
use ckpt_image::{Record, Writer, ZeroPages};
use ckpt_sys::inject::{Live, Query};

/// What a step is about.
#[derive(Debug, Clone, Copy)]
pub enum At<'a> {
    /// The job as a whole.
    Job,
    /// A process; its leader is ready for injected calls.
    Process(&'a Process),
    /// A thread, ready for injected calls.
    Thread(&'a Process, &'a Task),
    /// An open file description of this kind.
    File(&'a OpenFile),
}

/// What *collect* works with.
#[derive(Debug)]
pub struct Collect<'a> {
    /// The frozen job.
    pub job: &'a Job,
    /// Calls in the task at hand; for a process its leader.
    pub live: Option<&'a mut Live>,
    /// What has been collected.
    pub out: &'a mut Collected,
    /// What to tell the person who dumps.
    pub warnings: &'a mut Vec<String>,
}

/// The result of *collect*.
#[derive(Debug, Default)]
pub struct Collected {
    /// Records without page contents.
    pub records: Vec<NewRecord>,
    /// Where page contents come from.
    pub sources: Vec<Source>,
    /// Records to be encoded and written by *content*, when the job runs again.
    pub deferred: Vec<Deferred>,
    /// Mappings by pid, where the flags in the job are assumed: bounds, and whether MADV_WIPEONFORK is.
    pub assumed: std::collections::BTreeMap<i32, Vec<(u64, u64, bool)>>,
    /// Processes whose memory ckpt watches.
    pub tracked: std::collections::BTreeSet<i32>,
    /// Mappings by pid with flags that are not assumed.
    pub mappings: std::collections::BTreeMap<i32, Vec<Vma>>,
    /// Shared objects by device and inode.
    pub objects: std::collections::BTreeMap<(u64, u64), u64>,
    /// Content of files that the job is writing.
    pub kept: Vec<saved_file::Kept>,
    /// Shared memory as it was before the freeze.
    pub precopied: Precopied,
    /// Pids of processes that adopt orphans (PR_SET_CHILD_SUBREAPER).
    pub subreapers: std::collections::BTreeSet<i32>,
    /// The CPUs that the job's init may use, once somebody has asked.
    init_affinity: Vec<u8>,
    next_object: u64,
}

/// The sources of all shared memory of a job, which may be running.
///
/// # Errors
/// If it can't be read.
pub fn shared_memory(job: &Job) -> Result<Collected, DumpError> {
    let (mut out, mut warnings) = (Collected::default(), Vec::new());
    let kinds: [&dyn Resource; 2] = [&shared_object::SharedObjectResource, &shm_file::ShmFileResource];
    for kind in kinds {
        let mut cx = Collect { job, live: None, out: &mut out, warnings: &mut warnings };
        kind.collect(&mut cx, At::Job)?;
    }
    Ok(out)
}

type Encoding = Box<dyn Fn(&Stored) -> Result<Vec<u8>, codec::CodecError>>;

/// A record that is encoded after the job has been resumed.
pub struct Deferred {
    kind: Kind,
    version: u16,
    owner: u64,
    id: u64,
    encode: Encoding,
}

/// What is known only after the job has been resumed: the mappings whose flags were assumed, and where pages were stored,
/// when *content* has written them.
#[derive(Debug, Default)]
pub struct Stored {
    /// By pid.
    pub mappings: std::collections::BTreeMap<i32, Vec<Vma>>,
    ranges: std::collections::BTreeSet<(u64, u64)>,
}

impl Stored {
    /// Whether the image holds a page of this object from the source's range that begins at `offset`.
    pub fn in_range(&self, object: u64, offset: u64) -> bool {
        self.ranges.contains(&(object, offset))
    }

    fn add(&mut self, source: &Source, offset: u64) {
        if let From::Process { ranges, .. } = &source.from {
            let after = ranges.partition_point(|r| r.offset <= offset);
            if let Some(r) = after.checked_sub(1).and_then(|i| ranges.get(i)) {
                self.ranges.insert((source.object, r.offset));
            }
        }
    }
}

impl std::fmt::Debug for Deferred {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "record of {} {}", self.kind.name(), self.owner)
    }
}

/// A record to be written.
#[derive(Debug)]
pub struct NewRecord {
    /// Its kind.
    pub kind: Kind,
    /// Version of its body.
    pub version: u16,
    /// Pid, tid, file id; 0 for the job.
    pub owner: u64,
    /// Distinguishes records of one owner.
    pub id: u64,
    /// Encoded body.
    pub body: Vec<u8>,
}

impl Collected {
    /// A new number for an object with page contents.
    pub fn new_object(&mut self) -> u64 {
        self.next_object += 1;
        self.next_object
    }
}

impl Collect<'_> {
    /// Adds a record.
    ///
    /// # Errors
    /// If the body is larger than a record may be.
    pub fn put<T: Encode>(
        &mut self,
        kind: Kind,
        version: u16,
        owner: u64,
        id: u64,
        body: &T,
    ) -> Result<(), DumpError> {
        let body = codec::encode(body)?;
        self.out.records.push(NewRecord { kind, version, owner, id, body });
        Ok(())
    }

    /// Adds a record whose encoding may take long; [`Content::write_deferred`] writes it.
    pub fn defer<T: Encode + 'static>(&mut self, kind: Kind, version: u16, owner: u64, id: u64, body: T) {
        let encode = Box::new(move |_: &Stored| codec::encode(&body));
        self.out.deferred.push(Deferred { kind, version, owner, id, encode });
    }

    /// As [`Collect::defer`], for a body that tells where pages were stored.
    pub fn defer_with<T: Encode>(
        &mut self,
        kind: Kind,
        version: u16,
        owner: u64,
        id: u64,
        body: impl Fn(&Stored) -> T + 'static,
    ) {
        let encode = Box::new(move |stored: &Stored| codec::encode(&body(stored)));
        self.out.deferred.push(Deferred { kind, version, owner, id, encode });
    }

    /// The injection.
    ///
    /// # Panics
    /// If the step is not about a process or thread.
    pub fn live(&mut self) -> &mut Live {
        self.live.as_mut().expect("collect of a process or thread has a task to inject into")
    }
}

/// What *content* works with.
pub struct Content<'a> {
    /// The frozen copy.
    pub snapshot: &'a mut dyn Snapshot,
    /// All sources that were snapshotted.
    pub sources: &'a [Source],
    /// By source: pages that are those of the parent.
    pub same: &'a [Vec<Same>],
    /// Records that were left for now.
    pub deferred: &'a [Deferred],
    /// Content of files that the job is writing.
    pub kept: &'a [saved_file::Kept],
    /// Where pages have been stored so far.
    pub stored: &'a mut Stored,
    /// The image.
    pub writer: &'a mut Writer,
    /// How fast it may grow.
    pub pace: &'a Pace,
    /// Bytes done so far, and what to do when they grow.
    pub progress: &'a mut dyn FnMut(u64),
}

impl Content<'_> {
    /// Encodes and writes the records of one kind that *collect* left for now.
    ///
    /// # Errors
    /// If a body is larger than a record may be, or from the writer.
    pub fn write_deferred(&mut self, kind: Kind) -> Result<(), DumpError> {
        for d in self.deferred.iter().filter(|d| d.kind == kind) {
            self.writer.record(kind as u16, d.version, d.owner, d.id, &(d.encode)(self.stored)?)?;
        }
        Ok(())
    }

    /// Writes the pages of all sources of one kind.
    ///
    /// # Errors
    /// From the snapshot or the writer.
    pub fn write_pages(&mut self, kind: Kind) -> Result<(), DumpError> {
        for (index, source) in self.sources.iter().enumerate().filter(|(_, s)| s.kind == kind) {
            let (object, zeros) = (source.object, source.zeros);
            let (writer, stored, progress) = (&mut *self.writer, &mut *self.stored, &mut *self.progress);
            let pace = self.pace;
            self.snapshot.stream(index, source, &mut |piece| {
                ckpt_sys::hook::point();
                let (offset, bytes) = put(writer, object, zeros, piece)?;
                stored.add(source, offset);
                progress(bytes);
                pace.wait(writer.bytes_written());
                DumpError::if_interrupted()
            })?;
            for s in self.same.get(index).into_iter().flatten() {
                self.writer.same(object, s.offset, s.bytes, s.parent_object)?;
                self.stored.add(source, s.offset);
                (self.progress)(s.bytes);
            }
        }
        Ok(())
    }
}

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Writes a piece of an object; returns its offset and length in bytes.
fn put(
    writer: &mut Writer,
    object: u64,
    zeros: ZeroPages,
    piece: Piece<'_>,
) -> Result<(u64, u64), DumpError> {
    Ok(match piece {
        Piece::Data(offset, data) => {
            writer.pages(object, offset, data, zeros)?;
            (offset, data.len() as u64)
        }
        Piece::Unread(Unread { offset, bytes, origin, at }) => {
            writer.pages_from(object, offset, bytes, zeros, origin, at)?;
            (offset, bytes as u64)
        }
        Piece::Zero(offset, bytes) => {
            let mut at = 0;
            while zeros == ZeroPages::Record && at < bytes {
                let n = (bytes - at).min(ZEROS.len() as u64);
                writer.pages(object, offset + at, &ZEROS[..n as usize], zeros)?;
                at += n;
            }
            (offset, bytes)
        }
    })
}

/// One kind of kernel resource.
pub trait Resource: Sync {
    /// Which one.
    fn kind(&self) -> Kind;
    /// Kinds whose records must be created before.
    fn after(&self) -> &'static [Kind];
    /// Whether an open file description is of this kind; the first kind in the registry that says so owns it.
    fn claims(&self, job: &Job, file: &OpenFile) -> bool;
    /// Finds what can't be saved.
    fn probe(&self, job: &Job, refusals: &mut Refusals);
    /// The calls that [`Resource::collect`] will ask a process or thread for. They are made all at once; what is
    /// left out here is asked when it is needed, which costs the job time.
    fn asks(&self, job: &Job, at: At<'_>) -> Vec<Query>;
    /// Saves state of the frozen job.
    ///
    /// # Errors
    /// Any error ends the dump; the job runs on.
    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError>;
    /// Writes what is large, after the job has been resumed.
    ///
    /// # Errors
    /// Any error ends the dump.
    fn content(&self, cx: &mut Content<'_>) -> Result<(), DumpError>;
    /// A record in words, for `ckpt inspect`.
    ///
    /// # Errors
    /// If the record does not decode.
    fn describe(&self, record: &Record) -> Result<String, RestoreError>;
    /// Makes the object.
    ///
    /// # Errors
    /// Any error ends the restore, and nothing is left of it.
    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError>;
    /// Connects it to others.
    ///
    /// # Errors
    /// As [`Resource::create`].
    fn connect(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError>;
    /// Sets what must come after all connections.
    ///
    /// # Errors
    /// As [`Resource::create`].
    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError>;
    /// Starts what runs by itself.
    ///
    /// # Errors
    /// As [`Resource::create`].
    fn arm(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError>;
}

/// Steps in which a kind has nothing to do, spelled out.
macro_rules! nothing_to_do {
    ($($step:ident),* $(,)?) => { $(nothing_to_do!(@ $step);)* };
    (@ after) => { fn after(&self) -> &'static [$crate::kind::Kind] { &[] } };
    (@ claims) => {
        fn claims(&self, _: &$crate::model::Job, _: &$crate::model::file::OpenFile) -> bool { false }
    };
    (@ asks) => {
        fn asks(&self, _: &$crate::model::Job, _: $crate::resource::At<'_>) -> Vec<ckpt_sys::inject::Query> {
            Vec::new()
        }
    };
    (@ probe) => { fn probe(&self, _: &$crate::model::Job, _: &mut $crate::error::Refusals) {} };
    (@ content) => {
        fn content(&self, _: &mut $crate::resource::Content<'_>) -> Result<(), $crate::error::DumpError> { Ok(()) }
    };
    (@ $step:ident) => {
        fn $step(
            &self,
            _: &mut $crate::restore::build_tree::Build<'_>,
            _: &ckpt_image::Record,
        ) -> Result<(), $crate::error::RestoreError> {
            Ok(())
        }
    };
}
pub(crate) use nothing_to_do;

/// All kinds. Of those that claim descriptors, the first that claims one owns it.
pub static REGISTRY: &[&dyn Resource] = &[
    &job::JobResource,
    &process::ProcessResource,
    &shm_file::ShmFileResource,
    &sysv_semaphore::SysvSemaphoreResource,
    &shared_object::SharedObjectResource,
    &memory_map::MemoryMapResource,
    &aio::AioResource,
    &thread::ThreadResource,
    &signal::SignalResource,
    &pending_signal::PendingSignalResource,
    &timer::TimerResource,
    &credential::CredentialResource,
    &limit::LimitResource,
    &fs_context::FsContextResource,
    &scheduler::SchedulerResource,
    &attribute::AttributeResource,
    &rseq::RseqResource,
    &saved_file::SavedFileResource,
    &fd::external::ExternalResource,
    &fd::tty::TtyResource,
    &fd::regular_file::RegularFileResource,
    &fd::directory::DirectoryResource,
    &fd::char_device::CharDeviceResource,
    &fd::pipe::PipeResource,
    &fd::fifo::FifoResource,
    &fd::eventfd::EventfdResource,
    &fd::epoll::EpollResource,
    &fd::signalfd::SignalfdResource,
    &fd::timerfd::TimerfdResource,
    &fd::inotify::InotifyResource,
    &fd::unix_socket::UnixSocketResource,
    &fd::tcp_socket::TcpSocketResource,
    &fd::table::FdTableResource,
    &fd::file_lock::FileLockResource,
];

/// The resource that handles a kind.
pub fn of(kind: Kind) -> &'static dyn Resource {
    *REGISTRY.iter().find(|r| r.kind() == kind).expect("every kind has a line in the registry")
}

/// The registry in the order in which records are created.
pub fn in_order() -> Vec<&'static dyn Resource> {
    let mut out: Vec<&'static dyn Resource> = Vec::new();
    while out.len() < REGISTRY.len() {
        let before = out.len();
        for r in REGISTRY {
            let placed = |k: &Kind| out.iter().any(|o| o.kind() == *k);
            if !placed(&r.kind()) && r.after().iter().all(placed) {
                out.push(*r);
            }
        }
        assert!(out.len() > before, "kinds depend on each other in a circle");
    }
    out
}

/// Decodes the body of a record whose version this build knows.
///
/// # Errors
/// [`RestoreError::Record`] names the kind and version.
pub fn decode<T: Decode<()>>(record: &Record, version: u16) -> Result<T, RestoreError> {
    let kind = Kind::from_number(record.kind).map_or("unknown", Kind::name);
    if record.version != version {
        let text = format!("{kind} record version {} (this ckpt knows {version})", record.version);
        return Err(RestoreError::Record(text));
    }
    codec::decode(&record.body)
        .map_err(|e| RestoreError::Record(format!("{kind} record of {}: {e}", record.owner)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_registered_once_and_can_be_ordered() {
        for k in Kind::ALL {
            assert_eq!(REGISTRY.iter().filter(|r| r.kind() == *k).count(), 1, "{}", k.name());
        }
        assert_eq!(in_order().len(), Kind::ALL.len());
    }
}
