// SPDX-License-Identifier: MIT OR Apache-2.0
// Every command, and every input that it must reject.
#include "harness.h"

#include <pthread.h>
#include <grp.h>
#include <sys/socket.h>

// Fields that must be zero, tried one byte at a time.
static void check_reserved(int fd, unsigned long command, void *args, size_t size, size_t from, size_t to)
{
	unsigned char copy[256];

	for (size_t i = from; i < to; i++) {
		memcpy(copy, args, size);
		copy[i] = 1;
		CHECK_ERRNO(ioctl(fd, command, copy), EINVAL);
	}
}

// Sizes that are wrong, pointers that are, and commands whose number encodes another size or direction.
static void check_argument(int fd, unsigned long command, void *args, size_t size)
{
	unsigned char copy[256];
	char *page = map_small(2 * PAGE);
	static const uint32_t sizes[] = { 0, 1, 4, 65536, UINT32_MAX };

	CHECK(munmap(page + PAGE, PAGE) == 0);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		memcpy(copy, args, size);
		memcpy(copy, &sizes[i], 4);
		CHECK_ERRNO(ioctl(fd, command, copy), EINVAL);
	}
	for (int difference = -8; difference <= 8; difference += 16) {
		uint32_t other = (uint32_t)((int)size + difference);

		memcpy(copy, args, size);
		memcpy(copy, &other, 4);
		CHECK_ERRNO(ioctl(fd, command, copy), EINVAL);
		CHECK_ERRNO(ioctl(fd, _IOC(_IOC_READ | _IOC_WRITE, CKPT_IOC_MAGIC, _IOC_NR(command), other), copy),
			    ENOTTY);
	}
	CHECK_ERRNO(ioctl(fd, _IOC(_IOC_WRITE, CKPT_IOC_MAGIC, _IOC_NR(command), size), args), ENOTTY);
	CHECK_ERRNO(ioctl(fd, _IOC(_IOC_READ | _IOC_WRITE, CKPT_IOC_MAGIC + 1, _IOC_NR(command), size), args),
		    ENOTTY);
	CHECK_ERRNO(ioctl(fd, command, NULL), EFAULT);
	CHECK_ERRNO(ioctl(fd, command, (void *)-PAGE), EFAULT);
	CHECK_ERRNO(ioctl(fd, command, (void *)0xffffffff81000000), EFAULT);
	CHECK_ERRNO(ioctl(fd, command, page + PAGE), EFAULT);
	// The beginning can be read and the end cannot.
	memcpy(page + PAGE - 8, args, 8);
	CHECK_ERRNO(ioctl(fd, command, page + PAGE - 8), EFAULT);
	// All can be read, and nothing can be written.
	memcpy(page, args, size);
	CHECK(mprotect(page, PAGE, PROT_READ) == 0);
	CHECK_ERRNO(ioctl(fd, command, page), EFAULT);
	CHECK(munmap(page, PAGE) == 0);
}

TEST(query)
{
	int fd = open_device();
	struct ckpt_query query = query_device(fd);

	CHECK_EQ(query.size, sizeof(query));
	CHECK_EQ(query.abi_version, CKPT_ABI_VERSION);
	CHECK_EQ(query.page_size, PAGE);
	CHECK_EQ(query.max_snapshots, 2);
	CHECK(query.features & CKPT_FEATURE_INCREMENTAL);
	CHECK(query.features & CKPT_FEATURE_THP);
	CHECK(query.max_pages > 0);
	CHECK_EQ(query.sessions, 0);
	CHECK_EQ(query.snapshots, 0);
	CHECK_EQ(query.held_pages, 0);
	CHECK(ioctl(fd, CKPT_IOC_ATTACH, 0) == 0);
	int snapshot = take(fd, 0, 0).fd;
	query = query_device(fd);
	CHECK_EQ(query.sessions, 1);
	CHECK_EQ(query.snapshots, 1);
	CHECK(query.held_pages > 0);
	close(snapshot);
	CHECK_EQ(query_device(fd).held_pages, 0);
	CHECK_EQ(query_device(fd).snapshots, 0);
}

