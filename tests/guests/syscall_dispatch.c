// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Its system calls are dispatched to it by SIGSYS (PR_SET_SYSCALL_USER_DISPATCH), but for those below the vDSO, which are all
 * that it makes: whoever makes it do one from elsewhere calls the handler. With the argument "undumpable" it is not dumpable.
 */
#include "guest.h"

#include <sys/auxv.h>
#include <sys/prctl.h>

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif

/* As the kernel has them: not in the headers of every distribution. */
enum { DISPATCH_ON = 1, DISPATCH_BLOCK = 1 };

static volatile char selector;
static volatile sig_atomic_t dispatched;

static void on_call(int signal)
{
	(void)signal;
	selector = 0;
	dispatched = 1;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_call }, now;
	unsigned long vdso = getauxval(AT_SYSINFO_EHDR);

	guest_begin(argc, argv);
	EXPECT(vdso);
	MUST(sigaction(SIGSYS, &action, NULL));
	if (argc > 2 && !strcmp(argv[2], "undumpable"))
		MUST(prctl(PR_SET_DUMPABLE, 0));
	if (prctl(PR_SET_SYSCALL_USER_DISPATCH, DISPATCH_ON, 0ul, vdso, &selector))
		guest_skip("PR_SET_SYSCALL_USER_DISPATCH: %s", strerror(errno));
	selector = DISPATCH_BLOCK;
	guest_ready();
	guest_wait_go();

	EXPECT_EQ("calls dispatched", 0, dispatched);
	EXPECT_EQ("selector", DISPATCH_BLOCK, selector);
	MUST(sigaction(SIGSYS, NULL, &now));
	EXPECT(now.sa_handler == on_call);
	guest_ok();
}
