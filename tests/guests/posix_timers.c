// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * POSIX timers as the kernel holds them: their ids (with gaps), clocks, ways of notification, remaining time and interval;
 * one that fires to a chosen thread, and one whose signal is blocked and that overruns. None of a thread's processor time: in
 * a process of several threads ckpt refuses it.
 */
#include "guest.h"
#include <pthread.h>

/* A timer and its clock are read one after the other, and a dump may fall in between. */
static const int64_t tolerance_ns = 1000000000;

struct timer {
	clockid_t clock;
	int notify;
	int64_t value_ns, interval_ns;
	int id; /* from the kernel */
	int64_t end_ns;
};

static struct timer timers[] = {
	{ .clock = CLOCK_REALTIME, .notify = SIGEV_SIGNAL, .value_ns = 2000000000000, .interval_ns = 7000000000 },
	{ .clock = CLOCK_MONOTONIC, .notify = SIGEV_SIGNAL, .value_ns = 3000000000000, .interval_ns = 1234567891 },
	{ .clock = CLOCK_MONOTONIC, .notify = SIGEV_NONE, .value_ns = 4000000000000 },
	{ .clock = CLOCK_BOOTTIME, .notify = SIGEV_THREAD_ID, .value_ns = 5000000000000, .interval_ns = 1 },
	{ .clock = CLOCK_PROCESS_CPUTIME_ID, .notify = SIGEV_SIGNAL, .value_ns = 6000000000000, .interval_ns = 100000000 },
	{ .clock = CLOCK_MONOTONIC, .notify = SIGEV_SIGNAL }, /* not armed */
};
enum { TIMERS = sizeof(timers) / sizeof(*timers), FIRES = 40, OVERRUNS = 41, REST = 42 };

static pthread_t receiver;
static pthread_barrier_t standing;
static volatile sig_atomic_t received, received_wrong;
static pid_t receiver_tid;

static void on_fire(int signal, siginfo_t *info, void *context)
{
	(void)context;
	(void)signal;
	if (info->si_code != SI_TIMER || info->si_value.sival_int != 4242 || syscall(SYS_gettid) != receiver_tid)
		received_wrong = 1;
	received++;
}

static struct timespec spec(int64_t ns)
{
	return (struct timespec){ ns / 1000000000, ns % 1000000000 };
}

static int create(clockid_t clock, int notify, int signal, int value, pid_t tid)
{
	struct sigevent event = { .sigev_notify = notify, .sigev_signo = signal, .sigev_value.sival_int = value };
	int id;

	event._sigev_un._tid = tid;
	MUST(syscall(SYS_timer_create, clock, &event, &id));
	return id;
}

static void arm(int id, int64_t value_ns, int64_t interval_ns)
{
	struct itimerspec set = { .it_value = spec(value_ns), .it_interval = spec(interval_ns) };

	MUST(syscall(SYS_timer_settime, id, 0, &set, NULL));
}

/* When it will fire by its own clock, in ns; 0 if it is not armed. */
static int64_t end_of(const struct timer *timer, int64_t *interval_ns)
{
	struct itimerspec now;

	MUST(syscall(SYS_timer_gettime, timer->id, &now));
	*interval_ns = (int64_t)now.it_interval.tv_sec * 1000000000 + now.it_interval.tv_nsec;
	int64_t rest = (int64_t)now.it_value.tv_sec * 1000000000 + now.it_value.tv_nsec;
	/* Restored relatively: after a restore the real time is later, but the remaining time is what counts. */
	bool runs_with_uptime = timer->clock == CLOCK_MONOTONIC || timer->clock == CLOCK_BOOTTIME;
	return rest && runs_with_uptime ? rest + guest_clock_ns(timer->clock) : rest;
}

