// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * start - starts another program in one given way, with one given environment.
 *
 * start WAY ENVIRONMENT PROGRAM [ARGUMENT...]
 *
 * ENVIRONMENT: "empty"; "null" (no array at all); "inherit"; "big:N" (N variables more than empty);
 * otherwise variables separated by '|'. The functions without an environment argument get it as environ.
 *
 * When the program could not be started: prints "failed ERRNO" and exits with 0; the process has then also
 * checked that nothing else about it changed.
 */
/* execl without any argument, and vfork, are what is tested here. */
#pragma GCC diagnostic ignored "-Wformat"
#pragma GCC diagnostic ignored "-Wnonnull"
#pragma GCC diagnostic ignored "-Wclobbered"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static char **make_environment(const char *text)
{
	if (!strcmp(text, "inherit"))
		return environ;
	if (!strcmp(text, "null"))
		return NULL;
	if (!strcmp(text, "empty"))
		return calloc(1, sizeof(char *));

	size_t count = !strncmp(text, "big:", 4) ? strtoul(text + 4, NULL, 10) : 0;
	char **environment = calloc(count + 64, sizeof(char *));

	if (count) {
		for (size_t i = 0; i < count; i++)
			if (asprintf(&environment[i], "V%zu=x", i) < 0)
				abort();
		return environment;
	}
	char *copy = strdup(text);
	int i = 0;

	for (char *part = strtok(copy, "|"); part; part = strtok(NULL, "|"))
		environment[i++] = part;
	return environment;
}

static int wait_for(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return 99;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 98;
}

/* execl and its like have as many arguments as the source has: the counts the test asks for. */
#define A(i) argv[i]
#define CALL(function, ...) \
	do { \
		switch (argc) { \
		case 0: function(path, (char *)NULL __VA_ARGS__); break; \
		case 1: function(path, A(0), (char *)NULL __VA_ARGS__); break; \
		case 2: function(path, A(0), A(1), (char *)NULL __VA_ARGS__); break; \
		case 3: function(path, A(0), A(1), A(2), (char *)NULL __VA_ARGS__); break; \
		case 4: function(path, A(0), A(1), A(2), A(3), (char *)NULL __VA_ARGS__); break; \
		case 5: function(path, A(0), A(1), A(2), A(3), A(4), (char *)NULL __VA_ARGS__); break; \
		case 6: function(path, A(0), A(1), A(2), A(3), A(4), A(5), (char *)NULL __VA_ARGS__); break; \
		case 12: \
			function(path, A(0), A(1), A(2), A(3), A(4), A(5), A(6), A(7), A(8), A(9), A(10), A(11), \
				 (char *)NULL __VA_ARGS__); \
			break; \
		default: abort(); \
		} \
	} while (0)
#define COMMA ,

/* What a failing call must leave alone, registers and stack, is checked by a frame full of values. */
static uint64_t canary(uint64_t seed)
{
	return seed * 6364136223846793005u + 1442695040888963407u;
}

static void start_list(const char *way, const char *path, int argc, char **argv, char **envp)
{
	volatile uint64_t before[16];

	for (int i = 0; i < 16; i++)
		before[i] = canary(i);
	if (!strcmp(way, "execl"))
		CALL(execl, );
	else if (!strcmp(way, "execlp"))
		CALL(execlp, );
	else
		CALL(execle, COMMA envp);
	int error = errno;

	for (int i = 0; i < 16; i++)
		if (before[i] != canary(i))
			_exit(97);
	errno = error;
}

