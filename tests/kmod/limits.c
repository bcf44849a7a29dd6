// SPDX-License-Identifier: MIT OR Apache-2.0
// What a snapshot may cost, and who pays for it.
#include "harness.h"

#include <sys/socket.h>

#include "module/ckpt_testing.h"

static char *target_memory;
static int target_sockets[2];

static int hold_memory(void *argument)
{
	char byte;

	(void)argument;
	fill(target_memory, 8 * HUGE, 1);
	send_fd(target_sockets[1], open_session());
	CHECK_EQ(read(target_sockets[1], &byte, 1), 1);
	check_filled(target_memory, 8 * HUGE, 1);
	fill(target_memory, 8 * HUGE, 2);
	check_filled(target_memory, 8 * HUGE, 2);
	return 0;
}

// A process with 16 MiB in small pages; its session.
static int start_holder(pid_t *pid)
{
	target_memory = map_small(8 * HUGE);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, target_sockets) == 0);
	*pid = spawn(hold_memory, NULL);
	return receive_fd(target_sockets[0]);
}

static void end_holder(pid_t pid)
{
	CHECK_EQ(write(target_sockets[0], "x", 1), 1);
	CHECK_EQ(wait_for(pid), 0);
}

static int take_within(void *argument)
{
	struct {
		int session;
		rlim_t bytes;
		int expected;
	} *limits = argument;
	struct rlimit memlock = { limits->bytes, limits->bytes };
	struct ckpt_snapshot_args args;

	CHECK(setrlimit(RLIMIT_MEMLOCK, &memlock) == 0);
	become_plain_user();
	if (limits->expected)
		CHECK_ERRNO(try_take(limits->session, 0, 0, &args), limits->expected);
	else
		CHECK(try_take(limits->session, 0, 0, &args) == 0);
	return 0;
}

TEST(memlock_limit)
{
	pid_t pid;
	int session = start_holder(&pid);
	struct ckpt_snapshot_args args = take(session, 0, 0);
	struct {
		int session;
		rlim_t bytes;
		int expected;
	} limits = { session, args.pages_data * PAGE, 0 };

	// Root is not limited; a plain user is, to the page.
	close(args.fd);
	CHECK_EQ(wait_for(spawn(take_within, &limits)), 0);
	limits.bytes -= PAGE;
	limits.expected = EDQUOT;
	CHECK_EQ(wait_for(spawn(take_within, &limits)), 0);
	limits.bytes = 0;
	CHECK_EQ(wait_for(spawn(take_within, &limits)), 0);
	// What was refused, or ended with its reader, is given back.
	CHECK_EQ(query_device(session).held_pages, 0);
	limits.bytes = args.pages_data * PAGE;
	limits.expected = 0;
	CHECK_EQ(wait_for(spawn(take_within, &limits)), 0);
	end_holder(pid);
}

TEST(limit_of_the_device)
{
	pid_t pid;
	int session = start_holder(&pid);
	struct ckpt_snapshot_args args = take(session, CKPT_SNAPSHOT_CLEAR, 0), other;
	uint64_t old = query_device(session).max_pages, generation = args.generation;
	char text[32];

	close(args.fd);
	snprintf(text, sizeof(text), "%llu", (unsigned long long)args.pages_data);
	write_file("/sys/module/ckpt/parameters/max_pages", text);
	close(take(session, 0, 0).fd);
	snprintf(text, sizeof(text), "%llu", (unsigned long long)args.pages_data - 1);
	write_file("/sys/module/ckpt/parameters/max_pages", text);
	CHECK_ERRNO(try_take(session, 0, 0, &other), ENOSPC);
	CHECK_EQ(query_device(session).held_pages, 0);
	// Without CLEAR no bit was lost; with it the generation is over, and it is said.
	close(take(session, CKPT_SNAPSHOT_INCREMENTAL, generation).fd);
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_CLEAR, 0, &other), ENOSPC);
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, generation, &other), ESTALE);
	snprintf(text, sizeof(text), "%llu", (unsigned long long)old);
	write_file("/sys/module/ckpt/parameters/max_pages", text);
	end_holder(pid);
}

static int take_in_cgroup(void *session)
{
	struct ckpt_snapshot_args args;
	char text[32];

	snprintf(text, sizeof(text), "%d", getpid());
	write_file("/sys/fs/cgroup/reader/cgroup.procs", text);
	// No room for the tables, of some 130 KiB a 64 MiB: an error, and not the OOM killer.
	CHECK_ERRNO(try_take(*(int *)session, 0, 0, &args), ENOMEM);
	return 0;
}

static int take_with_room(void *session)
{
	char text[32];

	snprintf(text, sizeof(text), "%d", getpid());
	write_file("/sys/fs/cgroup/reader/cgroup.procs", text);
	close(take(*(int *)session, 0, 0).fd);
	return 0;
}

