// SPDX-License-Identifier: MIT OR Apache-2.0
/* A shared mapping of a regular file, in two processes. */
#include "mem_pattern.h"

#include <sys/mman.h>

#define PAGES 8

int main(int argc, char **argv)
{
	char path[4200], page[PAGE_BYTES], *p, *readonly;
	pid_t child;
	int fd;

	pattern_begin(argc, argv);
	snprintf(path, sizeof(path), "%s/shared", guest.workdir);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	GUEST_CHECK(fd >= 0 && ftruncate(fd, PAGES * PAGE_BYTES) == 0, "%s: %s", path, strerror(errno));
	p = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	readonly = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ, MAP_SHARED, fd, 0);
	GUEST_CHECK(p != MAP_FAILED && readonly != MAP_FAILED, "mmap: %s", strerror(errno));
	close(fd);
	pattern_fill(p, 4 * PAGE_BYTES, guest_seed);

	child = fork();
	if (child == 0) {
		guest_wait_go();
		while (*(volatile char *)(p + 6 * PAGE_BYTES) != 'g') {
			struct timespec tick = { 0, 2000000 };

			nanosleep(&tick, NULL);
		}
		p[6 * PAGE_BYTES + 1] = 'c';
		_exit(0);
	}
	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("shared file mapping", p, 4 * PAGE_BYTES, guest_seed);
	CHECK_ZERO("hole of the file", p + 4 * PAGE_BYTES, 2 * PAGE_BYTES);
	*(volatile char *)(p + 6 * PAGE_BYTES) = 'g';
	guest_join(child);
	GUEST_CHECK(p[6 * PAGE_BYTES + 1] == 'c', "child's write is not in the parent's mapping");
	GUEST_CHECK(readonly[6 * PAGE_BYTES + 1] == 'c', "child's write is not in the read-only mapping");
	fd = open(path, O_RDONLY);
	GUEST_CHECK(fd >= 0, "open %s: %s", path, strerror(errno));
	GUEST_CHECK(pread(fd, page, 2, 6 * PAGE_BYTES) == 2 && page[0] == 'g' && page[1] == 'c',
		    "writes through the mapping are not in the file");
	GUEST_CHECK(pread(fd, page, PAGE_BYTES, 0) == (ssize_t)PAGE_BYTES, "pread: %s", strerror(errno));
	CHECK_PATTERN("the file itself", page, PAGE_BYTES, guest_seed);
	guest_ok();
}
