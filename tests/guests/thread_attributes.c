// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * What each thread has for itself: name, signal mask, alternate stack, niceness, affinity, scheduling policy, timer slack, I/O
 * priority. And the vDSO, behind which the dumper has each of them run its code: nothing of that is left.
 */
#include "guest.h"
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>

/* With the main thread an odd number: then the place of the last but one is not used again for the frozen copy. */
enum { THREADS = 10 };

struct attributes {
	pid_t tid;
	char name[16];
	sigset_t mask;
	stack_t stack;
	int nice, policy, priority;
	long timer_slack, io_priority;
	cpu_set_t cpus;
};

static pthread_barrier_t standing;
static cpu_set_t allowed;

static void look(struct attributes *now)
{
	struct sched_param parameter;

	memset(now, 0, sizeof(*now));
	now->tid = syscall(SYS_gettid);
	MUST(prctl(PR_GET_NAME, now->name));
	MUST0(pthread_sigmask(SIG_SETMASK, NULL, &now->mask));
	MUST(sigaltstack(NULL, &now->stack));
	errno = 0;
	now->nice = getpriority(PRIO_PROCESS, 0);
	EXPECT_EQ("errno", 0, errno);
	now->policy = MUST(sched_getscheduler(0));
	MUST(sched_getparam(0, &parameter));
	now->priority = parameter.sched_priority;
	now->timer_slack = MUST(prctl(PR_GET_TIMERSLACK));
	now->io_priority = MUST(syscall(SYS_ioprio_get, 1, 0));
	MUST(sched_getaffinity(0, sizeof(now->cpus), &now->cpus));
}

/* The n-th of the processors that this process may use. */
static int processor(int n)
{
	n %= CPU_COUNT(&allowed);
	for (int cpu = 0;; cpu++)
		if (CPU_ISSET(cpu, &allowed) && n-- == 0)
			return cpu;
}

static void set_up(int number)
{
	/* Real-time policies need a privilege: tried, and left at the default where refused. */
	static const int policies[] = { SCHED_OTHER, SCHED_BATCH, SCHED_IDLE, SCHED_BATCH | SCHED_RESET_ON_FORK, SCHED_RR };
	struct sched_param parameter = { 0 };
	char name[16];
	sigset_t mask;
	stack_t stack = { .ss_size = 32768 + 4096 * number };
	cpu_set_t one;

	snprintf(name, sizeof(name), "thread %d (\xc3\xa4)", number);
	MUST(prctl(PR_SET_NAME, name));
	sigemptyset(&mask);
	sigaddset(&mask, 1 + number);
	sigaddset(&mask, 40 + number);
	/* One of them can't be told to ring: it is asked call by call, between others that are given the same list of calls. */
	if (number == 4)
		sigfillset(&mask);
	MUST0(pthread_sigmask(SIG_SETMASK, &mask, NULL));
	if (number % 3 != 2) {
		stack.ss_sp = malloc(stack.ss_size);
		stack.ss_flags = number % 3 == 1 ? 1u << 31 /* SS_AUTODISARM */ : 0;
		MUST(sigaltstack(&stack, NULL));
	}
	MUST(setpriority(PRIO_PROCESS, 0, number + 1));
	int policy = policies[number % 5];
	parameter.sched_priority = policy == SCHED_RR ? 3 : 0;
	if (sched_setscheduler(0, policy, &parameter) && errno != EPERM)
		guest_fail("sched_setscheduler(%d): %s", policy, strerror(errno));
	MUST(prctl(PR_SET_TIMERSLACK, 60000 + number));
	/* Best effort, lower than the default. */
	MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | (4 + number % 4)));
	CPU_ZERO(&one);
	CPU_SET(processor(number), &one);
	MUST(sched_setaffinity(0, sizeof(one), &one));
}

static void compare(const struct attributes *before)
{
	struct attributes now;

	look(&now);
	EXPECT_EQ("tid", before->tid, now.tid);
	EXPECT_STR("name", before->name, now.name);
	EXPECT_MEM("signal mask", &before->mask, &now.mask, 8);
	EXPECT_EQ("alternate stack", (uintptr_t)before->stack.ss_sp, (uintptr_t)now.stack.ss_sp);
	EXPECT_EQ("its size", before->stack.ss_size, now.stack.ss_size);
	EXPECT_EQ("its flags", before->stack.ss_flags, now.stack.ss_flags);
	EXPECT_EQ("niceness", before->nice, now.nice);
	EXPECT_EQ("policy", before->policy, now.policy);
	EXPECT_EQ("priority", before->priority, now.priority);
	EXPECT_EQ("timer slack", before->timer_slack, now.timer_slack);
	EXPECT_EQ("I/O priority", before->io_priority, now.io_priority);
	EXPECT(CPU_EQUAL(&before->cpus, &now.cpus));
}

static uint64_t sum_of_vdso(void)
{
	unsigned long start, end;
	uint64_t sum = 0;
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "re");

	EXPECT(maps);
	while (fgets(line, sizeof(line), maps))
		if (strstr(line, "[vdso]") && sscanf(line, "%lx-%lx ", &start, &end) == 2)
			for (const uint64_t *word = (void *)start; word < (uint64_t *)end; word++)
				sum = sum * 31 + *word;
	fclose(maps);
	EXPECT(sum);
	return sum;
}

static void *thread(void *number)
{
	struct attributes before;

	set_up((intptr_t)number);
	look(&before);
	pthread_barrier_wait(&standing);
	guest_wait_go();
	compare(&before);
	return number;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	struct attributes before;
	uint64_t vdso = sum_of_vdso();

	guest_begin(argc, argv);
	MUST(sched_getaffinity(0, sizeof(allowed), &allowed));
	MUST0(pthread_barrier_init(&standing, NULL, THREADS + 1));
	for (intptr_t i = 0; i < THREADS; i++)
		MUST0(pthread_create(&threads[i], NULL, thread, (void *)i));
	look(&before);
	pthread_barrier_wait(&standing);
	guest_ready();
	guest_wait_go();
	compare(&before);
	EXPECT_EQ("sum of the vDSO", vdso, sum_of_vdso());
	for (intptr_t i = 0; i < THREADS; i++) {
		void *result;

		MUST0(pthread_join(threads[i], &result));
		EXPECT_EQ("what the thread returned", i, (intptr_t)result);
	}
	guest_ok();
}
