// SPDX-License-Identifier: MIT OR Apache-2.0
// Many at once: threads that write, snapshots without end, and callers without sense.
#include "harness.h"

#include <pthread.h>
#include <semaphore.h>
#include <sys/socket.h>

// Four threads write words that lie next to each other, in pages that all of them use, while snapshots are taken.

#define WRITERS 4

struct writers {
	volatile uint64_t *memory;
	size_t npages;
	_Atomic bool stop;
	_Atomic uint64_t rounds[WRITERS];
	// The round of each that the reader waits for, zero if it does not.
	_Atomic uint64_t wanted[WRITERS];
	sem_t reached;
	_Atomic uint64_t lost;
};

struct writer {
	struct writers *all;
	unsigned number;
};

// The word of a writer in a page; next to those of the others, in the middle of the page.
static size_t word_of(size_t page, unsigned writer)
{
	return page * (PAGE / 8) + 256 + writer;
}

static void *write_for_ever(void *argument)
{
	struct writer *writer = argument;
	struct writers *all = writer->all;

	for (uint64_t round = 1; !all->stop; round++) {
		for (size_t page = 0; page < all->npages; page++) {
			volatile uint64_t *word = &all->memory[word_of(page, writer->number)];

			// What it wrote last must be there still: a write that went to a page which the process
			// does not have any more is lost.
			if (*word != round - 1)
				all->lost++;
			*word = round;
		}
		all->rounds[writer->number] = round;
		if (all->wanted[writer->number] && round >= all->wanted[writer->number]) {
			all->wanted[writer->number] = 0;
			sem_post(&all->reached);
		}
	}
	return NULL;
}

static void check_writers(bool huge, unsigned snapshots)
{
	size_t bytes = huge ? 2 * HUGE : 96 * PAGE;
	struct writers all = { .memory = huge ? map_huge(bytes) : map_small(bytes), .npages = bytes / PAGE };
	struct writer writers[WRITERS];
	pthread_t threads[WRITERS];
	int session = open_session();
	uint64_t *first = malloc(bytes), *again = malloc(bytes), changed = 0, torn = 0;

	memset((void *)all.memory, 0, bytes);
	CHECK(sem_init(&all.reached, 0, 0) == 0);
	for (unsigned i = 0; i < WRITERS; i++) {
		writers[i] = (struct writer){ &all, i };
		CHECK(pthread_create(&threads[i], NULL, write_for_ever, &writers[i]) == 0);
	}
	// The reader goes first whenever it can: the writers use all processors.
	CHECK(sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){ .sched_priority = 1 }) == 0);
	for (unsigned i = 0; i < snapshots; i++) {
		struct ckpt_snapshot_args args = take(session, 0, 0);

		CHECK_EQ(pread(args.fd, first, bytes, (off_t)all.memory), bytes);
		// Read again when every thread has been over all pages once more.
		for (unsigned w = 0; w < WRITERS; w++)
			all.wanted[w] = all.rounds[w] + 2;
		for (unsigned w = 0; w < WRITERS; w++)
			CHECK(sem_wait(&all.reached) == 0);
		CHECK_EQ(pread(args.fd, again, bytes, (off_t)all.memory), bytes);
		close(args.fd);
		for (size_t page = 0; page < all.npages; page++)
			for (unsigned w = 0; w < WRITERS; w++) {
				size_t word = word_of(page, w);

				changed += first[word] != again[word];
				// One moment: a thread goes over the pages in order, so that its words fall by
				// one at most once, and nowhere rise.
				if (page > 0)
					torn += first[word] > first[word_of(page - 1, w)];
				torn += first[word_of(0, w)] - first[word] > 1;
			}
	}
	all.stop = true;
	for (unsigned i = 0; i < WRITERS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	if (changed || all.lost || torn)
		FAIL("%u snapshots: %llu words changed in a snapshot, %llu writes were lost, %llu words of another moment",
		     snapshots, (unsigned long long)changed, (unsigned long long)all.lost, (unsigned long long)torn);
	free(first);
	free(again);
}

TEST_WITHIN(writers_of_small_pages, 240)
{
	check_writers(false, 25);
}

TEST_WITHIN(writers_of_huge_pages, 240)
{
	check_writers(true, 5);
}