TEST(query_rejects)
{
	int fd = open_device();
	struct ckpt_query query = { .size = sizeof(query) };

	check_argument(fd, CKPT_IOC_QUERY, &query, sizeof(query));
	check_reserved(fd, CKPT_IOC_QUERY, &query, sizeof(query), offsetof(struct ckpt_query, reserved),
		       sizeof(query));
}

TEST(unknown_commands)
{
	int device = open_device(), session = open_session(), snapshot = take(session, 0, 0).fd;
	struct ckpt_query query = { .size = sizeof(query) };
	struct ckpt_snapshot_args args = { .size = sizeof(args) };
	struct ckpt_getruns getruns = { .size = sizeof(getruns) };

	for (unsigned number = 4; number < 256; number++) {
		CHECK_ERRNO(ioctl(device, _IO(CKPT_IOC_MAGIC, number), 0), ENOTTY);
		CHECK_ERRNO(ioctl(session, _IOWR(CKPT_IOC_MAGIC, number, struct ckpt_query), &query), ENOTTY);
		CHECK_ERRNO(ioctl(snapshot, _IOWR(CKPT_IOC_MAGIC, number, struct ckpt_query), &query), ENOTTY);
	}
	// Those of the other kind of descriptor.
	CHECK_ERRNO(ioctl(session, CKPT_IOC_GETRUNS, &getruns), ENOTTY);
	CHECK_ERRNO(ioctl(snapshot, CKPT_IOC_QUERY, &query), ENOTTY);
	CHECK_ERRNO(ioctl(snapshot, CKPT_IOC_ATTACH, 0), ENOTTY);
	CHECK_ERRNO(ioctl(snapshot, CKPT_IOC_SNAPSHOT, &args), ENOTTY);
}

TEST(device_is_no_file)
{
	int session = open_session();
	char byte = 0;

	CHECK_ERRNO(read(session, &byte, 1), EINVAL);
	CHECK_ERRNO(write(session, &byte, 1), EINVAL);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, session, 0) == MAP_FAILED && errno == ENODEV);
}

TEST(attach_rejects)
{
	int fd = open_device();

	CHECK_ERRNO(ioctl(fd, CKPT_IOC_ATTACH, 1), EINVAL);
	CHECK_ERRNO(ioctl(fd, CKPT_IOC_ATTACH, &fd), EINVAL);
	CHECK_ERRNO(ioctl(fd, CKPT_IOC_ATTACH, 0x7fffffff), ESRCH);
	// A parent, whose memory is another.
	CHECK_ERRNO(ioctl(fd, CKPT_IOC_ATTACH, getppid()), EINVAL);
	CHECK(prctl(PR_SET_DUMPABLE, 0) == 0);
	CHECK_ERRNO(ioctl(fd, CKPT_IOC_ATTACH, 0), EACCES);
	CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
	CHECK(ioctl(fd, CKPT_IOC_ATTACH, 0) == 0);
	CHECK_ERRNO(ioctl(fd, CKPT_IOC_ATTACH, 0), EBUSY);
	// A duplicate is the same open file.
	CHECK_ERRNO(ioctl(dup(fd), CKPT_IOC_ATTACH, 0), EBUSY);
}

static int attach_inherited(void *fd)
{
	return ioctl(*(int *)fd, CKPT_IOC_ATTACH, 0) == -1 && errno == EBUSY ? 0 : 1;
}

TEST(attach_once_for_all_processes)
{
	int fd = open_session();

	CHECK_EQ(wait_for(spawn(attach_inherited, &fd)), 0);
}

static void *attach_in_thread(void *fd)
{
	return ioctl(*(int *)fd, CKPT_IOC_ATTACH, 0) == 0 ? fd : NULL;
}

TEST(attach_races_with_itself)
{
	for (int round = 0; round < 50; round++) {
		pthread_t threads[4];
		int fd = open_device(), attached = 0;

		for (int i = 0; i < 4; i++)
			CHECK(pthread_create(&threads[i], NULL, attach_in_thread, &fd) == 0);
		for (int i = 0; i < 4; i++) {
			void *result;

			CHECK(pthread_join(threads[i], &result) == 0);
			attached += result != NULL;
		}
		CHECK_EQ(attached, 1);
		CHECK_EQ(query_device(fd).sessions, 1);
		close(fd);
	}
}

