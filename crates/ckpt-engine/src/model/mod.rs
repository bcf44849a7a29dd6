// SPDX-License-Identifier: MIT OR Apache-2.0
//! The job as ckpt sees it: processes, mappings, open file descriptions, and which of them are one object.

pub mod build_id;
pub mod continued;
pub mod file;
pub mod memory;
pub mod process;
pub mod watched;

use crate::error::{DumpError, Refusals};
use ckpt_sys::Pid;
use file::{Descriptor, FileStat, LastOwner, OpenFile};
use process::{Keep, Process};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

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
    /// Its restore has made its memory mergeable (MADV_MERGEABLE), which the application did not ask for.
    pub mergeable: bool,
    /// What to do about its TCP connections.
    pub tcp: TcpPolicy,
}

/// What a dump does about TCP connections, which can't be kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TcpPolicy {
    /// It is refused.
    #[default]
    Refuse,
    /// A restored job finds them reset by their peers.
    Close,
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
    /// A task had ended when it was to be read.
    pub vanished: bool,
    /// Its open file descriptions by id.
    pub files: BTreeMap<u64, OpenFile>,
    /// Unix sockets of the network namespace, if the job has sockets at all.
    pub unix_sockets: HashMap<u32, ckpt_sys::socket::UnixSocket>,
    /// Process groups: as ckpt sees them to as the job sees them.
    pub groups: HashMap<i32, i32>,
    /// Build-ids of mapped files, as *discover* read them.
    pub build_ids: build_id::BuildIds,
    /// Files that are mapped, by path: [`Job::file_at`].
    mapped: Mutex<HashMap<String, FileStat>>,
    /// The calls in which its threads were seen, of the job as *discover* saw it.
    pub calls: continued::Calls,
    /// Paths of watched files, found once.
    pub watched: watched::Watched,
    /// Order of descriptors (process as ckpt sees it, number) among those of one inode, as kcmp(2) has it.
    order: HashMap<(Pid, i32), usize>,
}

/// A descriptor before it is known whose description it refers to.
struct Slot {
    process: usize,
    number: i32,
    seen: file::Seen,
}

/// Sorts by the kernel's order of objects and puts equal ones together, in few comparisons if they come in that order.
fn same_objects<T: Copy>(
    all: &[T],
    mut order: impl FnMut(&T, &T) -> Result<std::cmp::Ordering, DumpError>,
) -> Result<Vec<Vec<T>>, DumpError> {
    use std::cmp::Ordering;
    let mut classes: Vec<Vec<T>> = Vec::new();
    for item in all {
        let (mut low, mut high) = (0, classes.len());
        let mut probe = high.wrapping_sub(1);
        let found = loop {
            if low == high {
                break None;
            }
            match order(&classes[probe][0], item)? {
                Ordering::Equal => break Some(probe),
                Ordering::Less => low = probe + 1,
                Ordering::Greater => high = probe,
            }
            probe = low + (high - low) / 2;
        };
        match found {
            Some(at) => classes[at].push(*item),
            None => classes.insert(low, vec![*item]),
        }
    }
    Ok(classes)
}

