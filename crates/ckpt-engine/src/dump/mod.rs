// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dump: discover → barrier → freeze → collect → snapshot → resume → write.

pub mod barrier;
pub mod collect;
pub mod control_word;
pub mod discover;
pub mod dumpable;
pub mod flush;
pub mod freeze;
pub mod hooks;
pub mod pace;
pub mod phases;
pub mod short_write;
pub mod snapshot;
pub mod write;

use crate::error::DumpError;
use crate::model::{Job, JobInfo};
use crate::resource::Collected;
use crate::snapshot::precopy::{Precopied, precopy};
use crate::snapshot::{Account, Engine, Prepared, Snapshot, Source};
use crate::track::{self, Incremental, Tracker};
use barrier::{Barrier, BarrierPolicy, BarrierReport};
use ckpt_image::{Compression, Summary};
use pace::Pace;
use phases::Phases;
use std::num::NonZeroU64;
use std::path::Path;
use std::time::{Duration, Instant};

/// What to do.
pub struct DumpRequest<'a> {
    /// The job.
    pub info: JobInfo,
    /// An empty directory that has been claimed for the image.
    pub dir: &'a Path,
    /// Compression of page runs.
    pub compression: Compression,
    /// The snapshot engine.
    pub engine: &'a dyn Engine,
    /// Kill the job when the image is complete, while it is still frozen.
    pub stop: bool,
    /// For an incremental dump: what is known so far. Without it nothing is tracked.
    pub incremental: Option<Incremental>,
    /// Save the content of files that the job is writing, too.
    pub with_files: bool,
    /// Bring what the job has written to files to the disk, too.
    pub flush: bool,
    /// How processes are brought to a safe point.
    pub barrier: BarrierPolicy,
    /// Bytes a second that are written at most.
    pub io_limit: Option<NonZeroU64>,
    /// Free bytes of the store; asked before anything is stopped.
    pub free_bytes: u64,
    /// Told of the progress: bytes done, bytes in all.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// What was done.
#[derive(Debug)]
pub struct DumpReport {
    /// Sizes of the image.
    pub summary: Summary,
    /// How long the job was stopped, as seen from outside.
    pub pause: Duration,
    /// Number of processes.
    pub processes: usize,
    /// Number of threads.
    pub threads: usize,
    /// About how many bytes of memory the job used.
    pub memory_bytes: u64,
    /// How the job came to a safe point.
    pub barrier: BarrierReport,
    /// How long each phase took.
    pub phases: Phases,
    /// What the snapshot took.
    pub account: Account,
    /// What became of an incremental dump.
    pub incremental: Option<track::Outcome>,
    /// How many files and directories were flushed; none were asked for without [`DumpRequest::flush`].
    pub flushed_files: Option<usize>,
    /// What the person who dumps should know.
    pub warnings: Vec<String>,
    /// Keeps a job frozen that is to be stopped, until the checkpoint is published.
    frozen: Option<freeze::FrozenJob>,
    /// After `frozen`: callbacks are told to go on when they can.
    cooperation: hooks::Cooperation,
}

impl DumpReport {
    /// Tells processes that have asked for the dump that it is there. `number` is that of the checkpoint, if it has one.
    pub fn published(&mut self, number: Option<u64>) {
        self.cooperation.published(number.unwrap_or(0));
    }

    /// Kills a job that was kept frozen for [`DumpRequest::stop`]; call it when the checkpoint has been published.
    pub fn stop_job(&mut self) {
        if let Some(f) = self.frozen.take() {
            f.kill();
        }
    }
}

/// Checks whether the job could be dumped, without stopping it, now or when a barrier has waited for what will soon be over
/// ([`barrier::under_way`]).
///
/// # Errors
/// [`DumpError::Refused`] with all that stands in the way.
pub fn check(info: &JobInfo) -> Result<discover::Discovered, DumpError> {
    discover::discover(info)
}

