// SPDX-License-Identifier: GPL-2.0-only
/* The module: its device, its parameters, its view in debugfs. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/debugfs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/rcupdate.h>

#include "internal.h"

static ushort device_mode = 0600;
module_param(device_mode, ushort, 0444);
MODULE_PARM_DESC(device_mode, "permission bits of /dev/ckpt, until udev sets them (default 0600)");

unsigned long ckpt_max_pages;
module_param_named(max_pages, ckpt_max_pages, ulong, 0644);
MODULE_PARM_DESC(max_pages, "pages that all snapshots together may hold (default: half of the memory)");

atomic64_t ckpt_held_pages = ATOMIC64_INIT(0);
atomic_t ckpt_live_snapshots = ATOMIC_INIT(0);

static struct dentry *ckpt_debugfs;

static struct miscdevice ckpt_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "ckpt",
	.fops = &ckpt_device_fops,
};

static int __init ckpt_init(void)
{
	int err;

	BUILD_BUG_ON(CKPT_TABLE_ENTRIES * sizeof(unsigned long) != PAGE_SIZE);
	if (device_mode & ~0666) {
		pr_err("device_mode %#o has bits other than 0666\n", device_mode);
		return -EINVAL;
	}
	if (!ckpt_max_pages)
		ckpt_max_pages = totalram_pages() / 2;
	ckpt_device.mode = device_mode;
	err = misc_register(&ckpt_device);
	if (err)
		return err;
	/* Where there is no debugfs, the module does without. */
	ckpt_debugfs = debugfs_create_dir("ckpt", NULL);
	debugfs_create_file("sessions", 0400, ckpt_debugfs, NULL, &ckpt_sessions_fops);
	if (CKPT_SKIP_FLUSH)
		pr_warn("built to lose writes: for tests only\n");
	return 0;
}

static void __exit ckpt_exit(void)
{
	debugfs_remove(ckpt_debugfs);
	misc_deregister(&ckpt_device);
	/*
	 * The release of a spliced page drops the reference to the module from
	 * within the module: wait until that code has been left.
	 */
	synchronize_rcu_tasks();
}

module_init(ckpt_init);
module_exit(ckpt_exit);
MODULE_DESCRIPTION("Copy-on-write snapshots of process memory");
MODULE_LICENSE("GPL");
