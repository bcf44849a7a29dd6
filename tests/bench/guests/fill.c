// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Fills fresh memory from a file, as a restore has to, and prints how long that took in nanoseconds:
 *
 *     fill FILE BYTES 4k|thp read|populate
 *
 * read: read(2) into pages that are not there yet; populate: all pages are made first. A file shorter than BYTES is read again
 * from its beginning.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv)
{
	uint64_t bytes, huge_bytes = 2 << 20, piece = 4 << 20, started, at = 0, offset = 0;
	struct stat status;
	char *memory;
	int fd;

	if (argc != 5) {
		fprintf(stderr, "usage: fill FILE BYTES 4k|thp read|populate\n");
		return 2;
	}
	bytes = strtoull(argv[2], NULL, 10);
	fd = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &status) < 0 || status.st_size == 0) {
		perror(argv[1]);
		return 1;
	}
	started = now();
	memory = mmap(NULL, bytes + huge_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	memory = (char *)(((uintptr_t)memory + huge_bytes - 1) & ~(uintptr_t)(huge_bytes - 1));
	madvise(memory, bytes, !strcmp(argv[3], "thp") ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	if (!strcmp(argv[4], "populate") && madvise(memory, bytes, MADV_POPULATE_WRITE) < 0) {
		perror("MADV_POPULATE_WRITE");
		return 1;
	}
	while (at < bytes) {
		ssize_t n = pread(fd, memory + at, bytes - at < piece ? bytes - at : piece, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			perror("pread");
			return 1;
		}
		at += n;
		offset = n ? offset + n : 0;
	}
	printf("%llu\n", (unsigned long long)(now() - started));
	return 0;
}
