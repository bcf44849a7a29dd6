// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * What every guest shares: a nonce that lives only in memory, a log of steps, and the three files through which a
 * guest and the harness talk. All of them lie in the work directory, argv[1]:
 *
 *   ready   made by the guest (atomically) when its state stands; holds the nonce
 *   go      made by the harness; the guest then checks itself
 *   result  made by the guest (atomically, the first verdict wins): "OK nonce", "FAIL nonce why" or "SKIP nonce why"
 *   log     one line "step nonce" for each step, each exactly once
 *
 * No file is held open between two calls, so a guest tests its own kind and not regular files by accident.
 */
#ifndef CKPT_GUEST_H
#define CKPT_GUEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct {
	char workdir[PATH_MAX / 2];
	char nonce[33];
} guest;

static inline const char *guest_path(char *out, size_t size, const char *name)
{
	snprintf(out, size, "%s/%s", guest.workdir, name);
	return out;
}

/* Writes text to a private file and links it to `name`: complete or absent, and the first writer wins. */
static inline void guest_publish(const char *name, const char *text)
{
	char final[PATH_MAX], draft[PATH_MAX + 64];
	size_t length = strlen(text);

	guest_path(final, sizeof(final), name);
	snprintf(draft, sizeof(draft), "%s.%ld", final, (long)syscall(SYS_gettid));
	int fd = open(draft, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, text, length) != (ssize_t)length)
		fprintf(stderr, "guest: cannot write %s: %s\n", draft, strerror(errno));
	if (fd >= 0)
		close(fd);
	if (link(draft, final) && errno != EEXIST)
		fprintf(stderr, "guest: cannot publish %s: %s\n", final, strerror(errno));
	unlink(draft);
}

static inline void guest_step(const char *step)
{
	char path[PATH_MAX], line[256];

	guest_path(path, sizeof(path), "log");
	int length = snprintf(line, sizeof(line), "%s %s\n", step, guest.nonce);
	int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, line, length) != length)
		fprintf(stderr, "guest: cannot log to %s: %s\n", path, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static inline void guest_verdict(const char *verdict, const char *format, va_list arguments)
{
	char why[1500], line[2000];

	vsnprintf(why, sizeof(why), format, arguments);
	snprintf(line, sizeof(line), "%s %s %s\n", verdict, guest.nonce, why);
	fprintf(stderr, "guest: %s", line);
	guest_publish("result", line);
}

/* Ends this process with the verdict FAIL. May be called in any process or thread of the guest. */
__attribute__((noreturn, format(printf, 1, 2))) static inline void guest_fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	guest_verdict("FAIL", format, arguments);
	va_end(arguments);
	_exit(1);
}

/* Ends this process with the verdict SKIP: this host lacks what the guest is about. */
__attribute__((noreturn, format(printf, 1, 2))) static inline void guest_skip(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	guest_verdict("SKIP", format, arguments);
	va_end(arguments);
	_exit(0);
}

__attribute__((noreturn)) static inline void guest_ok(void)
{
	char line[64];

	guest_step("end");
	snprintf(line, sizeof(line), "OK %s\n", guest.nonce);
	guest_publish("result", line);
	exit(0);
}

