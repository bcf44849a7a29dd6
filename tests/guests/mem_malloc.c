// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A program that lives from malloc: four threads with lists of blocks of many
 * sizes, summed up before the dump, summed up and freed after it.
 */
#include "mem_pattern.h"

#include <pthread.h>

#define THREADS 4
#define BLOCKS 4000

struct block {
	struct block *next;
	size_t words;
	uint64_t sum;
	uint64_t word[];
};

static pthread_barrier_t set_up;

static struct block *make(uint64_t seed, struct block *next)
{
	size_t words = pattern_word(seed, 0) % ((pattern_word(seed, 1) & 63) ? 200 : 40000);
	struct block *block = malloc(sizeof(*block) + words * 8);

	GUEST_CHECK(block, "malloc: %s", strerror(errno));
	block->next = next;
	block->words = words;
	block->sum = 0;
	for (size_t i = 0; i < words; i++) {
		block->word[i] = pattern_word(seed, i);
		block->sum += block->word[i];
	}
	return block;
}

static size_t check_and_free(struct block *list)
{
	size_t blocks = 0;

	while (list) {
		struct block *next = list->next;
		uint64_t sum = 0;

		for (size_t i = 0; i < list->words; i++)
			sum += list->word[i];
		GUEST_CHECK(sum == list->sum, "block of %zu words: expected sum %#lx, got %#lx",
			    list->words, list->sum, sum);
		free(list);
		list = next;
		blocks++;
	}
	return blocks;
}

static void *thread(void *arg)
{
	uint64_t seed = guest_seed + (uint64_t)(uintptr_t)arg * 1000003;
	struct block *list = NULL, **at;
	size_t got, left = 0;

	for (size_t i = 0; i < BLOCKS; i++)
		list = make(seed + i, list);
	/* Free every third one, so that the free lists are state as well. */
	for (at = &list; *at; left++) {
		if (left % 3 == 0) {
			struct block *drop = *at;

			*at = drop->next;
			free(drop);
		} else {
			at = &(*at)->next;
		}
	}
	pthread_barrier_wait(&set_up);
	guest_wait_go();
	for (size_t i = 0; i < BLOCKS / 4; i++)
		list = make(seed ^ i, list);
	got = check_and_free(list);
	left = BLOCKS - (BLOCKS + 2) / 3 + BLOCKS / 4;
	GUEST_CHECK(got == left, "blocks: expected %zu, got %zu", left, got);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t id[THREADS];

	pattern_begin(argc, argv);
	pthread_barrier_init(&set_up, NULL, THREADS + 1);
	for (uintptr_t i = 0; i < THREADS; i++)
		GUEST_CHECK(pthread_create(&id[i], NULL, thread, (void *)i) == 0, "pthread_create");
	pthread_barrier_wait(&set_up);
	guest_ready();
	guest_wait_go();
	for (int i = 0; i < THREADS; i++)
		pthread_join(id[i], NULL);
	guest_ok();
}
