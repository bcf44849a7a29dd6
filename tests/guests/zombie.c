// SPDX-License-Identifier: MIT OR Apache-2.0
/* Children that are dead and not yet waited for keep their pids, names and exit statuses. */
#include "guest.h"

enum { LAST_SIGNAL = 64 };

static pid_t child_that(int how)
{
	pid_t child = MUST(fork());

	if (child)
		return child;
	if (how >= 0)
		_exit(how);
	raise(-how);
	_exit(99);
}

/* Waits until the child is a zombie, without reaping it. */
static void until_dead(pid_t child)
{
	siginfo_t info;

	MUST(waitid(P_PID, child, &info, WEXITED | WNOWAIT));
}

int main(int argc, char **argv)
{
	/* Exit codes, and deaths by signals that dump no core. */
	static const int ways[] = { 0, 1, 42, 255, -SIGKILL, -SIGTERM, -SIGUSR1, -LAST_SIGNAL };
	enum { COUNT = sizeof(ways) / sizeof(*ways) };
	pid_t children[COUNT];
	char path[64], text[32];

	guest_begin(argc, argv);
	for (int i = 0; i < COUNT; i++) {
		children[i] = child_that(ways[i]);
		until_dead(children[i]);
	}
	/* A zombie with a name of its own. */
	pid_t named = MUST(fork());
	if (!named) {
		MUST(prctl(PR_SET_NAME, "departed"));
		_exit(7);
	}
	until_dead(named);
	guest_ready();
	guest_wait_go();

	snprintf(path, sizeof(path), "/proc/%d/comm", named);
	guest_read_file(path, text, sizeof(text));
	EXPECT_STR("name of a zombie", "departed\n", text);
	EXPECT_EQ("status of the named zombie", 7 << 8, guest_reap(named));
	for (int i = 0; i < COUNT; i++) {
		siginfo_t info = { 0 };
		int signal = -ways[i];

		MUST(waitid(P_PID, children[i], &info, WEXITED | WNOWAIT | WNOHANG));
		EXPECT_EQ("si_pid", children[i], info.si_pid);
		EXPECT_EQ("si_uid", getuid(), info.si_uid);
		EXPECT_EQ("si_code", ways[i] >= 0 ? CLD_EXITED : CLD_KILLED, info.si_code);
		EXPECT_EQ("status", ways[i] >= 0 ? ways[i] << 8 : signal, guest_reap(children[i]));
	}
	errno = 0;
	EXPECT_EQ("children left", -1, waitpid(-1, NULL, WNOHANG));
	EXPECT_EQ("errno", ECHILD, errno);
	guest_ok();
}
