// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * TCP connections: one that a thread reads from, one that a thread writes to until it is full, one in epoll, one with data not
 * read, one not accepted. With the argument "kept" they must go on, with "reset" all must be found reset by the peer.
 */
#include "mem_pattern.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define MUCH (32 << 20)

static struct sockaddr_in address = { .sin_family = AF_INET };
static int listening, ends[4][2];
static char *much;
static ssize_t reader_got;
static int reader_errno;
static ssize_t writer_got;

static void *reader(void *unused)
{
	char byte;

	(void)unused;
	reader_got = read(ends[0][0], &byte, 1);
	reader_errno = errno;
	return NULL;
}

static void *writer(void *unused)
{
	(void)unused;
	writer_got = send(ends[1][0], much, MUCH, MSG_NOSIGNAL);
	return NULL;
}

static void check_reset(const char *what, int fd)
{
	char byte;

	EXPECT_EQ(what, -1, read(fd, &byte, 1));
	EXPECT_EQ(what, ECONNRESET, errno);
	EXPECT_EQ(what, 0, read(fd, &byte, 1));
	EXPECT_EQ(what, -1, send(fd, "x", 1, MSG_NOSIGNAL));
	EXPECT_EQ(what, EPIPE, errno);
}

int main(int argc, char **argv)
{
	socklen_t size = sizeof(address);
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.u64 = 77 };
	struct tcp_info info;
	pthread_t threads[2];
	int epoll, pending, unsent = 0;
	bool kept;
	char byte;

	pattern_begin(argc, argv);
	GUEST_CHECK(argc > 2, "kept or reset?");
	kept = !strcmp(argv[2], "kept");
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	listening = MUST(socket(AF_INET, SOCK_STREAM, 0));
	/* As servers do: what is left of old connections (TIME_WAIT) is not to stand in the way. */
	MUST(setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int)));
	MUST(bind(listening, (void *)&address, sizeof(address)));
	MUST(getsockname(listening, (void *)&address, &size));
	MUST(listen(listening, 8));
	for (int i = 0; i < 4; i++) {
		ends[i][0] = MUST(socket(AF_INET, SOCK_STREAM, 0));
		MUST(connect(ends[i][0], (void *)&address, sizeof(address)));
		ends[i][1] = MUST(accept(listening, NULL, NULL));
	}
	much = calloc(1, MUCH);
	EXPECT(much);
	epoll = MUST(epoll_create1(0));
	MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, ends[2][0], &event));
	EXPECT_EQ("write", 1, write(ends[3][1], "d", 1));
	pending = MUST(socket(AF_INET, SOCK_STREAM, 0));
	MUST(connect(pending, (void *)&address, sizeof(address)));
	MUST0(pthread_create(&threads[0], NULL, reader, NULL));
	MUST0(pthread_create(&threads[1], NULL, writer, NULL));
	while (unsent == 0) {
		struct pollfd p = { ends[1][0], POLLOUT, 0 };

		/* Full: the writer waits. */
		unsent = MUST(poll(&p, 1, 0)) == 0;
		sched_yield();
	}

	guest_ready();
	guest_wait_go();

	if (kept) {
		EXPECT_EQ("write", 1, write(ends[0][1], "k", 1));
		MUST0(pthread_join(threads[0], NULL));
		EXPECT_EQ("reader", 1, reader_got);
		for (size_t at = 0; at < MUCH;) {
			ssize_t n = MUST(read(ends[1][1], much, MUCH - at));

			EXPECT(n > 0);
			at += n;
		}
		MUST0(pthread_join(threads[1], NULL));
		EXPECT_EQ("writer", MUCH, writer_got);
		EXPECT_EQ("epoll before there is anything", 0, epoll_wait(epoll, &event, 1, 0));
		EXPECT_EQ("write", 1, write(ends[2][1], "e", 1));
		EXPECT_EQ("epoll", 1, MUST(epoll_wait(epoll, &event, 1, -1)));
		EXPECT_EQ("epoll events", EPOLLIN, event.events);
		EXPECT_EQ("read", 1, read(ends[3][0], &byte, 1));
		EXPECT_EQ("byte", 'd', byte);
		MUST(accept(listening, NULL, NULL));
		guest_ok();
	}
	MUST0(pthread_join(threads[0], NULL));
	EXPECT_EQ("reader", -1, reader_got);
	EXPECT_EQ("reader's errno", ECONNRESET, reader_errno);
	MUST0(pthread_join(threads[1], NULL));
	EXPECT(writer_got < MUCH);
	EXPECT_EQ("epoll", 1, MUST(epoll_wait(epoll, &event, 1, -1)));
	EXPECT_EQ("epoll events", EPOLLIN | EPOLLERR | EPOLLHUP, event.events);
	EXPECT_EQ("epoll data", 77, event.data.u64);
	check_reset("one in epoll", ends[2][0]);
	check_reset("its other end", ends[2][1]);
	check_reset("one with data", ends[3][0]);
	check_reset("one that was not accepted", pending);
	size = sizeof(info);
	MUST(getsockopt(listening, IPPROTO_TCP, TCP_INFO, &info, &size));
	EXPECT_EQ("connections that wait to be accepted", 0, info.tcpi_unacked);
	/* New ones are made as before. */
	pending = MUST(socket(AF_INET, SOCK_STREAM, 0));
	MUST(connect(pending, (void *)&address, sizeof(address)));
	EXPECT_EQ("write", 1, write(pending, "n", 1));
	EXPECT_EQ("read", 1, read(MUST(accept(listening, NULL, NULL)), &byte, 1));
	guest_ok();
}
