// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sources of knowledge about writes to one process's private memory, and what each can and cannot see.
//!
//! *Write protection* (userfaultfd, Linux 6.7): exact by page. A page is unwritten only if it was protected by a scan and is still. New,
//! moved and forked mappings are not watched, and the kernel says so at the scan.
//!
//! *Soft-dirty* (CONFIG_MEM_SOFT_DIRTY, any kernel): one bit a page, cleared for the whole process at once, by anyone who may. The zero page
//! does not have it, nor what is merely mapped from a file: only pages that are this process's alone count as unwritten. Whether somebody
//! else has cleared it is seen by a *canary*: a page that ckpt makes dirty after clearing, and that nobody else writes to.

use crate::model::memory::Vma;
use crate::model::process::Process;
use ckpt_sys::pagemap::{self, FILE, PRESENT, SWAPPED, WRITTEN, ZERO};
use ckpt_sys::userfaultfd::WriteTracking;
use ckpt_sys::{Errno, Pid};
use std::fs::File;
use std::os::fd::OwnedFd;

/// How a process is watched.
#[derive(Debug)]
pub struct Watch(Way);

#[derive(Debug)]
enum Way {
    Protection(WriteTracking),
    SoftDirty { canary: u64 },
}

/// A stretch of private pages that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Address.
    pub addr: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Not written to since it was protected.
    pub unwritten: bool,
}

/// What [`Watch::cover`] did.
#[derive(Debug)]
pub enum Covered {
    /// All that could be is watched; these ranges only now.
    Watched(Vec<(u64, u64)>),
    /// The process has executed a program since: it must be attached anew.
    AnotherAddressSpace,
}

/// A mapping is watched by somebody else.
#[derive(Debug)]
pub struct Foreign {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// Private memory that has pages of its own. What has none now is not worth a mapping of its own in the kernel's list.
fn is_worth_it(v: &Vma) -> bool {
    !v.shared && !v.is_vdso_part() && v.anonymous_bytes + v.swap_bytes > 0
}

fn pagemap_of(host: Pid) -> std::io::Result<File> {
    File::open(format!("/proc/{host}/pagemap"))
}

impl Watch {
    /// A userfaultfd just made in the process.
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.7.
    pub fn protection(fd: OwnedFd) -> Result<Watch, Errno> {
        Ok(Watch(Way::Protection(WriteTracking::set_up(fd)?)))
    }

    /// One that was kept.
    pub(super) fn adopt(fd: OwnedFd) -> Watch {
        Watch(Way::Protection(WriteTracking::adopt(fd)))
    }

    /// Soft-dirty bits were cleared, and then this page made dirty.
    pub fn soft_dirty_since(canary: u64) -> Watch {
        Watch(Way::SoftDirty { canary })
    }

    /// The page that tells whether somebody else has cleared the bits.
    pub(super) fn canary(&self) -> Option<u64> {
        match self.0 {
            Way::Protection(_) => None,
            Way::SoftDirty { canary } => Some(canary),
        }
    }

    pub(super) fn into_fd(self) -> Option<OwnedFd> {
        match self.0 {
            Way::Protection(t) => Some(t.into_fd()),
            Way::SoftDirty { .. } => None,
        }
    }

    /// Watches all of the running process's private memory, and protects what was not watched before.
    ///
    /// # Errors
    /// If another userfaultfd watches a part of it.
    pub(super) fn cover(&self, p: &Process) -> Result<Covered, Foreign> {
        let Way::Protection(tracking) = &self.0 else { return Ok(Covered::Watched(Vec::new())) };
        let mut young = Vec::new();
        let Ok(pagemap) = pagemap_of(p.host) else { return Ok(Covered::Watched(young)) };
        for v in p.vmas.iter().filter(|v| is_worth_it(v)) {
            let ours = v.has("uw");
            match tracking.register(v.start, v.bytes()) {
                Ok(()) => {}
                Err(Errno::EBUSY) => return Err(Foreign { start: v.start, end: v.end }),
                Err(Errno::ENOMEM | Errno::ESRCH) => return Ok(Covered::AnotherAddressSpace),
                // Unmapped meanwhile, or of a sort that can't be watched: saved whole.
                Err(_) => continue,
            }
            if ours {
                continue;
            }
            young.push((v.start, v.end));
            if pagemap::scan_written(&pagemap, v.start, v.end, true, &mut |_| ()) == Err(Errno::EPERM) {
                // Watched, but not here. (Or the mapping has just been replaced: then it is attached once too often.)
                return Ok(Covered::AnotherAddressSpace);
            }
        }
        Ok(Covered::Watched(young))
    }

