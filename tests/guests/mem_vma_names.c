// SPDX-License-Identifier: MIT OR Apache-2.0
/* Names of anonymous memory (PR_SET_VMA_ANON_NAME), as /proc/self/maps shows them. */
#include "mem_pattern.h"

#include <sys/mman.h>
#include <sys/prctl.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

static int in_maps(const char *p, const char *name)
{
	unsigned long start, end;
	char line[512];
	int found = 0;
	FILE *maps = fopen("/proc/self/maps", "re");

	GUEST_CHECK(maps, "open /proc/self/maps: %s", strerror(errno));
	while (fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2 && (unsigned long)p >= start &&
		    (unsigned long)p < end)
			found = strstr(line, name) != NULL;
	fclose(maps);
	return found;
}

int main(int argc, char **argv)
{
	char *private, *shared;
	int named;

	pattern_begin(argc, argv);
	private = mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	shared = mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(private != MAP_FAILED && shared != MAP_FAILED, "mmap: %s", strerror(errno));
	/* EINVAL: built without CONFIG_ANON_VMA_NAME; then the content is all there is. */
	named = prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, private, 4 * PAGE_BYTES, "ledger") == 0;
	GUEST_CHECK(named || errno == EINVAL, "PR_SET_VMA_ANON_NAME: %s", strerror(errno));
	if (named)
		prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, shared, 4 * PAGE_BYTES, "board");
	pattern_fill(private, 4 * PAGE_BYTES, guest_seed);
	pattern_fill(shared, 4 * PAGE_BYTES, guest_seed + 1);
	named = named && in_maps(private, "[anon:ledger]");

	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("named private memory", private, 4 * PAGE_BYTES, guest_seed);
	CHECK_PATTERN("named shared memory", shared, 4 * PAGE_BYTES, guest_seed + 1);
	GUEST_CHECK(!named || in_maps(private, "[anon:ledger]"), "the private area lost its name");
	GUEST_CHECK(!named || in_maps(shared, "[anon_shmem:board]"), "the shared area lost its name");
	guest_ok();
}
