// SPDX-License-Identifier: MIT OR Apache-2.0
/* More open file descriptions than one batch of remote calls holds: each keeps its own flags. */
#include "guest.h"
#include <sys/resource.h>

#define FILES 1500

static int flags_of(int i)
{
	return (i % 3 == 0 ? O_RDONLY : i % 3 == 1 ? O_WRONLY : O_RDWR) | (i % 2 ? O_NONBLOCK : 0);
}

int main(int argc, char **argv)
{
	struct rlimit limit;
	int fds[FILES];

	guest_begin(argc, argv);
	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	if (limit.rlim_max < 2 * FILES + 100)
		guest_skip("the hard limit of open files is too low");
	limit.rlim_cur = limit.rlim_max;
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	for (int i = 0; i < FILES; i++)
		fds[i] = MUST(open("/dev/null", flags_of(i) | (i % 5 ? 0 : O_CLOEXEC)));
	guest_ready();
	guest_wait_go();
	for (int i = 0; i < FILES; i++) {
		EXPECT_EQ("flags", flags_of(i), fcntl(fds[i], F_GETFL) & (O_ACCMODE | O_NONBLOCK));
		EXPECT_EQ("FD_CLOEXEC", i % 5 ? 0 : FD_CLOEXEC, fcntl(fds[i], F_GETFD));
	}
	guest_ok();
}
