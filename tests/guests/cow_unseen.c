// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A process that waits for children it doesn't have, all the time and by every call there is. With "reaper" it adopts
 * orphans (PR_SET_CHILD_SUBREAPER), with "child" a parent that does so waits beside its child. With "limit" it may have
 * no more processes (RLIMIT_NPROC). At the word "close" it closes the last writing end of a pipe, must see its end at
 * once, and looks for relatives in /proc; not before, as open files of /proc can't be saved.
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
	siginfo_t info;

	EXPECT_EQ("SIGCHLD", 0, told);
	EXPECT(waitpid(-1, NULL, WNOHANG | __WALL) == -1);
	EXPECT_EQ("errno of waitpid", ECHILD, errno);
	EXPECT(waitid(P_ALL, 0, &info, WNOHANG | WEXITED | WSTOPPED | WNOWAIT | __WALL) == -1);
	EXPECT_EQ("errno of waitid", ECHILD, errno);
}

/* No child, and nobody else in our process group or session. */
static void look_around(void)
{
	char path[64], text[256];
	DIR *proc = opendir("/proc");
	struct dirent *entry;

	snprintf(path, sizeof(path), "/proc/self/task/%d/children", getpid());
	if (access(path, R_OK) == 0) {
		guest_read_file(path, text, sizeof(text));
		EXPECT_STR("children", "", text);
	}
	EXPECT(proc);
	while ((entry = readdir(proc))) {
		pid_t pid = atoi(entry->d_name);

		if (pid > 1 && pid != getpid()) {
			EXPECT(getpgid(pid) != getpgid(0));
			EXPECT(getsid(pid) != getsid(0));
		}
	}
	closedir(proc);
}

static void run(void)
{
	int ends[2];

	MUST(pipe2(ends, O_CLOEXEC));
	signal(SIGCHLD, on_child);
	guest_ready();
	while (!guest_exists("go")) {
		look();
		if (ends[1] >= 0 && guest_exists("close")) {
			struct pollfd end = { ends[0], POLLIN, 0 };

			close(ends[1]);
			ends[1] = -1;
			EXPECT_EQ("poll of a pipe without writers", 1, poll(&end, 1, 0));
			EXPECT(end.revents & POLLHUP);
			look_around();
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
		while (!guest_exists("go"))
			EXPECT_EQ("waitpid", 0, waitpid(-1, NULL, WNOHANG | __WALL));
		kill(child, SIGKILL);
		EXPECT_EQ("its only child", child, waitpid(-1, NULL, __WALL));
		EXPECT(waitpid(-1, NULL, WNOHANG | __WALL) == -1 && errno == ECHILD);
		guest_ok();
	}
	run();
}
