// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings, the private memory in them, and the fields of `mm_struct` that a process can see (prctl(2), PR_SET_MM).
//!
//! Stored are pages that exist only in this process: anonymous memory, and private copies of file pages. What is shared
//! belongs to [`super::shared_object`], what is unchanged in a file stays there.

use super::fd::io_uring;
use super::{At, Collect, Collected, Content, Resource, decode, nothing_to_do};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::{FileStat, OpenFile};
use crate::model::memory::Vma;
use crate::model::process::{Process, ProcessId, own_vdso, read_proc};
use crate::restore::build_tree::{Build, open_call};
use crate::restore::fill_memory::is_private_anonymous;
use crate::restore::plan::VDSO_ROOM;
use crate::snapshot::{From, Pages, Range, Snapshot, Source};
use ckpt_image::codec::{Decode, Encode};
use ckpt_image::{Record, ZeroPages};
use ckpt_sys::area::AREA_BYTES;
use ckpt_sys::inject::Query;
use ckpt_sys::memory::PAGE;
use ckpt_sys::task::{Shared, kcmp};
use ckpt_sys::{Errno, Pid, libc};
use std::sync::OnceLock;

/// Version of [`MemoryMapRecord`].
pub const VERSION: u16 = 1;

/// What is behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Backing {
    /// Nothing: zero pages, then private ones.
    Anonymous,
    /// A named file; index into the record's list.
    File {
        /// Index.
        file: u32,
        /// Offset in bytes.
        offset: u64,
    },
    /// A shared object of the image.
    Object {
        /// Its number.
        object: u64,
        /// Offset in bytes.
        offset: u64,
    },
    /// The vDSO or its data, or the ring of an AIO context.
    Kernel {
        /// Name in brackets.
        name: String,
    },
}

/// A mapping.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VmaRecord {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// PROT_*.
    pub prot: i32,
    /// MAP_SHARED or MAP_PRIVATE, MAP_GROWSDOWN, MAP_NORESERVE.
    pub flags: i32,
    /// The file may be written through it (it was opened for that).
    pub may_write: bool,
    /// Pages of it are stored.
    pub has_pages: bool,
    /// Flags of mlock2(2) if it is locked in memory: MLOCK_ONFAULT or none.
    pub locked: Option<u32>,
    /// madvise(2) values in force.
    pub advice: Vec<i32>,
    /// What is behind it.
    pub backing: Backing,
    /// Name given by PR_SET_VMA.
    pub name: Vec<u8>,
}

/// A mapped file.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MappedFile {
    /// Absolute path.
    pub path: Vec<u8>,
    /// What it was.
    pub stat: FileStat,
    /// Its build-id, if it is an ELF file that has one.
    pub build_id: Option<Vec<u8>>,
}

/// The address space of a process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MemoryMapRecord {
    /// The object whose runs are the private pages, offsets being addresses.
    pub object: u64,
    /// All mappings, sorted.
    pub vmas: Vec<VmaRecord>,
    /// The files named by them.
    pub files: Vec<MappedFile>,
    /// The eleven addresses of `struct prctl_mm_map`, in its order.
    pub fields: [u64; 11],
    /// The auxiliary vector.
    pub auxv: Vec<u8>,
    /// Path of the executable.
    pub exe: Vec<u8>,
    /// Hash of the vDSO's code, 0 without one.
    pub vdso_hash: u64,
    /// Code behind the vDSO that continues short writes: address and bytes.
    pub write_code: Option<(u64, Vec<u8>)>,
}

impl MemoryMapRecord {
    /// Checks what arithmetic relies on: a checksum guards against accidents, not against malice.
    ///
    /// # Errors
    /// [`RestoreError::Record`] names the mapping.
    pub fn check(&self, pid: u64) -> Result<(), RestoreError> {
        for v in &self.vmas {
            let page = ckpt_sys::memory::PAGE - 1;
            let sound = v.start < v.end
                && v.end <= ckpt_sys::arch::TASK_SIZE + page + 1
                && (v.start | v.end) & page == 0;
            if !sound {
                let text = format!("process {pid} has an impossible mapping {:#x}-{:#x}", v.start, v.end);
                return Err(RestoreError::Record(text));
            }
        }
        Ok(())
    }

