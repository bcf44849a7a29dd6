// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A stopped child with threads stays stopped, goes on at SIGCONT, and its parent sees both. Second argument: `reported` when
 * the parent has already been told of the stop and must not be told again, `unreported` when it must still be told.
 */
#include "guest.h"
#include <pthread.h>

static volatile uint64_t *turns;
static pthread_barrier_t standing;

static void *turn(void *index)
{
	pthread_barrier_wait(&standing);
	while (!turns[2]) {
		turns[(intptr_t)index]++;
		guest_nap();
	}
	return NULL;
}

/* All threads of the child are in the state T. */
static bool is_stopped(pid_t child)
{
	char path[64], state[32];
	pid_t tids[4];

	EXPECT_EQ("threads", 2, guest_threads(child, tids, 4));
	for (int i = 0; i < 2; i++) {
		snprintf(path, sizeof(path), "/proc/%d/task/%d/status", child, tids[i]);
		guest_field(path, "State", state, sizeof(state));
		if (state[0] != 'T')
			return false;
	}
	return true;
}

int main(int argc, char **argv)
{
	siginfo_t info = { 0 };

	guest_begin(argc, argv);
	EXPECT(argc == 3);
	bool reported = !strcmp(argv[2], "reported");
	turns = guest_shared(4096);
	pid_t child = MUST(fork());
	if (!child) {
		pthread_t second;

		/* In a group of its own, which isn't orphaned: else SIGTSTP would be ignored. */
		MUST(setpgid(0, 0));

		MUST0(pthread_barrier_init(&standing, NULL, 2));
		MUST0(pthread_create(&second, NULL, turn, (void *)1));
		turn((void *)0);
		MUST0(pthread_join(second, NULL));
		_exit(0);
	}
	while (!turns[0] || !turns[1])
		guest_nap();
	MUST(kill(child, SIGSTOP));
	MUST(waitid(P_PID, child, &info, WSTOPPED | (reported ? 0 : WNOWAIT)));
	EXPECT_EQ("status of the stop", SIGSTOP, info.si_status);
	while (!is_stopped(child))
		guest_nap();
	uint64_t before[2] = { turns[0], turns[1] };
	guest_ready();
	guest_wait_go();

	EXPECT(is_stopped(child));
	EXPECT_EQ("turns of the first thread", before[0], turns[0]);
	EXPECT_EQ("turns of the second thread", before[1], turns[1]);
	memset(&info, 0, sizeof(info));
	MUST(waitid(P_PID, child, &info, WSTOPPED | WNOHANG));
	EXPECT_EQ("told of the stop after go", reported ? 0 : child, info.si_pid);
	if (!reported)
		EXPECT_EQ("signal of the stop", SIGSTOP, info.si_status);
	MUST(kill(child, SIGCONT));
	int status;
	EXPECT_EQ("waitpid", child, waitpid(child, &status, WCONTINUED));
	EXPECT(WIFCONTINUED(status));
	while (turns[0] == before[0] || turns[1] == before[1])
		guest_nap();
	/* And once more. */
	MUST(kill(child, SIGTSTP));
	EXPECT_EQ("waitpid", child, waitpid(child, &status, WUNTRACED));
	EXPECT(WIFSTOPPED(status));
	EXPECT_EQ("signal of the second stop", SIGTSTP, WSTOPSIG(status));
	MUST(kill(child, SIGCONT));
	turns[2] = 1;
	EXPECT_EQ("the child's verdict", 0, guest_reap(child));
	guest_ok();
}
