// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restore: read → plan → build_tree → fill_memory → resume.
//!
//! Runs inside the job's new init, which is the tracer of everything that is rebuilt: if it dies, all of it dies with
//! its pid namespace. Nothing runs until all is rebuilt.

pub mod build_tree;
pub mod fill_memory;
pub mod plan;
pub mod read;
pub mod resume;
pub mod rollback;

use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::in_order;
use build_tree::Build;
use ckpt_image::Record;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

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
    /// Put files back whose content is in the image.
    #[serde(default)]
    pub rollback_files: bool,
}

/// What init provides.
#[derive(Debug)]
pub struct RestoreRequest {
    /// The image's directory.
    pub dir: OwnedFd,
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

/// A rebuilt job, still standing.
#[derive(Debug)]
pub struct Rebuilt {
    /// The main process, 0 if it had ended before the dump.
    pub main_pid: i32,
    /// Its wait status in that case.
    pub main_status: Option<i32>,
    /// What the person who restores should know.
    pub warnings: Vec<String>,
    ready: resume::Ready,
}

impl Rebuilt {
    /// Puts files back that the job was writing, and lets it go. Says what it did to the files.
    ///
    /// # Errors
    /// If a file can't be put back, or a task vanished.
    pub fn resume(self) -> Result<Vec<String>, RestoreError> {
        self.ready.resume()
    }
}

/// Rebuilds the job as children of the calling process, which must be pid 1 of a fresh pid namespace.
///
/// # Errors
/// The caller exits after an error: that removes what was built.
pub fn rebuild(request: &RestoreRequest) -> Result<Rebuilt, RestoreError> {
    let image = read::read(request)?;
    let plan = plan::plan(&image, request)?;
    let mut build = Build::new(request, &image, plan)?;
    if !ckpt_sys::hook::skipped(Kind::Process.name()) {
        build.build_tree()?;
    }
    if request.options.rollback_files && image.of_kind(Kind::SavedFile).next().is_none() {
        build.warnings.push("the checkpoint was made without --with-files: no file is rolled back".into());
    }
    build.rollbacks = rollback::Rollbacks::prepare(&image, std::mem::take(&mut build.plan.rollbacks))?;
    let order = in_order();
    let steps: [Step; 4] = [
        |r, b, rec| r.create(b, rec),
        |r, b, rec| r.connect(b, rec),
        |r, b, rec| r.finish(b, rec),
        |r, b, rec| r.arm(b, rec),
    ];
    for (i, step) in steps.into_iter().enumerate() {
        for r in &order {
            if ckpt_sys::hook::skipped(r.kind().name()) {
                continue;
            }
            for record in image.of_kind(r.kind()) {
                ckpt_sys::hook::point();
                step(*r, &mut build, record)?;
            }
        }
        if i == 0 {
            fill_memory::fill(&mut build)?;
        }
    }
    resume::prepare(build)
}

type Step = fn(&dyn crate::resource::Resource, &mut Build<'_>, &Record) -> Result<(), RestoreError>;
