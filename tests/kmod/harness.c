// SPDX-License-Identifier: MIT OR Apache-2.0
// Runs the tests: all, or those whose names are given; prints a line for each and the sum.
#include "harness.h"

#include <stdarg.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#define EXIT_SKIPPED 77

uint64_t seed;
static struct test *first_test, **next_test = &first_test;

void register_test(struct test *test)
{
	*next_test = test;
	next_test = &test->next;
}

void fail(const char *file, int line, const char *format, ...)
{
	va_list arguments;

	fflush(stdout);
	va_start(arguments, format);
	fprintf(stderr, "%s:%d: ", file, line);
	vfprintf(stderr, format, arguments);
	fprintf(stderr, "\n");
	va_end(arguments);
	_exit(1);
}

void skip(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	printf("skipped: ");
	vprintf(format, arguments);
	printf("\n");
	va_end(arguments);
	fflush(stdout);
	_exit(EXIT_SKIPPED);
}

uint64_t rng_next(struct rng *rng)
{
	uint64_t z = rng->state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

int open_device(void)
{
	int fd = open("/dev/ckpt", O_RDWR | O_CLOEXEC);

	CHECK(fd >= 0);
	return fd;
}

int open_session(void)
{
	int fd = open_device();

	CHECK(ioctl(fd, CKPT_IOC_ATTACH, 0) == 0);
	return fd;
}

struct ckpt_query query_device(int fd)
{
	struct ckpt_query query = { .size = sizeof(query) };

	CHECK(ioctl(fd, CKPT_IOC_QUERY, &query) == 0);
	return query;
}

int try_take(int session, uint32_t flags, uint64_t generation, struct ckpt_snapshot_args *args)
{
	memset(args, 0, sizeof(*args));
	args->size = sizeof(*args);
	args->flags = flags;
	args->generation = generation;
	return ioctl(session, CKPT_IOC_SNAPSHOT, args);
}

struct ckpt_snapshot_args take(int session, uint32_t flags, uint64_t generation)
{
	struct ckpt_snapshot_args args;

	CHECK(try_take(session, flags, generation, &args) == 0);
	CHECK(args.fd >= 0);
	return args;
}

uint32_t kind_of(int snapshot, const void *page)
{
	struct ckpt_run run;
	struct ckpt_getruns args = {
		.size = sizeof(args),
		.kinds = 31,
		.va = (uint64_t)page,
		.npages = 1,
		.runs = (uint64_t)&run,
		.nruns = 1,
	};

	CHECK(ioctl(snapshot, CKPT_IOC_GETRUNS, &args) == 0);
	CHECK_EQ(args.npages, 0);
	if (!args.nruns)
		return 0;
	CHECK_EQ(run.va, page);
	CHECK_EQ(run.npages, 1);
	return run.kind;
}

void check_kinds(int snapshot, const void *start, size_t npages, uint32_t kind)
{
	for (size_t i = 0; i < npages; i++) {
		uint32_t got = kind_of(snapshot, (const char *)start + i * PAGE);

		if (got != kind)
			FAIL("page %zu of %zu is of kind %u, not %u", i, npages, got, kind);
	}
}

void check_bytes(int snapshot, const void *address, const void *expected, size_t bytes)
{
	static __thread char buffer[16 * PAGE];

	for (size_t done = 0; done < bytes;) {
		size_t part = bytes - done < sizeof(buffer) ? bytes - done : sizeof(buffer);
		ssize_t got = pread(snapshot, buffer, part, (off_t)address + (off_t)done);

		if (got != (ssize_t)part)
			FAIL("pread of %zu at %p gives %zd (%s)", part, address, got, strerror(errno));
		if (memcmp(buffer, (const char *)expected + done, part))
			FAIL("the snapshot differs in the %zu bytes from %p on", part,
			     (const void *)((const char *)address + done));
		done += part;
	}
}

void *map_small(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	CHECK(madvise(memory, bytes, MADV_NOHUGEPAGE) == 0);
	return memory;
}

bool is_huge(const void *address)
{
	FILE *smaps = fopen("/proc/self/smaps", "r");
	char line[512];
	bool inside = false, huge = false;
	unsigned long start, end, kib;

	CHECK(smaps);
	while (fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2 && strchr(line, '-') < strchr(line, ' '))
			inside = start <= (unsigned long)address && (unsigned long)address < end;
		else if (inside && sscanf(line, "AnonHugePages: %lu kB", &kib) == 1)
			huge = kib > 0;
	}
	fclose(smaps);
	return huge;
}

