// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Advice that is state: the VmFlags of each area in /proc/self/smaps are what
 * they were, and MADV_DONTFORK and MADV_WIPEONFORK act on the next fork.
 */
#include "mem_pattern.h"

#include <sys/mman.h>

#define AREA_BYTES ((size_t)4 << 20)

static const struct {
	const char *name;
	int advice;
	const char *flag;
} ADVICE[] = {
	{ "MADV_DONTFORK", MADV_DONTFORK, "dc" },
	{ "MADV_WIPEONFORK", MADV_WIPEONFORK, "wf" },
	{ "MADV_DONTDUMP", MADV_DONTDUMP, "dd" },
	{ "MADV_HUGEPAGE", MADV_HUGEPAGE, "hg" },
	{ "MADV_NOHUGEPAGE", MADV_NOHUGEPAGE, "nh" },
	{ "MADV_SEQUENTIAL", MADV_SEQUENTIAL, "sr" },
	{ "MADV_RANDOM", MADV_RANDOM, "rr" },
	{ "MADV_MERGEABLE", MADV_MERGEABLE, "mg" },
	{ "none", MADV_NORMAL, NULL },
};
#define AREAS (sizeof(ADVICE) / sizeof(ADVICE[0]))

/* The VmFlags of the area that holds p, less "sd": soft-dirty is not state. */
static void vm_flags(const char *p, char *out, size_t out_bytes)
{
	unsigned long start, end;
	char line[512], *flag, *rest;
	int found = 0;
	FILE *smaps = fopen("/proc/self/smaps", "re");

	GUEST_CHECK(smaps, "open /proc/self/smaps: %s", strerror(errno));
	out[0] = 0;
	while (fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			found = (unsigned long)p >= start && (unsigned long)p < end;
		if (!found || strncmp(line, "VmFlags:", 8) != 0)
			continue;
		for (flag = strtok_r(line + 8, " \n", &rest); flag; flag = strtok_r(NULL, " \n", &rest)) {
			if (strcmp(flag, "sd") == 0)
				continue;
			strncat(out, flag, out_bytes - strlen(out) - 1);
			strncat(out, " ", out_bytes - strlen(out) - 1);
		}
		break;
	}
	fclose(smaps);
	GUEST_CHECK(out[0], "%p has no VmFlags", p);
}

int main(int argc, char **argv)
{
	char before[AREAS][256], after[256];
	int supported[AREAS];
	char *area[AREAS];
	pid_t child;

	pattern_begin(argc, argv);
	for (size_t i = 0; i < AREAS; i++) {
		/* A hole between areas, so that they never merge. */
		area[i] = mmap(NULL, AREA_BYTES + PAGE_BYTES, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		GUEST_CHECK(area[i] != MAP_FAILED, "mmap: %s", strerror(errno));
		munmap(area[i] + AREA_BYTES, PAGE_BYTES);
		/* EINVAL: the kernel was built without KSM or transparent huge pages. */
		supported[i] = madvise(area[i], AREA_BYTES, ADVICE[i].advice) == 0;
		GUEST_CHECK(supported[i] || errno == EINVAL, "%s: %s", ADVICE[i].name, strerror(errno));
		pattern_fill(area[i], AREA_BYTES, guest_seed + i);
		vm_flags(area[i], before[i], sizeof(before[i]));
		GUEST_CHECK(!supported[i] || !ADVICE[i].flag || strstr(before[i], ADVICE[i].flag),
			    "%s does not show in VmFlags: %s", ADVICE[i].name, before[i]);
	}

	guest_ready();
	guest_wait_go();

	for (size_t i = 0; i < AREAS; i++) {
		vm_flags(area[i], after, sizeof(after));
		GUEST_CHECK(strcmp(before[i], after) == 0, "VmFlags of the %s area: expected %s, got %s",
			    ADVICE[i].name, before[i], after);
		CHECK_PATTERN(ADVICE[i].name, area[i], AREA_BYTES, guest_seed + i);
	}
	child = fork();
	if (child == 0) {
		unsigned char vec;

		GUEST_CHECK(mincore(area[0], PAGE_BYTES, &vec) < 0 && errno == ENOMEM,
			    "MADV_DONTFORK memory is in a child forked after the restore");
		CHECK_ZERO("MADV_WIPEONFORK memory in a child", area[1], AREA_BYTES);
		_exit(0);
	}
	guest_join(child);
	guest_ok();
}
