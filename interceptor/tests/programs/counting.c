// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * counting.so - another preloaded library that interposes execve: it says so on stderr, then calls the
 * next one.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>

int execve(const char *path, char *const argv[], char *const envp[])
{
	int (*next)(const char *, char *const[], char *const[]) =
		(int (*)(const char *, char *const[], char *const[]))dlsym(RTLD_NEXT, "execve");

	if (write(2, "counting\n", 9) != 9)
		return -1;
	return next(path, argv, envp);
}
