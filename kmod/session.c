// SPDX-License-Identifier: GPL-2.0-only
/* Open files of /dev/ckpt, and the address spaces that are attached to them. */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/pid_namespace.h>
#include <linux/random.h>
#include <linux/sched/coredump.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "internal.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

static LIST_HEAD(ckpt_spaces);
static DEFINE_MUTEX(ckpt_spaces_lock);

static LIST_HEAD(ckpt_sessions);
static DEFINE_MUTEX(ckpt_sessions_lock);
static u64 ckpt_last_session;
static u32 ckpt_nr_sessions;

/* The state of @mm, with a reference; made if there is none yet. */
static struct ckpt_space *ckpt_space_get(struct mm_struct *mm)
{
	struct ckpt_space *space;

	mutex_lock(&ckpt_spaces_lock);
	list_for_each_entry(space, &ckpt_spaces, node) {
		if (space->mm == mm) {
			kref_get(&space->ref);
			goto out;
		}
	}
	space = kzalloc(sizeof(*space), GFP_KERNEL_ACCOUNT);
	if (!space)
		goto out;
	kref_init(&space->ref);
	mutex_init(&space->lock);
	xa_init_flags(&space->base, XA_FLAGS_ACCOUNT);
	mmgrab(mm);
	space->mm = mm;
	list_add_tail(&space->node, &ckpt_spaces);
out:
	mutex_unlock(&ckpt_spaces_lock);
	return space;
}

static void ckpt_space_release(struct kref *ref)
{
	struct ckpt_space *space = container_of(ref, struct ckpt_space, ref);

	list_del(&space->node);
	mutex_unlock(&ckpt_spaces_lock);
	xa_destroy(&space->base);
	mmdrop(space->mm);
	kfree(space);
}

static void ckpt_space_put(struct ckpt_space *space)
{
	kref_put_mutex(&space->ref, ckpt_space_release, &ckpt_spaces_lock);
}

/**
 * ckpt_space_get_snapshot() - A reference for a live snapshot
 * @space: the address space
 *
 * Context: holds the lock of @space.
 * Return: 0, or -EBUSY if there are as many as there may be.
 */
int ckpt_space_get_snapshot(struct ckpt_space *space)
{
	lockdep_assert_held(&space->lock);
	if (atomic_read(&space->snapshots) >= CKPT_MAX_SNAPSHOTS)
		return -EBUSY;
	atomic_inc(&space->snapshots);
	atomic_inc(&ckpt_live_snapshots);
	kref_get(&space->ref);
	return 0;
}

/**
 * ckpt_space_put_snapshot() - Drops the reference of a snapshot
 * @space: the address space
 *
 * Context: may sleep; not with the lock of @space, which it may free.
 */
void ckpt_space_put_snapshot(struct ckpt_space *space)
{
	atomic_dec(&space->snapshots);
	atomic_dec(&ckpt_live_snapshots);
	ckpt_space_put(space);
}

static int ckpt_open(struct inode *inode, struct file *file)
{
	struct ckpt_session *session = kzalloc(sizeof(*session), GFP_KERNEL_ACCOUNT);

	if (!session)
		return -ENOMEM;
	/* The misc device left itself here. */
	file->private_data = session;
	return 0;
}

static int ckpt_release(struct inode *inode, struct file *file)
{
	struct ckpt_session *session = file->private_data;

	if (session->space) {
		mutex_lock(&ckpt_sessions_lock);
		list_del(&session->node);
		ckpt_nr_sessions--;
		mutex_unlock(&ckpt_sessions_lock);
		ckpt_space_put(session->space);
		put_cred(session->creds);
		put_pid(session->pid);
	}
	kfree(session);
	return 0;
}

static long ckpt_query(void __user *argp)
{
	struct ckpt_query query;

	if (copy_from_user(&query, argp, sizeof(query)))
		return -EFAULT;
	if (query.size != sizeof(query) || memchr_inv(query.reserved, 0, sizeof(query.reserved)))
		return -EINVAL;
	memset(&query, 0, sizeof(query));
	query.size = sizeof(query);
	query.abi_version = CKPT_ABI_VERSION;
	if (IS_ENABLED(CONFIG_MEM_SOFT_DIRTY))
		query.features |= CKPT_FEATURE_INCREMENTAL;
	if (IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE))
		query.features |= CKPT_FEATURE_THP;
	if (CKPT_SKIP_FLUSH)
		query.features |= CKPT_FEATURE_TEST_BUILD;
	query.page_size = PAGE_SIZE;
	query.max_snapshots = CKPT_MAX_SNAPSHOTS;
	query.max_pages = READ_ONCE(ckpt_max_pages);
	query.held_pages = atomic64_read(&ckpt_held_pages);
	query.sessions = READ_ONCE(ckpt_nr_sessions);
	query.snapshots = atomic_read(&ckpt_live_snapshots);
	if (copy_to_user(argp, &query, sizeof(query)))
		return -EFAULT;
	return 0;
}

static bool ckpt_dumpable(struct mm_struct *mm)
{
	return get_dumpable(mm) == SUID_DUMP_USER;
}

