// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Threads that all the time read parts of the file that the second argument names into their memory, which the kernel does without
 * a look at the protection of the pages: they were pinned when the call began. Each word of page n of the file is n times MULTIPLIER.
 * Meanwhile other memory is written to, part by part. Runs until go.
 */
#include "mem_pattern.h"

#include <pthread.h>
#include <sys/mman.h>

#define MULTIPLIER 0x9e3779b97f4a7c15ull
#define THREADS 4
#define READ_PAGES ((size_t)16)
#define FILE_PAGES ((size_t)4096)
#define OTHER_PARTS 32
#define PART_BYTES ((size_t)64 * PAGE_BYTES)

static int file;

static char *memory(size_t pages)
{
	char *p = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	MUST(madvise(p, pages * PAGE_BYTES, MADV_NOHUGEPAGE));
	return p;
}

static void *thread_main(void *arg)
{
	size_t bytes = READ_PAGES * PAGE_BYTES, first = (uintptr_t)arg * READ_PAGES;
	uint64_t *words = (uint64_t *)memory(READ_PAGES);

	while (!guest_exists("go")) {
		/* Never what is there already. */
		first = (first + THREADS * READ_PAGES) % FILE_PAGES;
		memset(words, 0xff, bytes);
		GUEST_CHECK(pread(file, words, bytes, (off_t)(first * PAGE_BYTES)) == (ssize_t)bytes, "pread: %s",
			    strerror(errno));
		for (size_t i = 0; i < bytes / 8; i++) {
			uint64_t expected = (first + i * 8 / PAGE_BYTES) * MULTIPLIER;

			GUEST_CHECK(words[i] == expected, "word %zu of what was read at page %zu is %#llx", i, first,
				    (unsigned long long)words[i]);
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	uint64_t round = 0;
	char *other, *part;

	pattern_begin(argc, argv);
	GUEST_CHECK(argc > 2, "which file?");
	other = memory(OTHER_PARTS * PART_BYTES / PAGE_BYTES);
	for (size_t i = 0; i < OTHER_PARTS; i++)
		pattern_fill(other + i * PART_BYTES, PART_BYTES, guest_seed + i);
	file = open(argv[2], O_RDONLY | O_CLOEXEC);
	GUEST_CHECK(file >= 0, "open %s: %s", argv[2], strerror(errno));
	for (size_t i = 0; i < THREADS; i++)
		MUST0(pthread_create(&threads[i], NULL, thread_main, (void *)(uintptr_t)i));
	guest_ready();
	do {
		part = other + round % OTHER_PARTS * PART_BYTES;
		CHECK_PATTERN("other memory", part, PART_BYTES, guest_seed + round);
		pattern_fill(part, PART_BYTES, guest_seed + round + OTHER_PARTS);
		guest_nap();
		round++;
	} while (!guest_exists("go"));
	for (size_t i = 0; i < THREADS; i++)
		MUST0(pthread_join(threads[i], NULL));
	guest_ok();
}
