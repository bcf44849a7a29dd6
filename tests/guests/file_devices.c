// SPDX-License-Identifier: MIT OR Apache-2.0
/* /dev/null, zero, full, random and urandom, open with different access modes. */
#include "mem_pattern.h"

#include <sys/sysmacros.h>

int main(int argc, char **argv)
{
	static const struct {
		const char *path;
		int flags;
		unsigned int minor;
	} DEVICE[] = {
		{ "/dev/null", O_RDWR, 3 },
		{ "/dev/null", O_WRONLY | O_APPEND, 3 },
		{ "/dev/zero", O_RDWR, 5 },
		{ "/dev/full", O_RDWR, 7 },
		{ "/dev/random", O_RDONLY | O_NONBLOCK, 8 },
		{ "/dev/urandom", O_RDONLY | O_CLOEXEC, 9 },
	};
	enum { DEVICES = sizeof(DEVICE) / sizeof(DEVICE[0]) };
	int fd[DEVICES], flags[DEVICES];
	char buffer[64], *mapped, *mapped_shared;
	struct stat st;

	pattern_begin(argc, argv);
	for (int i = 0; i < DEVICES; i++) {
		fd[i] = MUST(open(DEVICE[i].path, DEVICE[i].flags));
		flags[i] = MUST(fcntl(fd[i], F_GETFL));
	}
	/* What old allocators did instead of MAP_ANONYMOUS. */
	mapped = MUST(mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd[2], 0));
	pattern_fill(mapped, 2 * PAGE_BYTES, guest_seed);
	mapped_shared = MUST(mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd[2], 0));
	pattern_fill(mapped_shared, 2 * PAGE_BYTES, guest_seed + 1);

	guest_ready();
	guest_wait_go();

	for (int i = 0; i < DEVICES; i++) {
		MUST(fstat(fd[i], &st));
		EXPECT(S_ISCHR(st.st_mode));
		EXPECT_EQ("major", 1, major(st.st_rdev));
		EXPECT_EQ("minor", DEVICE[i].minor, minor(st.st_rdev));
		EXPECT_EQ("status flags", flags[i], fcntl(fd[i], F_GETFL));
		EXPECT_EQ("FD_CLOEXEC", DEVICE[i].flags & O_CLOEXEC ? FD_CLOEXEC : 0, fcntl(fd[i], F_GETFD));
	}
	EXPECT_EQ("read of null", 0, read(fd[0], buffer, sizeof(buffer)));
	EXPECT_EQ("write to null", 5, write(fd[1], "12345", 5));
	memset(buffer, 1, sizeof(buffer));
	EXPECT_EQ("read of zero", 64, read(fd[2], buffer, sizeof(buffer)));
	CHECK_ZERO("/dev/zero", buffer, sizeof(buffer));
	EXPECT_EQ("write to full", -1, write(fd[3], "1", 1));
	EXPECT_EQ("errno", ENOSPC, errno);
	EXPECT_EQ("read of random", 16, read(fd[4], buffer, 16));
	EXPECT_EQ("read of urandom", 64, read(fd[5], buffer, 64));
	CHECK_PATTERN("private mapping of /dev/zero", mapped, 2 * PAGE_BYTES, guest_seed);
	CHECK_ZERO("untouched part of the mapping", mapped + 2 * PAGE_BYTES, 2 * PAGE_BYTES);
	CHECK_PATTERN("shared mapping of /dev/zero", mapped_shared, 2 * PAGE_BYTES, guest_seed + 1);
	guest_ok();
}
