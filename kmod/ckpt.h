/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * The interface of /dev/ckpt: copy-on-write snapshots of the address space of
 * a process that has attached itself.
 *
 * A process opens /dev/ckpt and issues CKPT_IOC_ATTACH: the open file is now a
 * session on the address space of the caller. Whoever holds a descriptor of it
 * may issue CKPT_IOC_SNAPSHOT, which returns the descriptor of a snapshot. On
 * that, CKPT_IOC_GETRUNS tells what there is, and pread(2) and splice(2) read
 * it: the file offset is the virtual address in the process.
 *
 * All commands return 0, or -1 and errno. Of every command:
 *   EINVAL  the size is not that of the structure, or a reserved field or an
 *           unknown flag is not zero
 *   EFAULT  the argument cannot be read or written
 *   ENOTTY  an unknown command, or one of the other kind of descriptor
 */
#ifndef CKPT_H
#define CKPT_H

#include <linux/ioctl.h>
#include <linux/types.h>

/** CKPT_ABI_VERSION - Raised when an old program could misunderstand. */
#define CKPT_ABI_VERSION 1

#define CKPT_IOC_MAGIC 0xD7

/* Features of this module on this kernel, in ckpt_query.features. */
#define CKPT_FEATURE_INCREMENTAL (1ULL << 0) /* the kernel has soft-dirty bits */
#define CKPT_FEATURE_THP (1ULL << 1) /* PMD-mapped huge pages are taken whole */
#define CKPT_FEATURE_TEST_BUILD (1ULL << 63) /* broken on purpose, for a test */

/**
 * struct ckpt_query - Argument of CKPT_IOC_QUERY
 * @size: in: sizeof(struct ckpt_query)
 * @abi_version: out: CKPT_ABI_VERSION of the module
 * @features: out: CKPT_FEATURE_*
 * @page_size: out: bytes of a page, the unit of every count
 * @max_snapshots: out: live snapshots that one address space may have
 * @max_pages: out: pages that all snapshots together may hold
 * @held_pages: out: pages that they hold now
 * @sessions: out: attached sessions
 * @snapshots: out: live snapshots
 * @reserved: zero
 */
struct ckpt_query {
	__u32 size;
	__u32 abi_version;
	__aligned_u64 features;
	__u32 page_size;
	__u32 max_snapshots;
	__aligned_u64 max_pages;
	__aligned_u64 held_pages;
	__u32 sessions;
	__u32 snapshots;
	__aligned_u64 reserved[4];
};

/**
 * CKPT_IOC_QUERY - What this module is and how it is used
 *
 * On any descriptor of /dev/ckpt, attached or not. No errors but the common.
 */
#define CKPT_IOC_QUERY _IOWR(CKPT_IOC_MAGIC, 0, struct ckpt_query)

/**
 * CKPT_IOC_ATTACH - Make this open file a session on the caller's memory
 *
 * The argument is zero, or the pid of a process that shares the caller's memory
 * (CLONE_VM) and whose session it is to be: so a helper with descriptors of its
 * own can attach the process that made it, and exit. Nothing is read from memory.
 * The session remembers the caller's credentials, which have to be those of its
 * process. It keeps no memory alive and ends with its last descriptor. A process
 * that attaches itself should close its own descriptor before it runs on: fork(2)
 * would hand it to children.
 *
 * EINVAL  the argument is no pid, or that of a process with other memory
 * ESRCH   there is no such process
 * EBUSY   the open file is a session already
 * EACCES  the process is not dumpable (PR_SET_DUMPABLE)
 * ENOMEM  no memory
 */
#define CKPT_IOC_ATTACH _IO(CKPT_IOC_MAGIC, 1)

/* Flags of CKPT_IOC_SNAPSHOT. */
#define CKPT_SNAPSHOT_INCREMENTAL (1U << 0) /* leave out what is unchanged */
#define CKPT_SNAPSHOT_CLEAR (1U << 1) /* begin a new generation */

/**
 * struct ckpt_snapshot_args - Argument of CKPT_IOC_SNAPSHOT
 * @size: in: sizeof(struct ckpt_snapshot_args)
 * @flags: in: CKPT_SNAPSHOT_*
 * @generation: in: with INCREMENTAL, the generation that the caller has, else
 *	zero; out: with CLEAR the new generation, else as it was
 * @fd: out: descriptor of the snapshot, close-on-exec
 * @reserved0: zero
 * @pages_data: out: pages held by the snapshot, kind DATA
 * @pages_same: out: pages of kind SAME
 * @pages_zero: out: pages of kind ZERO
 * @pages_copy: out: pages of kind COPY
 * @pages_foreign: out: pages of address space of kind FOREIGN
 * @ns_walk: out: nanoseconds under the lock of the address space
 * @ns_flush: out: of these, nanoseconds of the TLB flush
 * @reserved: zero
 */
