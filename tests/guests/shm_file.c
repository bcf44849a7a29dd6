// SPDX-License-Identifier: MIT OR Apache-2.0
/* Files in /dev/shm that nobody has open or mapped: content, mode and a directory are still there after go. */
#include "guest.h"

int main(int argc, char **argv)
{
	enum { SIZE = 300000 };
	static unsigned char content[SIZE], now[SIZE];
	char dir[128], path[256];
	struct stat stat;

	guest_begin(argc, argv);
	snprintf(dir, sizeof(dir), "/dev/shm/guest-%s", guest.nonce);
	snprintf(path, sizeof(path), "%s/state", dir);
	for (int i = 0; i < SIZE; i++)
		content[i] = guest.nonce[i % 32] * (i / 32 + 1);
	MUST(mkdir(dir, 0710));
	int fd = MUST(open(path, O_CREAT | O_EXCL | O_WRONLY, 0640));
	EXPECT_EQ("write", SIZE, write(fd, content, SIZE));
	MUST(fchmod(fd, 0604));
	MUST(close(fd));
	guest_ready();
	guest_wait_go();

	MUST(lstat(dir, &stat));
	EXPECT_EQ("mode of the directory", 0710, stat.st_mode & 07777);
	fd = MUST(open(path, O_RDONLY));
	MUST(fstat(fd, &stat));
	EXPECT_EQ("size", SIZE, stat.st_size);
	EXPECT_EQ("mode", 0604, stat.st_mode & 07777);
	EXPECT_EQ("owner", geteuid(), stat.st_uid);
	EXPECT_EQ("read", SIZE, read(fd, now, SIZE));
	EXPECT_MEM("content", content, now, SIZE);
	MUST(unlink(path));
	MUST(rmdir(dir));
	guest_ok();
}
