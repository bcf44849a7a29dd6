// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * inotify: watches of directories and files, by absolute and relative paths, through symbolic links and of a link itself, with
 * numbers that have gaps; IN_ONESHOT armed and fired, IN_EXCL_UNLINK, IN_MASK_ADD, /dev/shm; an instance that a child
 * shares, and one that an epoll set and a thread's blocking read wait for.
 *
 * Argument "elsewhere": one watch of a directory whose path is only in a file. "queued": events are not read before go, and
 * are there after it ("queued") or have become IN_Q_OVERFLOW ("overflow").
 */
#include "guest.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>

#define ALL (IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_CLOSE_WRITE)

static char base[PATH_MAX], shm_dir[64], shm_file[80];

static const char *at(const char *name)
{
	static char paths[8][2 * PATH_MAX];
	static int next;
	char *path = paths[next++ % 8];

	snprintf(path, sizeof(paths[0]), "%s/%s", base, name);
	return path;
}

static void put(const char *path)
{
	int fd = MUST(open(path, O_WRONLY | O_CREAT | O_APPEND, 0644));

	MUST(write(fd, "x", 1));
	MUST(close(fd));
}

static void expect_event(const char *what, int instance, int wd, uint32_t mask, const char *name)
{
	static char buffer[64 << 10] __attribute__((aligned(8)));
	static size_t used, left;
	static int of = -1;
	struct inotify_event *event;

	if (!left || of != instance) {
		if (left)
			guest_fail("%s: events of another instance are left", what);
		of = instance;
		used = 0;
		left = MUST(read(instance, buffer, sizeof(buffer)));
	}
	event = (void *)(buffer + used);
	used += sizeof(*event) + event->len;
	left -= sizeof(*event) + event->len;
	if (event->wd != wd || event->mask != mask || strcmp(event->len ? event->name : "", name))
		guest_fail("%s: expected watch %d mask %#x name \"%s\", got watch %d mask %#x name \"%s\"", what, wd, mask, name,
			   event->wd, event->mask, event->len ? event->name : "");
}

static void expect_quiet(const char *what, int instance)
{
	int queued;

	MUST(ioctl(instance, FIONREAD, &queued));
	EXPECT_EQ(what, 0, queued);
}

static int blocking, blocking_wd;
static _Atomic int waiting;

static void *reader(void *arg)
{
	char buffer[4096] __attribute__((aligned(8)));
	struct inotify_event *event = (void *)buffer;

	waiting = 1;
	EXPECT_EQ("blocking read", sizeof(*event) + 16, read(blocking, buffer, sizeof(buffer)));
	EXPECT_EQ("its watch", blocking_wd, event->wd);
	EXPECT_STR("its name", "wake", event->name);
	return arg;
}

static void elsewhere(void)
{
	char where[PATH_MAX], path[2 * PATH_MAX];
	int instance = MUST(inotify_init1(IN_NONBLOCK)), wd;

	guest_read_file(guest_path(path, sizeof(path), "where"), where, sizeof(where));
	wd = MUST(inotify_add_watch(instance, where, IN_CREATE | IN_ONLYDIR));
	guest_ready();
	guest_wait_go();
	snprintf(path, sizeof(path), "%s/new", where);
	put(path);
	expect_event("elsewhere", instance, wd, IN_CREATE, "new");
	expect_quiet("nothing else", instance);
	guest_ok();
}

static void queued(const char *how)
{
	int instance = MUST(inotify_init1(IN_NONBLOCK)), wd;

	MUST(mkdir(at("dir"), 0755));
	wd = MUST(inotify_add_watch(instance, at("dir"), IN_CREATE));
	if (strcmp(how, "changed"))
		put(at("dir/early"));
	guest_ready();
	guest_wait_go();
	if (!strcmp(how, "queued"))
		expect_event("unread", instance, wd, IN_CREATE, "early");
	else
		expect_event("lost", instance, -1, IN_Q_OVERFLOW, "");
	expect_quiet("nothing else", instance);
	put(at("dir/late"));
	expect_event("late", instance, wd, IN_CREATE, "late");
	guest_ok();
}

