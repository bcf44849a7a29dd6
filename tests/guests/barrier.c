// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Something is half-way that can't be saved, until the harness lets it end, and something of the kind is about to begin.
 *
 * barrier WORKDIR ACTION
 *
 * Thread "first" starts a program, which comes no further than the opening of the FIFO "fifo" until somebody writes to it:
 * the thread waits in posix_spawn as long. When the file "second" exists, thread "second" does ACTION, and makes the file
 * "done": posix_spawn, posix_spawnp, vfork, fork (and posix_spawn in the child), exec (and posix_spawn in the new program
 * once the file "third" exists), system, sendmsg, sendmmsg (a descriptor to itself, which it takes out again), plain (a
 * message without a descriptor), wrong (sendmsg of what can't be read), and three to whose thread something happens when the
 * file "signal" exists: handler (posix_spawn; a signal comes, whose handler makes "handled", sends a descriptor and makes
 * "handler-done"), jump (sendmsg; the handler jumps out of it), cancel (sendmsg; the thread is cancelled; makes "handled").
 */
#include "guest.h"

#include <pthread.h>
#include <setjmp.h>
#include <spawn.h>
#include <sys/socket.h>

extern char **environ;

static const char *action;
static pthread_t second;
static volatile int first_is_done, second_is_done;

static void make(const char *name)
{
	char path[PATH_MAX];

	close(MUST(open(guest_path(path, sizeof(path), name), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
}

static void wait_for(const char *name)
{
	while (!guest_exists(name))
		guest_nap();
}

static void ended_well(pid_t child)
{
	EXPECT_EQ("status of what was started", 0, guest_reap(child));
}

static void start(int (*function)(pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,
				  char *const[], char *const[]))
{
	char *words[] = { "/bin/true", NULL };
	pid_t child;

	MUST0(function(&child, words[0], NULL, NULL, words, environ));
	ended_well(child);
}

static void *first_thread(void *unused)
{
	char *words[] = { "/bin/true", NULL };
	char path[PATH_MAX];
	posix_spawn_file_actions_t actions;
	pid_t child;

	prctl(PR_SET_NAME, "first");
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 99, guest_path(path, sizeof(path), "fifo"), O_RDONLY, 0);
	posix_spawn_file_actions_addclose(&actions, 99);
	MUST0(posix_spawn(&child, words[0], &actions, NULL, words, environ));
	posix_spawn_file_actions_destroy(&actions);
	ended_well(child);
	first_is_done = 1;
	return unused;
}

/* A message with a descriptor of the FIFO's directory, or without one. */
struct letter {
	struct msghdr message;
	struct iovec piece;
	char text;
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr aligned;
	} control;
};

static void write_letter(struct letter *l, int fd)
{
	memset(l, 0, sizeof(*l));
	l->text = 'x';
	l->piece = (struct iovec){ &l->text, 1 };
	l->message.msg_iov = &l->piece;
	l->message.msg_iovlen = 1;
	if (fd < 0)
		return;
	l->message.msg_control = &l->control;
	l->message.msg_controllen = sizeof(l->control);
	struct cmsghdr *header = CMSG_FIRSTHDR(&l->message);
	*header = (struct cmsghdr){ CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS };
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
}

static int by_sendmmsg(int fd, struct letter *l)
{
	struct mmsghdr both[2] = { { .msg_len = 0 }, { .msg_hdr = l->message } };
	struct letter empty;

	write_letter(&empty, -1);
	both[0].msg_hdr = empty.message;
	return sendmmsg(fd, both, 2, 0);
}

static void send_descriptor(bool many)
{
	int ends[2], sent = MUST(open("/dev/null", O_RDONLY | O_CLOEXEC));
	struct letter l;
	struct stat before, after;

	MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends));
	write_letter(&l, sent);
	if (many) {
		char byte;

		EXPECT_EQ("sendmmsg", 2, by_sendmmsg(ends[0], &l));
		EXPECT_EQ("recv", 1, recv(ends[1], &byte, 1, 0));
	} else {
		EXPECT_EQ("sendmsg", 1, sendmsg(ends[0], &l.message, 0));
	}
	memset(&l.control, 0, sizeof(l.control));
	EXPECT_EQ("recvmsg", 1, recvmsg(ends[1], &l.message, MSG_CMSG_CLOEXEC));
	int got;
	memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&l.message)), sizeof(got));
	MUST(fstat(sent, &before));
	MUST(fstat(got, &after));
	EXPECT_EQ("device number of what was received", before.st_rdev, after.st_rdev);
	close(sent), close(got), close(ends[0]), close(ends[1]);
}

