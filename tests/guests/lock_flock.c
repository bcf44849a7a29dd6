// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * flock(2): an exclusive lock that a stranger still cannot take, shared through dup and fork (gone only with the last
 * descriptor), shared locks held by two, and a process that waits for a lock.
 */
#include "mem_pattern.h"

#include <sys/file.h>

static _Atomic int *turn;

static int open_again(const char *name)
{
	char path[PATH_MAX];

	return MUST(open(guest_path(path, sizeof(path), name), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
}

static void expect_locked(const char *what, const char *name, int operation)
{
	int stranger = open_again(name);
	int got = flock(stranger, operation | LOCK_NB);

	GUEST_CHECK(got == -1 && errno == EWOULDBLOCK, "%s: a stranger got the lock", what);
	close(stranger);
}

static void expect_free(const char *what, const char *name, int operation)
{
	int stranger = open_again(name);

	GUEST_CHECK(flock(stranger, operation | LOCK_NB) == 0, "%s: expected free, got %s", what, strerror(errno));
	close(stranger);
}

int main(int argc, char **argv)
{
	int exclusive, duplicate, shared1, shared2, inherited, waited, unlocked;
	pid_t holder, waiter;

	pattern_begin(argc, argv);
	turn = guest_shared(4096);
	exclusive = open_again("exclusive");
	duplicate = MUST(dup(exclusive));
	MUST(flock(exclusive, LOCK_EX));
	shared1 = open_again("shared");
	shared2 = open_again("shared");
	MUST(flock(shared1, LOCK_SH));
	MUST(flock(shared2, LOCK_SH));
	inherited = open_again("inherited");
	MUST(flock(inherited, LOCK_EX));
	waited = open_again("waited");
	MUST(flock(waited, LOCK_EX));
	unlocked = open_again("unlocked");
	MUST(flock(unlocked, LOCK_EX));
	MUST(flock(unlocked, LOCK_UN));

	holder = MUST(fork());
	if (holder == 0) {
		while (*turn != 2)
			guest_nap();
		_exit(0);
	}
	waiter = MUST(fork());
	if (waiter == 0) {
		int mine;

		close(waited);
		mine = open_again("waited");
		*turn = 1;
		while (flock(mine, LOCK_EX))
			GUEST_CHECK(errno == EINTR, "flock: %s", strerror(errno));
		_exit(0);
	}
	while (*turn != 1)
		guest_nap();
	/* Here only the child holds it. */
	close(inherited);

	guest_ready();
	guest_wait_go();

	expect_locked("exclusive lock", "exclusive", LOCK_SH);
	expect_locked("shared lock", "shared", LOCK_EX);
	expect_free("shared lock", "shared", LOCK_SH);
	expect_locked("lock held by a child alone", "inherited", LOCK_EX);
	expect_locked("lock that a child waits for", "waited", LOCK_EX);
	expect_free("released lock", "unlocked", LOCK_EX);
	close(exclusive);
	expect_locked("lock after one of three descriptors is closed", "exclusive", LOCK_EX);
	MUST(flock(shared1, LOCK_UN));
	expect_locked("second shared lock", "shared", LOCK_EX);
	MUST(flock(shared2, LOCK_UN));
	expect_free("both shared locks released", "shared", LOCK_EX);
	/* The waiter's and the holder's descriptors share this lock: LOCK_UN through any of them releases it. */
	MUST(flock(duplicate, LOCK_UN));
	expect_free("lock released through the duplicate", "exclusive", LOCK_EX);
	*turn = 2;
	guest_join(holder);
	MUST(flock(waited, LOCK_UN));
	guest_join(waiter);
	guest_ok();
}
