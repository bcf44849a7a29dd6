// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A process that waits for its vfork(2) child again and again sleeps where nothing can stop it, and shares its memory with the
 * child meanwhile. A dump comes in the middle of such a wait; nothing is lost of it.
 *
 * vfork_wait WORKDIR held: a child lives until the file "leave" exists.
 */
#include "guest.h"

/* Turns that are done; whether there are to be no more; whether a child is held. */
static volatile uint64_t *turns;
static bool held;

static void wait_for_children(void)
{
	while (!turns[1]) {
		int status;
		pid_t child = vfork();

		if (child == 0) {
			struct timespec half_a_second = { 0, 500000000 };

			turns[2] = held;
			if (!held)
				nanosleep(&half_a_second, NULL);
			while (held && !guest_exists("leave"))
				guest_nap();
			_exit(7);
		}
		MUST(child);
		EXPECT_EQ("waitpid", child, waitpid(child, &status, 0));
		EXPECT_EQ("status of the vfork child", 7, WEXITSTATUS(status));
		turns[0]++;
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	guest_begin(argc, argv);
	held = argc > 2 && !strcmp(argv[2], "held");
	turns = guest_shared(4096);
	pid_t waiter = MUST(fork());
	if (!waiter)
		wait_for_children();
	while (turns[0] < 1 && !turns[2])
		guest_nap();
	guest_ready();
	guest_wait_go();
	for (uint64_t before = turns[0]; turns[0] < before + 2;)
		guest_nap();
	turns[1] = 1;
	EXPECT_EQ("the waiter's verdict", 0, guest_reap(waiter));
	guest_ok();
}
