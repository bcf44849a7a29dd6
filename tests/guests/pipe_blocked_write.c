// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A child blocked in a write larger than its pipe: an interruption that the application cannot see must not make it
 * return short. A third process holds the pipe too.
 */
#include "mem_pattern.h"

#include <sys/ioctl.h>

#define BYTES 200000

int main(int argc, char **argv)
{
	static char block[BYTES], buffer[65536];
	int fds[2], left, *shared = guest_shared(4096);
	pid_t writer, holder;
	size_t total = 0;

	pattern_begin(argc, argv);
	pattern_fill(block, BYTES, guest_seed);
	MUST(pipe(fds));
	writer = MUST(fork());
	if (writer == 0) {
		close(fds[0]);
		*shared = (int)write(fds[1], block, BYTES);
		_exit(*shared != BYTES);
	}
	holder = MUST(fork());
	if (holder == 0) {
		guest_wait_go();
		_exit(0);
	}
	close(fds[1]);
	/* The pipe is full: the writer waits in write(2) or is about to. */
	do {
		guest_nap();
		MUST(ioctl(fds[0], FIONREAD, &left));
	} while (left < 65536);

	guest_ready();
	guest_wait_go();

	for (ssize_t n; (n = MUST(read(fds[0], buffer, sizeof(buffer)))) > 0; total += n)
		EXPECT_MEM("blocked write", block + total, buffer, n);
	EXPECT_EQ("value of the blocked write", BYTES, *shared);
	EXPECT_EQ("bytes of the blocked write", BYTES, total);
	guest_join(writer);
	guest_join(holder);
	guest_ok();
}
