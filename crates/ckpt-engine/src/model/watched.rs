// SPDX-License-Identifier: MIT OR Apache-2.0
//! Paths of inodes that inotify(7) watches: /proc tells their numbers only.
//!
//! Whatever suggests a path, what is there is compared with the inode before it counts. In this order: what was found
//! before; what the interceptor has recorded; the file handle of fdinfo, which only root of the host may open; paths that
//! the processes show otherwise (directories, open and mapped files, arguments); a bounded search below those.

use super::Job;
use super::process::Process;
use crate::dump::control_word::ControlWord;
use ckpt_abi::interceptor::Control;
use ckpt_abi::recorded;
use ckpt_sys::libc;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Most names that are looked at in a search below directories.
const MOST_NAMES: usize = 50_000;

/// An inode as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inode {
    /// Device of its file system, in the kernel's own encoding.
    pub device: u64,
    /// Its number.
    pub number: u64,
}

impl Inode {
    fn of(m: &Metadata) -> Inode {
        let (major, minor) = (libc::major(m.dev()), libc::minor(m.dev()));
        Inode { device: u64::from(major) << 20 | u64::from(minor), number: m.ino() }
    }

    /// The device as major:minor.
    pub fn device_name(self) -> String {
        format!("{}:{}", self.device >> 20, self.device & 0xf_ffff)
    }
}

/// A file handle: its type and bytes.
pub type Handle = (i32, Vec<u8>);

/// Paths found so far in a dump, as init has them.
#[derive(Debug, Clone, Default)]
pub struct Watched(Arc<Mutex<HashMap<Inode, Vec<u8>>>>);

impl Watched {
    /// The path of an inode, if it was found.
    pub fn path(&self, inode: Inode) -> Option<Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&inode).cloned()
    }
}

/// The search for the paths of some inodes.
struct Search<'a> {
    job: &'a Job,
    wanted: BTreeMap<Inode, Option<Handle>>,
    found: HashMap<Inode, Vec<u8>>,
}

/// Finds the paths of `wanted`, given with the handles that fdinfo shows; [`Watched::path`] then has them. Those for which there is
/// none any more are forgotten.
pub fn find(job: &Job, wanted: BTreeMap<Inode, Option<Handle>>) {
    let before = job.watched.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut search = Search { job, wanted, found: HashMap::new() };
    let known: Vec<Vec<u8>> = search.wanted.keys().filter_map(|i| before.get(i).cloned()).collect();
    known.iter().for_each(|path| search.look_at(&job.outside("/"), path));
    for step in [Search::recorded, Search::handles, Search::shown, Search::below] {
        if !search.wanted.is_empty() {
            step(&mut search);
        }
    }
    *job.watched.0.lock().unwrap_or_else(PoisonError::into_inner) = search.found;
}

/// A path as init has it, of a file opened by ckpt itself; none if it has none.
fn path_of(file: impl Into<File>) -> Option<(Vec<u8>, Metadata)> {
    let file: File = file.into();
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = std::fs::read_link(link).ok()?.as_os_str().as_bytes().to_vec();
    let m = file.metadata().ok()?;
    (path.starts_with(b"/") && m.nlink() > 0).then_some((path, m))
}