static void *receive(void *nothing)
{
	sigset_t set;

	receiver_tid = syscall(SYS_gettid);
	sigemptyset(&set);
	sigaddset(&set, FIRES);
	MUST0(pthread_sigmask(SIG_UNBLOCK, &set, NULL));
	pthread_barrier_wait(&standing);
	guest_wait_go();
	for (int before = received; received < before + 3;)
		guest_nap();
	EXPECT_EQ("a signal with another thread, code or value", 0, received_wrong);
	return nothing;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_fire, .sa_flags = SA_SIGINFO | SA_RESTART };
	sigset_t all;
	int64_t interval_ns;

	guest_begin(argc, argv);
	sigfillset(&all);
	MUST(sigprocmask(SIG_SETMASK, &all, NULL));
	MUST(sigaction(FIRES, &action, NULL));
	MUST0(pthread_barrier_init(&standing, NULL, 2));
	MUST0(pthread_create(&receiver, NULL, receive, NULL));
	pthread_barrier_wait(&standing);
	for (int i = 0; i < TIMERS; i++) {
		/* Gaps of growing width between the ids. */
		int gap[TIMERS];
		for (int j = 0; j < i; j++)
			gap[j] = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
		timers[i].id = create(timers[i].clock, timers[i].notify, REST, i, receiver_tid);
		for (int j = 0; j < i; j++)
			MUST(syscall(SYS_timer_delete, gap[j]));
		if (timers[i].value_ns)
			arm(timers[i].id, timers[i].value_ns, timers[i].interval_ns);
		timers[i].end_ns = end_of(&timers[i], &interval_ns);
	}
	int fires = create(CLOCK_MONOTONIC, SIGEV_THREAD_ID, FIRES, 4242, receiver_tid);
	arm(fires, 20000000, 20000000);
	while (received < 2)
		guest_nap();
	int overruns = create(CLOCK_MONOTONIC, SIGEV_SIGNAL, OVERRUNS, 777, 0);
	int64_t armed_ns = guest_clock_ns(CLOCK_MONOTONIC);
	const int64_t period_ns = 5000000;
	arm(overruns, period_ns, period_ns);
	for (sigset_t pending = { 0 }; !sigismember(&pending, OVERRUNS);) {
		guest_nap();
		MUST(sigpending(&pending));
	}
	guest_ready();
	guest_wait_go();

	for (int i = 0; i < TIMERS; i++) {
		char what[64];
		int64_t end = end_of(&timers[i], &interval_ns);
		bool cpu = timers[i].clock == CLOCK_PROCESS_CPUTIME_ID;
		/* Processor time, and the real time of a whole test, may have gone by. */
		bool by_uptime = timers[i].clock == CLOCK_MONOTONIC || timers[i].clock == CLOCK_BOOTTIME;
		int64_t early = by_uptime ? tolerance_ns : (cpu ? 20 : 300) * tolerance_ns;

		snprintf(what, sizeof(what), "interval of timer %d", i);
		EXPECT_EQ(what, timers[i].interval_ns, interval_ns);
		if (!timers[i].value_ns)
			EXPECT_EQ("rest of a timer that was not armed", 0, end);
		else if (end > timers[i].end_ns + tolerance_ns || end < timers[i].end_ns - early)
			guest_fail("end of timer %d: expected %lld, got %lld ns", i, (long long)timers[i].end_ns,
				   (long long)end);
	}
	/* The pending one knows its timer; what it overran is no more than the time allows. */
	struct timespec none = { 0, 0 };
	siginfo_t info;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, OVERRUNS);
	EXPECT_EQ("signal of the overrun timer", OVERRUNS, sigtimedwait(&set, &info, &none));
	int64_t most = (guest_clock_ns(CLOCK_MONOTONIC) - armed_ns) / period_ns + 1;
	EXPECT_EQ("si_code", SI_TIMER, info.si_code);
	EXPECT_EQ("si_timerid", overruns, info.si_timerid);
	EXPECT_EQ("si_value", 777, info.si_value.sival_int);
	int overrun = MUST(syscall(SYS_timer_getoverrun, overruns));
	if (overrun < 0 || overrun > most)
		guest_fail("overrun: expected 0 to %lld, got %d", (long long)most, overrun);
	struct timespec patience = { 20, 0 };
	EXPECT_EQ("its next signal", OVERRUNS, sigtimedwait(&set, &info, &patience));
	MUST0(pthread_join(receiver, NULL));
	/* A new timer is none of the old ones, and the old ones can be deleted. */
	int fresh = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
	for (int i = 0; i < TIMERS; i++) {
		EXPECT(fresh != timers[i].id);
		MUST(syscall(SYS_timer_delete, timers[i].id));
	}
	MUST(syscall(SYS_timer_delete, fires));
	guest_ok();
}
