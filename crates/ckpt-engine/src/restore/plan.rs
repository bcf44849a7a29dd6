// SPDX-License-Identifier: MIT OR Apache-2.0
//! Plan: everything outside the image that must be as it was is looked at before anything is built, and every conflict
//! is named at once.

use super::fill_memory::is_wiped_in_copies;
use super::read::Image;
use super::{FilePolicy, RestoreRequest};
use crate::error::{Conflict, Conflicts, RestoreError};
use crate::kind::Kind;
use crate::model::build_id;
use crate::model::file::{FileStat, file_ends};
use crate::model::memory::{hole, read_smaps};
use crate::resource::decode;
use crate::resource::fd::external::ExternalRecord;
use crate::resource::fd::regular_file::RegularFileRecord;
use crate::resource::fd::table::FdTableRecord;
use crate::resource::memory_map::{Backing, MemoryMapRecord};
use ckpt_sys::area::AREA_BYTES;
use ckpt_sys::libc;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Room behind the area for the vDSO and its data on the way.
pub const VDSO_ROOM: u64 = 1 << 20;

/// A decided restore.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Where in every process nothing will be mapped: the area, then [`VDSO_ROOM`].
    pub hole: u64,
    /// First descriptor number of each process that its table doesn't use.
    pub free_numbers: BTreeMap<i32, i32>,
    /// Files to cut back to the length they had: path, then and now.
    pub cuts: Vec<(Vec<u8>, FileStat, FileStat)>,
    /// What the job's inotify instances watch, as it is before anything is built.
    pub watched: BTreeMap<u64, crate::resource::fd::inotify::Look>,
    /// Files to be put back from the content in the image.
    pub rollbacks: super::rollback::Changes,
}

/// A file that the job has open or mapped.
#[derive(Debug, Clone)]
struct Used {
    stat: FileStat,
    writers: bool,
    /// All writers are at its end.
    at_end: bool,
    mapped: bool,
    /// Some process may write to it through a mapping.
    mapped_writable: bool,
    /// Of what it held first and last, if somebody was writing to it.
    ends: Option<u64>,
    build_id: Option<Vec<u8>>,
}

impl Used {
    fn new(stat: FileStat) -> Used {
        Used {
            stat,
            writers: false,
            at_end: true,
            mapped: false,
            mapped_writable: false,
            ends: None,
            build_id: None,
        }
    }

    /// What the build-ids say of a mapped ELF file whose `stat` is `now`.
    fn compare_build(&self, path: &Path, now: &FileStat) -> BuildMatch {
        let Some(then) = self.build_id.as_deref().filter(|_| self.mapped) else { return BuildMatch::Unknown };
        match build_id::of_file(path, now) {
            None => BuildMatch::Unknown,
            Some(id) if id != then => {
                BuildMatch::Other { then: build_id::hex(then), now: build_id::hex(&id) }
            }
            // What the job itself writes there no build-id tells.
            Some(_) if self.writers || self.mapped_writable || self.stat.size != now.size => {
                BuildMatch::Unknown
            }
            Some(_) => BuildMatch::Same,
        }
    }
}

/// How a mapped file compares with that of the dump.
enum BuildMatch {
    /// The same library or program, wherever this copy of it is from.
    Same,
    /// Another; the ids in words.
    Other { then: String, now: String },
    /// There is nothing to compare.
    Unknown,
}

