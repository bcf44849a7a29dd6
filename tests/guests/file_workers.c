// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Several processes with several threads each that work all the time, hand results to the leader through pipes and check
 * what they have in memory: for dumps and restores that are killed at any moment. Runs until go. With the argument
 * "undumpable" the workers make themselves so, and must still be so at the end.
 */
#include "mem_pattern.h"

#include <poll.h>
#include <pthread.h>

#define WORKERS 3
#define THREADS 3

static _Atomic uint64_t *rounds;
static int results[2];
static uint64_t area[THREADS][PAGE_BYTES / 8 * 4];

struct result {
	uint32_t worker;
	uint32_t thread;
	uint64_t round;
	uint64_t sum;
};

static uint32_t worker;

static void *thread_main(void *arg)
{
	uint32_t thread = (uint32_t)(uintptr_t)arg;
	uint64_t seed = guest_seed + worker * 100 + thread;

	for (uint64_t round = 0; !guest_exists("go"); round++) {
		struct result result = { worker, thread, round, 0 };

		pattern_fill(area[thread], sizeof(area[thread]), seed + round);
		guest_nap();
		CHECK_PATTERN("a worker's memory", area[thread], sizeof(area[thread]), seed + round);
		for (size_t i = 0; i < sizeof(area[thread]) / 8; i++)
			result.sum += area[thread][i];
		EXPECT_EQ("write", (ssize_t)sizeof(result), write(results[1], &result, sizeof(result)));
		rounds[worker * THREADS + thread] = round + 1;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	uint64_t seen[WORKERS][THREADS] = { 0 };
	pid_t child[WORKERS];
	struct result result;
	bool is_ready = false, is_undumpable = argc > 2 && !strcmp(argv[2], "undumpable");

	pattern_begin(argc, argv);
	rounds = guest_shared(PAGE_BYTES);
	MUST(pipe(results));
	for (worker = 0; worker < WORKERS; worker++) {
		child[worker] = MUST(fork());
		if (child[worker] == 0) {
			pthread_t id[THREADS];

			close(results[0]);
			if (is_undumpable)
				MUST(prctl(PR_SET_DUMPABLE, 0));
			for (uintptr_t i = 0; i < THREADS; i++)
				MUST0(pthread_create(&id[i], NULL, thread_main, (void *)i));
			for (int i = 0; i < THREADS; i++)
				MUST0(pthread_join(id[i], NULL));
			EXPECT_EQ("dumpable", !is_undumpable, MUST(prctl(PR_GET_DUMPABLE)));
			_exit(0);
		}
	}
	close(results[1]);
	for (;;) {
		ssize_t n = read(results[0], &result, sizeof(result));
		uint64_t sum = 0;

		if (n == 0)
			break;
		EXPECT_EQ("read of a result", (ssize_t)sizeof(result), n);
		GUEST_CHECK(result.worker < WORKERS && result.thread < THREADS, "a result of worker %u, thread %u",
			    result.worker, result.thread);
		EXPECT_EQ("round: none lost, none twice", seen[result.worker][result.thread], result.round);
		seen[result.worker][result.thread]++;
		for (size_t i = 0; i < PAGE_BYTES / 8 * 4; i++)
			sum += pattern_word(guest_seed + result.worker * 100 + result.thread + result.round, i);
		EXPECT_EQ("sum", sum, result.sum);
		/* Every thread has gone round: from here on nothing is created any more. */
		if (!is_ready && result.round > 0) {
			is_ready = true;
			for (int i = 0; i < WORKERS * THREADS; i++)
				is_ready &= seen[i / THREADS][i % THREADS] > 1;
			if (is_ready)
				guest_ready();
		}
	}
	for (int i = 0; i < WORKERS; i++) {
		guest_join(child[i]);
		for (int j = 0; j < THREADS; j++)
			EXPECT_EQ("rounds", seen[i][j], rounds[i * THREADS + j]);
	}
	guest_ok();
}