    /// Bounds of the vDSO.
    pub fn vdso(&self) -> Option<(u64, u64)> {
        let is = |v: &&VmaRecord| matches!(&v.backing, Backing::Kernel { name } if name == "[vdso]");
        self.vmas.iter().find(is).map(|v| (v.start, v.end))
    }
}

/// FNV-1a of a vDSO; taken of ckpt's own, behind which nobody has written.
///
/// # Errors
/// EFAULT.
pub fn vdso_hash(pid: Pid, range: std::ops::Range<u64>) -> Result<u64, Errno> {
    let mut bytes = vec![0u8; (range.end - range.start) as usize];
    ckpt_sys::memory::read(pid, range.start, &mut bytes)?;
    // 0 stands for none.
    Ok(crate::model::file::fnv1a(bytes) | 1)
}

/// [`vdso_hash`] of ckpt's own, if it is of that length.
fn own_vdso_hash(bytes: u64) -> Result<u64, Errno> {
    static HASH: OnceLock<u64> = OnceLock::new();
    let own = own_vdso(bytes);
    if own.is_empty() {
        return vdso_hash(Pid::this(), own);
    }
    match HASH.get() {
        Some(hash) => Ok(*hash),
        None => vdso_hash(Pid::this(), own).map(|hash| *HASH.get_or_init(|| hash)),
    }
}

/// Flags that need nothing, or are restored by other means than madvise.
const KNOWN_FLAGS: &[&str] = &[
    "rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "lo", "lf", "ac", "nr", "sd", "ar", "sf", "mm",
    "nl", "uw",
];

/// Flags that madvise(2) sets.
const ADVICE: &[(&str, i32)] = &[
    ("sr", libc::MADV_SEQUENTIAL),
    ("rr", libc::MADV_RANDOM),
    ("dc", libc::MADV_DONTFORK),
    ("dd", libc::MADV_DONTDUMP),
    ("wf", libc::MADV_WIPEONFORK),
    ("hg", libc::MADV_HUGEPAGE),
    ("nh", libc::MADV_NOHUGEPAGE),
    ("mg", libc::MADV_MERGEABLE),
];

/// The end of the heap: with an address that is not possible, brk(2) only tells it.
fn ask_brk() -> Query {
    Query::number(libc::SYS_brk, [0; 6])
}

/// Advice on whether pages are to be huge.
fn is_page_size(advice: i32) -> bool {
    matches!(advice, libc::MADV_HUGEPAGE | libc::MADV_NOHUGEPAGE)
}

/// The kind.
#[derive(Debug)]
pub struct MemoryMapResource;

/// A mapping in words.
fn named(v: &Vma) -> String {
    let at = format!("mapping {:#x}-{:#x}", v.start, v.end);
    if v.name.is_empty() { at } else { format!("{at} ({})", v.name) }
}

fn refuse_flags(pid: i32, v: &Vma, named: &str, tracked: bool, refusals: &mut Refusals) {
    if v.has("io") || v.has("pf") {
        refusals.process(
            pid,
            format!("{named} is memory of a device"),
            "device memory can't be checkpointed",
        );
    } else if v.has("ht") {
        refusals.process(
            pid,
            format!("{named} is hugetlb memory"),
            "not supported; use transparent huge pages",
        );
    } else if v.has("um") || v.has("ui") || v.has("uw") && !tracked {
        refusals.process(pid, format!("{named} is watched by userfaultfd"), "not supported");
    } else if v.protection_key != 0 {
        refusals.process(pid, format!("{named} has a protection key"), "not supported");
    } else if v.has("gu") {
        refusals.process(pid, format!("{named} has guard regions (MADV_GUARD_INSTALL)"), "not supported");
    } else {
        let known = |f: &[u8; 2]| {
            let f = std::str::from_utf8(f).unwrap_or("??");
            KNOWN_FLAGS.contains(&f) || ADVICE.iter().any(|(n, _)| *n == f)
        };
        if let Some(f) = v.flags.iter().find(|f| !known(f)) {
            let flag = String::from_utf8_lossy(f).into_owned();
            refusals.process(pid, format!("{named} has the unknown flag {flag}"), "not supported");
        }
    }
}