fn files(image: &Image) -> Result<BTreeMap<Vec<u8>, Used>, RestoreError> {
    let mut out: BTreeMap<Vec<u8>, Used> = BTreeMap::new();
    for r in image.of_kind(Kind::RegularFile) {
        let f: RegularFileRecord = decode(r, crate::resource::fd::regular_file::VERSION)?;
        if f.object.is_some() {
            continue;
        }
        let writes = f.opened.flags & libc::O_ACCMODE != libc::O_RDONLY;
        let at_end = f.opened.flags & libc::O_APPEND != 0 || f.opened.position == f.stat.size;
        let u = out.entry(f.path).or_insert_with(|| Used::new(f.stat));
        u.writers |= writes;
        u.at_end &= !writes || at_end;
        u.ends = u.ends.or(f.ends);
    }
    for r in image.of_kind(Kind::MemoryMap) {
        let m: MemoryMapRecord = decode(r, crate::resource::memory_map::VERSION)?;
        for (i, f) in m.files.into_iter().enumerate() {
            let u = out.entry(f.path).or_insert_with(|| Used::new(f.stat));
            u.mapped = true;
            u.build_id = u.build_id.take().or(f.build_id);
            u.mapped_writable |= m.vmas.iter().any(|v| {
                let of_file = matches!(v.backing, Backing::File { file, .. } if file as usize == i);
                of_file && v.may_write && v.flags & libc::MAP_SHARED != 0
            });
        }
    }
    Ok(out)
}

/// Checks the host, the files and the descriptors that come from outside.
///
/// # Errors
/// [`RestoreError::Host`], or [`RestoreError::Conflicts`] with all of them.
pub fn plan(image: &Image, request: &RestoreRequest) -> Result<Plan, RestoreError> {
    let header = image.reader.header();
    if !ckpt_sys::arch::cpu_has(&header.cpu_features) {
        return Err(RestoreError::Host("its CPU lacks features that the job may be using".into()));
    }
    let own = read_smaps(std::process::id() as i32).map_err(RestoreError::io(1, "reading own mappings"))?;
    let mut plan = Plan::default();
    let mut taken: Vec<(u64, u64, bool)> = own.iter().map(|v| (v.start, v.end, v.grows_down())).collect();
    for r in image.of_kind(Kind::MemoryMap) {
        let m: MemoryMapRecord = decode(r, crate::resource::memory_map::VERSION)?;
        m.check(r.owner)?;
        for v in &m.vmas {
            taken.push((v.start, v.end, v.flags & libc::MAP_GROWSDOWN != 0));
            if let Backing::Kernel { name } = &v.backing
                && name != crate::resource::aio::RING_NAME
            {
                let size = v.end - v.start;
                if !own.iter().any(|o| o.name == *name && o.bytes() == size) {
                    let text = format!(
                        "this kernel's {name} is not like that of the checkpoint (kernel {})",
                        image.job.kernel
                    );
                    return Err(RestoreError::Host(text));
                }
            }
        }
        if m.vdso_hash != 0 && m.vdso_hash != own_vdso_hash(&own)? {
            let text = format!(
                "its kernel has another vDSO than the kernel of the checkpoint ({})",
                image.job.kernel
            );
            return Err(RestoreError::Host(text));
        }
    }
    plan.hole = hole(taken.into_iter(), AREA_BYTES as u64 + VDSO_ROOM)
        .ok_or_else(|| RestoreError::Host("there is no free place in the address spaces".into()))?;
    for r in image.of_kind(Kind::FdTable) {
        let t: FdTableRecord = decode(r, crate::resource::fd::table::VERSION)?;
        let free = t.entries.iter().map(|e| e.number + 1).max().unwrap_or(0).max(3);
        plan.free_numbers.insert(r.owner as i32, free);
    }
    let mut conflicts = Vec::new();
    plan.rollbacks = super::rollback::changes(image, request)?;
    judge_files(image, request, &mut plan, &mut conflicts)?;
    for r in image.of_kind(Kind::External) {
        let e: ExternalRecord = decode(r, crate::resource::fd::external::VERSION)?;
        if e.number > 2 && !request.external.iter().any(|(n, _)| *n == e.number) {
            conflicts.push(Conflict {
                what: format!("descriptor {}", e.number),
                why: format!("the job got it from outside ({}), and it is not open here", e.target),
                advice: format!("restore with it open: ckpt restore … {}<>FILE", e.number),
            });
        }
    }
    plan.watched = crate::resource::fd::inotify::look(image, &mut conflicts)?;
    conflicts.extend(super::ports::conflicts(image, &[])?);
    if image.job.uid != nix::unistd::geteuid().as_raw() && !nix::unistd::geteuid().is_root() {
        conflicts.push(Conflict {
            what: request.label.clone(),
            why: format!(
                "it is a checkpoint of user {}, you are user {}",
                image.job.uid,
                nix::unistd::geteuid()
            ),
            advice: "restore as that user or as root".into(),
        });
    }
    if conflicts.is_empty() { Ok(plan) } else { Err(RestoreError::Conflicts(Conflicts(conflicts))) }
}

