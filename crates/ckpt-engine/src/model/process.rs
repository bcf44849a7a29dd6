// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process and its threads, read from /proc (proc_pid_stat(5), proc_pid_status(5)).

use super::continued::Continued;
use super::file::Descriptor;
use super::memory::{self, Vma};
use crate::error::DumpError;
use ckpt_sys::Pid;
use ckpt_sys::arch::Registers;
use ckpt_sys::inject::Padding;
use ckpt_sys::ptrace::RseqConfiguration;
use procfs::FromRead;
use procfs::process::{Stat, Status};
use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

/// A process, told from another that has its pid later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct ProcessId {
    /// Its pid, as the job sees it.
    pub pid: i32,
    /// When it started, in clock ticks (proc_pid_stat(5)).
    pub started: u64,
}

impl ProcessId {
    /// That of a process.
    pub fn of(p: &Process) -> ProcessId {
        ProcessId { pid: p.pid, started: p.stat.starttime }
    }
}

/// A thread.
#[derive(Debug)]
pub struct Task {
    /// Its id, as the job sees it.
    pub tid: i32,
    /// Its id, as ckpt sees it.
    pub host: Pid,
    /// Text of its /proc/pid/task/tid/status.
    pub status: Vec<u8>,
    /// Its state when frozen.
    pub frozen: Option<Frozen>,
    /// It has children of its own.
    pub is_parent: bool,
    /// Its files, if they have been kept open.
    files: Option<TaskFiles>,
}

/// Files of a thread that are read while the job runs and again when it stands still. To open them takes longer than to read them, which
/// shows what is so at that time: so they are kept open. They are of the thread that they were opened for, not of another that has
/// its id by then.
#[derive(Debug)]
struct TaskFiles {
    status: File,
    children: File,
}

impl TaskFiles {
    fn open(host: i32, tid: i32) -> std::io::Result<TaskFiles> {
        let open = |name: &str| File::open(format!("/proc/{host}/task/{tid}/{name}"));
        Ok(TaskFiles { status: open("status")?, children: open("children")? })
    }

    /// The text of its status, and its children.
    fn read(&self) -> std::io::Result<(Vec<u8>, Vec<i32>)> {
        // The first one fails if it is gone, the other is empty then.
        Ok((read_whole(&self.status)?, pids_in(&read_whole(&self.children)?)))
    }
}

/// Of how many more threads the files are kept open.
#[derive(Debug)]
pub struct Keep(u64);

impl Keep {
    /// Of none.
    pub fn none() -> Keep {
        Keep(0)
    }

    /// Of so many that a quarter of the descriptors that ckpt may have are enough.
    pub fn some() -> Keep {
        let limit = ckpt_sys::task::limit(Pid::this(), ckpt_sys::libc::RLIMIT_NOFILE);
        Keep(limit.map_or(0, |(soft, _)| soft / 8))
    }

    fn one_more(&mut self) -> bool {
        let left = self.0.checked_sub(1);
        self.0 = left.unwrap_or(0);
        left.is_some()
    }
}

