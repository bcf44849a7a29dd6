// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Mappings that the application moves and lets grow as one must be one: mremap(2) fails with EFAULT where the kernel keeps two.
 * Neighbours that came together by a move, parts of one mapping with different protections, and huge pages
 * between small ones.
 */
#include "mem_pattern.h"

#include <sys/mman.h>

#define HUGE_BYTES ((size_t)2 << 20)

static char *map_at(char *place, size_t bytes)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (place ? MAP_FIXED : 0);
	char *p = mmap(place, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);

	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return p;
}

/* Moves a mapping to `to`, or elsewhere if that is NULL; what is there is replaced. It grows by a page if it is moved elsewhere: only then must
 * it be one (since Linux 6.17, several may be moved as they are). */
static char *move(const char *what, char *p, size_t bytes, char *to)
{
	size_t new_bytes = to ? bytes : bytes + PAGE_BYTES;
	char *now;

	if (!to)
		to = map_at(NULL, new_bytes);
	now = mremap(p, bytes, new_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	GUEST_CHECK(now == to, "moving %s: %s", what, strerror(errno));
	return now;
}

int main(int argc, char **argv)
{
	const size_t page = PAGE_BYTES;
	char *first, *second, *third, *parts, *room, *huge;
	size_t huge_bytes = 2 * HUGE_BYTES + 8 * PAGE_BYTES;

	pattern_begin(argc, argv);

	/* Three that the kernel does not merge, for their pages were made in other places. Behind the first two comes a page that was never
	 * written to: it is to stay with the one it belongs to. */
	first = map_at(NULL, 24 * page);
	pattern_fill(first, 8 * page, guest_seed);
	second = map_at(NULL, 8 * page);
	third = map_at(NULL, 8 * page);
	pattern_fill(second + page, 7 * page, guest_seed + 1);
	pattern_fill(third, 7 * page, guest_seed + 2);
	second = move("the second", second, 8 * page, first + 8 * page);
	third = move("the third", third, 8 * page, first + 16 * page);

	/* One, the middle of which has lost its protection for a while; its pages lie apart. */
	parts = map_at(NULL, 24 * page);
	pattern_fill(parts, 4 * page, guest_seed + 3);
	pattern_fill(parts + 10 * page, 4 * page, guest_seed + 4);
	pattern_fill(parts + 20 * page, 2 * page, guest_seed + 5);
	GUEST_CHECK(mprotect(parts + 8 * page, 8 * page, PROT_READ) == 0, "mprotect: %s", strerror(errno));

	/* Small pages on both sides of two huge ones, if there are any here. */
	room = map_at(NULL, 4 * HUGE_BYTES);
	huge = (char *)(((uintptr_t)room + 2 * HUGE_BYTES - 1) & ~(HUGE_BYTES - 1)) - 4 * page;
	munmap(room, huge - room);
	munmap(huge + huge_bytes, room + 4 * HUGE_BYTES - huge - huge_bytes);
	madvise(huge, huge_bytes, MADV_HUGEPAGE);
	pattern_fill(huge, huge_bytes, guest_seed + 6);

	guest_ready();
	guest_wait_go();

	second = move("the second again", second, 8 * page, NULL);
	third = move("the third again", third, 8 * page, NULL);
	first = move("the first", first, 8 * page, NULL);
	CHECK_PATTERN("the first", first, 8 * page, guest_seed);
	CHECK_ZERO("the second's untouched page", second, page);
	CHECK_PATTERN("the second", second + page, 7 * page, guest_seed + 1);
	CHECK_PATTERN("the third", third, 7 * page, guest_seed + 2);
	CHECK_ZERO("the third's untouched page", third + 7 * page, page);

	GUEST_CHECK(mprotect(parts, 24 * page, PROT_READ | PROT_WRITE) == 0, "mprotect: %s", strerror(errno));
	parts = move("what has one protection again", parts, 24 * page, NULL);
	CHECK_PATTERN("its beginning", parts, 4 * page, guest_seed + 3);
	CHECK_ZERO("the gap in it", parts + 4 * page, 6 * page);
	CHECK_PATTERN("its middle", parts + 10 * page, 4 * page, guest_seed + 4);
	CHECK_PATTERN("its end", parts + 20 * page, 2 * page, guest_seed + 5);

	huge = move("huge and small pages", huge, huge_bytes, NULL);
	CHECK_PATTERN("huge and small pages", huge, huge_bytes, guest_seed + 6);
	guest_ok();
}
