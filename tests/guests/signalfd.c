// SPDX-License-Identifier: MIT OR Apache-2.0
/* Signals read from descriptors: each has its set and its flags, and what is pending is read after go. */
#include "guest.h"
#include <sys/signalfd.h>

static int fds[2];

static void expect_signal(int fd, int signal, int value)
{
	struct signalfd_siginfo info;

	EXPECT_EQ("read", sizeof(info), MUST(read(fd, &info, sizeof(info))));
	EXPECT_EQ("signal", signal, info.ssi_signo);
	EXPECT_EQ("value", value, info.ssi_int);
	EXPECT_EQ("sender", getpid(), info.ssi_pid);
}

static void expect_nothing(int fd)
{
	struct signalfd_siginfo info;

	errno = 0;
	EXPECT_EQ("read of nothing", -1, read(fd, &info, sizeof(info)));
	EXPECT_EQ("errno", EAGAIN, errno);
}

int main(int argc, char **argv)
{
	sigset_t set[2], both;

	guest_begin(argc, argv);
	sigemptyset(&both);
	for (int i = 0; i < 2; i++) {
		sigemptyset(&set[i]);
		sigaddset(&set[i], 40 + i);
		sigaddset(&both, 40 + i);
	}
	MUST(sigprocmask(SIG_BLOCK, &both, NULL));
	fds[0] = MUST(signalfd(-1, &set[0], SFD_NONBLOCK));
	fds[1] = MUST(signalfd(-1, &set[1], SFD_NONBLOCK | SFD_CLOEXEC));
	for (int i = 0; i < 3; i++)
		MUST(sigqueue(getpid(), 40, (union sigval){ .sival_int = 10 + i }));
	guest_ready();
	guest_wait_go();

	EXPECT_EQ("FD_CLOEXEC of the first", 0, MUST(fcntl(fds[0], F_GETFD)));
	EXPECT_EQ("FD_CLOEXEC of the second", FD_CLOEXEC, MUST(fcntl(fds[1], F_GETFD)));
	expect_nothing(fds[1]);
	for (int i = 0; i < 3; i++)
		expect_signal(fds[0], 40, 10 + i);
	expect_nothing(fds[0]);
	MUST(sigqueue(getpid(), 41, (union sigval){ .sival_int = 99 }));
	expect_nothing(fds[0]);
	expect_signal(fds[1], 41, 99);
	guest_ok();
}
