// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * epoll: data values, level and edge triggered, EPOLLONESHOT armed and disarmed, members of several kinds, nested sets,
 * a member whose descriptor was closed while a duplicate lives, EPOLLEXCLUSIVE, and a thread that waits.
 */
#include "mem_pattern.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

static int waited_set, waited_pipe[2];
static _Atomic int waiting;

static void add(int set, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = { .events = events, .data.u64 = data };

	MUST(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event));
}

/* Exactly the events of the set now: `count` of them, each (data, events). */
static void expect_events(const char *what, int set, int count, const struct epoll_event *expected)
{
	struct epoll_event got[16];
	int n = MUST(epoll_wait(set, got, 16, 0));

	GUEST_CHECK(n == count, "%s: expected %d events, got %d", what, count, n);
	for (int i = 0; i < count; i++) {
		int found = 0;

		for (int j = 0; j < n; j++)
			found |= got[j].data.u64 == expected[i].data.u64 && got[j].events == expected[i].events;
		GUEST_CHECK(found, "%s: no event %#x with data %#lx", what, expected[i].events,
			    (long)expected[i].data.u64);
	}
}

static void *waiter(void *arg)
{
	struct epoll_event event;

	(void)arg;
	waiting = 1;
	EXPECT_EQ("waiting thread", 1, epoll_wait(waited_set, &event, 1, -1));
	EXPECT_EQ("its event's data", 0x77, event.data.u64);
	return NULL;
}

#define EVENT(bits, value) ((struct epoll_event){ .events = (bits), .data.u64 = (value) })

int main(int argc, char **argv)
{
	int level, edge, oneshot, outer, inner, dangling, pipe_fd[2], edge_pipe[2], fired[2], armed[2], inner_pipe[2], gone[2];
	int event_fd, sockets[2], kept;
	uint64_t one = 1;
	pthread_t thread;

	pattern_begin(argc, argv);
	level = MUST(epoll_create1(EPOLL_CLOEXEC));
	MUST(pipe(pipe_fd));
	event_fd = MUST(eventfd(0, EFD_NONBLOCK));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
	add(level, pipe_fd[0], EPOLLIN, guest_seed);
	add(level, event_fd, EPOLLIN | EPOLLEXCLUSIVE, 2);
	add(level, sockets[0], EPOLLIN | EPOLLRDHUP, 3);
	MUST(write(pipe_fd[1], "x", 1));

	/* An edge that was reported before the dump is not reported again; one that was not still is. */
	edge = MUST(epoll_create1(0));
	MUST(pipe(edge_pipe));
	add(edge, edge_pipe[0], EPOLLIN | EPOLLET, 4);

	oneshot = MUST(epoll_create1(0));
	MUST(pipe(fired));
	MUST(pipe(armed));
	add(oneshot, fired[0], EPOLLIN | EPOLLONESHOT, 5);
	add(oneshot, armed[0], EPOLLIN | EPOLLONESHOT, 6);
	MUST(write(fired[1], "x", 1));
	expect_events("oneshot before", oneshot, 1, &EVENT(EPOLLIN, 5));

	outer = MUST(epoll_create1(0));
	inner = MUST(epoll_create1(0));
	MUST(pipe(inner_pipe));
	add(outer, inner, EPOLLIN, 8);
	add(inner, inner_pipe[0], EPOLLIN, 9);

	dangling = MUST(epoll_create1(0));
	MUST(pipe(gone));
	add(dangling, gone[0], EPOLLIN, 10);
	kept = MUST(dup(gone[0]));
	close(gone[0]);

	waited_set = MUST(epoll_create1(0));
	MUST(pipe(waited_pipe));
	add(waited_set, waited_pipe[0], EPOLLIN, 0x77);
	MUST0(pthread_create(&thread, NULL, waiter, NULL));
	while (!waiting)
		guest_nap();

	guest_ready();
	guest_wait_go();

	expect_events("level triggered", level, 1, &EVENT(EPOLLIN, guest_seed));
	expect_events("level triggered, again", level, 1, &EVENT(EPOLLIN, guest_seed));
	MUST(write(event_fd, &one, 8));
	close(sockets[1]);
	struct epoll_event three[] = { EVENT(EPOLLIN, guest_seed), EVENT(EPOLLIN, 2),
				       EVENT(EPOLLIN | EPOLLRDHUP | EPOLLHUP, 3) };
	/* EPOLLHUP is always reported, for a stream socket whose peer is gone. */
	expect_events("three members", level, 3, three);
	struct epoll_event changed = EVENT(EPOLLOUT, 12);

	EXPECT_EQ("EPOLL_CTL_MOD of an exclusive member", -1, epoll_ctl(level, EPOLL_CTL_MOD, event_fd, &changed));
	MUST(epoll_ctl(level, EPOLL_CTL_DEL, event_fd, NULL));
	EXPECT_EQ("FD_CLOEXEC", FD_CLOEXEC, fcntl(level, F_GETFD));

	expect_events("edge triggered, empty", edge, 0, NULL);
	MUST(write(edge_pipe[1], "x", 1));
	expect_events("edge triggered, first look", edge, 1, &EVENT(EPOLLIN, 4));
	expect_events("edge triggered, second look", edge, 0, NULL);
	MUST(write(edge_pipe[1], "x", 1));
	expect_events("edge triggered, next edge", edge, 1, &EVENT(EPOLLIN, 4));

	expect_events("disarmed oneshot", oneshot, 0, NULL);
	MUST(write(armed[1], "x", 1));
	expect_events("armed oneshot", oneshot, 1, &EVENT(EPOLLIN, 6));
	expect_events("armed oneshot, again", oneshot, 0, NULL);
	changed = EVENT(EPOLLIN | EPOLLONESHOT, 13);
	MUST(epoll_ctl(oneshot, EPOLL_CTL_MOD, fired[0], &changed));
	expect_events("rearmed oneshot", oneshot, 1, &EVENT(EPOLLIN, 13));

	expect_events("nested, quiet", outer, 0, NULL);
	MUST(write(inner_pipe[1], "x", 1));
	expect_events("outer set", outer, 1, &EVENT(EPOLLIN, 8));
	expect_events("inner set", inner, 1, &EVENT(EPOLLIN, 9));

	MUST(write(gone[1], "x", 1));
	expect_events("member whose descriptor is closed", dangling, 1, &EVENT(EPOLLIN, 10));
	close(kept);
	expect_events("member whose description is closed", dangling, 0, NULL);

	MUST(write(waited_pipe[1], "x", 1));
	MUST0(pthread_join(thread, NULL));
	guest_ok();
}
