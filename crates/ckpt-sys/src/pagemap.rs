// SPDX-License-Identifier: MIT OR Apache-2.0
//! /proc/pid/pagemap: the PAGEMAP_SCAN ioctl (Linux 6.7, `linux/fs.h`), which finds the pages of a process that are of certain
//! sorts without looking at each, and soft-dirty bits (Documentation/admin-guide/mm/soft-dirty.rst in the kernel's sources).

use crate::memory::PAGE;
use nix::errno::Errno;
use nix::unistd::Pid;
use std::fs::File;
use std::os::fd::AsRawFd;

/// The page has been written to since it was protected, or never was.
pub const WRITTEN: u64 = 1 << 1;
/// A page of a file or of shared memory.
pub const FILE: u64 = 1 << 2;
/// In memory.
pub const PRESENT: u64 = 1 << 3;
/// In swap; also the mark that an unmapped page of a file leaves if it was protected.
pub const SWAPPED: u64 = 1 << 4;
/// The zero page.
pub const ZERO: u64 = 1 << 5;

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Stretches that one call of [`scan_written`] gives at most.
const REGIONS: usize = 1024;

/// `struct page_region`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// What all its pages are.
    pub categories: u64,
}

impl Region {
    /// Whether its pages are of one of these sorts.
    pub fn is(&self, categories: u64) -> bool {
        self.categories & categories != 0
    }
}

/// `struct pm_scan_arg`.
#[derive(Debug, Default)]
#[repr(C)]
struct Arguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;

/// Fills `regions` with the stretches in `[start, end)` of pages that are of one of the sorts `any` and of none of the
/// sorts `not`. Gives their number, and where the scan ended: at `end`, or where `regions` was full.
///
/// # Errors
/// ENOTTY before Linux 6.7; ESRCH if the process of `pagemap` has ended.
pub fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    any: u64,
    not: u64,
    regions: &mut [Region],
) -> Result<(usize, u64), Errno> {
    let mut args = Arguments {
        size: size_of::<Arguments>() as u64,
        start,
        end,
        category_inverted: not,
        category_mask: not,
        category_anyof_mask: any,
        return_mask: any,
        ..Arguments::default()
    };
    call(pagemap, &mut args, regions)
}

fn call(pagemap: &File, args: &mut Arguments, regions: &mut [Region]) -> Result<(usize, u64), Errno> {
    args.vec = regions.as_mut_ptr() as u64;
    args.vec_len = regions.len() as u64;
    // SAFETY: `args` is a live `struct pm_scan_arg`, and the kernel writes at most `vec_len` regions to `vec`, a live
    // slice of that many.
    let n =
        Errno::result(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut *args) })? as usize;
    // A call that fills the kernel's own buffer on the way and then comes to the end tells where the buffer was full. What it gave
    // beyond must not be given again.
    let last = regions.get(..n).and_then(<[Region]>::last).map_or(0, |r| r.end);
    Ok((n, args.walk_end.max(last)))
}

/// Gives all pages of `[start, end)` that are in memory or in swap, with [`WRITTEN`], [`FILE`], [`PRESENT`], [`SWAPPED`] and [`ZERO`], in
/// order. With `protect` those that are written are protected in the same step, so that each write is seen either now or by the next
/// scan. [`FILE`] is told only if `files`: it takes a look at each page's own description, which costs ten times as much as all else.
///
/// # Errors
/// `EPERM` if a mapping in the range is not watched by a [`crate::userfault::WriteTracking`]; what comes before it has been given and
/// protected. `ENOTTY` before Linux 6.7; `ESRCH` if the process has ended.
pub fn scan_written(
    pagemap: &File,
    start: u64,
    end: u64,
    protect: bool,
    files: bool,
    sink: &mut dyn FnMut(Region),
) -> Result<(), Errno> {
    let args = Arguments {
        flags: PM_SCAN_CHECK_WPASYNC | if protect { PM_SCAN_WP_MATCHING } else { 0 },
        category_anyof_mask: PRESENT | SWAPPED,
        return_mask: WRITTEN | PRESENT | SWAPPED | ZERO | if files { FILE } else { 0 },
        ..Arguments::default()
    };
    all(pagemap, start, end, args, sink)
}

