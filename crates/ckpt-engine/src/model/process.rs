// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process and its threads, read from /proc (proc_pid_stat(5), proc_pid_status(5)).

use super::file::Descriptor;
use super::memory::{self, Vma};
use crate::error::DumpError;
use ckpt_sys::Pid;
use ckpt_sys::arch::Registers;
use ckpt_sys::inject::Padding;
use procfs::FromRead;
use procfs::process::{Stat, Status};
use std::collections::HashMap;
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
    use std::io::Read;
    let mut file = std::fs::File::open(path)?;
    let mut bytes = vec![0; 4096];
    let mut used = 0;
    loop {
        match file.read(&mut bytes[used..])? {
            0 => break,
            n => used += n,
        }
        if used == bytes.len() {
            bytes.resize(2 * used, 0);
        }
    }
    bytes.truncate(used);
    Ok(bytes)
}

/// As [`read_proc`], of one that is text.
///
/// # Errors
/// What reading gives; InvalidData for what is no UTF-8.
pub fn read_proc_text(path: impl AsRef<Path>) -> std::io::Result<String> {
    String::from_utf8(read_proc(path)?).map_err(|e| std::io::Error::new(ErrorKind::InvalidData, e))
}

/// Children of all threads of a process, as ckpt sees them; none if it is gone.
pub fn children(host: i32) -> Vec<i32> {
    threads_and_children(host).1
}

/// Threads of a process, and the children of all of them, as ckpt sees them; none if it is gone.
pub fn threads_and_children(host: i32) -> (Vec<i32>, Vec<i32>) {
    let (mut threads, mut all) = (Vec::new(), Vec::new());
    let Ok(dir) = std::fs::read_dir(format!("/proc/{host}/task")) else { return (threads, all) };
    for t in dir.flatten() {
        threads.extend(t.file_name().to_str().and_then(|t| t.parse::<i32>().ok()));
        let text = read_proc(t.path().join("children")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        all.extend(text.split_whitespace().filter_map(|n| n.parse::<i32>().ok()));
    }
    (threads, all)
}

fn last(v: Option<&Vec<i32>>) -> i32 {
    v.and_then(|v| v.last().copied()).unwrap_or(0)
}

impl Process {
    /// Reads one process; `None` if it is gone. `inner` maps pids as ckpt sees them to those inside. If it was seen `before`
    /// the flags of its mappings may be assumed, see [`Process::assumed_flags`].
    ///
    /// # Errors
    /// What reading /proc gives.
    pub fn observe(
        host: i32,
        inner: &HashMap<i32, i32>,
        before: Option<&Process>,
    ) -> Result<Option<Process>, DumpError> {
        match Self::read(host, inner, before) {
            Ok(p) => Ok(Some(p)),
            Err(_) if !std::path::Path::new(&format!("/proc/{host}")).exists() => Ok(None),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound) => Ok(None),
            Err(e) => Err(DumpError::process(host, "reading /proc")(e)),
        }
    }

    fn read(host: i32, inner: &HashMap<i32, i32>, before: Option<&Process>) -> std::io::Result<Process> {
        let stat = Stat::from_read(read_proc(format!("/proc/{host}/stat"))?.as_slice()).map_err(io)?;
        let status_text = read_proc(format!("/proc/{host}/status"))?;
        let status = Status::from_read(status_text.as_slice()).map_err(io)?;
        let pid = last(status.nspid.as_ref());
        let zombie = matches!(stat.state, 'Z' | 'X').then(|| stat.exit_code.unwrap_or(0));
        let (mut threads, mut children) = (Vec::new(), Vec::new());
        for t in std::fs::read_dir(format!("/proc/{host}/task"))?.flatten() {
            let Some(tid) = t.file_name().to_str().and_then(|s| s.parse::<i32>().ok()) else { continue };
            // That of the leader is that of the process.
            let status =
                if tid == host { Ok(status_text.clone()) } else { read_proc(t.path().join("status")) };
            let Ok(status) = status else { continue };
            let text = String::from_utf8_lossy(&status);
            let ns = text.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap_or_default();
            let Some(inside) = ns.split_whitespace().last().and_then(|s| s.parse().ok()) else { continue };
            let list = read_proc(t.path().join("children")).unwrap_or_default();
            let list = String::from_utf8_lossy(&list).into_owned();
            children.extend(list.split_whitespace().filter_map(|n| n.parse::<i32>().ok()));
            threads.push(Task { tid: inside, host: Pid::from_raw(tid), status, frozen: None });
        }
        threads.sort_by_key(|t| (t.host.as_raw() != host, t.tid));
        // What is locked in memory, or absent from a fork, only the process itself shows.
        let before = before.filter(|b| {
            b.stat.starttime == stat.starttime
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
            threads,
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
        const STATE: &[u8] = b"\nState:\tD";
        self.threads.iter().any(|t| t.status.windows(STATE.len()).any(|w| w == STATE))
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