/// Whether ckpt watches its memory, or that which it has borrowed from its parent (vfork(2)): the barrier waits for that to end.
fn is_tracked(job: &Job, p: &Process) -> bool {
    let tracked = |p: &Process| job.info.tracked.contains(&ProcessId::of(p));
    let lends = |parent: &Process| {
        let same = kcmp(parent.host, p.host, Shared::Memory);
        tracked(parent) && parent.waits_in_kernel() && same == Ok(std::cmp::Ordering::Equal)
    };
    tracked(p) || job.live().any(|parent| parent.pid == p.ppid && lends(parent))
}

fn refuse_vma(job: &Job, p: &Process, v: &Vma, refusals: &mut Refusals) {
    if v.is_vdso_part() || super::aio::is_ring(v) {
        return;
    }
    let named = named(v);
    if v.name.starts_with("/dev/nvidia") || v.name.starts_with("/dev/dri/") || v.name.starts_with("/dev/kfd")
    {
        refusals.process(p.pid, format!("{named} is memory of a GPU"), "GPU users can't be checkpointed");
    } else if v.name.starts_with("/dev/infiniband") {
        refusals.process(
            p.pid,
            format!("{named} belongs to an RDMA device"),
            "RDMA users can't be checkpointed",
        );
    } else if v.name.contains("[io_uring]") {
        let busy = |f: &OpenFile| f.seen.target == io_uring::TARGET && io_uring::is_busy(&f.seen.info);
        let what = format!("{named} is an io_uring");
        if job.files.values().any(busy) {
            refusals.passing(p.pid, None, what, io_uring::ADVICE);
        } else {
            refusals.process(p.pid, what, io_uring::ADVICE);
        }
    } else if v.name.starts_with("/SYSV") {
        refusals.process(p.pid, format!("{named} is System V shared memory"), "not supported");
    } else {
        refuse_flags(p.pid, v, &named, is_tracked(job, p), refusals);
    }
    let has_path = v.is_file() && !v.deleted && !v.name.contains("[io_uring]");
    if has_path
        && !super::shared_object::is_memory_object(v)
        && job.file_at(&v.name).map_or(true, |stat| stat.ino != v.ino)
    {
        refusals.process(
            p.pid,
            format!("{named}: the file at that path is not the one that is mapped"),
            "it was replaced or renamed; restart the program with the new one",
        );
    }
}

/// Whether flags that were assumed while the job was frozen are what they were: asked of the snapshot, or of what was read
/// while it was frozen. False if the snapshot may not have what the job had; then the job has to be looked at again.
///
/// A userfaultfd, whose mark a copy of a process does not bear, is seen in the descriptor table.
///
/// # Errors
/// [`DumpError::Refused`] by flags that were not there before; those of the snapshot.
pub fn confirm(collected: &mut Collected, snapshot: &mut dyn Snapshot) -> Result<bool, DumpError> {
    let mut refusals = Refusals::default();
    for (pid, assumed) in &collected.assumed {
        let vmas = match collected.mappings.remove(pid) {
            Some(vmas) => vmas,
            None => snapshot.mappings(*pid)?,
        };
        let found = vmas.iter().map(|v| (v.start, v.end, v.has("wf")));
        if !found.eq(assumed.iter().copied()) {
            return Ok(false);
        }
        for v in vmas.iter().filter(|v| !v.is_vdso_part() && !super::aio::is_ring(v)) {
            refuse_flags(*pid, v, &named(v), collected.tracked.contains(pid), &mut refusals);
        }
        collected.mappings.insert(*pid, vmas);
    }
    refusals.check().map(|()| true)
}

/// What the flags of a mapping tell.
fn set_flags(r: &mut VmaRecord, v: &Vma, mergeable: bool) {
    r.flags = if v.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    if v.grows_down() {
        r.flags |= libc::MAP_GROWSDOWN;
    }
    if v.has("nr") {
        r.flags |= libc::MAP_NORESERVE;
    }
    r.may_write = v.has("mw");
    r.locked = v.has("lo").then(|| if v.has("lf") { libc::MLOCK_ONFAULT } else { 0 });
    // What ckpt itself has made mergeable is not so by the application's will.
    let ours = |a: i32| mergeable && a == libc::MADV_MERGEABLE;
    r.advice = ADVICE.iter().filter(|(n, a)| v.has(n) && !ours(*a)).map(|(_, a)| *a).collect();
}

