// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * TCP sockets that are unconnected, bound or listening, with their options; a child that waits in accept(), a listening
 * socket in epoll, and connections that were over before the dump. The file "port" has the port of a listening socket.
 */
#include "mem_pattern.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

static void set(int fd, int level, int name, int value)
{
	MUST(setsockopt(fd, level, name, &value, sizeof(value)));
}

static int get(int fd, int level, int name)
{
	int value = -1;
	socklen_t size = sizeof(value);

	MUST(getsockopt(fd, level, name, &value, &size));
	return value;
}

static int port_of(int fd)
{
	struct sockaddr_in6 address;
	socklen_t size = sizeof(address);

	MUST(getsockname(fd, (void *)&address, &size));
	return ntohs(address.sin6_port);
}

static void bind_loopback(int fd)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

	MUST(bind(fd, (void *)&address, sizeof(address)));
}

static int client(int port, int flags)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port),
				       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = MUST(socket(AF_INET, SOCK_STREAM | flags, 0));

	if (connect(fd, (void *)&address, sizeof(address)))
		EXPECT_EQ("connect", EINPROGRESS, errno);
	return fd;
}

/* A connection that the other end has reset; told of already, or not. */
static int make_dead(int listening, bool told)
{
	struct linger at_once = { 1, 0 };
	int fd = client(port_of(listening), 0), end = MUST(accept(listening, NULL, NULL));
	struct pollfd p = { fd, POLLRDHUP, 0 };

	MUST(setsockopt(end, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once)));
	close(end);
	MUST(poll(&p, 1, -1));
	if (told)
		EXPECT_EQ("SO_ERROR", ECONNRESET, get(fd, SOL_SOCKET, SO_ERROR));
	return fd;
}

static void check_dead(const char *what, int fd, bool told)
{
	struct pollfd p = { fd, POLLIN | POLLRDHUP, 0 };
	char byte;

	EXPECT_EQ(what, 1, poll(&p, 1, 0));
	EXPECT_EQ(what, POLLIN | POLLRDHUP | POLLHUP | (told ? 0 : POLLERR), p.revents);
	if (!told) {
		EXPECT_EQ(what, -1, read(fd, &byte, 1));
		EXPECT_EQ(what, ECONNRESET, errno);
	}
	EXPECT_EQ(what, 0, read(fd, &byte, 1));
	EXPECT_EQ(what, -1, send(fd, "x", 1, MSG_NOSIGNAL));
	EXPECT_EQ(what, EPIPE, errno);
}

