// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Descriptors on their way through a socket (unix(7), SCM_RIGHTS).
 *
 * rights_on_their_way WORKDIR once: one is sent at once, and received when the file "receive" exists.
 *
 * rights_on_their_way WORKDIR always: they are sent without a pause, and each is received only when another one was sent,
 * so that there is always one on its way. Only while the receiver sees its gate closed, if it carries the interceptor, does
 * it take all there are.
 */
#include "guest.h"

#include <dlfcn.h>
#include <sys/socket.h>

struct counts {
	volatile uint64_t sent, received;
	volatile bool stop, sender_has_ended;
};

static struct counts *counts;

static void send_one(int socket, int fd)
{
	char byte = 'x';
	struct iovec piece = { &byte, 1 };
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr aligned;
	} control = { { 0 } };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	*header = (struct cmsghdr){ CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS };
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	EXPECT_EQ("sendmsg", 1, sendmsg(socket, &message, 0));
	__atomic_add_fetch(&counts->sent, 1, __ATOMIC_SEQ_CST);
}

static void receive_one(int socket, dev_t device)
{
	char byte;
	struct iovec piece = { &byte, 1 };
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr aligned;
	} control;
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	struct stat stat;
	int fd;

	EXPECT_EQ("recvmsg", 1, recvmsg(socket, &message, 0));
	EXPECT(CMSG_FIRSTHDR(&message) && CMSG_FIRSTHDR(&message)->cmsg_type == SCM_RIGHTS);
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
	MUST(fstat(fd, &stat));
	EXPECT_EQ("device number of what was received", device, stat.st_rdev);
	close(fd);
	counts->received++;
}

static bool gate_is_closed(void)
{
	/* The field "gate" of the control word. */
	const volatile uint32_t *control = dlsym(RTLD_DEFAULT, "ckpt_control");

	return control && control[32 / sizeof(*control)];
}

static void receive_always(int socket, dev_t device)
{
	for (;;) {
		bool last = counts->sender_has_ended;
		uint64_t there = counts->sent - counts->received;

		if (there > 1 || (there && (last || gate_is_closed())))
			receive_one(socket, device);
		else if (last)
			_exit(0);
	}
}

static void send_always(int socket, int fd)
{
	while (!counts->stop)
		if (counts->sent - counts->received < 8)
			send_one(socket, fd);
	_exit(0);
}

int main(int argc, char **argv)
{
	int ends[2], fd;
	struct stat stat;
	bool always;

	guest_begin(argc, argv);
	always = !strcmp(argv[2], "always");
	counts = guest_shared(4096);
	fd = MUST(open("/dev/null", O_RDONLY));
	MUST(fstat(fd, &stat));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	pid_t sender = MUST(fork());
	if (!sender) {
		if (always)
			send_always(ends[0], fd);
		send_one(ends[0], fd);
		_exit(0);
	}
	while (!counts->sent)
		guest_nap();
	pid_t receiver = MUST(fork());
	if (!receiver) {
		if (always)
			receive_always(ends[1], stat.st_rdev);
		while (!guest_exists("receive"))
			guest_nap();
		receive_one(ends[1], stat.st_rdev);
		_exit(0);
	}
	guest_ready();
	guest_wait_go();
	for (uint64_t before = counts->sent; always && counts->sent < before + 100;)
		guest_nap();
	counts->stop = true;
	EXPECT_EQ("the sender's verdict", 0, guest_reap(sender));
	counts->sender_has_ended = true;
	EXPECT_EQ("the receiver's verdict", 0, guest_reap(receiver));
	EXPECT_EQ("descriptors received", counts->sent, counts->received);
	guest_ok();
}
