// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Unix socket pairs: stream with data queued both ways, datagrams and packets with their bounds, half shut down, peer
 * closed with data left, options, and ends in two processes. With the argument "empty" one of the datagrams is empty.
 */
#include "mem_pattern.h"

#include <poll.h>
#include <sys/socket.h>

#define QUEUED 50000

static char source[QUEUED], got[QUEUED * 2];

static void read_all(const char *what, int fd, size_t bytes)
{
	size_t at = 0;

	while (at < bytes) {
		ssize_t n = MUST(recv(fd, got + at, bytes - at, MSG_DONTWAIT));

		GUEST_CHECK(n > 0, "%s: end of file after %zu of %zu bytes", what, at, bytes);
		at += n;
	}
	EXPECT_MEM(what, source, got, bytes);
}

static void expect_empty(const char *what, int fd)
{
	ssize_t n = recv(fd, got, sizeof(got), MSG_DONTWAIT);

	GUEST_CHECK(n == -1 && errno == EAGAIN, "%s: expected nothing more, got %zd (%s)", what, n, strerror(errno));
}

static void expect_message(const char *what, int fd, size_t bytes)
{
	ssize_t n = recv(fd, got, sizeof(got), MSG_DONTWAIT);

	GUEST_CHECK(n == (ssize_t)bytes, "%s: expected a message of %zu bytes, got %zd", what, bytes, n);
	EXPECT_MEM(what, source, got, bytes);
}

static int option(int fd, int name)
{
	int value = -1;
	socklen_t size = sizeof(value);

	MUST(getsockopt(fd, SOL_SOCKET, name, &value, &size));
	return value;
}

static void set_option(int fd, int name, int value)
{
	MUST(setsockopt(fd, SOL_SOCKET, name, &value, sizeof(value)));
}

