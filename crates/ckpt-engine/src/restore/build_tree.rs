// SPDX-License-Identifier: MIT OR Apache-2.0
//! Build: blank tasks with the old ids, parents, sessions and process groups, and the means to work in them.
//!
//! A session can't be joined, only inherited: each process is cloned by a task that is in the right one at that moment.
//! Where the leader of a session or group is gone, a ghost stands in until the tree is complete.

use super::RestoreRequest;
use super::page_server::PageServer;
use super::plan::Plan;
use super::read::Image;
use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::decode;
use crate::resource::fd::table::FdTableRecord;
use crate::resource::process::ProcessRecord;
use ckpt_sys::area::{Area, Batch, CallId, RemoteError};
use ckpt_sys::{Errno, Pid, libc, ptrace};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const F_DUPFD_CLOEXEC: u64 = libc::F_DUPFD_CLOEXEC as u64;
const CLONE_PARENT: u64 = libc::CLONE_PARENT as u64;

/// A restore under way.
#[derive(Debug)]
pub struct Build<'a> {
    /// What init provides.
    pub request: &'a RestoreRequest,
    /// The image.
    pub image: &'a Arc<Image>,
    /// What was planned.
    pub plan: Plan,
    /// The shared area of remote calls.
    pub area: Area,
    /// The processes to be.
    pub processes: BTreeMap<i32, ProcessRecord>,
    /// Rebuilt open file descriptions: where a descriptor for it is kept (pid, number).
    pub files: BTreeMap<u64, (i32, i32)>,
    /// Rebuilt shared objects: where a descriptor for it is kept.
    pub objects: BTreeMap<u64, (i32, i32)>,
    /// Pipes being rebuilt, by number: where a read-write end is kept.
    pub pipes: BTreeMap<u64, (i32, i32)>,
    /// Ends of socket pairs being rebuilt, by inode number: where they are kept.
    pub sockets: BTreeMap<u64, (i32, i32)>,
    /// Rebuilt inotify instances.
    pub inotify: Vec<crate::resource::fd::inotify::Placed>,
    /// Files to be put back.
    pub rollbacks: super::rollback::Rollbacks,
    /// First descriptor number of each process that its table doesn't use.
    free_numbers: BTreeMap<i32, i32>,
    /// What the person who restores should know.
    pub warnings: Vec<String>,
    /// Who fetches memory that is left in the image.
    pub page_server: Option<PageServer>,
    /// Why there is none although the restore was to be lazy.
    pub eager_because: Option<String>,
    ghosts: BTreeSet<i32>,
}

struct Tree {
    /// Session each created task is in; `NONE` for that of init.
    session: BTreeMap<i32, i32>,
    /// Parent, 1 for init.
    parent: BTreeMap<i32, i32>,
    temporary: i32,
}

const NONE: i32 = 0;

