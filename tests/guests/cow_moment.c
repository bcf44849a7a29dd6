// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Memory of every sort is written in lockstep, without a pause: private pages, MADV_DONTFORK, MADV_WIPEONFORK, shared
 * memory and the stack. A checkpoint in which they are not all of one moment is found at once.
 */
#include "guest.h"

#define PAGES 4096
#define PAGE_WORDS 512

static volatile uint64_t *map(int flags, size_t bytes, int advice)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		guest_fail("mmap: %s", strerror(errno));
	if (advice)
		MUST(madvise(p, bytes, advice));
	return p;
}

int main(int argc, char **argv)
{
	volatile uint64_t on_stack = PAGES;

	guest_begin(argc, argv);
	volatile uint64_t *private = map(MAP_PRIVATE, PAGES * PAGE_WORDS * 8, MADV_NOHUGEPAGE);
	volatile uint64_t *not_forked = map(MAP_PRIVATE, PAGE_WORDS * 8, MADV_DONTFORK);
	volatile uint64_t *wiped = map(MAP_PRIVATE, PAGE_WORDS * 8, MADV_WIPEONFORK);
	volatile uint64_t *shared = map(MAP_SHARED, PAGE_WORDS * 8, 0);

	for (uint64_t n = 1; n <= PAGES; n++)
		private[n % PAGES * PAGE_WORDS] = n;
	*not_forked = *wiped = *shared = PAGES;
	guest_ready();
	for (uint64_t n = PAGES; n % 1024 || !guest_exists("go"); n++) {
		EXPECT_EQ("the stack", n, on_stack);
		EXPECT_EQ("MADV_DONTFORK memory", n, *not_forked);
		EXPECT_EQ("MADV_WIPEONFORK memory", n, *wiped);
		EXPECT_EQ("shared memory", n, *shared);
		/* The page that was written longest ago, and the last one. */
		EXPECT_EQ("the oldest private page", n + 1 - PAGES, private[(n + 1) % PAGES * PAGE_WORDS]);
		EXPECT_EQ("the newest private page", n, private[n % PAGES * PAGE_WORDS]);
		private[(n + 1) % PAGES * PAGE_WORDS] = n + 1;
		*not_forked = n + 1;
		*wiped = n + 1;
		*shared = n + 1;
		on_stack = n + 1;
	}
	guest_ok();
}
