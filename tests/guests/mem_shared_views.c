// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * One shared object mapped several times: at different offsets, with different
 * protections, in two processes, and privately over the shared pages.
 */
#include "mem_pattern.h"

#include <sys/mman.h>

#define PAGES 32

static char *view(int fd, size_t first, size_t pages, int prot, int flags)
{
	char *p = mmap(NULL, pages * PAGE_BYTES, prot, flags, fd, first * PAGE_BYTES);

	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return p;
}

static int writable(const char *p)
{
	char path[64], line[512];
	unsigned long start, end;
	char perms[8];
	FILE *maps;

	snprintf(path, sizeof(path), "/proc/self/maps");
	maps = fopen(path, "re");
	GUEST_CHECK(maps, "open %s: %s", path, strerror(errno));
	while (fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx %7s", &start, &end, perms) == 3 &&
		    (unsigned long)p >= start && (unsigned long)p < end) {
			fclose(maps);
			return perms[1] == 'w';
		}
	}
	guest_fail("%p is not mapped", p);
	return 0;
}

static void check(char *whole, char *half, char *readonly, char *private)
{
	half[5] = 'h';
	GUEST_CHECK(whole[16 * PAGE_BYTES + 5] == 'h', "write through the second view is not in the first");
	GUEST_CHECK(readonly[16 * PAGE_BYTES + 5] == 'h', "write through the second view is not in the read-only one");
	whole[20 * PAGE_BYTES] = 'w';
	GUEST_CHECK(half[4 * PAGE_BYTES] == 'w', "write through the first view is not in the second");
	GUEST_CHECK(!writable(readonly), "the read-only view became writable");
	GUEST_CHECK(writable(half), "the writable view became read-only");
	CHECK_PATTERN("private copy over the shared object", private, PAGE_BYTES, guest_seed ^ 7);
}

int main(int argc, char **argv)
{
	char *whole, *half, *readonly, *private, *anon, *anon_tail;
	pid_t child;
	int fd;

	pattern_begin(argc, argv);
	fd = memfd_create("views", MFD_CLOEXEC);
	GUEST_CHECK(fd >= 0 && ftruncate(fd, PAGES * PAGE_BYTES) == 0, "memfd: %s", strerror(errno));
	whole = view(fd, 0, PAGES, PROT_READ | PROT_WRITE, MAP_SHARED);
	half = view(fd, 16, 16, PROT_READ | PROT_WRITE, MAP_SHARED);
	readonly = view(fd, 0, PAGES, PROT_READ, MAP_SHARED);
	private = view(fd, 8, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	close(fd);
	pattern_fill(whole, PAGES * PAGE_BYTES, guest_seed);
	pattern_fill(private, PAGE_BYTES, guest_seed ^ 7);

	/* The same for anonymous memory: a duplicate made by mremap with old size 0. */
	anon = mmap(NULL, 8 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(anon != MAP_FAILED, "mmap: %s", strerror(errno));
	anon_tail = mremap(anon + 4 * PAGE_BYTES, 0, 4 * PAGE_BYTES, MREMAP_MAYMOVE);
	GUEST_CHECK(anon_tail != MAP_FAILED, "mremap: %s", strerror(errno));
	pattern_fill(anon, 8 * PAGE_BYTES, guest_seed + 9);

	child = fork();
	if (child == 0) {
		guest_wait_go();
		while (whole[31 * PAGE_BYTES + 1] != 'g') {
			struct timespec tick = { 0, 2000000 };

			nanosleep(&tick, NULL);
			__asm__ volatile("" ::: "memory");
		}
		check(whole, half, readonly, private);
		_exit(0);
	}
	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("first view", whole, PAGES * PAGE_BYTES, guest_seed);
	CHECK_PATTERN("read-only view", readonly, PAGES * PAGE_BYTES, guest_seed);
	for (size_t w = 0; w < 16 * PAGE_BYTES / 8; w++)
		GUEST_CHECK(((uint64_t *)half)[w] == pattern_word(guest_seed, 16 * PAGE_BYTES / 8 + w),
			    "second view: wrong content in word %zu", w);
	CHECK_PATTERN("shared anonymous area", anon, 8 * PAGE_BYTES, guest_seed + 9);
	anon_tail[0] ^= 1;
	GUEST_CHECK(anon[4 * PAGE_BYTES] == anon_tail[0], "the second view of the anonymous area is a copy");
	check(whole, half, readonly, private);
	whole[31 * PAGE_BYTES + 1] = 'g';
	guest_join(child);
	guest_ok();
}
