// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A tree of processes with sessions and process groups of every sort. Each member notes its pid, parent, group and
 * session when it stands, and finds them again after go; the first process looks at all of them from outside as well.
 */
#include "guest.h"
#include <sched.h>

enum member {
	FIRST,
	SESSION_LEADER, /* setsid */
	SESSION_MEMBER,
	BACKGROUND_LEADER, /* a process group of its own in that session */
	BACKGROUND_MEMBER,
	INNER_SESSION, /* setsid below a session leader */
	ORPHAN_OF_SESSION, /* its session's leader and its parent are dead */
	GROUP_KEEPER,
	GROUP_MEMBER, /* its process group's leader is dead */
	SUBREAPER,
	ADOPTED, /* by the subreaper */
	CHAIN_1,
	CHAIN_2,
	CHAIN_3,
	CHAIN_4,
	CHAIN_5,
	SIBLING_MAKER,
	SIBLING, /* CLONE_PARENT: its parent is not who made it */
	MEMBERS
};

struct record {
	pid_t pid, parent, group, session;
	bool checked;
};

static struct shared {
	struct record records[MEMBERS];
	bool leave;
} *shared;
static int standing[2];

static struct record look(void)
{
	return (struct record){ .pid = getpid(), .parent = getppid(), .group = getpgrp(), .session = getsid(0) };
}

static void stand(enum member me)
{
	shared->records[me] = look();
	MUST(write(standing[1], "x", 1));
	close(standing[0]);
	close(standing[1]);
}

static void check(enum member me)
{
	struct record now = look(), *before = &shared->records[me];

	EXPECT_EQ("pid", before->pid, now.pid);
	EXPECT_EQ("parent", before->parent, now.parent);
	EXPECT_EQ("process group", before->group, now.group);
	EXPECT_EQ("session", before->session, now.session);
	before->checked = true;
}

/* Waits for go, checks itself, and waits until all have: a parent that left would change its children's. */
static void serve(enum member me)
{
	guest_wait_go();
	check(me);
	while (!*(volatile bool *)&shared->leave)
		guest_nap();
}

static void until_parent_is_not(pid_t old)
{
	while (getppid() == old)
		guest_nap();
}

/* Each link of the chain is the child of the one before. */
static void be_chain(void)
{
	enum member me = CHAIN_1;
	pid_t next = 0;

	while (me < CHAIN_5 && !(next = MUST(fork())))
		me++;
	stand(me);
	serve(me);
	if (next)
		EXPECT_EQ("status of the next link", (me + 1) << 8, guest_reap(next));
	_exit(me);
}

static void be_session_leader(void)
{
	MUST(setsid());
	pid_t leader;
	pid_t member = MUST(fork());
	if (!member) {
		stand(SESSION_MEMBER);
		serve(SESSION_MEMBER);
		_exit(0);
	}
	if (!(leader = MUST(fork()))) {
		MUST(setpgid(0, 0));
		stand(BACKGROUND_LEADER);
		serve(BACKGROUND_LEADER);
		_exit(0);
	}
	pid_t background = MUST(fork());
	if (!background) {
		/* The group may not stand yet. */
		while (setpgid(0, leader))
			guest_nap();
		stand(BACKGROUND_MEMBER);
		serve(BACKGROUND_MEMBER);
		_exit(0);
	}
	pid_t inner = MUST(fork());
	if (!inner) {
		MUST(setsid());
		stand(INNER_SESSION);
		serve(INNER_SESSION);
		_exit(0);
	}
	stand(SESSION_LEADER);
	serve(SESSION_LEADER);
	pid_t all[] = { member, leader, background, inner };
	for (int i = 0; i < 4; i++)
		EXPECT_EQ("status of a child of the session leader", 0, guest_reap(all[i]));
	_exit(31);
}

static void be_group_keeper(void)
{
	pid_t leader = MUST(fork());

	if (!leader)
		for (;;)
			pause();
	MUST(setpgid(leader, leader));
	pid_t member = MUST(fork());
	if (!member) {
		MUST(setpgid(0, leader));
		while (kill(leader, 0) == 0)
			guest_nap();
		stand(GROUP_MEMBER);
		serve(GROUP_MEMBER);
		EXPECT_EQ("the group of a dead leader", leader, getpgrp());
		_exit(0);
	}
	while (getpgid(member) != leader)
		guest_nap();
	MUST(kill(leader, SIGKILL));
	EXPECT_EQ("status of the dead leader", SIGKILL, guest_reap(leader));
	stand(GROUP_KEEPER);
	serve(GROUP_KEEPER);
	EXPECT_EQ("status of the group's member", 0, guest_reap(member));
	_exit(32);
}