impl<'a> Build<'a> {
    /// Maps the area.
    ///
    /// # Errors
    /// If its place is taken.
    pub fn new(
        request: &'a RestoreRequest,
        image: &'a Arc<Image>,
        plan: Plan,
    ) -> Result<Build<'a>, RestoreError> {
        let area =
            Area::map(plan.hole).map_err(RestoreError::errno(1, "mapping the area for remote calls"))?;
        let mut processes = BTreeMap::new();
        for r in image.of_kind(Kind::Process) {
            let p: ProcessRecord = decode(r, crate::resource::process::VERSION)?;
            processes.insert(p.pid, p);
        }
        Ok(Build {
            request,
            image,
            area,
            processes,
            files: BTreeMap::new(),
            objects: BTreeMap::new(),
            pipes: BTreeMap::new(),
            sockets: BTreeMap::new(),
            inotify: Vec::new(),
            free_numbers: plan.free_numbers.clone(),
            plan,
            warnings: Vec::new(),
            rollbacks: super::rollback::Rollbacks::default(),
            page_server: None,
            eager_because: None,
            ghosts: BTreeSet::new(),
        })
    }

    /// Runs a batch in a process.
    ///
    /// # Errors
    /// The first call that failed.
    pub fn run<T>(
        &mut self,
        tid: i32,
        fill: impl FnOnce(&mut Batch<'_>) -> T,
    ) -> Result<(Vec<u64>, T), RestoreError> {
        let mut b = self.area.batch();
        let t = fill(&mut b);
        Ok((b.run(Pid::from_raw(tid)).map_err(|e| explained(tid, e))?, t))
    }

    /// Runs one call in a task.
    ///
    /// # Errors
    /// If it fails.
    pub fn call(&mut self, tid: i32, what: &str, nr: i64, args: &[u64]) -> Result<u64, RestoreError> {
        let (r, ()) = self.run(tid, |b| {
            b.call(what, nr, args);
        })?;
        Ok(r[0])
    }

    /// First descriptor number of a process that its table doesn't use.
    pub fn free_number(&self, pid: i32) -> u64 {
        self.free_numbers.get(&pid).copied().unwrap_or(3) as u64
    }

    /// Makes an open file description in a process: `open` adds the calls and says which one returns the descriptor.
    /// It is kept under a number that no table of that process uses.
    ///
    /// # Errors
    /// If a call fails.
    pub fn open_in(
        &mut self,
        pid: i32,
        open: impl FnOnce(&mut Batch<'_>) -> CallId,
    ) -> Result<i32, RestoreError> {
        let base = self.free_number(pid);
        let (results, keep) = self.run(pid, |b| {
            let fd = open(b);
            keep_descriptor(b, fd, base)
        })?;
        Ok(results[keep.index()] as i32)
    }

    /// Remembers where a rebuilt open file description is kept.
    pub fn add_file(&mut self, id: u64, pid: i32, fd: i32) {
        self.files.insert(id, (pid, fd));
    }

    /// A descriptor for what another process (or init) has open, opened anew with `flags`.
    ///
    /// # Errors
    /// If it can't be opened.
    pub fn reopen_in(&mut self, pid: i32, from: (i32, i32), flags: i32) -> Result<i32, RestoreError> {
        let path = format!("/proc/{}/fd/{}", from.0, from.1);
        self.open_in(pid, |b| open_call(b, path.as_bytes(), flags))
    }

    /// The process records' live processes.
    pub fn live(&self) -> Vec<i32> {
        self.processes.values().filter(|p| p.zombie.is_none()).map(|p| p.pid).collect()
    }

    /// Clones all processes, makes sessions and groups, ends the zombies and the ghosts.
    ///
    /// # Errors
    /// A tree that can't be rebuilt, by pid.
    pub fn build_tree(&mut self) -> Result<(), RestoreError> {
        let pids: BTreeSet<i32> = self.processes.keys().copied().collect();
        let mut wanted = self.processes.clone();
        // Ghosts for leaders that are gone.
        for p in self.processes.values() {
            for leader in [p.sid, p.pgid] {
                if leader > 1 && !pids.contains(&leader) {
                    let ghost = ProcessRecord::ghost(leader, if leader == p.sid { leader } else { p.sid });
                    wanted.entry(leader).or_insert(ghost);
                    self.ghosts.insert(leader);
                }
            }
        }
        let taken: BTreeSet<i32> =
            wanted.values().flat_map(|p| p.threads.iter().copied().chain([p.pid])).collect();
        let temporary = (300..32000).rev().find(|n| !taken.contains(n)).unwrap_or(32000);
        let mut tree = Tree { session: BTreeMap::new(), parent: BTreeMap::new(), temporary };
        while tree.session.len() < wanted.len() {
            let before = tree.session.len();
            for p in wanted.values() {
                if !tree.session.contains_key(&p.pid) {
                    self.try_create(&mut tree, &wanted, p)?;
                }
            }
            self.lead_sessions(&mut tree, &wanted)?;
            if tree.session.len() == before {
                let left: Vec<i32> =
                    wanted.keys().copied().filter(|n| !tree.session.contains_key(n)).collect();
                return Err(RestoreError::Record(format!(
                    "the sessions of processes {left:?} can't be rebuilt"
                )));
            }
        }
        self.lead_sessions(&mut tree, &wanted)?;
        self.make_groups(&wanted)?;
        self.end_zombies()?;
        for g in std::mem::take(&mut self.ghosts) {
            self.kill(g)?;
        }
        Ok(())
    }

    /// The session a process must be born into: its own unless it leads it; for a leader that of its children that
    /// are not in it, which were born before it became a leader.
    fn birth(wanted: &BTreeMap<i32, ProcessRecord>, p: &ProcessRecord) -> Option<i32> {
        if p.sid != p.pid {
            return Some(p.sid);
        }
        wanted.values().find(|c| c.ppid == p.pid && c.sid != p.pid && c.sid != c.pid).map(|c| c.sid)
    }

    fn try_create(
        &mut self,
        tree: &mut Tree,
        wanted: &BTreeMap<i32, ProcessRecord>,
        p: &ProcessRecord,
    ) -> Result<(), RestoreError> {
        let birth = Self::birth(wanted, p);
        let fits = |s: i32| birth.is_none_or(|b| b == s);
        if p.ppid != 1 {
            let Some(&s) = tree.session.get(&p.ppid) else { return Ok(()) };
            if !fits(s) {
                return Ok(());
            }
            self.clone_process(p.ppid, 0, p.exit_signal, p.pid)?;
            tree.session.insert(p.pid, s);
        } else if fits(NONE) {
            self.area.fork_blank(p.pid).map_err(RestoreError::errno(p.pid, "clone3 with its old pid"))?;
            self.start_blank(p.pid)?;
            tree.session.insert(p.pid, NONE);
        } else {
            // A member of a session whose parent is init: by the leader, as a sibling or through a middleman.
            let Some(leader) = birth.filter(|b| tree.session.get(b) == Some(b)) else { return Ok(()) };
            if tree.parent.get(&leader) == Some(&1) {
                self.clone_process(leader, CLONE_PARENT, 0, p.pid)?;
            } else {
                self.clone_process(leader, 0, 0, tree.temporary)?;
                self.clone_process(tree.temporary, 0, p.exit_signal, p.pid)?;
                self.exit(tree.temporary)?;
                let all = libc::__WALL as u64;
                let t = tree.temporary as u64;
                self.call(leader, "wait4 for a middleman", libc::SYS_wait4, &[t, 0, all, 0])?;
            }
            tree.session.insert(p.pid, leader);
        }
        tree.parent.insert(p.pid, p.ppid);
        Ok(())
    }

    fn clone_process(&mut self, by: i32, flags: u64, exit_signal: i32, pid: i32) -> Result<(), RestoreError> {
        let b = self.area.batch();
        b.clone_task(Pid::from_raw(by), flags, exit_signal, pid).map_err(RestoreError::remote(pid))?;
        Ok(())
    }

    /// A blank starts without descriptors, and with its hard limit of them, for room.
    fn start_blank(&mut self, pid: i32) -> Result<(), RestoreError> {
        self.call(pid, "close_range", libc::SYS_close_range, &[0, u64::from(u32::MAX), 0])?;
        Ok(())
    }

    /// setsid(2) for leaders all of whose children from before are there.
    fn lead_sessions(
        &mut self,
        tree: &mut Tree,
        wanted: &BTreeMap<i32, ProcessRecord>,
    ) -> Result<(), RestoreError> {
        for p in wanted.values().filter(|p| p.sid == p.pid) {
            if tree.session.get(&p.pid).is_none_or(|s| *s == p.pid) {
                continue;
            }
            let early =
                |c: &&ProcessRecord| c.ppid == p.pid && Self::birth(wanted, c).is_some_and(|b| b != p.pid);
            if wanted.values().filter(early).all(|c| tree.session.contains_key(&c.pid)) {
                self.call(p.pid, "setsid", libc::SYS_setsid, &[])?;
                tree.session.insert(p.pid, p.pid);
            }
        }
        Ok(())
    }

    fn make_groups(&mut self, wanted: &BTreeMap<i32, ProcessRecord>) -> Result<(), RestoreError> {
        // Leaders first: a group exists only once somebody leads it.
        for leaders in [true, false] {
            for p in wanted.values().filter(|p| p.pid != p.sid && (p.pid == p.pgid) == leaders && p.pgid > 1)
            {
                self.call(p.pid, "setpgid", libc::SYS_setpgid, &[0, p.pgid as u64])?;
            }
        }
        Ok(())
    }

    fn end_zombies(&mut self) -> Result<(), RestoreError> {
        let zombies: Vec<(i32, i32, Vec<u8>)> = self
            .processes
            .values()
            .filter_map(|p| p.zombie.map(|status| (p.pid, status, p.comm.clone())))
            .collect();
        for (pid, status, name) in zombies {
            let task = Pid::from_raw(pid);
            self.run(pid, |b| {
                let name = b.string(&name);
                b.call("PR_SET_NAME", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name]);
            })?;
            let err = |what: &str| RestoreError::errno(pid, what.to_owned());
            if status & 0x7f == 0 {
                self.exit_with(pid, (status >> 8) & 0xff)?;
                continue;
            }
            // No core file; the signal must find its default action and be unblocked.
            ckpt_sys::task::set_limit(task, libc::RLIMIT_CORE, 0, 0).map_err(err("RLIMIT_CORE"))?;
            ptrace::set_signal_mask(task, 0).map_err(err("signal mask"))?;
            ckpt_sys::task::kill(task, status & 0x7f).map_err(err("kill"))?;
            loop {
                match ptrace::cont(task, 0) {
                    Ok(()) => {}
                    Err(ckpt_sys::Errno::ESRCH) => break,
                    Err(e) => return Err(err("continue")(e)),
                }
                match ptrace::wait(task).map_err(err("wait"))? {
                    ptrace::Stop::Gone(_) => break,
                    ptrace::Stop::Signal(s) if s == status & 0x7f => {
                        ptrace::cont(task, s).map_err(err("deliver"))?;
                        if let ptrace::Stop::Gone(_) = ptrace::wait(task).map_err(err("wait"))? {
                            break;
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn exit_with(&mut self, pid: i32, code: i32) -> Result<(), RestoreError> {
        let mut b = self.area.batch();
        b.call("exit_group", libc::SYS_exit_group, &[code as u64]);
        match b.run(Pid::from_raw(pid)) {
            // The batch ends with the task.
            Err(ckpt_sys::area::RemoteError::UnexpectedStop { stop: ptrace::Stop::Gone(_), .. }) => Ok(()),
            Err(e) => Err(RestoreError::remote(pid)(e)),
            Ok(_) => Err(RestoreError::Record(format!("process {pid} did not exit"))),
        }
    }

    fn exit(&mut self, pid: i32) -> Result<(), RestoreError> {
        self.exit_with(pid, 0)
    }

    /// Kills and reaps a child of init that was only a stand-in.
    fn kill(&mut self, pid: i32) -> Result<(), RestoreError> {
        let err = |what: &str| RestoreError::errno(pid, what.to_owned());
        nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).map_err(err("kill"))?;
        ptrace::reap(Pid::from_raw(pid)).map(drop).map_err(err("wait for a stand-in"))
    }
}

/// The error of a batch; what comes of RLIMIT_NOFILE says so.
fn explained(tid: i32, error: RemoteError) -> RestoreError {
    match &error {
        // F_DUPFD answers EINVAL if the least number is beyond the limit.
        RemoteError::Call { what, errno: Errno::EINVAL, .. } if what.starts_with("fcntl F_DUPFD") => {}
        // inotify has a limit of its own with the same answer.
        RemoteError::Call { what, errno: Errno::EMFILE, .. } if !what.starts_with("inotify") => {}
        _ => return RestoreError::remote(tid)(error),
    }
    let (_, hard) = ckpt_sys::task::limit(Pid::this(), libc::RLIMIT_NOFILE).unwrap_or_default();
    RestoreError::Host(format!(
        "rebuilding pid {tid} takes more descriptors than the limit of {hard} open files allows: up to twice as many as the \
         process had; raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd) and restore again"
    ))
}

/// Raises this process's limit of open files, which the tasks to come inherit until they get their own, so that what a
/// process has open fits beside what is kept for it. Where that is forbidden the call that needs the room says so.
///
/// # Errors
/// A record that makes no sense, or setrlimit(2).
pub fn make_room_for_descriptors(image: &Image, plan: &Plan) -> Result<(), RestoreError> {
    let mut files = BTreeSet::new();
    for r in image.of_kind(Kind::FdTable) {
        let t: FdTableRecord = decode(r, crate::resource::fd::table::VERSION)?;
        files.extend(t.entries.iter().map(|e| e.file));
    }
    // A few more come and go while something is rebuilt.
    const SPARE: u64 = 64;
    let highest = plan.free_numbers.values().copied().max().unwrap_or(0);
    let needed = highest as u64 + files.len() as u64 + SPARE;
    let this = Pid::this();
    let failed = |e| RestoreError::errno(1, "the limit of open files")(e);
    let (soft, hard) = ckpt_sys::task::limit(this, libc::RLIMIT_NOFILE).map_err(failed)?;
    if soft >= needed {
        return Ok(());
    }
    let set = |soft, hard| ckpt_sys::task::set_limit(this, libc::RLIMIT_NOFILE, soft, hard);
    match set(needed, hard.max(needed)) {
        Err(Errno::EPERM) => set(hard, hard).map_err(failed),
        other => other.map_err(failed),
    }
}

/// openat(2), without becoming anybody's controlling terminal.
pub fn open_call(b: &mut Batch<'_>, path: &[u8], flags: i32) -> CallId {
    // O_DIRECT may be set on what can't be opened with it (a pipe); it follows by F_SETFL.
    const NOT_AGAIN: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_DIRECT;
    let at = b.string(path);
    // A link in /proc is there to be followed, whatever the path was that the application opened.
    let flags = if path.starts_with(b"/proc/") { flags & !libc::O_NOFOLLOW } else { flags };
    // O_TMPFILE contains O_DIRECTORY.
    let flags = if flags & libc::O_TMPFILE == libc::O_TMPFILE { flags & !libc::O_TMPFILE } else { flags };
    let flags = (flags & !NOT_AGAIN) | libc::O_NOCTTY | libc::O_CLOEXEC;
    let what = format!("opening {}", String::from_utf8_lossy(path));
    b.call(what, libc::SYS_openat, &[libc::AT_FDCWD as u64, at, flags as u64, 0])
}

/// Moves the result of a call to a number at or above `base`; the call that returns it.
pub fn keep_descriptor(b: &mut Batch<'_>, fd: CallId, base: u64) -> CallId {
    let keep = b.call("fcntl F_DUPFD_CLOEXEC", libc::SYS_fcntl, &[0, F_DUPFD_CLOEXEC, base]);
    b.feed(fd, keep, 0);
    let close = b.call("close", libc::SYS_close, &[0]);
    b.feed(fd, close, 0);
    keep
}
