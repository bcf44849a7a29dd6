// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * The vdso: where it was, and its functions work, called at the addresses that
 * libc resolved before the dump. A call through the vdso makes no syscall, so
 * its time is compared with the syscall's.
 */

#include "mem_pattern.h"

#include <sched.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/time.h>

struct areas {
	unsigned long vdso, vdso_end, vvar, vvar_end;
};

static struct areas find(void)
{
	struct areas areas = { 0 };
	unsigned long start, end;
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "re");

	GUEST_CHECK(maps, "open /proc/self/maps: %s", strerror(errno));
	while (fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) != 2)
			continue;
		if (strstr(line, "[vdso]")) {
			areas.vdso = start;
			areas.vdso_end = end;
		} else if (strstr(line, "[vvar]")) {
			areas.vvar = start;
			areas.vvar_end = end;
		}
	}
	fclose(maps);
	GUEST_CHECK(areas.vdso && areas.vvar, "no vdso or vvar in /proc/self/maps");
	return areas;
}

static int64_t ns(struct timespec t)
{
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void check_clocks(const char *when)
{
	static const clockid_t CLOCKS[] = { CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME,
					    CLOCK_MONOTONIC_COARSE };
	struct timespec before, vdso, after;
	struct timeval tv;
	unsigned int cpu, node;

	for (size_t i = 0; i < sizeof(CLOCKS) / sizeof(CLOCKS[0]); i++) {
		GUEST_CHECK(syscall(SYS_clock_gettime, CLOCKS[i], &before) == 0 &&
			    clock_gettime(CLOCKS[i], &vdso) == 0 &&
			    syscall(SYS_clock_gettime, CLOCKS[i], &after) == 0,
			    "%s: clock_gettime(%d): %s", when, CLOCKS[i], strerror(errno));
		GUEST_CHECK(ns(before) <= ns(vdso) && ns(vdso) <= ns(after),
			    "%s: clock %d by the vdso: expected between %ld and %ld, got %ld", when,
			    CLOCKS[i], (long)ns(before), (long)ns(after), (long)ns(vdso));
	}
	GUEST_CHECK(gettimeofday(&tv, NULL) == 0, "%s: gettimeofday: %s", when, strerror(errno));
	syscall(SYS_clock_gettime, CLOCK_REALTIME, &after);
	GUEST_CHECK(after.tv_sec - tv.tv_sec <= 60 && after.tv_sec >= tv.tv_sec,
		    "%s: gettimeofday is wrong by %ld s", when, (long)(after.tv_sec - tv.tv_sec));
	GUEST_CHECK(getcpu(&cpu, &node) == 0, "%s: getcpu: %s", when, strerror(errno));
	GUEST_CHECK(cpu < (unsigned int)sysconf(_SC_NPROCESSORS_CONF), "%s: getcpu says CPU %u", when, cpu);
}

int main(int argc, char **argv)
{
	struct areas before, after;
	struct timespec mono_before, mono_after;

	pattern_begin(argc, argv);
	before = find();
	check_clocks("before");
	clock_gettime(CLOCK_MONOTONIC, &mono_before);

	guest_ready();
	guest_wait_go();

	clock_gettime(CLOCK_MONOTONIC, &mono_after);
	GUEST_CHECK(ns(mono_after) > ns(mono_before), "CLOCK_MONOTONIC went back by %ld ns",
		    (long)(ns(mono_before) - ns(mono_after)));
	after = find();
	GUEST_CHECK(getauxval(AT_SYSINFO_EHDR) == after.vdso, "AT_SYSINFO_EHDR: expected %#lx, got %#lx",
		    after.vdso, getauxval(AT_SYSINFO_EHDR));
	GUEST_CHECK(before.vdso == after.vdso && before.vdso_end == after.vdso_end,
		    "vdso: expected %#lx-%#lx, got %#lx-%#lx", before.vdso, before.vdso_end, after.vdso,
		    after.vdso_end);
	GUEST_CHECK(before.vvar == after.vvar && before.vvar_end == after.vvar_end,
		    "vvar: expected %#lx-%#lx, got %#lx-%#lx", before.vvar, before.vvar_end, after.vvar,
		    after.vvar_end);
	check_clocks("after");
	guest_ok();
}