/// What a stop found.
#[derive(Debug, Clone)]
pub struct Frozen {
    /// General registers.
    pub registers: Registers,
    /// Blocked signals.
    pub mask: u64,
    /// No deliverable signal is pending.
    pub quiet: bool,
    /// Its registered rseq area.
    pub rseq: Option<RseqConfiguration>,
    /// The CPU that is noted there: where it last was in user mode.
    pub cpu: Option<usize>,
    /// What it goes on with.
    pub continued: Continued,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its pid, as the job sees it.
    pub pid: i32,
    /// Its pid, as ckpt sees it.
    pub host: Pid,
    /// Its parent, 1 for the job's init.
    pub ppid: i32,
    /// Its process group.
    pub pgid: i32,
    /// Its process group, as ckpt sees it.
    pub host_pgid: i32,
    /// Its session.
    pub sid: i32,
    /// Wait status of a zombie.
    pub zombie: Option<i32>,
    /// Stopped by job control; known only when frozen, as the state that /proc shows is that of the tracing stop.
    pub stopped: bool,
    /// /proc/pid/stat.
    pub stat: Stat,
    /// /proc/pid/status.
    pub status: Status,
    /// Its threads, the leader first.
    pub threads: Vec<Task>,
    /// A thread of it had ended when it was to be read.
    pub vanished: bool,
    /// Children of all its threads, as ckpt sees them.
    pub children: Vec<i32>,
    /// Its mappings, sorted.
    pub vmas: Vec<Vma>,
    /// The flags of its mappings are those that they had before it was frozen, where it had them.
    pub assumed_flags: bool,
    /// The text of its maps file, if `vmas` are what it says.
    maps: Vec<u8>,
    /// Its descriptors, sorted by number.
    pub descriptors: Vec<Descriptor>,
    /// The fdinfo texts that tell of locks, by descriptor: those of a file are shown by each of its processes in another way.
    pub locks: Vec<(i32, String)>,
    /// It is not dumpable and its descriptors can't be seen; only when frozen it is made dumpable.
    pub closed: bool,
    /// PR_GET_DUMPABLE of a process that has been made dumpable.
    pub dumpable: Option<u32>,
}

/// Bytes of a file of /proc, most of which are short: in one read, without asking for a length that it doesn't have.
///
/// # Errors
/// What reading gives.
pub fn read_proc(path: impl AsRef<Path>) -> std::io::Result<Vec<u8>> {
    read_whole(&File::open(path)?)
}

/// All bytes of a file of /proc, from its start.
fn read_whole(file: &File) -> std::io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; 4096];
    let mut used = 0;
    loop {
        match file.read_at(&mut bytes[used..], used as u64)? {
            0 => break,
            n => used += n,
        }
        if used == bytes.len() {
            bytes.resize(2 * used, 0);
        }
    }
    bytes.truncate(used);
    // Fresh memory takes longer than a copy within it, and of some files there are many.
    bytes.shrink_to_fit();
    Ok(bytes)
}

/// As [`read_proc`], of one that is text.
///
/// # Errors
/// What reading gives; InvalidData for what is no UTF-8.
pub fn read_proc_text(path: impl AsRef<Path>) -> std::io::Result<String> {
    String::from_utf8(read_proc(path)?).map_err(|e| std::io::Error::new(ErrorKind::InvalidData, e))
}

/// A value in the text of a status file (proc_pid_status(5)), all of which but the first line, the name, is ASCII.
pub fn status_value<'a>(status: &'a [u8], key: &str) -> Option<&'a str> {
    let name_ends = status.iter().position(|b| *b == b'\n')?;
    let text = std::str::from_utf8(&status[name_ends..]).ok()?;
    text.match_indices(key).find_map(|(at, _)| {
        let value = text[at + key.len()..].strip_prefix(':')?;
        text[..at].ends_with('\n').then(|| value.split_once('\n').map_or(value, |(line, _)| line).trim())
    })
}

/// Children of all threads of a process, as ckpt sees them; none if it is gone.
pub fn children(host: i32) -> Vec<i32> {
    threads_and_children(host).1
}

/// Threads of a process, and the children of all of them, as ckpt sees them; none if it is gone.
pub fn threads_and_children(host: i32) -> (Vec<i32>, Vec<i32>) {
    let threads = threads(host).unwrap_or_default();
    let children = threads.iter().flat_map(|tid| children_of_thread(host, *tid)).collect();
    (threads, children)
}

/// Threads of a process, as ckpt sees them.
///
/// # Errors
/// If it is gone.
pub fn threads(host: i32) -> std::io::Result<Vec<i32>> {
    let dir = std::fs::read_dir(format!("/proc/{host}/task"))?;
    Ok(dir.flatten().filter_map(|t| t.file_name().to_str()?.parse().ok()).collect())
}

