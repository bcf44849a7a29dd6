// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Pid 1 for guests that run without ckpt: starts its arguments as a command, reaps whatever falls to it, and ends with
 * the command's status.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc < 2)
		return 125;
	pid_t command = fork();
	if (command < 0)
		return 125;
	if (command == 0) {
		execv(argv[1], argv + 1);
		fprintf(stderr, "reaper: %s: %s\n", argv[1], strerror(errno));
		_exit(126);
	}
	for (;;) {
		int status;
		pid_t reaped = wait(&status);

		if (reaped == command)
			return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
		if (reaped < 0 && errno != EINTR)
			return 125;
	}
}
