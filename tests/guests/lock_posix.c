// SPDX-License-Identifier: MIT OR Apache-2.0
/* POSIX record locks: ranges, read and write, per process, one to the end of the file, and one that is waited for. */
#include "mem_pattern.h"

static _Atomic int *turn;

static struct flock range(short type, off_t start, off_t length)
{
	return (struct flock){ .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length };
}

/* What a write lock of the range would meet. */
static void expect_holder(const char *what, int fd, off_t start, off_t length, short type, pid_t holder)
{
	struct flock lock = range(F_WRLCK, start, length);

	MUST(fcntl(fd, F_GETLK, &lock));
	GUEST_CHECK(lock.l_type == type, "%s: expected type %d, got %d", what, type, lock.l_type);
	if (type != F_UNLCK)
		GUEST_CHECK(lock.l_pid == holder, "%s: expected holder %d, got %d", what, holder, lock.l_pid);
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];
	struct flock lock;
	pid_t parent = getpid(), child, waiter;
	int fd, other;

	pattern_begin(argc, argv);
	turn = guest_shared(4096);
	fd = MUST(open(guest_path(path, sizeof(path), "locked"), O_RDWR | O_CREAT, 0600));
	lock = range(F_WRLCK, 0, 100);
	MUST(fcntl(fd, F_SETLK, &lock));
	lock = range(F_UNLCK, 40, 10);
	MUST(fcntl(fd, F_SETLK, &lock));
	lock = range(F_RDLCK, 200, 50);
	MUST(fcntl(fd, F_SETLK, &lock));
	lock = range(F_WRLCK, 5000, 0);
	MUST(fcntl(fd, F_SETLK, &lock));

	child = MUST(fork());
	if (child == 0) {
		lock = range(F_RDLCK, 200, 20);
		MUST(fcntl(fd, F_SETLK, &lock));
		lock = range(F_WRLCK, 1000, 1);
		MUST(fcntl(fd, F_SETLK, &lock));
		*turn = 1;
		guest_wait_go();
		expect_holder("parent's first range", fd, 0, 40, F_WRLCK, parent);
		expect_holder("hole in the parent's range", fd, 40, 10, F_UNLCK, 0);
		expect_holder("parent's second range", fd, 50, 50, F_WRLCK, parent);
		expect_holder("after the parent's range", fd, 100, 100, F_UNLCK, 0);
		expect_holder("parent's read lock", fd, 200, 50, F_RDLCK, parent);
		expect_holder("parent's lock to the end", fd, 1 << 30, 1, F_WRLCK, parent);
		while (*turn != 3)
			guest_nap();
		_exit(0);
	}
	while (*turn != 1)
		guest_nap();
	waiter = MUST(fork());
	if (waiter == 0) {
		lock = range(F_WRLCK, 60, 1);
		*turn = 2;
		while (fcntl(fd, F_SETLKW, &lock))
			GUEST_CHECK(errno == EINTR, "F_SETLKW: %s", strerror(errno));
		_exit(0);
	}
	while (*turn != 2)
		guest_nap();

	guest_ready();
	guest_wait_go();

	expect_holder("child's read lock", fd, 200, 20, F_RDLCK, child);
	expect_holder("child's write lock", fd, 1000, 1, F_WRLCK, child);
	expect_holder("beside the child's lock", fd, 1001, 10, F_UNLCK, 0);
	lock = range(F_UNLCK, 60, 1);
	MUST(fcntl(fd, F_SETLK, &lock));
	guest_join(waiter);
	/* Per process: closing any descriptor of the file releases all of its locks. */
	*turn = 3;
	guest_join(child);
	expect_holder("lock of the child that has exited", fd, 1000, 1, F_UNLCK, 0);
	other = MUST(dup(fd));
	close(other);
	child = MUST(fork());
	if (child == 0) {
		expect_holder("parent's range after a close", fd, 0, 40, F_UNLCK, 0);
		_exit(0);
	}
	guest_join(child);
	guest_ok();
}