impl Search<'_> {
    fn take(&mut self, path: Vec<u8>, m: &Metadata) -> bool {
        let inode = Inode::of(m);
        let is_wanted = self.wanted.remove(&inode).is_some();
        if is_wanted {
            self.found.insert(inode, path);
        }
        is_wanted
    }

    /// Looks what is at a path below `root`: what a symbolic link leads to, and the link itself.
    fn look_at(&mut self, root: &str, path: &[u8]) {
        let Ok(root) = File::open(root) else { return };
        for flags in [OFlag::empty(), OFlag::O_NOFOLLOW] {
            let how = OpenHow::new()
                .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flags)
                .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
            let opened = openat2(root.as_fd(), Path::new(OsStr::from_bytes(path)), how);
            let Some((path, m)) = opened.ok().and_then(path_of) else { continue };
            if self.take(path, &m) {
                return;
            }
        }
    }

    fn look_at_all(&mut self, p: &Process, paths: impl IntoIterator<Item = Vec<u8>>) {
        for path in paths {
            if self.wanted.is_empty() {
                return;
            }
            self.look_at(&format!("/proc/{}/root", p.host), &path);
        }
    }

    /// What the interceptor has recorded.
    fn recorded(&mut self) {
        for p in self.job.live() {
            let table = recorded_table(p, 0, recorded::PATH_SLOTS * recorded::PATH_SLOT_BYTES);
            let paths: Vec<Vec<u8>> =
                recorded::paths(&table.unwrap_or_default()).map(<[u8]>::to_vec).collect();
            self.look_at_all(p, paths);
        }
    }

    /// By handle, from each mount of the file system.
    fn handles(&mut self) {
        let text = std::fs::read_to_string(format!("/proc/{}/mountinfo", self.job.info.init));
        let text = text.unwrap_or_default();
        let wanted: Vec<(Inode, Handle)> =
            self.wanted.iter().filter_map(|(i, h)| Some((*i, h.clone()?))).collect();
        for (inode, (kind, handle)) in wanted {
            let name = inode.device_name();
            let mounts = text.lines().filter_map(|l| {
                let words: Vec<&str> = l.split(' ').collect();
                (*words.get(2)? == name).then(|| words.get(4).map(|w| (*w).to_owned()))?
            });
            for mount in mounts {
                let opened = File::open(self.job.outside(&mount))
                    .ok()
                    .and_then(|m| ckpt_sys::inotify::open_by_handle(m.as_fd(), kind, &handle).ok());
                // The path is that of a name in the cache, which need not be one here.
                let Some((path, _)) = opened.and_then(path_of) else { continue };
                self.look_at(&self.job.outside("/"), &path);
                if !self.wanted.contains_key(&inode) {
                    break;
                }
            }
        }
    }

    /// Paths that the processes name or have open.
    fn starts(&self) -> Vec<(&Process, Vec<u8>)> {
        // The job's own, where it knows its way.
        let first = self.job.live().next();
        let mut out: Vec<(&Process, Vec<u8>)> =
            first.map(|p| (p, b"/dev/shm".to_vec())).into_iter().collect();
        for p in self.job.live() {
            let cwd = link(p, "cwd");
            let words = std::fs::read(format!("/proc/{}/cmdline", p.host)).unwrap_or_default();
            // DIR, --option=DIR; relative ones are below the working directory.
            for word in words.split(|b| *b == 0).filter(|w| !w.is_empty() && w.len() < 4096) {
                let path = word.splitn(2, |b| *b == b'=').last().unwrap_or(word);
                out.push((p, if path.starts_with(b"/") { path.to_vec() } else { [&cwd, path].join(&b'/') }));
            }
            out.push((p, cwd));
            let opened =
                p.descriptors.iter().filter_map(|d| self.job.files.get(&d.file)).map(|f| &f.seen.link);
            out.extend(opened.filter(|l| l.starts_with(b"/")).map(|l| (p, l.clone())));
        }
        out
    }

    /// Those paths, and what is mapped, and the directories that all these are in.
    fn shown(&mut self) {
        let mut shown: Vec<(String, Vec<u8>)> =
            self.starts().into_iter().map(|(p, s)| (root_of(p), s)).collect();
        for p in self.job.live() {
            let mapped = p.vmas.iter().filter(|v| v.is_file() && v.name.starts_with('/'));
            let mapped = mapped.map(|v| v.name.as_bytes().to_vec());
            shown.extend(mapped.chain([link(p, "root"), link(p, "exe")]).map(|path| (root_of(p), path)));
        }
        let mut seen = BTreeSet::new();
        for (root, path) in shown {
            let mut at: &[u8] = &path;
            loop {
                if self.wanted.is_empty() || !seen.insert((root.clone(), at.to_vec())) {
                    break;
                }
                self.look_at(&root, at);
                let Some(slash) = at.iter().rposition(|b| *b == b'/') else { break };
                at = &at[..slash];
            }
        }
    }

    /// Names below directories that the processes name or have open, level by level.
    fn below(&mut self) {
        let mut queue: VecDeque<(usize, String)> = VecDeque::new();
        let mut seen = BTreeSet::new();
        for (p, path) in self.starts() {
            let path = Path::new(OsStr::from_bytes(&path));
            let rest = path.strip_prefix("/").unwrap_or(path);
            let outside = Path::new(&root_of(p)).join(rest);
            let dir = if outside.is_dir() { Some(outside.as_path()) } else { outside.parent() };
            let Some(dir) = dir.and_then(Path::to_str) else { continue };
            // All of a host is too much.
            if dir.trim_end_matches('/') != root_of(p) && seen.insert(dir.to_owned()) {
                queue.push_back((0, dir.to_owned()));
            }
        }
        let devices: BTreeSet<u64> = self.wanted.keys().map(|i| i.device).collect();
        let mut visited = BTreeSet::new();
        let mut names = 0;
        while let Some((depth, dir)) = queue.pop_front() {
            // Nothing is found twice, nor on file systems that nobody asks about.
            let Ok(m) = std::fs::metadata(&dir) else { continue };
            let inode = Inode::of(&m);
            if !devices.contains(&inode.device) && depth > 0 || !visited.insert(inode) {
                continue;
            }
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                names += 1;
                if self.wanted.is_empty() || names > MOST_NAMES {
                    return;
                }
                let Ok(kind) = entry.file_type() else { continue };
                let Some(path) = entry.path().to_str().map(str::to_owned) else { continue };
                if self.wanted.keys().any(|i| i.number == entry.ino()) {
                    let opened =
                        File::options().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(&path);
                    if let Some((path, m)) = opened.ok().and_then(path_of) {
                        self.take(path, &m);
                    }
                }
                if kind.is_dir() {
                    queue.push_back((depth + 1, path));
                }
            }
        }
    }
}

