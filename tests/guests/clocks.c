// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * CLOCK_MONOTONIC and CLOCK_BOOTTIME never go back and never run ahead of real time, whatever happens between two looks.
 * How much of the real time they missed is written to the file `missed` (ns) for the test to judge.
 */
#include "guest.h"

/* Between reading two clocks the process may be stopped, and CLOCK_REALTIME is slewed. */
static const int64_t tolerance_ns = 200 * 1000 * 1000;

struct look {
	int64_t real_before, monotonic, boottime, real_after;
};

static struct look look(void)
{
	struct look now;

	now.real_before = guest_clock_ns(CLOCK_REALTIME);
	now.monotonic = guest_clock_ns(CLOCK_MONOTONIC);
	now.boottime = guest_clock_ns(CLOCK_BOOTTIME);
	now.real_after = guest_clock_ns(CLOCK_REALTIME);
	return now;
}

static void compare(const struct look *old, const struct look *now)
{
	int64_t real = now->real_after - old->real_before;
	int64_t monotonic = now->monotonic - old->monotonic, boottime = now->boottime - old->boottime;

	if (monotonic < 0 || boottime < 0)
		guest_fail("a clock went back: monotonic by %lld ns, boottime by %lld ns", -(long long)monotonic,
			   -(long long)boottime);
	if (monotonic > real + tolerance_ns || boottime > real + tolerance_ns)
		guest_fail("a clock ran ahead: real %lld, monotonic %lld, boottime %lld ns", (long long)real,
			   (long long)monotonic, (long long)boottime);
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];

	guest_begin(argc, argv);
	struct look first = look(), old = first, now;
	guest_ready();
	do {
		guest_nap();
		now = look();
		compare(&old, &now);
		old = now;
	} while (!guest_exists("go"));
	now = look();
	compare(&first, &now);
	FILE *missed = fopen(guest_path(path, sizeof(path), "missed"), "we");
	EXPECT(missed);
	int64_t real = now.real_after - first.real_before;
	fprintf(missed, "%lld %lld\n", (long long)(real - (now.monotonic - first.monotonic)),
		(long long)(real - (now.boottime - first.boottime)));
	EXPECT_EQ("fclose", 0, fclose(missed));
	guest_ok();
}
