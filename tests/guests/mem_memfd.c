// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * memfd: shared by fork with the fd kept and with the fd closed, its name,
 * seals, position, size, and the content written with write(2).
 */
#include "mem_pattern.h"

#include <sys/mman.h>

#define PAGES 8

static void check_link(int fd, const char *expected)
{
	char path[64], got[256];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, got, sizeof(got) - 1);
	GUEST_CHECK(n > 0, "readlink %s: %s", path, strerror(errno));
	got[n] = 0;
	GUEST_CHECK(strcmp(got, expected) == 0, "name of fd %d: expected %s, got %s", fd, expected, got);
}

int main(int argc, char **argv)
{
	int kept, closed, sealed, empty, seals;
	char *a, *b, *s, page[PAGE_BYTES];
	pid_t child;

	pattern_begin(argc, argv);
	kept = memfd_create("kept fd", MFD_CLOEXEC);
	closed = memfd_create("closed fd", 0);
	sealed = memfd_create("sealed", MFD_ALLOW_SEALING);
	empty = memfd_create("empty", 0);
	GUEST_CHECK(kept >= 0 && closed >= 0 && sealed >= 0 && empty >= 0, "memfd_create: %s", strerror(errno));
	GUEST_CHECK(!ftruncate(kept, PAGES * PAGE_BYTES + 100) && !ftruncate(closed, PAGES * PAGE_BYTES),
		    "ftruncate: %s", strerror(errno));
	a = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, kept, 0);
	b = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, closed, 0);
	GUEST_CHECK(a != MAP_FAILED && b != MAP_FAILED, "mmap: %s", strerror(errno));
	close(closed);
	pattern_fill(a, PAGES * PAGE_BYTES, guest_seed);
	pattern_fill(b, 2 * PAGE_BYTES, guest_seed + 1);
	GUEST_CHECK(lseek(kept, 1234, SEEK_SET) == 1234, "lseek: %s", strerror(errno));
	pattern_fill(page, PAGE_BYTES, guest_seed + 2);
	GUEST_CHECK(write(sealed, page, PAGE_BYTES) == (ssize_t)PAGE_BYTES, "write: %s", strerror(errno));
	GUEST_CHECK(fcntl(sealed, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) == 0,
		    "F_ADD_SEALS: %s", strerror(errno));
	s = mmap(NULL, PAGE_BYTES, PROT_READ, MAP_PRIVATE, sealed, 0);
	GUEST_CHECK(s != MAP_FAILED, "mmap: %s", strerror(errno));

	child = fork();
	if (child == 0) {
		guest_wait_go();
		while (*(volatile char *)(b + 3 * PAGE_BYTES) != 'g') {
			struct timespec tick = { 0, 2000000 };

			nanosleep(&tick, NULL);
		}
		b[3 * PAGE_BYTES + 1] = 'c';
		GUEST_CHECK(pwrite(kept, "child", 5, 5 * PAGE_BYTES) == 5, "pwrite: %s", strerror(errno));
		_exit(0);
	}
	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("memfd with its fd", a, PAGES * PAGE_BYTES, guest_seed);
	CHECK_PATTERN("memfd without its fd", b, 2 * PAGE_BYTES, guest_seed + 1);
	CHECK_ZERO("memfd without its fd, hole", b + 2 * PAGE_BYTES, PAGE_BYTES);
	GUEST_CHECK(lseek(kept, 0, SEEK_CUR) == 1234, "position: expected 1234, got %ld",
		    (long)lseek(kept, 0, SEEK_CUR));
	GUEST_CHECK(lseek(kept, 0, SEEK_END) == (off_t)(PAGES * PAGE_BYTES + 100),
		    "size: expected %zu, got %ld", PAGES * PAGE_BYTES + 100, (long)lseek(kept, 0, SEEK_END));
	GUEST_CHECK(lseek(empty, 0, SEEK_END) == 0, "empty memfd has a size");
	GUEST_CHECK(fcntl(kept, F_GETFD) == FD_CLOEXEC, "FD_CLOEXEC lost");
	GUEST_CHECK(fcntl(empty, F_GETFD) == 0, "FD_CLOEXEC gained");
	check_link(kept, "/memfd:kept fd (deleted)");
	check_link(sealed, "/memfd:sealed (deleted)");
	seals = fcntl(sealed, F_GET_SEALS);
	GUEST_CHECK(seals == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), "seals: expected %#x, got %#x",
		    F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE, seals);
	seals = fcntl(kept, F_GET_SEALS);
	GUEST_CHECK(seals == F_SEAL_SEAL, "seals without MFD_ALLOW_SEALING: expected %#x, got %#x",
		    F_SEAL_SEAL, seals);
	GUEST_CHECK(write(sealed, "x", 1) < 0 && errno == EPERM, "write to a sealed memfd: expected EPERM");
	CHECK_PATTERN("sealed memfd", s, PAGE_BYTES, guest_seed + 2);
	GUEST_CHECK(pread(sealed, page, PAGE_BYTES, 0) == (ssize_t)PAGE_BYTES, "pread: %s", strerror(errno));
	CHECK_PATTERN("sealed memfd read by fd", page, PAGE_BYTES, guest_seed + 2);
	*(volatile char *)(b + 3 * PAGE_BYTES) = 'g';
	guest_join(child);
	GUEST_CHECK(b[3 * PAGE_BYTES + 1] == 'c', "child's write to the fd-less memfd is lost");
	GUEST_CHECK(memcmp(a + 5 * PAGE_BYTES, "child", 5) == 0, "child's pwrite is not in the parent's mapping");
	guest_ok();
}