/// Dumps the job into `request.dir`. The caller publishes the directory, or removes it after an error.
///
/// # Errors
/// In each case the job runs on as before.
pub fn dump(request: DumpRequest<'_>) -> Result<DumpReport, DumpError> {
    let DumpRequest {
        mut info,
        dir,
        compression,
        engine,
        stop,
        incremental,
        with_files,
        flush,
        barrier,
        io_limit,
        free_bytes,
        progress,
    } = request;
    info.tracked.extend(incremental.iter().flat_map(|i| i.tracking.watched()));
    let mut phases = Phases::default();
    let mut cooperation = hooks::Cooperation::begin(info.init, barrier)?;
    phases.end("hooks");
    let mut found = discover::discover(&info)?;
    let prepared = engine.prepare(&found.job, stop)?;
    found.check_room(prepared.as_ref(), compression, free_bytes, dir)?;
    // The image's directory must be writable before anything is disturbed.
    let mut tracker = match incremental {
        Some(start) => Some(Tracker::begin(&mut found.job, start, prepared.tracks_writes())?),
        None => None,
    };
    let writer = write::start(dir, compression, tracker.as_mut())?;
    phases.end("discover");
    if flush {
        // While it runs, so that little is left to be flushed at the end.
        flush::Flush::of(&found.job).sync()?;
        phases.end("flush");
    }
    // As late as possible, so that little is different in the freeze; but no gate is closed yet. Nobody waits for a job that will be ended.
    let precopied = if stop { Precopied::default() } else { precopy(&found.job) };
    phases.end("precopy");
    let mut barrier = Barrier::new(&found.job, barrier);
    let how = How { stop, files: with_files.then_some(dir), flush, precopied: &precopied };
    let mut engine_now = Some(prepared);
    // Nobody waits for a job that will be ended.
    let mut assume = !stop;
    let taken = loop {
        barrier.wait()?;
        phases.end("barrier");
        // The last thing before the freeze, which finds in it what was written since, and after the barrier, as it stops the job, too.
        if let Some(tracker) = tracker.as_mut().filter(|_| assume) {
            tracker.copy_early(&found.job)?;
            phases.end("precopy");
        }
        let prepared = match engine_now.take() {
            Some(prepared) => prepared,
            None => engine.prepare(&found.job, stop)?,
        };
        let helpers = (&mut barrier, &mut cooperation);
        match still(&found.job, prepared, tracker.as_mut(), helpers, how, assume, &mut phases) {
            Ok(Some(taken)) => break taken,
            // It changed how its memory behaves just before it was frozen: rare, and now everything is read while it is.
            Ok(None) if assume => {
                assume = false;
                if let Some(tracker) = &mut tracker {
                    tracker.begin_again();
                }
                cooperation.again()?;
            }
            Ok(None) => return Err(DumpError::JobEnded),
            // It had passed the gate just before that was closed.
            Err(DumpError::Refused(refusals)) if refusals.all_passing() && barrier.may_wait() => {}
            Err(error) => return Err(error),
        }
    };
    let mut barrier = barrier.report();
    barrier.late.0.splice(0..0, cooperation.late());
    let Taken { collected, mut snapshot, pause, processes, threads, mut warnings, frozen, flush } = taken;
    warnings
        .extend(barrier.late.0.iter().map(|late| format!("not at a safe point when it was frozen: {late}")));
    let flushed_files = match flush {
        Some(flush) => {
            let n = flush.sync()?;
            warnings.extend(flush.missed);
            phases.end("flush");
            Some(n)
        }
        None => None,
    };
    let shared_bytes: u64 = collected.sources.iter().filter(|s| s.is_file()).map(Source::bytes).sum();
    let memory_bytes = found.memory_bytes + shared_bytes;
    let mut advance = |n| progress(n, memory_bytes);
    let (same, pace) = (tracker.as_ref().map_or(&[][..], Tracker::same), Pace::new(io_limit));
    let written = write::write(writer, collected, snapshot.as_mut(), same, &pace, &mut advance);
    let (summary, account) = written.map_err(|error| match error {
        // The frozen copies are in its pid namespace, and end with it.
        DumpError::CopyLost { .. } if !is_alive(found.job.info.init) => DumpError::JobEnded,
        error => error,
    })?;
    phases.end("write");
    let incremental = tracker.map(Tracker::finish);
    Ok(DumpReport {
        summary,
        pause,
        processes,
        threads,
        memory_bytes,
        barrier,
        account,
        incremental,
        flushed_files,
        phases,
        warnings,
        frozen,
        cooperation,
    })
}

fn is_alive(host: i32) -> bool {
    let stat = procfs::process::Process::new(host).and_then(|p| p.stat());
    stat.is_ok_and(|s| !matches!(s.state, 'Z' | 'X'))
}

/// What remains of the time in which the job stood still.
struct Taken {
    collected: Collected,
    snapshot: Box<dyn Snapshot>,
    pause: Duration,
    processes: usize,
    threads: usize,
    warnings: Vec<String>,
    frozen: Option<freeze::FrozenJob>,
    /// What it had written to when it was frozen.
    flush: Option<flush::Flush>,
}

/// What is done while the job stands still.
#[derive(Debug, Clone, Copy)]
struct How<'a> {
    /// It stays frozen.
    stop: bool,
    /// Where the content of files that it is writing is kept, if it is.
    files: Option<&'a Path>,
    /// Files that it has written to are opened, to be flushed.
    flush: bool,
    /// Its shared memory as it was.
    precopied: &'a Precopied,
}

/// Freezes the job, which looked like `before`, and resumes it. None if what was to be assumed was not so.
fn still(
    before: &Job,
    engine: Box<dyn Prepared>,
    tracker: Option<&mut Tracker>,
    (barrier, cooperation): (&mut Barrier, &mut hooks::Cooperation),
    how: How<'_>,
    assume: bool,
    phases: &mut Phases,
) -> Result<Option<Taken>, DumpError> {
    ckpt_sys::hook::before_freeze();
    let started = Instant::now();
    let mut frozen = freeze::freeze(before, assume, phases)?;
    barrier.refuse_sections(&frozen.job)?;
    cooperation.still_holds()?;
    barrier.open(&frozen.job);
    let mut warnings = Vec::new();
    let mut collected = collect::collect(&mut frozen, before, &mut warnings)?;
    collected.precopied = how.precopied.clone();
    phases.end("collect");
    if let Some(dir) = how.files {
        crate::resource::saved_file::keep(&frozen.job, dir, &mut collected)?;
        phases.end("files");
    }
    let mut snapshot = snapshot::take(engine, tracker, &mut frozen, &mut collected)?;
    phases.end("snapshot");
    cooperation.note_asking();
    if !how.stop {
        cooperation.end_while_frozen();
    }
    // All that was written until now has to be on the disk when the checkpoint is complete.
    let flush = how.flush.then(|| flush::Flush::of(&frozen.job));
    let (processes, threads) = (frozen.job.live().count(), frozen.job.live().map(|p| p.threads.len()).sum());
    let frozen = if how.stop { Some(frozen) } else { frozen.resume().map(|()| None)? };
    let pause = started.elapsed();
    phases.end("resume");
    if frozen.is_none() {
        // What comes now keeps a processor busy.
        ckpt_sys::task::make_way();
    }
    let sound = crate::resource::memory_map::confirm(&mut collected, snapshot.as_mut())?;
    Ok(sound.then_some(Taken { collected, snapshot, pause, processes, threads, warnings, frozen, flush }))
}
