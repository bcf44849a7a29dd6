// SPDX-License-Identifier: GPL-2.0-only
/* Reading of a snapshot: pread(2) copies, splice(2) hands the pages over. */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/page-flags.h>
#include <linux/pipe_fs_i.h>
#include <linux/sched/signal.h>
#include <linux/splice.h>
#include <linux/uio.h>

#include "internal.h"

/* The page of @entry, or NULL where there is none to read: *@err tells why. */
static struct page *ckpt_data_page(unsigned long entry, int *err)
{
	struct page *page;

	if (ckpt_entry_kind(entry) != CKPT_KIND_DATA) {
		*err = -ENXIO;
		return NULL;
	}
	page = pfn_to_page(ckpt_entry_pfn(entry));
	if (PageHWPoison(page)) {
		*err = -EIO;
		return NULL;
	}
	return page;
}

/**
 * ckpt_read_iter() - Copies pages at the addresses from the file offset on
 * @iocb: the offset
 * @to: where to
 *
 * Context: may sleep; needs no lock, as a snapshot does not change.
 * Return: bytes copied, or -ENXIO, -EIO, -EFAULT, -EINTR if none.
 */
ssize_t ckpt_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct ckpt_snapshot *snap = iocb->ki_filp->private_data;
	ssize_t total = 0;
	int err = 0;

	while (iov_iter_count(to)) {
		unsigned long va = iocb->ki_pos, entry;
		size_t want, copied;
		struct page *page;

		if (fatal_signal_pending(current)) {
			err = -EINTR;
			break;
		}
		if (iocb->ki_pos < 0 || iocb->ki_pos >= TASK_SIZE_MAX) {
			err = -ENXIO;
			break;
		}
		want = min_t(size_t, iov_iter_count(to), PAGE_SIZE - offset_in_page(va));
		entry = ckpt_snapshot_lookup(snap, va);
		if (ckpt_entry_kind(entry) == CKPT_KIND_ZERO) {
			copied = iov_iter_zero(want, to);
		} else {
			page = ckpt_data_page(entry, &err);
			if (!page)
				break;
			copied = copy_page_to_iter(page, offset_in_page(va), want, to);
		}
		iocb->ki_pos += copied;
		total += copied;
		if (copied < want) {
			err = -EFAULT;
			break;
		}
		cond_resched();
	}
	return total ? total : err;
}

/*
 * Pages in a pipe hold the module, so that it can only be unloaded when their
 * release has run. They cannot be stolen: other references remain.
 */
static bool ckpt_pipe_get(struct pipe_inode_info *pipe, struct pipe_buffer *buf)
{
	if (!generic_pipe_buf_get(pipe, buf))
		return false;
	__module_get(THIS_MODULE);
	return true;
}

static void ckpt_pipe_release(struct pipe_inode_info *pipe, struct pipe_buffer *buf)
{
	generic_pipe_buf_release(pipe, buf);
	/* The exit of the module waits until this function has been left. */
	module_put(THIS_MODULE);
}

static const struct pipe_buf_operations ckpt_pipe_ops = {
	.get = ckpt_pipe_get,
	.release = ckpt_pipe_release,
};

/* Pages that did not fit into the pipe. */
static void ckpt_spd_release(struct splice_pipe_desc *spd, unsigned int i)
{
	put_page(spd->pages[i]);
	module_put(THIS_MODULE);
}

/**
 * ckpt_splice_read() - Hands pages over to a pipe, without a copy
 * @in: the snapshot
 * @ppos: the address
 * @pipe: where to
 * @len: bytes
 * @flags: SPLICE_F_*
 *
 * Context: holds the lock of @pipe.
 * Return: bytes in the pipe, or -ENXIO, -EIO, -EAGAIN, -EPIPE, -ENOMEM.
 */
ssize_t ckpt_splice_read(struct file *in, loff_t *ppos, struct pipe_inode_info *pipe, size_t len,
			 unsigned int flags)
{
	struct ckpt_snapshot *snap = in->private_data;
	struct page *pages[PIPE_DEF_BUFFERS];
	struct partial_page partial[PIPE_DEF_BUFFERS];
	struct splice_pipe_desc spd = {
		.pages = pages,
		.partial = partial,
		.nr_pages_max = PIPE_DEF_BUFFERS,
		.ops = &ckpt_pipe_ops,
		.spd_release = ckpt_spd_release,
	};
	ssize_t total = 0, moved;
	int err = 0;

	while (len) {
		size_t taken = 0;

		spd.nr_pages = 0;
		while (taken < len && spd.nr_pages < PIPE_DEF_BUFFERS) {
			loff_t pos = *ppos + taken;
			size_t part = min_t(size_t, len - taken, PAGE_SIZE - offset_in_page(pos));
			struct page *page;

			if (pos < 0 || pos >= TASK_SIZE_MAX) {
				err = -ENXIO;
				break;
			}
			page = ckpt_data_page(ckpt_snapshot_lookup(snap, pos), &err);
			if (!page)
				break;
			get_page(page);
			/* The open snapshot holds the module already. */
			__module_get(THIS_MODULE);
			pages[spd.nr_pages] = page;
			partial[spd.nr_pages].offset = offset_in_page(pos);
			partial[spd.nr_pages].len = part;
			partial[spd.nr_pages].private = 0;
			spd.nr_pages++;
			taken += part;
		}
		if (!spd.nr_pages)
			break;
		moved = splice_to_pipe(pipe, &spd);
		if (moved <= 0) {
			/* Full: the caller waits for room. */
			err = moved;
			break;
		}
		*ppos += moved;
		total += moved;
		len -= moved;
		if (moved < taken)
			break;
	}
	return total ? total : err;
}