TEST(snapshot_rejects)
{
	int device = open_device(), session = open_session();
	struct ckpt_snapshot_args args = { .size = sizeof(args) };

	CHECK_ERRNO(ioctl(device, CKPT_IOC_SNAPSHOT, &args), ENOTCONN);
	check_argument(session, CKPT_IOC_SNAPSHOT, &args, sizeof(args));
	check_reserved(session, CKPT_IOC_SNAPSHOT, &args, sizeof(args),
		       offsetof(struct ckpt_snapshot_args, reserved0),
		       offsetof(struct ckpt_snapshot_args, pages_data));
	check_reserved(session, CKPT_IOC_SNAPSHOT, &args, sizeof(args),
		       offsetof(struct ckpt_snapshot_args, reserved), sizeof(args));
	for (unsigned bit = 2; bit < 32; bit++)
		CHECK_ERRNO(try_take(session, 1U << bit, 0, &args), EINVAL);
	// A generation is for an incremental one only, and must be the current one.
	CHECK_ERRNO(try_take(session, 0, 1, &args), EINVAL);
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_CLEAR, 1, &args), EINVAL);
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, 0, &args), ESTALE);
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, 1, &args), ESTALE);
	CHECK_EQ(query_device(session).snapshots, 0);
	CHECK_EQ(query_device(session).held_pages, 0);
}

TEST(snapshot_is_limited_per_address_space)
{
	int session = open_session(), second = open_session();
	struct ckpt_snapshot_args args, first = take(session, 0, 0);

	take(second, 0, 0);
	CHECK_ERRNO(try_take(session, 0, 0, &args), EBUSY);
	CHECK_ERRNO(try_take(second, 0, 0, &args), EBUSY);
	close(first.fd);
	take(session, 0, 0);
	CHECK_ERRNO(try_take(second, 0, 0, &args), EBUSY);
}

TEST(snapshot_needs_a_descriptor)
{
	int session = open_session();
	struct ckpt_snapshot_args args, full = take(session, CKPT_SNAPSHOT_CLEAR, 0);
	struct rlimit old, none;

	close(full.fd);
	CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
	none = old;
	none.rlim_cur = 3;
	CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_CLEAR, 0, &args), EMFILE);
	CHECK(setrlimit(RLIMIT_NOFILE, &old) == 0);
	CHECK_EQ(query_device(session).held_pages, 0);
	// The bits may be gone: nobody can go on from what he had.
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, full.generation, &args), ESTALE);
}

static int take_without_a_file(void *session)
{
	struct rlimit memlock = { RLIM_INFINITY, RLIM_INFINITY };
	struct ckpt_snapshot_args args;

	CHECK(setrlimit(RLIMIT_MEMLOCK, &memlock) == 0);
	become_plain_user();
	return try_take(*(int *)session, CKPT_SNAPSHOT_CLEAR, 0, &args) == -1 ? errno : 0;
}

TEST(snapshot_needs_a_file)
{
	int session = open_session(), got;
	struct ckpt_snapshot_args args, full = take(session, CKPT_SNAPSHOT_CLEAR, 0);
	char old[32];

	close(full.fd);
	// The kernel counts roughly: enough of them to be over the limit by any count.
	for (int i = 0; i < 300; i++)
		CHECK(open("/dev/null", O_RDONLY) >= 0);
	read_file("/proc/sys/fs/file-max", old, sizeof(old));
	write_file("/proc/sys/fs/file-max", "1");
	got = wait_for(spawn(take_without_a_file, &session));
	write_file("/proc/sys/fs/file-max", old);
	CHECK_EQ(got, ENFILE);
	CHECK_EQ(query_device(session).snapshots, 0);
	CHECK_EQ(query_device(session).held_pages, 0);
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, full.generation, &args), ESTALE);
}

TEST(snapshot_that_cannot_be_told_ends_the_generation)
{
	int session = open_session();
	struct ckpt_snapshot_args *args = map_small(PAGE), full = take(session, CKPT_SNAPSHOT_CLEAR, 0);
	int lowest = dup(session);

	close(full.fd);
	close(lowest);
	args->size = sizeof(*args);
	args->flags = CKPT_SNAPSHOT_CLEAR;
	CHECK(mprotect(args, PAGE, PROT_READ) == 0);
	CHECK_ERRNO(ioctl(session, CKPT_IOC_SNAPSHOT, args), EFAULT);
	CHECK_EQ(query_device(session).snapshots, 0);
	CHECK_EQ(query_device(session).held_pages, 0);
	struct ckpt_snapshot_args again;
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, full.generation, &again), ESTALE);
	// No descriptor has stayed.
	CHECK_EQ(dup(session), lowest < full.fd ? lowest : full.fd);
}

