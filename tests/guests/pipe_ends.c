// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Closed ends (end of file after the last byte; SIGPIPE and EPIPE), an end that only a child holds, a pipe opened
 * O_RDWR through /proc/self/fd, and a child blocked in read.
 */
#include "mem_pattern.h"

static _Atomic int *turn;
static volatile sig_atomic_t sigpipes;

static void on_sigpipe(int signal)
{
	(void)signal;
	sigpipes++;
}

int main(int argc, char **argv)
{
	int no_writer[2], no_reader[2], held_by_child[2], both[2], blocked_read[2], rdwr;
	char path[64], buffer[65536];
	struct sigaction action = { .sa_handler = on_sigpipe };
	pid_t reader;

	pattern_begin(argc, argv);
	turn = guest_shared(4096);
	MUST(sigaction(SIGPIPE, &action, NULL));
	MUST(pipe(no_writer));
	EXPECT_EQ("write", 32, write(no_writer[1], guest.nonce, 32));
	close(no_writer[1]);
	MUST(pipe(no_reader));
	close(no_reader[0]);
	MUST(pipe(held_by_child));
	MUST(pipe(both));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", both[0]);
	rdwr = MUST(open(path, O_RDWR));
	close(both[0]);
	close(both[1]);
	EXPECT_EQ("write", 16, write(rdwr, guest.nonce, 16));
	MUST(pipe(blocked_read));

	reader = MUST(fork());
	if (reader == 0) {
		close(blocked_read[1]);
		close(held_by_child[0]);
		++*turn;
		for (int i = 0; i < 3; i++) {
			EXPECT_EQ("blocked read", 4, read(blocked_read[0], buffer, 4));
			EXPECT_MEM("blocked read", "data", buffer, 4);
		}
		EXPECT_EQ("end of file", 0, read(blocked_read[0], buffer, 1));
		EXPECT_EQ("write", 5, write(held_by_child[1], "child", 5));
		_exit(0);
	}
	close(held_by_child[1]);
	while (*turn != 1)
		guest_nap();

	guest_ready();
	guest_wait_go();

	EXPECT_EQ("read", 32, read(no_writer[0], buffer, sizeof(buffer)));
	EXPECT_MEM("bytes left by a closed writer", guest.nonce, buffer, 32);
	EXPECT_EQ("end of file", 0, read(no_writer[0], buffer, sizeof(buffer)));
	EXPECT_EQ("write without reader", -1, write(no_reader[1], "x", 1));
	EXPECT_EQ("errno", EPIPE, errno);
	EXPECT_EQ("SIGPIPE", 1, sigpipes);
	EXPECT_EQ("access mode", O_RDWR, fcntl(rdwr, F_GETFL) & O_ACCMODE);
	EXPECT_EQ("write", 4, write(rdwr, "more", 4));
	EXPECT_EQ("read of the O_RDWR pipe", 20, read(rdwr, buffer, sizeof(buffer)));
	EXPECT_MEM("O_RDWR pipe", guest.nonce, buffer, 16);
	for (int i = 0; i < 3; i++)
		EXPECT_EQ("write", 4, write(blocked_read[1], "data", 4));
	close(blocked_read[1]);
	EXPECT_EQ("read", 5, read(held_by_child[0], buffer, sizeof(buffer)));
	guest_join(reader);
	EXPECT_EQ("end of file after the child", 0, read(held_by_child[0], buffer, sizeof(buffer)));
	guest_ok();
}