static long event_count(const char *path, const char *name)
{
	char text[512], *at;

	read_file(path, text, sizeof(text));
	at = strstr(text, name);
	CHECK(at);
	return atol(at + strlen(name));
}

static int hold_sparse_memory(void *argument)
{
	char byte;

	(void)argument;
	// A page in every table: the snapshot needs as many tables as there are pages.
	for (size_t i = 0; i < 4096; i++)
		target_memory[i * HUGE] = 1;
	send_fd(target_sockets[1], open_session());
	CHECK_EQ(read(target_sockets[1], &byte, 1), 1);
	for (size_t i = 0; i < 4096; i++)
		CHECK_EQ(target_memory[i * HUGE]++, 1);
	return 0;
}

TEST(memory_cgroup_of_the_reader)
{
	int session;
	pid_t pid;

	target_memory = mmap(NULL, 4096 * HUGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(target_memory != MAP_FAILED);
	CHECK(madvise(target_memory, 4096 * HUGE, MADV_NOHUGEPAGE) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, target_sockets) == 0);
	pid = spawn(hold_sparse_memory, NULL);
	session = receive_fd(target_sockets[0]);
	try_write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	CHECK(mkdir("/sys/fs/cgroup/reader", 0755) == 0 || errno == EEXIST);
	write_file("/sys/fs/cgroup/reader/memory.max", "8388608");
	CHECK_EQ(wait_for(spawn(take_in_cgroup, &session)), 0);
	CHECK_EQ(event_count("/sys/fs/cgroup/reader/memory.events", "oom_kill "), 0);
	CHECK_EQ(query_device(session).held_pages, 0);
	CHECK_EQ(query_device(session).snapshots, 0);
	write_file("/sys/fs/cgroup/reader/memory.max", "max");
	CHECK_EQ(wait_for(spawn(take_with_room, &session)), 0);
	// The tables were charged to the reader: 4096 of 4 KiB.
	CHECK(event_count("/sys/fs/cgroup/reader/memory.peak", "") >= 4096 * (long)PAGE);
	end_holder(pid);
	CHECK(rmdir("/sys/fs/cgroup/reader") == 0);
}

static int hold_many_mappings(void *argument)
{
	char byte;

	(void)argument;
	send_fd(target_sockets[1], open_session());
	CHECK_EQ(read(target_sockets[1], &byte, 1), 1);
	return 0;
}

static int take_near_the_limit(void *session)
{
	struct ckpt_snapshot_args args;
	char text[32];

	snprintf(text, sizeof(text), "%d", getpid());
	write_file("/sys/fs/cgroup/reader/cgroup.procs", text);
	// The first one only for what it touches of its own.
	close(take(*(int *)session, 0, 0).fd);
	read_file("/sys/fs/cgroup/reader/memory.current", text, sizeof(text));
	snprintf(text, sizeof(text), "%ld", atol(text) + 256 * 1024);
	write_file("/sys/fs/cgroup/reader/memory.max", text);
	CHECK_ERRNO(try_take(*(int *)session, 0, 0, &args), ENOMEM);
	return 0;
}

TEST(memory_cgroup_of_the_reader_and_many_mappings)
{
	size_t mappings = 50000;
	char *memory = mmap(NULL, mappings * PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int session;
	pid_t pid;

	CHECK(memory != MAP_FAILED);
	// Each page is a mapping of its own; their list takes 16 bytes for each.
	for (size_t i = 0; i < mappings; i += 2)
		CHECK(mprotect(memory + i * PAGE, PAGE, PROT_NONE) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, target_sockets) == 0);
	pid = spawn(hold_many_mappings, NULL);
	CHECK(munmap(memory, mappings * PAGE) == 0);
	session = receive_fd(target_sockets[0]);
	try_write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	CHECK(mkdir("/sys/fs/cgroup/reader", 0755) == 0 || errno == EEXIST);
	write_file("/sys/fs/cgroup/reader/memory.max", "max");
	CHECK_EQ(wait_for(spawn(take_near_the_limit, &session)), 0);
	CHECK_EQ(event_count("/sys/fs/cgroup/reader/memory.events", "oom_kill "), 0);
	end_holder(pid);
	CHECK(rmdir("/sys/fs/cgroup/reader") == 0);
}

