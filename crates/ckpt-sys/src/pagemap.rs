// SPDX-License-Identifier: MIT OR Apache-2.0
//! PAGEMAP_SCAN (Linux 6.7, `linux/fs.h`): the pages of a process that are of certain sorts, without looking at each.

use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;

/// A page of a file or of shared memory.
pub const FILE: u64 = 1 << 2;
/// In memory.
pub const PRESENT: u64 = 1 << 3;
/// In swap.
pub const SWAPPED: u64 = 1 << 4;
/// The zero page.
pub const ZERO: u64 = 1 << 5;

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
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_inverted: not,
        category_mask: not,
        category_anyof_mask: any,
        return_mask: any,
        ..Arguments::default()
    };
    // SAFETY: `args` is a live `struct pm_scan_arg`, and the kernel writes at most `vec_len` regions to `vec`, a live
    // slice of that many.
    let n = Errno::result(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut args) })?;
    Ok((n as usize, args.walk_end))
}