/// Children of one thread of a process, as ckpt sees them; none if it is gone.
pub fn children_of_thread(host: i32, tid: i32) -> Vec<i32> {
    pids_in(&read_proc(format!("/proc/{host}/task/{tid}/children")).unwrap_or_default())
}

fn pids_in(list: &[u8]) -> Vec<i32> {
    std::str::from_utf8(list).unwrap_or_default().split_whitespace().filter_map(|n| n.parse().ok()).collect()
}

fn last(v: Option<&Vec<i32>>) -> i32 {
    v.and_then(|v| v.last().copied()).unwrap_or(0)
}

impl Process {
    /// Reads one process; `None` if it is gone. `inner` maps pids as ckpt sees them to those inside. If it was seen `before`
    /// the files of its threads may be open, and with `assume` the flags of its mappings are, see [`Process::assumed_flags`].
    ///
    /// # Errors
    /// What reading /proc gives.
    pub fn observe(
        host: i32,
        inner: &HashMap<i32, i32>,
        before: Option<&Process>,
        assume: bool,
        keep: &mut Keep,
    ) -> Result<Option<Process>, DumpError> {
        // While one of its other threads executes a program, the list of its threads may begin with no or another thread.
        const TRIES: usize = 100;
        let is_whole = |p: &Process| p.threads.first().is_some_and(|t| t.host == p.host);
        let mut found = Self::read(host, inner, before, assume, keep);
        for _ in 0..TRIES {
            if !found.as_ref().is_ok_and(|p| !is_whole(p)) {
                break;
            }
            std::thread::yield_now();
            found = Self::read(host, inner, before, assume, keep);
        }
        match found {
            Ok(p) if !is_whole(&p) => {
                let why = std::io::Error::new(ErrorKind::WouldBlock, "one of its threads executes a program");
                Err(DumpError::process(host, "reading its threads")(why))
            }
            Ok(p) => Ok(Some(p)),
            Err(_) if !std::path::Path::new(&format!("/proc/{host}")).exists() => Ok(None),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound) => Ok(None),
            Err(e) => Err(DumpError::process(host, "reading /proc")(e)),
        }
    }

    fn read(
        host: i32,
        inner: &HashMap<i32, i32>,
        before: Option<&Process>,
        assume: bool,
        keep: &mut Keep,
    ) -> std::io::Result<Process> {
        let stat = Stat::from_read(read_proc(format!("/proc/{host}/stat"))?.as_slice()).map_err(io)?;
        let status_text = read_proc(format!("/proc/{host}/status"))?;
        let status = Status::from_read(status_text.as_slice()).map_err(io)?;
        let pid = last(status.nspid.as_ref());
        let zombie = matches!(stat.state, 'Z' | 'X').then(|| stat.exit_code.unwrap_or(0));
        let kept = before.into_iter().flat_map(|b| &b.threads);
        let kept: HashMap<Pid, &TaskFiles> = kept.filter_map(|t| Some((t.host, t.files.as_ref()?))).collect();
        let (mut tasks, mut children, mut vanished) = (Vec::new(), Vec::new(), false);
        for tid in threads(host)? {
            let mut files = None;
            let texts = match kept.get(&Pid::from_raw(tid)).and_then(|f| f.read().ok()) {
                Some(texts) => Ok(texts),
                // That of the leader is that of the process.
                None if tid == host => Ok((status_text.clone(), children_of_thread(host, tid))),
                None => TaskFiles::open(host, tid).and_then(|f| files.insert(f).read()),
            };
            let (status, children_now) = match texts {
                Ok(texts) => texts,
                Err(e)
                    if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(ckpt_sys::libc::ESRCH) =>
                {
                    vanished = true;
                    continue;
                }
                Err(e) => return Err(e),
            };
            let files = files.filter(|_| keep.one_more());
            let ids = status_value(&status, "NSpid").unwrap_or_default();
            let Some(inside) = ids.split_whitespace().last().and_then(|s| s.parse().ok()) else { continue };
            let is_parent = !children_now.is_empty();
            children.extend(children_now);
            tasks.push(Task {
                tid: inside,
                host: Pid::from_raw(tid),
                status,
                frozen: None,
                is_parent,
                files,
            });
        }
        tasks.sort_by_key(|t| (t.host.as_raw() != host, t.tid));
        // What is locked in memory, or absent from a fork, only the process itself shows.
        let before = before.filter(|b| {
            assume
                && b.stat.starttime == stat.starttime
                && status.vmlck == Some(0)
                && !b.vmas.iter().any(|v| v.has("dc"))
        });
        let (vmas, maps) = match before {
            _ if zombie.is_some() => (Vec::new(), Vec::new()),
            Some(b) => Self::mappings_since(host, b)?,
            None => {
                let (maps, vmas) = (read_proc(format!("/proc/{host}/maps"))?, memory::read_smaps(host)?);
                let lines = memory::parse_maps(&maps)?;
                let same =
                    lines.len() == vmas.len() && lines.iter().zip(&vmas).all(|(a, b)| a.has_line_of(b));
                (vmas, if same { maps } else { Vec::new() })
            }
        };
        Ok(Process {
            pid,
            host: Pid::from_raw(host),
            ppid: inner.get(&status.ppid).copied().unwrap_or(1),
            pgid: last(status.nspgid.as_ref()),
            host_pgid: stat.pgrp,
            sid: last(status.nssid.as_ref()),
            zombie,
            stopped: false,
            stat,
            status,
            threads: tasks,
            vanished,
            children,
            vmas,
            assumed_flags: before.is_some() && zombie.is_none(),
            maps,
            descriptors: Vec::new(),
            locks: Vec::new(),
            closed: false,
            dumpable: None,
        })
    }

    /// Its mappings from the maps file alone, which is cheap: smaps walks through all memory.
    fn mappings_since(host: i32, before: &Process) -> std::io::Result<(Vec<Vma>, Vec<u8>)> {
        let maps = read_proc(format!("/proc/{host}/maps"))?;
        if maps == before.maps {
            return Ok((before.vmas.clone(), maps));
        }
        let mut vmas = memory::parse_maps(&maps)?;
        for v in &mut vmas {
            let old = before.vmas.binary_search_by_key(&v.start, |o| o.start).map(|i| &before.vmas[i]);
            if let Ok(old) = old
                && old.has_line_of(v)
            {
                *v = old.clone();
            }
        }
        Ok((vmas, maps))
    }

    /// Whether its files in /proc are closed to us because it is not dumpable: they belong to the host's root then.
    pub fn is_closed_now(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let dir = format!("/proc/{}/fd", self.host);
        let denied = |e: std::io::Error| e.kind() == ErrorKind::PermissionDenied;
        std::fs::metadata(&dir).is_ok_and(|m| m.uid() != self.status.euid)
            && std::fs::read_dir(&dir).is_err_and(denied)
    }

    /// Whether one of its threads sleeps uninterruptibly, as the parent of a vfork does.
    pub fn waits_in_kernel(&self) -> bool {
        let state = |t: &Task| status_value(&t.status, "State").is_some_and(|s| s.starts_with('D'));
        self.threads.iter().any(state)
    }

    /// The vDSO's mapping.
    pub fn vdso(&self) -> Option<&Vma> {
        self.vmas.iter().find(|v| v.name == "[vdso]")
    }

    /// Where code may be written: behind its vDSO, if that is like our own.
    pub fn padding(&self) -> Option<Padding> {
        let v = self.vdso()?;
        padding_behind(v.start..v.end)
    }

    /// A hole of `bytes` in which nothing is mapped, clear of growing stacks.
    pub fn hole(&self, bytes: u64) -> Option<u64> {
        memory::hole(self.vmas.iter().map(|v| (v.start, v.end, v.grows_down())), bytes)
    }
}