/// What [`scan_changes`] finds: stretches of pages, each list in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// What [`scan_writes`] gives.
    pub written: Vec<Region>,
    /// In memory or in swap, and still protected. Among them may be zero pages.
    pub unwritten: Vec<Region>,
}

/// The pages of `[start, end)` that are in memory or in swap, and written: with [`PRESENT`], [`SWAPPED`] and [`ZERO`], in order. With
/// `protect` they are protected in the same step. For memory that has no file behind it.
///
/// # Errors
/// As [`scan_written`].
pub fn scan_writes(pagemap: &File, start: u64, end: u64, protect: bool) -> Result<Vec<Region>, Errno> {
    let args = Arguments {
        flags: PM_SCAN_CHECK_WPASYNC | if protect { PM_SCAN_WP_MATCHING } else { 0 },
        category_mask: WRITTEN,
        category_anyof_mask: PRESENT | SWAPPED,
        return_mask: PRESENT | SWAPPED | ZERO,
        ..Arguments::default()
    };
    let mut written = Vec::new();
    all(pagemap, start, end, args, &mut |r| written.push(r))?;
    Ok(written)
}

/// As [`scan_written`], for memory that has no file behind it, of a process that stands still. It takes less time where little was
/// written: the kernel is not asked to name what is unwritten, only what is written and what is not there.
///
/// # Errors
/// As [`scan_written`].
pub fn scan_changes(pagemap: &File, start: u64, end: u64, protect: bool) -> Result<Changes, Errno> {
    let written = scan_writes(pagemap, start, end, protect)?;
    let args = Arguments {
        flags: PM_SCAN_CHECK_WPASYNC,
        category_inverted: PRESENT | SWAPPED,
        category_mask: PRESENT | SWAPPED,
        ..Arguments::default()
    };
    let mut missing = Vec::new();
    all(pagemap, start, end, args, &mut |r| missing.push(r))?;
    // What is neither is there and protected.
    let (mut unwritten, mut at) = (Vec::new(), start);
    let (mut a, mut b) = (written.iter().peekable(), missing.iter().peekable());
    loop {
        let next = match (a.peek(), b.peek()) {
            (Some(x), Some(y)) if x.start > y.start => b.next(),
            (None, _) => b.next(),
            _ => a.next(),
        };
        let (from, to) = next.map_or((end, end), |r| (r.start, r.end));
        if at < from {
            unwritten.push(Region { start: at, end: from, categories: 0 });
        }
        at = at.max(to);
        if next.is_none() {
            return Ok(Changes { written, unwritten });
        }
    }
}

/// Gives all that a scan of `[start, end)` finds.
fn all(
    pagemap: &File,
    start: u64,
    end: u64,
    args: Arguments,
    sink: &mut dyn FnMut(Region),
) -> Result<(), Errno> {
    let mut regions = [Region::default(); REGIONS];
    let mut args = Arguments { size: size_of::<Arguments>() as u64, end, ..args };
    let mut at = start;
    while at < end {
        args.start = at;
        let (n, seen) = call(pagemap, &mut args, &mut regions)?;
        regions[..n].iter().copied().for_each(&mut *sink);
        if seen <= at {
            return Err(Errno::EIO);
        }
        at = seen;
    }
    Ok(())
}

/// A page is dirty in the sense of soft-dirty tracking.
pub const ENTRY_SOFT_DIRTY: u64 = 1 << 55;
/// Nobody else has the page mapped. Set for anonymous pages, never for the shared zero page.
pub const ENTRY_EXCLUSIVE: u64 = 1 << 56;
/// A page of a file or of shared memory.
pub const ENTRY_FILE: u64 = 1 << 61;
/// In swap.
pub const ENTRY_SWAPPED: u64 = 1 << 62;
/// In memory.
pub const ENTRY_PRESENT: u64 = 1 << 63;