/* A system call that the guest's own setup or check needs and that failed. */
#define MUST(expression)                                                                                    \
	({                                                                                                  \
		__typeof__(expression) must_ = (expression);                                                \
		if ((long)must_ == -1)                                                                      \
			guest_fail("%s:%d: %s: %s", __FILE_NAME__, __LINE__, #expression, strerror(errno)); \
		must_;                                                                                      \
	})

/* pthread functions return their error. */
#define MUST0(expression)                                                                                  \
	do {                                                                                               \
		int must_ = (expression);                                                                  \
		if (must_)                                                                                 \
			guest_fail("%s:%d: %s: %s", __FILE_NAME__, __LINE__, #expression, strerror(must_)); \
	} while (0)

#define EXPECT(condition)                                                                 \
	do {                                                                              \
		if (!(condition))                                                         \
			guest_fail("%s:%d: not so: %s", __FILE_NAME__, __LINE__, #condition); \
	} while (0)

#define EXPECT_EQ(what, expected, got)                                                                           \
	do {                                                                                                     \
		long long expected_ = (long long)(expected), got_ = (long long)(got);                            \
		if (expected_ != got_)                                                                           \
			guest_fail("%s:%d: %s: expected %lld (0x%llx), got %lld (0x%llx)", __FILE_NAME__, __LINE__, \
				   what, expected_, expected_, got_, got_);                                      \
	} while (0)

#define EXPECT_STR(what, expected, got)                                                                           \
	do {                                                                                                      \
		const char *expected_ = (expected), *got_ = (got);                                                \
		if (strcmp(expected_, got_))                                                                      \
			guest_fail("%s:%d: %s: expected \"%s\", got \"%s\"", __FILE_NAME__, __LINE__, what, expected_, \
				   got_);                                                                         \
	} while (0)

#define EXPECT_MEM(what, expected, got, size)                                                                    \
	do {                                                                                                     \
		const unsigned char *expected_ = (const void *)(expected), *got_ = (const void *)(got);          \
		for (size_t at_ = 0; at_ < (size_t)(size); at_++)                                                \
			if (expected_[at_] != got_[at_])                                                         \
				guest_fail("%s:%d: %s: byte %zu of %zu: expected %02x, got %02x", __FILE_NAME__, \
					   __LINE__, what, at_, (size_t)(size), expected_[at_], got_[at_]);      \
	} while (0)

static inline void guest_begin(int argc, char **argv)
{
	unsigned char seed[16];

	if (argc < 2 || argv[1][0] != '/') {
		fprintf(stderr, "usage: %s WORKDIR [ARGUMENT]...\n", argv[0]);
		exit(2);
	}
	snprintf(guest.workdir, sizeof(guest.workdir), "%s", argv[1]);
	if (getrandom(seed, sizeof(seed), 0) != sizeof(seed))
		guest_fail("getrandom: %s", strerror(errno));
	for (size_t i = 0; i < sizeof(seed); i++)
		snprintf(guest.nonce + 2 * i, 3, "%02x", seed[i]);
	guest_step("begin");
}

/* Only the process that leads the guest says ready, once, when all its processes and threads stand. */
static inline void guest_ready(void)
{
	guest_step("ready");
	guest_publish("ready", guest.nonce);
}

static inline bool guest_exists(const char *name)
{
	char path[PATH_MAX];

	return access(guest_path(path, sizeof(path), name), F_OK) == 0;
}

static inline void guest_nap(void)
{
	struct timespec nap = { 0, 5 * 1000 * 1000 };

	nanosleep(&nap, NULL);
}

/* Waits for the harness. Any number of processes and threads may wait. */
static inline void guest_wait_go(void)
{
	while (!guest_exists("go"))
		guest_nap();
}

static inline int64_t guest_clock_ns(clockid_t clock)
{
	struct timespec now;

	MUST(clock_gettime(clock, &now));
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The status of the child, which must be reaped by this very call. */
static inline int guest_reap(pid_t child)
{
	int status;
	pid_t got;

	do
		got = waitpid(child, &status, 0);
	while (got < 0 && errno == EINTR);
	if (got != child)
		guest_fail("waitpid(%d) gave %d: %s", child, got, strerror(errno));
	return status;
}

/* Reads a whole small file, such as those of /proc; returns its length. The text is NUL-terminated. */
static inline size_t guest_read_file(const char *path, char *out, size_t size)
{
	int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
	size_t length = 0;
	ssize_t got;

	while (length < size - 1 && (got = MUST(read(fd, out + length, size - 1 - length))) > 0)
		length += got;
	out[length] = 0;
	close(fd);
	return length;
}

/* A field of /proc/PID/status or of another file of "Name:\tvalue" lines. */
static inline void guest_field(const char *path, const char *name, char *out, size_t size)
{
	char text[8192], key[64];

	guest_read_file(path, text, sizeof(text));
	snprintf(key, sizeof(key), "\n%s:", name);
	char *at = strstr(text, key);
	if (!at)
		guest_fail("%s has no field %s", path, name);
	at += strlen(key);
	at += strspn(at, " \t");
	snprintf(out, size, "%.*s", (int)strcspn(at, "\n"), at);
}

/* The threads of a process; returns how many. */
static inline int guest_threads(pid_t pid, pid_t *tids, int most)
{
	char path[64];
	int count = 0;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	DIR *dir = opendir(path);
	if (!dir)
		guest_fail("opendir(%s): %s", path, strerror(errno));
	for (struct dirent *entry; (entry = readdir(dir));)
		if (entry->d_name[0] != '.' && count < most)
			tids[count++] = atoi(entry->d_name);
	closedir(dir);
	return count;
}

/* Memory shared by all processes of the guest, zeroed. */
static inline void *guest_shared(size_t size)
{
	return MUST(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
}

#endif
