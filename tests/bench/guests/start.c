// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * What starting a program takes, in two ways in turns, so that what else the machine does falls on both alike:
 *
 *     start RUNS LIBRARY COMMAND... -- COMMAND...
 *
 * starts the first command plainly and the second with LIBRARY preloaded ("" for none), RUNS times each after 20 unmeasured
 * ones, and prints the nanoseconds from spawn to exit of each pair. From C, so that little else is measured.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>

extern char **environ;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t start(char **argv, const char *library)
{
	posix_spawn_file_actions_t actions;
	uint64_t before;
	int status;
	pid_t pid;

	if (*library)
		setenv("LD_PRELOAD", library, 1);
	else
		unsetenv("LD_PRELOAD");
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
	before = now();
	if (posix_spawn(&pid, argv[0], &actions, NULL, argv, environ) || waitpid(pid, &status, 0) != pid || status) {
		fprintf(stderr, "%s failed\n", argv[0]);
		exit(1);
	}
	before = now() - before;
	posix_spawn_file_actions_destroy(&actions);
	return before;
}

int main(int argc, char **argv)
{
	char **command[2] = { argv + 3, NULL };
	int runs;

	for (int i = 3; i < argc; i++)
		if (!strcmp(argv[i], "--")) {
			argv[i] = NULL;
			command[1] = argv + i + 1;
			break;
		}
	if (!command[1] || !command[0][0] || !command[1][0]) {
		fprintf(stderr, "usage: start RUNS LIBRARY COMMAND... -- COMMAND...\n");
		return 2;
	}
	runs = atoi(argv[1]);
	for (int i = -20; i < runs; i++) {
		uint64_t taken[2];

		for (int j = 0; j < 2; j++) {
			int second = (i + j) & 1;

			taken[second] = start(command[second], second ? argv[2] : "");
		}
		if (i >= 0)
			printf("%llu %llu\n", (unsigned long long)taken[0], (unsigned long long)taken[1]);
	}
	return 0;
}
