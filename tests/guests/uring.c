// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * An io_uring on which five requests have completed, and one waits for a pipe. With "closes" that one completes when a file "event"
 * appears, and the ring is closed then.
 */
#include "guest.h"

#include <linux/io_uring.h>
#include <poll.h>

static struct io_uring_params params;
static struct io_uring_sqe *requests;
static char *rings;
static int ring, ends[2];

static unsigned *word(unsigned offset)
{
	return (unsigned *)(rings + offset);
}

static void submit(struct io_uring_sqe request)
{
	unsigned tail = *word(params.sq_off.tail), index = tail & *word(params.sq_off.ring_mask);

	requests[index] = request;
	word(params.sq_off.array)[index] = index;
	__atomic_store_n(word(params.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
	EXPECT_EQ("io_uring_enter", 1, MUST(syscall(SYS_io_uring_enter, ring, 1, 0, 0, NULL, 0)));
}

static void complete(void)
{
	MUST(write(ends[1], "x", 1));
	MUST(syscall(SYS_io_uring_enter, ring, 0, 6, IORING_ENTER_GETEVENTS, NULL, 0));
	EXPECT_EQ("completions now", 6, *word(params.cq_off.tail));
}

int main(int argc, char **argv)
{
	guest_begin(argc, argv);
	ring = (int)syscall(SYS_io_uring_setup, 8, &params);
	if (ring < 0)
		guest_skip("io_uring_setup: %s", strerror(errno));
	rings = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING));
	requests = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES));
	MUST(pipe(ends));
	for (int i = 0; i < 5; i++)
		submit((struct io_uring_sqe){ .opcode = IORING_OP_NOP, .user_data = i });
	submit((struct io_uring_sqe){ .opcode = IORING_OP_POLL_ADD, .fd = ends[0], .poll_events = POLLIN, .user_data = 5 });
	EXPECT_EQ("completions", 5, *word(params.cq_off.tail));
	guest_ready();
	if (argc > 2 && !strcmp(argv[2], "closes")) {
		while (!guest_exists("event"))
			guest_nap();
		complete();
		MUST(munmap(rings, 4096));
		MUST(munmap(requests, 4096));
		MUST(close(ring));
		guest_wait_go();
	} else {
		guest_wait_go();
		complete();
	}
	guest_ok();
}
