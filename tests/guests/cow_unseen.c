// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A process that looks for children it doesn't have, all the time, by every way there is. With "reaper" it adopts
 * orphans (PR_SET_CHILD_SUBREAPER), with "child" so does its parent. With "limit" it may have no more processes
 * (RLIMIT_NPROC). At the word "close" it closes the last writing end of a pipe, and must see its end at once.
 */
#include "guest.h"

#include <poll.h>
#include <sys/resource.h>

static volatile sig_atomic_t told;

static void on_child(int signal)
{
	(void)signal;
	told = 1;
}

static void look(void)
{
	char path[64], text[256];
	siginfo_t info;

	EXPECT_EQ("SIGCHLD", 0, told);
	EXPECT(waitpid(-1, NULL, WNOHANG | __WALL) == -1);
	EXPECT_EQ("errno of waitpid", ECHILD, errno);
	EXPECT(waitid(P_ALL, 0, &info, WNOHANG | WEXITED | WSTOPPED | WNOWAIT | __WALL) == -1);
	EXPECT_EQ("errno of waitid", ECHILD, errno);
	snprintf(path, sizeof(path), "/proc/self/task/%d/children", getpid());
	if (access(path, R_OK) == 0) {
		guest_read_file(path, text, sizeof(text));
		EXPECT_STR("children", "", text);
	}
}

/* No other process is in our process group or session. */
static void look_around(pid_t parent)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;

	EXPECT(proc);
	while ((entry = readdir(proc))) {
		pid_t pid = atoi(entry->d_name);

		if (pid > 1 && pid != getpid() && pid != parent) {
			EXPECT(getpgid(pid) != getpgid(0));
			EXPECT(getsid(pid) != getsid(0));
		}
	}
	closedir(proc);
}

static void run(pid_t parent)
{
	int ends[2];

	MUST(pipe2(ends, O_CLOEXEC));
	signal(SIGCHLD, on_child);
	guest_ready();
	while (!guest_exists("go")) {
		look();
		look_around(parent);
		if (ends[1] >= 0 && guest_exists("close")) {
			struct pollfd end = { ends[0], POLLIN, 0 };

			close(ends[1]);
			ends[1] = -1;
			EXPECT_EQ("poll of a pipe without writers", 1, poll(&end, 1, 0));
			EXPECT(end.revents & POLLHUP);
			guest_publish("closed", "");
		}
	}
	look();
	guest_ok();
}

int main(int argc, char **argv)
{
	const char *how = argc > 2 ? argv[2] : "";

	guest_begin(argc, argv);
	if (!strcmp(how, "limit")) {
		struct rlimit none = { 0, 0 };

		MUST(setrlimit(RLIMIT_NPROC, &none));
	}
	if (!strcmp(how, "reaper") || !strcmp(how, "child"))
		MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	if (!strcmp(how, "child")) {
		pid_t child = MUST(fork());

		if (child == 0) {
			/* The parent is the one that must not see anything but its child. */
			MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
			for (;;)
				pause();
		}
		guest_ready();
		while (!guest_exists("go")) {
			char path[64], text[256], expected[32];

			EXPECT_EQ("waitpid", 0, waitpid(-1, NULL, WNOHANG | __WALL));
			snprintf(path, sizeof(path), "/proc/self/task/%d/children", getpid());
			if (access(path, R_OK) == 0) {
				guest_read_file(path, text, sizeof(text));
				snprintf(expected, sizeof(expected), "%d ", child);
				EXPECT_STR("children", expected, text);
			}
		}
		guest_ok();
	}
	run(getppid());
}
