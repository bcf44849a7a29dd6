// SPDX-License-Identifier: MIT OR Apache-2.0
//! Regular files: by path if they have one, else as a shared object of the image.
//!
//! A file that the job was writing at its end and that only grew since the dump is cut back to the length it had; the
//! tail is kept beside the checkpoint. See [`crate::restore::plan`] for the judgement.

use super::Opened;
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::{FileStat, OpenFile};
use crate::resource::{At, Collect, Resource, decode, nothing_to_do, shared_object};
use crate::restore::build_tree::{Build, open_call};
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Version of [`RegularFileRecord`].
pub const VERSION: u16 = 1;

/// An open regular file.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RegularFileRecord {
    /// What all have.
    pub opened: Opened,
    /// Absolute path.
    pub path: Vec<u8>,
    /// What it was.
    pub stat: FileStat,
    /// The object with its content, if it has no name.
    pub object: Option<u64>,
    /// [`crate::model::file::file_ends`] of a file that is being written.
    pub ends: Option<u64>,
}

/// The kind.
#[derive(Debug)]
pub struct RegularFileResource;

/// POSIX message queues and hugetlb memory look like deleted regular files.
fn on_special_file_system(f: &OpenFile) -> bool {
    const MQUEUE_MAGIC: nix::sys::statfs::FsType = nix::sys::statfs::FsType(0x1980_0202);
    let kind = f.steal().ok().and_then(|fd| nix::sys::statfs::fstatfs(fd).ok()).map(|s| s.filesystem_type());
    kind.is_none_or(|k| k == MQUEUE_MAGIC || k == nix::sys::statfs::HUGETLBFS_MAGIC)
}

impl Resource for RegularFileResource {
    nothing_to_do! { asks, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::RegularFile
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::SharedObject, Kind::ShmFile]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        let kernel = f.seen.link.starts_with(b"/proc/") || f.seen.link.starts_with(b"/sys/");
        let named = f.seen.link.starts_with(b"/");
        f.seen.stat.format() == libc::S_IFREG
            && !kernel
            && named
            && !(f.deleted() && on_special_file_system(f))
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for f in job.files.values().filter(|f| f.kind == Some(Kind::RegularFile) && !f.deleted()) {
            // Paths are as init's mount namespace has them, whatever root the process has.
            let root = format!("/proc/{}/root", job.info.init);
            let mut outside = root.clone().into_bytes();
            outside.extend_from_slice(&f.other_name(&root).unwrap_or_else(|| f.path().to_vec()));
            let same = std::fs::metadata(OsStr::from_bytes(&outside)).is_ok_and(|m| {
                let now = FileStat::of(&m);
                (now.dev, now.ino) == (f.seen.stat.dev, f.seen.stat.ino)
            });
            if !same {
                let what = format!("{} is not the file at that path any more", f.seen.target);
                for (pid, fd) in &f.holders {
                    refusals.fd(*pid, *fd, what.clone(), "put it back under that name, or close it");
                }
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let object = if shared_object::is_nameless(f) { shared_object::of_file(cx.out, f) } else { None };
        let record = RegularFileRecord {
            opened: Opened::of(cx.job, f)?,
            path: f
                .other_name(&format!("/proc/{}/root", cx.job.info.init))
                .unwrap_or_else(|| f.path().to_vec()),
            stat: f.seen.stat.clone(),
            object,
            ends: if object.is_none() && f.access() != libc::O_RDONLY {
                let path = format!("/proc/{}/fd/{}", f.host, f.fd);
                crate::model::file::file_ends(std::path::Path::new(&path), f.seen.stat.size)
            } else {
                None
            },
        };
        cx.put(Kind::RegularFile, VERSION, f.id, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let f: RegularFileRecord = decode(record, VERSION)?;
        let deleted = if f.object.is_some() { " (deleted)" } else { "" };
        let path = String::from_utf8_lossy(&f.path).into_owned();
        Ok(format!(
            "{path}{deleted}, at {} of {} bytes, flags {:#o}",
            f.opened.position, f.stat.size, f.opened.flags
        ))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let f: RegularFileRecord = decode(record, VERSION)?;
        let pid = f.opened.pid;
        let fd = match f.object {
            Some(object) => {
                let from = cx.objects.get(&object).copied();
                match from {
                    Some(_) => shared_object::reopen(cx, pid, object, f.opened.flags)?,
                    None if ckpt_sys::hook::any_skipped() => return Ok(()),
                    None => return Err(RestoreError::Record(format!("there is no shared object {object}"))),
                }
            }
            None => {
                let path = crate::resource::saved_file::path_now(cx, &f.path);
                cx.open_in(pid, |b| open_call(b, &path, f.opened.flags))?
            }
        };
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let f: RegularFileRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        f.opened.finish(cx, fd, f.opened.flags & libc::O_PATH == 0)
    }
}

/// Files to be put back to the length they had, by the decision of the plan.
#[derive(Debug)]
pub struct Cuts {
    files: Vec<(Vec<u8>, FileStat, FileStat)>,
    dir: std::os::fd::OwnedFd,
    label: String,
}

/// Where a checkpoint's directory tells what its restores have cut: a line of JSON for each file.
pub const CUTS_FILE: &str = "cuts";

/// A file as a restore left it.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct LeftFile {
    path: Vec<u8>,
    dev: u64,
    ino: u64,
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
}

/// Whether a file is as an earlier restore of this checkpoint has put it back.
pub fn left_by_restore(dir: &std::os::fd::OwnedFd, path: &[u8], now: &FileStat) -> bool {
    use std::io::Read;
    const LIMIT: u64 = 1 << 20;
    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
    let Ok(fd) = nix::fcntl::openat(dir, CUTS_FILE, flags, nix::sys::stat::Mode::empty()) else {
        return false;
    };
    let mut text = String::new();
    if std::fs::File::from(fd).take(LIMIT).read_to_string(&mut text).is_err() {
        return false;
    }
    text.lines().filter_map(|l| serde_json::from_str::<LeftFile>(l).ok()).any(|l| {
        l.path == path
            && (l.dev, l.ino, l.size) == (now.dev, now.ino, now.size)
            && (l.mtime_ns, l.ctime_ns) == (now.mtime_ns, now.ctime_ns)
    })
}

impl Cuts {
    /// Those of a plan.
    ///
    /// # Errors
    /// If the descriptor of the checkpoint's directory can't be duplicated.
    pub fn of(cx: &Build<'_>) -> Result<Cuts, RestoreError> {
        let dir = cx.request.dir.try_clone().map_err(RestoreError::io(0, "the checkpoint's directory"))?;
        Ok(Cuts { files: cx.plan.cuts.clone(), dir, label: cx.request.label.clone() })
    }

