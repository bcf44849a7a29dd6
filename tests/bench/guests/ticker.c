// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * The guest of the bench: touches its memory, then reads the clock without ever sleeping and notes each gap longer than a
 * tick, until told to do something else through the observer file.
 *
 *     ticker OBSERVER BYTES 4k|thp|shared PROCESSES THREADS VMAS
 *
 * BYTES is the memory of each process. The first process ticks; the others, and the other threads, are blocked.
 */
#define _GNU_SOURCE
#include "observer.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ull
#define WORDS (PAGE / sizeof(uint64_t))

static struct observer *observer;
static uint64_t *memory;
static uint64_t bytes;
static uint64_t seed;

struct child {
	int command, reply;
};
struct reply {
	uint64_t ns, value;
};
static struct child *children;
static int processes;
static int sharing = MAP_PRIVATE;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

/* The first word of each page says where it belongs; no page is zero, or equal to another. */
static uint64_t mark(uint64_t page)
{
	return mix(seed + page) | 1;
}

static void fill(void)
{
	uint64_t x = seed;

	for (uint64_t page = 0; page < bytes / PAGE; page++) {
		uint64_t *words = memory + page * WORDS;

		for (uint64_t i = 1; i < WORDS; i++) {
			x ^= x << 13;
			x ^= x >> 7;
			x ^= x << 17;
			words[i] = x;
		}
		words[0] = mark(page);
	}
}

static void touch(void)
{
	for (uint64_t page = 0; page < bytes / PAGE; page++)
		((volatile uint64_t *)memory)[page * WORDS + 1]++;
}

static uint64_t wrong_pages(void)
{
	uint64_t wrong = 0;

	for (uint64_t page = 0; page < bytes / PAGE; page++)
		wrong += ((volatile uint64_t *)memory)[page * WORDS] != mark(page);
	return wrong;
}

static uint64_t fork_ns(void)
{
	uint64_t before = now(), after;
	pid_t pid = fork();

	if (pid == 0)
		_exit(0);
	after = now();
	if (pid < 0)
		die("fork");
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	touch();
	return after - before;
}

