// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * What programs do all day, to be run with and without ckpt; prints how long it took in nanoseconds:
 *
 *     loops files DIRECTORY COUNT     open, write and close a file
 *     loops malloc COUNT              malloc and free of mixed sizes
 *     loops exec COUNT                start /bin/true and wait for it
 *     loops script DIRECTORY COUNT    a shell script that starts a program COUNT times
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
#include <unistd.h>

extern char **environ;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void start(char **argv)
{
	int status;
	pid_t pid;

	if (posix_spawn(&pid, argv[0], NULL, NULL, argv, environ) || waitpid(pid, &status, 0) != pid || status)
		die(argv[0]);
}

static void files(const char *directory, long count)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/loops.%d", directory, (int)getpid());
	for (long i = 0; i < count; i++) {
		int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

		if (fd < 0 || write(fd, path, 64) != 64 || close(fd) < 0)
			die(path);
	}
	unlink(path);
}

static void allocate(long count)
{
	static void *held[1024];
	uint32_t x = 1;

	for (long i = 0; i < count; i++) {
		x = x * 1664525 + 1013904223;
		free(held[x >> 22]);
		held[x >> 22] = malloc(16 + (x >> 8 & 4095));
		if (!held[x >> 22])
			die("malloc");
		*(volatile char *)held[x >> 22] = 1;
	}
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	long count = argc > 2 ? atol(argv[argc - 1]) : 0;
	uint64_t started = now();

	if (!strcmp(what, "files") && argc == 4) {
		files(argv[2], count);
	} else if (!strcmp(what, "malloc") && argc == 3) {
		allocate(count);
	} else if (!strcmp(what, "exec") && argc == 3) {
		char *command[] = { "/bin/true", NULL };

		for (long i = 0; i < count; i++)
			start(command);
	} else if (!strcmp(what, "script") && argc == 4) {
		char text[256];
		char *command[] = { "/bin/sh", "-c", text, NULL };

		snprintf(text, sizeof(text), "i=0; while [ $i -lt %ld ]; do x=$(echo $i | /bin/cat); i=$((i + 1)); done", count);
		if (chdir(argv[2]) < 0)
			die(argv[2]);
		start(command);
	} else {
		fprintf(stderr, "usage: loops files DIRECTORY COUNT | malloc COUNT | exec COUNT | script DIRECTORY COUNT\n");
		return 2;
	}
	printf("%llu\n", (unsigned long long)(now() - started));
	return 0;
}
