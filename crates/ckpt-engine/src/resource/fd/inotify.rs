// SPDX-License-Identifier: MIT OR Apache-2.0
//! inotify(7) instances: their watches, by path and under their old numbers.
//!
//! Queued events can't be read without taking them away from the job, and what happens to files between the dump and the
//! restore reaches nobody. So where events were queued, or what is watched is not as it was, the restored instance holds the
//! event that the kernel has for that: IN_Q_OVERFLOW, "events were lost, look again".

use super::Opened;
use crate::error::{Conflict, DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::{FileStat, OpenFile, fnv1a};
use crate::model::watched::{self, Handle, Inode};
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use crate::restore::read::Image;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::inotify::{Decoy, add_watch, drain, remove_watch};
use ckpt_sys::{Errno, Pid, libc};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Version of [`InotifyRecord`].
pub const VERSION: u16 = 1;

/// Highest number of a watch that is restored: to get there, as many watches are made and removed.
const HIGHEST: i32 = 1 << 20;
/// Longest queue that is made to overflow, in events.
const LONGEST_QUEUE: usize = 1 << 20;
/// How many names in watched directories are looked at, for one instance.
const MOST_NAMES: usize = 4096;

/// A watch.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WatchRecord {
    /// Its number.
    pub number: i32,
    /// IN_*: events, IN_EXCL_UNLINK, IN_ONESHOT.
    pub mask: u32,
    /// Absolute path, without symbolic links but for the last part, if it is one that is watched itself.
    pub path: Vec<u8>,
    /// What [`state`] gave; none if there was too much to look at.
    pub state: Option<u64>,
}

/// An inotify instance.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct InotifyRecord {
    /// What all have.
    pub opened: Opened,
    /// Its number in the table of the process that holds it.
    pub number: i32,
    /// Its watches, by number.
    pub watches: Vec<WatchRecord>,
    /// Bytes of events that were queued.
    pub queued_bytes: u32,
}

/// The kind.
#[derive(Debug)]
pub struct InotifyResource;

/// A watch as fdinfo shows it.
struct Seen {
    number: i32,
    inode: Inode,
    mask: u32,
    handle: Option<Handle>,
}

fn hex(bytes: &str) -> Option<Vec<u8>> {
    let digits = |at: usize| u8::from_str_radix(bytes.get(at..at + 2)?, 16).ok();
    (0..bytes.len()).step_by(2).map(digits).collect()
}

/// The watches in an fdinfo text (proc_pid_fdinfo(5)), by number; none if there is a line that can't be parsed.
fn parse(info: &str) -> Option<Vec<Seen>> {
    let line = |l: &str| {
        let value = |key: &str| l.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix(':'));
        let number = |key| u64::from_str_radix(value(key)?, 16).ok();
        let kind = number("fhandle-type").and_then(|n| i32::try_from(n).ok());
        Some(Seen {
            number: i32::try_from(number("wd")?).ok()?,
            inode: Inode { device: number("sdev")?, number: number("ino")? },
            mask: u32::try_from(number("mask")?).ok()?,
            handle: kind.zip(value("f_handle").and_then(hex)),
        })
    };
    let lines = info.lines().filter_map(|l| l.strip_prefix("inotify "));
    let mut all = lines.map(line).collect::<Option<Vec<Seen>>>()?;
    all.sort_by_key(|s| s.number);
    Some(all)
}

/// Whether the job's own files are there, which are restored with it.
fn is_private(path: &[u8]) -> bool {
    path == b"/dev/shm" || path.starts_with(b"/dev/shm/")
}

