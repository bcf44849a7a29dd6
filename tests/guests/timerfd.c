// SPDX-License-Identifier: MIT OR Apache-2.0
/* Timers as descriptors: clock, remaining time, interval, flags; expirations that nobody has read; one that is not armed. */
#include "guest.h"
#include <poll.h>
#include <sys/timerfd.h>

/* A timer and its clock are read one after the other, and a dump may fall in between. */
static const int64_t tolerance_ns = 1000000000;

static int64_t ns_of(struct timespec value)
{
	return (int64_t)value.tv_sec * 1000000000 + value.tv_nsec;
}

/* Reads what may have to be waited for. */
static uint64_t await_expirations(int fd)
{
	struct pollfd entry = { fd, POLLIN, 0 };
	struct itimerspec now;
	uint64_t expirations;

	if (MUST(poll(&entry, 1, 20000)) != 1) {
		MUST(timerfd_gettime(fd, &now));
		guest_fail("a timer of 10 ms does not fire: %lld ns remain, its interval is %lld ns",
			   (long long)ns_of(now.it_value), (long long)ns_of(now.it_interval));
	}
	EXPECT_EQ("read", 8, MUST(read(fd, &expirations, 8)));
	return expirations;
}

/* When it fires, by its own clock. */
static int64_t end_of(int fd, clockid_t clock, int64_t *interval_ns)
{
	struct itimerspec now;

	MUST(timerfd_gettime(fd, &now));
	*interval_ns = ns_of(now.it_interval);
	return ns_of(now.it_value) + guest_clock_ns(clock);
}

int main(int argc, char **argv)
{
	static const clockid_t clocks[] = { CLOCK_MONOTONIC, CLOCK_BOOTTIME };
	struct itimerspec set = { { 77, 5 }, { 1000, 0 } }, now;
	int64_t ends[2], interval_ns;
	uint64_t expirations;
	int fds[2];

	guest_begin(argc, argv);
	for (int i = 0; i < 2; i++) {
		fds[i] = MUST(timerfd_create(clocks[i], i ? TFD_CLOEXEC : TFD_NONBLOCK));
		set.it_value.tv_sec += 1000;
		MUST(timerfd_settime(fds[i], 0, &set, NULL));
		ends[i] = end_of(fds[i], clocks[i], &interval_ns);
	}
	/* Fires at once and never again; its one expiration stays unread. */
	int once = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
	set = (struct itimerspec){ { 0, 0 }, { 0, 1 } };
	MUST(timerfd_settime(once, 0, &set, NULL));
	do {
		guest_nap();
		MUST(timerfd_gettime(once, &now));
	} while (ns_of(now.it_value));
	int idle = MUST(timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK));
	int often = MUST(timerfd_create(CLOCK_MONOTONIC, 0));
	set = (struct itimerspec){ { 0, 10000000 }, { 0, 10000000 } };
	MUST(timerfd_settime(often, 0, &set, NULL));
	int64_t armed_ns = guest_clock_ns(CLOCK_MONOTONIC);
	guest_ready();
	guest_wait_go();

	for (int i = 0; i < 2; i++) {
		int64_t end = end_of(fds[i], clocks[i], &interval_ns);

		EXPECT_EQ("interval", 77000000005, interval_ns);
		if (end > ends[i] + tolerance_ns || end < ends[i] - tolerance_ns)
			guest_fail("end of timer %d: expected %lld, got %lld ns", i, (long long)ends[i], (long long)end);
		EXPECT_EQ("FD_CLOEXEC", i ? FD_CLOEXEC : 0, MUST(fcntl(fds[i], F_GETFD)));
	}
	EXPECT_EQ("O_NONBLOCK", O_NONBLOCK, MUST(fcntl(fds[0], F_GETFL)) & O_NONBLOCK);
	EXPECT_EQ("read of the unread", 8, MUST(read(once, &expirations, 8)));
	EXPECT_EQ("expirations", 1, expirations);
	errno = 0;
	EXPECT_EQ("read again", -1, read(once, &expirations, 8));
	EXPECT_EQ("errno", EAGAIN, errno);
	EXPECT_EQ("read of an idle timer", -1, read(idle, &expirations, 8));
	expirations = await_expirations(often);
	int64_t most = (guest_clock_ns(CLOCK_MONOTONIC) - armed_ns) / 10000000 + 1;
	if (expirations < 1 || (int64_t)expirations > most)
		guest_fail("expirations: expected 1 to %lld, got %llu", (long long)most, (unsigned long long)expirations);
	for (int i = 0; i < 3; i++)
		EXPECT(await_expirations(often) >= 1);
	guest_ok();
}