/// Our own vDSO: bounds, and the padding behind it. Looked at once.
fn own() -> Option<(u64, u64, Padding)> {
    use std::sync::OnceLock;
    static OWN: OnceLock<Option<(u64, u64, Padding)>> = OnceLock::new();
    *OWN.get_or_init(|| {
        // Not smaps, which looks at all of our own memory.
        let v = memory::vdso_of(std::process::id() as i32)?;
        Some((v.start, v.end, Padding::find(v.clone(), v).ok()?))
    })
}

/// Bounds of our own vDSO, if it is of that length; empty otherwise.
pub fn own_vdso(bytes: u64) -> std::ops::Range<u64> {
    own().filter(|(s, e, _)| e - s == bytes).map_or(0..0, |(s, e, _)| s..e)
}

/// Where code may be written behind a vDSO, if it is like our own.
pub fn padding_behind(vdso: std::ops::Range<u64>) -> Option<Padding> {
    let (start, _, Padding { start: first, end }) =
        own().filter(|(s, e, _)| e - s == vdso.end - vdso.start)?;
    let there = |at: u64| at - start + vdso.start;
    Some(Padding { start: there(first), end: there(end) }).filter(|p| p.start < p.end)
}

/// procfs errors as I/O errors.
fn io(e: procfs::ProcError) -> std::io::Error {
    match e {
        procfs::ProcError::NotFound(_) => std::io::Error::from(ErrorKind::NotFound),
        procfs::ProcError::PermissionDenied(_) => std::io::Error::from(ErrorKind::PermissionDenied),
        procfs::ProcError::Io(e, _) => e,
        e => std::io::Error::other(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn values_are_those_of_lines_whatever_the_name() {
        let status =
            b"Name:\tUid:\\nUid:\xe4\nTgid:\t7\nNStgid:\t7\t1\nGroups:\t \nSigPnd:\t00000000000000ff\n";
        assert_eq!(status_value(status, "Tgid"), Some("7"));
        assert_eq!(status_value(status, "NStgid"), Some("7\t1"));
        assert_eq!(status_value(status, "gid"), None);
        assert_eq!(status_value(status, "Uid"), None);
        assert_eq!(status_value(status, "Groups"), Some(""));
        assert_eq!(status_value(status, "SigPnd"), Some("00000000000000ff"));
    }

    #[test]
    fn kept_files_tell_what_is_so_now_and_of_their_own_thread() {
        let (rename, renamed) = (channel::<()>(), channel());
        let thread = std::thread::spawn(move || {
            let name = |name: &str| std::fs::write("/proc/thread-self/comm", name).unwrap();
            name("first");
            renamed.0.send(ckpt_sys::task::this()).unwrap();
            rename.1.recv().unwrap();
            name("second");
            renamed.0.send(ckpt_sys::task::this()).unwrap();
            rename.1.recv().unwrap();
        });
        let tid = renamed.1.recv().unwrap();
        let me = std::process::id() as i32;
        let look = |before: Option<&Process>, mut keep: Keep| {
            Process::observe(me, &HashMap::new(), before, false, &mut keep).unwrap().unwrap()
        };
        fn of(p: &Process, tid: Pid) -> Option<&Task> {
            p.threads.iter().find(|t| t.host == tid)
        }
        let before = look(None, Keep::some());
        let first = of(&before, tid).unwrap();
        assert_eq!(status_value(&first.status, "Pid"), Some(tid.to_string().as_str()));
        assert!(first.status.starts_with(b"Name:\tfirst\n") && first.files.is_some());
        assert!(of(&look(None, Keep::none()), tid).unwrap().files.is_none());
        rename.0.send(()).unwrap();
        renamed.1.recv().unwrap();
        assert!(of(&look(Some(&before), Keep::none()), tid).unwrap().status.starts_with(b"Name:\tsecond\n"));
        rename.0.send(()).unwrap();
        thread.join().unwrap();
        // It may be seen for a moment after the join.
        while Path::new(&format!("/proc/{me}/task/{tid}")).exists() {
            std::thread::yield_now();
        }
        assert!(first.files.as_ref().unwrap().read().is_err());
        assert!(of(&look(Some(&before), Keep::none()), tid).is_none());
    }
}