/// A number for what a watch on `path`, below `root`, would tell of: the file, and the names in a directory. A directory's own
/// size and times change when a file is made and removed in it, as a restore does: they count only if `all` does. `names` is
/// how many may still be looked at; none if that is not enough, or the file is not there.
fn state(root: &str, path: &[u8], names: &mut usize, all: bool) -> Option<u64> {
    let outside = Path::new(root).join(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path)));
    let words = |s: &FileStat, all: bool| {
        let changing = [s.nlink, s.size, s.mtime_ns as u64, s.ctime_ns as u64];
        let changing = if all { changing } else { [0; 4] };
        [s.dev, s.ino, u64::from(s.mode)].into_iter().chain(changing).flat_map(u64::to_le_bytes)
    };
    let m = std::fs::symlink_metadata(&outside).ok()?;
    *names = names.checked_sub(1)?;
    let mut sum = fnv1a(words(&FileStat::of(&m), all || !m.is_dir()));
    if m.is_dir() {
        for e in std::fs::read_dir(&outside).ok()? {
            let e = e.ok()?;
            *names = names.checked_sub(1)?;
            let name = e.file_name();
            let of_file = words(&FileStat::of(&e.metadata().ok()?), true);
            // In whatever order they come.
            sum = sum.wrapping_add(fnv1a(name.as_bytes().iter().copied().chain([0]).chain(of_file)));
        }
    }
    Some(sum)
}

/// Whether looking into a directory would be an event for a watch with this mask.
fn is_disturbed(mask: u32) -> bool {
    mask & (libc::IN_OPEN | libc::IN_ACCESS | libc::IN_CLOSE_NOWRITE) != 0
}

/// What the watches of an instance would tell of, before a restore has touched anything.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// It is not as it was at the dump, or that is not known.
    changed: bool,
    /// By watch: [`state`] as it will still be when all is built.
    states: Vec<Option<u64>>,
}

/// Looks at what is watched, by the image's numbers of the instances. Paths that are not there are conflicts.
///
/// # Errors
/// If a record does not decode.
pub fn look(image: &Image, conflicts: &mut Vec<Conflict>) -> Result<BTreeMap<u64, Look>, RestoreError> {
    let mut out = BTreeMap::new();
    for r in image.of_kind(Kind::Inotify) {
        let i: InotifyRecord = decode(r, VERSION)?;
        let mut look = Look::default();
        let [mut then, mut now] = [MOST_NAMES; 2];
        for w in &i.watches {
            if is_private(&w.path) || w.state.is_none() {
                look.changed |= !is_private(&w.path);
                look.states.push(None);
            } else {
                look.changed |= state("/", &w.path, &mut then, true) != w.state;
                look.states.push(state("/", &w.path, &mut now, false));
            }
            let there = std::fs::symlink_metadata(OsStr::from_bytes(&w.path));
            if let Err(e) = there.map(drop).or_else(|e| if is_private(&w.path) { Ok(()) } else { Err(e) }) {
                conflicts.push(Conflict {
                    what: String::from_utf8_lossy(&w.path).into_owned(),
                    why: format!("the job watches it (inotify), and now: {e}"),
                    advice: "put it back and restore again".into(),
                });
            }
        }
        out.insert(r.owner, look);
    }
    Ok(out)
}

/// A restored instance, held until all files are as the job will find them.
#[derive(Debug)]
pub struct Placed {
    pid: i32,
    instance: OwnedFd,
    record: InotifyRecord,
    look: Look,
}

impl Placed {
    /// Adds all watches, under their numbers.
    fn place(cx: &Build<'_>, record: InotifyRecord, look: Look) -> Result<Placed, RestoreError> {
        let (pid, fd) = (record.opened.pid, record.number);
        let err = |what: &str| RestoreError::errno(pid, what.to_owned());
        let pidfd = ckpt_sys::task::pidfd_open(Pid::from_raw(pid)).map_err(err("pidfd_open"))?;
        let instance =
            ckpt_sys::task::pidfd_getfd(pidfd.as_fd(), fd).map_err(err("taking its inotify instance"))?;
        let decoy = Decoy::new().map_err(err("making a file to be watched"))?;
        let mut next = 1;
        for w in &record.watches {
            if w.number < next || w.number > HIGHEST {
                let text = format!("process {pid} has the impossible inotify watch {}", w.number);
                return Err(RestoreError::Record(text));
            }
            // Numbers are given in turn.
            while next < w.number {
                let number = decoy.watch(instance.as_fd()).map_err(err("inotify_add_watch"))?;
                remove_watch(instance.as_fd(), number).map_err(err("inotify_rm_watch"))?;
                next = number + 1;
            }
            let path = crate::resource::saved_file::path_now(cx, &w.path);
            let name = String::from_utf8_lossy(&path).into_owned();
            let what = || format!("watching {name} (fs.inotify.max_user_watches is the limit)");
            let number = add_watch(instance.as_fd(), &path, w.mask | libc::IN_DONT_FOLLOW)
                .map_err(|e| RestoreError::errno(pid, what())(e))?;
            if number != w.number {
                let text = format!("inotify watch {} of process {pid} on {name} became {number}", w.number);
                return Err(RestoreError::Host(text));
            }
            next = number + 1;
        }
        Ok(Placed { pid, instance, record, look })
    }