/* The process @nr, which has to have the caller's memory, with a reference. */
static struct pid *ckpt_get_sharer(pid_t nr)
{
	struct task_struct *task;
	struct pid *pid;

	rcu_read_lock();
	pid = find_vpid(nr);
	task = pid_task(pid, PIDTYPE_TGID);
	if (task) {
		task_lock(task);
		pid = task->mm == current->mm ? get_pid(pid) : ERR_PTR(-EINVAL);
		task_unlock(task);
	} else {
		pid = ERR_PTR(-ESRCH);
	}
	rcu_read_unlock();
	return pid;
}

static long ckpt_attach(struct ckpt_session *session, unsigned long arg)
{
	struct ckpt_space *space;
	struct pid *pid;
	long err = 0;

	if (arg > INT_MAX)
		return -EINVAL;
	/* Not in a kernel thread, and not in one that borrows an mm. */
	if (!current->mm || current->flags & PF_KTHREAD)
		return -EINVAL;
	if (!ckpt_dumpable(current->mm))
		return -EACCES;
	pid = arg ? ckpt_get_sharer(arg) : get_pid(task_tgid(current));
	if (IS_ERR(pid))
		return PTR_ERR(pid);
	space = ckpt_space_get(current->mm);
	if (!space) {
		put_pid(pid);
		return -ENOMEM;
	}
	mutex_lock(&ckpt_sessions_lock);
	if (session->space) {
		err = -EBUSY;
	} else {
		session->id = ++ckpt_last_session;
		session->creds = get_current_cred();
		session->pid = pid;
		list_add_tail(&session->node, &ckpt_sessions);
		ckpt_nr_sessions++;
		/* Last: whoever sees it sees the rest. */
		smp_store_release(&session->space, space);
	}
	mutex_unlock(&ckpt_sessions_lock);
	if (err) {
		put_pid(pid);
		ckpt_space_put(space);
	}
	return err;
}

static bool ckpt_same_creds(const struct cred *a, const struct cred *b)
{
	return a == b ||
	       (uid_eq(a->uid, b->uid) && uid_eq(a->euid, b->euid) && uid_eq(a->suid, b->suid) &&
		uid_eq(a->fsuid, b->fsuid) && gid_eq(a->gid, b->gid) && gid_eq(a->egid, b->egid) &&
		gid_eq(a->sgid, b->sgid) && gid_eq(a->fsgid, b->fsgid) &&
		!memcmp(&a->cap_permitted, &b->cap_permitted, sizeof(a->cap_permitted)) &&
		!memcmp(&a->cap_effective, &b->cap_effective, sizeof(a->cap_effective)) &&
		a->user_ns == b->user_ns);
}

/* Whether the session's process still is who it was, and still has this memory. */
static int ckpt_check_attacher(const struct ckpt_session *session)
{
	struct task_struct *task;
	int err = 0;

	rcu_read_lock();
	task = pid_task(session->pid, PIDTYPE_TGID);
	if (!task) {
		err = -ESRCH;
		goto out;
	}
	task_lock(task);
	/* A leader that has exited before its threads has none, and neither has a zombie. */
	if (task->mm ? task->mm != session->space->mm : !atomic_read(&task->signal->live))
		err = -ESRCH;
	task_unlock(task);
	if (!err && !ckpt_same_creds(session->creds, __task_cred(task)))
		err = -EACCES;
out:
	rcu_read_unlock();
	return err;
}

/*
 * Takes the snapshot. The memory is alive, the lock of the space is held.
 * Fills @args on success and hands @snapp over.
 */
static int ckpt_take(struct ckpt_session *session, struct mm_struct *mm,
		     struct ckpt_snapshot_args *args, struct ckpt_snapshot **snapp)
{
	struct ckpt_space *space = session->space;
	struct ckpt_snapshot *snap;
	int err;

	if (!ckpt_dumpable(mm))
		return -EACCES;
	err = ckpt_check_attacher(session);
	if (err)
		return err;
	if (args->flags & CKPT_SNAPSHOT_INCREMENTAL &&
	    (!args->generation || args->generation != space->generation))
		return -ESTALE;
	snap = ckpt_snapshot_new(space);
	if (IS_ERR(snap))
		return PTR_ERR(snap);
	err = ckpt_walk(snap, mm, args->flags);
	if (err) {
		*snapp = snap;
		return err;
	}
	if (args->flags & CKPT_SNAPSHOT_CLEAR) {
		do {
			space->generation = get_random_u64();
		} while (!space->generation);
		args->generation = space->generation;
	}
	args->pages_data = snap->held;
	args->pages_same = snap->same;
	args->pages_zero = snap->zero;
	args->pages_copy = snap->copy;
	args->pages_foreign = snap->nr_foreign_pages;
	args->ns_walk = snap->ns_walk;
	args->ns_flush = snap->ns_flush;
	*snapp = snap;
	return 0;
}

