// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Shared anonymous memory of a parent and a child: pages written by either, a
 * page written by a process that has exited, pages that the survivor never
 * touched, and writes after the restore that the other one sees.
 */
#include "mem_pattern.h"

#include <sys/mman.h>

#define PAGES 64

static _Atomic uint32_t *turn;

static void await(uint32_t value)
{
	struct timespec tick = { 0, 2000000 };

	while (*turn != value)
		nanosleep(&tick, NULL);
}

int main(int argc, char **argv)
{
	char *p;
	pid_t gone, child;

	pattern_begin(argc, argv);
	p = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE,
		 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	turn = (void *)p;
	pattern_fill(p + PAGE_BYTES, PAGE_BYTES, guest_seed + 1);

	gone = fork();
	if (gone == 0) {
		pattern_fill(p + 10 * PAGE_BYTES, 5 * PAGE_BYTES, guest_seed + 10);
		_exit(0);
	}
	guest_join(gone);

	child = fork();
	if (child == 0) {
		pattern_fill(p + 20 * PAGE_BYTES, PAGE_BYTES, guest_seed + 20);
		*turn = 1;
		guest_wait_go();
		await(2);
		CHECK_PATTERN("parent's page after the restore", p + 30 * PAGE_BYTES,
			      PAGE_BYTES, guest_seed + 30);
		CHECK_PATTERN("parent's old page in the child", p + PAGE_BYTES, PAGE_BYTES,
			      guest_seed + 1);
		pattern_fill(p + 31 * PAGE_BYTES, PAGE_BYTES, guest_seed + 31);
		*turn = 3;
		_exit(0);
	}
	await(1);

	guest_ready();
	guest_wait_go();

	GUEST_CHECK(*turn == 1, "turn: expected 1, got %u", *turn);
	CHECK_PATTERN("page of an exited process", p + 10 * PAGE_BYTES, 5 * PAGE_BYTES,
		      guest_seed + 10);
	CHECK_PATTERN("child's page", p + 20 * PAGE_BYTES, PAGE_BYTES, guest_seed + 20);
	CHECK_ZERO("untouched pages", p + 40 * PAGE_BYTES, 24 * PAGE_BYTES);
	pattern_fill(p + 30 * PAGE_BYTES, PAGE_BYTES, guest_seed + 30);
	*turn = 2;
	guest_join(child);
	GUEST_CHECK(*turn == 3, "turn after the child: expected 3, got %u", *turn);
	CHECK_PATTERN("child's page after the restore", p + 31 * PAGE_BYTES, PAGE_BYTES,
		      guest_seed + 31);
	guest_ok();
}