// Threads that change the address space while it is snapshot.
static void *change_for_ever(void *argument)
{
	_Atomic bool *stop = argument;

	while (!*stop) {
		char *memory = map_small(64 * PAGE);

		memset(memory, 1, 64 * PAGE);
		CHECK(mprotect(memory, 16 * PAGE, PROT_READ) == 0);
		CHECK(madvise(memory + 16 * PAGE, 16 * PAGE, MADV_DONTNEED) == 0);
		memory = mremap(memory, 64 * PAGE, 128 * PAGE, MREMAP_MAYMOVE);
		// The protection has split it: then nothing was moved.
		if (memory != MAP_FAILED)
			munmap(memory, 128 * PAGE);
	}
	return NULL;
}

TEST_WITHIN(changing_address_space, 240)
{
	_Atomic bool stop = false;
	pthread_t threads[3];
	char *memory = map_small(64 * PAGE);
	int session = open_session();

	fill(memory, 64 * PAGE, 1);
	for (int i = 0; i < 3; i++)
		CHECK(pthread_create(&threads[i], NULL, change_for_ever, &stop) == 0);
	for (int i = 0; i < 40; i++) {
		struct ckpt_snapshot_args args = take(session, i % 2 ? CKPT_SNAPSHOT_CLEAR : 0, 0);

		check_snapshot_filled(args.fd, memory, 64 * PAGE, 1);
		close(args.fd);
	}
	stop = true;
	for (int i = 0; i < 3; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

// A thousand snapshots, and what is left of them.

static long free_pages(void)
{
	char text[4096], *at;

	// Pages that wait in lists of processors, and caches that can be dropped, are free as well.
	try_write_file("/proc/sys/vm/percpu_pagelist_high_fraction", "100000");
	write_file("/proc/sys/vm/drop_caches", "3");
	read_file("/proc/meminfo", text, sizeof(text));
	at = strstr(text, "MemFree:");
	CHECK(at);
	return atol(at + 8) / 4;
}

static void use_and_close(int session, char *memory, size_t bytes, int round)
{
	struct ckpt_snapshot_args args = take(session, round % 3 ? CKPT_SNAPSHOT_CLEAR : 0, 0), second;
	int pipes[2];
	off_t offset = (off_t)memory;

	CHECK(pipe(pipes) == 0);
	memory[(size_t)round % (bytes / PAGE) * PAGE]++;
	CHECK_EQ(splice(args.fd, &offset, pipes[1], NULL, 4 * PAGE, 0), 4 * PAGE);
	if (round % 2)
		close(args.fd);
	second = take(session, 0, 0);
	close(second.fd);
	if (round % 2 == 0)
		close(args.fd);
	close(pipes[0]);
	close(pipes[1]);
}

TEST_WITHIN(a_thousand_snapshots_leave_nothing, 400)
{
	size_t bytes = HUGE;
	char *small = map_small(bytes), *huge = map_huge(bytes);
	int session = open_session();
	long before, after;

	fill(small, bytes, 1);
	fill(huge, bytes, 1);
	for (int i = 0; i < 60; i++)
		use_and_close(session, i % 10 ? small : huge, bytes, i);
	before = free_pages();
	for (int i = 0; i < 500; i++)
		use_and_close(session, i % 10 ? small : huge, bytes, i);
	CHECK_EQ(query_device(session).held_pages, 0);
	CHECK_EQ(query_device(session).snapshots, 0);
	after = free_pages();
	printf("1000 snapshots: %ld pages fewer are free\n", before - after);
	// Of a page each there would be a thousand; the lists of processors hold some.
	if (before - after > 700)
		FAIL("%ld pages are gone", before - after);
	// The pages of the process have no reference of ours: unmapped, they are nobody's.
	size_t npages = bytes / PAGE, kept = 0;
	uint64_t *frames = malloc(2 * npages * sizeof(*frames)), flags;
	int kpageflags = open("/proc/kpageflags", O_RDONLY);

	CHECK(frames && kpageflags >= 0);
	for (size_t i = 0; i < npages; i++) {
		frames[i] = pagemap(small + i * PAGE) & ((1UL << 55) - 1);
		frames[npages + i] = pagemap(huge + i * PAGE) & ((1UL << 55) - 1);
	}
	CHECK(munmap(small, bytes) == 0);
	CHECK(munmap(huge, bytes) == 0);
	free_pages();
	for (size_t i = 0; i < 2 * npages; i++) {
		CHECK(frames[i] != 0);
		CHECK(pread(kpageflags, &flags, 8, (off_t)frames[i] * 8) == 8);
		kept += flags >> 12 & 1; // KPF_ANON
	}
	// A few are in use again.
	if (kept > 16)
		FAIL("%zu of %zu pages have not been freed", kept, 2 * npages);
	free(frames);
}

// Random callers.

struct fuzz {
	struct rng rng;
	// Descriptors of whatever kind, some of them shared with the other callers.
	int fds[24];
	char *memory;
	uint64_t generation;
	uint64_t calls;
};

static uint64_t any_number(struct rng *rng)
{
	static const uint64_t special[] = { 0, 1, 2, 3, 4, 7, 8, 15, 31, 4095, 4096, 4097, 1UL << 31, 1UL << 32,
					    1UL << 47, (1UL << 47) - PAGE, -1UL, -PAGE, 1UL << 63, 1UL << 52 };

	return rng_below(rng, 4) ? special[rng_below(rng, sizeof(special) / 8)] : rng_next(rng);
}

static void fuzz_ioctl(struct fuzz *fuzz, int fd)
{
	struct rng *rng = &fuzz->rng;
	static const unsigned long commands[] = { CKPT_IOC_QUERY, CKPT_IOC_ATTACH, CKPT_IOC_SNAPSHOT,
						  CKPT_IOC_GETRUNS };
	unsigned long command = commands[rng_below(rng, 4)];
	struct ckpt_run runs[8];
	union {
		uint64_t words[20];
		struct ckpt_query query;
		struct ckpt_snapshot_args snapshot;
		struct ckpt_getruns getruns;
	} args = { 0 };
	void *pointer = &args;

	switch (command) {
	case CKPT_IOC_QUERY:
		args.query.size = sizeof(args.query);
		break;
	case CKPT_IOC_ATTACH:
		pointer = NULL;
		break;
	case CKPT_IOC_SNAPSHOT:
		args.snapshot.size = sizeof(args.snapshot);
		args.snapshot.flags = (uint32_t)rng_below(rng, 4);
		if (args.snapshot.flags & CKPT_SNAPSHOT_INCREMENTAL)
			args.snapshot.generation = fuzz->generation;
		break;
	case CKPT_IOC_GETRUNS:
		args.getruns.size = sizeof(args.getruns);
		args.getruns.kinds = (uint32_t)(1 + rng_below(rng, 31));
		args.getruns.va = rng_below(rng, 2) ? (uint64_t)fuzz->memory : 0;
		args.getruns.npages = 1 + rng_below(rng, (1UL << 34));
		args.getruns.runs = (uint64_t)runs;
		args.getruns.nruns = 8;
		break;
	}
	// Half of them are spoilt: a word of the argument, the command, or the pointer.
	switch (rng_below(rng, 8)) {
	case 0:
	case 1:
		args.words[rng_below(rng, 16)] = any_number(rng);
		// Never an array in the middle of this program.
		if (command == CKPT_IOC_GETRUNS && args.getruns.nruns > 8)
			args.getruns.runs = (uint64_t)fuzz->memory;
		break;
	case 2:
		command = rng_below(rng, 2) ? command ^ 1UL << rng_below(rng, 32) : rng_next(rng);
		// Only ours: others' commands do to other descriptors what they say.
		command = (command & ~0xff00UL) | CKPT_IOC_MAGIC << 8;
		break;
	case 3:
		pointer = rng_below(rng, 2) ? (void *)any_number(rng) : (void *)(fuzz->memory + HUGE - 8);
		if (pointer != NULL && (char *)pointer != fuzz->memory + HUGE - 8)
			pointer = (void *)((unsigned long)pointer | 1UL << 63);
		break;
	}
	fuzz->calls++;
	if (ioctl(fd, command, pointer) == 0 && command == CKPT_IOC_SNAPSHOT && pointer == &args) {
		int *slot = &fuzz->fds[8 + rng_below(rng, 16)];

		if (*slot >= 0)
			close(*slot);
		*slot = args.snapshot.fd;
		if (args.snapshot.flags & CKPT_SNAPSHOT_CLEAR)
			fuzz->generation = args.snapshot.generation;
	}
}

static void fuzz_memory(struct fuzz *fuzz)
{
	struct rng *rng = &fuzz->rng;
	size_t page = rng_below(rng, 500), bytes = (1 + rng_below(rng, 12)) * PAGE;
	char *at = fuzz->memory + page * PAGE;

	switch (rng_below(rng, 8)) {
	case 0:
		madvise(at, bytes, MADV_DONTNEED);
		break;
	case 1:
		mprotect(at, bytes, PROT_READ);
		break;
	case 2:
		madvise(at, bytes, MADV_PAGEOUT);
		break;
	case 3:
		madvise(fuzz->memory, HUGE, 25 /* MADV_COLLAPSE */);
		break;
	case 4:
		(void)!mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		break;
	default:
		mprotect(at, bytes, PROT_READ | PROT_WRITE);
		memset(at, (int)page, bytes);
	}
}

static void fuzz_read(struct fuzz *fuzz, int fd)
{
	struct rng *rng = &fuzz->rng;
	char *at = rng_below(rng, 4) ? fuzz->memory + rng_below(rng, HUGE) : (char *)any_number(rng);
	off_t offset = (off_t)at;
	char buffer[3 * PAGE];

	if (rng_below(rng, 2)) {
		(void)!pread(fd, buffer, rng_below(rng, sizeof(buffer)), offset);
	} else {
		int to = fuzz->fds[rng_below(rng, 24)];

		(void)!splice(fd, &offset, to, NULL, rng_below(rng, 20 * PAGE), SPLICE_F_NONBLOCK);
		(void)!read(to, buffer, sizeof(buffer));
	}
}

static void fuzz_step(struct fuzz *fuzz)
{
	struct rng *rng = &fuzz->rng;
	int *slot = &fuzz->fds[rng_below(rng, 24)];

	switch (rng_below(rng, 16)) {
	case 0:
		close(*slot);
		*slot = open("/dev/ckpt", O_RDWR | O_CLOEXEC);
		break;
	case 1: {
		int pipes[2];

		if (pipe2(pipes, O_NONBLOCK) == 0) {
			close(fuzz->fds[6]);
			close(fuzz->fds[7]);
			fuzz->fds[6] = pipes[0];
			fuzz->fds[7] = pipes[1];
		}
		break;
	}
	case 2: {
		pid_t child = fork();

		if (child == 0)
			_exit(0);
		if (child > 0)
			waitpid(child, NULL, 0);
		break;
	}
	case 3:
	case 4:
		fuzz_memory(fuzz);
		break;
	case 5:
	case 6:
	case 7:
		fuzz_read(fuzz, *slot);
		break;
	default:
		fuzz_ioctl(fuzz, *slot);
	}
}

static int fuzz_for(unsigned number, unsigned seconds, const int *shared)
{
	struct fuzz fuzz = { .rng = { seed + number * 7919 } };
	time_t end = time(NULL) + seconds;

	fuzz.memory = map_small(HUGE + PAGE);
	CHECK(munmap(fuzz.memory + HUGE, PAGE) == 0);
	for (int i = 0; i < 24; i++)
		fuzz.fds[i] = i < 4 ? dup(shared[i]) : -1;
	signal(SIGPIPE, SIG_IGN);
	while (time(NULL) < end)
		for (int i = 0; i < 64; i++)
			fuzz_step(&fuzz);
	printf("caller %u: %llu calls\n", number, (unsigned long long)fuzz.calls);
	fflush(stdout);
	return 0;
}

TEST_WITHIN(random_callers, 900)
{
	const char *text = getenv("CKPT_TEST_FUZZ_SECONDS");
	unsigned seconds = text ? (unsigned)atoi(text) : 10;
	int shared[4], probe;
	pid_t callers[4];

	for (int i = 0; i < 4; i++)
		shared[i] = i < 2 ? open_session() : open_device();
	for (unsigned i = 0; i < 4; i++) {
		fflush(stdout);
		callers[i] = fork();
		if (callers[i] == 0)
			_exit(fuzz_for(i, seconds, shared));
	}
	// Some of them are killed in the middle, and others take their place.
	for (time_t end = time(NULL) + seconds; time(NULL) < end;) {
		unsigned victim = (unsigned)time(NULL) % 4;
		time_t now = time(NULL);

		while (time(NULL) == now)
			sched_yield();
		if (victim)
			continue;
		kill(callers[0], SIGKILL);
		CHECK_EQ(wait_for(callers[0]), 128 + SIGKILL);
		callers[0] = fork();
		if (callers[0] == 0)
			_exit(fuzz_for(100 + (unsigned)now % 1000, (unsigned)(end > now ? end - now : 0), shared));
	}
	for (int i = 0; i < 4; i++)
		CHECK_EQ(wait_for(callers[i]), 0);
	for (int i = 0; i < 4; i++)
		close(shared[i]);
	// Nothing is left, and it still works.
	probe = open_session();
	CHECK_EQ(query_device(probe).held_pages, 0);
	CHECK_EQ(query_device(probe).snapshots, 0);
	CHECK_EQ(query_device(probe).sessions, 1);
	close(take(probe, 0, 0).fd);
}