int main(int argc, char **argv)
{
	struct sockaddr_in6 any6 = { .sin6_family = AF_INET6 };
	struct linger linger = { 1, 7 }, linger_got;
	struct timeval timeout = { 12, 500000 }, timeout_got;
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.u64 = 0x1234567890 };
	int fresh, bound, six, listening, waiting, shared[2], watched, epoll, dead, told, duplicate, sndbuf, rcvbuf;
	int ports[6], maxseg;
	char text[32], name[16] = "";
	socklen_t size;
	pid_t child;

	pattern_begin(argc, argv);
	fresh = MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
	set(fresh, IPPROTO_TCP, TCP_NODELAY, 1);
	set(fresh, SOL_SOCKET, SO_KEEPALIVE, 1);
	set(fresh, IPPROTO_TCP, TCP_KEEPIDLE, 71);
	set(fresh, IPPROTO_TCP, TCP_KEEPINTVL, 13);
	set(fresh, IPPROTO_TCP, TCP_KEEPCNT, 4);
	set(fresh, IPPROTO_TCP, TCP_USER_TIMEOUT, 12345);
	set(fresh, IPPROTO_TCP, TCP_MAXSEG, 1000);
	set(fresh, SOL_SOCKET, SO_SNDBUF, 40000);
	set(fresh, SOL_SOCKET, SO_RCVBUF, 30000);
	set(fresh, IPPROTO_IP, IP_TOS, 0x10);
	set(fresh, SOL_SOCKET, SO_PRIORITY, 3);
	MUST(setsockopt(fresh, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)));
	MUST(setsockopt(fresh, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)));
	MUST(setsockopt(fresh, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
	MUST(fcntl(fresh, F_SETOWN, getpid()));
	sndbuf = get(fresh, SOL_SOCKET, SO_SNDBUF);
	rcvbuf = get(fresh, SOL_SOCKET, SO_RCVBUF);
	maxseg = get(fresh, IPPROTO_TCP, TCP_MAXSEG);

	bound = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	bind_loopback(bound);
	six = MUST(socket(AF_INET6, SOCK_STREAM, 0));
	set(six, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	MUST(bind(six, (void *)&any6, sizeof(any6)));
	MUST(listen(six, 3));
	listening = MUST(socket(AF_INET, SOCK_STREAM, 0));
	set(listening, SOL_SOCKET, SO_REUSEADDR, 1);
	set(listening, IPPROTO_TCP, TCP_FASTOPEN, 5);
	set(listening, IPPROTO_TCP, TCP_DEFER_ACCEPT, 7);
	bind_loopback(listening);
	MUST(listen(listening, 9));
	duplicate = MUST(dup(listening));
	/* Two that share a port. */
	for (int i = 0; i < 2; i++) {
		struct sockaddr_in address;

		size = sizeof(address);
		shared[i] = MUST(socket(AF_INET, SOCK_STREAM, 0));
		set(shared[i], SOL_SOCKET, SO_REUSEPORT, 1);
		if (i == 0) {
			bind_loopback(shared[0]);
		} else {
			MUST(getsockname(shared[0], (void *)&address, &size));
			MUST(bind(shared[1], (void *)&address, sizeof(address)));
		}
		MUST(listen(shared[i], 4));
	}
	watched = MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
	bind_loopback(watched);
	MUST(listen(watched, 4));
	epoll = MUST(epoll_create1(0));
	MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, watched, &event));
	waiting = MUST(socket(AF_INET, SOCK_STREAM, 0));
	bind_loopback(waiting);
	MUST(listen(waiting, 4));
	dead = make_dead(waiting, false);
	told = make_dead(waiting, true);
	child = MUST(fork());
	if (child == 0) {
		/* Blocked across the dump. */
		int end = MUST(accept(waiting, NULL, NULL));

		EXPECT_EQ("child's read", 4, read(end, text, 4));
		EXPECT_EQ("child's write", 4, write(end, "pong", 4));
		_exit(0);
	}
	int all[] = { bound, six, listening, shared[0], watched, waiting };

	for (int i = 0; i < 6; i++)
		ports[i] = port_of(all[i]);
	snprintf(text, sizeof(text), "%d", ports[2]);
	guest_publish("port", text);

	guest_ready();
	guest_wait_go();

	for (int i = 0; i < 6; i++)
		EXPECT_EQ("port", ports[i], port_of(all[i]));
	EXPECT_EQ("port of the second that shares it", ports[3], port_of(shared[1]));
	EXPECT_EQ("port of the unconnected one", 0, port_of(fresh));
	EXPECT_EQ("TCP_NODELAY", 1, get(fresh, IPPROTO_TCP, TCP_NODELAY));
	EXPECT_EQ("SO_KEEPALIVE", 1, get(fresh, SOL_SOCKET, SO_KEEPALIVE));
	EXPECT_EQ("TCP_KEEPIDLE", 71, get(fresh, IPPROTO_TCP, TCP_KEEPIDLE));
	EXPECT_EQ("TCP_KEEPINTVL", 13, get(fresh, IPPROTO_TCP, TCP_KEEPINTVL));
	EXPECT_EQ("TCP_KEEPCNT", 4, get(fresh, IPPROTO_TCP, TCP_KEEPCNT));
	EXPECT_EQ("TCP_USER_TIMEOUT", 12345, get(fresh, IPPROTO_TCP, TCP_USER_TIMEOUT));
	EXPECT_EQ("TCP_MAXSEG", maxseg, get(fresh, IPPROTO_TCP, TCP_MAXSEG));
	EXPECT_EQ("SO_SNDBUF", sndbuf, get(fresh, SOL_SOCKET, SO_SNDBUF));
	EXPECT_EQ("SO_RCVBUF", rcvbuf, get(fresh, SOL_SOCKET, SO_RCVBUF));
	EXPECT_EQ("IP_TOS", 0x10, get(fresh, IPPROTO_IP, IP_TOS));
	EXPECT_EQ("SO_PRIORITY", 3, get(fresh, SOL_SOCKET, SO_PRIORITY));
	size = sizeof(linger_got);
	MUST(getsockopt(fresh, SOL_SOCKET, SO_LINGER, &linger_got, &size));
	EXPECT_EQ("SO_LINGER", 7, linger_got.l_onoff ? linger_got.l_linger : -1);
	size = sizeof(timeout_got);
	MUST(getsockopt(fresh, SOL_SOCKET, SO_RCVTIMEO, &timeout_got, &size));
	EXPECT_EQ("SO_RCVTIMEO", 12500000, timeout_got.tv_sec * 1000000 + timeout_got.tv_usec);
	size = sizeof(name);
	MUST(getsockopt(fresh, IPPROTO_TCP, TCP_CONGESTION, name, &size));
	EXPECT_STR("TCP_CONGESTION", "reno", name);
	EXPECT_EQ("F_GETOWN", getpid(), fcntl(fresh, F_GETOWN));
	EXPECT_EQ("O_NONBLOCK", O_NONBLOCK, fcntl(fresh, F_GETFL) & O_NONBLOCK);
	EXPECT_EQ("FD_CLOEXEC", FD_CLOEXEC, fcntl(bound, F_GETFD));
	EXPECT_EQ("SO_REUSEADDR of one without it", 0, get(bound, SOL_SOCKET, SO_REUSEADDR));
	EXPECT_EQ("SO_ACCEPTCONN of one that only is bound", 0, get(bound, SOL_SOCKET, SO_ACCEPTCONN));
	EXPECT_EQ("SO_REUSEADDR", 1, get(listening, SOL_SOCKET, SO_REUSEADDR));
	EXPECT_EQ("TCP_FASTOPEN", 5, get(listening, IPPROTO_TCP, TCP_FASTOPEN));
	EXPECT_EQ("TCP_DEFER_ACCEPT", 7, get(listening, IPPROTO_TCP, TCP_DEFER_ACCEPT));
	EXPECT_EQ("SO_ACCEPTCONN", 1, get(listening, SOL_SOCKET, SO_ACCEPTCONN));
	EXPECT_EQ("SO_REUSEPORT", 1, get(shared[1], SOL_SOCKET, SO_REUSEPORT));
	EXPECT_EQ("IPV6_V6ONLY", 1, get(six, IPPROTO_IPV6, IPV6_V6ONLY));
	struct tcp_info info;

	size = sizeof(info);
	MUST(getsockopt(listening, IPPROTO_TCP, TCP_INFO, &info, &size));
	EXPECT_EQ("backlog", 9, info.tcpi_sacked);

	/* One description: what is done to one number is seen by the other. */
	set(duplicate, SOL_SOCKET, SO_KEEPALIVE, 1);
	EXPECT_EQ("SO_KEEPALIVE of the duplicate", 1, get(listening, SOL_SOCKET, SO_KEEPALIVE));
	int end = client(ports[2], 0);

	EXPECT_EQ("write", 2, write(end, "hi", 2));
	int accepted = MUST(accept(duplicate, NULL, NULL));

	EXPECT_EQ("read", 2, read(accepted, text, sizeof(text)));
	EXPECT_EQ("epoll before there is anything", 0, epoll_wait(epoll, &event, 1, 0));
	client(ports[4], 0);
	EXPECT_EQ("epoll", 1, MUST(epoll_wait(epoll, &event, 1, -1)));
	EXPECT_EQ("epoll data", 0x1234567890, event.data.u64);
	MUST(accept(watched, NULL, NULL));
	EXPECT_EQ("accept of nothing", -1, accept(watched, NULL, NULL));
	EXPECT_EQ("errno", EAGAIN, errno);
	end = client(ports[5], 0);
	EXPECT_EQ("write", 4, write(end, "ping", 4));
	EXPECT_EQ("answer of the child", 4, read(end, text, 4));
	guest_join(child);
	check_dead("reset connection", dead, false);
	check_dead("reset connection, told of", told, true);
	MUST(listen(bound, 1));
	end = client(ports[0], 0);
	MUST(accept(bound, NULL, NULL));
	guest_ok();
}
