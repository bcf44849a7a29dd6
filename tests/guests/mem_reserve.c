// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Large reservations: 64 GiB of PROT_NONE with a few pages in use, and 64 GiB
 * of MAP_NORESERVE of which two pages were touched.
 */
#include "mem_pattern.h"

#include <sys/mman.h>

#define RESERVED ((size_t)64 << 30)
#define USED ((size_t)40 << 30)

int main(int argc, char **argv)
{
	char *none, *noreserve;

	pattern_begin(argc, argv);
	none = mmap(NULL, RESERVED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	noreserve = mmap(NULL, RESERVED, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	GUEST_CHECK(none != MAP_FAILED && noreserve != MAP_FAILED, "mmap: %s", strerror(errno));
	madvise(noreserve, RESERVED, MADV_NOHUGEPAGE);
	GUEST_CHECK(mprotect(none + USED, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE) == 0, "mprotect: %s",
		    strerror(errno));
	pattern_fill(none + USED, 4 * PAGE_BYTES, guest_seed);
	pattern_fill(noreserve, PAGE_BYTES, guest_seed + 1);
	pattern_fill(noreserve + RESERVED - PAGE_BYTES, PAGE_BYTES, guest_seed + 2);

	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("used part of the reservation", none + USED, 4 * PAGE_BYTES, guest_seed);
	GUEST_CHECK(mprotect(none + RESERVED - PAGE_BYTES, PAGE_BYTES, PROT_READ | PROT_WRITE) == 0,
		    "the reservation is gone: %s", strerror(errno));
	CHECK_ZERO("end of the reservation", none + RESERVED - PAGE_BYTES, PAGE_BYTES);
	CHECK_PATTERN("first page of MAP_NORESERVE", noreserve, PAGE_BYTES, guest_seed + 1);
	CHECK_PATTERN("last page of MAP_NORESERVE", noreserve + RESERVED - PAGE_BYTES, PAGE_BYTES, guest_seed + 2);
	CHECK_ZERO("middle of MAP_NORESERVE", noreserve + USED, PAGE_BYTES);
	guest_ok();
}
