// SPDX-License-Identifier: MIT OR Apache-2.0
/* 512 MiB of private memory, no page like another: far more than a dump may take for itself. */
#include "guest.h"

#define PAGES ((size_t)128 << 10)
#define PAGE_WORDS 512

int main(int argc, char **argv)
{
	guest_begin(argc, argv);
	uint64_t *memory = mmap(NULL, PAGES * PAGE_WORDS * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		guest_fail("mmap: %s", strerror(errno));
	for (size_t n = 0; n < PAGES; n++)
		memory[n * PAGE_WORDS] = ~n;
	guest_ready();
	guest_wait_go();
	for (size_t n = 0; n < PAGES; n++)
		EXPECT_EQ("a page", ~n, memory[n * PAGE_WORDS]);
	guest_ok();
}
