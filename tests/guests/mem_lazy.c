// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Memory that may still be missing while its owner forks, moves, drops and unmaps it, hands it to system calls, executes
 * another program beside it and races for it. Every page has a content of its own; argv[2] names what is done.
 */
#include "mem_pattern.h"

#include <pthread.h>
#include <sys/uio.h>

#define AREA_BYTES ((size_t)8 << 20)
#define HALF (AREA_BYTES / 2)

static char *area, *bare;

static void *map(size_t bytes)
{
	return MUST(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

static uint64_t seed_of(size_t offset)
{
	return guest_seed + offset;
}

/* Pages at p are those that were at offset in the area. */
static void check_at(const char *what, const char *p, size_t offset, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += PAGE_BYTES)
		CHECK_PATTERN(what, p + at, PAGE_BYTES, seed_of(offset + at));
}

static void check_area(const char *what)
{
	check_at(what, area, 0, AREA_BYTES);
}

static void through_fork(void)
{
	pid_t child = MUST(fork());

	if (!child) {
		/* What the parent writes after the fork is not seen, whether its page was there or not. */
		check_at("first half in the child", area, 0, HALF);
		pid_t grandchild = MUST(fork());
		if (!grandchild) {
			memset(area + HALF, 0x33, PAGE_BYTES);
			check_at("rest in the grandchild", area + HALF + PAGE_BYTES, HALF + PAGE_BYTES,
				 HALF - PAGE_BYTES);
			_exit(0);
		}
		guest_join(grandchild);
		check_at("second half in the child", area + HALF, HALF, HALF);
		_exit(0);
	}
	memset(area, 0x55, PAGE_BYTES);
	memset(area + HALF, 0x55, PAGE_BYTES);
	guest_join(child);
	check_at("the parent's", area + PAGE_BYTES, PAGE_BYTES, HALF - PAGE_BYTES);
	check_at("the parent's", area + HALF + PAGE_BYTES, HALF + PAGE_BYTES, HALF - PAGE_BYTES);
}

static void through_wipe(void)
{
	MUST(madvise(area, HALF, MADV_WIPEONFORK));
	MUST(madvise(area + HALF + (1 << 20), 1 << 20, MADV_DONTFORK));
	pid_t child = MUST(fork());
	if (!child) {
		unsigned char vector[256];

		CHECK_ZERO("wiped half in the child", area, HALF);
		GUEST_CHECK(mincore(area + HALF + (1 << 20), 1 << 20, vector) == -1 && errno == ENOMEM,
			    "the child has memory that it should not get");
		check_at("the rest in the child", area + HALF, HALF, 1 << 20);
		_exit(0);
	}
	guest_join(child);
	check_area("the parent's");
}

static void through_mremap(void)
{
	char *there = map(AREA_BYTES);

	/* Moved, and by half onto memory that is itself missing. */
	char *moved = MUST(mremap(area + HALF, HALF / 2, HALF / 2, MREMAP_MAYMOVE | MREMAP_FIXED, there));
	check_at("moved", moved, HALF, HALF / 2);
	moved = MUST(mremap(area + HALF + HALF / 2, HALF / 2, HALF / 2, MREMAP_MAYMOVE | MREMAP_FIXED, area));
	check_at("moved onto missing pages", moved, HALF + HALF / 2, HALF / 2);
	/* Grown: the new part is zero; shrunk and grown again: so is what came back. */
	char *grown = MUST(mremap(area + HALF / 2, HALF / 2, AREA_BYTES, MREMAP_MAYMOVE));
	CHECK_ZERO("grown part", grown + HALF / 2, AREA_BYTES - HALF / 2);
	check_at("before the grown part", grown, HALF / 2, HALF / 4);
	MUST(mremap(grown, AREA_BYTES, HALF / 4 + PAGE_BYTES, 0));
	grown = MUST(mremap(grown, HALF / 4 + PAGE_BYTES, HALF, MREMAP_MAYMOVE));
	CHECK_ZERO("grown again", grown + HALF / 4 + PAGE_BYTES, HALF - HALF / 4 - PAGE_BYTES);
	check_at("what was kept", grown, HALF / 2, HALF / 4 + PAGE_BYTES);
	check_at("at the new place", there, HALF, HALF / 2);
}

static void through_dontneed(void)
{
	/* Missing pages, pages that are there, and both at once. */
	MUST(madvise(area + PAGE_BYTES, 5 * PAGE_BYTES, MADV_DONTNEED));
	CHECK_ZERO("dropped while missing", area + PAGE_BYTES, 5 * PAGE_BYTES);
	check_at("beside it", area, 0, PAGE_BYTES);
	check_at("beside it", area + 6 * PAGE_BYTES, 6 * PAGE_BYTES, HALF - 6 * PAGE_BYTES);
	MUST(madvise(area, AREA_BYTES, MADV_DONTNEED));
	CHECK_ZERO("all dropped", area, AREA_BYTES);
}

static void through_munmap(void)
{
	MUST(munmap(area + PAGE_BYTES, HALF - PAGE_BYTES));
	/* Another mapping where missing memory was. */
	char *fresh = MUST(mmap(area + PAGE_BYTES, HALF - PAGE_BYTES, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
	CHECK_ZERO("fresh mapping", fresh, HALF - PAGE_BYTES);
	MUST(mmap(area + HALF, PAGE_BYTES, PROT_READ | PROT_WRITE,
		  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	CHECK_ZERO("mapping over missing memory", area + HALF, PAGE_BYTES);
	check_at("before", area, 0, PAGE_BYTES);
	check_at("behind", area + HALF + PAGE_BYTES, HALF + PAGE_BYTES, HALF - PAGE_BYTES);
}

static void through_calls(void)
{
	int ends[2];
	char copy[PAGE_BYTES];

	MUST(pipe(ends));
	/* write(2) from, and read(2) into, pages that are missing: the second in the middle of one. */
	GUEST_CHECK(write(ends[1], area + HALF, PAGE_BYTES) == (ssize_t)PAGE_BYTES, "write: %s", strerror(errno));
	GUEST_CHECK(read(ends[0], copy, PAGE_BYTES) == (ssize_t)PAGE_BYTES, "read: %s", strerror(errno));
	CHECK_PATTERN("written from missing memory", copy, PAGE_BYTES, seed_of(HALF));
	GUEST_CHECK(write(ends[1], copy, 64) == 64, "write: %s", strerror(errno));
	GUEST_CHECK(read(ends[0], area + 64, 64) == 64, "read into missing memory: %s", strerror(errno));
	GUEST_CHECK(!memcmp(area + 64, copy, 64), "read into missing memory: wrong content");
	for (size_t word = 16; word < PAGE_BYTES / 8; word++)
		GUEST_CHECK(((uint64_t *)area)[word] == pattern_word(seed_of(0), word),
			    "the page around it: wrong content at word %zu", word);
	/* The kernel's own look from another process. */
	pid_t child = MUST(fork());
	if (!child) {
		char seen[PAGE_BYTES];
		struct iovec here = { seen, PAGE_BYTES }, there = { area + HALF + PAGE_BYTES, PAGE_BYTES };
		ssize_t n = process_vm_readv(getppid(), &here, 1, &there, 1, 0);

		if (n == (ssize_t)PAGE_BYTES)
			CHECK_PATTERN("seen by another process", seen, PAGE_BYTES, seed_of(HALF + PAGE_BYTES));
		else
			GUEST_CHECK(n == -1 && errno == EPERM, "process_vm_readv: %zd, %s", n, strerror(errno));
		_exit(0);
	}
	guest_join(child);
	check_at("the rest", area + PAGE_BYTES, PAGE_BYTES, AREA_BYTES - PAGE_BYTES);
}

static void execute_true(void)
{
	execl("/bin/true", "true", (char *)NULL);
	_exit(9);
}

static void through_exec(void)
{
	/* A child that executes another program at once, one after a look, and one that shares the memory until then. */
	pid_t child = MUST(fork());

	if (!child)
		execute_true();
	guest_join(child);
	child = MUST(fork());
	if (!child) {
		check_at("looked at before execve", area, 0, 8 * PAGE_BYTES);
		execute_true();
	}
	guest_join(child);
	child = vfork();
	if (!child)
		execute_true();
	GUEST_CHECK(child > 0, "vfork: %s", strerror(errno));
	guest_join(child);
	check_area("after the children");
}

static void *reader(void *start)
{
	size_t first = (size_t)start;

	for (size_t n = 0; n < AREA_BYTES / PAGE_BYTES; n++) {
		size_t at = (first + n * PAGE_BYTES) % AREA_BYTES;

		CHECK_PATTERN("raced for", area + at, PAGE_BYTES, seed_of(at));
	}
	return NULL;
}

static void through_threads(void)
{
	pthread_t threads[8];

	/* All at the same pages at the same time, and four behind each other. */
	for (size_t i = 0; i < 8; i++)
		MUST0(pthread_create(threads + i, NULL, reader, (void *)(i < 4 ? 0 : i * 3 * PAGE_BYTES)));
	for (size_t i = 0; i < 8; i++)
		MUST0(pthread_join(threads[i], NULL));
}

static void through_protection(void)
{
	MUST(mprotect(area, HALF, PROT_NONE));
	MUST(mprotect(area + HALF, HALF, PROT_READ));
	check_at("read-only", area + HALF, HALF, HALF);
	MUST(mprotect(area, HALF, PROT_READ));
	check_at("made accessible again", area, 0, HALF);
}

static void through_bare(void)
{
	unsigned char resident[AREA_BYTES / PAGE_BYTES];

	/* Pages that were never there are not there now, and zero. */
	MUST(mincore(bare, AREA_BYTES, resident));
	for (size_t i = 1; i < sizeof(resident); i++)
		GUEST_CHECK(i == sizeof(resident) / 2 || !(resident[i] & 1), "page %zu of the bare area exists", i);
	CHECK_ZERO("bare area", bare + PAGE_BYTES, AREA_BYTES / 2 - PAGE_BYTES);
	CHECK_PATTERN("its one page", bare + AREA_BYTES / 2, PAGE_BYTES, guest_seed);
	CHECK_ZERO("bare area", bare + AREA_BYTES / 2 + PAGE_BYTES, AREA_BYTES / 2 - PAGE_BYTES);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} ways[] = {
		{ "fork", through_fork },	{ "wipe", through_wipe },	{ "mremap", through_mremap },
		{ "dontneed", through_dontneed }, { "munmap", through_munmap },	{ "calls", through_calls },
		{ "exec", through_exec },	{ "threads", through_threads },	{ "protection", through_protection },
		{ "bare", through_bare },	{ "exit", NULL },
	};

	pattern_begin(argc, argv);
	area = map(AREA_BYTES);
	madvise(area, AREA_BYTES, MADV_NOHUGEPAGE);
	for (size_t at = 0; at < AREA_BYTES; at += PAGE_BYTES)
		pattern_fill(area + at, PAGE_BYTES, seed_of(at));
	bare = map(AREA_BYTES);
	madvise(bare, AREA_BYTES, MADV_NOHUGEPAGE);
	pattern_fill(bare + AREA_BYTES / 2, PAGE_BYTES, guest_seed);
	guest_ready();
	guest_wait_go();
	for (size_t i = 0; i < sizeof(ways) / sizeof(*ways); i++) {
		if (argc < 3 || strcmp(argv[2], ways[i].name))
			continue;
		if (ways[i].run)
			ways[i].run();
		/* "exit": ends while everything is missing. */
		guest_ok();
	}
	check_area("the area");
	guest_ok();
}