TEST(snapshot_refuses_what_is_not_dumpable_any_more)
{
	int session = open_session();
	struct ckpt_snapshot_args args;

	CHECK(prctl(PR_SET_DUMPABLE, 0) == 0);
	CHECK_ERRNO(try_take(session, 0, 0, &args), EACCES);
	CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
	take(session, 0, 0);
}

TEST(snapshot_refuses_changed_credentials)
{
	int session = open_session();
	struct ckpt_snapshot_args args;

	CHECK(setresuid(-1, 1000, -1) == 0);
	CHECK_ERRNO(try_take(session, 0, 0, &args), EACCES);
	// Dumpable again, and still somebody else.
	CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
	CHECK_ERRNO(try_take(session, 0, 0, &args), EACCES);
	CHECK(setresuid(-1, 0, -1) == 0);
	CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
	take(session, 0, 0);
	CHECK(setresgid(1000, -1, -1) == 0);
	CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
	CHECK_ERRNO(try_take(session, 0, 0, &args), EACCES);
}

struct pair {
	int sockets[2];
};

static int attach_send_and_end(void *argument)
{
	struct pair *pair = argument;

	send_fd(pair->sockets[1], open_session());
	return 0;
}

TEST(snapshot_of_an_ended_process)
{
	struct pair pair;
	struct ckpt_snapshot_args args;

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair.sockets) == 0);
	CHECK_EQ(wait_for(spawn(attach_send_and_end, &pair)), 0);
	CHECK_ERRNO(try_take(receive_fd(pair.sockets[0]), 0, 0, &args), ESRCH);
}

static int attach_send_and_exec(void *argument)
{
	struct pair *pair = argument;
	char number[16];

	send_fd(pair->sockets[1], open_session());
	snprintf(number, sizeof(number), "%d", pair->sockets[1]);
	// Another image under the same pid; it waits until the socket is closed.
	execl("/bin/busybox", "cat", NULL);
	return 1;
}

TEST(snapshot_after_exec)
{
	struct pair pair;
	struct ckpt_snapshot_args args;
	int pipes[2], session;
	pid_t pid;

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair.sockets) == 0);
	CHECK(pipe(pipes) == 0);
	CHECK(dup2(pipes[0], 0) == 0);
	fcntl(pipes[1], F_SETFD, FD_CLOEXEC);
	pid = spawn(attach_send_and_exec, &pair);
	session = receive_fd(pair.sockets[0]);
	// While it still has its memory a snapshot is in order; once it has not, never again.
	while (try_take(session, 0, 0, &args) == 0)
		close(args.fd);
	CHECK(errno == ESRCH || errno == EACCES);
	kill(pid, SIGKILL);
	wait_for(pid);
	CHECK_ERRNO(try_take(session, 0, 0, &args), ESRCH);
}

static int attach_in_vfork_child(void *argument)
{
	struct pair *pair = argument;

	// Shares the memory of the parent, under a pid of its own.
	return ioctl(pair->sockets[0], CKPT_IOC_ATTACH, 0) == 0 ? 0 : 1;
}

TEST(snapshot_without_its_attacher)
{
	static char stack[65536] __attribute__((aligned(16)));
	struct pair pair = { .sockets = { open_device() } };
	struct ckpt_snapshot_args args;
	int pid = clone(attach_in_vfork_child, stack + sizeof(stack), CLONE_VM | CLONE_FILES | SIGCHLD, &pair);

	CHECK(pid > 0);
	CHECK_EQ(wait_for(pid), 0);
	CHECK_ERRNO(try_take(pair.sockets[0], 0, 0, &args), ESRCH);
}

