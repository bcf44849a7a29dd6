// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restore: read → plan → build_tree → fill_memory → resume.
//!
//! Runs inside the job's new init, which is the tracer of everything that is rebuilt: if it dies, all of it dies with
//! its pid namespace. Nothing runs until all is rebuilt.

pub mod build_tree;
pub mod fill_memory;
pub mod page_keeper;
pub mod page_server;
pub mod plan;
pub mod ports;
pub mod read;
pub mod resume;
pub mod rollback;
pub mod told;
pub mod working_set;

use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::in_order;
use build_tree::Build;
use ckpt_image::Record;
use page_server::PageServer;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// What to do with files that changed since the dump.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FilePolicy {
    /// A file that only grew and that the job was writing at its end is cut back; every other change is refused.
    #[default]
    Auto,
    /// Changed files are used as they are now.
    Keep,
    /// Files that only grew are cut back, wherever the job was writing; every other change is refused.
    Rollback,
    /// Every change is refused.
    Refuse,
}

/// What the person who restores decided.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct RestoreOptions {
    /// Policy for changed files.
    pub files: FilePolicy,
    /// Paths whose change is accepted.
    pub allow_changed: BTreeSet<String>,
    /// Memory is made mergeable (MADV_MERGEABLE), so that the kernel shares pages that several copies of the job have.
    pub mergeable: bool,
    /// Put files back whose content is in the image.
    #[serde(default)]
    pub rollback_files: bool,
    /// What the restored processes are told of themselves.
    #[serde(default)]
    pub told: told::Told,
}

/// What init provides.
#[derive(Debug)]
pub struct RestoreRequest {
    /// The image's directory.
    pub dir: OwnedFd,
    /// What makes the restore lazy, where that can be: the socket of a [`page_keeper`].
    pub keeper: Option<OwnedFd>,
    /// Its name in messages.
    pub label: String,
    /// The decisions.
    pub options: RestoreOptions,
    /// Descriptors to bind external ones to: (number in the job, descriptor here).
    pub external: Vec<(i32, i32)>,
    /// What output goes to that nobody reads.
    pub log: Option<i32>,
    /// The new terminal: descriptor of its master, path of its slave.
    pub terminal: Option<(i32, String)>,
}

/// How long each phase of a restore took: its name and nanoseconds, in order.
pub type Phases = Vec<(&'static str, u64)>;

/// A rebuilt job, still standing.
#[derive(Debug)]
pub struct Rebuilt {
    /// The main process, 0 if it had ended before the dump.
    pub main_pid: i32,
    /// Its wait status in that case.
    pub main_status: Option<i32>,
    /// What the person who restores should know.
    pub warnings: Vec<String>,
    /// How long each phase took, in nanoseconds.
    pub phases_ns: Phases,
    /// Who fetches the memory that is still in the image.
    pub page_server: Option<PageServer>,
    /// Why there is none although the restore was to be lazy.
    pub eager_because: Option<String>,
    ready: resume::Ready,
}

impl Rebuilt {
    /// Puts files back that the job was writing, and lets it go. Says what it did to the files.
    ///
    /// # Errors
    /// If a file can't be put back, or a task vanished.
    pub fn resume(self) -> Result<Vec<String>, RestoreError> {
        let said = self.ready.resume()?;
        if let Some(server) = &self.page_server {
            server.resumed();
        }
        Ok(said)
    }
}

/// Rebuilds the job as children of the calling process, which must be pid 1 of a fresh pid namespace.
///
/// # Errors
/// The caller exits after an error: that removes what was built.
pub fn rebuild(request: &RestoreRequest) -> Result<Rebuilt, RestoreError> {
    let mut server = None;
    rebuild_with(request, &mut server).map_err(|e| match server.and_then(|s: PageServer| s.outcome()) {
        // What the page server found is the cause: it has ended the blanks then.
        Some(Err(why)) => RestoreError::Record(why),
        _ => e,
    })
}

fn rebuild_with(request: &RestoreRequest, server: &mut Option<PageServer>) -> Result<Rebuilt, RestoreError> {
    let mut phases = Phases::new();
    let mut since = Instant::now();
    let mut done = |phase| {
        let now = Instant::now();
        phases.push((phase, u64::try_from((now - since).as_nanos()).unwrap_or(u64::MAX)));
        since = now;
    };
    let image = Arc::new(read::read(request)?);
    done("read");
    let plan = plan::plan(&image, request)?;
    build_tree::make_room_for_descriptors(&image, &plan)?;
    let mut build = Build::new(request, &image, plan)?;
    done("plan");
    if !ckpt_sys::hook::skipped(Kind::Process.name()) {
        build.build_tree()?;
    }
    if request.options.rollback_files && image.of_kind(Kind::SavedFile).next().is_none() {
        build.warnings.push("the checkpoint was made without --with-files: no file is rolled back".into());
    }
    build.rollbacks = rollback::Rollbacks::prepare(&image, std::mem::take(&mut build.plan.rollbacks))?;
    done("build_tree");
    let order = in_order();
    let steps: [(&str, Step); 4] = [
        ("create", |r, b, rec| r.create(b, rec)),
        ("connect", |r, b, rec| r.connect(b, rec)),
        ("finish", |r, b, rec| r.finish(b, rec)),
        ("arm", |r, b, rec| r.arm(b, rec)),
    ];
    for (name, step) in steps {
        for r in &order {
            if ckpt_sys::hook::skipped(r.kind().name()) {
                continue;
            }
            for record in image.of_kind(r.kind()) {
                ckpt_sys::hook::point();
                step(*r, &mut build, record)?;
            }
        }
        done(name);
        if name == "create" {
            fill_memory::fill(&mut build)?;
            *server = build.page_server.clone();
            done("fill_memory");
        }
    }
    let mut rebuilt = resume::prepare(build)?;
    done("prepare");
    rebuilt.phases_ns = phases;
    Ok(rebuilt)
}

type Step = fn(&dyn crate::resource::Resource, &mut Build<'_>, &Record) -> Result<(), RestoreError>;
