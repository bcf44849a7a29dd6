// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that several mappings or descriptors share and that has no name to open it by: shared anonymous memory,
//! memfds, and files that have been deleted while mapped or open.
//!
//! Content is read through a descriptor where there is one, otherwise through the mappings; what no process maps and
//! none has open can't be reached by any of them either.

use super::{At, Collect, Collected, Content, Resource, decode, nothing_to_do};
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::model::memory::Vma;
use crate::restore::build_tree::{Build, open_call};
use crate::snapshot::{From, Pages, Range, Source};
use ckpt_image::codec::{Decode, Encode};
use ckpt_image::{Record, ZeroPages};
use ckpt_sys::{Pid, libc};
use std::collections::BTreeMap;

/// Version of [`SharedObjectRecord`].
pub const VERSION: u16 = 1;

/// What an object was made by.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Origin {
    /// mmap with MAP_SHARED and MAP_ANONYMOUS.
    Anonymous,
    /// memfd_create(2).
    Memfd {
        /// Its name.
        name: Vec<u8>,
        /// F_GET_SEALS; none where no descriptor told.
        seals: Option<i32>,
    },
    /// A file that has no name any more.
    Deleted {
        /// Its last name.
        path: Vec<u8>,
        /// st_mode.
        mode: u32,
    },
}

/// An object. The record's id is its number.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SharedObjectRecord {
    /// A process to make it in.
    pub pid: i32,
    /// What it is.
    pub origin: Origin,
    /// Length in bytes.
    pub bytes: u64,
    /// Device and inode numbers it had.
    pub identity: (u64, u64),
}

/// Name of memfds that stand for shared anonymous memory in restored processes.
const ANONYMOUS_NAME: &str = "/memfd:ckpt-shared-anonymous";

/// Whether the mapping is of memory that only the kernel keeps: a memfd, shared anonymous memory, a deleted file.
pub fn is_memory_object(v: &Vma) -> bool {
    v.is_file() && v.deleted && !super::aio::is_ring(v)
}

/// The object of a mapping, if it is of one.
pub fn of_mapping(out: &Collected, v: &Vma) -> Option<u64> {
    if !is_memory_object(v) {
        return None;
    }
    let dev = libc::makedev(v.dev.0, v.dev.1);
    find(out, dev, v.ino)
}

/// The object of an open file without a name.
pub fn of_file(out: &Collected, f: &OpenFile) -> Option<u64> {
    find(out, f.seen.stat.dev, f.seen.stat.ino)
}

fn find(out: &Collected, dev: u64, ino: u64) -> Option<u64> {
    out.objects.get(&(dev, ino)).copied()
}

/// True for memfds and deleted regular files.
pub fn is_nameless(f: &OpenFile) -> bool {
    f.seen.stat.format() == libc::S_IFREG && f.deleted()
}

/// The kind.
#[derive(Debug)]
pub struct SharedObjectResource;

#[derive(Default)]
struct Found<'a> {
    file: Option<&'a OpenFile>,
    mappings: Vec<(Pid, i32, &'a Vma)>,
    pid: i32,
}

fn gather(job: &Job) -> BTreeMap<(u64, u64), Found<'_>> {
    let mut out: BTreeMap<(u64, u64), Found<'_>> = BTreeMap::new();
    for f in job.files.values().filter(|f| is_nameless(f)) {
        let e = out.entry((f.seen.stat.dev, f.seen.stat.ino)).or_default();
        // A descriptor that can be read through is preferred.
        if e.file.is_none_or(|old| old.access() == libc::O_WRONLY) {
            e.file = Some(f);
        }
        e.pid = f.pid;
    }
    for p in job.live() {
        for v in p.vmas.iter().filter(|v| is_memory_object(v)) {
            let e = out.entry((libc::makedev(v.dev.0, v.dev.1), v.ino)).or_default();
            e.mappings.push((p.host, p.pid, v));
            e.pid = if e.pid == 0 { p.pid } else { e.pid };
        }
    }
    out
}

/// The whole object behind a mapping, with its holes: /proc/pid/map_files is for privileged users only.
fn whole(found: &Found<'_>) -> Option<std::fs::File> {
    let (host, _, v) = found.mappings.first()?;
    std::fs::File::open(format!("/proc/{host}/map_files/{:x}-{:x}", v.start, v.end)).ok()
}

