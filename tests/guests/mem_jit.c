// SPDX-License-Identifier: MIT OR Apache-2.0
/* Executable anonymous memory: code written before the dump runs after it. */
#include "mem_pattern.h"

#include <sys/mman.h>

typedef uint64_t (*function)(void);

/* movabs $value, %rax; ret */
static void emit(char *p, uint64_t value)
{
	p[0] = 0x48;
	p[1] = (char)0xb8;
	memcpy(p + 2, &value, 8);
	p[10] = (char)0xc3;
}

int main(int argc, char **argv)
{
	char *readexec, *all;

	pattern_begin(argc, argv);
	readexec = mmap(NULL, 2 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	all = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(readexec != MAP_FAILED && all != MAP_FAILED, "mmap: %s", strerror(errno));
	emit(readexec + PAGE_BYTES + 16, guest_seed);
	GUEST_CHECK(mprotect(readexec, 2 * PAGE_BYTES, PROT_READ | PROT_EXEC) == 0, "mprotect: %s",
		    strerror(errno));
	emit(all, ~guest_seed);

	guest_ready();
	guest_wait_go();

	GUEST_CHECK(((function)(readexec + PAGE_BYTES + 16))() == guest_seed, "read-exec code returns another value");
	GUEST_CHECK(((function)all)() == ~guest_seed, "writable code returns another value");
	emit(all, guest_seed + 1);
	GUEST_CHECK(((function)all)() == guest_seed + 1, "code written after the restore returns another value");
	guest_ok();
}