int main(int argc, char **argv)
{
	int stream[2], dgram[2], packet[2], shut[2], orphan[2], quiet_orphan[2], options[2], across[2];
	int sndbuf, rcvbuf;
	struct timeval timeout = { 12, 500000 }, timeout_got;
	struct ucred peer;
	socklen_t size;
	pid_t child;
	bool with_empty = argc > 2 && !strcmp(argv[2], "empty");

	pattern_begin(argc, argv);
	pattern_fill(source, sizeof(source), guest_seed);
	MUST(signal(SIGPIPE, SIG_IGN) == SIG_ERR ? -1 : 0);
	MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, stream));
	EXPECT_EQ("send", QUEUED, send(stream[0], source, QUEUED, 0));
	EXPECT_EQ("send", 100, send(stream[1], source, 100, 0));
	MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, dgram));
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packet));
	for (int i = 0; i < 2; i++) {
		int to = i ? packet[0] : dgram[0];

		EXPECT_EQ("send", 10, send(to, source, 10, 0));
		EXPECT_EQ("send", 20000, send(to, source, 20000, 0));
		EXPECT_EQ("send", 1, send(to, source, 1, 0));
	}
	if (with_empty)
		EXPECT_EQ("send", 0, send(dgram[0], source, 0, 0));
	EXPECT_EQ("send", 3, send(dgram[0], source, 3, 0));
	EXPECT_EQ("send", 7, send(packet[1], source, 7, 0));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, shut));
	EXPECT_EQ("send", 50, send(shut[0], source, 50, 0));
	MUST(shutdown(shut[0], SHUT_WR));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, orphan));
	EXPECT_EQ("send", 60, send(orphan[0], source, 60, 0));
	close(orphan[0]);
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, quiet_orphan));
	close(quiet_orphan[0]);
	MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, options));
	set_option(options[0], SO_SNDBUF, 40000);
	set_option(options[0], SO_RCVBUF, 30000);
	set_option(options[0], SO_PASSCRED, 1);
	MUST(setsockopt(options[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)));
	sndbuf = option(options[0], SO_SNDBUF);
	rcvbuf = option(options[0], SO_RCVBUF);
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, across));
	child = MUST(fork());
	if (child == 0) {
		char text[4];

		close(across[0]);
		/* Blocked across the dump. */
		EXPECT_EQ("child's recv", 4, recv(across[1], text, 4, MSG_WAITALL));
		EXPECT_MEM("child's recv", "ping", text, 4);
		EXPECT_EQ("child's send", 4, send(across[1], "pong", 4, 0));
		_exit(0);
	}
	close(across[1]);

	guest_ready();
	guest_wait_go();

	EXPECT_EQ("send after the restore", 5, send(stream[1], "after", 5, 0));
	read_all("stream, first way", stream[1], QUEUED);
	expect_empty("stream, first way", stream[1]);
	read_all("stream, second way", stream[0], 100);
	EXPECT_EQ("recv", 5, recv(stream[0], got, 5, MSG_DONTWAIT));
	EXPECT_MEM("sent after the restore", "after", got, 5);
	EXPECT_EQ("FD_CLOEXEC", FD_CLOEXEC, fcntl(stream[0], F_GETFD));
	EXPECT_EQ("type", SOCK_STREAM, option(stream[0], SO_TYPE));
	for (int i = 0; i < 2; i++) {
		int from = i ? packet[1] : dgram[1];

		expect_message("first message", from, 10);
		expect_message("second message", from, 20000);
		expect_message("third message", from, 1);
	}
	if (with_empty)
		expect_message("empty datagram", dgram[1], 0);
	expect_message("last datagram", dgram[1], 3);
	expect_empty("datagrams", dgram[1]);
	expect_empty("datagrams, other way", dgram[0]);
	expect_message("packet, other way", packet[0], 7);
	expect_empty("packets", packet[1]);
	EXPECT_EQ("type", SOCK_DGRAM, option(dgram[0], SO_TYPE));
	EXPECT_EQ("type", SOCK_SEQPACKET, option(packet[0], SO_TYPE));

	read_all("half shut down", shut[1], 50);
	EXPECT_EQ("end of file", 0, recv(shut[1], got, 1, MSG_DONTWAIT));
	EXPECT_EQ("send on the shut end", -1, send(shut[0], "x", 1, 0));
	EXPECT_EQ("errno", EPIPE, errno);
	EXPECT_EQ("other way of the half shut down pair", 2, send(shut[1], "ok", 2, 0));
	EXPECT_EQ("other way of the half shut down pair", 2, recv(shut[0], got, 2, MSG_DONTWAIT));
	read_all("data left by a closed peer", orphan[1], 60);
	EXPECT_EQ("end of file", 0, recv(orphan[1], got, 1, MSG_DONTWAIT));
	EXPECT_EQ("send to a closed peer", -1, send(orphan[1], "x", 1, 0));
	EXPECT_EQ("errno", EPIPE, errno);
	EXPECT_EQ("closed peer of packets", 0, recv(quiet_orphan[1], got, 1, MSG_DONTWAIT));

	EXPECT_EQ("SO_SNDBUF", sndbuf, option(options[0], SO_SNDBUF));
	EXPECT_EQ("SO_RCVBUF", rcvbuf, option(options[0], SO_RCVBUF));
	EXPECT_EQ("SO_PASSCRED", 1, option(options[0], SO_PASSCRED));
	EXPECT_EQ("SO_PASSCRED of the peer", 0, option(options[1], SO_PASSCRED));
	size = sizeof(timeout_got);
	MUST(getsockopt(options[0], SOL_SOCKET, SO_RCVTIMEO, &timeout_got, &size));
	EXPECT_EQ("SO_RCVTIMEO", 12500000, timeout_got.tv_sec * 1000000 + timeout_got.tv_usec);
	EXPECT_EQ("O_NONBLOCK", O_NONBLOCK, fcntl(options[1], F_GETFL) & O_NONBLOCK);
	size = sizeof(peer);
	MUST(getsockopt(across[0], SOL_SOCKET, SO_PEERCRED, &peer, &size));
	EXPECT_EQ("SO_PEERCRED pid", getpid(), peer.pid);
	EXPECT_EQ("SO_PEERCRED uid", geteuid(), peer.uid);
	EXPECT_EQ("send", 4, send(across[0], "ping", 4, 0));
	EXPECT_EQ("recv", 4, recv(across[0], got, 4, MSG_WAITALL));
	EXPECT_MEM("answer of the child", "pong", got, 4);
	guest_join(child);
	guest_ok();
}
