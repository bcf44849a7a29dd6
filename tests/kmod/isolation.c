// SPDX-License-Identifier: MIT OR Apache-2.0
// A snapshot stays as it was, and the process has what it wrote, whatever happens to either.
#include "harness.h"

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/socket.h>

#include "module/ckpt_testing.h"

#define BYTES (4 * HUGE)

static void *map_either(bool huge, size_t bytes)
{
	return huge ? map_huge(bytes) : map_small(bytes);
}

static void check_overwriting(bool huge)
{
	char *memory = map_either(huge, BYTES);
	int session = open_session();

	fill(memory, BYTES, 1);
	struct ckpt_snapshot_args args = take(session, 0, 0);
	CHECK(args.ns_flush <= args.ns_walk);
	CHECK(args.pages_data >= BYTES / PAGE);
	check_kinds(args.fd, memory, BYTES / PAGE, CKPT_KIND_DATA);
	check_snapshot_filled(args.fd, memory, BYTES, 1);
	fill(memory, BYTES, 2);
	check_filled(memory, BYTES, 2);
	check_snapshot_filled(args.fd, memory, BYTES, 1);
	close(args.fd);
	fill(memory, BYTES, 3);
	check_filled(memory, BYTES, 3);
}

TEST(overwriting_small_pages)
{
	check_overwriting(false);
}

TEST(overwriting_huge_pages)
{
	check_overwriting(true);
}

TEST(huge_pages_are_taken_whole)
{
	char *memory = map_huge(BYTES);
	int session = open_session(), snapshot;

	snapshot = take(session, 0, 0).fd;
	CHECK(is_huge(memory));
	check_kinds(snapshot, memory, BYTES / PAGE, CKPT_KIND_DATA);
	// One byte: of this page a copy is made, and the others stay.
	memory[5 * PAGE] = 9;
	CHECK_EQ(memory[6 * PAGE], 1);
	char ones[PAGE];
	memset(ones, 1, PAGE);
	check_bytes(snapshot, memory + 5 * PAGE, ones, PAGE);
	check_bytes(snapshot, memory + 6 * PAGE, ones, PAGE);
	CHECK_EQ(memory[5 * PAGE], 9);
}

static void check_parts_of_huge_pages(bool exclusive)
{
	char *memory = map_huge(2 * HUGE), *moved;
	int session = open_session(), snapshot;

	fill(memory, 2 * HUGE, 1);
	if (!exclusive)
		close(take(session, 0, 0).fd);
	// A huge page mapped by small entries: in part unmapped, protected, moved elsewhere.
	CHECK(munmap(memory, 3 * PAGE) == 0);
	CHECK(mprotect(memory + 10 * PAGE, 5 * PAGE, PROT_READ) == 0);
	moved = map_small(HUGE);
	CHECK(mremap(memory + 20 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved) == moved);
	snapshot = take(session, 0, 0).fd;
	fill(memory + 30 * PAGE, HUGE, 2);
	fill(moved, PAGE, 2);
	CHECK_EQ(kind_of(snapshot, memory), 0);
	CHECK_EQ(kind_of(snapshot, memory + 20 * PAGE), 0);
	check_snapshot_filled(snapshot, memory + 3 * PAGE, 17 * PAGE, 1);
	check_snapshot_filled(snapshot, memory + 30 * PAGE, HUGE, 1);
	check_filled(memory + 30 * PAGE, HUGE, 2);
	CHECK_EQ(kind_of(snapshot, moved), CKPT_KIND_DATA);
}

TEST(parts_of_huge_pages)
{
	check_parts_of_huge_pages(true);
}

TEST(parts_of_shared_huge_pages)
{
	check_parts_of_huge_pages(false);
}

// What the process does to its memory while there is a snapshot.
static void check_change(bool huge, void (*change)(char *memory))
{
	char *memory = map_either(huge, BYTES);
	int session = open_session(), snapshot;

	fill(memory, BYTES, 1);
	snapshot = take(session, 0, 0).fd;
	change(memory);
	check_snapshot_filled(snapshot, memory, BYTES, 1);
	close(snapshot);
	CHECK_EQ(query_device(session).held_pages, 0);
}

static void change_dontneed(char *memory)
{
	CHECK(madvise(memory, BYTES, MADV_DONTNEED) == 0);
	CHECK_EQ(memory[0], 0);
	fill(memory, BYTES, 2);
}

static void change_free(char *memory)
{
	CHECK(madvise(memory, BYTES, MADV_FREE) == 0);
	fill(memory, BYTES / 2, 2);
	check_filled(memory, BYTES / 2, 2);
}