/// The union of the mappings of an object, each page read through one of them.
fn cover(mappings: &[(Pid, i32, &Vma)]) -> Vec<(Pid, i32, Vec<Range>)> {
    let mut covered: Vec<(u64, u64)> = Vec::new();
    let mut out = Vec::new();
    for (host, pid, v) in mappings {
        let (mut at, end) = (v.offset, v.offset + v.bytes());
        let mut ranges = Vec::new();
        // A private mapping shows private copies, which are not the object's content.
        if !v.shared {
            continue;
        }
        while at < end {
            let inside = covered.iter().find(|(s, e)| *s <= at && at < *e);
            if let Some((_, e)) = inside {
                at = *e;
                continue;
            }
            let next = covered.iter().map(|(s, _)| *s).filter(|s| *s > at).min().unwrap_or(end).min(end);
            ranges.push(Range {
                addr: v.start + (at - v.offset),
                bytes: next - at,
                offset: at,
                pages: Pages::All,
                lost_in_fork: Some("shared memory"),
            });
            at = next;
        }
        covered.extend(ranges.iter().map(|r| (r.offset, r.offset + r.bytes)));
        if !ranges.is_empty() {
            out.push((*host, *pid, ranges));
        }
    }
    out
}

impl Resource for SharedObjectResource {
    nothing_to_do! { claims, asks, connect, arm }

