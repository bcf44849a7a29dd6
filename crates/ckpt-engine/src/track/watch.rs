// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sources of knowledge about writes to one process's private memory, and what each can and cannot see.
//!
//! *Write protection* (userfaultfd, Linux 6.7): exact by page. A page is unwritten only if it was protected by a scan and is still. New,
//! moved and forked mappings are not watched, and the kernel says so at the scan.
//!
//! *Soft-dirty* (CONFIG_MEM_SOFT_DIRTY, any kernel): one bit a page, cleared for the whole process at once, by anyone who may. The zero page
//! does not have it, nor what is merely mapped from a file: only pages that are this process's alone count as unwritten. Whether somebody
//! else has cleared it is seen by a *canary*: a page that ckpt makes dirty after clearing, and that nobody else writes to.
//!
//! *The kernel module* (with the engine of that name): the same bits, but read and cleared in the one walk that takes the snapshot, under a
//! lock that nobody else's clearing gets past unseen. The engine asks it ([`crate::snapshot::kmod`]); between dumps there is only a session
//! to be kept.

use crate::model::memory::Vma;
use crate::model::process::Process;
use ckpt_sys::device::Session;
use ckpt_sys::pagemap::{self, FILE, PRESENT, SWAPPED, WRITTEN, ZERO};
use ckpt_sys::userfault::WriteTracking;
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
    Module { session: Session, generation: u64 },
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
    /// In a mapping of a file: it may be in swap, or be what a page leaves that was protected and has been dropped. It is known when it
    /// has been read.
    pub doubtful: bool,
}

/// Private memory that has pages of its own. What has none now is not worth a mapping of its own in the kernel's list.
fn is_worth_it(v: &Vma) -> bool {
    !v.shared && !v.is_vdso_part() && v.anonymous_bytes + v.swap_bytes > 0
}