static void change_munmap(char *memory)
{
	CHECK(munmap(memory, BYTES) == 0);
	memory = mmap(memory, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(memory != MAP_FAILED);
	fill(memory, BYTES, 2);
}

static void change_mremap(char *memory)
{
	char *moved = map_small(BYTES + HUGE);

	CHECK(mremap(memory, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, moved) == moved);
	memset(moved, 3, BYTES);
	for (size_t i = 0; i < BYTES; i += PAGE)
		CHECK_EQ(moved[i], 3);
}

static void change_mprotect(char *memory)
{
	CHECK(mprotect(memory, BYTES, PROT_NONE) == 0);
	CHECK(mprotect(memory, BYTES, PROT_READ) == 0);
	CHECK(mprotect(memory, BYTES, PROT_READ | PROT_WRITE) == 0);
	fill(memory, BYTES, 2);
	check_filled(memory, BYTES, 2);
}

static void change_self_mem(char *memory)
{
	int fd = open("/proc/self/mem", O_RDWR);
	char ones[PAGE];

	CHECK(fd >= 0);
	memset(ones, 1, PAGE);
	// Writable, and by force where it is not.
	for (size_t i = 0; i < BYTES; i += PAGE) {
		if (i == BYTES / 2)
			CHECK(mprotect(memory, BYTES, PROT_READ) == 0);
		CHECK_EQ(pwrite(fd, ones, PAGE, (off_t)memory + (off_t)i), PAGE);
		CHECK(memcmp(memory + i, ones, PAGE) == 0);
	}
	close(fd);
}

static void change_process_vm(char *memory)
{
	char ones[PAGE];
	struct iovec local = { ones, PAGE };

	memset(ones, 1, PAGE);
	for (size_t i = 0; i < BYTES; i += PAGE) {
		struct iovec remote = { memory + i, PAGE };

		CHECK_EQ(process_vm_writev(getpid(), &local, 1, &remote, 1, 0), PAGE);
		CHECK(memcmp(memory + i, ones, PAGE) == 0);
	}
}

static void change_read_syscall(char *memory)
{
	int fd = open("/dev/zero", O_RDONLY);

	CHECK_EQ(read(fd, memory, BYTES), BYTES);
	close(fd);
	for (size_t i = 0; i < BYTES; i++)
		CHECK(memory[i] == 0);
}

static void change_collapse(char *memory)
{
	// The kernel builds huge pages out of these, or cannot because they are held; both are in order.
	madvise(memory, BYTES, MADV_HUGEPAGE);
	madvise(memory, BYTES, 25 /* MADV_COLLAPSE */);
	check_filled(memory, BYTES, 1);
	fill(memory, BYTES, 2);
	check_filled(memory, BYTES, 2);
}

static int write_all(void *memory)
{
	check_filled(memory, BYTES, 1);
	fill(memory, BYTES, 5);
	check_filled(memory, BYTES, 5);
	return 0;
}

static void change_fork_after(char *memory)
{
	pid_t child = spawn(write_all, memory);

	fill(memory, BYTES, 2);
	CHECK_EQ(wait_for(child), 0);
	check_filled(memory, BYTES, 2);
}

static void change_fork_and_nothing(char *memory)
{
	// The child is the only writer, and then the parent is.
	CHECK_EQ(wait_for(spawn(write_all, memory)), 0);
	check_filled(memory, BYTES, 1);
	fill(memory, BYTES, 2);
}

#define CHANGE(NAME)                                                                                          \
	TEST(change_##NAME##_small)                                                                           \
	{                                                                                                     \
		check_change(false, change_##NAME);                                                           \
	}                                                                                                     \
	TEST(change_##NAME##_huge)                                                                            \
	{                                                                                                     \
		check_change(true, change_##NAME);                                                            \
	}

CHANGE(dontneed)
CHANGE(free)
CHANGE(munmap)
CHANGE(mremap)
CHANGE(mprotect)
CHANGE(self_mem)
CHANGE(process_vm)
CHANGE(read_syscall)
CHANGE(collapse)
CHANGE(fork_after)
CHANGE(fork_and_nothing)

static int wait_then_check(void *argument)
{
	struct {
		char *memory;
		int pipe;
	} *child = argument;
	char byte;

	CHECK_EQ(read(child->pipe, &byte, 1), 1);
	check_filled(child->memory, BYTES, 1);
	fill(child->memory, BYTES, 5);
	check_filled(child->memory, BYTES, 5);
	return 0;
}

static void check_fork_before(bool huge)
{
	struct {
		char *memory;
		int pipe;
	} child = { map_either(huge, BYTES), -1 };
	int session = open_session(), pipes[2], snapshot;
	pid_t pid;

	CHECK(pipe(pipes) == 0);
	child.pipe = pipes[0];
	fill(child.memory, BYTES, 1);
	pid = spawn(wait_then_check, &child);
	// All pages are shared with the child by now.
	snapshot = take(session, 0, 0).fd;
	fill(child.memory, BYTES / 2, 2);
	CHECK_EQ(write(pipes[1], "x", 1), 1);
	CHECK_EQ(wait_for(pid), 0);
	check_snapshot_filled(snapshot, child.memory, BYTES, 1);
	fill(child.memory, BYTES, 2);
	check_snapshot_filled(snapshot, child.memory, BYTES, 1);
	check_filled(child.memory, BYTES, 2);
}

TEST(fork_before_small)
{
	check_fork_before(false);
}

TEST(fork_before_huge)
{
	check_fork_before(true);
}

TEST(mprotect_before)
{
	char *memory = map_small(BYTES);
	int session = open_session(), snapshot;

	// Pages that are read-only now and become writable again are as much in the snapshot.
	fill(memory, BYTES, 1);
	CHECK(mprotect(memory, BYTES / 2, PROT_READ) == 0);
	CHECK(mprotect(memory + BYTES / 2, BYTES / 2, PROT_NONE) == 0);
	snapshot = take(session, 0, 0).fd;
	CHECK(mprotect(memory, BYTES, PROT_READ | PROT_WRITE) == 0);
	check_filled(memory, BYTES, 1);
	fill(memory, BYTES, 2);
	check_snapshot_filled(snapshot, memory, BYTES, 1);
	check_filled(memory, BYTES, 2);
}

static void check_two_snapshots(bool huge, bool first_first)
{
	char *memory = map_either(huge, BYTES);
	int session = open_session(), snapshots[2];

	fill(memory, BYTES, 1);
	snapshots[0] = take(session, 0, 0).fd;
	fill(memory + BYTES / 4, BYTES / 2, 2);
	snapshots[1] = take(session, 0, 0).fd;
	fill(memory, BYTES / 2, 3);
	close(snapshots[first_first ? 0 : 1]);
	fill(memory, BYTES, 4);
	if (first_first) {
		check_snapshot_filled(snapshots[1], memory, BYTES / 4, 1);
		check_snapshot_filled(snapshots[1], memory + BYTES / 4, BYTES / 2, 2);
		check_snapshot_filled(snapshots[1], memory + BYTES / 4 * 3, BYTES / 4, 1);
	} else {
		check_snapshot_filled(snapshots[0], memory, BYTES, 1);
	}
	close(snapshots[first_first ? 1 : 0]);
	check_filled(memory, BYTES, 4);
	CHECK_EQ(query_device(session).held_pages, 0);
}

TEST(two_snapshots_small)
{
	check_two_snapshots(false, true);
	check_two_snapshots(false, false);
}

TEST(two_snapshots_huge)
{
	check_two_snapshots(true, true);
	check_two_snapshots(true, false);
}

// A target that is another process than the reader.
struct target {
	char *memory;
	int sockets[2];
};

static int be_target(void *argument)
{
	struct target *target = argument;
	char byte;

	fill(target->memory, BYTES, 1);
	send_fd(target->sockets[1], open_session());
	CHECK_EQ(read(target->sockets[1], &byte, 1), 1);
	// Its own memory was not disturbed.
	check_filled(target->memory, BYTES, 1);
	return byte;
}

static pid_t start_target(struct target *target, bool huge)
{
	target->memory = map_either(huge, BYTES);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, target->sockets) == 0);
	return spawn(be_target, target);
}

static void check_target_ends(bool huge, bool killed)
{
	struct target target;
	pid_t pid = start_target(&target, huge);
	int session = receive_fd(target.sockets[0]), snapshot = take(session, 0, 0).fd;

	if (killed) {
		kill(pid, SIGKILL);
		CHECK_EQ(wait_for(pid), 128 + SIGKILL);
	} else {
		CHECK_EQ(write(target.sockets[0], "\5", 1), 1);
		CHECK_EQ(wait_for(pid), 5);
	}
	check_snapshot_filled(snapshot, target.memory, BYTES, 1);
	close(session);
	check_snapshot_filled(snapshot, target.memory, BYTES, 1);
}

TEST(target_exits)
{
	check_target_ends(false, false);
	check_target_ends(true, false);
}

TEST(target_is_killed)
{
	check_target_ends(false, true);
	check_target_ends(true, true);
}

struct reader {
	struct target *target;
	int session;
	int ready;
	bool snapshots;
};

static int read_for_ever(void *argument)
{
	struct reader *reader = argument;
	struct ckpt_snapshot_args args;

	for (unsigned round = 0;; round++) {
		args = take(reader->session, 0, 0);
		do
			check_snapshot_filled(args.fd, reader->target->memory, BYTES, 1);
		while (!reader->snapshots);
		close(args.fd);
		if (round == 0)
			CHECK_EQ(write(reader->ready, "x", 1), 1);
	}
}

TEST(reader_is_killed)
{
	struct target target;
	pid_t pid = start_target(&target, false), reader_pid;
	int pipes[2];
	struct reader reader = { &target, receive_fd(target.sockets[0]), -1, true };
	char byte;

	CHECK(pipe(pipes) == 0);
	reader.ready = pipes[1];
	// Killed while it takes or reads a snapshot, wherever it is.
	for (int round = 0; round < 20; round++) {
		reader_pid = spawn(read_for_ever, &reader);
		CHECK_EQ(read(pipes[0], &byte, 1), 1);
		kill(reader_pid, SIGKILL);
		CHECK_EQ(wait_for(reader_pid), 128 + SIGKILL);
		CHECK_EQ(query_device(reader.session).snapshots, 0);
		CHECK_EQ(query_device(reader.session).held_pages, 0);
	}
	CHECK_EQ(write(target.sockets[0], "\6", 1), 1);
	CHECK_EQ(wait_for(pid), 6);
}

TEST(reader_exits)
{
	struct target target;
	pid_t pid = start_target(&target, true);
	int session = receive_fd(target.sockets[0]);

	for (int round = 0; round < 20; round++) {
		pid_t reader = fork();

		if (reader == 0) {
			take(session, 0, 0);
			_exit(0);
		}
		CHECK_EQ(wait_for(reader), 0);
		CHECK_EQ(query_device(session).held_pages, 0);
	}
	CHECK_EQ(write(target.sockets[0], "\6", 1), 1);
	CHECK_EQ(wait_for(pid), 6);
}

// Pages in pipes.

static void splice_all(int snapshot, const void *memory, int pipe, size_t bytes)
{
	off_t offset = (off_t)memory;

	CHECK_EQ(splice(snapshot, &offset, pipe, NULL, bytes, 0), bytes);
}

static void read_and_check(int pipe, const char *memory, size_t bytes, uint64_t salt)
{
	static char buffer[64 * PAGE];
	char *copy = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	size_t done = 0;

	CHECK(copy != MAP_FAILED);
	while (done < bytes) {
		ssize_t got = read(pipe, buffer, sizeof(buffer));

		CHECK(got > 0);
		memcpy(copy + done, buffer, got);
		done += got;
	}
	CHECK_EQ(done, bytes);
	// The pattern is a function of the address: compare with memory filled in the same way.
	char *expected = mmap((void *)memory, bytes, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(expected == memory);
	fill(expected, bytes, salt);
	for (size_t i = 0; i < bytes; i += 512)
		CHECK(memcmp(copy + i, expected + i, 8) == 0);
	munmap(copy, bytes);
}

static void check_splice(bool huge)
{
	size_t bytes = 16 * PAGE;
	char *memory = map_either(huge, HUGE);
	int session = open_session(), snapshot, pipes[2], copies[2];

	CHECK(pipe(pipes) == 0);
	CHECK(pipe(copies) == 0);
	fill(memory, HUGE, 1);
	snapshot = take(session, 0, 0).fd;
	splice_all(snapshot, memory, pipes[1], bytes);
	// Copies of the references, in another pipe.
	CHECK_EQ(tee(pipes[0], copies[1], bytes, 0), bytes);
	fill(memory, HUGE, 2);
	// Everything that the module hands out is closed, and the pipes are all that is left.
	close(snapshot);
	close(session);
	fill(memory, HUGE, 3);
	CHECK_ERRNO(unload_module("ckpt"), EWOULDBLOCK);
	CHECK(munmap(memory, HUGE) == 0);
	read_and_check(pipes[0], memory, bytes, 1);
	CHECK_ERRNO(unload_module("ckpt"), EWOULDBLOCK);
	CHECK(munmap(memory, bytes) == 0);
	read_and_check(copies[0], memory, bytes, 1);
	CHECK(unload_module("ckpt") == 0);
	CHECK(load_module(MODULE_PATH, "") == 0);
}

TEST(spliced_small_pages_outlive_the_snapshot)
{
	check_splice(false);
}

TEST(spliced_huge_pages_outlive_the_snapshot)
{
	check_splice(true);
}

TEST(spliced_pages_outlive_the_target)
{
	struct target target;
	pid_t pid = start_target(&target, false);
	int session = receive_fd(target.sockets[0]), snapshot = take(session, 0, 0).fd, pipes[2];

	CHECK(pipe(pipes) == 0);
	splice_all(snapshot, target.memory, pipes[1], 16 * PAGE);
	kill(pid, SIGKILL);
	wait_for(pid);
	close(session);
	close(snapshot);
	munmap(target.memory, BYTES);
	read_and_check(pipes[0], target.memory, 16 * PAGE, 1);
}

TEST(splice_to_file_and_socket)
{
	char *memory = map_small(16 * PAGE), buffer[PAGE];
	int session = open_session(), snapshot, pipes[2], sockets[2];
	int file = open("/tmp/spliced", O_RDWR | O_CREAT | O_TRUNC, 0600);

	CHECK(file >= 0);
	CHECK(pipe(pipes) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
	memset(memory, 4, 16 * PAGE);
	snapshot = take(session, 0, 0).fd;
	splice_all(snapshot, memory, pipes[1], 8 * PAGE);
	// Asked to move, the file still gets a copy: the page is not the pipe's alone.
	CHECK_EQ(splice(pipes[0], NULL, file, NULL, 8 * PAGE, SPLICE_F_MOVE), 8 * PAGE);
	splice_all(snapshot, memory, pipes[1], PAGE);
	CHECK_EQ(splice(pipes[0], NULL, sockets[0], NULL, PAGE, SPLICE_F_MOVE), PAGE);
	memset(memory, 5, 16 * PAGE);
	CHECK_EQ(pwrite(file, "9999", 4, 0), 4);
	char fours[PAGE];
	memset(fours, 4, PAGE);
	check_bytes(snapshot, memory, fours, PAGE);
	close(snapshot);
	memset(memory, 6, 16 * PAGE);
	CHECK_EQ(pread(file, buffer, PAGE, PAGE), PAGE);
	CHECK(memcmp(buffer, fours, PAGE) == 0);
	CHECK_EQ(recv(sockets[1], buffer, PAGE, MSG_WAITALL), PAGE);
	CHECK(memcmp(buffer, fours, PAGE) == 0);
	unlink("/tmp/spliced");
}

TEST(vmsplice_before_and_after)
{
	char *memory = map_small(4 * PAGE), buffer[PAGE], ones[PAGE];
	int session = open_session(), snapshot, pipes[2];
	struct iovec iov = { memory, PAGE };
	uint32_t kind;

	CHECK(pipe(pipes) == 0);
	memset(memory, 1, 4 * PAGE);
	memset(ones, 1, PAGE);
	// A page in a pipe has a reference that looks like I/O: the process must keep this very page.
	CHECK_EQ(vmsplice(pipes[1], &iov, 1, 0), PAGE);
	snapshot = take(session, 0, 0).fd;
	kind = kind_of(snapshot, memory);
	CHECK_EQ(kind, CKPT_KIND_COPY);
	CHECK_ERRNO(pread(snapshot, buffer, PAGE, (off_t)memory), ENXIO);
	CHECK_EQ(kind_of(snapshot, memory + PAGE), CKPT_KIND_DATA);
	memory[0] = 2;
	CHECK_EQ(read(pipes[0], buffer, PAGE), PAGE);
	// As without a snapshot, the pipe shows what was written after.
	CHECK_EQ(buffer[0], 2);
	// Once the pipe is empty, the page is as others are.
	close(snapshot);
	memory[0] = 1;
	snapshot = take(session, 0, 0).fd;
	CHECK_EQ(kind_of(snapshot, memory), CKPT_KIND_DATA);
	// From a page that a snapshot has: the pipe and the snapshot keep the old one.
	CHECK_EQ(vmsplice(pipes[1], &iov, 1, 0), PAGE);
	memset(memory, 3, PAGE);
	check_bytes(snapshot, memory, ones, PAGE);
	CHECK_EQ(read(pipes[0], buffer, PAGE), PAGE);
	check_bytes(snapshot, memory, ones, PAGE);
	CHECK_EQ(memory[1], 3);
}

static void check_device_io(bool huge, unsigned long how)
{
	char *memory = map_either(huge, HUGE);
	int testing = open("/dev/ckpt_testing", O_RDWR), session = open_session();
	char *page = memory + 7 * PAGE;

	CHECK(testing >= 0);
	memset(memory, 1, HUGE);
	CHECK(ioctl(testing, how, page) == 0);
	struct ckpt_snapshot_args args = take(session, CKPT_SNAPSHOT_CLEAR, 0);
	CHECK_EQ(kind_of(args.fd, page), CKPT_KIND_COPY);
	CHECK_EQ(kind_of(args.fd, page + PAGE), huge ? CKPT_KIND_COPY : CKPT_KIND_DATA);
	CHECK(args.pages_copy >= (huge ? HUGE / PAGE : 1));
	// The process writes, then the device: both must reach the same page.
	page[0] = 2;
	CHECK(ioctl(testing, CKPT_TESTING_WRITE, 3) == 0);
	CHECK_EQ(page[0], 3);
	CHECK_EQ(page[PAGE - 1], 3);
	CHECK(ioctl(testing, CKPT_TESTING_END, 0) == 0);
	// It is still dirty for the next.
	close(args.fd);
	args = take(session, CKPT_SNAPSHOT_INCREMENTAL | CKPT_SNAPSHOT_CLEAR, args.generation);
	CHECK_EQ(kind_of(args.fd, page), CKPT_KIND_DATA);
	CHECK_EQ(kind_of(args.fd, page + PAGE), huge ? CKPT_KIND_DATA : CKPT_KIND_SAME);
	check_bytes(args.fd, page, page, PAGE);
	close(args.fd);
	// I/O into a page of a snapshot: the device gets a page of the process, not that of the snapshot.
	memset(memory, 1, HUGE);
	args = take(session, 0, 0);
	CHECK(ioctl(testing, how, page) == 0);
	CHECK(ioctl(testing, CKPT_TESTING_WRITE, 8) == 0);
	CHECK_EQ(page[0], 8);
	memset(page, 1, PAGE);
	check_bytes(args.fd, page, page, PAGE);
	close(testing);
}

TEST(device_io_by_reference)
{
	check_device_io(false, CKPT_TESTING_GET);
}

TEST(device_io_by_pin)
{
	check_device_io(false, CKPT_TESTING_PIN);
}

TEST(device_io_to_huge_page_by_reference)
{
	check_device_io(true, CKPT_TESTING_GET);
}

TEST(device_io_to_huge_page_by_pin)
{
	check_device_io(true, CKPT_TESTING_PIN);
}

static void check_device_io_to_clean(bool huge)
{
	char *memory = map_either(huge, HUGE), *page = memory + 7 * PAGE;
	int testing = open("/dev/ckpt_testing", O_RDWR), session = open_session();

	CHECK(testing >= 0);
	memset(memory, 1, HUGE);
	CHECK(ioctl(testing, CKPT_TESTING_GET, page) == 0);
	// Its entry is neither writable nor dirty when the generation begins, and the device writes all the same.
	write_file("/proc/self/clear_refs", "4");
	struct ckpt_snapshot_args args = take(session, CKPT_SNAPSHOT_CLEAR, 0);
	CHECK_EQ(kind_of(args.fd, page), CKPT_KIND_COPY);
	CHECK(ioctl(testing, CKPT_TESTING_WRITE, 3) == 0);
	CHECK(ioctl(testing, CKPT_TESTING_END, 0) == 0);
	CHECK_EQ(page[0], 3);
	close(args.fd);
	args = take(session, CKPT_SNAPSHOT_INCREMENTAL | CKPT_SNAPSHOT_CLEAR, args.generation);
	CHECK_EQ(kind_of(args.fd, page), CKPT_KIND_DATA);
	check_bytes(args.fd, page, page, PAGE);
}

TEST(device_io_to_clean_page)
{
	check_device_io_to_clean(false);
}

TEST(device_io_to_clean_huge_page)
{
	check_device_io_to_clean(true);
}

static void check_device_io_to_part(unsigned long how)
{
	char *memory = map_huge(HUGE);
	int testing = open("/dev/ckpt_testing", O_RDWR), session = open_session();
	char *page = memory + 7 * PAGE;

	// The huge page is mapped by small entries.
	CHECK(mprotect(memory, PAGE, PROT_READ) == 0);
	CHECK(ioctl(testing, how, page) == 0);
	int snapshot = take(session, 0, 0).fd;
	CHECK_EQ(kind_of(snapshot, page), CKPT_KIND_COPY);
	page[0] = 2;
	CHECK(ioctl(testing, CKPT_TESTING_WRITE, 3) == 0);
	CHECK_EQ(page[0], 3);
	close(snapshot);
	CHECK(ioctl(testing, CKPT_TESTING_END, 0) == 0);
	snapshot = take(session, 0, 0).fd;
	CHECK_EQ(kind_of(snapshot, page), CKPT_KIND_DATA);
	check_kinds(snapshot, memory, HUGE / PAGE, CKPT_KIND_DATA);
}

TEST(device_io_to_part_of_huge_page)
{
	check_device_io_to_part(CKPT_TESTING_GET);
	check_device_io_to_part(CKPT_TESTING_PIN);
}

TEST(mmu_notifiers_are_refused)
{
	int testing = open("/dev/ckpt_testing", O_RDWR), session = open_session();
	struct ckpt_snapshot_args args = take(session, CKPT_SNAPSHOT_CLEAR, 0);
	uint64_t generation = args.generation;

	close(args.fd);
	CHECK(ioctl(testing, CKPT_TESTING_NOTIFIER, 0) == 0);
	CHECK_ERRNO(try_take(session, 0, 0, &args), EOPNOTSUPP);
	// One that would have begun a generation ends the old one, however early it fails.
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_CLEAR, 0, &args), EOPNOTSUPP);
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, generation, &args), ESTALE);
	CHECK_EQ(query_device(session).snapshots, 0);
}

TEST(foreign_mappings)
{
	char *memory = map_small(PAGE), *shared, *pages, *file_pages;
	int session = open_session(), file = open("/tmp/mapped", O_RDWR | O_CREAT | O_TRUNC, 0600), snapshot;
	struct ckpt_snapshot_args args;
	struct ckpt_run runs[64];

	CHECK(file >= 0 && ftruncate(file, 8 * PAGE) == 0);
	CHECK_EQ(pwrite(file, "file", 4, 0), 4);
	memory[0] = 1;
	shared = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(shared != MAP_FAILED);
	memset(shared, 1, 16 * PAGE);
	write_file("/proc/sys/vm/nr_hugepages", "2");
	pages = mmap(NULL, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	CHECK(pages != MAP_FAILED);
	pages[0] = 1;
	// A private mapping of a file: what was written is the process's own.
	file_pages = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	CHECK(file_pages != MAP_FAILED);
	CHECK_EQ(file_pages[0], 'f');
	file_pages[3 * PAGE] = 'x';
	args = take(session, 0, 0);
	snapshot = args.fd;
	check_kinds(snapshot, shared, 16, CKPT_KIND_FOREIGN);
	check_kinds(snapshot, pages, HUGE / PAGE, CKPT_KIND_FOREIGN);
	CHECK_EQ(kind_of(snapshot, file_pages), 0);
	CHECK_EQ(kind_of(snapshot, file_pages + 3 * PAGE), CKPT_KIND_DATA);
	CHECK_EQ(kind_of(snapshot, file_pages + 4 * PAGE), 0);
	file_pages[3 * PAGE] = 'y';
	check_bytes(snapshot, file_pages + 3 * PAGE, "x", 1);
	struct ckpt_getruns all = { .size = sizeof(all), .kinds = CKPT_KIND_FOREIGN, .va = 0,
				    .npages = ((1UL << 47) - PAGE) / PAGE, .runs = (uint64_t)runs, .nruns = 64 };
	uint64_t sum = 0;
	CHECK(ioctl(snapshot, CKPT_IOC_GETRUNS, &all) == 0);
	for (size_t i = 0; i < all.nruns; i++)
		sum += runs[i].npages;
	CHECK_EQ(sum, args.pages_foreign);
	CHECK(sum >= 16 + HUGE / PAGE);
	write_file("/proc/sys/vm/nr_hugepages", "0");
	unlink("/tmp/mapped");
}

TEST(thp_off_and_on)
{
	char old[128], *memory;
	int session = open_session(), snapshot;

	read_file("/sys/kernel/mm/transparent_hugepage/enabled", old, sizeof(old));
	write_file("/sys/kernel/mm/transparent_hugepage/enabled", "never");
	memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fill(memory, BYTES, 1);
	CHECK(!is_huge(memory));
	snapshot = take(session, 0, 0).fd;
	fill(memory, BYTES, 2);
	check_snapshot_filled(snapshot, memory, BYTES, 1);
	check_filled(memory, BYTES, 2);
	close(snapshot);
	// And on for everything, the program's own heap and stack with it.
	write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always");
	memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fill(memory, BYTES, 1);
	CHECK(is_huge(memory));
	snapshot = take(session, 0, 0).fd;
	fill(memory, BYTES, 2);
	check_snapshot_filled(snapshot, memory, BYTES, 1);
	check_filled(memory, BYTES, 2);
	write_file("/sys/kernel/mm/transparent_hugepage/enabled", strstr(old, "[always]") ? "always" : "madvise");
}

TEST(page_of_zeros)
{
	char *memory = map_small(8 * PAGE), *big = map_huge(HUGE);
	int session = open_session(), snapshot;
	static char zeros[PAGE];

	for (size_t i = 0; i < 4; i++)
		CHECK_EQ(*(volatile char *)(memory + i * PAGE), 0);
	CHECK(madvise(big, HUGE, MADV_DONTNEED) == 0);
	CHECK_EQ(*(volatile char *)(big + HUGE / 2), 0);
	// What has never been written has no memory of its own; a first write makes it so.
	memory[7 * PAGE] = 1;
	big[0] = 0;
	CHECK(madvise(big, HUGE, MADV_DONTNEED) == 0);
	CHECK_EQ(*(volatile char *)(big + HUGE / 2), 0);
	snapshot = take(session, 0, 0).fd;
	memset(memory, 1, 4 * PAGE);
	check_kinds(snapshot, memory, 4, CKPT_KIND_ZERO);
	check_kinds(snapshot, memory + 4 * PAGE, 3, 0);
	check_bytes(snapshot, memory, zeros, PAGE);
	CHECK_EQ(kind_of(snapshot, big + HUGE / 2), CKPT_KIND_ZERO);
	check_bytes(snapshot, big + HUGE / 2, zeros, PAGE);
}

// Fills 64 pages alike and has the kernel make one page of them.
static void merge_pages(char *memory, char value)
{
	size_t alike;

	memset(memory, value, 64 * PAGE);
	CHECK(madvise(memory, 64 * PAGE, MADV_MERGEABLE) == 0);
	write_file("/sys/kernel/mm/ksm/pages_to_scan", "1000");
	write_file("/sys/kernel/mm/ksm/sleep_millisecs", "1");
	write_file("/sys/kernel/mm/ksm/run", "1");
	// A few may be passed over.
	do {
		uint64_t frame, last = 0;

		sched_yield();
		alike = 0;
		for (size_t i = 0; i < 64; i++, last = frame) {
			frame = pagemap(memory + i * PAGE) & PAGEMAP_FRAME;
			CHECK(frame != 0);
			alike += frame == last;
		}
	} while (alike < 56);
	// It holds no page any more when this returns.
	write_file("/sys/kernel/mm/ksm/run", "0");
}

// KSM: pages merged by the kernel are shared with others already.
TEST(merged_pages)
{
	char *memory = map_small(64 * PAGE), *fresh;
	int session = open_session(), snapshot;

	merge_pages(memory, 42);
	snapshot = take(session, 0, 0).fd;
	memset(memory, 43, 64 * PAGE);
	fresh = map_small(PAGE);
	memset(fresh, 42, PAGE);
	for (size_t i = 0; i < 64; i++) {
		CHECK_EQ(kind_of(snapshot, memory + i * PAGE), CKPT_KIND_DATA);
		check_bytes(snapshot, memory + i * PAGE, fresh, PAGE);
		CHECK_EQ(memory[i * PAGE], 43);
	}
	write_file("/sys/kernel/mm/ksm/run", "2");
}

// What was written, then merged, has no dirty bit any more, and is not the same.
TEST(merged_pages_are_dirty)
{
	char *memory = map_small(64 * PAGE), expected[PAGE];
	int session = open_session();
	struct ckpt_snapshot_args args;

	memset(memory, 1, 64 * PAGE);
	args = take(session, CKPT_SNAPSHOT_CLEAR, 0);
	for (char value = 42; value < 46; value++) {
		close(args.fd);
		merge_pages(memory, value);
		// Merging may be over by the time of the snapshot.
		if (value % 2)
			CHECK(madvise(memory, 64 * PAGE, MADV_UNMERGEABLE) == 0);
		args = take(session, CKPT_SNAPSHOT_INCREMENTAL | CKPT_SNAPSHOT_CLEAR, args.generation);
		check_kinds(args.fd, memory, 64, CKPT_KIND_DATA);
		memset(expected, value, PAGE);
		for (size_t i = 0; i < 64; i++)
			check_bytes(args.fd, memory + i * PAGE, expected, PAGE);
	}
	write_file("/sys/kernel/mm/ksm/run", "2");
}

// Swap, in compressed memory.

// Pushes a range out; every page of it.
void swap_out(char *memory, size_t bytes)
{
	size_t in = 1;

	for (int attempt = 0; in && attempt < 100; attempt++) {
		CHECK(madvise(memory, bytes, MADV_PAGEOUT) == 0);
		in = 0;
		for (size_t i = 0; i < bytes; i += PAGE)
			in += !(pagemap(memory + i) & PAGEMAP_SWAPPED);
	}
	if (in)
		FAIL("%zu pages are still in memory", in);
}

TEST(swapped_pages)
{
	char *memory = map_small(BYTES);
	int session = open_session(), snapshot;

	fill(memory, BYTES, 1);
	swap_out(memory, BYTES);
	CHECK(mprotect(memory, BYTES / 4, PROT_NONE) == 0);
	CHECK(mprotect(memory + BYTES / 4, BYTES / 4, PROT_READ) == 0);
	snapshot = take(session, 0, 0).fd;
	check_kinds(snapshot, memory, BYTES / PAGE, CKPT_KIND_DATA);
	CHECK(mprotect(memory, BYTES, PROT_READ | PROT_WRITE) == 0);
	fill(memory, BYTES, 2);
	check_snapshot_filled(snapshot, memory, BYTES, 1);
	check_filled(memory, BYTES, 2);
}

TEST(swapping_while_there_is_a_snapshot)
{
	char *memory = map_small(BYTES);
	int session = open_session(), snapshot;

	fill(memory, BYTES, 1);
	snapshot = take(session, 0, 0).fd;
	// Shared with the snapshot they cannot go; what is written since can.
	CHECK(madvise(memory, BYTES, MADV_PAGEOUT) == 0);
	fill(memory, BYTES / 2, 2);
	CHECK(madvise(memory, BYTES, MADV_PAGEOUT) == 0);
	check_snapshot_filled(snapshot, memory, BYTES, 1);
	check_filled(memory, BYTES / 2, 2);
	check_filled(memory + BYTES / 2, BYTES / 2, 1);
	CHECK(madvise(memory, BYTES, MADV_PAGEOUT) == 0);
	fill(memory, BYTES, 3);
	check_snapshot_filled(snapshot, memory, BYTES, 1);
	check_filled(memory, BYTES, 3);
	close(snapshot);
	swap_out(memory, BYTES);
	check_filled(memory, BYTES, 3);
}

// As linux/userfaultfd.h has it from 6.6 on.
struct uffdio_poison_args {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define FEATURE_POISON (1 << 14)
#define IOCTL_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison_args)

TEST(poisoned_pages)
{
	char *memory = map_small(3 * PAGE);
	struct uffdio_api api = { UFFD_API, FEATURE_POISON, 0 };
	struct uffdio_register watched = { { (uintptr_t)memory, 3 * PAGE }, UFFDIO_REGISTER_MODE_MISSING, 0 };
	struct uffdio_poison_args poison = { { (uintptr_t)memory + PAGE, PAGE }, 0, 0 };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC), snapshot;

	memset(memory, 1, PAGE);
	CHECK(fd >= 0);
	// Nothing leaves such pages before 6.6.
	if (ioctl(fd, UFFDIO_API, &api))
		return;
	CHECK(ioctl(fd, UFFDIO_REGISTER, &watched) == 0);
	CHECK(ioctl(fd, IOCTL_POISON, &poison) == 0);
	close(fd);
	snapshot = take(open_session(), 0, 0).fd;
	CHECK_EQ(kind_of(snapshot, memory), CKPT_KIND_DATA);
	// Not absent, which would be restored as zeros: whoever copies it finds that it cannot be read.
	CHECK_EQ(kind_of(snapshot, memory + PAGE), CKPT_KIND_COPY);
	CHECK_EQ(kind_of(snapshot, memory + 2 * PAGE), 0);
}
