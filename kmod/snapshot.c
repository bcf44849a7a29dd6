// SPDX-License-Identifier: GPL-2.0-only
/* The snapshot: its life, its limits, and the runs that it reports. */
#include <linux/capability.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "internal.h"

/**
 * ckpt_snapshot_new() - An empty snapshot, charged to the caller
 * @space: what it will be of
 *
 * Context: holds the lock of @space.
 * Return: the snapshot, or an error pointer: -EBUSY, -ENOMEM.
 */
struct ckpt_snapshot *ckpt_snapshot_new(struct ckpt_space *space)
{
	struct ckpt_snapshot *snap;
	int err;

	snap = kzalloc(sizeof(*snap), CKPT_GFP);
	if (!snap)
		return ERR_PTR(-ENOMEM);
	err = ckpt_space_get_snapshot(space);
	if (err) {
		kfree(snap);
		return ERR_PTR(err);
	}
	snap->space = space;
	snap->creds = get_current_cred();
	snap->unlimited = capable(CAP_IPC_LOCK);
	xa_init_flags(&snap->entries, XA_FLAGS_ACCOUNT);
	return snap;
}

/**
 * ckpt_snapshot_charge() - Accounts for pages that the snapshot has taken
 * @snap: the snapshot
 * @pages: how many more
 *
 * Pages with a reference cannot be reclaimed, as if they were locked.
 *
 * Context: the process that takes the snapshot.
 * Return: 0, -ENOSPC or -EDQUOT, of which nothing is charged.
 */
int ckpt_snapshot_charge(struct ckpt_snapshot *snap, unsigned long pages)
{
	unsigned long limit = rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT;
	struct user_struct *user = snap->creds->user;
	unsigned long locked;

	if (!pages)
		return 0;
	if (atomic64_add_return(pages, &ckpt_held_pages) > READ_ONCE(ckpt_max_pages)) {
		atomic64_sub(pages, &ckpt_held_pages);
		return -ENOSPC;
	}
	locked = atomic_long_add_return(pages, &user->locked_vm);
	if (locked > limit && !snap->unlimited) {
		atomic_long_sub(pages, &user->locked_vm);
		atomic64_sub(pages, &ckpt_held_pages);
		return -EDQUOT;
	}
	snap->held += pages;
	return 0;
}

/* Drops the references of a table, and the table. */
static void ckpt_free_table(unsigned long *table)
{
	struct page **pages = (struct page **)table;
	unsigned int i, nr = 0;

	/* The pages take the place of the entries that they are in. */
	for (i = 0; i < CKPT_TABLE_ENTRIES; i++) {
		unsigned long entry = table[i];

		if (ckpt_entry_kind(entry) == CKPT_KIND_DATA)
			pages[nr++] = pfn_to_page(ckpt_entry_pfn(entry));
	}
	if (nr)
		release_pages(pages, nr);
	free_page((unsigned long)table);
}

/**
 * ckpt_snapshot_free() - Gives all back that a snapshot holds
 * @snap: the snapshot, complete or not
 *
 * Context: may sleep; not under a lock of its address space.
 */
void ckpt_snapshot_free(struct ckpt_snapshot *snap)
{
	unsigned long index;
	void *entry;

	xa_for_each(&snap->entries, index, entry) {
		if (!xa_is_value(entry))
			ckpt_free_table(entry);
		else if (ckpt_entry_kind(xa_to_value(entry)) == CKPT_KIND_DATA)
			put_page(pfn_to_page(ckpt_entry_pfn(xa_to_value(entry))));
		cond_resched();
	}
	xa_destroy(&snap->entries);
	kvfree(snap->foreign);
	atomic_long_sub(snap->held, &snap->creds->user->locked_vm);
	atomic64_sub(snap->held, &ckpt_held_pages);
	put_cred(snap->creds);
	ckpt_space_put_snapshot(snap->space);
	kfree(snap);
}

/**
 * ckpt_snapshot_lookup() - What a snapshot has at an address
 * @snap: the snapshot
 * @va: the address
 *
 * Return: the entry of this page, zero if there is nothing.
 */
unsigned long ckpt_snapshot_lookup(struct ckpt_snapshot *snap, unsigned long va)
{
	void *entry = xa_load(&snap->entries, va >> PMD_SHIFT);
	unsigned long value, *table = entry;

	if (!entry)
		return 0;
	if (!xa_is_value(entry))
		return table[pte_index(va)];
	value = xa_to_value(entry);
	return ckpt_entry(ckpt_entry_pfn(value) + pte_index(va), ckpt_entry_kind(value));
}

/* The run that is being put together, and where runs go. */
struct ckpt_runs {
	struct ckpt_run __user *to;
	u32 kinds;
	u32 space;
	u32 written;
	struct ckpt_run run;
};

/*
 * Adds a range of one kind. Returns 0, 1 if it had no room (and nothing was
 * added), or -EFAULT.
 */
static int ckpt_runs_add(struct ckpt_runs *runs, unsigned long start, unsigned long end,
			 unsigned int kind)
{
	struct ckpt_run *run = &runs->run;
	unsigned long npages = (end - start) >> PAGE_SHIFT;

	if (!(kind & runs->kinds))
		return 0;
	if (run->npages && run->kind == kind && npages <= U32_MAX - run->npages &&
	    run->va + ((u64)run->npages << PAGE_SHIFT) == start) {
		run->npages += npages;
		return 0;
	}
	if (run->npages) {
		if (copy_to_user(&runs->to[runs->written], run, sizeof(*run)))
			return -EFAULT;
		runs->written++;
		run->npages = 0;
	}
	if (runs->written == runs->space)
		return 1;
	run->va = start;
	run->npages = npages;
	run->kind = kind;
	return 0;
}

