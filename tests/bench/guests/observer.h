/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What a guest of the bench shares with the bench: a file that both map. The layout is repeated in ckpt_bench/observer.py and
 * in heap.py. The file is outside the job, so it is never rolled back by a restore; its tick counter moves as soon as the
 * guest runs, whatever its clocks say. All times are nanoseconds of the guest's CLOCK_MONOTONIC.
 */
#ifndef OBSERVER_H
#define OBSERVER_H

#include <stdint.h>

#define OBSERVER_MAGIC 0x686e6562
#define OBSERVER_GAPS 128
#define OBSERVER_BINS 4096
#define TICK_NS 100000ull
#define BIN_NS 20000000ull

enum observer_command {
	RESET = 1,	/* forgets gaps, bins and work done */
	TOUCH = 2,	/* writes to every page */
	FORK = 3,	/* result: ns of all forks, of the longest, their number; touches afterwards */
	COPY = 4,	/* memcpy of all memory; result: ns */
	WRITE = 5,	/* writes all memory to path in pieces of argument[0] bytes; result: ns */
	FORK_WRITE = 6,	/* forks a child that writes all memory to path; result: ns of the fork */
	VERIFY = 7,	/* reads all memory; result: wrong pages, pages, ns */
	MODE = 8,	/* argument[0]: enum observer_mode; argument[1]: pages per million that are dirtied in a second */
	SAMPLE = 9,	/* result: ns since RESET, work done, ticks since RESET, longest gap, sum of gaps, gaps */
	EXIT = 10,
};

enum observer_mode { TICK = 0, WORK = 1, SCATTERED = 2, CLUSTERED = 3 };

struct observer {
	uint64_t magic, ready, request, handled, command, argument[3];
	/* ticks: 100 us slots in which the guest ran, ever. gaps: the number of pauses longer than a tick since RESET. */
	uint64_t ticks, longest_ns, gaps, gaps_ns, work, started_ns, child, memory_bytes;
	uint64_t result[32];
	char path[640];
	struct {
		uint64_t at_ns, length_ns;
	} gap[OBSERVER_GAPS];
	uint8_t reserved[4096 - 1024 - 16 * OBSERVER_GAPS];
	/* work done in each 20 ms since RESET */
	uint64_t bin[OBSERVER_BINS];
};

#endif