/* A descriptor for @snap, which belongs to it from then on; not installed. */
static int ckpt_snapshot_file(struct ckpt_snapshot *snap, struct file **filep)
{
	struct file *file;
	int fd = get_unused_fd_flags(O_CLOEXEC);

	if (fd < 0)
		return fd;
	file = anon_inode_getfile("[ckpt]", &ckpt_snapshot_fops, snap, O_RDONLY | O_CLOEXEC);
	if (IS_ERR(file)) {
		put_unused_fd(fd);
		return PTR_ERR(file);
	}
	/* Its offsets are addresses: pread works, and so does lseek. */
	file->f_mode |= FMODE_LSEEK | FMODE_PREAD;
	*filep = file;
	return fd;
}

static long ckpt_do_snapshot(struct ckpt_session *session, struct ckpt_snapshot_args *args,
			     void __user *argp)
{
	struct ckpt_space *space = session->space;
	struct ckpt_snapshot *snap = NULL;
	struct file *file = NULL;
	struct mm_struct *mm = space->mm;
	int fd, err;

	if (mutex_lock_killable(&space->lock))
		return -EINTR;
	if (!mmget_not_zero(mm)) {
		err = -ESRCH;
		goto unlock;
	}
	err = ckpt_take(session, mm, args, &snap);
	mmput(mm);
	if (err)
		goto unlock;
	fd = ckpt_snapshot_file(snap, &file);
	if (fd < 0) {
		err = fd;
		goto lost;
	}
	snap = NULL;
	args->fd = fd;
	if (copy_to_user(argp, args, sizeof(*args))) {
		put_unused_fd(fd);
		err = -EFAULT;
		goto lost;
	}
	fd_install(fd, file);
	file = NULL;
lost:
	/* Nobody has what was written before the new generation. */
	if (err && args->flags & CKPT_SNAPSHOT_CLEAR)
		space->generation = 0;
unlock:
	mutex_unlock(&space->lock);
	/* These may take long, and end in freeing the space. */
	if (file)
		fput(file);
	if (snap)
		ckpt_snapshot_free(snap);
	return err;
}

static long ckpt_snapshot(struct ckpt_session *session, void __user *argp)
{
	struct ckpt_snapshot_args args;
	long err;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	if (args.size != sizeof(args) || args.reserved0 ||
	    memchr_inv(args.reserved, 0, sizeof(args.reserved)))
		return -EINVAL;
	if (args.flags & ~(CKPT_SNAPSHOT_INCREMENTAL | CKPT_SNAPSHOT_CLEAR))
		return -EINVAL;
	if (args.generation && !(args.flags & CKPT_SNAPSHOT_INCREMENTAL))
		return -EINVAL;
	/* Pairs with the release in ckpt_attach(). */
	if (!smp_load_acquire(&session->space))
		return -ENOTCONN;
	if (args.flags && !IS_ENABLED(CONFIG_MEM_SOFT_DIRTY))
		return -EOPNOTSUPP;
	args.fd = -1;
	args.pages_data = 0;
	args.pages_same = 0;
	args.pages_zero = 0;
	args.pages_copy = 0;
	args.pages_foreign = 0;
	args.ns_walk = 0;
	args.ns_flush = 0;
	trace_ckpt_snapshot_begin(session->id, args.flags);
	err = ckpt_do_snapshot(session, &args, argp);
	trace_ckpt_snapshot_end(session->id, err, &args);
	return err;
}

static long ckpt_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	switch (cmd) {
	case CKPT_IOC_QUERY:
		return ckpt_query((void __user *)arg);
	case CKPT_IOC_ATTACH:
		return ckpt_attach(file->private_data, arg);
	case CKPT_IOC_SNAPSHOT:
		return ckpt_snapshot(file->private_data, (void __user *)arg);
	default:
		return -ENOTTY;
	}
}

const struct file_operations ckpt_device_fops = {
	.owner = THIS_MODULE,
	.open = ckpt_open,
	.release = ckpt_release,
	.unlocked_ioctl = ckpt_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

/* One line for each session: id, pid as the reader sees it, snapshots, generation. */
static int ckpt_sessions_show(struct seq_file *m, void *v)
{
	struct ckpt_session *session;

	seq_puts(m, "session pid snapshots incremental\n");
	mutex_lock(&ckpt_sessions_lock);
	list_for_each_entry(session, &ckpt_sessions, node)
		seq_printf(m, "%llu %d %d %s\n", session->id, pid_vnr(session->pid),
			   atomic_read(&session->space->snapshots),
			   READ_ONCE(session->space->generation) ? "yes" : "no");
	mutex_unlock(&ckpt_sessions_lock);
	seq_printf(m, "held_pages %lld of %lu\n", atomic64_read(&ckpt_held_pages),
		   READ_ONCE(ckpt_max_pages));
	return 0;
}

static int ckpt_sessions_open(struct inode *inode, struct file *file)
{
	return single_open(file, ckpt_sessions_show, NULL);
}

const struct file_operations ckpt_sessions_fops = {
	.owner = THIS_MODULE,
	.open = ckpt_sessions_open,
	.read = seq_read,
	.llseek = seq_lseek,
	.release = single_release,
};