/// The pages of a private mapping, at the offsets of their addresses.
fn range(v: &Vma, pages: Pages) -> Range {
    let lost_in_fork = match v {
        v if v.has("dc") => Some("MADV_DONTFORK"),
        v if v.has("wf") => Some("MADV_WIPEONFORK"),
        _ => None,
    };
    Range { addr: v.start, bytes: v.bytes(), offset: v.start, pages, lost_in_fork }
}

impl MemoryMapResource {
    fn record(cx: &mut Collect<'_>, p: &Process) -> Result<(), DumpError> {
        let err = |what: &str| DumpError::process(p.pid, what.to_owned());
        let own_library = |name: &str| name.ends_with("/libckpt_interceptor.so");
        let (mut files, mut vmas) = (Vec::<MappedFile>::new(), Vec::new());
        let (mut plain, mut over_file) = (Vec::new(), Vec::new());
        for v in &p.vmas {
            let made_by_kernel =
                v.is_vdso_part() || super::aio::is_ring(v) && !super::aio::is_inherited(p, v);
            let backing = if made_by_kernel {
                Backing::Kernel { name: v.name.clone() }
            } else if super::aio::is_ring(v) {
                // What a child has of its parent's ring is memory like any other.
                plain.push(range(v, Pages::All));
                Backing::Anonymous
            } else if let Some(object) = super::shared_object::of_mapping(cx.out, v) {
                if !v.shared {
                    over_file.push(range(v, Pages::Private));
                }
                Backing::Object { object, offset: v.offset }
            } else if v.is_file() && own_library(&v.name) {
                // Stored whole, as anonymous memory: upgrading ckpt must not break old checkpoints.
                // The loader first maps more of it than there is; what is behind its end can't be read.
                let bytes = cx.job.file_at(&v.name).map_err(err(&v.name))?.size;
                let there = bytes.next_multiple_of(PAGE).saturating_sub(v.offset);
                if there > 0 {
                    plain.push(Range { bytes: v.bytes().min(there), ..range(v, Pages::All) });
                }
                Backing::Anonymous
            } else if v.is_file() {
                if !v.shared {
                    over_file.push(range(v, Pages::Private));
                }
                let path = v.name.as_bytes().to_vec();
                let file = match files.iter().position(|f| f.path == path) {
                    Some(i) => i,
                    None => {
                        let outside = cx.job.outside(&v.name);
                        let stat = cx.job.file_at(&v.name).map_err(err(&v.name))?;
                        let build_id = cx.job.build_ids.get(outside.as_ref(), &stat);
                        files.push(MappedFile { path, stat, build_id });
                        files.len() - 1
                    }
                };
                Backing::File { file: file as u32, offset: v.offset }
            } else {
                plain.push(range(v, Pages::Private));
                Backing::Anonymous
            };
            let name = v.name.strip_prefix("[anon:").and_then(|n| n.strip_suffix(']')).unwrap_or("");
            let mut record = VmaRecord {
                start: v.start,
                end: v.end,
                prot: v.prot,
                flags: 0,
                may_write: false,
                has_pages: false,
                locked: None,
                advice: Vec::new(),
                backing,
                name: name.as_bytes().to_vec(),
            };
            if !p.assumed_flags {
                set_flags(&mut record, v, cx.job.info.mergeable);
            }
            vmas.push(record);
        }
        let brk = cx.live().number("brk", &ask_brk())?;
        let s = &p.stat;
        let n = |v: Option<u64>| v.unwrap_or(0);
        let fields = [
            s.startcode,
            s.endcode,
            n(s.start_data),
            n(s.end_data),
            n(s.start_brk),
            brk,
            s.startstack,
            n(s.arg_start),
            n(s.arg_end),
            n(s.env_start),
            n(s.env_end),
        ];
        let auxv = read_proc(format!("/proc/{}/auxv", p.host)).map_err(err("reading auxv"))?;
        let exe = std::fs::read_link(format!("/proc/{}/exe", p.host)).map_err(err("reading the exe link"))?;
        let vdso = p.vdso().map(|v| v.start..v.end);
        let hash = match vdso {
            // ckpt's own code stands behind the vDSO at this moment; the hash covers what is before it.
            Some(range) => {
                own_vdso_hash(range.end - range.start).map_err(DumpError::errno(p.pid, "reading the vDSO"))?
            }
            None => 0,
        };
        let write_code = match p.padding() {
            Some(padding) => crate::dump::short_write::saved(p.host, &padding)
                .map_err(DumpError::errno(p.pid, "reading behind its vDSO"))?,
            None => None,
        };
        let object = cx.out.new_object();
        for (ranges, zeros) in [(plain, ZeroPages::Elide), (over_file, ZeroPages::Record)] {
            if !ranges.is_empty() {
                let from = From::Process { host: p.host, pid: p.pid, ranges };
                cx.out.sources.push(Source { kind: Kind::MemoryMap, object, zeros, from });
            }
        }
        use std::os::unix::ffi::OsStrExt;
        let exe = exe.as_os_str().as_bytes().to_vec();
        let record = MemoryMapRecord { object, vmas, files, fields, auxv, exe, vdso_hash: hash, write_code };
        if cx.job.info.tracked.contains(&ProcessId::of(p)) {
            cx.out.tracked.insert(p.pid);
        }
        if p.assumed_flags {
            let assumed = p.vmas.iter().map(|v| (v.start, v.end, v.has("wf"))).collect();
            cx.out.assumed.insert(p.pid, assumed);
        }
        // Which mappings have pages is known when those have been written.
        let (pid, mergeable) = (p.pid, cx.job.info.mergeable);
        cx.defer_with(Kind::MemoryMap, VERSION, p.pid as u64, 0, move |stored| {
            let mut record = record.clone();
            for v in &mut record.vmas {
                v.has_pages = stored.in_range(object, v.start);
            }
            // The same mappings in the same order, as `confirm` has found.
            for (r, v) in record.vmas.iter_mut().zip(stored.mappings.get(&pid).into_iter().flatten()) {
                set_flags(r, v, mergeable);
            }
            record
        });
        Ok(())
    }

