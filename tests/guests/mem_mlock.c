// SPDX-License-Identifier: MIT OR Apache-2.0
/* Locked memory: mlock(2), MLOCK_ONFAULT and mlockall(MCL_FUTURE) go on. */
#include "mem_pattern.h"

#include <sys/mman.h>

static void smaps_line(const char *p, const char *key, char *out, size_t out_bytes)
{
	unsigned long start, end;
	char line[512];
	int found = 0;
	FILE *smaps = fopen("/proc/self/smaps", "re");

	GUEST_CHECK(smaps, "open /proc/self/smaps: %s", strerror(errno));
	while (fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			found = (unsigned long)p >= start && (unsigned long)p < end;
		if (found && strncmp(line, key, strlen(key)) == 0) {
			snprintf(out, out_bytes, "%s", line);
			out[strcspn(out, "\n")] = 0;
			fclose(smaps);
			return;
		}
	}
	guest_fail("%p has no %s in smaps", p, key);
}

int main(int argc, char **argv)
{
	char before[256], after[256], *locked, *onfault, *later;

	pattern_begin(argc, argv);
	locked = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	onfault = mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(locked != MAP_FAILED && onfault != MAP_FAILED, "mmap: %s", strerror(errno));
	GUEST_CHECK(mlock(locked, PAGE_BYTES) == 0, "mlock: %s", strerror(errno));
	GUEST_CHECK(mlock2(onfault, 4 * PAGE_BYTES, MLOCK_ONFAULT) == 0, "mlock2: %s", strerror(errno));
	pattern_fill(locked, PAGE_BYTES, guest_seed);
	pattern_fill(onfault, PAGE_BYTES, guest_seed + 1);
	smaps_line(locked, "VmFlags:", before, sizeof(before));
	GUEST_CHECK(strstr(before, " lo"), "mlock does not show in %s", before);

	guest_ready();
	guest_wait_go();

	smaps_line(locked, "VmFlags:", after, sizeof(after));
	GUEST_CHECK(strstr(after, " lo"), "mlocked page: expected lo in VmFlags, got %s", after);
	smaps_line(onfault, "VmFlags:", after, sizeof(after));
	GUEST_CHECK(strstr(after, " lo"), "MLOCK_ONFAULT area: expected lo in VmFlags, got %s", after);
	CHECK_PATTERN("mlocked page", locked, PAGE_BYTES, guest_seed);
	CHECK_PATTERN("MLOCK_ONFAULT page", onfault, PAGE_BYTES, guest_seed + 1);
	later = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(later != MAP_FAILED, "mmap: %s", strerror(errno));
	memset(later, 1, PAGE_BYTES);
	smaps_line(later, "VmFlags:", after, sizeof(after));
	GUEST_CHECK(!strstr(after, " lo"), "memory mapped after the restore is locked: %s", after);
	GUEST_CHECK(munlock(locked, PAGE_BYTES) == 0, "munlock: %s", strerror(errno));
	guest_ok();
}