// The target at its own limit: the copies that its writes need are charged to it, and it goes on if it can.
static int write_at_the_limit(void *argument)
{
	int session;
	char text[32], *memory;
	struct ckpt_snapshot_args args;

	(void)argument;
	snprintf(text, sizeof(text), "%d", getpid());
	write_file("/sys/fs/cgroup/target/cgroup.procs", text);
	memory = map_small(4 * HUGE);
	fill(memory, 4 * HUGE, 1);
	session = open_session();
	args = take(session, 0, 0);
	// Twice the memory does not fit: pages are swapped out, as those of the snapshot cannot be.
	fill(memory, 4 * HUGE, 2);
	check_snapshot_filled(args.fd, memory, 4 * HUGE, 1);
	check_filled(memory, 4 * HUGE, 2);
	return 0;
}

TEST(memory_cgroup_of_the_target)
{
	try_write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	CHECK(mkdir("/sys/fs/cgroup/target", 0755) == 0 || errno == EEXIST);
	write_file("/sys/fs/cgroup/target/memory.max", "14680064");
	CHECK_EQ(wait_for(spawn(write_at_the_limit, NULL)), 0);
	CHECK_EQ(event_count("/sys/fs/cgroup/target/memory.events", "oom_kill "), 0);
	CHECK(rmdir("/sys/fs/cgroup/target") == 0);
}

struct locked {
	int testing;
	int session;
};

static int lock_memory(void *argument)
{
	struct locked *locked = argument;
	char byte;

	send_fd(target_sockets[1], open_session());
	CHECK(ioctl(locked->testing, CKPT_TESTING_LOCK, 0) == 0);
	CHECK_EQ(read(target_sockets[1], &byte, 1), 1);
	return 0;
}

static int take_one(void *argument)
{
	struct locked *locked = argument;

	close(take(locked->session, 0, 0).fd);
	return 0;
}

// Until the process sleeps in an ioctl.
static void wait_until_it_waits(pid_t pid)
{
	char path[64], text[256], ioctl_number[16];

	snprintf(path, sizeof(path), "/proc/%d/syscall", pid);
	snprintf(ioctl_number, sizeof(ioctl_number), "%d ", SYS_ioctl);
	do {
		sched_yield();
		read_file(path, text, sizeof(text));
	} while (strncmp(text, ioctl_number, strlen(ioctl_number)));
}

TEST(callers_that_wait_can_be_killed)
{
	struct locked locked = { open("/dev/ckpt_testing", O_RDWR), -1 };
	pid_t pid, callers[2];

	CHECK(locked.testing >= 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, target_sockets) == 0);
	pid = spawn(lock_memory, &locked);
	locked.session = receive_fd(target_sockets[0]);
	while (ioctl(locked.testing, CKPT_TESTING_IS_LOCKED, 0) != 1)
		sched_yield();
	// The first one waits for the memory of the process, and the second one for the first.
	for (int i = 0; i < 2; i++) {
		callers[i] = spawn(take_one, &locked);
		wait_until_it_waits(callers[i]);
	}
	for (int i = 1; i >= 0; i--) {
		kill(callers[i], SIGKILL);
		CHECK_EQ(wait_for(callers[i]), 128 + SIGKILL);
	}
	CHECK_EQ(ioctl(locked.testing, CKPT_TESTING_IS_LOCKED, 0), 1);
	CHECK_EQ(query_device(locked.session).snapshots, 0);
	CHECK(ioctl(locked.testing, CKPT_TESTING_UNLOCK, 0) == 0);
	take_one(&locked);
	end_holder(pid);
}

static int send_snapshot_and_end(void *argument)
{
	int session = open_session();

	(void)argument;
	send_fd(target_sockets[1], take(session, 0, 0).fd);
	return 0;
}

TEST(unloading)
{
	int fd, snapshot;

	// Not while a device is open, attached or not, nor while a snapshot is.
	fd = open_device();
	CHECK_ERRNO(unload_module("ckpt"), EWOULDBLOCK);
	CHECK(ioctl(fd, CKPT_IOC_ATTACH, 0) == 0);
	CHECK_ERRNO(unload_module("ckpt"), EWOULDBLOCK);
	snapshot = take(fd, 0, 0).fd;
	close(fd);
	CHECK_ERRNO(unload_module("ckpt"), EWOULDBLOCK);
	close(snapshot);
	CHECK(unload_module("ckpt") == 0);
	CHECK_ERRNO(access("/dev/ckpt", F_OK), ENOENT);
	CHECK(load_module(MODULE_PATH, "") == 0);
	// A snapshot on its way in a socket is alive, and one that is dropped there is not.
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, target_sockets) == 0);
	CHECK_EQ(wait_for(spawn(send_snapshot_and_end, NULL)), 0);
	CHECK_ERRNO(unload_module("ckpt"), EWOULDBLOCK);
	close(target_sockets[0]);
	close(target_sockets[1]);
	CHECK(unload_module("ckpt") == 0);
	CHECK(load_module(MODULE_PATH, "") == 0);
}
