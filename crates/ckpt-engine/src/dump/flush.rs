// SPDX-License-Identifier: MIT OR Apache-2.0
//! Flush (`dump --flush`): what the job has written to files is on the disk before the checkpoint is published, so that
//! both survive a power cut together (fsync(2)). See docs/adr/0021-flush-from-outside.md.
//!
//! Flushed are files open for writing, files behind shared mappings that may be written (fsync(2) of a file writes the
//! pages that are dirty in any mapping, as msync(2) does), and the directories that name them.
//!
//! Limits: files without a name, whose content is in the image, and the descriptors of processes that are not dumpable
//! are left out.

use crate::error::DumpError;
use crate::model::Job;
use crate::model::memory::Vma;
use ckpt_sys::libc;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Files and directories to bring to the disk, each held open by a description of our own: the job's locks and positions
/// are not touched, and it may close or rename them meanwhile.
#[derive(Debug, Default)]
pub struct Flush {
    files: BTreeMap<(u64, u64), Held>,
    /// What could not be opened, and why.
    pub missed: Vec<String>,
}

#[derive(Debug)]
struct Held {
    pid: i32,
    path: String,
    file: File,
}

/// A new description for what `path` leads to; fsync(2) asks for no particular mode.
fn open(path: &str) -> io::Result<File> {
    match File::open(path) {
        Err(e) if e.kind() == ErrorKind::PermissionDenied => File::options().write(true).open(path),
        other => other,
    }
}

impl Flush {
    /// Opens whatever the job may have written to.
    pub fn of(job: &Job) -> Flush {
        let mut out = Flush::default();
        let mut names: Vec<(i32, PathBuf)> = Vec::new();
        for f in job.files.values() {
            let writes = f.seen.flags & libc::O_ACCMODE != libc::O_RDONLY && f.seen.flags & libc::O_PATH == 0;
            if !writes || f.seen.stat.format() != libc::S_IFREG || f.deleted() {
                continue;
            }
            let path = String::from_utf8_lossy(f.path()).into_owned();
            out.hold(f.pid, path, &format!("/proc/{}/fd/{}", f.host, f.fd), None);
            names.push((f.pid, Path::new(std::ffi::OsStr::from_bytes(f.path())).to_owned()));
        }
        for p in job.live() {
            // Flags are not read while the job stands still: then every shared mapping is taken for one that may be written.
            let may_be_written = |v: &&Vma| v.flags.is_empty() || v.has("mw");
            let files = p.vmas.iter().filter(|v| v.shared && v.ino != 0 && !v.deleted);
            for v in files.filter(may_be_written) {
                if !v.name.starts_with('/') || v.name.starts_with("/memfd:") || v.name.starts_with("/SYSV") {
                    continue;
                }
                let exact = format!("/proc/{}/map_files/{:x}-{:x}", p.host, v.start, v.end);
                // Only the host's root may open that; the name may lead to another file by now.
                if File::open(&exact).is_ok() {
                    out.hold(p.pid, v.name.clone(), &exact, None);
                } else {
                    out.hold(p.pid, v.name.clone(), &job.outside(&v.name), Some(v.ino));
                }
                names.push((p.pid, PathBuf::from(&v.name)));
            }
        }
        let mut directories: Vec<(i32, PathBuf)> =
            names.into_iter().filter_map(|(pid, name)| Some((pid, name.parent()?.to_owned()))).collect();
        directories.sort_by(|a, b| a.1.cmp(&b.1));
        directories.dedup_by(|a, b| a.1 == b.1);
        for (pid, directory) in directories {
            let path = directory.to_string_lossy().into_owned();
            let outside = job.outside(&path);
            out.hold(pid, path, &outside, None);
        }
        for p in job.live().filter(|p| p.closed) {
            out.missed.push(format!("pid {}: its files were not flushed: it is not dumpable", p.pid));
        }
        out
    }

    fn hold(&mut self, pid: i32, path: String, at: &str, inode: Option<u64>) {
        let opened = open(at).and_then(|file| file.metadata().map(|m| (file, m)));
        match opened {
            Ok((_, m)) if inode.is_some_and(|n| n != m.ino()) => {
                self.missed
                    .push(format!("pid {pid}: {path}: mapped, and not flushed: another file has its name"));
            }
            Ok((file, m)) => {
                self.files.entry((m.dev(), m.ino())).or_insert(Held { pid, path, file });
            }
            // Closed and removed since it was seen.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => self.missed.push(format!("pid {pid}: {path}: not flushed: {e}")),
        }
    }

    /// Waits until all is on the disk; returns how many files and directories that were.
    ///
    /// # Errors
    /// [`DumpError::Process`] with what fsync(2) gives: what was written is lost then, or there is no space for it.
    pub fn sync(&self) -> Result<usize, DumpError> {
        for held in self.files.values() {
            match held.file.sync_all() {
                Ok(()) => {}
                // File systems without a disk behind them need not know it.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EROFS)) => {}
                Err(e) => {
                    return Err(DumpError::process(held.pid, format!("fsync of {} (--flush)", held.path))(e));
                }
            }
        }
        Ok(self.files.len())
    }
}
