// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Descriptor tables: high numbers, holes, FD_CLOEXEC (also as execve acts on it), F_SETOWN and F_SETSIG, five hundred
 * descriptors, 0 closed; with the argument "shared" also a table shared with a CLONE_FILES child.
 */
#include "mem_pattern.h"

#include <sched.h>
#include <sys/resource.h>

#define FILES 500
#define HIGH 900

static _Atomic int *turn;
static int by_child;
static char stack[65536] __attribute__((aligned(16)));

static int child_main(void *arg)
{
	(void)arg;
	*turn = 1;
	while (*turn != 2)
		guest_nap();
	/* Shared: what it opens and closes is opened and closed for the parent. */
	close(HIGH + 1);
	by_child = open("/dev/null", O_RDONLY);
	*turn = 3;
	_exit(0);
}

int main(int argc, char **argv)
{
	char path[PATH_MAX], name[32];
	struct rlimit limit;
	struct stat st[FILES], now;
	int fd[FILES], owned[2], high, cloexec;

	/* As after execve: only descriptors without FD_CLOEXEC are there. */
	if (argc == 4 && strcmp(argv[2], "after-exec") == 0) {
		int kept = atoi(argv[3]);

		return fcntl(kept, F_GETFD) == 0 && fcntl(kept + 1, F_GETFD) == -1 ? 0 : 3;
	}
	pattern_begin(argc, argv);
	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	limit.rlim_cur = limit.rlim_max < 2048 ? limit.rlim_max : 2048;
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	turn = guest_shared(4096);
	for (int i = 0; i < FILES; i++) {
		snprintf(name, sizeof(name), "f%d", i);
		fd[i] = MUST(open(guest_path(path, sizeof(path), name), O_RDWR | O_CREAT | (i % 3 ? 0 : O_CLOEXEC), 0600));
		MUST(lseek(fd[i], i, SEEK_SET));
		MUST(fstat(fd[i], &st[i]));
	}
	high = MUST(fcntl(fd[1], F_DUPFD, HIGH));
	EXPECT_EQ("high fd", HIGH, high);
	cloexec = MUST(fcntl(fd[1], F_DUPFD_CLOEXEC, HIGH + 1));
	EXPECT_EQ("high fd", HIGH + 1, cloexec);
	MUST(pipe(owned));
	for (int i = 0; i < FILES; i += 7)
		close(fd[i]);
	MUST(fcntl(owned[0], F_SETOWN, getpid()));
	MUST(fcntl(owned[0], F_SETSIG, SIGUSR1));
	close(0);

	bool shared = argc > 2 && !strcmp(argv[2], "shared");
	pid_t child = 0;
	if (shared) {
		child = MUST(clone(child_main, stack + sizeof(stack), CLONE_FILES | CLONE_VM | SIGCHLD, NULL));
		while (*turn != 1)
			guest_nap();
	}

	guest_ready();
	guest_wait_go();

	for (int i = 0; i < FILES; i++) {
		if (i % 7 == 0) {
			EXPECT_EQ("closed fd", -1, fcntl(fd[i], F_GETFD));
			continue;
		}
		EXPECT_EQ("FD_CLOEXEC", i % 3 ? 0 : FD_CLOEXEC, fcntl(fd[i], F_GETFD));
		EXPECT_EQ("position", i, lseek(fd[i], 0, SEEK_CUR));
		MUST(fstat(fd[i], &now));
		EXPECT_EQ("inode", st[i].st_ino, now.st_ino);
	}
	EXPECT_EQ("fd 0 stays closed", -1, fcntl(0, F_GETFD));
	EXPECT_EQ("F_GETOWN", getpid(), fcntl(owned[0], F_GETOWN));
	EXPECT_EQ("F_GETSIG", SIGUSR1, fcntl(owned[0], F_GETSIG));
	EXPECT_EQ("F_GETOWN of the other end", 0, fcntl(owned[1], F_GETOWN));
	MUST(lseek(fd[1], 4321, SEEK_SET));
	EXPECT_EQ("the high fd shares the position", 4321, lseek(HIGH, 0, SEEK_CUR));
	pid_t after = MUST(fork());
	if (after == 0) {
		char number[16];

		snprintf(number, sizeof(number), "%d", HIGH);
		execl("/proc/self/exe", argv[0], argv[1], "after-exec", number, (char *)NULL);
		_exit(4);
	}
	EXPECT_EQ("descriptors after execve", 0, guest_reap(after));
	if (!shared) {
		/* The lowest free number is where it was. */
		EXPECT_EQ("lowest free", 0, dup(fd[1]));
		EXPECT_EQ("FD_CLOEXEC of the copy beyond", FD_CLOEXEC, fcntl(HIGH + 1, F_GETFD));
		guest_ok();
	}
	*turn = 2;
	while (*turn != 3)
		guest_nap();
	EXPECT_EQ("fd closed by the CLONE_FILES child", -1, fcntl(HIGH + 1, F_GETFD));
	EXPECT_EQ("fd opened by the CLONE_FILES child: lowest free", 0, by_child);
	EXPECT_EQ("fd opened by the CLONE_FILES child", 0, fcntl(by_child, F_GETFD));
	EXPECT_EQ("child's status", 0, guest_reap(child));
	guest_ok();
}
