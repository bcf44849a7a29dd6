// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Stacks: deep frames with checked content before the dump, deeper recursion
 * after it (the main stack must still grow by itself), and a MAP_GROWSDOWN
 * area that must still grow.
 */
#include "mem_pattern.h"

#include <sys/mman.h>

#define FRAMES_BEFORE 500
#define FRAMES_AFTER 900

static char *grows;
static size_t grows_pages_below;

static void __attribute__((noinline)) deeper(int left)
{
	uint64_t frame[512];

	pattern_fill(frame, sizeof(frame), guest_seed ^ (uint64_t)left);
	__asm__ volatile("" :: "r"(frame) : "memory");
	if (left > 0)
		deeper(left - 1);
	CHECK_PATTERN("frame after the restore", frame, sizeof(frame), guest_seed ^ (uint64_t)left);
}

/* Out of line, so that its buffers are not part of each deep frame. */
static void __attribute__((noinline)) across_the_dump(void)
{
	guest_ready();
	guest_wait_go();
	CHECK_PATTERN("grows-down area", grows, PAGE_BYTES, guest_seed + 5);
	for (size_t i = 1; i <= grows_pages_below; i++)
		pattern_fill(grows - i * PAGE_BYTES, PAGE_BYTES, guest_seed + 5 + i);
	for (size_t i = 0; i <= grows_pages_below; i++)
		CHECK_PATTERN("grows-down area grown", grows - i * PAGE_BYTES, PAGE_BYTES, guest_seed + 5 + i);
	deeper(FRAMES_AFTER);
}

static void __attribute__((noinline)) deep(int left)
{
	uint64_t frame[512];

	pattern_fill(frame, sizeof(frame), guest_seed + (uint64_t)left);
	__asm__ volatile("" :: "r"(frame) : "memory");
	if (left > 0)
		deep(left - 1);
	else
		across_the_dump();
	CHECK_PATTERN("frame of before the dump", frame, sizeof(frame), guest_seed + (uint64_t)left);
}

int main(int argc, char **argv)
{
	char *area;

	pattern_begin(argc, argv);
	/* Reserve, free and map at the top of the hole, so that growth has room. */
	area = mmap(NULL, (size_t)4 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(area != MAP_FAILED, "mmap: %s", strerror(errno));
	munmap(area, (size_t)3 << 20);
	grows_pages_below = 16;
	grows = mmap(area + ((size_t)2 << 20), PAGE_BYTES, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0);
	GUEST_CHECK(grows != MAP_FAILED, "mmap: %s", strerror(errno));
	pattern_fill(grows, PAGE_BYTES, guest_seed + 5);
	deep(FRAMES_BEFORE);
	guest_ok();
}
