// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Shared open file descriptions, by dup and by fork: a seek through one is seen through the other, flags as well;
 * FD_CLOEXEC is each descriptor's own; what was opened twice stays apart; a description that only a child holds.
 */
#include "mem_pattern.h"

static _Atomic int *turn;

static void await(int value)
{
	while (*turn != value)
		guest_nap();
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];
	int first, dup1, again, alone, cloexec;
	pid_t child, grandchild;

	pattern_begin(argc, argv);
	turn = guest_shared(4096);
	guest_path(path, sizeof(path), "shared");
	first = MUST(open(path, O_RDWR | O_CREAT | O_EXCL, 0600));
	MUST(ftruncate(first, 10000));
	dup1 = MUST(dup(first));
	cloexec = MUST(fcntl(first, F_DUPFD_CLOEXEC, 40));
	again = MUST(open(path, O_RDWR));
	alone = MUST(open(path, O_RDONLY));
	MUST(lseek(first, 100, SEEK_SET));
	MUST(lseek(again, 200, SEEK_SET));
	MUST(lseek(alone, 300, SEEK_SET));

	child = MUST(fork());
	if (child == 0) {
		int independent = MUST(open(path, O_RDWR));

		MUST(lseek(independent, 400, SEEK_SET));
		grandchild = MUST(fork());
		if (grandchild == 0) {
			await(3);
			EXPECT_EQ("child's seek, seen by the grandchild", 777, lseek(independent, 0, SEEK_CUR));
			EXPECT_EQ("position of the shared file, grandchild", 555, lseek(cloexec, 0, SEEK_CUR));
			_exit(0);
		}
		*turn = 1;
		await(2);
		EXPECT_EQ("parent's seek, seen by the child", 500, lseek(dup1, 0, SEEK_CUR));
		EXPECT_EQ("other description in the child", 200, lseek(again, 0, SEEK_CUR));
		EXPECT_EQ("description that only children hold", 300, lseek(alone, 0, SEEK_CUR));
		EXPECT_EQ("child's own description", 400, lseek(independent, 0, SEEK_CUR));
		EXPECT(fcntl(dup1, F_GETFL) & O_APPEND);
		EXPECT(!(fcntl(again, F_GETFL) & O_APPEND));
		MUST(lseek(independent, 777, SEEK_SET));
		MUST(lseek(first, 555, SEEK_SET));
		*turn = 3;
		guest_join(grandchild);
		_exit(0);
	}
	close(alone);
	await(1);

	guest_ready();
	guest_wait_go();

	EXPECT_EQ("position", 100, lseek(first, 0, SEEK_CUR));
	EXPECT_EQ("position of the second open", 200, lseek(again, 0, SEEK_CUR));
	EXPECT_EQ("closed fd", -1, fcntl(alone, F_GETFD));
	EXPECT_EQ("FD_CLOEXEC of the original", 0, fcntl(first, F_GETFD));
	EXPECT_EQ("FD_CLOEXEC of the duplicate", FD_CLOEXEC, fcntl(cloexec, F_GETFD));
	MUST(lseek(dup1, 500, SEEK_SET));
	EXPECT_EQ("seek seen through the duplicate", 500, lseek(first, 0, SEEK_CUR));
	EXPECT_EQ("seek seen through the high duplicate", 500, lseek(cloexec, 0, SEEK_CUR));
	EXPECT_EQ("the second open stays apart", 200, lseek(again, 0, SEEK_CUR));
	MUST(fcntl(first, F_SETFL, O_APPEND));
	*turn = 2;
	guest_join(child);
	EXPECT_EQ("child's seek, seen by the parent", 555, lseek(first, 0, SEEK_CUR));
	guest_ok();
}
