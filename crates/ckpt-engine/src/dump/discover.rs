// SPDX-License-Identifier: MIT OR Apache-2.0
//! Discover: the whole job, and everything in it that can't be saved, before anything is stopped.

use crate::error::{DumpError, Refusals};
use crate::model::build_id::BuildIds;
use crate::model::{Job, JobInfo};
use crate::resource::fd::{io_uring, unsupported};
use crate::resource::{REGISTRY, in_order};
use crate::snapshot::{Prepared, private_bytes};
use ckpt_image::Compression;
use std::path::Path;

/// A job that can be dumped.
#[derive(Debug)]
pub struct Discovered {
    /// The job.
    pub job: Job,
    /// Bytes of private memory in use.
    pub memory_bytes: u64,
}

/// Observes the job and asks every kind. What will soon be over does not count: a barrier waits for it.
///
/// # Errors
/// [`DumpError::Refused`] with everything that stands in the way.
pub fn discover(info: &JobInfo) -> Result<Discovered, DumpError> {
    // Processes come and go while they are looked at: only what is refused, or fails, twice in a row counts.
    let mut before = None;
    let mut job = loop {
        let mut refusals = Refusals::default();
        let found = Job::observe(info, None, false, &mut refusals).and_then(|mut job| {
            match examine(&mut job, refusals) {
                Err(DumpError::Refused(r)) => r.lasting().check().map(|()| job),
                examined => examined.map(|()| job),
            }
        });
        match found {
            Ok(job) => break job,
            Err(DumpError::JobEnded) => return Err(DumpError::JobEnded),
            Err(error) => {
                let text = error.to_string();
                if before.as_ref() == Some(&text) {
                    return Err(error);
                }
                before = Some(text);
            }
        }
    };
    job.build_ids = BuildIds::of_job(&job);
    job.calls.look(&job);
    let memory_bytes = private_bytes(&job);
    Ok(Discovered { job, memory_bytes })
}

/// Gives each open file description to its kind and collects all refusals.
///
/// # Errors
/// [`DumpError::Refused`].
pub fn examine(job: &mut Job, mut refusals: Refusals) -> Result<(), DumpError> {
    let kinds: Vec<(u64, Option<crate::kind::Kind>)> = job
        .files
        .values()
        .map(|f| (f.id, REGISTRY.iter().find(|r| r.claims(job, f)).map(|r| r.kind())))
        .collect();
    for (id, kind) in kinds {
        let Some(f) = job.files.get_mut(&id) else { continue };
        f.kind = kind;
        if kind.is_none() {
            let (what, advice) = unsupported(f);
            let is_passing = f.seen.target == io_uring::TARGET && io_uring::is_busy(&f.seen.info);
            for (pid, fd) in &f.holders {
                match is_passing {
                    true => refusals.passing(*pid, Some(*fd), what.clone(), advice),
                    false => refusals.fd(*pid, *fd, what.clone(), advice),
                }
            }
        }
    }
    for r in in_order() {
        r.probe(job, &mut refusals);
    }
    refusals.check()
}

impl Discovered {
    /// Checks that memory and disk are enough.
    ///
    /// # Errors
    /// [`DumpError::Memory`], [`DumpError::Space`].
    pub fn check_room(
        &self,
        engine: &dyn Prepared,
        compression: Compression,
        free_bytes: u64,
        dir: &Path,
    ) -> Result<(), DumpError> {
        const RECORDS_BYTES: u64 = 1 << 20;
        // What compression will save is not known before; memory that compresses to less than a quarter is rare.
        let likely = if compression == Compression::None { self.memory_bytes } else { self.memory_bytes / 4 };
        if free_bytes < likely + RECORDS_BYTES {
            return Err(DumpError::Space {
                needed_bytes: likely + RECORDS_BYTES,
                available_bytes: free_bytes,
                path: dir.to_owned(),
            });
        }
        let needed_bytes = engine.needs_bytes();
        if needed_bytes > 0 {
            let available_bytes = ckpt_sys::memory::available_bytes();
            if needed_bytes > available_bytes {
                return Err(DumpError::Memory { needed_bytes, available_bytes });
            }
        }
        Ok(())
    }
}