TEST(snapshot_of_a_zombie)
{
	static char stack[65536] __attribute__((aligned(16)));
	struct pair pair = { .sockets = { open_device() } };
	struct ckpt_snapshot_args args;
	siginfo_t info;
	int pid = clone(attach_in_vfork_child, stack + sizeof(stack), CLONE_VM | CLONE_FILES | SIGCHLD, &pair);

	// It has ended, and nobody has taken notice; its memory is the parent's and alive.
	CHECK(pid > 0);
	CHECK(waitid(P_PID, pid, &info, WEXITED | WNOWAIT) == 0);
	CHECK_ERRNO(try_take(pair.sockets[0], 0, 0, &args), ESRCH);
	CHECK_EQ(wait_for(pid), 0);
	CHECK_ERRNO(try_take(pair.sockets[0], 0, 0, &args), ESRCH);
}

static void *end_when_told(void *argument)
{
	struct pair *pair = argument;
	char byte;

	CHECK_EQ(read(pair->sockets[1], &byte, 1), 1);
	_exit(byte);
}

static int attach_and_end_the_leader(void *argument)
{
	struct pair *pair = argument;
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, end_when_told, pair) == 0);
	send_fd(pair->sockets[1], open_session());
	syscall(SYS_exit, 0);
	return 1;
}

TEST(snapshot_after_the_leader_has_ended)
{
	struct pair pair;
	char path[64], text[512];
	int session, pid;

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair.sockets) == 0);
	pid = spawn(attach_and_end_the_leader, &pair);
	session = receive_fd(pair.sockets[0]);
	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	do {
		sched_yield();
		read_file(path, text, sizeof(text));
	} while (strncmp(strrchr(text, ')'), ") Z", 3));
	close(take(session, 0, 0).fd);
	CHECK_EQ(write(pair.sockets[0], "\7", 1), 1);
	CHECK_EQ(wait_for(pid), 7);
}

static int attach_parent(void *argument)
{
	struct pair *pair = argument;

	return ioctl(pair->sockets[0], CKPT_IOC_ATTACH, pair->sockets[1]) == 0 ? 0 : 1;
}

TEST(attach_by_a_helper)
{
	static char stack[65536] __attribute__((aligned(16)));
	struct pair pair = { .sockets = { open_device(), getpid() } };
	char *memory = map_small(PAGE);
	int pid = clone(attach_parent, stack + sizeof(stack), CLONE_VM | CLONE_FILES | SIGCHLD, &pair), child;
	struct ckpt_snapshot_args args;

	CHECK(pid > 0);
	CHECK_EQ(wait_for(pid), 0);
	memory[0] = 1;
	// The session is its maker's, which is there still.
	args = take(pair.sockets[0], 0, 0);
	CHECK_EQ(kind_of(args.fd, memory), CKPT_KIND_DATA);
	// Its credentials are looked at, and not those of the helper that has ended.
	CHECK(setresuid(-1, 1000, -1) == 0);
	CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
	CHECK_ERRNO(try_take(pair.sockets[0], 0, 0, &args), EACCES);
	// A child of fork(2) shares nothing.
	CHECK(setresuid(-1, 0, -1) == 0);
	pair.sockets[0] = open_device();
	child = spawn(attach_parent, &pair);
	CHECK_EQ(wait_for(child), 1);
}

