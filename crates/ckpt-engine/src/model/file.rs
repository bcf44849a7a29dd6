// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptors and the open file descriptions behind them, from /proc/pid/fd and /proc/pid/fdinfo
//! (proc_pid_fdinfo(5)).

use super::process::{read_proc, read_proc_text};
use crate::error::DumpError;
use crate::kind::Kind;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::{Pid, libc};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// One slot of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// The open file description.
    pub file: u64,
    /// FD_CLOEXEC.
    pub cloexec: bool,
}

/// The identity and age of a file. Times are nanoseconds since 1970.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct FileStat {
    /// st_dev.
    pub dev: u64,
    /// st_ino.
    pub ino: u64,
    /// st_mode.
    pub mode: u32,
    /// st_nlink.
    pub nlink: u64,
    /// st_rdev.
    pub rdev: u64,
    /// st_size in bytes.
    pub size: u64,
    /// st_mtim.
    pub mtime_ns: i64,
    /// st_ctim.
    pub ctime_ns: i64,
}

impl FileStat {
    /// From a `stat` of any file.
    pub fn of(m: &std::fs::Metadata) -> FileStat {
        FileStat {
            dev: m.dev(),
            ino: m.ino(),
            mode: m.mode(),
            nlink: m.nlink(),
            rdev: m.rdev(),
            size: m.size(),
            mtime_ns: m.mtime() * 1_000_000_000 + m.mtime_nsec(),
            ctime_ns: m.ctime() * 1_000_000_000 + m.ctime_nsec(),
        }
    }

    /// S_IFMT part of the mode.
    pub fn format(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// Whether the file is unchanged: same length and time of change of content, and, if it is the same inode, no
    /// later change of anything (an mtime can be set back, a ctime can't).
    pub fn unchanged(&self, now: &FileStat) -> bool {
        let same_inode = self.dev == now.dev && self.ino == now.ino;
        self.format() == now.format()
            && self.size == now.size
            && self.mtime_ns == now.mtime_ns
            && (!same_inode || self.ctime_ns == now.ctime_ns)
    }
}

/// A descriptor as /proc shows it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The link's text, without " (deleted)"; bytes that are not UTF-8 make it lossy, which [`OpenFile::path`] avoids.
    pub target: String,
    /// stat of what it refers to.
    pub stat: FileStat,
    /// O_* flags without O_CLOEXEC.
    pub flags: i32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
    /// File position in bytes.
    pub position: u64,
    /// The fdinfo text.
    pub info: String,
    /// The link's bytes.
    pub link: Vec<u8>,
}

/// An open file description.
#[derive(Debug, Clone)]
pub struct OpenFile {
    /// Its id in the image.
    pub id: u64,
    /// A process that has it open, as the job sees it.
    pub pid: i32,
    /// The same, as ckpt sees it.
    pub host: Pid,
    /// Its descriptor there.
    pub fd: i32,
    /// Everyone who has it: (pid, descriptor).
    pub holders: Vec<(i32, i32)>,
    /// What /proc shows.
    pub seen: Seen,
    /// The kind that owns it.
    pub kind: Option<Kind>,
    last: LastOwner,
}

/// The process whose descriptors were taken last, of all files of a job: the next one is mostly of the same.
#[derive(Debug, Clone, Default)]
pub struct LastOwner(Arc<Mutex<Option<(Pid, OwnedFd)>>>);

impl OpenFile {
    pub(super) fn new(id: u64, pid: i32, (host, fd): (Pid, i32), seen: Seen, last: LastOwner) -> OpenFile {
        OpenFile { id, pid, host, fd, holders: Vec::new(), seen, kind: None, last }
    }

    /// For a file whose name has been removed and that has another: one in the same directory, if there is one.
    ///
    /// `root` is init's root directory.
    pub fn other_name(&self, root: &str) -> Option<Vec<u8>> {
        let name = self.seen.link.strip_suffix(b" (deleted)").filter(|_| self.seen.stat.nlink > 0)?;
        let dir = Path::new(std::ffi::OsStr::from_bytes(name)).parent()?;
        let outside = Path::new(root).join(dir.strip_prefix("/").ok()?);
        let same = |m: &std::fs::Metadata| (m.dev(), m.ino()) == (self.seen.stat.dev, self.seen.stat.ino);
        let found =
            std::fs::read_dir(outside).ok()?.flatten().find(|e| e.metadata().is_ok_and(|m| same(&m)))?;
        Some(dir.join(found.file_name()).as_os_str().as_bytes().to_vec())
    }

    /// The path as bytes, without " (deleted)".
    pub fn path(&self) -> &[u8] {
        if self.deleted() {
            self.seen.link.strip_suffix(b" (deleted)").unwrap_or(&self.seen.link)
        } else {
            &self.seen.link
        }
    }