static void be_subreaper(void)
{
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	pid_t between = MUST(fork());
	if (!between) {
		pid_t parent = getpid();

		if (!MUST(fork())) {
			until_parent_is_not(parent);
			stand(ADOPTED);
			serve(ADOPTED);
			_exit(23);
		}
		_exit(0);
	}
	EXPECT_EQ("status of the one between", 0, guest_reap(between));
	stand(SUBREAPER);
	serve(SUBREAPER);
	int is_subreaper = 0;
	MUST(prctl(PR_GET_CHILD_SUBREAPER, &is_subreaper));
	EXPECT_EQ("subreaper", 1, is_subreaper);
	EXPECT_EQ("status of the adopted", 23 << 8, guest_reap(shared->records[ADOPTED].pid));
	/* And it still reaps for others. */
	between = MUST(fork());
	if (!between) {
		pid_t parent = getpid();

		if (!MUST(fork())) {
			until_parent_is_not(parent);
			_exit(getppid() == shared->records[SUBREAPER].pid ? 24 : 25);
		}
		_exit(0);
	}
	guest_reap(between);
	int status;
	EXPECT(waitpid(-1, &status, 0) > 0);
	EXPECT_EQ("status of the newly adopted", 24 << 8, status);
	_exit(33);
}

static void be_sibling_maker(void)
{
	pid_t sibling = MUST(syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0));

	if (!sibling) {
		stand(SIBLING);
		serve(SIBLING);
		_exit(35);
	}
	stand(SIBLING_MAKER);
	serve(SIBLING_MAKER);
	_exit(34);
}

static pid_t start(void (*role)(void))
{
	pid_t child = MUST(fork());

	if (!child)
		role();
	return child;
}

int main(int argc, char **argv)
{
	guest_begin(argc, argv);
	shared = guest_shared(sizeof(*shared));
	MUST(pipe(standing));

	pid_t leader = start(be_session_leader);
	pid_t doomed = MUST(fork());
	if (!doomed) {
		pid_t session = MUST(setsid());

		if (!MUST(fork())) {
			until_parent_is_not(session);
			stand(ORPHAN_OF_SESSION);
			serve(ORPHAN_OF_SESSION);
			EXPECT_EQ("the session of a dead leader", session, getsid(0));
			_exit(0);
		}
		_exit(0);
	}
	EXPECT_EQ("status of the doomed session leader", 0, guest_reap(doomed));
	pid_t keeper = start(be_group_keeper);
	pid_t subreaper = start(be_subreaper);
	pid_t chained = start(be_chain);
	pid_t maker = start(be_sibling_maker);
	shared->records[FIRST] = look();
	for (int i = 1; i < MEMBERS; i++) {
		char byte;

		EXPECT_EQ("word of a member", 1, read(standing[0], &byte, 1));
	}
	close(standing[0]);
	close(standing[1]);
	guest_ready();
	guest_wait_go();

	check(FIRST);
	for (int i = 0; i < MEMBERS; i++) {
		struct record *record = &shared->records[i];

		EXPECT_EQ("exists", 0, kill(record->pid, 0));
		EXPECT_EQ("process group from outside", record->group, getpgid(record->pid));
		EXPECT_EQ("session from outside", record->session, getsid(record->pid));
		while (!*(volatile bool *)&record->checked && !guest_exists("result"))
			guest_nap();
	}
	shared->leave = true;
	EXPECT_EQ("status of the session leader", 31 << 8, guest_reap(leader));
	EXPECT_EQ("status of the group keeper", 32 << 8, guest_reap(keeper));
	EXPECT_EQ("status of the subreaper", 33 << 8, guest_reap(subreaper));
	EXPECT_EQ("status of the chain", CHAIN_1 << 8, guest_reap(chained));
	EXPECT_EQ("status of the sibling's maker", 34 << 8, guest_reap(maker));
	EXPECT_EQ("status of the sibling", 35 << 8, guest_reap(shared->records[SIBLING].pid));
	errno = 0;
	EXPECT_EQ("children left", -1, waitpid(-1, NULL, WNOHANG));
	EXPECT_EQ("errno", ECHILD, errno);
	guest_ok();
}