void *map_huge(size_t bytes)
{
	char *memory = mmap(NULL, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *aligned = (char *)(((unsigned long)memory + HUGE - 1) & ~(HUGE - 1));

	CHECK(memory != MAP_FAILED);
	if (aligned > memory)
		munmap(memory, aligned - memory);
	munmap(aligned + bytes, memory + HUGE - aligned);
	CHECK(madvise(aligned, bytes, MADV_HUGEPAGE) == 0);
	memset(aligned, 1, bytes);
	if (!is_huge(aligned))
		FAIL("no huge pages at %p", (void *)aligned);
	return aligned;
}

static uint64_t pattern(uint64_t address, uint64_t salt)
{
	struct rng rng = { address ^ salt * 0x2545f4914f6cdd1d };

	return rng_next(&rng);
}

void fill(void *start, size_t bytes, uint64_t salt)
{
	uint64_t *words = start;

	// A few words of each page are as good as all, and an emulated processor is slow.
	for (size_t i = 0; i < bytes / 8; i += 64)
		words[i] = pattern((uint64_t)&words[i], salt);
}

void check_filled(const void *start, size_t bytes, uint64_t salt)
{
	const uint64_t *words = start;

	for (size_t i = 0; i < bytes / 8; i += 64)
		if (words[i] != pattern((uint64_t)&words[i], salt))
			FAIL("the memory at %p has lost what was written", (const void *)&words[i]);
}

void check_snapshot_filled(int snapshot, const void *start, size_t bytes, uint64_t salt)
{
	const char *at = start;
	uint64_t words[PAGE / 8];

	for (; at < (const char *)start + bytes; at += PAGE) {
		ssize_t got = pread(snapshot, words, PAGE, (off_t)at);

		if (got != (ssize_t)PAGE)
			FAIL("pread at %p gives %zd (%s)", (const void *)at, got, strerror(errno));
		for (size_t i = 0; i < PAGE / 8; i += 64)
			if (words[i] != pattern((uint64_t)at + i * 8, salt))
				FAIL("the snapshot at %p is not as it was", (const void *)(at + i * 8));
	}
}

uint64_t pagemap(const void *address)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry;

	CHECK(fd >= 0);
	CHECK(pread(fd, &entry, 8, (off_t)((unsigned long)address / PAGE * 8)) == 8);
	close(fd);
	return entry;
}

bool try_write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_TRUNC);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return ok;
}

void write_file(const char *path, const char *text)
{
	if (!try_write_file(path, text))
		FAIL("cannot write \"%s\" to %s: %s", text, path, strerror(errno));
}

void read_file(const char *path, char *buffer, size_t size)
{
	int fd = open(path, O_RDONLY);
	size_t used = 0;
	ssize_t got;

	if (fd < 0)
		FAIL("cannot open %s: %s", path, strerror(errno));
	while (used + 1 < size && (got = read(fd, buffer + used, size - 1 - used)) > 0)
		used += got;
	buffer[used] = 0;
	close(fd);
}

int wait_for(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) != pid)
		if (errno != EINTR)
			FAIL("waitpid: %s", strerror(errno));
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

pid_t spawn(int (*function)(void *), void *argument)
{
	pid_t pid;

	fflush(stdout);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		// A failed check in a child must not leave it waiting for a parent that is gone.
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		_exit(function(argument));
	}
	return pid;
}

void become_plain_user(void)
{
	CHECK(setresgid(1000, 1000, 1000) == 0);
	CHECK(setresuid(1000, 1000, 1000) == 0);
	CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
}

int load_module(const char *path, const char *parameters)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), result;

	CHECK(fd >= 0);
	result = (int)syscall(SYS_finit_module, fd, parameters, 0);
	close(fd);
	return result;
}

int unload_module(const char *name)
{
	return (int)syscall(SYS_delete_module, name, O_NONBLOCK);
}

void send_fd(int socket, int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &byte, 1 };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	CHECK(sendmsg(socket, &message, 0) == 1);
}

int receive_fd(int socket)
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &byte, 1 };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	int fd;

	CHECK(recvmsg(socket, &message, MSG_CMSG_CLOEXEC) == 1);
	CHECK(CMSG_FIRSTHDR(&message));
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
	return fd;
}

static bool is_chosen(const char *name, int count, char **names)
{
	for (int i = 0; i < count; i++)
		if (!strcmp(name, names[i]))
			return true;
	return count == 0;
}

int main(int argc, char **argv)
{
	unsigned passed = 0, failed = 0, skipped = 0, known = 0;
	char **names = calloc(argc + 1, sizeof(*names));
	int count = 0;

	seed = (uint64_t)getpid() << 32 ^ (uint64_t)time(NULL);
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--list")) {
			for (struct test *test = first_test; test; test = test->next)
				printf("%s\n", test->name);
			return 0;
		} else if (!strncmp(argv[i], "--seed=", 7)) {
			seed = strtoull(argv[i] + 7, NULL, 0);
		} else if (!strncmp(argv[i], "--fuzz=", 7)) {
			setenv("CKPT_TEST_FUZZ_SECONDS", argv[i] + 7, 1);
		} else {
			names[count++] = argv[i];
		}
	}
	printf("seed %llu\n", (unsigned long long)seed);
	for (struct test *test = first_test; test; test = test->next) {
		struct timespec start, end;
		pid_t pid;
		int status;

		if (!is_chosen(test->name, count, names))
			continue;
		known++;
		fflush(stdout);
		clock_gettime(CLOCK_MONOTONIC, &start);
		pid = fork();
		if (pid == 0) {
			// Its own group, of which nothing stays behind.
			setpgid(0, 0);
			alarm(test->timeout);
			test->run();
			fflush(stdout);
			_exit(0);
		}
		setpgid(pid, pid);
		status = wait_for(pid);
		kill(-pid, SIGKILL);
		if (status == 0) {
			passed++;
			clock_gettime(CLOCK_MONOTONIC, &end);
			printf("test %s ... ok (%.1f s)\n", test->name,
			       (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9);
		} else if (status == EXIT_SKIPPED) {
			skipped++;
		} else {
			failed++;
			printf("test %s ... FAILED (%s %d)\n", test->name,
			       status == 128 + SIGALRM ? "timed out, status" : "status", status);
		}
	}
	if ((int)known < count)
		printf("there is no such test: %u of %d names are known\n", known, count);
	failed += known < (unsigned)count;
	printf("test result: %s. %u passed; %u failed; %u ignored\n", failed ? "FAILED" : "ok", passed, failed,
	       skipped);
	free(names);
	return failed != 0;
}
