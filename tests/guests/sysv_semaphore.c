// SPDX-License-Identifier: MIT OR Apache-2.0
/* System V semaphore sets: identifiers with a gap, keys, permissions and values; one is private. */
#include "guest.h"
#include <sys/ipc.h>
#include <sys/sem.h>

static const unsigned short values[2][3] = { { 3, 0, 32767 }, { 1, 2, 5 } };

static void check(int id, int key, int mode, const unsigned short *expected)
{
	struct semid_ds ds;
	unsigned short got[3];

	MUST(semctl(id, 0, IPC_STAT, &ds));
	EXPECT_EQ("key", key, ds.sem_perm.__key);
	EXPECT_EQ("mode", mode, ds.sem_perm.mode & 0777);
	EXPECT_EQ("owner", geteuid(), ds.sem_perm.uid);
	EXPECT_EQ("number of semaphores", 3, ds.sem_nsems);
	MUST(semctl(id, 0, GETALL, got));
	for (int i = 0; i < 3; i++)
		EXPECT_EQ("value", expected[i], got[i]);
}

int main(int argc, char **argv)
{
	int ids[2], gap;

	guest_begin(argc, argv);
	ids[0] = MUST(semget(0x636b7074, 3, IPC_CREAT | IPC_EXCL | 0640));
	gap = MUST(semget(IPC_PRIVATE, 1, 0600));
	ids[1] = MUST(semget(IPC_PRIVATE, 3, 0600));
	MUST(semctl(gap, 0, IPC_RMID));
	for (int i = 0; i < 2; i++)
		MUST(semctl(ids[i], 0, SETALL, values[i]));
	guest_ready();
	guest_wait_go();
	check(ids[0], 0x636b7074, 0640, values[0]);
	check(ids[1], IPC_PRIVATE, 0600, values[1]);
	EXPECT_EQ("the set of the key", ids[0], semget(0x636b7074, 3, 0));
	MUST(semctl(ids[0], 0, IPC_RMID));
	MUST(semctl(ids[1], 0, IPC_RMID));
	guest_ok();
}
