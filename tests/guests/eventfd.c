// SPDX-License-Identifier: MIT OR Apache-2.0
/* eventfd: counter, semaphore, zero, near its maximum, shared by fork, with a reader that is blocked. */
#include "mem_pattern.h"

#include <sys/eventfd.h>

int main(int argc, char **argv)
{
	int counter, semaphore, zero, full, shared, answer;
	_Atomic int *turn;
	uint64_t value;
	pid_t child;

	pattern_begin(argc, argv);
	turn = guest_shared(4096);
	counter = MUST(eventfd(7, EFD_CLOEXEC));
	value = guest_seed >> 8;
	MUST(write(counter, &value, 8));
	semaphore = MUST(eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK));
	zero = MUST(eventfd(0, EFD_NONBLOCK));
	full = MUST(eventfd(0, EFD_NONBLOCK));
	value = UINT64_MAX - 1;
	MUST(write(full, &value, 8));
	shared = MUST(eventfd(0, 0));
	answer = MUST(eventfd(0, 0));
	child = MUST(fork());
	if (child == 0) {
		uint64_t got;

		*turn = 1;
		EXPECT_EQ("blocked read", 8, read(shared, &got, 8));
		got++;
		MUST(write(answer, &got, 8));
		_exit(0);
	}
	while (*turn != 1)
		guest_nap();

	guest_ready();
	guest_wait_go();

	EXPECT_EQ("read", 8, read(counter, &value, 8));
	EXPECT_EQ("counter", (guest_seed >> 8) + 7, value);
	EXPECT_EQ("FD_CLOEXEC", FD_CLOEXEC, fcntl(counter, F_GETFD));
	EXPECT_EQ("O_NONBLOCK", 0, fcntl(counter, F_GETFL) & O_NONBLOCK);
	for (int i = 0; i < 3; i++) {
		EXPECT_EQ("read of the semaphore", 8, read(semaphore, &value, 8));
		EXPECT_EQ("semaphore", 1, value);
	}
	EXPECT_EQ("drained semaphore", -1, read(semaphore, &value, 8));
	EXPECT_EQ("errno", EAGAIN, errno);
	EXPECT_EQ("zero counter", -1, read(zero, &value, 8));
	EXPECT_EQ("errno", EAGAIN, errno);
	value = 1;
	EXPECT_EQ("write to the full counter", -1, write(full, &value, 8));
	EXPECT_EQ("errno", EAGAIN, errno);
	EXPECT_EQ("read", 8, read(full, &value, 8));
	EXPECT_EQ("full counter", UINT64_MAX - 1, value);
	value = 41;
	MUST(write(shared, &value, 8));
	EXPECT_EQ("read", 8, read(answer, &value, 8));
	EXPECT_EQ("answer of the child", 42, value);
	guest_join(child);
	guest_ok();
}
