// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Processes that count without waiting for each other. Each has its count in private memory, in shared memory and in a pipe to the
 * next one, and keeps in private memory what it has seen of the others: a checkpoint whose processes are not all of one moment, with
 * the shared memory and the pipes, is found at once.
 */
#include "mem_pattern.h"

#define PROCESSES 3
#define PAGES 1024
#define PAGE_WORDS (PAGE_BYTES / 8)

/* In private memory of each. */
struct mine {
	uint64_t seen[PROCESSES]; /* the counts of the others */
	uint64_t sent, received; /* numbers that went through the pipes, from 1 on */
};

static struct {
	volatile uint64_t count __attribute__((aligned(64)));
} *shared;
static int pipes[PROCESSES][2]; /* each from one to the next */
static volatile uint64_t *pages; /* the count n is in page n % PAGES */
static volatile struct mine *mine;

static void *map_private(size_t bytes)
{
	return MUST(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

static void check(int me, uint64_t n)
{
	EXPECT_EQ("own count in shared memory", n, shared[me].count);
	EXPECT_EQ("the newest private page", n, pages[n % PAGES * PAGE_WORDS]);
	EXPECT_EQ("the oldest private page", n + 1 - PAGES, pages[(n + 1) % PAGES * PAGE_WORDS]);
	for (int i = 0; i < PROCESSES; i++) {
		uint64_t count = shared[i].count;

		GUEST_CHECK(count >= mine->seen[i], "process %d has seen %d at %lu, which is at %lu", me, i,
			    mine->seen[i], count);
		mine->seen[i] = count;
	}
}

/* Sends the next number, if there is room, and takes those that have come. */
static void exchange(int me)
{
	uint64_t numbers[64] = { mine->sent + 1 };
	ssize_t got = write(pipes[me][1], numbers, sizeof(*numbers));

	if (got > 0)
		mine->sent++;
	else
		EXPECT(got < 0 && errno == EAGAIN);
	got = read(pipes[(me + PROCESSES - 1) % PROCESSES][0], numbers, sizeof(numbers));
	EXPECT(got > 0 || errno == EAGAIN);
	for (ssize_t i = 0; i < got / 8; i++) {
		EXPECT_EQ("the next number in the pipe", mine->received + 1, numbers[i]);
		mine->received++;
	}
}

int main(int argc, char **argv)
{
	pid_t children[PROCESSES];
	int me;

	pattern_begin(argc, argv);
	shared = guest_shared(PAGE_BYTES);
	for (int i = 0; i < PROCESSES; i++) {
		MUST(pipe2(pipes[i], O_NONBLOCK));
		shared[i].count = PAGES;
	}
	for (me = 1; me < PROCESSES; me++) {
		children[me] = MUST(fork());
		if (children[me] == 0)
			break;
	}
	me %= PROCESSES;
	pages = map_private(PAGES * PAGE_BYTES);
	mine = map_private(PAGE_BYTES);
	for (uint64_t n = 1; n <= PAGES; n++)
		pages[n % PAGES * PAGE_WORDS] = n;
	for (uint64_t n = PAGES;; n++) {
		/* Calls come before the check: most stops are within them. */
		if (n % 16 == 0)
			exchange(me);
		if (n % 1024 == 1 && guest_exists("go"))
			break;
		check(me, n);
		/* The leader is ready when all have begun to count. */
		if (me == 0 && n == PAGES) {
			for (int i = 1; i < PROCESSES; i++)
				while (shared[i].count == PAGES)
					guest_nap();
			guest_ready();
		}
		pages[(n + 1) % PAGES * PAGE_WORDS] = n + 1;
		/* Not set to n + 1, which would hide that it was something else than n. */
		shared[me].count++;
	}
	if (me != 0)
		_exit(0);
	for (int i = 1; i < PROCESSES; i++)
		guest_join(children[i]);
	guest_ok();
}