/// Target of a link in /proc/pid; empty if it can't be read.
fn link(p: &Process, name: &str) -> Vec<u8> {
    let link = std::fs::read_link(format!("/proc/{}/{name}", p.host)).unwrap_or_default();
    link.into_os_string().into_encoded_bytes()
}

fn root_of(p: &Process) -> String {
    format!("/proc/{}/root", p.host)
}

/// A table that the interceptor keeps in a process, announced by the words of [`Control::watches`] from `index` on: address and
/// length. Nothing in it is trusted.
pub fn recorded_table(p: &Process, index: usize, most_bytes: usize) -> Option<Vec<u8>> {
    table_of(&ControlWord::find(p.host)?, index, most_bytes)
}

/// As [`recorded_table`], of a process whose control word was found.
pub fn table_of(control: &ControlWord, index: usize, most_bytes: usize) -> Option<Vec<u8>> {
    let word = |i: usize| control.read_u64(offset_of!(Control, watches) + 8 * i).ok();
    if word(2)? != recorded::LAYOUT {
        return None;
    }
    let (address, length) = (word(index)?, usize::try_from(word(index + 1)?).ok()?);
    if address == 0 || length > most_bytes {
        return None;
    }
    let mut table = vec![0; length];
    control.read_memory(address, &mut table).ok().map(|()| table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_those_of_the_kernel() {
        let m = std::fs::metadata("/proc/self/exe").unwrap();
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let name = Inode::of(&m).device_name();
        assert!(text.lines().any(|l| l.split(' ').nth(2) == Some(&name)), "{name}\n{text}");
    }
}
