// SPDX-License-Identifier: MIT OR Apache-2.0
/* FIFOs: unread data, one with both ends in two processes, one opened O_RDWR, and its name still leads to it. */
#include "mem_pattern.h"

static _Atomic int *turn;

int main(int argc, char **argv)
{
	char path[PATH_MAX], other[PATH_MAX], buffer[65536];
	int both, reader, late;
	pid_t child;

	pattern_begin(argc, argv);
	turn = guest_shared(4096);
	guest_path(path, sizeof(path), "fifo");
	MUST(mkfifo(path, 0600));
	both = MUST(open(path, O_RDWR | O_NONBLOCK));
	EXPECT_EQ("write", 32, write(both, guest.nonce, 32));

	MUST(mkfifo(guest_path(other, sizeof(other), "other fifo"), 0600));
	reader = MUST(open(other, O_RDONLY | O_NONBLOCK));
	child = MUST(fork());
	if (child == 0) {
		int writer = MUST(open(other, O_WRONLY));

		close(reader);
		EXPECT_EQ("write", 16, write(writer, guest.nonce, 16));
		*turn = 1;
		while (*turn != 2)
			guest_nap();
		EXPECT_EQ("write", 4, write(writer, "more", 4));
		_exit(0);
	}
	while (*turn != 1)
		guest_nap();

	guest_ready();
	guest_wait_go();

	late = MUST(open(path, O_WRONLY | O_NONBLOCK));
	EXPECT_EQ("write by name", 5, write(late, "named", 5));
	EXPECT_EQ("read", 37, read(both, buffer, sizeof(buffer)));
	EXPECT_MEM("fifo", guest.nonce, buffer, 32);
	EXPECT_MEM("fifo, by name", "named", buffer + 32, 5);
	EXPECT_EQ("read", 16, read(reader, buffer, sizeof(buffer)));
	EXPECT_MEM("fifo of a child", guest.nonce, buffer, 16);
	EXPECT_EQ("empty with a writer", -1, read(reader, buffer, sizeof(buffer)));
	EXPECT_EQ("errno", EAGAIN, errno);
	*turn = 2;
	guest_join(child);
	EXPECT_EQ("read", 4, read(reader, buffer, sizeof(buffer)));
	EXPECT_EQ("end of file", 0, read(reader, buffer, sizeof(buffer)));
	guest_ok();
}