    /// A file without a name.
    pub fn deleted(&self) -> bool {
        self.seen.stat.nlink == 0 && self.seen.link.starts_with(b"/")
    }

    /// O_RDONLY, O_WRONLY or O_RDWR.
    pub fn access(&self) -> i32 {
        self.seen.flags & libc::O_ACCMODE
    }

    /// The same description in this process.
    ///
    /// # Errors
    /// If the owner is gone or closed it.
    pub fn steal(&self) -> Result<OwnedFd, DumpError> {
        let err = |what| DumpError::fd(self.pid, self.fd, what);
        let mut last = self.last.0.lock().unwrap_or_else(PoisonError::into_inner);
        let owner = match last.take().filter(|(host, _)| *host == self.host) {
            Some(owner) => owner,
            None => (self.host, ckpt_sys::task::pidfd_open(self.host).map_err(err("pidfd_open"))?),
        };
        let (_, pidfd) = last.insert(owner);
        ckpt_sys::task::pidfd_getfd(pidfd.as_fd(), self.fd).map_err(err("pidfd_getfd"))
    }

    /// The value of a line of fdinfo.
    pub fn info(&self, key: &str) -> Option<&str> {
        info_value(&self.seen.info, key)
    }
}

/// The value behind `key:` in an fdinfo text.
pub fn info_value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':').map(str::trim))
}

/// All descriptors of a process, sorted by number.
///
/// # Errors
/// What reading gives.
pub fn descriptors(host: Pid) -> Result<Vec<(i32, Seen)>, DumpError> {
    let dir = format!("/proc/{host}/fd");
    let list = match std::fs::read_dir(&dir) {
        Ok(list) => list,
        // It has ended since it was seen.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(DumpError::process(host.as_raw(), "listing descriptors")(e)),
    };
    let mut out = Vec::new();
    for e in list.flatten() {
        let Some(number) = e.file_name().to_str().and_then(|s| s.parse::<i32>().ok()) else { continue };
        // A descriptor that was closed meanwhile is simply not there; everything is read again when frozen.
        let Some(seen) = see(host, number, &e.path()) else { continue };
        out.push((number, seen));
    }
    out.sort_by_key(|(n, _)| *n);
    Ok(out)
}

/// The descriptors of a process whose links `wanted` accepts, with their fdinfo. The process runs: those that are gone by then are
/// left out.
pub fn infos(host: Pid, wanted: impl Fn(&[u8]) -> bool) -> Vec<(i32, String)> {
    let numbers = std::fs::read_dir(format!("/proc/{host}/fd")).into_iter().flatten().flatten();
    let leads = |path: &Path| std::fs::read_link(path).is_ok_and(|to| wanted(to.as_os_str().as_bytes()));
    let chosen = numbers.filter(|fd| leads(&fd.path()));
    let number = |fd: std::fs::DirEntry| fd.file_name().to_str()?.parse::<i32>().ok();
    let info = |n: i32| {
        let text = read_proc(format!("/proc/{host}/fdinfo/{n}")).ok()?;
        Some((n, String::from_utf8_lossy(&text).into_owned()))
    };
    chosen.filter_map(number).filter_map(info).collect()
}

fn see(host: Pid, number: i32, path: &Path) -> Option<Seen> {
    let link = std::fs::read_link(path).ok()?.as_os_str().as_bytes().to_vec();
    let stat = FileStat::of(&std::fs::metadata(path).ok()?);
    let info = read_proc_text(format!("/proc/{host}/fdinfo/{number}")).ok()?;
    let flags = info_value(&info, "flags").and_then(|s| i32::from_str_radix(s, 8).ok())?;
    let position = info_value(&info, "pos").and_then(|s| s.parse::<i64>().ok())? as u64;
    let target = String::from_utf8_lossy(&link).into_owned();
    let cloexec = flags & libc::O_CLOEXEC != 0;
    Some(Seen { target, stat, flags: flags & !libc::O_CLOEXEC, cloexec, position, info, link })
}

/// FNV-1a (64 bit): the same in every release, and no defence against malice.
pub fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// FNV-1a of the first and the last 4096 bytes of what a file of `size` bytes held; `None` if it can't be read.
pub fn file_ends(path: &Path, size: u64) -> Option<u64> {
    use std::os::unix::fs::FileExt;
    const BLOCK: u64 = 4096;
    let file = std::fs::File::open(path).ok()?;
    let block = |start: u64| {
        let mut block = vec![0; (size - start).min(BLOCK) as usize];
        file.read_exact_at(&mut block, start).ok()?;
        Some(block)
    };
    Some(fnv1a(block(0)?.into_iter().chain(block(size.saturating_sub(BLOCK))?)))
}