static void send_without(bool wrong)
{
	int ends[2];
	struct letter l;

	MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends));
	write_letter(&l, -1);
	if (wrong) {
		/* Nothing is mapped at the first page. */
		struct msghdr *volatile nothing = (struct msghdr *)8;

		EXPECT_EQ("sendmsg of nothing", -1, sendmsg(ends[0], nothing, 0));
		EXPECT_EQ("its error", EFAULT, errno);
		l.message.msg_control = (void *)8;
		l.message.msg_controllen = 64;
		EXPECT_EQ("sendmsg with control data at no place", -1, sendmsg(ends[0], &l.message, 0));
		EXPECT_EQ("its error", EFAULT, errno);
	} else {
		EXPECT_EQ("sendmsg", 1, sendmsg(ends[0], &l.message, 0));
	}
	close(ends[0]), close(ends[1]);
}

static sigjmp_buf before;

static void handler(int unused)
{
	(void)unused;
	if (!strcmp(action, "jump"))
		siglongjmp(before, 1);
	make("handled");
	send_descriptor(false);
	make("handler-done");
}

static void act(void)
{
	if (!strcmp(action, "posix_spawn") || !strcmp(action, "handler")) {
		start(posix_spawn);
	} else if (!strcmp(action, "posix_spawnp")) {
		start(posix_spawnp);
	} else if (!strcmp(action, "vfork")) {
		errno = 1234;
		pid_t child = vfork();

		if (!child)
			_exit(0);
		EXPECT_EQ("errno after vfork", 1234, errno);
		ended_well(MUST(child));
	} else if (!strcmp(action, "fork")) {
		pid_t child = MUST(fork());

		if (!child) {
			start(posix_spawn);
			_exit(0);
		}
		ended_well(child);
	} else if (!strcmp(action, "exec")) {
		pid_t child = MUST(fork());

		if (!child) {
			execl("/proc/self/exe", "barrier", guest.workdir, "executed", (char *)NULL);
			_exit(1);
		}
		ended_well(child);
	} else if (!strcmp(action, "system")) {
		EXPECT_EQ("system", 0, system("true"));
	} else if (!strcmp(action, "jump")) {
		if (!sigsetjmp(before, 1))
			send_descriptor(false);
	} else if (!strcmp(action, "sendmsg") || !strcmp(action, "cancel")) {
		send_descriptor(false);
	} else if (!strcmp(action, "sendmmsg")) {
		send_descriptor(true);
	} else {
		send_without(!strcmp(action, "wrong"));
	}
}

static void finish(void *unused)
{
	(void)unused;
	/* Else one that comes late, while the file is made, is the end of this. */
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
	make("done");
	second_is_done = 1;
}

static void *second_thread(void *unused)
{
	prctl(PR_SET_NAME, "second");
	pthread_cleanup_push(finish, NULL);
	wait_for("second");
	act();
	pthread_cleanup_pop(1);
	return unused;
}

/* Without opening anything, which the child would have, too. */
static bool has_child(void)
{
	siginfo_t info;

	return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[2], "executed")) {
		prctl(PR_SET_NAME, "second");
		snprintf(guest.workdir, sizeof(guest.workdir), "%s", argv[1]);
		wait_for("third");
		start(posix_spawn);
		return 0;
	}
	char path[PATH_MAX];
	pthread_t first;

	guest_begin(argc, argv);
	action = argv[2];
	MUST(mkfifo(guest_path(path, sizeof(path), "fifo"), 0666));
	MUST0(pthread_create(&first, NULL, first_thread, NULL));
	MUST0(pthread_create(&second, NULL, second_thread, NULL));
	while (!has_child())
		guest_nap();
	struct sigaction act = { .sa_handler = handler };

	MUST(sigaction(SIGUSR1, &act, NULL));
	guest_ready();
	bool cancels = !strcmp(action, "cancel"), over = !cancels && strcmp(action, "handler") && strcmp(action, "jump");
	for (; !guest_exists("go"); guest_nap()) {
		if (!over && guest_exists("signal")) {
			/* It may have ended, where nothing holds it. */
			if (cancels)
				pthread_cancel(second), make("handled");
			else
				pthread_kill(second, SIGUSR1);
			over = true;
		}
	}
	MUST0(pthread_join(first, NULL));
	MUST0(pthread_join(second, NULL));
	EXPECT_EQ("both threads have done their work", 2, first_is_done + second_is_done);
	guest_ok();
}
