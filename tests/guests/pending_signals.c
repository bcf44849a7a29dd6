// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Signals that wait for delivery, with all of their siginfo: queued real-time signals with values, to the process and to one
 * thread, from itself and from a child, in order; standard ones; a child's death.
 */
#include "guest.h"
#include <pthread.h>

enum { TO_PROCESS = 40, TO_THREAD = 50, FROM_CHILD = 45, TO_MAIN = 55 };

static pid_t child, dead_child, second_tid;
static pthread_barrier_t standing, queued;

/* Takes the next of `signal`, which must be there already. */
static siginfo_t take(int signal)
{
	struct timespec now = { 0, 0 };
	siginfo_t info = { 0 };
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, signal);
	/* Not glibc's sigtimedwait, which makes SI_USER of SI_TKILL. */
	int got = syscall(SYS_rt_sigtimedwait, &set, &info, &now, 8);
	if (got != signal)
		guest_fail("signal %d: expected pending, got %d (%s)", signal, got, strerror(errno));
	EXPECT_EQ("si_signo", signal, info.si_signo);
	return info;
}

static void expect_queued(int signal, int code, int value, pid_t sender)
{
	siginfo_t info = take(signal);
	char what[64];

	snprintf(what, sizeof(what), "si_value of signal %d", signal);
	EXPECT_EQ(what, value, info.si_value.sival_int);
	EXPECT_EQ("si_code", code, info.si_code);
	EXPECT_EQ("si_pid", sender, info.si_pid);
	EXPECT_EQ("si_uid", getuid(), info.si_uid);
}

static void expect_no_more(int signal)
{
	sigset_t pending;

	MUST(sigpending(&pending));
	if (sigismember(&pending, signal))
		guest_fail("signal %d: expected no more, but it is pending", signal);
}

static void expect_pending(int signal, bool expected)
{
	sigset_t pending;
	char what[64];

	MUST(sigpending(&pending));
	snprintf(what, sizeof(what), "signal %d pending in thread %ld", signal, syscall(SYS_gettid));
	EXPECT_EQ(what, expected, sigismember(&pending, signal));
}

/* To one thread, with a value and a code of its own. */
static void queue_to(pid_t tid, int signal, int value)
{
	siginfo_t info = { 0 };

	info.si_signo = signal;
	info.si_code = -77;
	info.si_pid = getpid();
	info.si_uid = getuid();
	info.si_value.sival_int = value;
	MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, signal, &info));
}

static void *second(void *nothing)
{
	second_tid = syscall(SYS_gettid);
	pthread_barrier_wait(&standing);
	pthread_barrier_wait(&queued);
	guest_wait_go();

	expect_pending(TO_THREAD, true);
	expect_pending(TO_MAIN, false);
	expect_pending(SIGUSR2, true);
	expect_pending(SIGURG, false);
	for (int i = 0; i < 4; i++)
		expect_queued(TO_THREAD, -77, 900 + i, getpid());
	expect_no_more(TO_THREAD);
	siginfo_t info = take(SIGUSR2);
	EXPECT_EQ("si_code of SIGUSR2", SI_TKILL, info.si_code);
	EXPECT_EQ("si_pid of SIGUSR2", getpid(), info.si_pid);
	return nothing;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	sigset_t all;
	siginfo_t info;
	int channel[2];
	char byte;

	guest_begin(argc, argv);
	sigfillset(&all);
	MUST(sigprocmask(SIG_SETMASK, &all, NULL));
	MUST0(pthread_barrier_init(&standing, NULL, 2));
	MUST0(pthread_barrier_init(&queued, NULL, 2));
	MUST0(pthread_create(&thread, NULL, second, NULL));
	pthread_barrier_wait(&standing);

	for (int i = 0; i < 5; i++)
		MUST(sigqueue(getpid(), TO_PROCESS, (union sigval){ .sival_int = 100 + i }));
	for (int i = 0; i < 4; i++)
		queue_to(second_tid, TO_THREAD, 900 + i);
	for (int i = 0; i < 2; i++)
		queue_to(getpid(), TO_MAIN, 700 + i);
	MUST(kill(getpid(), SIGUSR1));
	MUST(syscall(SYS_tgkill, getpid(), second_tid, SIGUSR2));
	MUST(syscall(SYS_tgkill, getpid(), getpid(), SIGURG));
	MUST(kill(getpid(), SIGTERM));
	MUST(pipe(channel));
	child = MUST(fork());
	if (!child) {
		for (int i = 0; i < 3; i++)
			MUST(sigqueue(getppid(), FROM_CHILD, (union sigval){ .sival_int = 300 + i }));
		MUST(write(channel[1], "x", 1));
		close(channel[0]);
		close(channel[1]);
		/* Its own queue: inherited from nobody. */
		sigset_t pending;
		MUST(sigpending(&pending));
		EXPECT(sigisemptyset(&pending));
		MUST(sigqueue(getpid(), TO_PROCESS, (union sigval){ .sival_int = 1 }));
		guest_wait_go();
		expect_queued(TO_PROCESS, SI_QUEUE, 1, getpid());
		expect_no_more(TO_PROCESS);
		_exit(0);
	}
	EXPECT_EQ("word of the child", 1, read(channel[0], &byte, 1));
	close(channel[0]);
	close(channel[1]);
	dead_child = MUST(fork());
	if (!dead_child)
		_exit(17);
	MUST(waitid(P_PID, dead_child, &info, WEXITED | WNOWAIT));
	pthread_barrier_wait(&queued);
	guest_ready();
	guest_wait_go();

	expect_pending(TO_THREAD, false);
	expect_pending(TO_MAIN, true);
	expect_pending(SIGUSR2, false);
	for (int i = 0; i < 5; i++)
		expect_queued(TO_PROCESS, SI_QUEUE, 100 + i, getpid());
	expect_no_more(TO_PROCESS);
	for (int i = 0; i < 3; i++)
		expect_queued(FROM_CHILD, SI_QUEUE, 300 + i, child);
	expect_no_more(FROM_CHILD);
	for (int i = 0; i < 2; i++)
		expect_queued(TO_MAIN, -77, 700 + i, getpid());
	expect_no_more(TO_MAIN);
	info = take(SIGUSR1);
	EXPECT_EQ("si_code of SIGUSR1", SI_USER, info.si_code);
	EXPECT_EQ("si_pid of SIGUSR1", getpid(), info.si_pid);
	info = take(SIGURG);
	EXPECT_EQ("si_code of SIGURG", SI_TKILL, info.si_code);
	info = take(SIGTERM);
	EXPECT_EQ("si_code of SIGTERM", SI_USER, info.si_code);
	info = take(SIGCHLD);
	EXPECT_EQ("si_code of SIGCHLD", CLD_EXITED, info.si_code);
	EXPECT_EQ("si_pid of SIGCHLD", dead_child, info.si_pid);
	EXPECT_EQ("si_status of SIGCHLD", 17, info.si_status);
	MUST0(pthread_join(thread, NULL));
	EXPECT_EQ("status of the dead child", 17 << 8, guest_reap(dead_child));
	EXPECT_EQ("the child's verdict", 0, guest_reap(child));
	guest_ok();
}
