// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Private memory that is written to between two incremental dumps ("step1"), and once more between the copying of what was
 * written and the freeze ("change"), in each way that there is, and that is not written to, dropped, replaced and moved then.
 * Some is only written in the step. What each page must hold follows from where the program is, not from anything in memory.
 */
#include "mem_pattern.h"

#include <sys/mman.h>
#include <sys/uio.h>

#define PAGES ((size_t)2560)
#define PLAIN_PAGES ((size_t)1024)
#define BLOCK_PAGES ((size_t)16)
#define BLOCK_BYTES (BLOCK_PAGES * PAGE_BYTES)

enum way { NOT, STORED, BY_CALL, READ_INTO, BY_PROC, DROPPED, DROPPED_AND_READ, REPLACED, MOVED, FORKED, WAYS };

/* What a page holds: of which round, ZERO for nothing. */
enum { ZERO, FIRST, STEP, LATE };

static char *area, *elsewhere, *plain;
static char page[PAGE_BYTES] __attribute__((aligned(8)));

static void make_page(size_t number, int round)
{
	pattern_fill(page, PAGE_BYTES, guest_seed + round * PAGES + number);
}

static void check(const char *what, const char *at, size_t number, int round)
{
	char where[64];

	snprintf(where, sizeof(where), "%s, page %zu, way %zu", what, number, number / BLOCK_PAGES % WAYS);
	if (round == ZERO)
		CHECK_ZERO(where, at, PAGE_BYTES);
	else
		CHECK_PATTERN(where, at, PAGE_BYTES, guest_seed + round * PAGES + number);
}

/* What there is after the step: a quarter as it was, some dropped and only read since. */
static int at_step(size_t number)
{
	if (number % BLOCK_PAGES == 5)
		return ZERO;
	return number % 4 ? STEP : FIRST;
}

/* The pages of a block that are changed late: of each sort one, and one between others that are not. */
static bool is_changed(size_t number)
{
	size_t n = number % BLOCK_PAGES;

	return n == 1 || n == 4 || n == 5 || n == 9;
}

static int in_the_end(size_t number)
{
	switch ((enum way)(number / BLOCK_PAGES % WAYS)) {
	case STORED:
	case BY_CALL:
	case READ_INTO:
	case BY_PROC:
	case FORKED:
		return is_changed(number) ? LATE : at_step(number);
	case DROPPED:
	case DROPPED_AND_READ:
		return is_changed(number) ? ZERO : at_step(number);
	case REPLACED:
		return is_changed(number) ? LATE : ZERO;
	case MOVED:
		return ZERO;
	default:
		return at_step(number);
	}
}

static void drop(char *at, bool and_read)
{
	MUST(madvise(at, PAGE_BYTES, MADV_DONTNEED));
	if (and_read)
		CHECK_ZERO("a dropped page", at, PAGE_BYTES);
}

static char *map(void *at, size_t bytes)
{
	char *p = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	MUST(madvise(p, bytes, MADV_NOHUGEPAGE));
	return p;
}

/* Apart from other mappings. */
static char *map_alone(size_t bytes)
{
	char *p = mmap(NULL, bytes + 2 * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return map(p + PAGE_BYTES, bytes);
}

static void change_page(size_t number, enum way way, int memory, int file)
{
	char *at = area + number * PAGE_BYTES;
	struct iovec from = { page, PAGE_BYTES }, to = { at, PAGE_BYTES };

	make_page(number, LATE);
	switch (way) {
	case STORED:
	case REPLACED:
	case FORKED:
		memcpy(at, page, PAGE_BYTES);
		break;
	case BY_CALL:
		GUEST_CHECK(process_vm_writev(getpid(), &from, 1, &to, 1, 0) == PAGE_BYTES, "process_vm_writev: %s",
			    strerror(errno));
		break;
	case READ_INTO:
		GUEST_CHECK(pwrite(file, page, PAGE_BYTES, 0) == PAGE_BYTES, "pwrite: %s", strerror(errno));
		GUEST_CHECK(pread(file, at, PAGE_BYTES, 0) == PAGE_BYTES, "pread: %s", strerror(errno));
		break;
	case BY_PROC:
		GUEST_CHECK(pwrite(memory, page, PAGE_BYTES, (off_t)at) == PAGE_BYTES, "/proc/self/mem: %s",
			    strerror(errno));
		break;
	case DROPPED:
	case DROPPED_AND_READ:
		drop(at, way == DROPPED_AND_READ);
		break;
	default:
		break;
	}
}

static void change(bool forked, int memory, int file)
{
	for (size_t first = 0; first < PAGES; first += BLOCK_PAGES) {
		enum way way = first / BLOCK_PAGES % WAYS;
		char *at = area + first * PAGE_BYTES;

		if ((way == FORKED) != forked)
			continue;
		if (way == MOVED) {
			void *moved = elsewhere + first * PAGE_BYTES;

			GUEST_CHECK(mremap(at, BLOCK_BYTES, BLOCK_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, moved) == moved,
				    "mremap: %s", strerror(errno));
		}
		if (way == REPLACED || way == MOVED)
			map(at, BLOCK_BYTES);
		for (size_t i = first; i < first + BLOCK_PAGES; i++)
			if (is_changed(i))
				change_page(i, way, memory, file);
	}
}

/* Memory whose mapping nothing happens to. */
static void fill_plain(int round)
{
	for (size_t i = 0; i < PLAIN_PAGES; i++) {
		make_page(i, round);
		memcpy(plain + i * PAGE_BYTES, page, PAGE_BYTES);
	}
}

static void check_all(bool is_child)
{
	for (size_t i = 0; i < PLAIN_PAGES; i++)
		check("plain memory", plain + i * PAGE_BYTES, i, STEP);
	for (size_t i = 0; i < PAGES; i++) {
		enum way way = i / BLOCK_PAGES % WAYS;

		check("memory", area + i * PAGE_BYTES, i, is_child && way == FORKED ? at_step(i) : in_the_end(i));
		if (way == MOVED)
			check("moved", elsewhere + i * PAGE_BYTES, i, at_step(i));
	}
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];
	int memory, file;
	pid_t child;

	pattern_begin(argc, argv);
	area = map_alone(PAGES * PAGE_BYTES);
	elsewhere = map_alone(PAGES * PAGE_BYTES);
	plain = map_alone(PLAIN_PAGES * PAGE_BYTES);
	fill_plain(FIRST);
	for (size_t i = 0; i < PAGES; i++) {
		make_page(i, FIRST);
		memcpy(area + i * PAGE_BYTES, page, PAGE_BYTES);
	}
	file = open(guest_path(path, sizeof(path), "content"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	GUEST_CHECK(file >= 0, "open: %s", strerror(errno));
	guest_ready();

	while (!guest_exists("step1"))
		guest_nap();
	for (size_t i = 0; i < PAGES; i++) {
		make_page(i, STEP);
		if (at_step(i) == STEP)
			memcpy(area + i * PAGE_BYTES, page, PAGE_BYTES);
		else if (at_step(i) == ZERO)
			drop(area + i * PAGE_BYTES, true);
	}
	fill_plain(STEP);
	guest_publish("done1", "");

	while (!guest_exists("change"))
		guest_nap();
	memory = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	GUEST_CHECK(memory >= 0, "/proc/self/mem: %s", strerror(errno));
	change(false, memory, file);
	close(memory);
	child = MUST(fork());
	if (child == 0) {
		guest_wait_go();
		check_all(true);
		_exit(0);
	}
	change(true, -1, file);
	guest_publish("changed", "");
	guest_wait_go();
	check_all(false);
	guest_join(child);
	guest_ok();
}
