// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A parent, and a child whose memory the kernel module refuses: the argument says why. Both have memory of their own, which they
 * change once, at "step". The file "refused" has the child's pid. With "drops" the child gives a capability up at that step, which ends
 * an earlier session.
 */
#include "mem_pattern.h"

#include <linux/capability.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "../../kmod/ckpt.h"
#include "../kmod/module/ckpt_testing.h"

#define AREA_BYTES (2048 * PAGE_BYTES)

/* As a device does that maps memory of processes. The kernel remembers it when the device has gone. */
static void share_with_a_device(void)
{
	int device = MUST(open("/dev/ckpt_testing", O_RDWR | O_CLOEXEC));

	MUST(ioctl(device, CKPT_TESTING_NOTIFIER, 0));
	close(device);
}

/* Gives a session on this memory to the program holder, and waits until that has its snapshots. */
static void give_session_away(void)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr header;
	} control = { .header = { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct iovec byte = { "s", 1 };
	struct msghdr message = { .msg_iov = &byte, .msg_iovlen = 1, .msg_control = control.bytes,
				  .msg_controllen = sizeof(control.bytes) };
	int session = MUST(open("/dev/ckpt", O_RDWR | O_CLOEXEC));
	int holder = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	char taken;

	MUST(ioctl(session, CKPT_IOC_ATTACH, 0));
	*(int *)CMSG_DATA(&control.header) = session;
	MUST(chdir(guest.workdir));
	strcpy(address.sun_path, "holder");
	while (connect(holder, (struct sockaddr *)&address, sizeof(address)))
		guest_nap();
	EXPECT_EQ("sendmsg", 1, sendmsg(holder, &message, 0));
	EXPECT_EQ("read", 1, read(holder, &taken, 1));
	MUST(chdir("/"));
	close(session);
	close(holder);
}

/* Its credentials are others then; it stays dumpable. */
static void drop_a_capability(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	MUST(syscall(SYS_capget, &header, data));
	EXPECT(data[0].permitted & 1u << CAP_MKNOD);
	data[0].permitted &= ~(1u << CAP_MKNOD);
	data[0].effective &= data[0].permitted;
	MUST(syscall(SYS_capset, &header, data));
	EXPECT_EQ("dumpable", 1, prctl(PR_GET_DUMPABLE));
}

static void change_once_and_check(char *area, uint64_t seed, bool drops, const char *done)
{
	pattern_fill(area, AREA_BYTES, seed);
	while (!guest_exists("step") && !guest_exists("go"))
		guest_nap();
	CHECK_PATTERN("memory before the step", area, AREA_BYTES, seed);
	pattern_fill(area, AREA_BYTES, seed + 1);
	if (drops)
		drop_a_capability();
	guest_publish(done, "");
	guest_wait_go();
	CHECK_PATTERN("memory", area, AREA_BYTES, seed + 1);
}

int main(int argc, char **argv)
{
	char *area, text[32];
	int standing[2];
	pid_t child;

	pattern_begin(argc, argv);
	/* Whose children are not forked, either. */
	if (argc > 3 && !strcmp(argv[3], "adopts"))
		MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	MUST(pipe(standing));
	child = MUST(fork());
	area = MUST(mmap(NULL, AREA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	close(standing[child != 0]);
	if (child == 0) {
		pattern_fill(area, AREA_BYTES, guest_seed + 100);
		if (!strcmp(argv[2], "device"))
			share_with_a_device();
		else if (!strcmp(argv[2], "session"))
			give_session_away();
		close(standing[1]);
		change_once_and_check(area, guest_seed + 100, !strcmp(argv[2], "drops"), "child-done");
		_exit(0);
	}
	EXPECT_EQ("read", 0, read(standing[0], text, 1));
	close(standing[0]);
	snprintf(text, sizeof(text), "%d", child);
	guest_publish("refused", text);
	guest_ready();
	change_once_and_check(area, guest_seed, false, "done");
	guest_join(child);
	guest_ok();
}
