// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Not of the job: takes the session that a guest hands it through the socket "holder" in the work directory, and has as many snapshots of
 * that memory as there may be, until the file "release" is there.
 */
#include "guest.h"

#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "../../kmod/ckpt.h"

static void must(bool condition, const char *what)
{
	if (condition)
		return;
	fprintf(stderr, "holder: %s: %s\n", what, strerror(errno));
	exit(1);
}

int main(int argc, char **argv)
{
	char control[CMSG_SPACE(sizeof(int))], text;
	struct sockaddr_un address = { AF_UNIX, "holder" };
	struct iovec byte = { &text, 1 };
	struct msghdr message = { .msg_iov = &byte, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	struct ckpt_query query = { .size = sizeof(query) };
	int listening = socket(AF_UNIX, SOCK_STREAM, 0), peer, session;

	must(argc == 2 && chdir(argv[1]) == 0, "chdir");
	must(bind(listening, (struct sockaddr *)&address, sizeof(address)) == 0, "bind");
	must(listen(listening, 1) == 0, "listen");
	peer = accept(listening, NULL, NULL);
	must(peer >= 0 && recvmsg(peer, &message, 0) == 1, "recvmsg");
	must(message.msg_controllen > 0, "no descriptor");
	session = *(int *)CMSG_DATA(CMSG_FIRSTHDR(&message));
	must(ioctl(session, CKPT_IOC_QUERY, &query) == 0, "QUERY");
	for (unsigned int i = 0; i < query.max_snapshots; i++) {
		struct ckpt_snapshot_args args = { .size = sizeof(args) };

		must(ioctl(session, CKPT_IOC_SNAPSHOT, &args) == 0, "SNAPSHOT");
	}
	must(write(peer, "t", 1) == 1, "write");
	close(peer);
	while (access("release", F_OK))
		guest_nap();
	return 0;
}