int main(int argc, char **argv)
{
	int many, gone, dir, file, link_itself, through, once, added, shm, shared, shared_wd, set, status, fd;
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = 7 };
	pthread_t thread;
	pid_t child;

	guest_begin(argc, argv);
	snprintf(base, sizeof(base), "%s/watched", guest.workdir);
	MUST(mkdir(base, 0755));
	if (argc > 2 && !strcmp(argv[2], "elsewhere"))
		elsewhere();
	if (argc > 2)
		queued(argv[2]);
	const char *dirs[] = { "dir", "other", "once", "fired", "added", "shared", "blocking" };
	for (size_t i = 0; i < sizeof(dirs) / sizeof(*dirs); i++)
		MUST(mkdir(at(dirs[i]), 0755));
	put(at("file"));
	put(at("other/unlinked"));
	MUST(symlink("other", at("link")));
	snprintf(shm_dir, sizeof(shm_dir), "/dev/shm/%s", guest.nonce);
	snprintf(shm_file, sizeof(shm_file), "%s/a", shm_dir);
	MUST(mkdir(shm_dir, 0755));

	many = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
	dir = MUST(inotify_add_watch(many, at("dir"), ALL | IN_ONLYDIR));
	for (int i = 0; i < 40; i++) {
		gone = MUST(inotify_add_watch(many, at("fired"), IN_OPEN));
		MUST(inotify_rm_watch(many, gone));
		expect_event("removed", many, gone, IN_IGNORED, "");
	}
	MUST(chdir(base));
	file = MUST(inotify_add_watch(many, "file", IN_MODIFY | IN_ATTRIB));
	link_itself = MUST(inotify_add_watch(many, "./link", IN_ATTRIB | IN_DONT_FOLLOW));
	through = MUST(inotify_add_watch(many, "link", IN_MODIFY | IN_EXCL_UNLINK));
	once = MUST(inotify_add_watch(many, at("once"), IN_CREATE | IN_ONESHOT));
	gone = MUST(inotify_add_watch(many, at("fired"), IN_CREATE | IN_ONESHOT));
	put(at("fired/a"));
	expect_event("oneshot", many, gone, IN_CREATE, "a");
	expect_event("oneshot is over", many, gone, IN_IGNORED, "");
	added = MUST(inotify_add_watch(many, at("added"), IN_CREATE));
	EXPECT_EQ("IN_MASK_ADD", added, inotify_add_watch(many, at("added"), IN_DELETE | IN_MASK_ADD));
	shm = MUST(inotify_add_watch(many, shm_dir, IN_CREATE));
	MUST(chdir("/"));
	fd = MUST(open(at("other/unlinked"), O_WRONLY));
	MUST(unlink(at("other/unlinked")));
	EXPECT_EQ("numbers", 42, file);

	shared = MUST(inotify_init1(0));
	shared_wd = MUST(inotify_add_watch(shared, at("shared"), IN_CREATE));
	child = MUST(fork());
	if (!child) {
		guest_wait_go();
		put(at("shared/by-child"));
		expect_event("shared", shared, shared_wd, IN_CREATE, "by-child");
		MUST(inotify_rm_watch(shared, shared_wd));
		_exit(0);
	}
	set = MUST(epoll_create1(0));
	MUST(epoll_ctl(set, EPOLL_CTL_ADD, many, &event));
	EXPECT_EQ("epoll before", 0, MUST(epoll_wait(set, &event, 1, 0)));

	blocking = MUST(inotify_init1(0));
	blocking_wd = MUST(inotify_add_watch(blocking, at("blocking"), IN_CREATE));
	MUST0(pthread_create(&thread, NULL, reader, NULL));
	while (!waiting)
		guest_nap();
	guest_ready();
	guest_wait_go();

	EXPECT_EQ("FD_CLOEXEC", FD_CLOEXEC, fcntl(many, F_GETFD));
	EXPECT_EQ("O_NONBLOCK", O_NONBLOCK, fcntl(many, F_GETFL) & O_NONBLOCK);
	expect_quiet("nothing happened", many);
	EXPECT_EQ("epoll, quiet", 0, MUST(epoll_wait(set, &event, 1, 0)));
	put(at("dir/a"));
	EXPECT_EQ("epoll", 1, MUST(epoll_wait(set, &event, 1, 0)));
	EXPECT_EQ("epoll data", 7, event.data.u64);
	MUST(rename(at("dir/a"), at("dir/b")));
	MUST(unlink(at("dir/b")));
	MUST(mkdir(at("dir/d"), 0755));
	expect_event("directory", many, dir, IN_CREATE, "a");
	expect_event("directory", many, dir, IN_CLOSE_WRITE, "a");
	expect_event("directory", many, dir, IN_MOVED_FROM, "a");
	expect_event("directory", many, dir, IN_MOVED_TO, "b");
	expect_event("directory", many, dir, IN_DELETE, "b");
	expect_event("directory", many, dir, IN_CREATE | IN_ISDIR, "d");
	put(at("file"));
	MUST(chmod(at("file"), 0600));
	expect_event("file", many, file, IN_MODIFY, "");
	expect_event("file", many, file, IN_ATTRIB, "");
	MUST(utimensat(AT_FDCWD, at("link"), NULL, AT_SYMLINK_NOFOLLOW));
	expect_event("link itself", many, link_itself, IN_ATTRIB, "");
	put(at("other/new"));
	expect_event("through a link", many, through, IN_MODIFY, "new");
	MUST(write(fd, "x", 1));
	expect_quiet("IN_EXCL_UNLINK", many);
	put(at("once/a"));
	put(at("once/b"));
	expect_event("armed oneshot", many, once, IN_CREATE, "a");
	expect_event("armed oneshot is over", many, once, IN_IGNORED, "");
	put(at("fired/b"));
	expect_quiet("fired oneshot", many);
	put(at("added/a"));
	MUST(unlink(at("added/a")));
	expect_event("IN_MASK_ADD", many, added, IN_CREATE, "a");
	expect_event("IN_MASK_ADD", many, added, IN_DELETE, "a");
	put(shm_file);
	expect_event("/dev/shm", many, shm, IN_CREATE, "a");
	MUST(unlink(shm_file));
	MUST(rmdir(shm_dir));
	expect_event("/dev/shm removed", many, shm, IN_IGNORED, "");
	expect_quiet("no more", many);
	EXPECT_EQ("next number", shm + 1, MUST(inotify_add_watch(many, at("fired"), IN_OPEN)));

	status = guest_reap(child);
	EXPECT_EQ("child", 0, status);
	expect_event("removed by the child", shared, shared_wd, IN_IGNORED, "");
	put(at("blocking/wake"));
	MUST0(pthread_join(thread, NULL));
	guest_ok();
}