fn own_vdso_hash(own: &[crate::model::memory::Vma]) -> Result<u64, RestoreError> {
    let Some(v) = own.iter().find(|v| v.name == "[vdso]") else { return Ok(0) };
    crate::resource::memory_map::vdso_hash(nix::unistd::Pid::this(), v.start..v.end)
        .map_err(RestoreError::errno(1, "reading its vDSO"))
}

fn judge_files(
    image: &Image,
    request: &RestoreRequest,
    plan: &mut Plan,
    conflicts: &mut Vec<Conflict>,
) -> Result<(), RestoreError> {
    let policy = request.options.files;
    for (path, used) in files(image)? {
        let name = String::from_utf8_lossy(&path).into_owned();
        // Files of the job's own /dev/shm come out of the image.
        if path.starts_with(b"/dev/shm/") || plan.rollbacks.contains_key(&path) {
            continue;
        }
        let mut conflict = |why: String, advice: &str| {
            conflicts.push(Conflict { what: name.clone(), why, advice: advice.to_owned() });
        };
        let now = match std::fs::metadata(OsStr::from_bytes(&path)) {
            Ok(m) => FileStat::of(&m),
            Err(e) => {
                let why = if used.mapped { "the job has it mapped" } else { "the job has it open" };
                conflict(format!("{why}, and now: {e}"), "put it back and restore again");
                continue;
            }
        };
        let allowed = request.options.allow_changed.contains(&name);
        if now.format() != used.stat.format() {
            conflict("it is no regular file any more".into(), "put it back and restore again");
            continue;
        }
        let same = used.stat.dev == now.dev && used.stat.ino == now.ino;
        let unchanged = used.stat.unchanged(&now);
        let left = || crate::resource::fd::regular_file::left_by_restore(&request.dir, &path, &now);
        if allowed || unchanged && same || left() {
            continue;
        }
        match used.compare_build(Path::new(OsStr::from_bytes(&path)), &now) {
            BuildMatch::Other { then, now } => {
                conflict(
                    format!("the job has it mapped and needs build-id {then}; this one has build-id {now}"),
                    "put the old file back, or accept this one with --allow-changed PATH",
                );
                continue;
            }
            BuildMatch::Same if policy != FilePolicy::Refuse => continue,
            _ if unchanged => continue,
            _ => {}
        }
        let grew = same && now.size > used.stat.size && used.writers && !used.mapped;
        if grew && policy != FilePolicy::Keep && used.ends.is_some() {
            // A log that was copied and emptied, and has grown longer than it was, looks as if it had only grown.
            let ends = file_ends(Path::new(OsStr::from_bytes(&path)), used.stat.size);
            if ends != used.ends {
                conflict(
                    "what it held at the dump is not what it begins with now (was it rotated?)".into(),
                    "put the old file back, or use it as it is with --files keep or --allow-changed PATH",
                );
                continue;
            }
        }
        let change = match (now.size.cmp(&used.stat.size), same) {
            (_, false) => "it has been replaced by another file since the dump".to_owned(),
            (std::cmp::Ordering::Equal, _) => "its content has changed since the dump".to_owned(),
            (_, _) => format!("it had {} bytes at the dump and has {} now", used.stat.size, now.size),
        };
        match policy {
            FilePolicy::Keep if !used.mapped => {}
            FilePolicy::Auto if grew && used.at_end => plan.cuts.push((path, used.stat, now)),
            FilePolicy::Rollback if grew => plan.cuts.push((path, used.stat, now)),
            FilePolicy::Refuse => {
                conflict(change, "without `--files refuse` ckpt would judge what can go on")
            }
            _ if used.mapped => conflict(
                format!("{change}, and the job has it mapped"),
                "put the old file back, or accept it with --allow-changed PATH",
            ),
            _ if grew => conflict(
                change,
                "cut it back with --files rollback, use it as it is with --files keep or --allow-changed PATH",
            ),
            _ => conflict(
                change,
                "put the old file back, or use it as it is with --files keep or --allow-changed PATH",
            ),
        }
    }
    Ok(())
}

