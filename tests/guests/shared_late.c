// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Shared memory that is written to at a moment of the harness's choice (when the file "change" appears; it then makes
 * "changed"), in each way that leaves no trace in the page tables of the process that has it mapped: by another process, by
 * one that ends at once, by process_vm_writev(2), by pwrite(2), by truncation and by a hole. All of it must be as it was then.
 */
#include "mem_pattern.h"

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#define AREA_PAGES ((size_t)3 * 1024)
#define AREA_BYTES (AREA_PAGES * PAGE_BYTES)
#define SMALL_BYTES ((size_t)2 << 20)

enum { BY_OTHER = 3, BY_CALL = 700, BY_ENDED = 1500, BY_SELF = 2999, BY_FILE = 2000 };

static char *shared;

static void fill_page(char *page, size_t number, uint64_t round)
{
	pattern_fill(page, PAGE_BYTES, guest_seed + round * AREA_PAGES + number);
}

static void check_page(const char *what, const char *page, size_t number, uint64_t round)
{
	CHECK_PATTERN(what, page, PAGE_BYTES, guest_seed + round * AREA_PAGES + number);
}

/* A memfd with pages of the pattern. */
static int file_of(const char *name, size_t bytes)
{
	static char page[PAGE_BYTES] __attribute__((aligned(8)));
	int fd = memfd_create(name, MFD_CLOEXEC);

	GUEST_CHECK(fd >= 0, "memfd_create: %s", strerror(errno));
	for (size_t i = 0; i < bytes / PAGE_BYTES; i++) {
		fill_page(page, i, 0);
		GUEST_CHECK(pwrite(fd, page, PAGE_BYTES, i * PAGE_BYTES) == PAGE_BYTES, "pwrite: %s", strerror(errno));
	}
	return fd;
}

static void put_page(int fd, size_t number)
{
	static char page[PAGE_BYTES] __attribute__((aligned(8)));

	fill_page(page, number, 1);
	GUEST_CHECK(pwrite(fd, page, PAGE_BYTES, number * PAGE_BYTES) == PAGE_BYTES, "pwrite: %s", strerror(errno));
}

static void write_by_call(pid_t target, size_t number)
{
	static char page[PAGE_BYTES] __attribute__((aligned(8)));
	struct iovec from = { page, PAGE_BYTES }, to = { shared + number * PAGE_BYTES, PAGE_BYTES };

	fill_page(page, number, 1);
	GUEST_CHECK(process_vm_writev(target, &from, 1, &to, 1, 0) == PAGE_BYTES, "process_vm_writev: %s",
		    strerror(errno));
}

static void other(pid_t parent, int command, int answer)
{
	char byte;

	GUEST_CHECK(read(command, &byte, 1) == 1, "read: %s", strerror(errno));
	fill_page(shared + BY_OTHER * PAGE_BYTES, BY_OTHER, 1);
	write_by_call(parent, BY_CALL);
	GUEST_CHECK(write(answer, &byte, 1) == 1, "write: %s", strerror(errno));
	guest_wait_go();
	_exit(0);
}

int main(int argc, char **argv)
{
	int file, shrunk, holed, command[2], answer[2];
	pid_t parent, child, ended;
	char *later, *view, byte = 0;

	pattern_begin(argc, argv);
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
	shared = mmap(NULL, AREA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(shared != MAP_FAILED, "mmap: %s", strerror(errno));
	for (size_t i = 0; i < AREA_PAGES; i++)
		fill_page(shared + i * PAGE_BYTES, i, 0);
	file = file_of("late-file", AREA_BYTES);
	shrunk = file_of("late-shrunk", SMALL_BYTES);
	holed = file_of("late-holed", SMALL_BYTES);
	GUEST_CHECK(pipe(command) == 0 && pipe(answer) == 0, "pipe: %s", strerror(errno));
	parent = getpid();
	child = fork();
	GUEST_CHECK(child >= 0, "fork: %s", strerror(errno));
	if (child == 0)
		other(parent, command[0], answer[1]);
	guest_ready();

	while (!guest_exists("change"))
		guest_nap();
	GUEST_CHECK(write(command[1], &byte, 1) == 1 && read(answer[0], &byte, 1) == 1, "the child is silent");
	ended = fork();
	GUEST_CHECK(ended >= 0, "fork: %s", strerror(errno));
	if (ended == 0) {
		fill_page(shared + BY_ENDED * PAGE_BYTES, BY_ENDED, 1);
		_exit(0);
	}
	guest_join(ended);
	fill_page(shared + BY_SELF * PAGE_BYTES, BY_SELF, 1);
	put_page(file, BY_SELF);
	put_page(file, BY_FILE);
	GUEST_CHECK(ftruncate(shrunk, SMALL_BYTES / 2) == 0 && ftruncate(shrunk, SMALL_BYTES) == 0, "ftruncate: %s",
		    strerror(errno));
	GUEST_CHECK(fallocate(holed, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, SMALL_BYTES / 4, SMALL_BYTES / 4) == 0,
		    "FALLOC_FL_PUNCH_HOLE: %s", strerror(errno));
	later = mmap(NULL, SMALL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(later != MAP_FAILED, "mmap: %s", strerror(errno));
	pattern_fill(later, SMALL_BYTES, guest_seed - 1);
	guest_publish("changed", "");
	guest_wait_go();

	for (size_t i = 0; i < AREA_PAGES; i++)
		check_page("shared", shared + i * PAGE_BYTES, i,
			   i == BY_OTHER || i == BY_CALL || i == BY_ENDED || i == BY_SELF);
	view = mmap(NULL, AREA_BYTES, PROT_READ, MAP_SHARED, file, 0);
	GUEST_CHECK(view != MAP_FAILED, "mmap: %s", strerror(errno));
	for (size_t i = 0; i < AREA_PAGES; i++)
		check_page("file", view + i * PAGE_BYTES, i, i == BY_FILE || i == BY_SELF);
	view = mmap(NULL, SMALL_BYTES, PROT_READ, MAP_SHARED, shrunk, 0);
	GUEST_CHECK(view != MAP_FAILED, "mmap: %s", strerror(errno));
	for (size_t i = 0; i < SMALL_BYTES / 2 / PAGE_BYTES; i++)
		check_page("shrunk", view + i * PAGE_BYTES, i, 0);
	CHECK_ZERO("shrunk", view + SMALL_BYTES / 2, SMALL_BYTES / 2);
	view = mmap(NULL, SMALL_BYTES, PROT_READ, MAP_SHARED, holed, 0);
	GUEST_CHECK(view != MAP_FAILED, "mmap: %s", strerror(errno));
	for (size_t i = 0; i < SMALL_BYTES / PAGE_BYTES; i++) {
		if (i < SMALL_BYTES / 4 / PAGE_BYTES || i >= SMALL_BYTES / 2 / PAGE_BYTES)
			check_page("holed", view + i * PAGE_BYTES, i, 0);
		else
			CHECK_ZERO("holed", view + i * PAGE_BYTES, PAGE_BYTES);
	}
	CHECK_PATTERN("later", later, SMALL_BYTES, guest_seed - 1);
	guest_join(child);
	guest_ok();
}