    fn kind(&self) -> Kind {
        Kind::SharedObject
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process, Kind::ShmFile]
    }

    fn probe(&self, job: &Job, refusals: &mut crate::error::Refusals) {
        for found in gather(job).values() {
            if found.file.is_some() || found.mappings.iter().any(|(_, _, v)| v.shared) {
                continue;
            }
            for (_, pid, v) in &found.mappings {
                let what = format!("mapping {:#x}-{:#x} is of the deleted file {}", v.start, v.end, v.name);
                refusals.process(*pid, what, "it was replaced by an upgrade; restart the program");
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Job = at else { return Ok(()) };
        for (identity, found) in gather(cx.job) {
            let object = cx.out.new_object();
            cx.out.objects.insert(identity, object);
            let mapped_end = found.mappings.iter().map(|(_, _, v)| v.offset + v.bytes()).max().unwrap_or(0);
            let name = found.file.map_or_else(
                || found.mappings[0].2.name.clone(),
                |f| String::from_utf8_lossy(f.path()).into_owned(),
            );
            let mut bytes = mapped_end;
            let mut seals = None;
            if let Some(f) = found.file {
                let err = |what: &str| DumpError::process(f.pid, format!("fd {}: {what}", f.fd));
                bytes = f.seen.stat.size;
                let link = format!("/proc/{}/fd/{}", f.host, f.fd);
                // Opened anew: its position is ours alone.
                let file = std::fs::File::open(link).map_err(err("opening its content"))?;
                use std::os::fd::AsFd;
                seals = ckpt_sys::descriptor::seals(file.as_fd()).ok();
                let from = From::File { fd: file.into(), bytes };
                cx.out.sources.push(Source {
                    kind: Kind::SharedObject,
                    object,
                    zeros: ZeroPages::Elide,
                    from,
                });
            } else if let Some(file) = whole(&found) {
                bytes = file.metadata().map_or(mapped_end, |m| m.len());
                let from = From::File { fd: file.into(), bytes };
                cx.out.sources.push(Source {
                    kind: Kind::SharedObject,
                    object,
                    zeros: ZeroPages::Elide,
                    from,
                });
            } else {
                for (host, pid, ranges) in cover(&found.mappings) {
                    let from = From::Process { host, pid, ranges };
                    cx.out.sources.push(Source {
                        kind: Kind::SharedObject,
                        object,
                        zeros: ZeroPages::Elide,
                        from,
                    });
                }
            }
            let origin = if name == ANONYMOUS_NAME || name == "/dev/zero" {
                Origin::Anonymous
            } else if let Some(n) = name.strip_prefix("/memfd:") {
                Origin::Memfd { name: n.as_bytes().to_vec(), seals }
            } else {
                let mode = found.file.map_or(0o600, |f| f.seen.stat.mode & 0o7777);
                Origin::Deleted { path: name.into_bytes(), mode }
            };
            let record = SharedObjectRecord { pid: found.pid, origin, bytes, identity };
            cx.put(Kind::SharedObject, VERSION, 0, object, &record)?;
        }
        Ok(())
    }

    fn content(&self, cx: &mut Content<'_>) -> Result<(), DumpError> {
        cx.write_pages(Kind::SharedObject)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let o: SharedObjectRecord = decode(record, VERSION)?;
        let what = match o.origin {
            Origin::Anonymous => "shared anonymous memory".to_owned(),
            Origin::Memfd { name, .. } => format!("memfd {}", String::from_utf8_lossy(&name)),
            Origin::Deleted { path, .. } => format!("deleted file {}", String::from_utf8_lossy(&path)),
        };
        Ok(format!("{what}: {} KiB", o.bytes / 1024))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let o: SharedObjectRecord = decode(record, VERSION)?;
        let pid = o.pid;
        let bytes = o.bytes;
        let base = cx.free_number(pid);
        let memfd =
            |name: &[u8], sealing: bool| (name.to_vec(), if sealing { libc::MFD_ALLOW_SEALING } else { 0 });
        let fd = match &o.origin {
            Origin::Anonymous | Origin::Memfd { .. } => {
                let (name, flags) = match &o.origin {
                    Origin::Memfd { name, seals } => {
                        memfd(name, seals.is_none_or(|s| s & libc::F_SEAL_SEAL == 0))
                    }
                    _ => memfd(ANONYMOUS_NAME.trim_start_matches("/memfd:").as_bytes(), false),
                };
                cx.open_in(pid, |b| {
                    let name = b.string(&name);
                    let fd = b.call("memfd_create", libc::SYS_memfd_create, &[name, u64::from(flags)]);
                    let size = b.call("ftruncate", libc::SYS_ftruncate, &[0, bytes]);
                    b.feed(fd, size, 0);
                    fd
                })?
            }
            Origin::Deleted { path, mode } => {
                let (path, mode) = (free_name(path), u64::from(*mode));
                let (r, keep) = cx.run(pid, |b| {
                    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
                    let at = b.string(&path);
                    let what = format!("creating {}", String::from_utf8_lossy(&path));
                    let fd =
                        b.call(what, libc::SYS_openat, &[libc::AT_FDCWD as u64, at, flags as u64, 0o600]);
                    let size = b.call("ftruncate", libc::SYS_ftruncate, &[0, bytes]);
                    b.feed(fd, size, 0);
                    let chmod = b.call("fchmod", libc::SYS_fchmod, &[0, mode]);
                    b.feed(fd, chmod, 0);
                    // It has no name: it is reached through /proc/pid/fd from here on.
                    b.call("unlink", libc::SYS_unlink, &[at]);
                    let keep = b.call(
                        "fcntl F_DUPFD_CLOEXEC",
                        libc::SYS_fcntl,
                        &[0, libc::F_DUPFD_CLOEXEC as u64, base],
                    );
                    b.feed(fd, keep, 0);
                    keep
                })?;
                // The first number stays open until the table is built over it.
                cx.call(pid, "close", libc::SYS_close, &[r[0]])?;
                r[keep.index()] as i32
            }
        };
        cx.objects.insert(record.id, (pid, fd));
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let o: SharedObjectRecord = decode(record, VERSION)?;
        let Some((pid, fd)) = cx.objects.remove(&record.id) else { return Ok(()) };
        if let Origin::Memfd { seals: Some(seals), .. } = o.origin
            && seals & !libc::F_SEAL_SEAL != 0
        {
            cx.call(
                pid,
                "fcntl F_ADD_SEALS",
                libc::SYS_fcntl,
                &[fd as u64, libc::F_ADD_SEALS as u64, seals as u64],
            )?;
        }
        cx.call(pid, "close", libc::SYS_close, &[fd as u64])?;
        Ok(())
    }
}

/// A path for a file that is unlinked right away: in the directory of its last name if that can be written to, else
/// in the job's own /dev/shm.
fn free_name(path: &[u8]) -> Vec<u8> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let old = std::path::Path::new(OsStr::from_bytes(path));
    let writable = old.parent().is_some_and(|d| {
        nix::unistd::access(d, nix::unistd::AccessFlags::W_OK | nix::unistd::AccessFlags::X_OK).is_ok()
    });
    let taken = std::fs::symlink_metadata(old).is_ok();
    if writable && !taken && old.file_name().is_some() {
        return path.to_vec();
    }
    let dir = if writable { old.parent().unwrap_or(old).to_owned() } else { "/dev/shm".into() };
    (0u32..)
        .map(|n| dir.join(format!(".ckpt-deleted-{n}")))
        .find(|p| std::fs::symlink_metadata(p).is_err())
        .map_or_else(|| path.to_vec(), |p| p.as_os_str().as_bytes().to_vec())
}

/// Opens a rebuilt object anew in a process.
///
/// # Errors
/// If the image names an object that it doesn't hold.
pub fn reopen(cx: &mut Build<'_>, pid: i32, object: u64, flags: i32) -> Result<i32, RestoreError> {
    let from = cx.objects.get(&object).copied();
    let from = from.ok_or_else(|| RestoreError::Record(format!("there is no shared object {object}")))?;
    let path = format!("/proc/{}/fd/{}", from.0, from.1);
    cx.open_in(pid, |b| open_call(b, path.as_bytes(), flags))
}
