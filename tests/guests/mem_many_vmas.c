// SPDX-License-Identifier: MIT OR Apache-2.0
/* Two thousand areas of one page with alternating protections. */
#include "mem_pattern.h"

#include <sys/mman.h>

#define AREAS 2000

static const int PROTECTION[] = { PROT_READ | PROT_WRITE, PROT_READ, PROT_NONE, PROT_READ | PROT_EXEC };

static void check_protections(char *base)
{
	static const char *const PERMS[] = { "rw-p", "r--p", "---p", "r-xp" };
	unsigned long start, end;
	char line[512], perms[8];
	size_t seen = 0;
	FILE *maps = fopen("/proc/self/maps", "re");

	GUEST_CHECK(maps, "open /proc/self/maps: %s", strerror(errno));
	while (fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx %7s", &start, &end, perms) != 3)
			continue;
		for (; start < end; start += PAGE_BYTES) {
			size_t i = (start - (unsigned long)base) / PAGE_BYTES;

			if (start < (unsigned long)base || i >= AREAS)
				continue;
			GUEST_CHECK(strcmp(perms, PERMS[i % 4]) == 0, "area %zu: expected %s, got %s", i,
				    PERMS[i % 4], perms);
			seen++;
		}
	}
	fclose(maps);
	GUEST_CHECK(seen == AREAS, "expected %d areas, got %zu", AREAS, seen);
}

int main(int argc, char **argv)
{
	char *base;

	pattern_begin(argc, argv);
	base = mmap(NULL, AREAS * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(base != MAP_FAILED, "mmap: %s", strerror(errno));
	pattern_fill(base, AREAS * PAGE_BYTES, guest_seed);
	for (size_t i = 0; i < AREAS; i++)
		GUEST_CHECK(mprotect(base + i * PAGE_BYTES, PAGE_BYTES, PROTECTION[i % 4]) == 0,
			    "mprotect of area %zu: %s", i, strerror(errno));
	check_protections(base);

	guest_ready();
	guest_wait_go();

	check_protections(base);
	mprotect(base, AREAS * PAGE_BYTES, PROT_READ);
	CHECK_PATTERN("all areas", base, AREAS * PAGE_BYTES, guest_seed);
	guest_ok();
}
