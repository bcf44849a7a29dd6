// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * More processes than there are descriptors to look at them with, if the test allows ckpt few.
 */
#include "guest.h"

#define MANY 40

int main(int argc, char **argv)
{
	pid_t child[MANY];

	guest_begin(argc, argv);
	for (int i = 0; i < MANY; i++) {
		child[i] = MUST(fork());
		if (!child[i]) {
			guest_wait_go();
			_exit(i);
		}
	}
	guest_ready();
	guest_wait_go();
	for (int i = 0; i < MANY; i++)
		EXPECT_EQ("status of a child", i << 8, guest_reap(child[i]));
	guest_ok();
}
