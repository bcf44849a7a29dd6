/* SPDX-License-Identifier: GPL-2.0-only */
/* What the parts of the module share. */
#ifndef CKPT_INTERNAL_H
#define CKPT_INTERNAL_H

#include <linux/atomic.h>
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm_types.h>
#include <linux/mutex.h>
#include <linux/seq_file.h>
#include <linux/types.h>
#include <linux/xarray.h>

#include "ckpt.h"

/* A build that loses writes, to prove that the tests would see it. */
#ifdef CKPT_TEST_SKIP_FLUSH
#define CKPT_SKIP_FLUSH true
#else
#define CKPT_SKIP_FLUSH false
#endif

/* Live snapshots of one address space. */
#define CKPT_MAX_SNAPSHOTS 2

/*
 * For metadata: charged to the memory cgroup of the caller, and an error
 * rather than the OOM killer when that is at its limit.
 */
#define CKPT_GFP (GFP_KERNEL_ACCOUNT | __GFP_NORETRY | __GFP_NOWARN)

/**
 * struct ckpt_space - What the module knows of an attached address space
 * @ref: held by sessions and snapshots
 * @node: in the list of all, guarded by ckpt_spaces_lock
 * @mm: its memory, kept from reuse (mmgrab) but not alive
 * @lock: held while a snapshot is taken; guards @generation, @base and @mergeable
 * @generation: the soft-dirty bits tell what changed since it; zero if unknown
 * @base: by PMD index, which table held the entries when @generation began
 * @mergeable: KSM might merge its pages when @generation began
 * @snapshots: live ones
 *
 * The soft-dirty bits belong to the address space and not to a session, so
 * that sessions on the same memory share this.
 */
struct ckpt_space {
	struct kref ref;
	struct list_head node;
	struct mm_struct *mm;
	struct mutex lock;
	u64 generation;
	struct xarray base;
	bool mergeable;
	atomic_t snapshots;
};

/**
 * struct ckpt_session - An open file of /dev/ckpt
 * @id: for tracing and the list of sessions
 * @space: the attached address space; NULL before, then never changes
 * @creds: the attacher's, at that time
 * @pid: the process that it is of
 * @node: in the list of attached sessions, guarded by ckpt_sessions_lock
 */
struct ckpt_session {
	u64 id;
	struct ckpt_space *space;
	const struct cred *creds;
	struct pid *pid;
	struct list_head node;
};

/* A range of addresses. */
struct ckpt_range {
	unsigned long start;
	unsigned long end;
};

/**
 * struct ckpt_snapshot - Pages of an address space at one moment
 * @space: where they come from
 * @creds: of the caller; its user is charged
 * @unlimited: the caller has CAP_IPC_LOCK
 * @entries: by PMD index, an entry for all of a huge page or a table of them
 * @foreign: mappings that are not taken, ascending
 * @nr_foreign: their number
 * @held: pages with a reference of ours, all of them charged
 * @same: pages that were left out as unchanged
 * @zero: zero pages
 * @copy: pages that user space has to copy
 * @nr_foreign_pages: pages of @foreign
 * @ns_walk: nanoseconds under the lock
 * @ns_flush: of these, of the TLB flush
 *
 * An entry is a page frame number and its CKPT_KIND_*, or zero. Nothing
 * changes once the snapshot has a descriptor, so that reads need no lock.
 */
struct ckpt_snapshot {
	struct ckpt_space *space;
	const struct cred *creds;
	bool unlimited;
	struct xarray entries;
	struct ckpt_range *foreign;
	unsigned long nr_foreign;
	u64 held;
	u64 same;
	u64 zero;
	u64 copy;
	u64 nr_foreign_pages;
	u64 ns_walk;
	u64 ns_flush;
};

#define CKPT_KIND_BITS 4
#define CKPT_KIND_MASK ((1UL << CKPT_KIND_BITS) - 1)

static inline unsigned long ckpt_entry(unsigned long pfn, unsigned int kind)
{
	return pfn << CKPT_KIND_BITS | kind;
}

static inline unsigned int ckpt_entry_kind(unsigned long entry)
{
	return entry & CKPT_KIND_MASK;
}

static inline unsigned long ckpt_entry_pfn(unsigned long entry)
{
	return entry >> CKPT_KIND_BITS;
}

/* Entries of a table, one for each page below a PMD: exactly a page. */
#define CKPT_TABLE_ENTRIES PTRS_PER_PTE

/* main.c */
extern unsigned long ckpt_max_pages;
extern atomic64_t ckpt_held_pages;
extern atomic_t ckpt_live_snapshots;

/* session.c */
extern const struct file_operations ckpt_device_fops;
extern const struct file_operations ckpt_sessions_fops;
int ckpt_space_get_snapshot(struct ckpt_space *space);
void ckpt_space_put_snapshot(struct ckpt_space *space);

/* snapshot.c */
struct ckpt_snapshot *ckpt_snapshot_new(struct ckpt_space *space);
int ckpt_snapshot_charge(struct ckpt_snapshot *snap, unsigned long pages);
void ckpt_snapshot_free(struct ckpt_snapshot *snap);
unsigned long ckpt_snapshot_lookup(struct ckpt_snapshot *snap, unsigned long va);
extern const struct file_operations ckpt_snapshot_fops;

/* walk.c */
int ckpt_walk(struct ckpt_snapshot *snap, struct mm_struct *mm, u32 flags);

/* stream.c */
ssize_t ckpt_read_iter(struct kiocb *iocb, struct iov_iter *to);
ssize_t ckpt_splice_read(struct file *in, loff_t *ppos, struct pipe_inode_info *pipe, size_t len,
			 unsigned int flags);

#endif /* CKPT_INTERNAL_H */