static uint64_t copy_ns(void)
{
	uint64_t piece = 64 << 20, before;
	char *target;

	if (piece > bytes)
		piece = bytes;
	if (!piece)
		return 0;
	target = mmap(NULL, piece, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (target == MAP_FAILED)
		die("mmap");
	before = now();
	for (uint64_t at = 0; at < bytes; at += piece) {
		memcpy(target, (char *)memory + at, bytes - at < piece ? bytes - at : piece);
		/* Not to be optimised away. */
		__asm__ volatile("" : : "r"(target) : "memory");
	}
	before = now() - before;
	munmap(target, piece);
	return before;
}

static uint64_t write_ns(const char *path, uint64_t piece)
{
	uint64_t before = now();
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	if (fd < 0)
		die(path);
	for (uint64_t at = 0; at < bytes;) {
		ssize_t n = write(fd, (char *)memory + at, bytes - at < piece ? bytes - at : piece);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			die("write");
		at += n;
	}
	/* As a dump does. */
	if (fsync(fd) < 0 || close(fd) < 0)
		die("fsync");
	return now() - before;
}

static void serve(int command, int reply)
{
	char what;

	for (;;) {
		struct reply r = { 0, 0 };
		ssize_t n = read(command, &what, 1);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			_exit(0);
		switch (what) {
		case FORK:
			r.ns = fork_ns();
			break;
		case TOUCH:
			touch();
			break;
		case VERIFY:
			r.value = wrong_pages();
			break;
		}
		if (write(reply, &r, sizeof(r)) != sizeof(r))
			_exit(1);
	}
}

static struct reply ask(int i, char what)
{
	struct reply r;

	if (write(children[i].command, &what, 1) != 1 || read(children[i].reply, &r, sizeof(r)) != sizeof(r))
		die("a process of the guest does not answer");
	return r;
}

static void *map(int huge)
{
	uint64_t huge_bytes = 2 << 20;
	char *at = mmap(NULL, bytes + huge_bytes, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);
	char *start;

	if (at == MAP_FAILED)
		die("mmap");
	start = (char *)(((uintptr_t)at + huge_bytes - 1) & ~(uintptr_t)(huge_bytes - 1));
	if (start > at)
		munmap(at, start - at);
	if (start < at + huge_bytes)
		munmap(start + bytes, at + huge_bytes - start);
	/* Without the advice the host's default would decide; a kernel without huge pages refuses it, and has no others. */
	if (bytes && madvise(start, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) < 0 && huge)
		die("MADV_HUGEPAGE");
	return start;
}

static void *blocked(void *lock)
{
	pthread_mutex_lock(lock);
	return NULL;
}

static uint64_t position, generator, quota_ns;

/* Dirties pages at the given rate (per million a second), each page at most once in a round. */
static void dirty(uint64_t elapsed_ns, uint64_t rate, int scattered)
{
	uint64_t pages = bytes / PAGE;

	quota_ns += elapsed_ns * rate;
	for (; pages && quota_ns >= 1000000000000000ull / pages; quota_ns -= 1000000000000000ull / pages) {
		/* The multiplier is odd: with a power of two pages this is a permutation. */
		uint64_t page = scattered ? position * 0x9e3779b1ull % pages : position % pages;

		((volatile uint64_t *)memory)[page * WORDS + 2]++;
		position++;
		observer->work++;
	}
}

static void reset(void)
{
	observer->longest_ns = observer->gaps = observer->gaps_ns = observer->work = 0;
	memset(observer->bin, 0, sizeof(observer->bin));
	memset(observer->gap, 0, sizeof(observer->gap));
}

static void tick(void)
{
	uint64_t mode = TICK, rate = 0, last, slot = 0, ticks_before = observer->ticks;
	pid_t writer = 0;

	reset();
	last = observer->started_ns = now();
	__atomic_store_n(&observer->ready, 1, __ATOMIC_RELEASE);
	for (;;) {
		uint64_t t = now(), gap = t - last, bin;

		if (gap > observer->longest_ns)
			observer->longest_ns = gap;
		if (gap > TICK_NS) {
			uint64_t i = observer->gaps++ % OBSERVER_GAPS;

			observer->gap[i].at_ns = last - observer->started_ns;
			observer->gap[i].length_ns = gap;
			observer->gaps_ns += gap;
		}
		if (t / TICK_NS != slot) {
			slot = t / TICK_NS;
			__atomic_store_n(&observer->ticks, observer->ticks + 1, __ATOMIC_RELAXED);
			if (writer && waitpid(writer, NULL, WNOHANG) == writer)
				observer->child = writer = 0;
		}
		bin = (t - observer->started_ns) / BIN_NS;
		if (mode == WORK) {
			for (int i = 0; i < 8; i++) {
				generator ^= generator << 13;
				generator ^= generator >> 7;
				generator ^= generator << 17;
				((volatile uint64_t *)memory)[generator % (bytes / PAGE) * WORDS + 1 + (generator >> 40) % (WORDS - 1)]++;
			}
			observer->work += 8;
			if (bin < OBSERVER_BINS)
				observer->bin[bin] += 8;
		} else if (mode == SCATTERED || mode == CLUSTERED) {
			dirty(gap, rate, mode == SCATTERED);
		}
		last = t;
		if (__atomic_load_n(&observer->request, __ATOMIC_ACQUIRE) == observer->handled)
			continue;
		memset(observer->result, 0, sizeof(observer->result));
		switch (observer->command) {
		case RESET:
			reset();
			ticks_before = observer->ticks;
			observer->started_ns = now();
			break;
		case TOUCH:
			touch();
			for (int i = 1; i < processes; i++)
				ask(i, TOUCH);
			break;
		case FORK:
			for (int i = 0; i < processes; i++) {
				uint64_t ns = i ? ask(i, FORK).ns : fork_ns();

				observer->result[0] += ns;
				if (ns > observer->result[1])
					observer->result[1] = ns;
				observer->result[2]++;
			}
			break;
		case COPY:
			observer->result[0] = copy_ns();
			break;
		case WRITE:
			observer->result[0] = write_ns(observer->path, observer->argument[0]);
			break;
		case FORK_WRITE:
			t = now();
			writer = fork();
			if (writer == 0) {
				write_ns(observer->path, 1 << 20);
				_exit(0);
			}
			if (writer < 0)
				die("fork");
			observer->result[0] = now() - t;
			observer->child = writer;
			break;
		case VERIFY:
			t = now();
			observer->result[0] = wrong_pages();
			for (int i = 1; i < processes; i++)
				observer->result[0] += ask(i, VERIFY).value;
			observer->result[1] = bytes / PAGE * processes;
			observer->result[2] = now() - t;
			break;
		case MODE:
			mode = observer->argument[0];
			rate = observer->argument[1];
			quota_ns = 0;
			break;
		case SAMPLE:
			observer->result[0] = now() - observer->started_ns;
			observer->result[1] = observer->work;
			observer->result[2] = observer->ticks - ticks_before;
			observer->result[3] = observer->longest_ns;
			observer->result[4] = observer->gaps_ns;
			observer->result[5] = observer->gaps;
			break;
		case EXIT:
			__atomic_store_n(&observer->handled, observer->request, __ATOMIC_RELEASE);
			exit(0);
		}
		/* What a command took is no gap, unless it asked for the fork that the gap is about. */
		if (observer->command != FORK_WRITE)
			last = now();
		__atomic_store_n(&observer->handled, observer->request, __ATOMIC_RELEASE);
	}
}

int main(int argc, char **argv)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	int fd, huge, threads, vmas;

	_Static_assert(sizeof(struct observer) == 4096 + 8 * OBSERVER_BINS, "layout");
	if (argc != 7) {
		fprintf(stderr, "usage: ticker OBSERVER BYTES 4k|thp|shared PROCESSES THREADS VMAS\n");
		return 2;
	}
	bytes = strtoull(argv[2], NULL, 10) / PAGE * PAGE;
	huge = !strcmp(argv[3], "thp");
	sharing = !strcmp(argv[3], "shared") ? MAP_SHARED : MAP_PRIVATE;
	processes = atoi(argv[4]);
	threads = atoi(argv[5]);
	vmas = atoi(argv[6]);
	fd = open(argv[1], O_RDWR | O_CLOEXEC);
	if (fd < 0)
		die(argv[1]);
	observer = mmap(NULL, sizeof(*observer), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (observer == MAP_FAILED || observer->magic != OBSERVER_MAGIC)
		die("the observer file");
	close(fd);

	seed = mix(now() ^ (uint64_t)getpid() << 32);
	generator = seed | 1;
	memory = map(huge);
	/* Neighbours of unlike protection, which never merge. */
	for (int i = 0; i < vmas; i++) {
		char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (page == MAP_FAILED)
			die("mmap");
		page[0] = 1;
		if (i % 2 && mprotect(page, PAGE, PROT_READ) < 0)
			die("mprotect");
	}
	children = calloc(processes, sizeof(*children));
	for (int i = 1; i < processes; i++) {
		int command[2], reply[2];

		if (pipe(command) < 0 || pipe(reply) < 0)
			die("pipe");
		switch (fork()) {
		case -1:
			die("fork");
			break;
		case 0:
			close(command[1]);
			close(reply[0]);
			for (int j = 1; j < i; j++) {
				close(children[j].command);
				close(children[j].reply);
			}
			munmap(observer, sizeof(*observer));
			seed = mix(seed + i);
			fill();
			serve(command[0], reply[1]);
		}
		close(command[0]);
		close(reply[1]);
		children[i].command = command[1];
		children[i].reply = reply[0];
	}
	fill();
	for (int i = 1; i < processes; i++)
		ask(i, TOUCH);
	pthread_mutex_lock(&lock);
	for (int i = 1; i < threads; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, blocked, &lock))
			die("pthread_create");
	}
	observer->memory_bytes = bytes * processes;
	tick();
}