    /// The private pages of `[start, end)`, a part of one mapping, of the frozen process; what has been written since is protected again in
    /// the same step. `over_file`: the mapping is of a file. `None` if the range is not watched, and all of it counts as written.
    ///
    /// # Errors
    /// If the process is gone.
    pub(super) fn scan(
        &self,
        pagemap: &File,
        start: u64,
        end: u64,
        over_file: bool,
        protect: bool,
    ) -> Result<Option<Vec<Stretch>>, Errno> {
        let mut out = Vec::new();
        match &self.0 {
            Way::Protection(_) => {
                let mut add = |r: pagemap::Region| {
                    if r.is(FILE | ZERO) {
                        return;
                    }
                    // What looks like swap in a mapping of a file may be the mark of a page that has been dropped.
                    let doubtful = over_file && r.is(SWAPPED) && !r.is(PRESENT);
                    let unwritten = !r.is(WRITTEN) && !doubtful;
                    push(&mut out, Stretch { addr: r.start, bytes: r.end - r.start, unwritten });
                };
                match pagemap::scan_written(pagemap, start, end, protect, &mut add) {
                    Ok(()) => Ok(Some(out)),
                    Err(Errno::EPERM) => Ok(None),
                    Err(errno) => Err(errno),
                }
            }
            Way::SoftDirty { .. } => {
                use pagemap::{ENTRY_EXCLUSIVE, ENTRY_FILE, ENTRY_PRESENT, ENTRY_SOFT_DIRTY, ENTRY_SWAPPED};
                const CHUNK: u64 = 64 << 20;
                let mut at = start;
                while at < end {
                    let stop = end.min(at + CHUNK);
                    let entries = pagemap::entries(pagemap, at, stop).map_err(|_| Errno::EIO)?;
                    for (i, e) in entries.iter().enumerate() {
                        if e & (ENTRY_PRESENT | ENTRY_SWAPPED) == 0 || e & ENTRY_FILE != 0 {
                            continue;
                        }
                        let alone = e & ENTRY_EXCLUSIVE != 0 || (e & ENTRY_SWAPPED != 0 && !over_file);
                        let unwritten = e & ENTRY_SOFT_DIRTY == 0 && alone;
                        let addr = at + i as u64 * ckpt_sys::memory::PAGE;
                        push(&mut out, Stretch { addr, bytes: ckpt_sys::memory::PAGE, unwritten });
                    }
                    at = stop;
                }
                Ok(Some(out))
            }
        }
    }
}

impl Watch {
    /// For soft-dirty bits: clears them all and makes the canary dirty. The process is frozen.
    ///
    /// # Errors
    /// As writing to clear_refs.
    pub(super) fn start_over(&self, p: &Process) -> std::io::Result<()> {
        let Way::SoftDirty { canary } = self.0 else { return Ok(()) };
        pagemap::clear_soft_dirty(p.host)?;
        // Written with what it holds.
        let memory = ckpt_sys::memory::Forced::open(p.host)?;
        let mut byte = [0];
        memory.read(canary, &mut byte)?;
        memory.write(canary, &byte)
    }

    /// Whether somebody else may have cleared soft-dirty bits since [`Watch::start_over`].
    pub(super) fn is_doubtful(&self, host: Pid) -> bool {
        let Way::SoftDirty { canary } = self.0 else { return false };
        let page = canary / ckpt_sys::memory::PAGE * ckpt_sys::memory::PAGE;
        let entry = pagemap_of(host).and_then(|f| pagemap::entries(&f, page, page + ckpt_sys::memory::PAGE));
        entry.map_or(true, |e| e.first().is_none_or(|e| e & pagemap::ENTRY_SOFT_DIRTY == 0))
    }
}

/// A byte that the application never writes to: the last one behind the vDSO, of which ckpt's injections make a private copy.
pub(super) fn canary_page(p: &Process) -> Option<u64> {
    p.padding().map(|padding| padding.end - 1)
}

/// Adds a stretch behind the others.
fn push(out: &mut Vec<Stretch>, s: Stretch) {
    match out.last_mut() {
        Some(last) if last.addr + last.bytes == s.addr && last.unwritten == s.unwritten => {
            last.bytes += s.bytes
        }
        _ => out.push(s),
    }
}
