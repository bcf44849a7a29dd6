// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A private mapping of a file: unchanged pages, changed pages, a page changed
 * to all zeros, all of it once more in a mapping made read-only afterwards,
 * and a mapping that reaches past the end of its file.
 */
#include "mem_pattern.h"

#include <sys/mman.h>

#define PAGES 16

static char *map(int fd, size_t pages, off_t offset)
{
	char *p = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE, fd, offset);

	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return p;
}

static void change(char *p)
{
	pattern_fill(p + 3 * PAGE_BYTES, PAGE_BYTES, guest_seed ^ 3);
	memset(p + 5 * PAGE_BYTES, 0, PAGE_BYTES);
	p[7 * PAGE_BYTES + 11] ^= 0x55;
}

static void check(const char *what, char *p)
{
	char page[PAGE_BYTES];

	for (size_t i = 0; i < PAGES; i++) {
		char *at = p + i * PAGE_BYTES;

		if (i == 3) {
			CHECK_PATTERN(what, at, PAGE_BYTES, guest_seed ^ 3);
		} else if (i == 5) {
			CHECK_ZERO(what, at, PAGE_BYTES);
		} else {
			memcpy(page, at, PAGE_BYTES);
			if (i == 7)
				page[11] ^= 0x55;
			CHECK_PATTERN(what, page, PAGE_BYTES, guest_seed + 100 + i);
		}
	}
}

int main(int argc, char **argv)
{
	char path[4200], page[PAGE_BYTES], disk[PAGE_BYTES];
	char *writable, *readonly, *offset, *tail;
	int fd;

	pattern_begin(argc, argv);
	snprintf(path, sizeof(path), "%s/mapped", guest.workdir);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	GUEST_CHECK(fd >= 0, "open %s: %s", path, strerror(errno));
	for (size_t i = 0; i < PAGES; i++) {
		pattern_fill(page, PAGE_BYTES, guest_seed + 100 + i);
		GUEST_CHECK(write(fd, page, PAGE_BYTES) == (ssize_t)PAGE_BYTES, "write: %s",
			    strerror(errno));
	}
	GUEST_CHECK(write(fd, "tail", 4) == 4, "write: %s", strerror(errno));

	writable = map(fd, PAGES, 0);
	change(writable);
	readonly = map(fd, PAGES, 0);
	change(readonly);
	mprotect(readonly, PAGES * PAGE_BYTES, PROT_READ);
	offset = map(fd, 4, 8 * (off_t)PAGE_BYTES);
	offset[PAGE_BYTES] ^= 1;
	tail = map(fd, 1, PAGES * (off_t)PAGE_BYTES);
	tail[100] = 'x';
	close(fd);

	guest_ready();
	guest_wait_go();

	check("writable private file mapping", writable);
	check("read-only private file mapping", readonly);
	offset[PAGE_BYTES] ^= 1;
	for (size_t i = 0; i < 4; i++)
		CHECK_PATTERN("mapping at an offset", offset + i * PAGE_BYTES, PAGE_BYTES,
			      guest_seed + 108 + i);
	GUEST_CHECK(memcmp(tail, "tail", 4) == 0 && tail[100] == 'x' && tail[101] == 0,
		    "page at the end of the file: got %.4s %d %d", tail, tail[100], tail[101]);
	/* Nothing reached the file, and the mappings are still those of the file. */
	fd = open(path, O_RDWR);
	GUEST_CHECK(fd >= 0, "open %s: %s", path, strerror(errno));
	for (size_t i = 0; i < PAGES; i++) {
		GUEST_CHECK(pread(fd, disk, PAGE_BYTES, i * PAGE_BYTES) == (ssize_t)PAGE_BYTES,
			    "pread page %zu", i);
		CHECK_PATTERN("the file itself", disk, PAGE_BYTES, guest_seed + 100 + i);
	}
	madvise(writable + 3 * PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED);
	CHECK_PATTERN("changed page after MADV_DONTNEED", writable + 3 * PAGE_BYTES,
		      PAGE_BYTES, guest_seed + 103);
	guest_ok();
}