impl Job {
    /// Observes all processes below init, with the help of what was seen `before`; with `assume`, flags of mappings are
    /// taken from there (see [`Process::assumed_flags`]). What vanishes while it looks is left out.
    ///
    /// # Errors
    /// [`DumpError::JobEnded`], or what reading /proc gives.
    pub fn observe(
        info: &JobInfo,
        before: Option<&Job>,
        assume: bool,
        refusals: &mut Refusals,
    ) -> Result<Job, DumpError> {
        let order = before.map_or_else(HashMap::new, |b| b.order.clone());
        let watched = before.map_or_else(Default::default, |b| b.watched.clone());
        let mut job = Job { info: info.clone(), order, watched, ..Job::default() };
        // The next look at it is in the freeze.
        let mut keep = if before.is_none() { Keep::some() } else { Keep::none() };
        let mut inner = HashMap::from([(info.init, 1)]);
        let mut pending = process::children(info.init);
        while let Some(host) = pending.pop() {
            let Some(p) =
                Process::observe(host, &inner, before.and_then(|b| b.seen(host)), assume, &mut keep)?
            else {
                job.vanished = true;
                continue;
            };
            job.vanished |= p.vanished;
            inner.insert(host, p.pid);
            job.groups.insert(p.host_pgid, p.pgid);
            pending.extend(p.children.iter().copied());
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
        let mut slots = Vec::new();
        for (index, p) in self.processes.iter_mut().enumerate().filter(|(_, p)| p.zombie.is_none()) {
            let list = match file::descriptors(p.host) {
                Err(_) if p.is_closed_now() => {
                    p.closed = true;
                    continue;
                }
                list => list?,
            };
            slots.extend(list.into_iter().map(|(number, seen)| Slot { process: index, number, seen }));
        }
        // Candidates for being one description: same inode, same flags and position. kcmp decides.
        let mut groups: HashMap<_, Vec<usize>> = HashMap::with_capacity(slots.len());
        for (i, s) in slots.iter().enumerate() {
            let (stat, at) = (&s.seen.stat, (s.seen.flags, s.seen.position));
            groups.entry((stat.dev, stat.ino, at, &s.seen.link)).or_default().push(i);
        }
        // The first slot of each description.
        let mut first: Vec<usize> = (0..slots.len()).collect();
        for mut group in groups.into_values().filter(|g| g.len() > 1) {
            // In the order that was found before, each comes behind the last.
            let rank =
                |i: &usize| self.order.get(&(self.processes[slots[*i].process].host, slots[*i].number));
            group.sort_by_key(|i| (rank(i).copied().unwrap_or(usize::MAX), *i));
            let classes = same_objects(&group, |&a, &b| {
                let (x, y) = (&slots[a], &slots[b]);
                let what = ckpt_sys::task::Shared::File(x.number, y.number);
                let (p, q) = (&self.processes[x.process], &self.processes[y.process]);
                match ckpt_sys::task::kcmp(p.host, q.host, what) {
                    // Closed since; it is another then.
                    Err(ckpt_sys::Errno::EBADF | ckpt_sys::Errno::ESRCH) => Ok(std::cmp::Ordering::Less),
                    order => order.map_err(DumpError::fd(q.pid, y.number, "kcmp")),
                }
            })?;
            for (n, class) in classes.into_iter().enumerate() {
                let lowest = class.iter().copied().min().unwrap_or_default();
                for i in class {
                    first[i] = lowest;
                    self.order.insert((self.processes[slots[i].process].host, slots[i].number), n);
                }
            }
        }
        let mut ids: Vec<u64> = Vec::with_capacity(slots.len());
        let last = LastOwner::default();
        for (i, s) in slots.into_iter().enumerate() {
            let (number, cloexec) = (s.number, s.seen.cloexec);
            let p = &mut self.processes[s.process];
            if s.seen.info.contains("\nlock:") {
                p.locks.push((number, s.seen.info.clone()));
            }
            let file = if first[i] == i {
                let id = self.files.len() as u64 + 1;
                self.files.insert(id, OpenFile::new(id, p.pid, (p.host, number), s.seen, last.clone()));
                id
            } else {
                ids[first[i]]
            };
            ids.push(file);
            if let Some(f) = self.files.get_mut(&file) {
                f.holders.push((p.pid, number));
            }
            p.descriptors.push(Descriptor { number, file, cloexec });
        }
        self.refuse_shared_tables(refusals)
    }

    /// Processes that share what only threads of one process may share for now.
    fn refuse_shared_tables(&self, refusals: &mut Refusals) -> Result<(), DumpError> {
        use ckpt_sys::task::{Shared, kcmp};
        let live: Vec<&Process> = self.processes.iter().filter(|p| p.zombie.is_none()).collect();
        let advice = "a vfork or clone without CLONE_THREAD; dump when it is over";
        for (what, name) in [
            (Shared::Memory, "memory"),
            (Shared::Files, "its descriptor table"),
            (Shared::Fs, "its working directory"),
            (Shared::SignalActions, "its signal actions"),
        ] {
            let classes = same_objects(&live, |a, b| {
                // Without a right to compare them, or if one is gone: not the same.
                Ok(kcmp(a.host, b.host, what).unwrap_or(std::cmp::Ordering::Less))
            })?;
            for mut class in classes.into_iter().filter(|c| c.len() > 1) {
                // A vfork in progress, seen while the job runs: it is over when the parent can be stopped.
                let lenders: Vec<i32> = class.iter().filter(|p| p.waits_in_kernel()).map(|p| p.pid).collect();
                class.retain(|p| !lenders.contains(&p.ppid));
                for (i, a) in class.iter().enumerate() {
                    for b in &class[i + 1..] {
                        refusals.process(a.pid, format!("shares {name} with process {}", b.pid), advice);
                    }
                }
            }
        }
        for a in live {
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

    /// The file at a path of the job, looked at once in each observation.
    ///
    /// # Errors
    /// As stat(2).
    pub fn file_at(&self, path: &str) -> std::io::Result<FileStat> {
        let mut seen = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stat) = seen.get(path) {
            return Ok(stat.clone());
        }
        let stat = FileStat::of(&std::fs::metadata(self.outside(path))?);
        seen.insert(path.to_owned(), stat.clone());
        Ok(stat)
    }

    /// Where a file of the job can be looked at from outside: paths are as init has them, whatever root a process has.
    pub fn outside(&self, path: &str) -> String {
        format!("/proc/{}/root{path}", self.info.init)
    }

    fn seen(&self, host: i32) -> Option<&Process> {
        self.processes.iter().find(|p| p.host.as_raw() == host)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_put_together_in_any_order() {
        let items: Vec<(u32, u32)> = (0..500).map(|i| (i * 7919 % 100, i)).collect();
        let classes = same_objects(&items, |a, b| Ok(a.0.cmp(&b.0))).unwrap();
        assert_eq!(classes.len(), 100);
        for (n, class) in classes.iter().enumerate() {
            assert!(class.len() == 5 && class.iter().all(|i| i.0 == n as u32));
        }
    }

    #[test]
    fn what_comes_in_order_is_compared_once() {
        let mut compared = 0;
        let items: Vec<u32> = (0..1000).collect();
        let classes = same_objects(&items, |a, b| {
            compared += 1;
            Ok(a.cmp(b))
        });
        assert_eq!((classes.unwrap().len(), compared), (1000, 999));
    }
}