TEST(getruns_rejects)
{
	int session = open_session(), snapshot = take(session, 0, 0).fd;
	struct ckpt_run *runs = map_small(PAGE);
	char *memory = map_small(4 * PAGE);
	struct ckpt_getruns good = {
		.size = sizeof(good),
		.kinds = CKPT_KIND_DATA,
		.va = (uint64_t)memory,
		.npages = 4,
		.runs = (uint64_t)runs,
		.nruns = 4,
	};
	struct ckpt_getruns bad;

	check_argument(snapshot, CKPT_IOC_GETRUNS, &good, sizeof(good));
	check_reserved(snapshot, CKPT_IOC_GETRUNS, &good, sizeof(good), offsetof(struct ckpt_getruns, reserved),
		       sizeof(good));
#define REJECTS(FIELD, VALUE)                                                                                 \
	do {                                                                                                  \
		bad = good;                                                                                   \
		bad.FIELD = VALUE;                                                                            \
		CHECK_ERRNO(ioctl(snapshot, CKPT_IOC_GETRUNS, &bad), EINVAL);                                 \
	} while (0)
	REJECTS(kinds, 0);
	for (unsigned bit = 5; bit < 32; bit++)
		REJECTS(kinds, 1U << bit);
	REJECTS(va, good.va + 1);
	REJECTS(va, good.va + PAGE / 2);
	REJECTS(va, 1UL << 57);
	REJECTS(va, -PAGE);
	REJECTS(va, 0xffff800000000000);
	REJECTS(npages, 0);
	REJECTS(npages, 1UL << 52);
	REJECTS(npages, UINT64_MAX);
	REJECTS(npages, (1UL << 57) / PAGE);
	REJECTS(nruns, 0);
	// The array: only where there is something to write.
	close(snapshot);
	memset(memory, 1, 4 * PAGE);
	snapshot = take(session, 0, 0).fd;
	bad = good;
	bad.runs = 0;
	CHECK_ERRNO(ioctl(snapshot, CKPT_IOC_GETRUNS, &bad), EFAULT);
	bad.runs = (uint64_t)-PAGE;
	CHECK_ERRNO(ioctl(snapshot, CKPT_IOC_GETRUNS, &bad), EFAULT);
	CHECK(mprotect(runs, PAGE, PROT_READ) == 0);
	bad = good;
	CHECK_ERRNO(ioctl(snapshot, CKPT_IOC_GETRUNS, &bad), EFAULT);
}

TEST(getruns_in_small_steps)
{
	char *memory = map_small(64 * PAGE);
	int session = open_session(), snapshot;
	struct ckpt_run run;
	uint64_t at = (uint64_t)memory, left = 64;
	size_t seen = 0;

	// Pages 0-9 and every third after it.
	for (size_t i = 0; i < 64; i++)
		if (i < 10 || i % 3 == 0)
			memory[i * PAGE] = 1;
	snapshot = take(session, 0, 0).fd;
	while (left) {
		struct ckpt_getruns args = { .size = sizeof(args), .kinds = CKPT_KIND_DATA, .va = at,
					     .npages = left, .runs = (uint64_t)&run, .nruns = 1 };

		CHECK(ioctl(snapshot, CKPT_IOC_GETRUNS, &args) == 0);
		CHECK_EQ(args.va + args.npages * PAGE, at + left * PAGE);
		if (args.nruns) {
			size_t first = (run.va - (uint64_t)memory) / PAGE;

			CHECK_EQ(run.kind, CKPT_KIND_DATA);
			CHECK_EQ(first, seen == 0 ? 0 : (9 + 3 * seen));
			CHECK_EQ(run.npages, seen == 0 ? 10 : 1);
			seen++;
		} else {
			CHECK_EQ(args.npages, 0);
		}
		at = args.va;
		left = args.npages;
	}
	CHECK_EQ(seen, 19);
	// The whole address space at once gives the same sum as the call did.
	static struct ckpt_run runs[4096];
	struct ckpt_getruns all = { .size = sizeof(all), .kinds = CKPT_KIND_DATA, .va = 0,
				    .npages = ((1UL << 47) - PAGE) / PAGE, .runs = (uint64_t)runs, .nruns = 4096 };
	uint64_t sum = 0;
	struct ckpt_snapshot_args args;

	close(snapshot);
	args = take(session, 0, 0);
	CHECK(ioctl(args.fd, CKPT_IOC_GETRUNS, &all) == 0);
	CHECK_EQ(all.npages, 0);
	for (size_t i = 0; i < all.nruns; i++) {
		sum += runs[i].npages;
		CHECK(i == 0 || runs[i - 1].va + runs[i - 1].npages * PAGE < runs[i].va);
	}
	CHECK_EQ(sum, args.pages_data);
}

