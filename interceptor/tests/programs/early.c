// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * early.so - a library whose constructor starts a program, before those of the libraries preloaded ahead
 * of it have run.
 */
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

__attribute__((constructor)) static void start_early(void)
{
	const char *program = getenv("EARLY_PROGRAM");
	char *argv[] = { (char *)program, NULL };
	char *envp[] = { NULL };
	pid_t pid;

	if (program && !posix_spawn(&pid, program, NULL, NULL, argv, envp))
		waitpid(pid, NULL, 0);
}
