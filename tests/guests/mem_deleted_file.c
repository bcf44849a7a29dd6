// SPDX-License-Identifier: MIT OR Apache-2.0
/* A file on disk, mapped shared and privately, then unlinked, its fds closed. */
#include "mem_pattern.h"

#include <sys/mman.h>
#include <sys/stat.h>

#define PAGES 16

int main(int argc, char **argv)
{
	char path[4200], link[4300], page[PAGE_BYTES], *shared, *private, *second;
	struct stat st;
	pid_t child;
	int fd;

	pattern_begin(argc, argv);
	snprintf(path, sizeof(path), "%s/deleted", guest.workdir);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	GUEST_CHECK(fd >= 0, "open %s: %s", path, strerror(errno));
	for (size_t i = 0; i < PAGES; i++) {
		pattern_fill(page, PAGE_BYTES, guest_seed + i);
		GUEST_CHECK(write(fd, page, PAGE_BYTES) == (ssize_t)PAGE_BYTES, "write: %s", strerror(errno));
	}
	shared = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	second = mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 4 * PAGE_BYTES);
	private = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	GUEST_CHECK(shared != MAP_FAILED && private != MAP_FAILED && second != MAP_FAILED,
		    "mmap: %s", strerror(errno));
	close(fd);
	unlink(path);
	pattern_fill(shared + 2 * PAGE_BYTES, PAGE_BYTES, guest_seed + 1000);
	pattern_fill(private + 3 * PAGE_BYTES, PAGE_BYTES, guest_seed + 2000);

	child = fork();
	if (child == 0) {
		guest_wait_go();
		while (*(volatile char *)shared != 'g') {
			struct timespec tick = { 0, 2000000 };

			nanosleep(&tick, NULL);
		}
		second[0] = 'c';
		_exit(0);
	}
	guest_ready();
	guest_wait_go();

	for (size_t i = 0; i < PAGES; i++) {
		CHECK_PATTERN("shared mapping of a deleted file", shared + i * PAGE_BYTES, PAGE_BYTES,
			      guest_seed + (i == 2 ? 1000 : i));
		CHECK_PATTERN("private mapping of a deleted file", private + i * PAGE_BYTES, PAGE_BYTES,
			      guest_seed + (i == 3 ? 2000 : i == 2 ? 1000 : i));
	}
	GUEST_CHECK(stat(path, &st) < 0 && errno == ENOENT, "the deleted file has its name back");
	snprintf(link, sizeof(link), "%s (deleted)", path);
	*(volatile char *)shared = 'g';
	guest_join(child);
	GUEST_CHECK(shared[4 * PAGE_BYTES] == 'c', "the child's write is not in the parent's mapping");
	guest_ok();
}