/// Files of the image that several copies of it would write, and ports that they would take.
///
/// # Errors
/// If a record does not decode.
pub fn copy_conflicts(image: &Image) -> Result<Conflicts, RestoreError> {
    // Files of the job's own /dev/shm are each copy's own.
    let shared = |path: &[u8]| !path.starts_with(b"/dev/shm/");
    let written =
        files(image)?.into_iter().filter(|(path, u)| (u.writers || u.mapped_writable) && shared(path));
    let written = written.map(|(path, _)| Conflict {
        what: String::from_utf8_lossy(&path).into_owned(),
        why: "the job has it open for writing, and several copies would write to it".to_owned(),
        advice: "restore one at a time".to_owned(),
    });
    Ok(Conflicts(written.chain(super::ports::copy_conflicts(image)?).collect()))
}

/// Whether the application has itself made memory mergeable: then what is shared is its own affair.
///
/// # Errors
/// If a record does not decode.
pub fn is_mergeable_by_itself(image: &Image) -> Result<bool, RestoreError> {
    for r in image.of_kind(Kind::MemoryMap) {
        let m: MemoryMapRecord = decode(r, crate::resource::memory_map::VERSION)?;
        if m.vmas.iter().any(|v| v.advice.contains(&libc::MADV_MERGEABLE)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the job has memory that is not to be shared with a forked child (MADV_WIPEONFORK).
///
/// # Errors
/// If a record does not decode.
pub fn has_wiped_memory(image: &Image) -> Result<bool, RestoreError> {
    for r in image.of_kind(Kind::MemoryMap) {
        let m: MemoryMapRecord = decode(r, crate::resource::memory_map::VERSION)?;
        if m.vmas.iter().any(is_wiped_in_copies) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Files of the image that another live job holds open for writing, and ports that somebody has. Called outside, where
/// those can be seen.
///
/// # Errors
/// If a record does not decode.
pub fn live_conflicts(image: &Image, jobs: &[(String, i32)]) -> Result<Conflicts, RestoreError> {
    let used = files(image)?;
    let inodes: BTreeSet<(u64, u64)> =
        used.values().filter(|u| u.writers).map(|u| (u.stat.dev, u.stat.ino)).collect();
    let mut out = Conflicts::default();
    for (name, init) in jobs {
        let mut pending = crate::model::process::children(*init);
        while let Some(host) = pending.pop() {
            pending.extend(crate::model::process::children(host));
            let list = crate::model::file::descriptors(nix::unistd::Pid::from_raw(host)).unwrap_or_default();
            for (fd, seen) in list {
                let writes = seen.flags & libc::O_ACCMODE != libc::O_RDONLY;
                if writes
                    && seen.stat.format() == libc::S_IFREG
                    && inodes.contains(&(seen.stat.dev, seen.stat.ino))
                {
                    out.0.push(Conflict {
                        what: seen.target,
                        why: format!(
                            "the running job {name} has it open for writing (process {host} fd {fd})"
                        ),
                        advice: format!("end that job first: ckpt kill {name}"),
                    });
                }
            }
        }
    }
    out.0.sort();
    out.0.dedup_by(|a, b| a.what == b.what);
    out.0.extend(super::ports::conflicts(image, jobs)?);
    Ok(out)
}