TEST(reading_rejects)
{
	char *memory = map_small(8 * PAGE), buffer[3 * PAGE];
	int session = open_session(), snapshot, pipes[2];
	off_t offset;

	CHECK(pipe(pipes) == 0);
	memset(memory, 7, 2 * PAGE);
	// Page 4 is read and never written: the page of zeros.
	CHECK_EQ(*(volatile char *)(memory + 4 * PAGE), 0);
	snapshot = take(session, 0, 0).fd;
	CHECK_ERRNO(pread(snapshot, buffer, PAGE, -1), EINVAL);
	CHECK_ERRNO(pread(snapshot, buffer, PAGE, 0), ENXIO);
	CHECK_ERRNO(pread(snapshot, buffer, PAGE, 1L << 47), ENXIO);
	CHECK_ERRNO(pread(snapshot, buffer, PAGE, 1L << 57), ENXIO);
	CHECK_ERRNO(pread(snapshot, buffer, PAGE, INT64_MAX), EINVAL);
	CHECK_ERRNO(pread(snapshot, buffer, PAGE, INT64_MAX - 2 * (off_t)PAGE), ENXIO);
	CHECK_ERRNO(pread(snapshot, buffer, PAGE, (off_t)memory + 2 * (off_t)PAGE), ENXIO);
	CHECK_ERRNO(syscall(SYS_pread64, snapshot, 8, PAGE, memory), EFAULT);
	CHECK_EQ(pread(snapshot, buffer, 0, (off_t)memory), 0);
	// Short before a page that is not there; at any offset.
	CHECK_EQ(pread(snapshot, buffer, 3 * PAGE, (off_t)memory), 2 * PAGE);
	CHECK_EQ(pread(snapshot, buffer, PAGE, (off_t)memory + 2 * (off_t)PAGE - 5), 5);
	CHECK_EQ(pread(snapshot, buffer, 100, (off_t)memory + 4050), 100);
	CHECK_EQ(buffer[99], 7);
	memset(buffer, 1, sizeof(buffer));
	CHECK_EQ(pread(snapshot, buffer, 2 * PAGE, (off_t)memory + 4 * (off_t)PAGE), PAGE);
	CHECK(buffer[0] == 0 && buffer[PAGE - 1] == 0 && buffer[PAGE] == 1);
	// As a file with a position.
	CHECK_EQ(lseek(snapshot, (off_t)memory, SEEK_SET), (off_t)memory);
	CHECK_EQ(read(snapshot, buffer, 10), 10);
	CHECK_EQ(lseek(snapshot, 0, SEEK_CUR), (off_t)memory + 10);
	CHECK_ERRNO(lseek(snapshot, -1, SEEK_SET), EINVAL);
	CHECK_ERRNO(write(snapshot, buffer, 1), EBADF);
	CHECK_ERRNO(pwrite(snapshot, buffer, 1, (off_t)memory), ESPIPE);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, snapshot, (off_t)memory) == MAP_FAILED);
	CHECK_EQ(errno, ENODEV);
	// splice does the same.
	offset = (off_t)memory + 2 * (off_t)PAGE;
	CHECK_ERRNO(splice(snapshot, &offset, pipes[1], NULL, PAGE, SPLICE_F_NONBLOCK), ENXIO);
	offset = -1;
	CHECK_ERRNO(splice(snapshot, &offset, pipes[1], NULL, PAGE, SPLICE_F_NONBLOCK), EINVAL);
	offset = 1L << 57;
	CHECK_ERRNO(splice(snapshot, &offset, pipes[1], NULL, PAGE, SPLICE_F_NONBLOCK), ENXIO);
	offset = (off_t)memory + 100;
	CHECK_EQ(splice(snapshot, &offset, pipes[1], NULL, 3 * PAGE, SPLICE_F_NONBLOCK), 2 * PAGE - 100);
	CHECK_EQ(offset, (off_t)memory + 2 * (off_t)PAGE);
	CHECK_EQ(read(pipes[0], buffer, sizeof(buffer)), 2 * PAGE - 100);
	CHECK_ERRNO(splice(pipes[0], NULL, snapshot, NULL, PAGE, SPLICE_F_NONBLOCK), EBADF);
	// Until the pipe is full.
	CHECK_EQ(fcntl(pipes[1], F_SETPIPE_SZ, PAGE), PAGE);
	offset = (off_t)memory;
	CHECK_EQ(splice(snapshot, &offset, pipes[1], NULL, 2 * PAGE, SPLICE_F_NONBLOCK), PAGE);
	CHECK_ERRNO(splice(snapshot, &offset, pipes[1], NULL, PAGE, SPLICE_F_NONBLOCK), EAGAIN);
	close(pipes[0]);
	signal(SIGPIPE, SIG_IGN);
	CHECK_ERRNO(splice(snapshot, &offset, pipes[1], NULL, PAGE, 0), EPIPE);
}

