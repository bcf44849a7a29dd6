// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Memory contents that are a function of the guest's nonce and of their
 * place, so that neither a restart nor a page restored elsewhere can pass.
 */
#ifndef MEM_PATTERN_H
#define MEM_PATTERN_H

#include "guest.h"

#include <stddef.h>

/* Ends the guest with FAIL and the formatted reason unless condition holds. */
#define GUEST_CHECK(condition, ...) do {	\
	if (!(condition))			\
		check_failed(__VA_ARGS__);	\
} while (0)

/* Derived from the nonce: the root of every pattern. */
static uint64_t guest_seed;

/* Out of line, so that its buffers do not swell the frames of guests that test their stacks. */
__attribute__((noinline, noreturn, unused, format(printf, 1, 2)))
static void check_failed(const char *format, ...)
{
	char why[1024];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(why, sizeof(why), format, arguments);
	va_end(arguments);
	guest_fail("%s", why);
}

static inline void pattern_begin(int argc, char **argv)
{
	char digits[17];

	guest_begin(argc, argv);
	snprintf(digits, sizeof(digits), "%.16s", guest.nonce);
	guest_seed = strtoull(digits, NULL, 16);
}

/* Waits for a child of the guest; one that failed has given the verdict itself. */
static inline void guest_join(pid_t child)
{
	int status = guest_reap(child);

	if (WIFEXITED(status) && WEXITSTATUS(status) == 1)
		_exit(1);
	GUEST_CHECK(status == 0, "child %d: expected exit 0, got wait status %#x", (int)child, status);
}

#define PAGE_BYTES ((size_t)4096)

/* splitmix64, the i-th number of the sequence that starts at seed. */
static inline uint64_t pattern_word(uint64_t seed, uint64_t i)
{
	uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

/* Fills bytes (a multiple of 8) at p. */
static inline void pattern_fill(void *p, size_t bytes, uint64_t seed)
{
	uint64_t *word = p;

	for (size_t i = 0; i < bytes / 8; i++)
		word[i] = pattern_word(seed, i);
}

/* The offset of the first wrong byte group at p, or -1 if all are right. */
static inline ptrdiff_t pattern_check(const void *p, size_t bytes, uint64_t seed)
{
	const uint64_t *word = p;

	for (size_t i = 0; i < bytes / 8; i++)
		if (word[i] != pattern_word(seed, i))
			return (ptrdiff_t)(i * 8);
	return -1;
}

/* The offset of the first byte at p that is not zero, or -1. */
static inline ptrdiff_t zero_check(const void *p, size_t bytes)
{
	const unsigned char *byte = p;

	for (size_t i = 0; i < bytes; i++)
		if (byte[i] != 0)
			return (ptrdiff_t)i;
	return -1;
}

/* Ends the guest with FAIL if the bytes at p are not the pattern of seed. */
#define CHECK_PATTERN(what, p, bytes, seed) do {			\
	ptrdiff_t bad_ = pattern_check((p), (bytes), (seed));		\
	GUEST_CHECK(bad_ < 0, "%s: wrong content at offset %td of %zu",	\
		    (what), bad_, (size_t)(bytes));			\
} while (0)

/* Ends the guest with FAIL if the bytes at p are not all zero. */
#define CHECK_ZERO(what, p, bytes) do {					\
	ptrdiff_t bad_ = zero_check((p), (bytes));			\
	GUEST_CHECK(bad_ < 0, "%s: expected zeros, got data at offset %td", \
		    (what), bad_);					\
} while (0)

#endif