    /// Cuts them, keeping their tails in the checkpoint's directory. Says what it did.
    ///
    /// # Errors
    /// If a tail can't be kept or a file can't be cut; it is then as it was.
    pub fn cut(&self) -> Result<Vec<String>, RestoreError> {
        use std::io::{Seek, SeekFrom};
        let mut said = Vec::new();
        for (n, (path, then, now)) in self.files.iter().enumerate() {
            let name = OsStr::from_bytes(path);
            let text = name.to_string_lossy().into_owned();
            let err = |what: &str| RestoreError::io(0, format!("{what} {text}"));
            let mut file =
                std::fs::File::options().read(true).write(true).open(name).map_err(err("opening"))?;
            let base =
                std::path::Path::new(name).file_name().unwrap_or_default().to_string_lossy().into_owned();
            let tail = format!("cut-{}-{n}-{base}", now.mtime_ns);
            let mut out = self.beside(&tail).map_err(err("keeping the tail of"))?;
            file.seek(SeekFrom::Start(then.size)).map_err(err("seeking in"))?;
            std::io::copy(&mut file, &mut out).map_err(err("keeping the tail of"))?;
            out.sync_all().map_err(err("keeping the tail of"))?;
            file.set_len(then.size).map_err(err("cutting"))?;
            let left = FileStat::of(&file.metadata().map_err(err("looking at"))?);
            self.note_left(std::path::Path::new(name), &left).map_err(err("noting"))?;
            said.push(format!(
                "{text}: cut from {} back to {} bytes; what was written after the dump is in {}/{tail}",
                now.size, then.size, self.label
            ));
        }
        Ok(said)
    }

    /// Notes how a file was left, for the next restore of this checkpoint.
    ///
    /// # Errors
    /// If the checkpoint's directory can't be written to.
    pub fn note_left(&self, path: &std::path::Path, left: &FileStat) -> std::io::Result<()> {
        use std::io::Write;
        let left = LeftFile {
            path: path.as_os_str().as_bytes().to_vec(),
            dev: left.dev,
            ino: left.ino,
            size: left.size,
            mtime_ns: left.mtime_ns,
            ctime_ns: left.ctime_ns,
        };
        writeln!(self.beside(CUTS_FILE)?, "{}", serde_json::to_string(&left)?)
    }

    fn beside(&self, name: &str) -> std::io::Result<std::fs::File> {
        use nix::fcntl::OFlag;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND | OFlag::O_CLOEXEC;
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        Ok(nix::fcntl::openat(&self.dir, name, flags, mode)?.into())
    }
}
