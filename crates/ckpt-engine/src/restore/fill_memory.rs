// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fill: page contents go into the blanks' mappings and the shared objects, each run checked before it is used.

use super::build_tree::Build;
use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::decode;
use crate::resource::memory_map::MemoryMapRecord;
use ckpt_image::RunKind;
use ckpt_sys::Pid;
use std::os::unix::fs::FileExt;

/// Fills everything.
///
/// # Errors
/// Damage in the image, or memory that can't be written.
pub fn fill(build: &mut Build<'_>) -> Result<(), RestoreError> {
    let mut buf = Vec::new();
    if !ckpt_sys::hook::skipped(Kind::MemoryMap.name()) {
        for r in build.image.of_kind(Kind::MemoryMap) {
            let m: MemoryMapRecord = decode(r, crate::resource::memory_map::VERSION)?;
            fill_process(build, r.owner as i32, m.object, &mut buf)?;
        }
    }
    if ckpt_sys::hook::skipped(Kind::SharedObject.name()) {
        return Ok(());
    }
    let objects: Vec<(u64, (i32, i32))> = build.objects.iter().map(|(k, v)| (*k, *v)).collect();
    for (object, (pid, fd)) in objects {
        let path = format!("/proc/{pid}/fd/{fd}");
        let what = || format!("filling shared object {object}");
        let file = std::fs::File::options().write(true).open(path).map_err(RestoreError::io(pid, what()))?;
        let bytes = file.metadata().map_err(RestoreError::io(pid, what()))?.len();
        fill_file(build, &file, object, bytes, &mut buf)?;
    }
    Ok(())
}

/// Writes the runs of an object into a file, not beyond its length.
///
/// # Errors
/// Damage in the image, or a full file system.
pub fn fill_file(
    build: &Build<'_>,
    file: &std::fs::File,
    object: u64,
    bytes: u64,
    buf: &mut Vec<u8>,
) -> Result<(), RestoreError> {
    fill_from(build.image, file, object, bytes, buf)
}

/// The same, without anything being built.
///
/// # Errors
/// As [`fill_file`].
pub fn fill_from(
    image: &super::read::Image,
    file: &std::fs::File,
    object: u64,
    bytes: u64,
    buf: &mut Vec<u8>,
) -> Result<(), RestoreError> {
    for run in image.reader.runs(object) {
        ckpt_sys::hook::point();
        image.reader.read_run(run, buf)?;
        let n = bytes.saturating_sub(run.offset).min(buf.len() as u64) as usize;
        file.write_all_at(&buf[..n], run.offset)
            .map_err(RestoreError::io(0, format!("writing {n} bytes of shared object {object}")))?;
    }
    Ok(())
}

fn fill_process(build: &Build<'_>, pid: i32, object: u64, buf: &mut Vec<u8>) -> Result<(), RestoreError> {
    for run in build.image.reader.runs(object) {
        ckpt_sys::hook::point();
        match run.kind {
            RunKind::Data => build.image.reader.read_run(run, buf)?,
            RunKind::Zero => {
                buf.clear();
                buf.resize(run.bytes as usize, 0);
            }
        }
        let what = format!("filling {} bytes at {:#x}", buf.len(), run.offset);
        ckpt_sys::memory::write(Pid::from_raw(pid), run.offset, buf)
            .map_err(RestoreError::errno(pid, what))?;
    }
    Ok(())
}
