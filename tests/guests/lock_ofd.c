// SPDX-License-Identifier: MIT OR Apache-2.0
/* Open file description locks: they belong to the description, whoever holds it, and conflict within one process. */
#include "mem_pattern.h"

static struct flock range(short type, off_t start, off_t length)
{
	return (struct flock){ .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length };
}

static short meets(int fd, off_t start, off_t length)
{
	struct flock lock = range(F_WRLCK, start, length);

	MUST(fcntl(fd, F_OFD_GETLK, &lock));
	return lock.l_type;
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];
	struct flock lock;
	int fd, duplicate, other, stranger;
	pid_t child;

	pattern_begin(argc, argv);
	fd = MUST(open(guest_path(path, sizeof(path), "locked"), O_RDWR | O_CREAT, 0600));
	other = MUST(open(path, O_RDWR));
	stranger = MUST(open(path, O_RDWR));
	duplicate = MUST(dup(fd));
	lock = range(F_WRLCK, 10, 20);
	MUST(fcntl(fd, F_OFD_SETLK, &lock));
	lock = range(F_RDLCK, 100, 0);
	MUST(fcntl(other, F_OFD_SETLK, &lock));
	child = MUST(fork());
	if (child == 0) {
		guest_wait_go();
		while (!guest_exists("unlock"))
			guest_nap();
		/* Shared with the parent: released here, released there. */
		lock = range(F_UNLCK, 10, 20);
		MUST(fcntl(fd, F_OFD_SETLK, &lock));
		_exit(0);
	}

	guest_ready();
	guest_wait_go();

	EXPECT_EQ("write lock seen by a stranger", F_WRLCK, meets(stranger, 10, 20));
	EXPECT_EQ("write lock seen by the second description", F_WRLCK, meets(other, 29, 1));
	EXPECT_EQ("own lock through the duplicate", F_UNLCK, meets(duplicate, 10, 20));
	EXPECT_EQ("before the range", F_UNLCK, meets(stranger, 0, 10));
	EXPECT_EQ("after the range", F_UNLCK, meets(stranger, 30, 70));
	EXPECT_EQ("read lock to the end", F_RDLCK, meets(stranger, 1 << 20, 1));
	close(fd);
	EXPECT_EQ("lock after one of the descriptors is closed", F_WRLCK, meets(stranger, 10, 20));
	guest_publish("unlock", "");
	guest_join(child);
	EXPECT_EQ("lock released by the child", F_UNLCK, meets(stranger, 10, 20));
	guest_ok();
}