TEST(descriptors_are_close_on_exec)
{
	CHECK_EQ(fcntl(take(open_session(), 0, 0).fd, F_GETFD), FD_CLOEXEC);
}

static int open_as_plain_user(void *unused)
{
	(void)unused;
	become_plain_user();
	return open("/dev/ckpt", O_RDWR) == -1 && errno == EACCES ? 0 : 1;
}

static int open_as_group(void *unused)
{
	gid_t group = 900;

	(void)unused;
	CHECK(setgroups(1, &group) == 0);
	become_plain_user();
	int session = open_session();
	CHECK(take(session, 0, 0).fd >= 0);
	return 0;
}

TEST(device_is_for_its_group)
{
	struct stat status;

	CHECK(stat("/dev/ckpt", &status) == 0);
	CHECK_EQ(status.st_mode & 07777, 0600);
	CHECK_EQ(wait_for(spawn(open_as_plain_user, NULL)), 0);
	// As the udev rule does.
	CHECK(chown("/dev/ckpt", 0, 900) == 0 && chmod("/dev/ckpt", 0660) == 0);
	CHECK_EQ(wait_for(spawn(open_as_plain_user, NULL)), 0);
	CHECK_EQ(wait_for(spawn(open_as_group, NULL)), 0);
	CHECK(chown("/dev/ckpt", 0, 0) == 0 && chmod("/dev/ckpt", 0600) == 0);
}

TEST(parameters)
{
	struct stat status;
	char text[64];

	CHECK(unload_module("ckpt") == 0);
	CHECK_ERRNO(load_module(MODULE_PATH, "device_mode=04755"), EINVAL);
	CHECK_ERRNO(load_module(MODULE_PATH, "device_mode=0777"), EINVAL);
	CHECK(load_module(MODULE_PATH, "device_mode=0640 max_pages=12345") == 0);
	CHECK(stat("/dev/ckpt", &status) == 0);
	CHECK_EQ(status.st_mode & 07777, 0640);
	CHECK_EQ(query_device(open_device()).max_pages, 12345);
	write_file("/sys/module/ckpt/parameters/max_pages", "777");
	CHECK_EQ(query_device(open_device()).max_pages, 777);
	read_file("/sys/module/ckpt/parameters/device_mode", text, sizeof(text));
	CHECK_EQ(atoi(text), 0640);
	for (int fd = 3; fd < 16; fd++)
		close(fd);
	CHECK(unload_module("ckpt") == 0);
	CHECK(load_module(MODULE_PATH, "") == 0);
}

TEST(tracepoints)
{
	static char text[65536];
	char expected[64];
	int session;

	write_file("/sys/kernel/tracing/trace", "");
	write_file("/sys/kernel/tracing/events/ckpt/enable", "1");
	session = open_session();
	struct ckpt_snapshot_args args = take(session, CKPT_SNAPSHOT_CLEAR, 0);
	struct ckpt_snapshot_args stale;
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, 1, &stale), ESTALE);
	write_file("/sys/kernel/tracing/events/ckpt/enable", "0");
	read_file("/sys/kernel/tracing/trace", text, sizeof(text));
	CHECK(strstr(text, "ckpt_snapshot_begin: session="));
	CHECK(strstr(text, " flags=0x2"));
	snprintf(expected, sizeof(expected), " error=0 data=%llu ", (unsigned long long)args.pages_data);
	CHECK(strstr(text, expected));
	CHECK(strstr(text, " error=-116 data=0 "));
}

TEST(view_of_sessions)
{
	char text[4096], expected[64];
	int session = open_session();

	snprintf(expected, sizeof(expected), " %d 0 no\n", getpid());
	read_file("/sys/kernel/debug/ckpt/sessions", text, sizeof(text));
	CHECK(strstr(text, expected));
	take(session, CKPT_SNAPSHOT_CLEAR, 0);
	snprintf(expected, sizeof(expected), " %d 1 yes\n", getpid());
	read_file("/sys/kernel/debug/ckpt/sessions", text, sizeof(text));
	CHECK(strstr(text, expected));
	close(session);
	snprintf(expected, sizeof(expected), " %d ", getpid());
	read_file("/sys/kernel/debug/ckpt/sessions", text, sizeof(text));
	CHECK(!strstr(text, expected));
}