struct ckpt_snapshot_args {
	__u32 size;
	__u32 flags;
	__aligned_u64 generation;
	__s32 fd;
	__u32 reserved0;
	__aligned_u64 pages_data;
	__aligned_u64 pages_same;
	__aligned_u64 pages_zero;
	__aligned_u64 pages_copy;
	__aligned_u64 pages_foreign;
	__aligned_u64 ns_walk;
	__aligned_u64 ns_flush;
	__aligned_u64 reserved[4];
};

/**
 * CKPT_IOC_SNAPSHOT - Take a copy-on-write snapshot of the session's memory
 *
 * All private anonymous pages of the address space as they are at one moment
 * between call and return. Threads of the process may run; they are held only
 * if they change the address space or take a page fault. Snapshots of several
 * processes belong to one moment only if all are stopped. Pages of kind COPY
 * must be read from the process while it is still stopped.
 *
 * With INCREMENTAL, pages that have not been written since @generation began
 * are of kind SAME. With CLEAR a new generation begins, and that is the only
 * one with which INCREMENTAL works from then on. The kernel has one soft-dirty
 * bit for each page: whoever else clears it (a write of 4 to
 * /proc/PID/clear_refs) ends the generation. So may an error. INCREMENTAL then
 * gives ESTALE.
 *
 * ENOTCONN    the open file is not attached
 * ESRCH       the process has ended or has replaced its address space
 * EACCES      it is not dumpable any more, or its credentials have changed
 * EOPNOTSUPP  the address space is mirrored by a device or a virtual machine
 *             (MMU notifiers), or INCREMENTAL or CLEAR without soft-dirty bits
 *             or without the kernel's mapping below the vDSO
 * ESTALE      @generation is not the current one, or has ended
 * EBUSY       the address space has max_snapshots live snapshots
 * EDQUOT      RLIMIT_MEMLOCK of the caller, who has no CAP_IPC_LOCK; counted
 *             for his user with all else that is locked by the kernel
 * ENOSPC      the module's parameter max_pages
 * ENOMEM      no memory, or the memory cgroup's limit, for the tables
 * EMFILE      no free descriptor
 * ENFILE      no file left in the system (fs.file-max)
 * EINTR       the caller is being killed
 */
#define CKPT_IOC_SNAPSHOT _IOWR(CKPT_IOC_MAGIC, 2, struct ckpt_snapshot_args)

/*
 * Kinds of pages. Pages of none of them are absent: never written, or given
 * back to the kernel; zero, or the file's where a file is mapped privately.
 */
#define CKPT_KIND_DATA (1U << 0) /* in the snapshot; read it from there */
#define CKPT_KIND_SAME (1U << 1) /* unchanged since the generation began */
#define CKPT_KIND_ZERO (1U << 2) /* the kernel's page of zeros */
#define CKPT_KIND_COPY (1U << 3) /* cannot be shared (in-flight I/O, swap) */
#define CKPT_KIND_FOREIGN (1U << 4) /* shared, hugetlb or device mapping */

/**
 * struct ckpt_run - Neighbouring pages of one kind
 * @va: virtual address of the first
 * @npages: how many
 * @kind: one CKPT_KIND_*
 */
struct ckpt_run {
	__aligned_u64 va;
	__u32 npages;
	__u32 kind;
};

/**
 * struct ckpt_getruns - Argument of CKPT_IOC_GETRUNS
 * @size: in: sizeof(struct ckpt_getruns)
 * @kinds: in: the CKPT_KIND_* to report
 * @va: in: where to begin, page-aligned; out: where to go on
 * @npages: in: pages from @va to look at; out: what is left of them
 * @runs: in: pointer to an array of struct ckpt_run
 * @nruns: in: its length; out: how many were written
 * @reserved: zero
 *
 * The whole range has been seen when @npages returns as zero.
 */
struct ckpt_getruns {
	__u32 size;
	__u32 kinds;
	__aligned_u64 va;
	__aligned_u64 npages;
	__aligned_u64 runs;
	__u32 nruns;
	__u32 reserved;
};

/**
 * CKPT_IOC_GETRUNS - What a snapshot has in a range of addresses
 *
 * On the descriptor of a snapshot. In ascending order; neighbouring pages of
 * one kind are one run unless an array ends between them.
 *
 * EINVAL  @va is not page-aligned, the range is empty or leaves the user's
 *         addresses, no kinds, or an empty array
 * EINTR   the caller is being killed
 */
#define CKPT_IOC_GETRUNS _IOWR(CKPT_IOC_MAGIC, 3, struct ckpt_getruns)

/*
 * pread(2) of a snapshot reads pages of kind DATA and ZERO, stops short before
 * another kind, and gives ENXIO if the first page is one of those. splice(2)
 * into a pipe does the same for DATA alone; what is in the pipe stays as it is
 * when the snapshot is closed. EIO: the memory has a hardware error.
 */

#endif /* CKPT_H */
