// SPDX-License-Identifier: MIT OR Apache-2.0
/* Memory advised to be in huge pages, of which some are wholly written, some in part, some not; and not at their boundaries. */
#include "mem_pattern.h"

#define HUGE_BYTES ((size_t)2 << 20)
#define BLOCKS 6

int main(int argc, char **argv)
{
	char *p, *start, flags[512];
	size_t bytes = BLOCKS * HUGE_BYTES;

	pattern_begin(argc, argv);
	/* From one page behind a boundary on, so that the first and the last block are parts. */
	p = MUST(mmap(NULL, bytes + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	start = (char *)(((uintptr_t)p + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1)) + PAGE_BYTES;
	if (madvise(start, bytes - 2 * PAGE_BYTES, MADV_HUGEPAGE))
		guest_skip("no huge pages here: %s", strerror(errno));
	char *block = start - PAGE_BYTES;
	pattern_fill(start, HUGE_BYTES - PAGE_BYTES, guest_seed);
	pattern_fill(block + HUGE_BYTES, 2 * HUGE_BYTES, guest_seed + 1);
	/* One page of the fourth, all but one of the fifth, none of the sixth. */
	pattern_fill(block + 3 * HUGE_BYTES + 3 * PAGE_BYTES, PAGE_BYTES, guest_seed + 2);
	pattern_fill(block + 4 * HUGE_BYTES, HUGE_BYTES - PAGE_BYTES, guest_seed + 3);
	guest_ready();
	guest_wait_go();

	/* As they were given. */
	FILE *smaps = fopen("/proc/self/smaps", "r");
	bool within = false;
	GUEST_CHECK(smaps, "smaps: %s", strerror(errno));
	for (*flags = 0; fgets(flags, sizeof(flags), smaps);) {
		unsigned long from, to;

		if (sscanf(flags, "%lx-%lx ", &from, &to) == 2)
			within = from <= (uintptr_t)start && (uintptr_t)start < to;
		else if (within && !strncmp(flags, "VmFlags:", 8))
			break;
	}
	fclose(smaps);
	GUEST_CHECK(strstr(flags, " hg"), "the advice is gone: %s", flags);
	CHECK_PATTERN("part of a block", start, HUGE_BYTES - PAGE_BYTES, guest_seed);
	CHECK_PATTERN("two blocks", block + HUGE_BYTES, 2 * HUGE_BYTES, guest_seed + 1);
	CHECK_ZERO("before the one page", block + 3 * HUGE_BYTES, 3 * PAGE_BYTES);
	CHECK_PATTERN("the one page", block + 3 * HUGE_BYTES + 3 * PAGE_BYTES, PAGE_BYTES, guest_seed + 2);
	CHECK_ZERO("behind the one page", block + 3 * HUGE_BYTES + 4 * PAGE_BYTES, HUGE_BYTES - 4 * PAGE_BYTES);
	CHECK_PATTERN("all but one page", block + 4 * HUGE_BYTES, HUGE_BYTES - PAGE_BYTES, guest_seed + 3);
	CHECK_ZERO("that one page", block + 5 * HUGE_BYTES - PAGE_BYTES, PAGE_BYTES);
	CHECK_ZERO("untouched part of a block", block + 5 * HUGE_BYTES, HUGE_BYTES - PAGE_BYTES);
	guest_ok();
}
