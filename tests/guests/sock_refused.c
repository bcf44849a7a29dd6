// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * What ckpt does not support, several kinds at once in two processes: a dump must name them all and harm nothing.
 * The file "held" in the work directory has a line "pid fd kind" for each, with the pids of the guest's own namespace.
 */
#include "mem_pattern.h"

#include <netinet/in.h>
#include <sys/shm.h>
#include <sys/socket.h>

static void held(char *text, size_t size, int fd, const char *kind)
{
	size_t at = strlen(text);

	snprintf(text + at, size - at, "%d %d %s\n", (int)getpid(), fd, kind);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr_in bound;
	socklen_t size = sizeof(bound);
	int datagrams, pidfd, io_uring, segment, to_parent[2];
	char *text = guest_shared(4096), *shared, params[120] = { 0 };
	pid_t child;

	pattern_begin(argc, argv);
	datagrams = MUST(socket(AF_INET, SOCK_DGRAM, 0));
	MUST(bind(datagrams, (void *)&address, sizeof(address)));
	held(text, 4096, datagrams, "socket");
	MUST(pipe(to_parent));
	child = MUST(fork());
	if (child == 0) {
		char byte;

		pidfd = (int)MUST(syscall(SYS_pidfd_open, getpid(), 0));
		held(text, 4096, pidfd, "pidfd");
		/* Not everywhere: seccomp or kernel.io_uring_disabled may forbid it. */
		io_uring = (int)syscall(SYS_io_uring_setup, 4, params);
		if (io_uring >= 0)
			held(text, 4096, io_uring, "io_uring");
		MUST(write(to_parent[1], "r", 1));
		guest_wait_go();
		MUST(syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0));
		(void)byte;
		_exit(0);
	}
	MUST(read(to_parent[0], params, 1));
	segment = MUST(shmget(IPC_PRIVATE, PAGE_BYTES, IPC_CREAT | 0600));
	shared = MUST(shmat(segment, NULL, 0));
	MUST(shmctl(segment, IPC_RMID, NULL));
	pattern_fill(shared, PAGE_BYTES, guest_seed);
	held(text, 4096, -1, "SYSV");
	guest_publish("held", text);

	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("System V segment", shared, PAGE_BYTES, guest_seed);
	MUST(getsockname(datagrams, (void *)&bound, &size));
	EXPECT_EQ("sendto", 1, sendto(datagrams, "x", 1, 0, (void *)&bound, sizeof(bound)));
	EXPECT_EQ("recv", 1, recv(datagrams, params, sizeof(params), 0));
	guest_join(child);
	guest_ok();
}