    /// Takes away the events that the restore has made. What the job can't know by events it is told to look for.
    ///
    /// # Errors
    /// If the queue can't be made to overflow.
    pub fn settle(&self) -> Result<(), RestoreError> {
        let err = |what: &str| RestoreError::errno(self.pid, what.to_owned());
        drain(self.instance.as_fd(), 0).map_err(err("reading its inotify instance"))?;
        // From here on events stay, so nothing that changes now is missed.
        let mut names = MOST_NAMES;
        let mut pairs = self.record.watches.iter().zip(&self.look.states).filter(|(_, s)| s.is_some());
        let changed = pairs.any(|(w, s)| state("/", &w.path, &mut names, false) != *s);
        if self.record.queued_bytes > 0 || self.look.changed || changed {
            Decoy::new()
                .and_then(|d| d.overflow(self.instance.as_fd(), LONGEST_QUEUE))
                .map_err(err("telling it that events were lost (fs.inotify.max_queued_events)"))?;
        }
        Ok(())
    }
}

impl Resource for InotifyResource {
    nothing_to_do! { asks, content, connect }

    fn kind(&self) -> Kind {
        Kind::Inotify
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        f.seen.target == "anon_inode:inotify"
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        let instances: Vec<(&OpenFile, Option<Vec<Seen>>)> = job
            .files
            .values()
            .filter(|f| f.kind == Some(Kind::Inotify))
            .map(|f| (f, parse(&f.seen.info)))
            .collect();
        let all = instances.iter().filter_map(|(_, seen)| seen.as_ref()).flatten();
        let wanted: BTreeMap<Inode, Option<Handle>> = all.map(|s| (s.inode, s.handle.clone())).collect();
        if !wanted.is_empty() {
            watched::find(job, wanted);
        }
        for (f, seen) in instances {
            let Some(seen) = seen else {
                refusals.fd(
                    f.pid,
                    f.fd,
                    "inotify instance that this kernel shows in another way",
                    "not supported",
                );
                continue;
            };
            for s in seen {
                let (number, ino, device) = (s.number, s.inode.number, s.inode.device_name());
                if job.watched.path(s.inode).is_none() {
                    refusals.fd(
                        f.pid,
                        f.fd,
                        format!("inotify watch {number} of inode {ino} on device {device}, whose path is not known"),
                        "a watched file that is deleted must be closed; else start the job with the interceptor, which \
                         records paths, or dump as root",
                    );
                } else if number > HIGHEST {
                    refusals.fd(
                        f.pid,
                        f.fd,
                        format!("inotify watch {number}: numbers above {HIGHEST} are not restored"),
                        "have the program make a new instance",
                    );
                }
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let missing = || DumpError::fd(f.pid, f.fd, "its watches")(Errno::ENODATA);
        let root = cx.job.outside("/");
        let mut names = MOST_NAMES;
        let mut watches = Vec::new();
        let instances = cx.job.files.values().filter(|f| f.kind == Some(Kind::Inotify));
        let all = instances.filter_map(|f| parse(&f.seen.info)).flatten();
        let disturbed: BTreeSet<Inode> = all.filter(|s| is_disturbed(s.mask)).map(|s| s.inode).collect();
        for s in parse(&f.seen.info).ok_or_else(missing)? {
            let path = cx.job.watched.path(s.inode).ok_or_else(missing)?;
            let state =
                if disturbed.contains(&s.inode) { None } else { state(&root, &path, &mut names, true) };
            watches.push(WatchRecord { number: s.number, mask: s.mask, path, state });
        }
        let queued = ckpt_sys::descriptor::readable_bytes(f.steal()?.as_fd());
        let queued = queued.map_err(DumpError::fd(f.pid, f.fd, "FIONREAD"))?;
        if queued > 0 {
            cx.warnings.push(format!(
                "pid {} fd {}: {queued} bytes of inotify events are not read yet; a restored job finds IN_Q_OVERFLOW in \
                 their place",
                f.pid, f.fd
            ));
        }
        let opened = Opened::of(cx.job, f)?;
        cx.put(
            Kind::Inotify,
            VERSION,
            f.id,
            0,
            &InotifyRecord { opened, number: f.fd, watches, queued_bytes: queued as u32 },
        )
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let i: InotifyRecord = decode(record, VERSION)?;
        let one =
            |w: &WatchRecord| format!("{} {} {:#x}", w.number, String::from_utf8_lossy(&w.path), w.mask);
        let all: Vec<String> = i.watches.iter().map(one).collect();
        Ok(format!("inotify, {} bytes queued, watching {}", i.queued_bytes, all.join(", ")))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let i: InotifyRecord = decode(record, VERSION)?;
        let pid = i.opened.pid;
        let fd = cx.open_in(pid, |b| {
            let what = "inotify_init1 (fs.inotify.max_user_instances is the limit)";
            b.call(what, libc::SYS_inotify_init1, &[libc::IN_CLOEXEC as u64])
        })?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let i: InotifyRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        i.opened.finish(cx, fd, false)
    }

    fn arm(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let i: InotifyRecord = decode(record, VERSION)?;
        let (opened, fd) = (i.opened.clone(), i.number);
        // Last: the restore itself opens, reads and writes files.
        let look = cx.plan.watched.get(&record.owner).cloned().unwrap_or_default();
        let placed = Placed::place(cx, i, look)?;
        cx.inotify.push(placed);
        // With O_ASYNC, which tells of every event.
        opened.set_flags(cx, fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo_parse() {
        let text = "pos:\t0\nflags:\t04000\ninotify wd:1f ino:73e94e sdev:fe00000 mask:84000002 ignored_mask:0 \
                    fhandle-bytes:8 fhandle-type:1 f_handle:4ee97300ac06d913\ninotify wd:2 ino:1 sdev:2 mask:fff ignored_mask:0 \n";
        let seen = parse(text).unwrap();
        assert_eq!((seen[0].number, seen[1].number, seen[1].mask), (2, 31, 0x8400_0002));
        assert_eq!(seen[1].inode, Inode { device: 0xfe0_0000, number: 0x73_e94e });
        assert_eq!(seen[1].handle, Some((1, vec![0x4e, 0xe9, 0x73, 0, 0xac, 6, 0xd9, 0x13])));
        assert_eq!(seen[0].handle, None);
        assert!(parse("inotify wd:x\n").is_none());
        assert_eq!(parse("").map(|s| s.len()), Some(0));
    }

    #[test]
    fn a_state_changes_with_what_events_tell_of() {
        let dir = std::env::temp_dir().join(format!("ckpt-inotify-state-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("a"), "1").unwrap();
        let path = dir.as_os_str().as_bytes().to_vec();
        let look = |names: usize| state("/", &path, &mut { names }, true);
        let before = look(9);
        assert!(before.is_some() && look(9) == before && look(1).is_none());
        std::fs::write(dir.join("a"), "22").unwrap();
        assert_ne!(look(9), before);
        let listed = || state("/", &path, &mut 9, false);
        let before = listed();
        std::fs::write(dir.join("b"), "").unwrap();
        assert_ne!(listed(), before);
        std::fs::remove_file(dir.join("b")).unwrap();
        assert_eq!(listed(), before);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(look(9), None);
    }
}