    fn lay_out(cx: &mut Build<'_>, pid: i32, m: &MemoryMapRecord) -> Result<(), RestoreError> {
        let hole_end = cx.plan.hole + AREA_BYTES as u64 + VDSO_ROOM;
        let own = crate::model::memory::read_smaps(std::process::id() as i32)
            .map_err(RestoreError::io(pid, "reading own mappings"))?;
        let kernel: Vec<(&VmaRecord, &Vma)> = m
            .vmas
            .iter()
            .filter_map(|v| match &v.backing {
                Backing::Kernel { name } => Some((v, own.iter().find(|o| o.name == *name)?)),
                _ => None,
            })
            .collect();
        let lowest = kernel.iter().map(|(_, o)| o.start).min().unwrap_or(0);
        let room = cx.plan.hole + AREA_BYTES as u64;
        let rseq =
            ckpt_sys::ptrace::rseq(Pid::from_raw(pid)).map_err(RestoreError::errno(pid, "reading rseq"))?;
        cx.run(pid, |b| {
            if rseq.pointer != 0 {
                let args = [rseq.pointer, u64::from(rseq.size), 1, u64::from(rseq.signature)];
                b.call("unregistering rseq", libc::SYS_rseq, &args);
            }
            let moving = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            for (_, o) in &kernel {
                let to = room + (o.start - lowest);
                b.call(
                    format!("moving {}", o.name),
                    libc::SYS_mremap,
                    &[o.start, o.bytes(), o.bytes(), moving, to],
                );
            }
            b.call("munmap", libc::SYS_munmap, &[0, cx_hole(room)]);
            let rest = ckpt_sys::arch::TASK_SIZE - hole_end;
            b.call("munmap", libc::SYS_munmap, &[hole_end, rest]);
            for (v, o) in &kernel {
                let from = room + (o.start - lowest);
                b.call(
                    format!("moving {}", o.name),
                    libc::SYS_mremap,
                    &[from, o.bytes(), o.bytes(), moving, v.start],
                );
            }
        })?;
        let mapped: Vec<&VmaRecord> =
            m.vmas.iter().filter(|v| !matches!(v.backing, Backing::Kernel { .. })).collect();
        for chunk in mapped.chunks(200) {
            let objects = cx.objects.clone();
            cx.run(pid, |b| {
                for v in chunk {
                    map_one(b, m, v, &objects);
                }
            })?;
        }
        // What `keep_together` has put there goes before anything is filled; a huge page of it may reach into a neighbour.
        let mut anonymous: Vec<(u64, u64)> = Vec::new();
        for v in mapped.iter().filter(|v| is_private_anonymous(v)) {
            match anonymous.last_mut() {
                Some(last) if last.1 == v.start => last.1 = v.end,
                _ => anonymous.push((v.start, v.end)),
            }
        }
        for chunk in anonymous.chunks(400) {
            cx.run(pid, |b| {
                for (start, end) in chunk {
                    let args = [*start, end - start, libc::MADV_DONTNEED as u64];
                    b.call(format!("emptying {start:#x}-{end:#x}"), libc::SYS_madvise, &args);
                }
            })?;
        }
        Ok(())
    }
}