static int spawn(const char *way, const char *path, char **argv, char **envp)
{
	posix_spawn_file_actions_t actions;
	posix_spawnattr_t attributes;
	sigset_t mask, defaults;
	pid_t pid = 0;
	int with_all = !strcmp(way, "posix_spawn_attributes");
	int (*function)(pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,
			char *const[], char *const[]) = !strcmp(way, "posix_spawnp") ? posix_spawnp : posix_spawn;

	if (with_all) {
		/* stdout goes where fd 1 went, by way of fd 7; SIGUSR1 is blocked; a process group of its own. */
		posix_spawn_file_actions_init(&actions);
		posix_spawn_file_actions_adddup2(&actions, 1, 7);
		posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
		posix_spawn_file_actions_adddup2(&actions, 7, 1);
		posix_spawnattr_init(&attributes);
		sigemptyset(&mask);
		sigaddset(&mask, SIGUSR1);
		sigemptyset(&defaults);
		sigaddset(&defaults, SIGUSR2);
		signal(SIGUSR2, SIG_IGN);
		posix_spawnattr_setsigmask(&attributes, &mask);
		posix_spawnattr_setsigdefault(&attributes, &defaults);
		posix_spawnattr_setpgroup(&attributes, 0);
		posix_spawnattr_setflags(&attributes,
					 POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
	}
	errno = 0;
	int error = function(&pid, path, with_all ? &actions : NULL, with_all ? &attributes : NULL, argv, envp);

	if (error) {
		printf("failed %d\n", error);
		fflush(stdout);
		return 0;
	}
	return wait_for(pid);
}

struct job {
	const char *path;
	char **argv, **envp;
};

static void *exec_in_thread(void *argument)
{
	struct job *job = argument;

	execve(job->path, job->argv, job->envp);
	printf("failed %d\n", errno);
	fflush(stdout);
	_exit(0);
}

static volatile sig_atomic_t handled;
static struct job signal_job;

static void exec_in_handler(int signal)
{
	(void)signal;
	handled = 1;
	execve(signal_job.path, signal_job.argv, signal_job.envp);
	_exit(96);
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	const char *way = argv[1], *path = argv[3];
	char **envp = make_environment(argv[2]), **next_argv = argv + 3;
	int next_argc = argc - 3;

	/* Takes a file away between load and exec. */
	if (getenv("REMOVE_FIRST") && unlink(getenv("REMOVE_FIRST")))
		return 88;
	errno = 0;
	if (!strncmp(way, "posix_spawn", 11))
		return spawn(way, path, next_argv, envp);
	if (!strcmp(way, "vfork")) {
		/* Many times: what a child left behind in the memory it shares with its parent would pile up. */
		char before[64] = "", after[64] = "";
		int fd = open("/proc/self/statm", O_RDONLY);

		for (int i = 0; i < 20; i++) {
			pid_t pid = vfork();

			if (pid == 0) {
				execve(path, next_argv, envp);
				_exit(95);
			}
			int status = wait_for(pid);

			if (status)
				return status;
			if (pread(fd, i ? after : before, 63, 0) < 0)
				return 94;
		}
		/* First field: pages mapped. */
		return strtoul(before, NULL, 10) == strtoul(after, NULL, 10) ? 0 : 93;
	}
	if (!strcmp(way, "thread_small_stack")) {
		pthread_attr_t attributes;
		pthread_t thread;
		struct job job = { path, next_argv, envp };

		pthread_attr_init(&attributes);
		pthread_attr_setstacksize(&attributes, 16384);
		if (pthread_create(&thread, &attributes, exec_in_thread, &job))
			return 92;
		pthread_join(thread, NULL);
		return 91;
	}
	if (!strcmp(way, "signal_handler")) {
		signal_job = (struct job){ path, next_argv, envp };
		signal(SIGUSR1, exec_in_handler);
		raise(SIGUSR1);
		return handled ? 90 : 89;
	}
	/* Straight to the kernel, past libc. */
	if (!strcmp(way, "syscall")) {
		syscall(SYS_execve, path, next_argv, envp);
	} else if (!strcmp(way, "execve")) {
		execve(path, next_argv, envp);
	} else if (!strcmp(way, "execvpe")) {
		execvpe(path, next_argv, envp);
	} else if (!strcmp(way, "execveat")) {
		execveat(AT_FDCWD, path, next_argv, envp, 0);
	} else if (!strcmp(way, "execveat_fd")) {
		execveat(open(path, O_PATH | O_CLOEXEC), "", next_argv, envp, AT_EMPTY_PATH);
	} else if (!strcmp(way, "fexecve")) {
		fexecve(open(path, O_RDONLY | O_CLOEXEC), next_argv, envp);
	} else if (!strcmp(way, "execv")) {
		environ = envp;
		execv(path, next_argv);
	} else if (!strcmp(way, "execvp")) {
		environ = envp;
		execvp(path, next_argv);
	} else if (!strcmp(way, "execl") || !strcmp(way, "execlp")) {
		environ = envp;
		start_list(way, path, next_argc, next_argv, envp);
	} else if (!strcmp(way, "execle")) {
		start_list(way, path, next_argc, next_argv, envp);
	} else if (!strcmp(way, "execl_none") || !strcmp(way, "execlp_none") || !strcmp(way, "execle_none")) {
		char name[16];

		snprintf(name, sizeof(name), "%.*s", (int)strcspn(way, "_"), way);
		if (name[4] != 'l' || name[5] != 'e')
			environ = envp;
		start_list(name, path, 0, next_argv, envp);
	} else if (!strcmp(way, "e2big")) {
		/* One string above MAX_ARG_STRLEN. */
		char *large = malloc(200000);

		memset(large, 'x', 199999);
		large[199999] = 0;
		char *with_large[] = { (char *)path, large, NULL };

		execve(path, with_large, envp);
	} else if (!strcmp(way, "limit")) {
		/* Four arguments of together as many bytes as the argument says, under the least limit that there is. */
		struct rlimit limit = { 512 << 10, RLIM_INFINITY };
		size_t length = strtoul(argv[4], NULL, 10) / 4;
		char *text = malloc(length + 1);

		memset(text, 'x', length);
		text[length] = 0;
		char *with_text[] = { (char *)path, text, text, text, text, NULL };

		setrlimit(RLIMIT_STACK, &limit);
		execve(path, with_text, envp);
	} else {
		return 2;
	}
	printf("failed %d\n", errno);
	return 0;
}
