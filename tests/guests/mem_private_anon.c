// SPDX-License-Identifier: MIT OR Apache-2.0
/* Private anonymous memory: pattern, holes, zero pages, a sparse 64 MiB area. */
#include "mem_pattern.h"

#include <sys/mman.h>

#define PLAIN_BYTES (512 * PAGE_BYTES)
#define SPARSE_BYTES ((size_t)64 << 20)
#define SPARSE_STEP (37 * PAGE_BYTES)

static char *map(size_t bytes)
{
	char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	GUEST_CHECK(p != MAP_FAILED, "mmap of %zu bytes: %s", bytes, strerror(errno));
	return p;
}

int main(int argc, char **argv)
{
	unsigned char resident[SPARSE_BYTES / PAGE_BYTES];
	size_t present = 0, expected = 0;
	char *plain, *holes, *zeros, *sparse, *dropped;

	pattern_begin(argc, argv);
	plain = map(PLAIN_BYTES);
	pattern_fill(plain, PLAIN_BYTES, guest_seed);

	/* Read only, written with zeros, and written then dropped. */
	zeros = map(3 * PAGE_BYTES);
	CHECK_ZERO("fresh page", zeros, PAGE_BYTES);
	memset(zeros + PAGE_BYTES, 0x5a, PAGE_BYTES);
	memset(zeros + PAGE_BYTES, 0, PAGE_BYTES);
	dropped = map(PAGE_BYTES);
	pattern_fill(dropped, PAGE_BYTES, guest_seed);
	madvise(dropped, PAGE_BYTES, MADV_DONTNEED);

	sparse = map(SPARSE_BYTES);
	madvise(sparse, SPARSE_BYTES, MADV_NOHUGEPAGE);
	for (size_t at = 0; at < SPARSE_BYTES; at += SPARSE_STEP, expected++)
		pattern_fill(sparse + at, PAGE_BYTES, guest_seed + at);

	/* Three areas left after the middle ones are unmapped. Last, so that no other mapping fills the holes. */
	holes = map(5 * PAGE_BYTES);
	pattern_fill(holes, 5 * PAGE_BYTES, guest_seed + 1);
	munmap(holes + PAGE_BYTES, PAGE_BYTES);
	munmap(holes + 3 * PAGE_BYTES, PAGE_BYTES);

	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("plain area", plain, PLAIN_BYTES, guest_seed);
	for (size_t i = 0; i < 5; i++) {
		unsigned char vec;
		int mapped = mincore(holes + i * PAGE_BYTES, PAGE_BYTES, &vec) == 0;

		GUEST_CHECK(mapped == (i != 1 && i != 3),
			    "page %zu of the holed area: expected mapped=%d, got %d",
			    i, i != 1 && i != 3, mapped);
		if (!mapped)
			continue;
		for (size_t w = 0; w < PAGE_BYTES / 8; w++) {
			uint64_t got = ((uint64_t *)(holes + i * PAGE_BYTES))[w];

			GUEST_CHECK(got == pattern_word(guest_seed + 1, i * PAGE_BYTES / 8 + w),
				    "holed area page %zu word %zu: got %#lx", i, w, got);
		}
	}
	/* Before the reads below populate the gaps: a sparse area stays sparse. */
	GUEST_CHECK(mincore(sparse, SPARSE_BYTES, resident) == 0, "mincore: %s",
		    strerror(errno));
	for (size_t i = 0; i < sizeof(resident); i++)
		present += resident[i] & 1;
	GUEST_CHECK(present <= 2 * expected + 64,
		    "sparse area: expected about %zu resident pages, got %zu",
		    expected, present);
	for (size_t at = 0; at < SPARSE_BYTES; at += PAGE_BYTES) {
		if (at % SPARSE_STEP == 0)
			CHECK_PATTERN("sparse area page", sparse + at, PAGE_BYTES,
				      guest_seed + at);
		else
			CHECK_ZERO("sparse area gap", sparse + at, PAGE_BYTES);
	}
	CHECK_ZERO("zero pages", zeros, 3 * PAGE_BYTES);
	CHECK_ZERO("dropped page", dropped, PAGE_BYTES);
	/* MADV_DONTNEED gives zeros, never the content of a checkpoint. */
	madvise(plain, PAGE_BYTES, MADV_DONTNEED);
	CHECK_ZERO("page dropped after the restore", plain, PAGE_BYTES);
	guest_ok();
}