/// Bytes from address 0 to the area.
fn cx_hole(room: u64) -> u64 {
    room - AREA_BYTES as u64
}

/// Has a page made in an empty mapping. The kernel merges only what shares the list by which it finds the mappings of a page (anon_vma), and
/// makes that at the first page. Filling registers parts of mappings with userfaultfd, which are mappings of their own for a while:
/// each would make its list, they would stay apart, and mremap(2) could no longer move what was one mapping.
fn keep_together(b: &mut ckpt_sys::area::Batch<'_>, v: &VmaRecord) {
    const HUGE: u64 = 2 << 20;
    // Where a huge page can't be, if there is such a place.
    let at = if v.start.is_multiple_of(HUGE) { v.end - PAGE } else { v.start };
    let args = [at, PAGE, libc::MADV_POPULATE_WRITE as u64];
    b.call(format!("making a page at {at:#x}"), libc::SYS_madvise, &args);
}

fn map_one(
    b: &mut ckpt_sys::area::Batch<'_>,
    m: &MemoryMapRecord,
    v: &VmaRecord,
    objects: &std::collections::BTreeMap<u64, (i32, i32)>,
) {
    let shared = v.flags & libc::MAP_SHARED != 0;
    // Pages are written into it first; the final protection comes with `finish`.
    let prot = if v.has_pages { libc::PROT_READ | libc::PROT_WRITE } else { v.prot };
    let flags = v.flags | libc::MAP_FIXED_NOREPLACE;
    let (path, offset) = match &v.backing {
        Backing::Anonymous => (None, 0),
        Backing::File { file, offset } => (m.files.get(*file as usize).map(|f| f.path.clone()), *offset),
        Backing::Object { object, offset } => {
            (objects.get(object).map(|(pid, fd)| format!("/proc/{pid}/fd/{fd}").into_bytes()), *offset)
        }
        Backing::Kernel { .. } => return,
    };
    let what = format!("mapping {:#x}-{:#x}", v.start, v.end);
    let length = v.end - v.start;
    match path {
        None => {
            let flags = (flags | libc::MAP_ANONYMOUS) as u64;
            b.call(what, libc::SYS_mmap, &[v.start, length, prot as u64, flags, u64::MAX, 0]);
            if v.has_pages && !shared {
                keep_together(b, v);
            }
            // Before the pages come: it decides their size.
            for a in v.advice.iter().filter(|a| is_page_size(**a)) {
                b.call(format!("madvise {a}"), libc::SYS_madvise, &[v.start, length, *a as u64]);
            }
        }
        Some(path) => {
            let access = if shared && v.may_write { libc::O_RDWR } else { libc::O_RDONLY };
            let fd = open_call(b, &path, access);
            let map = b.call(what, libc::SYS_mmap, &[v.start, length, prot as u64, flags as u64, 0, offset]);
            b.feed(fd, map, 4);
            let close = b.call("close", libc::SYS_close, &[0]);
            b.feed(fd, close, 0);
        }
    }
}

impl Resource for MemoryMapResource {
    nothing_to_do! { claims, connect, arm }

