// SPDX-License-Identifier: MIT OR Apache-2.0
//! The job as ckpt sees it: processes, mappings, open file descriptions, and which of them are one object.

pub mod build_id;
pub mod file;
pub mod memory;
pub mod process;

use crate::error::{DumpError, Refusals};
use ckpt_sys::Pid;
use file::{Descriptor, OpenFile};
use process::Process;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

/// What the job's init knows about it.
#[derive(Debug, Clone, Default)]
pub struct JobInfo {
    /// The job's name.
    pub name: String,
    /// Pid of its init, in ckpt's own pid namespace.
    pub init: i32,
    /// The main process, as the job sees it; 0 once it has ended.
    pub main_pid: i32,
    /// Its wait status if it has ended.
    pub main_status: Option<i32>,
    /// The job's command.
    pub argv: Vec<Vec<u8>>,
    /// Descriptors it was started with.
    pub external: Vec<ExternalInfo>,
    /// Where output goes that nobody reads.
    pub log: Option<PathBuf>,
    /// The slave of its own terminal, if it has one.
    pub terminal: Option<String>,
    /// Host name in its UTS namespace, if init says so.
    pub hostname: Option<Vec<u8>>,
    /// NIS domain name there.
    pub domainname: Option<Vec<u8>>,
    /// System V shared memory segments and message queues in its namespace.
    pub sysv_objects: u64,
    /// System V semaphore sets there.
    pub semaphore_sets: u64,
    /// Processes whose memory ckpt itself watches for writes.
    pub tracked: Vec<process::ProcessId>,
}

/// A descriptor the job was started with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExternalInfo {
    /// Its number in the command.
    pub number: i32,
    /// st_dev.
    pub dev: u64,
    /// st_ino.
    pub ino: u64,
    /// O_RDONLY, O_WRONLY or O_RDWR.
    pub access: i32,
}

/// A job as observed.
#[derive(Debug, Default)]
pub struct Job {
    /// What init says.
    pub info: JobInfo,
    /// Its processes, parents before children where possible.
    pub processes: Vec<Process>,
    /// Its open file descriptions by id.
    pub files: BTreeMap<u64, OpenFile>,
    /// Unix sockets of the network namespace, if the job has sockets at all.
    pub unix_sockets: HashMap<u32, ckpt_sys::socket::UnixSocket>,
    /// Process groups: as ckpt sees them to as the job sees them.
    pub groups: HashMap<i32, i32>,
    /// Build-ids of mapped files, as *discover* read them.
    pub build_ids: build_id::BuildIds,
}

impl Job {
    /// Observes all processes below init. What vanishes while it looks is left out.
    ///
    /// # Errors
    /// [`DumpError::JobEnded`], or what reading /proc gives.
    pub fn observe(info: &JobInfo, refusals: &mut Refusals) -> Result<Job, DumpError> {
        let mut job = Job { info: info.clone(), ..Job::default() };
        let mut inner = HashMap::from([(info.init, 1)]);
        let mut pending = process::children(info.init);
        while let Some(host) = pending.pop() {
            let Some(p) = Process::observe(host, &inner)? else { continue };
            inner.insert(host, p.pid);
            job.groups.insert(p.host_pgid, p.pgid);
            pending.extend(process::children(host));
            job.processes.push(p);
        }
        if job.live().next().is_none() {
            return Err(DumpError::JobEnded);
        }
        job.identify_files(refusals)?;
        if job.files.values().any(|f| f.seen.link.starts_with(b"socket:")) {
            let list = ckpt_sys::socket::unix_sockets();
            job.unix_sockets = list.map_err(DumpError::errno(0, "listing unix sockets (sock_diag)"))?;
        }
        Ok(job)
    }

