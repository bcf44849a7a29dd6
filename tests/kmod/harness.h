// SPDX-License-Identifier: MIT OR Apache-2.0
// What the tests of the kernel module share. Each test is a process of its own; a failed check ends it.
#ifndef HARNESS_H
#define HARNESS_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ckpt.h"

#define PAGE 4096UL
#define HUGE (2UL << 20)

struct test {
	const char *name;
	void (*run)(void);
	// Seconds until it is killed and has failed.
	unsigned timeout;
	struct test *next;
};

void register_test(struct test *test);

// A test of the name NAME, in the order of the files and of their lines.
#define TEST_WITHIN(NAME, SECONDS)                                                                            \
	static void NAME(void);                                                                               \
	static struct test test_##NAME = { #NAME, NAME, SECONDS, NULL };                                      \
	__attribute__((constructor)) static void register_##NAME(void)                                        \
	{                                                                                                     \
		register_test(&test_##NAME);                                                                  \
	}                                                                                                     \
	static void NAME(void)
#define TEST(NAME) TEST_WITHIN(NAME, 120)

// Ends the test as failed.
_Noreturn void fail(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4)));
// Ends the test as skipped; why is printed.
_Noreturn void skip(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define FAIL(...) fail(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(CONDITION)                                                                                      \
	do {                                                                                                  \
		if (!(CONDITION))                                                                             \
			FAIL("%s (errno: %s)", #CONDITION, strerror(errno));                                  \
	} while (0)
#define CHECK_EQ(A, B)                                                                                        \
	do {                                                                                                  \
		long long a_ = (long long)(A), b_ = (long long)(B);                                           \
		if (a_ != b_)                                                                                 \
			FAIL("%s is %lld, not %s = %lld", #A, a_, #B, b_);                                    \
	} while (0)
// The call gives -1 and this errno.
#define CHECK_ERRNO(CALL, ERRNO)                                                                              \
	do {                                                                                                  \
		errno = 0;                                                                                    \
		long long r_ = (long long)(CALL);                                                             \
		int e_ = errno;                                                                               \
		if (r_ != -1 || e_ != (ERRNO))                                                                \
			FAIL("%s is %lld (%s), not %s", #CALL, r_, strerror(e_), #ERRNO);                     \
	} while (0)

// Seed of all that is random, from the command line, printed at the start.
extern uint64_t seed;
struct rng {
	uint64_t state;
};
uint64_t rng_next(struct rng *rng);
static inline uint64_t rng_below(struct rng *rng, uint64_t bound)
{
	return rng_next(rng) % bound;
}

// An open device; a session on this process.
int open_device(void);
int open_session(void);
struct ckpt_query query_device(int fd);
// A snapshot that must succeed; the descriptor is in the result.
struct ckpt_snapshot_args take(int session, uint32_t flags, uint64_t generation);
// One that need not: the result is 0 or -1 and errno.
int try_take(int session, uint32_t flags, uint64_t generation, struct ckpt_snapshot_args *args);
// The kind of one page of a snapshot, zero if absent.
uint32_t kind_of(int snapshot, const void *page);
// Checks the kind of every page of a range.
void check_kinds(int snapshot, const void *start, size_t npages, uint32_t kind);
// What the snapshot has at an address must be equal.
void check_bytes(int snapshot, const void *address, const void *expected, size_t bytes);

// Private anonymous memory; huge: aligned, with huge pages, which are checked for.
void *map_small(size_t bytes);
void *map_huge(size_t bytes);
bool is_huge(const void *address);
// Fills with what depends on position and salt, and checks it.
void fill(void *start, size_t bytes, uint64_t salt);
void check_filled(const void *start, size_t bytes, uint64_t salt);
void check_snapshot_filled(int snapshot, const void *start, size_t bytes, uint64_t salt);
// The entry of /proc/self/pagemap.
uint64_t pagemap(const void *address);
#define PAGEMAP_SWAPPED (1ULL << 62)
#define PAGEMAP_FRAME ((1ULL << 55) - 1)

// Puts a whole range into swap (isolation.c).
void swap_out(char *memory, size_t bytes);

// Writes a line to a file; fails the test or returns false.
void write_file(const char *path, const char *text);
bool try_write_file(const char *path, const char *text);
void read_file(const char *path, char *buffer, size_t size);
// Waits for a child: its exit status, or 128 plus the signal that ended it.
int wait_for(pid_t pid);
// A child that runs a function and ends with its result.
pid_t spawn(int (*function)(void *), void *argument);
void become_plain_user(void);

// The module, by its file; flags as for delete_module(2).
int load_module(const char *path, const char *parameters);
int unload_module(const char *name);
#define MODULE_PATH "/lib/ckpt/ckpt.ko"

// Descriptors from one process to another.
void send_fd(int socket, int fd);
int receive_fd(int socket);

#endif
