// SPDX-License-Identifier: GPL-2.0-only
/* Does to memory what drivers and virtual machines do to it. For tests only. */
#include <linux/completion.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "ckpt_testing.h"

struct testing {
	struct mmu_notifier notifier;
	bool registered;
	struct page *page;
	bool pinned;
	struct completion unlock;
	bool locked;
};

static const struct mmu_notifier_ops testing_notifier_ops = {};

static void testing_end(struct testing *testing)
{
	if (!testing->page)
		return;
	if (testing->pinned)
		unpin_user_page(testing->page);
	else
		put_page(testing->page);
	testing->page = NULL;
}

static long testing_begin(struct testing *testing, unsigned long va, bool pin)
{
	int got;

	if (testing->page)
		return -EBUSY;
	if (pin)
		got = pin_user_pages_fast(va, 1, FOLL_WRITE, &testing->page);
	else
		got = get_user_pages_fast(va, 1, FOLL_WRITE, &testing->page);
	if (got != 1) {
		testing->page = NULL;
		return got < 0 ? got : -EFAULT;
	}
	testing->pinned = pin;
	return 0;
}

static long testing_lock(struct testing *testing)
{
	int err;

	mmap_read_lock(current->mm);
	WRITE_ONCE(testing->locked, true);
	err = wait_for_completion_killable(&testing->unlock);
	WRITE_ONCE(testing->locked, false);
	mmap_read_unlock(current->mm);
	return err;
}

static long testing_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct testing *testing = file->private_data;
	int err;

	switch (cmd) {
	case CKPT_TESTING_NOTIFIER:
		if (testing->registered)
			return -EBUSY;
		testing->notifier.ops = &testing_notifier_ops;
		err = mmu_notifier_register(&testing->notifier, current->mm);
		testing->registered = !err;
		return err;
	case CKPT_TESTING_GET:
	case CKPT_TESTING_PIN:
		return testing_begin(testing, arg, cmd == CKPT_TESTING_PIN);
	case CKPT_TESTING_WRITE: {
		void *to;

		if (!testing->page)
			return -EINVAL;
		to = kmap_local_page(testing->page);
		memset(to, arg, PAGE_SIZE);
		kunmap_local(to);
		set_page_dirty(testing->page);
		return 0;
	}
	case CKPT_TESTING_END:
		testing_end(testing);
		return 0;
	case CKPT_TESTING_LOCK:
		return testing_lock(testing);
	case CKPT_TESTING_IS_LOCKED:
		return READ_ONCE(testing->locked);
	case CKPT_TESTING_UNLOCK:
		complete(&testing->unlock);
		return 0;
	default:
		return -ENOTTY;
	}
}

static int testing_open(struct inode *inode, struct file *file)
{
	struct testing *testing = kzalloc(sizeof(*testing), GFP_KERNEL);

	if (!testing)
		return -ENOMEM;
	init_completion(&testing->unlock);
	file->private_data = testing;
	return 0;
}

static int testing_release(struct inode *inode, struct file *file)
{
	struct testing *testing = file->private_data;

	testing_end(testing);
	if (testing->registered)
		mmu_notifier_unregister(&testing->notifier, testing->notifier.mm);
	kfree(testing);
	return 0;
}

static const struct file_operations testing_fops = {
	.owner = THIS_MODULE,
	.open = testing_open,
	.release = testing_release,
	.unlocked_ioctl = testing_ioctl,
};

static struct miscdevice testing_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "ckpt_testing",
	.fops = &testing_fops,
};

module_misc_device(testing_device);
MODULE_DESCRIPTION("Memory as drivers use it, for the tests of ckpt");
MODULE_LICENSE("GPL");