    fn identify_files(&mut self, refusals: &mut Refusals) -> Result<(), DumpError> {
        // Candidates for being one description: same inode, same flags and position. kcmp decides.
        let mut groups: HashMap<(u64, u64, i32, u64, String), Vec<u64>> = HashMap::new();
        for p in &mut self.processes {
            if p.zombie.is_some() {
                continue;
            }
            let list = match file::descriptors(p.host) {
                Err(_) if p.is_closed_now() => {
                    p.closed = true;
                    continue;
                }
                list => list?,
            };
            for (number, seen) in list {
                let key = (seen.stat.dev, seen.stat.ino, seen.flags, seen.position, seen.target.clone());
                let ids = groups.entry(key).or_default();
                let mut same = None;
                for id in ids.iter() {
                    let f = &self.files[id];
                    let what = ckpt_sys::task::Shared::File(f.fd, number);
                    match ckpt_sys::task::kcmp(f.host, p.host, what) {
                        Ok(std::cmp::Ordering::Equal) => {
                            same = Some(*id);
                            break;
                        }
                        Ok(_) => {}
                        Err(ckpt_sys::Errno::EBADF | ckpt_sys::Errno::ESRCH) => {}
                        Err(e) => return Err(DumpError::fd(p.pid, number, "kcmp")(e)),
                    }
                }
                let cloexec = seen.cloexec;
                let id = same.unwrap_or_else(|| {
                    let id = self.files.len() as u64 + 1;
                    self.files.insert(id, OpenFile::new(id, p.pid, p.host, number, seen));
                    ids.push(id);
                    id
                });
                if let Some(f) = self.files.get_mut(&id) {
                    f.holders.push((p.pid, number));
                }
                p.descriptors.push(Descriptor { number, file: id, cloexec });
            }
        }
        self.refuse_shared_tables(refusals)
    }

    /// Processes that share what only threads of one process may share for now.
    fn refuse_shared_tables(&self, refusals: &mut Refusals) -> Result<(), DumpError> {
        use ckpt_sys::task::{Shared, kcmp};
        let live: Vec<&Process> = self.processes.iter().filter(|p| p.zombie.is_none()).collect();
        let advice = "a vfork or clone without CLONE_THREAD; dump when it is over";
        for (i, a) in live.iter().enumerate() {
            for b in &live[i + 1..] {
                // A vfork in progress, seen while the job runs: it is over when the parent can be stopped.
                if b.ppid == a.pid && a.stat.state == 'D' || a.ppid == b.pid && b.stat.state == 'D' {
                    continue;
                }
                for (what, name) in [
                    (Shared::Memory, "memory"),
                    (Shared::Files, "its descriptor table"),
                    (Shared::Fs, "its working directory"),
                    (Shared::SignalActions, "its signal actions"),
                ] {
                    if kcmp(a.host, b.host, what) == Ok(std::cmp::Ordering::Equal) {
                        refusals.process(a.pid, format!("shares {name} with process {}", b.pid), advice);
                    }
                }
            }
            for t in &a.threads[1..] {
                for (what, name) in [(Shared::Files, "descriptor table"), (Shared::Fs, "working directory")] {
                    if matches!(kcmp(a.host, t.host, what), Ok(o) if o != std::cmp::Ordering::Equal) {
                        let text = format!("thread {} has a {name} of its own", t.tid);
                        refusals.process(a.pid, text, "not supported");
                    }
                }
            }
        }
        Ok(())
    }

    /// Where a file of the job can be looked at from outside: paths are as init has them, whatever root a process has.
    pub fn outside(&self, path: &str) -> String {
        format!("/proc/{}/root{path}", self.info.init)
    }

    /// The live processes.
    pub fn live(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().filter(|p| p.zombie.is_none())
    }

    /// The process with this pid, as the job sees it.
    pub fn process(&self, pid: i32) -> Option<&Process> {
        self.processes.iter().find(|p| p.pid == pid)
    }

    /// A task's id as the job sees it, given as ckpt sees it.
    pub fn inner_tid(&self, host: i32) -> Option<i32> {
        let host = Pid::from_raw(host);
        self.processes.iter().flat_map(|p| &p.threads).find(|t| t.host == host).map(|t| t.tid)
    }
}
