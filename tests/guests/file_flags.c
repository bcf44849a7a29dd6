// SPDX-License-Identifier: MIT OR Apache-2.0
/* Regular files: position, access mode, status flags, FD_CLOEXEC, and that each fd leads to its own file. */
#include "mem_pattern.h"

static const struct {
	int flags;
	off_t position;
} OPENED[] = {
	{ O_RDONLY, 0 },
	{ O_RDONLY | O_CLOEXEC, 17 },
	{ O_WRONLY, 4096 },
	{ O_WRONLY | O_APPEND, 0 },
	{ O_RDWR, 100000 },
	{ O_RDWR | O_NONBLOCK | O_CLOEXEC, 1 },
	{ O_RDWR | O_APPEND | O_SYNC, 300 },
	{ O_RDONLY | O_NOATIME, 5 },
	{ O_PATH | O_CLOEXEC, 0 },
};
#define OPENED_FILES (sizeof(OPENED) / sizeof(OPENED[0]))

int main(int argc, char **argv)
{
	char path[PATH_MAX], name[32], link[64], target[PATH_MAX];
	int fd[OPENED_FILES], got[OPENED_FILES], cleared;
	struct stat st[OPENED_FILES], now;
	ssize_t n;

	pattern_begin(argc, argv);
	for (size_t i = 0; i < OPENED_FILES; i++) {
		snprintf(name, sizeof(name), "file %zu", i);
		guest_path(path, sizeof(path), name);
		int made = MUST(open(path, O_CREAT | O_WRONLY | O_EXCL, 0600));
		MUST(ftruncate(made, 200000));
		EXPECT_EQ("pwrite", 6, pwrite(made, guest.nonce, 6, 17));
		close(made);
		fd[i] = MUST(open(path, OPENED[i].flags));
		if (!(OPENED[i].flags & O_PATH))
			EXPECT_EQ("lseek", OPENED[i].position, lseek(fd[i], OPENED[i].position, SEEK_SET));
		MUST(fstat(fd[i], &st[i]));
		got[i] = MUST(fcntl(fd[i], F_GETFL));
	}
	/* A flag set after the open, and one taken away. */
	MUST(fcntl(fd[0], F_SETFL, O_NONBLOCK));
	got[0] = MUST(fcntl(fd[0], F_GETFL));
	cleared = MUST(open(path, O_RDWR | O_APPEND));
	MUST(fcntl(cleared, F_SETFL, 0));

	guest_ready();
	guest_wait_go();

	for (size_t i = 0; i < OPENED_FILES; i++) {
		snprintf(name, sizeof(name), "file %zu", i);
		EXPECT_EQ("status flags", got[i], fcntl(fd[i], F_GETFL));
		EXPECT_EQ("FD_CLOEXEC", OPENED[i].flags & O_CLOEXEC ? FD_CLOEXEC : 0, fcntl(fd[i], F_GETFD));
		MUST(fstat(fd[i], &now));
		EXPECT(now.st_dev == st[i].st_dev && now.st_ino == st[i].st_ino);
		guest_path(path, sizeof(path), name);
		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd[i]);
		n = MUST(readlink(link, target, sizeof(target) - 1));
		target[n] = 0;
		EXPECT_STR("path", path, target);
		if (!(OPENED[i].flags & O_PATH))
			EXPECT_EQ("position", OPENED[i].position, lseek(fd[i], 0, SEEK_CUR));
	}
	EXPECT_EQ("status flags after F_SETFL", O_RDWR | 0100000, fcntl(cleared, F_GETFL) | 0100000);
	EXPECT_EQ("read", 6, read(fd[1], name, 6));
	EXPECT(memcmp(name, guest.nonce, 6) == 0);
	EXPECT_EQ("write to O_RDONLY", -1, write(fd[1], "x", 1));
	EXPECT_EQ("read of O_WRONLY", -1, read(fd[2], name, 1));
	EXPECT_EQ("append", 3, write(fd[3], "end", 3));
	MUST(fstat(fd[3], &now));
	EXPECT_EQ("size after append", 200003, now.st_size);
	EXPECT_EQ("write", 3, write(fd[4], "mid", 3));
	EXPECT_EQ("pread", 3, pread(fd[4], name, 3, 100000));
	EXPECT(memcmp(name, "mid", 3) == 0);
	guest_ok();
}
