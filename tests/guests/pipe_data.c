// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Pipes with 0, 1, 60000 bytes and full, of changed capacity, O_NONBLOCK on one end only, in packet mode; the next bytes
 * written come after those that wait.
 */
#include "mem_pattern.h"

#include <poll.h>

#define BIG_CAPACITY (256 << 10)

static char source[BIG_CAPACITY], got[BIG_CAPACITY];

struct pipe_case {
	const char *name;
	int fd[2];
	int capacity;
	size_t bytes;
	size_t skipped;
};

static void fill(struct pipe_case *pipe_case, const char *name, int capacity, size_t bytes, size_t skipped)
{
	pipe_case->name = name;
	MUST(pipe2(pipe_case->fd, O_CLOEXEC));
	if (capacity)
		MUST(fcntl(pipe_case->fd[1], F_SETPIPE_SZ, capacity));
	pipe_case->capacity = MUST(fcntl(pipe_case->fd[0], F_GETPIPE_SZ));
	for (size_t at = 0; at < bytes;)
		at += MUST(write(pipe_case->fd[1], source + at, bytes - at));
	/* Read a part, so that the first buffer of the pipe starts in the middle of its page. */
	if (skipped)
		EXPECT_EQ("read", (ssize_t)skipped, read(pipe_case->fd[0], got, skipped));
	pipe_case->bytes = bytes;
	pipe_case->skipped = skipped;
}

static void check(struct pipe_case *pipe_case)
{
	size_t left = pipe_case->bytes - pipe_case->skipped, at = 0;
	struct pollfd poll_fd = { .fd = pipe_case->fd[1], .events = POLLOUT };

	GUEST_CHECK(fcntl(pipe_case->fd[0], F_GETPIPE_SZ) == pipe_case->capacity, "%s: capacity: expected %d, got %d",
		    pipe_case->name, pipe_case->capacity, fcntl(pipe_case->fd[0], F_GETPIPE_SZ));
	GUEST_CHECK(fcntl(pipe_case->fd[0], F_GETFD) == FD_CLOEXEC, "%s: FD_CLOEXEC lost", pipe_case->name);
	MUST(poll(&poll_fd, 1, 0));
	if (pipe_case->bytes < (size_t)pipe_case->capacity)
		EXPECT_EQ("write after the restore", 5, write(pipe_case->fd[1], "after", 5));
	else
		GUEST_CHECK(!(poll_fd.revents & POLLOUT), "%s: the full pipe is writable", pipe_case->name);
	if (pipe_case->bytes < (size_t)pipe_case->capacity)
		left += 5;
	close(pipe_case->fd[1]);
	for (ssize_t n; (n = MUST(read(pipe_case->fd[0], got + at, sizeof(got) - at))) > 0;)
		at += n;
	GUEST_CHECK(at == left, "%s: expected %zu bytes, got %zu", pipe_case->name, left, at);
	if (pipe_case->bytes < (size_t)pipe_case->capacity) {
		left -= 5;
		EXPECT_MEM("bytes written after the restore", "after", got + left, 5);
	}
	EXPECT_MEM(pipe_case->name, source + pipe_case->skipped, got, left);
}

int main(int argc, char **argv)
{
	struct pipe_case pipes[7];
	int packets[2], one_sided[2];
	char buffer[4096];

	pattern_begin(argc, argv);
	pattern_fill(source, sizeof(source), guest_seed);
	fill(&pipes[0], "empty pipe", 0, 0, 0);
	fill(&pipes[1], "pipe with a byte", 0, 1, 0);
	fill(&pipes[2], "pipe with 60000 bytes", 0, 60000, 0);
	fill(&pipes[3], "full pipe", 0, 65536, 0);
	fill(&pipes[4], "small pipe", 4096, 1000, 0);
	fill(&pipes[5], "big pipe", BIG_CAPACITY, 200000, 0);
	fill(&pipes[6], "pipe read in part", 0, 30000, 1234);

	MUST(pipe2(packets, O_DIRECT));
	EXPECT_EQ("write", 10, write(packets[1], source, 10));
	EXPECT_EQ("write", 20, write(packets[1], source + 10, 20));
	EXPECT_EQ("write", 4096, write(packets[1], source + 30, 4096));
	EXPECT_EQ("write", 1, write(packets[1], source + 30 + 4096, 1));
	MUST(pipe(one_sided));
	MUST(fcntl(one_sided[0], F_SETFL, O_NONBLOCK));

	guest_ready();
	guest_wait_go();

	for (size_t i = 0; i < sizeof(pipes) / sizeof(pipes[0]); i++)
		check(&pipes[i]);
	GUEST_CHECK(fcntl(packets[1], F_GETFL) & O_DIRECT, "packet mode is lost");
	EXPECT_EQ("first packet", 10, read(packets[0], buffer, sizeof(buffer)));
	EXPECT_MEM("first packet", source, buffer, 10);
	/* The rest of a packet is dropped. */
	EXPECT_EQ("part of the second packet", 5, read(packets[0], buffer, 5));
	EXPECT_EQ("third packet", 4096, read(packets[0], buffer, sizeof(buffer)));
	EXPECT_MEM("third packet", source + 30, buffer, 4096);
	EXPECT_EQ("fourth packet", 1, read(packets[0], buffer, sizeof(buffer)));
	EXPECT_EQ("O_NONBLOCK of the read end", O_NONBLOCK, fcntl(one_sided[0], F_GETFL) & O_NONBLOCK);
	EXPECT_EQ("O_NONBLOCK of the write end", 0, fcntl(one_sided[1], F_GETFL) & O_NONBLOCK);
	EXPECT_EQ("read of the empty pipe", -1, read(one_sided[0], buffer, 1));
	EXPECT_EQ("errno", EAGAIN, errno);
	guest_ok();
}