/// The raw entries of the pages of `[start, end)`.
///
/// # Errors
/// What reading gives.
pub fn entries(pagemap: &File, start: u64, end: u64) -> std::io::Result<Vec<u64>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0u8; ((end - start) / PAGE * 8) as usize];
    pagemap.read_exact_at(&mut bytes, start / PAGE * 8)?;
    Ok(bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default())).collect())
}

/// Makes all pages of a process clean for soft-dirty tracking (4 to /proc/pid/clear_refs).
///
/// # Errors
/// `EINVAL` if the kernel was built without CONFIG_MEM_SOFT_DIRTY; `EACCES` for a process that is not dumpable.
pub fn clear_soft_dirty(pid: Pid) -> std::io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "4")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::userfault::WriteTracking;

    /// Anonymous memory that is unmapped again.
    struct Memory {
        addr: u64,
        bytes: u64,
    }

    impl Memory {
        fn map(pages: u64) -> Memory {
            let bytes = pages * PAGE;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping where nothing is.
            let p = unsafe { libc::mmap(std::ptr::null_mut(), bytes as usize, prot, flags, -1, 0) };
            assert_ne!(p, libc::MAP_FAILED);
            // SAFETY: the mapping just made; huge pages would be protected as a whole.
            unsafe { libc::madvise(p, bytes as usize, libc::MADV_NOHUGEPAGE) };
            Memory { addr: p as u64, bytes }
        }

        fn touch(&self, page: u64, value: u8) {
            assert!(page * PAGE < self.bytes);
            // SAFETY: inside the mapping, which is writable.
            unsafe { ((self.addr + page * PAGE) as *mut u8).write_volatile(value) };
        }

        fn look(&self, page: u64) -> u8 {
            assert!(page * PAGE < self.bytes);
            // SAFETY: inside the mapping, which is readable.
            unsafe { ((self.addr + page * PAGE) as *const u8).read_volatile() }
        }

        fn drop_page(&self, page: u64) {
            let at = (self.addr + page * PAGE) as *mut libc::c_void;
            // SAFETY: a page of the mapping, to which there are no references.
            assert_eq!(unsafe { libc::madvise(at, PAGE as usize, libc::MADV_DONTNEED) }, 0);
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            // SAFETY: the whole mapping, to which there are no references.
            unsafe { libc::munmap(self.addr as *mut libc::c_void, self.bytes as usize) };
        }
    }

    fn pagemap() -> File {
        File::open("/proc/self/pagemap").unwrap()
    }

    /// The pages of `m`: 'w' written, '-' present or swapped and not written, ' ' not there.
    fn picture(m: &Memory, protect: bool) -> String {
        let mut out = vec![b' '; (m.bytes / PAGE) as usize];
        scan_written(&pagemap(), m.addr, m.addr + m.bytes, protect, true, &mut |r| {
            for page in (r.start - m.addr) / PAGE..(r.end - m.addr) / PAGE {
                out[page as usize] = if r.is(WRITTEN) { b'w' } else { b'-' };
            }
        })
        .unwrap();
        String::from_utf8(out).unwrap()
    }

    /// As [`picture`], by the scan that is not told what is unwritten.
    fn changes(m: &Memory, protect: bool) -> String {
        let mut out = vec![b' '; (m.bytes / PAGE) as usize];
        let found = scan_changes(&pagemap(), m.addr, m.addr + m.bytes, protect).unwrap();
        for (sort, list) in [(b'w', &found.written), (b'-', &found.unwritten)] {
            let pages = list.iter().flat_map(|r| (r.start - m.addr) / PAGE..(r.end - m.addr) / PAGE);
            pages.for_each(|page| out[page as usize] = sort);
        }
        String::from_utf8(out).unwrap()
    }

    /// `None` where the kernel can't: the VM tests cover that.
    fn tracking() -> Option<WriteTracking> {
        match WriteTracking::of_this_process() {
            Ok(t) => Some(t),
            Err(errno) => {
                eprintln!("skipped: no asynchronous write protection: {errno}");
                None
            }
        }
    }

    #[test]
    fn only_what_was_written_since_is_written() {
        let Some(t) = tracking() else { return };
        let m = Memory::map(8);
        (0..6).for_each(|page| m.touch(page, 1));
        assert_eq!(
            scan_written(&pagemap(), m.addr, m.addr + m.bytes, true, true, &mut |_| ()),
            Err(Errno::EPERM)
        );
        t.register(m.addr, m.bytes).unwrap();
        assert_eq!(picture(&m, true), "wwwwww  ");
        assert_eq!(picture(&m, true), "------  ");
        m.touch(2, 2);
        m.look(3);
        m.touch(7, 1);
        assert_eq!(picture(&m, false), "--w--- w");
        assert_eq!(picture(&m, true), "--w--- w");
        assert_eq!(picture(&m, true), "------ -");
        // Gone pages are not there, and written when they come back, even as zero pages.
        m.drop_page(0);
        m.drop_page(1);
        assert_eq!(picture(&m, true), "  ---- -");
        assert_eq!(m.look(1), 0);
        m.touch(0, 3);
        assert_eq!(picture(&m, false), "ww---- -");
        // Watching again what is watched changes nothing; not watching any more lifts all.
        t.register(m.addr, m.bytes).unwrap();
        assert_eq!(picture(&m, true), "ww---- -");
        t.unregister(m.addr, m.bytes).unwrap();
        t.register(m.addr, m.bytes).unwrap();
        assert_eq!(picture(&m, true), "wwwwww w");
        drop(t);
        assert_eq!(
            scan_written(&pagemap(), m.addr, m.addr + m.bytes, true, true, &mut |_| ()),
            Err(Errno::EPERM)
        );
    }

    #[test]
    fn a_scan_that_fails_has_protected_what_came_before() {
        let Some(t) = tracking() else { return };
        let m = Memory::map(8);
        (0..8).for_each(|page| m.touch(page, 1));
        t.register(m.addr, 4 * PAGE).unwrap();
        assert_eq!(scan_writes(&pagemap(), m.addr, m.addr + m.bytes, true), Err(Errno::EPERM));
        assert_eq!(scan_writes(&pagemap(), m.addr, m.addr + 4 * PAGE, false), Ok(Vec::new()));
    }

    #[test]
    fn changes_are_told_from_what_is_missing() {
        let Some(t) = tracking() else { return };
        // Some page tables are missing as well.
        let pages = 8 * (2 << 20) / PAGE;
        let m = Memory::map(pages);
        assert_eq!(
            scan_changes(&pagemap(), m.addr, m.addr + m.bytes, true),
            Err(Errno::EPERM),
            "it is not watched"
        );
        t.register(m.addr, m.bytes).unwrap();
        let same = |protect| {
            let expected = picture(&m, false);
            assert!(changes(&m, protect) == expected);
            expected
        };
        assert_eq!(same(true).trim(), "");
        let touched = [0, 1, 5, 700, 701, 1024, 3000, pages - 1];
        touched.iter().for_each(|page| m.touch(*page, 1));
        assert_eq!(same(true).matches('w').count(), touched.len());
        assert_eq!(same(true).matches('-').count(), touched.len());
        m.touch(701, 2);
        m.look(702);
        m.drop_page(5);
        (512..1024).for_each(|page| m.drop_page(page));
        m.touch(600, 3);
        assert_eq!(same(false).matches('w').count(), 1);
        assert_eq!(same(true).matches('-').count(), 5);
        // A zero page was protected when it was found.
        m.look(2);
        assert_eq!(&same(true)[..4], "--w ");
        assert_eq!(&same(true)[..4], "--- ");
        // More than one call gives.
        (0..pages).for_each(|page| m.touch(page, 4));
        same(true);
        (0..pages).step_by(2).for_each(|page| m.touch(page, 5));
        assert_eq!(same(true).matches('w').count() as u64, pages / 2);
        assert_eq!(same(true).matches('w').count(), 0);
    }

    #[test]
    fn mappings_made_later_are_not_watched() {
        let Some(t) = tracking() else { return };
        let m = Memory::map(4);
        (0..4).for_each(|page| m.touch(page, 1));
        t.register(m.addr, m.bytes).unwrap();
        assert_eq!(picture(&m, true), "wwww");
        // The kernel calls a moved mapping a new one.
        let to = Memory::map(4);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, at) = (m.addr as *mut libc::c_void, to.addr as *mut libc::c_void);
        let bytes = m.bytes as usize;
        // SAFETY: moves the pages of one mapping over another, both without references to them.
        let moved = unsafe { libc::mremap(from, bytes, bytes, flags, at) };
        assert_eq!(moved as u64, to.addr);
        let end = to.addr + to.bytes;
        assert_eq!(scan_written(&pagemap(), to.addr, end, true, true, &mut |_| ()), Err(Errno::EPERM));
        t.register(to.addr, to.bytes).unwrap();
        let again = WriteTracking::of_this_process().unwrap();
        assert_eq!(again.register(to.addr, to.bytes), Err(Errno::EBUSY));
        // What was mapped there is not any more.
        std::mem::forget(m);
    }

    #[test]
    fn more_regions_than_one_call_gives() {
        let Some(t) = tracking() else { return };
        let pages = 4 * REGIONS as u64;
        let m = Memory::map(pages);
        (0..pages).for_each(|page| m.touch(page, 1));
        t.register(m.addr, m.bytes).unwrap();
        assert_eq!(picture(&m, true), "w".repeat(pages as usize));
        (0..pages).step_by(2).for_each(|page| m.touch(page, 2));
        assert_eq!(picture(&m, true), "w-".repeat(pages as usize / 2));
        assert_eq!(picture(&m, false), "-".repeat(pages as usize));
    }

    /// Soft-dirty bits of the pages of `m`: 'w' dirty, '-' clean and nobody else's, '?' neither, ' ' not there.
    fn soft_picture(m: &Memory) -> String {
        let entry = |e: u64| match e {
            e if e & (ENTRY_PRESENT | ENTRY_SWAPPED) == 0 => ' ',
            e if e & ENTRY_SOFT_DIRTY != 0 => 'w',
            e if e & ENTRY_EXCLUSIVE != 0 => '-',
            _ => '?',
        };
        entries(&pagemap(), m.addr, m.addr + m.bytes).unwrap().into_iter().map(entry).collect()
    }

    /// What the use of soft-dirty bits relies on. Needs CONFIG_MEM_SOFT_DIRTY, which Debian's kernels have: run it in the VM.
    #[test]
    fn soft_dirty_bits_of_pages_that_are_ours_alone() {
        let m = Memory::map(6);
        (0..5).for_each(|page| m.touch(page, 1));
        let cleared = clear_soft_dirty(Pid::this());
        m.touch(1, 2);
        // A kernel without the bits may take the request all the same.
        if cleared.is_err() || soft_picture(&m) != "-w--- " {
            eprintln!("skipped: no soft-dirty bits: {cleared:?}");
            return;
        }
        m.look(2);
        m.touch(5, 1);
        assert_eq!(soft_picture(&m), "-w---w");
        // A dropped page that is only read is the zero page: clean, but not ours alone.
        m.drop_page(3);
        m.drop_page(4);
        assert_eq!(m.look(3), 0);
        assert_eq!(soft_picture(&m), "-w-? w");
        // What is moved is dirty.
        clear_soft_dirty(Pid::this()).unwrap();
        let to = Memory::map(6);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, at, bytes) = (m.addr as *mut libc::c_void, to.addr as *mut libc::c_void, m.bytes as usize);
        // SAFETY: moves the pages of one mapping over another, both without references to them.
        assert_eq!(unsafe { libc::mremap(from, bytes, bytes, flags, at) } as u64, to.addr);
        std::mem::forget(m);
        assert!(!soft_picture(&to).contains('-'), "{:?}", soft_picture(&to));
    }

    #[test]
    fn the_kernel_is_probed_by_doing() {
        assert_eq!(crate::userfault::probe_tracking().is_ok(), tracking().is_some());
    }
}