/* The first foreign range that ends beyond @va, or NULL. */
static const struct ckpt_range *ckpt_foreign_from(const struct ckpt_snapshot *snap, unsigned long va)
{
	unsigned long low = 0, high = snap->nr_foreign;

	while (low < high) {
		unsigned long middle = low + (high - low) / 2;

		if (snap->foreign[middle].end > va)
			high = middle;
		else
			low = middle + 1;
	}
	return low < snap->nr_foreign ? &snap->foreign[low] : NULL;
}

/* Adds what a table has from *@vap on; *@vap is how far it came. */
static int ckpt_runs_add_table(struct ckpt_runs *runs, const unsigned long *table,
			       unsigned long *vap, unsigned long end)
{
	unsigned long va = *vap;
	int err = 0;

	while (va < end && !err) {
		unsigned int kind = ckpt_entry_kind(table[pte_index(va)]);
		unsigned long next = va + PAGE_SIZE;

		while (next < end && ckpt_entry_kind(table[pte_index(next)]) == kind)
			next += PAGE_SIZE;
		if (kind)
			err = ckpt_runs_add(runs, va, next, kind);
		if (!err)
			va = next;
	}
	*vap = va;
	return err;
}

/* Runs from *@vap to @end; *@vap is how far it came. */
static int ckpt_runs_fill(struct ckpt_snapshot *snap, struct ckpt_runs *runs, unsigned long *vap,
			  unsigned long end)
{
	unsigned long va = *vap;
	int err = 0;

	while (va < end && !err) {
		const struct ckpt_range *foreign = ckpt_foreign_from(snap, va);
		unsigned long index = va >> PMD_SHIFT;
		unsigned long limit = end, stop;
		void *entry;

		*vap = va;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
		if (foreign && foreign->start <= va) {
			/* A run counts pages by 32 bits. */
			stop = min3(end, foreign->end, va + ((unsigned long)U32_MAX << PAGE_SHIFT));
			err = ckpt_runs_add(runs, va, stop, CKPT_KIND_FOREIGN);
			if (!err)
				va = stop;
			continue;
		}
		if (foreign)
			limit = min(end, foreign->start);
		entry = xa_find(&snap->entries, &index, (limit - 1) >> PMD_SHIFT, XA_PRESENT);
		if (!entry) {
			va = limit;
			continue;
		}
		va = max(va, index << PMD_SHIFT);
		stop = min(limit, (index + 1) << PMD_SHIFT);
		if (xa_is_value(entry)) {
			err = ckpt_runs_add(runs, va, stop, ckpt_entry_kind(xa_to_value(entry)));
			if (!err)
				va = stop;
		} else {
			err = ckpt_runs_add_table(runs, entry, &va, stop);
		}
	}
	*vap = va;
	return err;
}

static long ckpt_getruns(struct ckpt_snapshot *snap, struct ckpt_getruns __user *argp)
{
	struct ckpt_getruns args;
	struct ckpt_runs runs = {};
	unsigned long va, end;
	int err;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	if (args.size != sizeof(args) || args.reserved)
		return -EINVAL;
	if (!args.kinds || args.kinds & ~(CKPT_KIND_DATA | CKPT_KIND_SAME | CKPT_KIND_ZERO |
					  CKPT_KIND_COPY | CKPT_KIND_FOREIGN))
		return -EINVAL;
	if (!args.nruns || !args.npages || !PAGE_ALIGNED(args.va))
		return -EINVAL;
	if (args.va >= TASK_SIZE_MAX || args.npages > (TASK_SIZE_MAX - args.va) >> PAGE_SHIFT)
		return -EINVAL;
	va = args.va;
	end = va + (args.npages << PAGE_SHIFT);
	runs.to = u64_to_user_ptr(args.runs);
	runs.kinds = args.kinds;
	runs.space = args.nruns;
	err = ckpt_runs_fill(snap, &runs, &va, end);
	if (err < 0)
		return err;
	/* When there was no room, it stopped at a new run, with none begun. */
	if (runs.run.npages) {
		if (copy_to_user(&runs.to[runs.written], &runs.run, sizeof(runs.run)))
			return -EFAULT;
		runs.written++;
	}
	args.va = va;
	args.npages = (end - va) >> PAGE_SHIFT;
	args.nruns = runs.written;
	if (copy_to_user(argp, &args, sizeof(args)))
		return -EFAULT;
	return 0;
}

static long ckpt_snapshot_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	switch (cmd) {
	case CKPT_IOC_GETRUNS:
		return ckpt_getruns(file->private_data, (void __user *)arg);
	default:
		return -ENOTTY;
	}
}

static int ckpt_snapshot_release(struct inode *inode, struct file *file)
{
	ckpt_snapshot_free(file->private_data);
	return 0;
}

static loff_t ckpt_snapshot_llseek(struct file *file, loff_t offset, int whence)
{
	return fixed_size_llseek(file, offset, whence, TASK_SIZE_MAX);
}

const struct file_operations ckpt_snapshot_fops = {
	.owner = THIS_MODULE,
	.release = ckpt_snapshot_release,
	.unlocked_ioctl = ckpt_snapshot_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.read_iter = ckpt_read_iter,
	.splice_read = ckpt_splice_read,
	.llseek = ckpt_snapshot_llseek,
};