pub(super) fn pagemap_of(host: Pid) -> std::io::Result<File> {
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

    /// The module began this generation of a session when the last checkpoint's snapshot was taken.
    pub(super) fn by_module(session: Session, generation: u64) -> Watch {
        Watch(Way::Module { session, generation })
    }

    /// What [`Watch::by_module`] was given.
    pub(super) fn into_session(self) -> Option<(Session, u64)> {
        match self.0 {
            Way::Module { session, generation } => Some((session, generation)),
            Way::Protection(_) | Way::SoftDirty { .. } => None,
        }
    }

    /// [`Watch::by_module`]: which generation.
    pub(super) fn generation(&self) -> Option<u64> {
        match self.0 {
            Way::Module { generation, .. } => Some(generation),
            Way::Protection(_) | Way::SoftDirty { .. } => None,
        }
    }

    /// The source of knowledge, as reports name it.
    pub(super) fn source(&self) -> &'static str {
        match self.0 {
            Way::Protection(_) => "userfaultfd",
            Way::SoftDirty { .. } => "soft-dirty",
            Way::Module { .. } => "kmod",
        }
    }

    /// Whether the mappings show that they are watched (`uw` among their flags).
    pub(super) fn marks_mappings(&self) -> bool {
        matches!(self.0, Way::Protection(_))
    }

    /// Soft-dirty bits were cleared, and then this page made dirty.
    pub fn soft_dirty_since(canary: u64) -> Watch {
        Watch(Way::SoftDirty { canary })
    }

    /// The page that tells whether somebody else has cleared the bits.
    pub(super) fn canary(&self) -> Option<u64> {
        match self.0 {
            Way::Protection(_) | Way::Module { .. } => None,
            Way::SoftDirty { canary } => Some(canary),
        }
    }

    pub(super) fn into_fd(self) -> Option<OwnedFd> {
        match self.0 {
            Way::Protection(t) => Some(t.into_fd()),
            Way::Module { session, .. } => Some(session.into_fd()),
            Way::SoftDirty { .. } => None,
        }
    }

    /// Watches all private memory with pages of a frozen process. Only then: a mapping that grows meanwhile would be cut in two, and the
    /// application could no longer move it as one.
    ///
    /// # Errors
    /// `EBUSY` if another userfaultfd watches a part of it.
    pub(super) fn cover(&self, p: &Process) -> Result<(), Errno> {
        p.vmas.iter().filter(|v| is_worth_it(v)).try_for_each(|v| self.cover_range(v.start, v.bytes()))
    }

    /// Watches a whole private mapping of a frozen process. Its pages count as written until a scan protects them.
    ///
    /// # Errors
    /// `EBUSY` if another userfaultfd watches it.
    pub(super) fn cover_range(&self, start: u64, bytes: u64) -> Result<(), Errno> {
        let Way::Protection(tracking) = &self.0 else { return Ok(()) };
        match tracking.register(start, bytes) {
            Err(Errno::EBUSY) => Err(Errno::EBUSY),
            // Of a sort that can't be watched, or of another address space: it is saved whole each time.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Protects what is watched in a running process of which nothing is claimed yet.
    pub(super) fn protect(&self, p: &Process) {
        let (Way::Protection(_), Ok(pagemap)) = (&self.0, pagemap_of(p.host)) else { return };
        for v in p.vmas.iter().filter(|v| is_worth_it(v)) {
            // What can't be protected counts as written.
            let _ = pagemap::scan_written(&pagemap, v.start, v.end, true, false, &mut |_| ());
        }
    }

    /// Runs `look` while a part of a watched private mapping without a file, of a frozen process, is a mapping of its own, and so are the
    /// parts before and behind it: it is not watched meanwhile. Then all is one mapping again, with all pages of that part protected.
    /// Should the dumper be killed, the kernel ends all watching and joins them.
    ///
    /// # Errors
    /// If it could not be parted, or not be watched again: then its pages count as written.
    pub(super) fn apart<T>(
        &self,
        pagemap: &File,
        start: u64,
        end: u64,
        look: impl FnOnce() -> T,
    ) -> Result<T, Errno> {
        let Way::Protection(tracking) = &self.0 else { return Err(Errno::EOPNOTSUPP) };
        // What is not watched now is not to be cut: another mapping may have come to the same place.
        pagemap::scan_written(pagemap, start, end, false, false, &mut |_| ())?;
        tracking.unregister(start, end - start)?;
        ckpt_sys::hook::point();
        let seen = look();
        ckpt_sys::hook::point();
        tracking.register(start, end - start)?;
        pagemap::scan_written(pagemap, start, end, true, false, &mut |_| ())?;
        Ok(seen)
    }

    /// Whether the process may have executed a program since it was attached: then it must be attached anew.
    pub(super) fn is_lost(&self, p: &Process) -> bool {
        matches!(self.0, Way::Protection(_)) && !p.vmas.iter().any(|v| v.has("uw"))
    }

    /// How its pages are looked at.
    pub(super) fn look(&self) -> Look {
        match self.0 {
            Way::Protection(_) => Look::Protection,
            Way::SoftDirty { .. } => Look::SoftDirty,
            Way::Module { .. } => Look::Nowhere,
        }
    }
}

/// How pages are looked at.
#[derive(Debug, Clone, Copy)]
pub(super) enum Look {
    Protection,
    SoftDirty,
    Nowhere,
}

impl Look {
    /// The private pages of `[start, end)`, a part of one mapping, of the frozen process; what has been written since is protected again in
    /// the same step. `over_file`: the mapping is of a file. `None` if the range is not watched, and all of it counts as written.
    ///
    /// # Errors
    /// If the process is gone.
    pub(super) fn scan(
        self,
        pagemap: &File,
        start: u64,
        end: u64,
        over_file: bool,
        protect: bool,
    ) -> Result<Option<Vec<Stretch>>, Errno> {
        let mut out = Vec::new();
        match self {
            Look::Nowhere => Ok(None),
            Look::Protection if !over_file => {
                let found = match pagemap::scan_changes(pagemap, start, end, protect) {
                    Ok(found) => found,
                    Err(Errno::EPERM) => return Ok(None),
                    Err(errno) => return Err(errno),
                };
                let unwritten = found.unwritten.iter().map(|r| (r, true));
                let mut both: Vec<_> = found.written.iter().map(|r| (r, false)).chain(unwritten).collect();
                both.sort_unstable_by_key(|(r, _)| r.start);
                for (r, unwritten) in both.into_iter().filter(|(r, _)| !r.is(ZERO)) {
                    let bytes = r.end - r.start;
                    push(&mut out, Stretch { addr: r.start, bytes, unwritten, doubtful: false });
                }
                Ok(Some(out))
            }
            Look::Protection => {
                let mut add = |r: pagemap::Region| {
                    if r.is(FILE | ZERO) {
                        return;
                    }
                    let doubtful = over_file && r.is(SWAPPED) && !r.is(PRESENT);
                    let unwritten = !r.is(WRITTEN) && !doubtful;
                    push(&mut out, Stretch { addr: r.start, bytes: r.end - r.start, unwritten, doubtful });
                };
                match pagemap::scan_written(pagemap, start, end, protect, over_file, &mut add) {
                    Ok(()) => Ok(Some(out)),
                    Err(Errno::EPERM) => Ok(None),
                    Err(errno) => Err(errno),
                }
            }
            Look::SoftDirty => {
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
                        let bytes = ckpt_sys::memory::PAGE;
                        push(&mut out, Stretch { addr, bytes, unwritten, doubtful: false });
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
pub(super) fn push(out: &mut Vec<Stretch>, s: Stretch) {
    match out.last_mut() {
        Some(last)
            if last.addr + last.bytes == s.addr
                && (last.unwritten, last.doubtful) == (s.unwritten, s.doubtful) =>
        {
            last.bytes += s.bytes;
        }
        _ => out.push(s),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_of_one_sort_are_joined() {
        let page =
            |n: u64, unwritten, doubtful| Stretch { addr: n << 12, bytes: 1 << 12, unwritten, doubtful };
        let mut out = Vec::new();
        let sorts = [(false, false), (false, false), (false, true), (true, false), (true, false)];
        for (n, (unwritten, doubtful)) in sorts.into_iter().enumerate() {
            push(&mut out, page(n as u64, unwritten, doubtful));
        }
        push(&mut out, page(9, true, false));
        let found: Vec<(u64, u64)> = out.iter().map(|s| (s.addr >> 12, s.bytes >> 12)).collect();
        assert_eq!(found, [(0, 2), (2, 1), (3, 2), (9, 1)]);
    }
}
