// SPDX-License-Identifier: MIT OR Apache-2.0
/* The brk heap: its end is where it was, its content too, and it grows on. */
#include "mem_pattern.h"

int main(int argc, char **argv)
{
	char *start, *end;

	pattern_begin(argc, argv);
	start = sbrk(64 * PAGE_BYTES);
	GUEST_CHECK(start != (void *)-1, "sbrk: %s", strerror(errno));
	pattern_fill(start, 64 * PAGE_BYTES, guest_seed);
	/* Not at a page boundary, as malloc never leaves it but others do. */
	sbrk(104);
	end = sbrk(0);

	guest_ready();
	guest_wait_go();

	GUEST_CHECK(sbrk(0) == end, "sbrk(0): expected %p, got %p", end, sbrk(0));
	CHECK_PATTERN("brk heap", start, 64 * PAGE_BYTES, guest_seed);
	GUEST_CHECK(sbrk(32 * PAGE_BYTES) == end, "sbrk: the heap does not grow on: %s", strerror(errno));
	CHECK_ZERO("grown heap", end, 32 * PAGE_BYTES);
	memset(end, 7, 32 * PAGE_BYTES);
	GUEST_CHECK(sbrk(-40 * (intptr_t)PAGE_BYTES) == end + 32 * PAGE_BYTES, "sbrk: the heap does not shrink");
	CHECK_PATTERN("rest of the heap", start, 48 * PAGE_BYTES, guest_seed);
	guest_ok();
}
