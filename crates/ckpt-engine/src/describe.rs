// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image in words.

use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::fd::table::FdTableRecord;
use crate::resource::memory_map::MemoryMapRecord;
use crate::resource::process::ProcessRecord;
use crate::resource::{decode, of};
use crate::restore::read::Image;
use ckpt_image::RunKind;
use std::collections::BTreeMap;

/// What is in an image.
#[derive(Debug, serde::Serialize)]
pub struct Description {
    /// The job.
    pub job: String,
    /// The images that it consists of: this one, and, if it is incremental, those that it is built on, nearest first.
    pub images: Vec<ImageDescription>,
    /// Its processes.
    pub processes: Vec<ProcessDescription>,
    /// Shared memory, memfds, deleted files, files in /dev/shm.
    pub objects: Vec<String>,
    /// Every record: kind, owner, words.
    pub records: Vec<RecordDescription>,
}

/// An image of a chain.
#[derive(Debug, serde::Serialize)]
pub struct ImageDescription {
    /// Its directory.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Number of the checkpoint that it is built on.
    pub parent: Option<u64>,
    /// Bytes of memory that are taken from it.
    pub memory_bytes: u64,
}

/// A process.
#[derive(Debug, serde::Serialize)]
pub struct ProcessDescription {
    /// Its pid.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// Name, group, session, threads.
    pub what: String,
    /// Executable and mappings.
    pub memory: String,
    /// Bytes of private memory in the image.
    pub stored_bytes: u64,
    /// Its descriptors.
    pub descriptors: Vec<DescriptorDescription>,
}

/// A descriptor.
#[derive(Debug, serde::Serialize)]
pub struct DescriptorDescription {
    /// Its number.
    pub number: i32,
    /// Kind of what it refers to.
    pub kind: &'static str,
    /// In words.
    pub what: String,
}

/// A record.
#[derive(Debug, serde::Serialize)]
pub struct RecordDescription {
    /// Its kind.
    pub kind: &'static str,
    /// Pid, tid, or file id.
    pub owner: u64,
    /// In words.
    pub what: String,
}

/// Describes every record of an image.
///
/// # Errors
/// If a record does not decode.
pub fn describe(image: &Image) -> Result<Description, RestoreError> {
    let mut files: BTreeMap<u64, (&'static str, String)> = BTreeMap::new();
    let (mut records, mut objects, mut job) = (Vec::new(), Vec::new(), String::new());
    for r in image.reader.records() {
        let Some(kind) = Kind::from_number(r.kind) else { continue };
        let what = of(kind).describe(r)?;
        match kind {
            Kind::Job => job = what.clone(),
            Kind::SharedObject | Kind::ShmFile | Kind::SysvSemaphore | Kind::SavedFile => {
                objects.push(what.clone())
            }
            Kind::FdTable | Kind::FileLock => {}
            k if k as u16 > Kind::FdTable as u16 => {
                files.insert(r.owner, (kind.name(), what.clone()));
            }
            _ => {}
        }
        records.push(RecordDescription { kind: kind.name(), owner: r.owner, what });
    }
    let mut processes = Vec::new();
    for r in image.of_kind(Kind::Process) {
        let p: ProcessRecord = decode(r, crate::resource::process::VERSION)?;
        let (mut memory, mut stored_bytes) = (String::new(), 0);
        if let Some(r) = image.of_kind(Kind::MemoryMap).find(|m| m.owner == r.owner) {
            let m: MemoryMapRecord = decode(r, crate::resource::memory_map::VERSION)?;
            memory = of(Kind::MemoryMap).describe(r)?;
            let data = image.reader.runs(m.object).iter().filter(|r| r.kind == RunKind::Data);
            stored_bytes = data.map(|r| r.bytes).sum();
        }
        let mut descriptors = Vec::new();
        if let Some(r) = image.of_kind(Kind::FdTable).find(|t| t.owner == r.owner) {
            let t: FdTableRecord = decode(r, crate::resource::fd::table::VERSION)?;
            for e in t.entries {
                let (kind, what) = files.get(&e.file).cloned().unwrap_or(("unknown", String::new()));
                descriptors.push(DescriptorDescription { number: e.number, kind, what });
            }
        }
        let what = of(Kind::Process).describe(r)?;
        processes.push(ProcessDescription {
            pid: p.pid,
            parent: p.ppid,
            what,
            memory,
            stored_bytes,
            descriptors,
        });
    }
    Ok(Description { job, images: images(image), processes, objects, records })
}

fn images(image: &Image) -> Vec<ImageDescription> {
    let mut memory_bytes = vec![0; image.reader.images().len()];
    for run in image.reader.objects().flat_map(|o| o.runs).filter(|r| r.kind == RunKind::Data) {
        memory_bytes[run.image()] += run.bytes;
    }
    let images = image.reader.images().zip(memory_bytes);
    images
        .map(|(i, memory_bytes)| ImageDescription {
            path: i.path.to_owned(),
            bytes: i.bytes,
            parent: i.parent.map(|p| p.number),
            memory_bytes,
        })
        .collect()
}
