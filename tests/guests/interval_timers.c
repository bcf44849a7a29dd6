// SPDX-License-Identifier: MIT OR Apache-2.0
/* The three interval timers: long ones keep what remains and their interval, a short one goes on firing. */
#include "guest.h"
#include <sys/time.h>

/* A timer and its clock are read one after the other, and a dump may fall in between. */
static const int64_t tolerance_ns = 1000000000;

static volatile sig_atomic_t fired;

static void on_alarm(int signal)
{
	(void)signal;
	fired++;
}

static int64_t ns_of(struct timeval value)
{
	return (int64_t)value.tv_sec * 1000000000 + (int64_t)value.tv_usec * 1000;
}

int main(int argc, char **argv)
{
	static const int timers[] = { ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF };
	struct sigaction action = { .sa_handler = on_alarm };
	struct itimerval now;
	int channel[2];
	char byte;

	guest_begin(argc, argv);
	MUST(pipe(channel));
	pid_t child = MUST(fork());
	if (!child) {
		struct itimerval often = { { 0, 20000 }, { 0, 20000 } };

		action.sa_flags = SA_RESTART;
		MUST(sigaction(SIGALRM, &action, NULL));
		MUST(setitimer(ITIMER_REAL, &often, NULL));
		while (fired < 2)
			guest_nap();
		MUST(write(channel[1], "x", 1));
		close(channel[0]);
		close(channel[1]);
		guest_wait_go();
		/* It goes on: three more, and the interval is what it was. */
		for (int before = fired; fired < before + 3;)
			guest_nap();
		MUST(getitimer(ITIMER_REAL, &now));
		EXPECT_EQ("short interval", 20000000, ns_of(now.it_interval));
		EXPECT(ns_of(now.it_value) <= 20000000);
		_exit(0);
	}
	close(channel[1]);
	EXPECT_EQ("word of the child", 1, read(channel[0], &byte, 1));
	close(channel[0]);
	int64_t ends[3];
	for (int i = 0; i < 3; i++) {
		struct itimerval set = { { 5000 + i, 250000 }, { 1000 * (i + 1), 0 } };

		MUST(setitimer(timers[i], &set, NULL));
		MUST(getitimer(timers[i], &now));
		ends[i] = ns_of(now.it_value) + (i ? 0 : guest_clock_ns(CLOCK_MONOTONIC));
	}
	guest_ready();
	guest_wait_go();

	for (int i = 0; i < 3; i++) {
		char what[64];

		MUST(getitimer(timers[i], &now));
		snprintf(what, sizeof(what), "interval of timer %d", timers[i]);
		EXPECT_EQ(what, 5000250000000 + i * 1000000000ll, ns_of(now.it_interval));
		/* The real one ends when it would have by CLOCK_MONOTONIC; the others run with the processor time. */
		int64_t end = ns_of(now.it_value) + (i ? 0 : guest_clock_ns(CLOCK_MONOTONIC));
		int64_t slack = i ? 20 * tolerance_ns : tolerance_ns;
		if (end > ends[i] + tolerance_ns || end < ends[i] - slack)
			guest_fail("end of timer %d: expected %lld, got %lld ns", timers[i], (long long)ends[i],
				   (long long)end);
	}
	EXPECT_EQ("the child's verdict", 0, guest_reap(child));
	guest_ok();
}
