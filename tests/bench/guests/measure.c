// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Runs a command and says in JSON, on a descriptor that the command does not get, what it took:
 *
 *     measure DESCRIPTOR [--ticks OBSERVER] -- COMMAND...
 *
 * started_ns (CLOCK_MONOTONIC), wall_ns, user_ns, system_ns, peak_kib (of the largest process that it waited for), status (as
 * a shell has it) and, with --ticks, first_tick_ns: from the start until the tick counter of the observer file moved; waits at
 * most 60 s for that. A small program, as a started process counts the memory of its parent as its own until it executes.
 */
#define _GNU_SOURCE
#include "observer.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t ns(struct timeval t)
{
	return t.tv_sec * 1000000000ull + t.tv_usec * 1000ull;
}

int main(int argc, char **argv)
{
	struct observer *observer = NULL;
	uint64_t started, ended = 0, first_tick = 0, ticks = 0;
	struct rusage usage;
	int status = 0, at = 2, error, report;
	pid_t pid;

	report = argc > 1 ? atoi(argv[1]) : -1;
	if (argc > 3 && !strcmp(argv[2], "--ticks")) {
		int fd = open(argv[3], O_RDONLY | O_CLOEXEC);

		observer = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof(*observer), PROT_READ, MAP_SHARED, fd, 0);
		if (observer == MAP_FAILED) {
			perror(argv[3]);
			return 2;
		}
		at = 4;
	}
	if (at >= argc - 1 || strcmp(argv[at], "--") || fcntl(report, F_SETFD, FD_CLOEXEC) < 0) {
		fprintf(stderr, "usage: measure DESCRIPTOR [--ticks OBSERVER] -- COMMAND...\n");
		return 2;
	}
	argv += at + 1;
	/* 50 us are to be 50 us. */
	prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
	if (observer)
		ticks = __atomic_load_n(&observer->ticks, __ATOMIC_RELAXED);
	started = now();
	error = posix_spawnp(&pid, argv[0], NULL, NULL, argv, environ);
	if (error) {
		fprintf(stderr, "%s: %s\n", argv[0], strerror(error));
		return 127;
	}
	while (observer && !first_tick) {
		struct timespec pause = { 0, 50000 };

		if (__atomic_load_n(&observer->ticks, __ATOMIC_RELAXED) != ticks) {
			first_tick = now() - started;
			break;
		}
		if (!ended && wait4(pid, &status, WNOHANG, &usage) == pid) {
			ended = now();
			if (status)
				break;
		}
		if (now() - started > 60000000000ull)
			break;
		nanosleep(&pause, NULL);
	}
	if (!ended) {
		while (wait4(pid, &status, 0, &usage) < 0 && errno == EINTR)
			;
		ended = now();
	}
	dprintf(report,
		"{\"started_ns\": %llu, \"wall_ns\": %llu, \"user_ns\": %llu, \"system_ns\": %llu, \"peak_kib\": %ld, \"status\": %d, "
		"\"first_tick_ns\": %llu}\n",
		(unsigned long long)started, (unsigned long long)(ended - started), (unsigned long long)ns(usage.ru_utime),
		(unsigned long long)ns(usage.ru_stime), usage.ru_maxrss,
		WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status), (unsigned long long)first_tick);
	return 0;
}
