// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * 200 MiB of private memory of which little changes in each step: pages on both sides of each multiple of 64 MiB, pages all over, one
 * stretch of more than 3 MiB; some are dropped. What each page must hold is kept beside it.
 *
 * Step N begins with the file stepN and is over with doneN.
 */
#include "mem_pattern.h"

#define PAGES ((size_t)50 << 10)
#define BORDER_BYTES ((uintptr_t)64 << 20)
#define STRETCH ((size_t)800)

static char *memory;
/* 0: dropped, and so zero. */
static uint32_t versions[PAGES];

static uint64_t seed_of(size_t page)
{
	return guest_seed ^ ((uint64_t)versions[page] << 32 | page);
}

static void write_page(size_t page, uint32_t version)
{
	versions[page] = version;
	/* Little of it, for speed. */
	pattern_fill(memory + page * PAGE_BYTES, 64, seed_of(page));
}

static void drop_page(size_t page)
{
	versions[page] = 0;
	MUST(madvise(memory + page * PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED));
}

static void change(uint32_t step)
{
	uintptr_t first = (uintptr_t)memory;
	uintptr_t border = (first / BORDER_BYTES + 1) * BORDER_BYTES;

	for (size_t page = step; page < PAGES; page += 97)
		write_page(page, step + 1);
	for (size_t i = 0; i < STRETCH; i++)
		write_page(11000 + 1100 * step + i, step + 1);
	for (; border + 3 * PAGE_BYTES < first + PAGES * PAGE_BYTES; border += BORDER_BYTES) {
		size_t page = (border - first) / PAGE_BYTES;

		if (page < 3)
			continue;
		write_page(page - 1, step + 1);
		if (step % 2)
			write_page(page, step + 1);
		else
			drop_page(page);
		drop_page(page + 1 + step % 2);
	}
}

int main(int argc, char **argv)
{
	char name[64];

	pattern_begin(argc, argv);
	memory = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(memory != MAP_FAILED, "mmap: %s", strerror(errno));
	for (size_t page = 0; page < PAGES; page++)
		write_page(page, 1);
	guest_ready();
	for (uint32_t step = 1; !guest_exists("go"); step++) {
		snprintf(name, sizeof(name), "step%u", step);
		while (!guest_exists(name) && !guest_exists("go"))
			guest_nap();
		if (guest_exists("go"))
			break;
		change(step);
		snprintf(name, sizeof(name), "done%u", step);
		guest_publish(name, "");
	}
	for (size_t page = 0; page < PAGES; page++) {
		if (versions[page])
			CHECK_PATTERN("a page", memory + page * PAGE_BYTES, 64, seed_of(page));
		else
			CHECK_ZERO("a dropped page", memory + page * PAGE_BYTES, PAGE_BYTES);
	}
	guest_ok();
}
