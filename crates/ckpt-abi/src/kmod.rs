// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interface of `/dev/ckpt` as `kmod/ckpt.h` defines it, field by field; `tests/kmod_header.rs` compares the two.
//!
//! A process makes an open `/dev/ckpt` a *session* on its own memory ([`ATTACH`]); whoever holds a descriptor of the session
//! takes *snapshots* ([`SNAPSHOT`]), which are descriptors too: [`GETRUNS`] tells what is in one, pread(2) and splice(2)
//! read it at the virtual addresses of the process. The errnos of each command are in the header.

/// Raised when an old program could misunderstand.
pub const ABI_VERSION: u32 = 1;

/// `struct ckpt_query.features`: the kernel has soft-dirty bits.
pub const FEATURE_INCREMENTAL: u64 = 1 << 0;
/// `struct ckpt_query.features`: huge pages mapped by a PMD are taken whole.
pub const FEATURE_THP: u64 = 1 << 1;
/// `struct ckpt_query.features`: broken on purpose, for a test.
pub const FEATURE_TEST_BUILD: u64 = 1 << 63;

/// `struct ckpt_snapshot_args.flags`: leave out what is unchanged.
pub const SNAPSHOT_INCREMENTAL: u32 = 1 << 0;
/// `struct ckpt_snapshot_args.flags`: begin a new generation.
pub const SNAPSHOT_CLEAR: u32 = 1 << 1;

/// In the snapshot; read it from there.
pub const KIND_DATA: u32 = 1 << 0;
/// Unchanged since the generation began.
pub const KIND_SAME: u32 = 1 << 1;
/// The kernel's page of zeros.
pub const KIND_ZERO: u32 = 1 << 2;
/// Can't be shared (in-flight I/O, swap): to be copied from the process while it stands still.
pub const KIND_COPY: u32 = 1 << 3;
/// A shared, hugetlb or device mapping.
pub const KIND_FOREIGN: u32 = 1 << 4;

/// `struct ckpt_query`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Query {
    pub size: u32,
    pub abi_version: u32,
    pub features: u64,
    pub page_size: u32,
    pub max_snapshots: u32,
    pub max_pages: u64,
    pub held_pages: u64,
    pub sessions: u32,
    pub snapshots: u32,
    pub reserved: [u64; 4],
}

/// `struct ckpt_snapshot_args`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Snapshot {
    pub size: u32,
    pub flags: u32,
    pub generation: u64,
    pub fd: i32,
    pub reserved0: u32,
    pub pages_data: u64,
    pub pages_same: u64,
    pub pages_zero: u64,
    pub pages_copy: u64,
    pub pages_foreign: u64,
    pub ns_walk: u64,
    pub ns_flush: u64,
    pub reserved: [u64; 4],
}

/// `struct ckpt_run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Run {
    pub va: u64,
    pub npages: u32,
    pub kind: u32,
}

/// `struct ckpt_getruns`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct GetRuns {
    pub size: u32,
    pub kinds: u32,
    pub va: u64,
    pub npages: u64,
    pub runs: u64,
    pub nruns: u32,
    pub reserved: u32,
}

const MAGIC: u32 = 0xD7;

/// `_IOWR(CKPT_IOC_MAGIC, nr, T)` of `linux/ioctl.h`.
const fn iowr<T>(nr: u32) -> u32 {
    3 << 30 | (size_of::<T>() as u32) << 16 | MAGIC << 8 | nr
}

/// `CKPT_IOC_QUERY`.
pub const QUERY: u32 = iowr::<Query>(0);
/// `CKPT_IOC_ATTACH`.
pub const ATTACH: u32 = MAGIC << 8 | 1;
/// `CKPT_IOC_SNAPSHOT`.
pub const SNAPSHOT: u32 = iowr::<Snapshot>(2);
/// `CKPT_IOC_GETRUNS`.
pub const GETRUNS: u32 = iowr::<GetRuns>(3);