    fn kind(&self) -> Kind {
        Kind::MemoryMap
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process, Kind::SharedObject, Kind::ShmFile]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for p in job.live() {
            // Not for the first time in the freeze.
            let _ = p.vdso().map(|v| own_vdso_hash(v.bytes()));
            for v in &p.vmas {
                refuse_vma(job, p, v, refusals);
            }
            let exe = std::fs::read_link(format!("/proc/{}/exe", p.host)).unwrap_or_default();
            if exe.to_string_lossy().ends_with(" (deleted)") {
                let what = format!("its executable {} has been deleted or replaced", exe.display());
                refusals.process(p.pid, what, "put it back, or restart the program from the new one");
            }
        }
    }

    fn asks(&self, _: &Job, at: At<'_>) -> Vec<Query> {
        if matches!(at, At::Process(_)) { vec![ask_brk()] } else { Vec::new() }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        match at {
            At::Process(p) => Self::record(cx, p),
            At::Job | At::Thread(..) | At::File(_) => Ok(()),
        }
    }

    fn content(&self, cx: &mut Content<'_>) -> Result<(), DumpError> {
        cx.write_pages(Kind::MemoryMap)?;
        cx.write_deferred(Kind::MemoryMap)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let m: MemoryMapRecord = decode(record, VERSION)?;
        m.check(record.owner)?;
        let bytes: u64 = m.vmas.iter().map(|v| v.end - v.start).sum();
        let exe = String::from_utf8_lossy(&m.exe).into_owned();
        Ok(format!("{exe}: {} mappings, {} KiB of address space", m.vmas.len(), bytes / 1024))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let mut m: MemoryMapRecord = decode(record, VERSION)?;
        for f in &mut m.files {
            f.path = super::saved_file::path_now(cx, &f.path);
        }
        Self::lay_out(cx, record.owner as i32, &m)
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        const PR_SET_VMA: u64 = 0x5356_4d41;
        let pid = record.owner as i32;
        let m: MemoryMapRecord = decode(record, VERSION)?;
        let mergeable = cx.request.options.mergeable;
        for chunk in m.vmas.chunks(80) {
            cx.run(pid, |b| {
                for v in chunk.iter().filter(|v| !matches!(v.backing, Backing::Kernel { .. })) {
                    let length = v.end - v.start;
                    let at = format!("{:#x}-{:#x}", v.start, v.end);
                    if v.has_pages {
                        b.call(
                            format!("mprotect {at}"),
                            libc::SYS_mprotect,
                            &[v.start, length, v.prot as u64],
                        );
                    }
                    for a in &v.advice {
                        b.call(format!("madvise {at} {a}"), libc::SYS_madvise, &[v.start, length, *a as u64]);
                    }
                    if mergeable && is_private_anonymous(v) {
                        let what = format!("madvise {at} MADV_MERGEABLE");
                        b.call(what, libc::SYS_madvise, &[v.start, length, libc::MADV_MERGEABLE as u64]);
                    }
                    if let Some(flags) = v.locked {
                        b.call(format!("mlock {at}"), libc::SYS_mlock2, &[v.start, length, u64::from(flags)]);
                    }
                    if !v.name.is_empty() {
                        let name = b.string(&v.name);
                        b.call(
                            format!("naming {at}"),
                            libc::SYS_prctl,
                            &[PR_SET_VMA, 0, v.start, length, name],
                        );
                    }
                }
            })?;
        }
        if let Some((at, code)) = &m.write_code {
            ckpt_sys::memory::Forced::open(Pid::from_raw(pid))
                .and_then(|memory| memory.write(*at, code))
                .map_err(RestoreError::io(pid, "writing behind its vDSO"))?;
        }
        let exe = cx.open_in(pid, |b| open_call(b, &m.exe, libc::O_RDONLY))?;
        cx.run(pid, |b| {
            let auxv = b.bytes(&m.auxv);
            let mut map: Vec<u8> = m.fields.iter().flat_map(|f| f.to_le_bytes()).collect();
            map.extend_from_slice(&auxv.to_le_bytes());
            map.extend_from_slice(&(m.auxv.len() as u32).to_le_bytes());
            map.extend_from_slice(&(exe as u32).to_le_bytes());
            let at = b.bytes(&map);
            const PR_SET_MM: u64 = 35;
            const PR_SET_MM_MAP: u64 = 14;
            b.call(
                "prctl PR_SET_MM_MAP",
                libc::SYS_prctl,
                &[PR_SET_MM, PR_SET_MM_MAP, at, map.len() as u64, 0],
            );
            b.call("close", libc::SYS_close, &[exe as u64]);
        })?;
        Ok(())
    }
}
