// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Guard pages and PROT_NONE areas with content underneath: the content comes
 * back with mprotect, the guard still raises SIGSEGV at its address.
 */
#include "mem_pattern.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

static sigjmp_buf back;
static void *volatile fault_address;

static void on_fault(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	fault_address = info->si_addr;
	siglongjmp(back, 1);
}

static int faults(volatile char *p, int write)
{
	fault_address = NULL;
	if (sigsetjmp(back, 1) == 0) {
		if (write)
			*p = 1;
		else
			(void)*p;
		return 0;
	}
	GUEST_CHECK(fault_address == p, "si_addr: expected %p, got %p", p, fault_address);
	return 1;
}

static void check_protections(const char *when, char *p, char *none, char *readonly)
{
	GUEST_CHECK(faults(p + 4 * PAGE_BYTES, 0), "%s: the guard page can be read", when);
	GUEST_CHECK(faults(p + 5 * PAGE_BYTES - 1, 1), "%s: the guard page can be written", when);
	GUEST_CHECK(faults(none, 0), "%s: PROT_NONE memory can be read", when);
	GUEST_CHECK(faults(readonly, 1), "%s: PROT_READ memory can be written", when);
	GUEST_CHECK(!faults(readonly, 0), "%s: PROT_READ memory cannot be read", when);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
	char *p, *none, *readonly, *empty;

	pattern_begin(argc, argv);
	sigaction(SIGSEGV, &action, NULL);
	p = mmap(NULL, 9 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	none = mmap(NULL, 6 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	readonly = mmap(NULL, 6 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	empty = mmap(NULL, 6 * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	GUEST_CHECK(p != MAP_FAILED && none != MAP_FAILED && readonly != MAP_FAILED && empty != MAP_FAILED,
		    "mmap: %s", strerror(errno));
	pattern_fill(p, 9 * PAGE_BYTES, guest_seed);
	pattern_fill(none, 6 * PAGE_BYTES, guest_seed + 1);
	pattern_fill(readonly, 6 * PAGE_BYTES, guest_seed + 2);
	mprotect(p + 4 * PAGE_BYTES, PAGE_BYTES, PROT_NONE);
	mprotect(none, 6 * PAGE_BYTES, PROT_NONE);
	mprotect(readonly, 6 * PAGE_BYTES, PROT_READ);
	check_protections("before", p, none, readonly);

	guest_ready();
	guest_wait_go();

	check_protections("after", p, none, readonly);
	CHECK_PATTERN("read-only memory", readonly, 6 * PAGE_BYTES, guest_seed + 2);
	GUEST_CHECK(mprotect(p + 4 * PAGE_BYTES, PAGE_BYTES, PROT_READ | PROT_WRITE) == 0 &&
		    mprotect(none, 6 * PAGE_BYTES, PROT_READ | PROT_WRITE) == 0 &&
		    mprotect(readonly, 6 * PAGE_BYTES, PROT_READ | PROT_WRITE) == 0 &&
		    mprotect(empty, 6 * PAGE_BYTES, PROT_READ | PROT_WRITE) == 0,
		    "mprotect: %s", strerror(errno));
	CHECK_PATTERN("memory around and under the guard", p, 9 * PAGE_BYTES, guest_seed);
	CHECK_PATTERN("memory that was PROT_NONE", none, 6 * PAGE_BYTES, guest_seed + 1);
	CHECK_ZERO("untouched PROT_NONE memory", empty, 6 * PAGE_BYTES);
	memset(readonly, 1, 6 * PAGE_BYTES);
	guest_ok();
}
