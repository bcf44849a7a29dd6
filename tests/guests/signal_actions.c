// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * The action of every signal as the kernel holds it (handler, flags, mask, restorer), the blocked set, the alternate
 * stack, and that handlers run as told. A child has others.
 */
#include "guest.h"

struct kernel_action {
	uintptr_t handler;
	unsigned long flags;
	uintptr_t restorer;
	uint64_t mask;
};

static volatile sig_atomic_t ran, ran_with_value, ran_on_stack;
static char stack[65536];

static void plain(int signal)
{
	ran = signal;
}

static void with_info(int signal, siginfo_t *info, void *context)
{
	char here;

	(void)context;
	ran = signal;
	ran_with_value = info->si_value.sival_int;
	ran_on_stack = &here >= stack && &here < stack + sizeof(stack);
}

static struct kernel_action action_of(int signal)
{
	struct kernel_action action = { 0 };

	MUST(syscall(SYS_rt_sigaction, signal, NULL, &action, 8));
	return action;
}

static void set_up(int seed)
{
	static const int flags[] = { SA_RESTART, SA_NODEFER, SA_RESETHAND, SA_ONSTACK, SA_NOCLDSTOP, SA_NOCLDWAIT, 0 };

	for (int signal = 1; signal <= 64; signal++) {
		struct sigaction action = { 0 };

		if (signal == SIGKILL || signal == SIGSTOP || signal == 32 || signal == 33)
			continue;
		int choice = (signal + seed) % 5;
		if (signal == SIGCHLD)
			choice = 3;
		if (choice == 0)
			action.sa_handler = SIG_DFL;
		else if (choice == 1)
			action.sa_handler = SIG_IGN;
		else if (choice == 2)
			action.sa_handler = plain;
		else
			action.sa_sigaction = with_info;
		action.sa_flags = flags[(signal * 3 + seed) % 7] | (choice >= 3 ? SA_SIGINFO : 0);
		if (signal == SIGCHLD)
			action.sa_flags &= ~SA_NOCLDWAIT;
		for (int other = 1; other <= 64; other += 1 + (signal + seed) % 7)
			sigaddset(&action.sa_mask, other);
		MUST(sigaction(signal, &action, NULL));
	}
}

static void compare(struct kernel_action *before)
{
	for (int signal = 1; signal <= 64; signal++) {
		struct kernel_action now = action_of(signal);
		char what[64];

		snprintf(what, sizeof(what), "handler of signal %d", signal);
		EXPECT_EQ(what, before[signal].handler, now.handler);
		snprintf(what, sizeof(what), "flags of signal %d", signal);
		EXPECT_EQ(what, before[signal].flags, now.flags);
		snprintf(what, sizeof(what), "restorer of signal %d", signal);
		EXPECT_EQ(what, before[signal].restorer, now.restorer);
		snprintf(what, sizeof(what), "mask of signal %d", signal);
		EXPECT_EQ(what, before[signal].mask, now.mask);
	}
}

static void run(int seed, int ready_fd)
{
	struct kernel_action before[65];
	stack_t alternate = { .ss_sp = stack, .ss_size = sizeof(stack) }, stack_now;
	sigset_t blocked, blocked_now;
	struct sigaction action = { .sa_sigaction = with_info, .sa_flags = SA_SIGINFO | SA_ONSTACK };

	set_up(seed);
	MUST(sigaction(SIGRTMIN + 5, &action, NULL));
	action.sa_flags = SA_RESETHAND;
	action.sa_handler = plain;
	MUST(sigaction(SIGUSR2, &action, NULL));
	MUST(sigaltstack(&alternate, NULL));
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGRTMIN + 5);
	sigaddset(&blocked, SIGHUP);
	/* The child's end must not run a handler in between. */
	sigaddset(&blocked, SIGCHLD);
	sigaddset(&blocked, 34 + seed);
	sigaddset(&blocked, 64);
	MUST(sigprocmask(SIG_SETMASK, &blocked, NULL));
	for (int signal = 1; signal <= 64; signal++)
		before[signal] = action_of(signal);
	if (ready_fd >= 0)
		MUST(write(ready_fd, "x", 1));
	else
		guest_ready();
	guest_wait_go();

	compare(before);
	MUST(sigprocmask(SIG_SETMASK, NULL, &blocked_now));
	EXPECT_MEM("blocked signals", &blocked, &blocked_now, 8);
	MUST(sigaltstack(NULL, &stack_now));
	EXPECT_EQ("alternate stack", (uintptr_t)stack, (uintptr_t)stack_now.ss_sp);
	EXPECT_EQ("size of the alternate stack", sizeof(stack), stack_now.ss_size);
	EXPECT_EQ("flags of the alternate stack", 0, stack_now.ss_flags);

	union sigval value = { .sival_int = 4711 + seed };
	MUST(sigqueue(getpid(), SIGRTMIN + 5, value));
	EXPECT_EQ("a blocked signal ran", 0, ran);
	sigdelset(&blocked, SIGRTMIN + 5);
	MUST(sigprocmask(SIG_SETMASK, &blocked, NULL));
	EXPECT_EQ("handler that ran", SIGRTMIN + 5, ran);
	EXPECT_EQ("its value", 4711 + seed, ran_with_value);
	EXPECT_EQ("on the alternate stack", 1, ran_on_stack);
	MUST(raise(SIGUSR2));
	EXPECT_EQ("handler that ran", SIGUSR2, ran);
	EXPECT_EQ("action after SA_RESETHAND", (uintptr_t)SIG_DFL, action_of(SIGUSR2).handler);
}

int main(int argc, char **argv)
{
	int channel[2];
	char byte;

	guest_begin(argc, argv);
	MUST(pipe(channel));
	pid_t child = MUST(fork());
	if (!child) {
		run(2, channel[1]);
		_exit(0);
	}
	EXPECT_EQ("word of the child", 1, read(channel[0], &byte, 1));
	close(channel[0]);
	close(channel[1]);
	run(0, -1);
	EXPECT_EQ("the child's verdict", 0, guest_reap(child));
	guest_ok();
}
