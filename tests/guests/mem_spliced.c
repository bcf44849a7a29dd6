// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Pages that are in a pipe as well, by vmsplice(2): somebody beside the process has a reference to them, as with I/O in
 * flight, and a snapshot that shares pages must copy these.
 */
#include "mem_pattern.h"

#include <sys/uio.h>

#define PAGES 8
#define FIRST 2
#define SPLICED 3

int main(int argc, char **argv)
{
	static char got[SPLICED * PAGE_BYTES];
	int pipe_fd[2];

	pattern_begin(argc, argv);
	char *memory = MUST(mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	struct iovec spliced = { memory + FIRST * PAGE_BYTES, sizeof(got) };

	/* Without huge pages in this kernel it is just memory. */
	madvise(memory, PAGES * PAGE_BYTES, MADV_NOHUGEPAGE);
	pattern_fill(memory, PAGES * PAGE_BYTES, guest_seed);
	MUST(pipe(pipe_fd));
	EXPECT_EQ("vmsplice", (ssize_t)sizeof(got), vmsplice(pipe_fd[1], &spliced, 1, 0));
	guest_ready();
	guest_wait_go();
	CHECK_PATTERN("memory", memory, PAGES * PAGE_BYTES, guest_seed);
	EXPECT_EQ("read", (ssize_t)sizeof(got), read(pipe_fd[0], got, sizeof(got)));
	EXPECT_MEM("what was in the pipe", spliced.iov_base, got, sizeof(got));
	guest_ok();
}
