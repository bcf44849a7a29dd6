// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Restartable sequences as glibc registers them, in several threads: still registered after go (registering again is EBUSY), and
 * the kernel goes on writing the number of the processor. One thread spends the dump inside a critical section, which the
 * kernel must either leave alone or abort: its commit must never happen after a change of the processor.
 */
#include "guest.h"
#include <linux/rseq.h>
#include <pthread.h>
#include <sched.h>
#if __has_include(<sys/rseq.h>)
#include <sys/rseq.h>
#define HAS_RSEQ 1
#else
#define HAS_RSEQ 0
#endif

enum { THREADS = 4, SIGNATURE = 0x53053053 };

#if HAS_RSEQ
static pthread_barrier_t standing;
static cpu_set_t allowed;
static volatile uint64_t go;
static uint64_t aborts, commits;

static struct rseq *area(void)
{
	return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

static void expect_registered(void)
{
	/* The registered length is not visible; as long as one is registered, that length is EBUSY and others are EINVAL. */
	for (unsigned length = 32; length <= 256; length++) {
		long result = syscall(SYS_rseq, area(), length, 0, SIGNATURE);
		if (result == 0)
			guest_fail("thread %ld had lost its rseq registration", syscall(SYS_gettid));
		if (errno == EBUSY)
			return;
		EXPECT_EQ("errno", EINVAL, errno);
	}
	guest_fail("rseq could not be asked for");
}

static void follow_processors(void)
{
	cpu_set_t before, one;

	MUST(sched_getaffinity(0, sizeof(before), &before));
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &allowed))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		MUST(sched_setaffinity(0, sizeof(one), &one));
		EXPECT_EQ("cpu_id", cpu, *(volatile uint32_t *)&area()->cpu_id);
		EXPECT_EQ("cpu_id_start", cpu, *(volatile uint32_t *)&area()->cpu_id_start);
	}
	MUST(sched_setaffinity(0, sizeof(before), &before));
}

/*
 * Inside the section it waits for go and watches the processor: 1 if it committed, 0 if aborted, 2 if the processor changed
 * under it without an abort.
 */
static int section(void)
{
	int result;

	__asm__ volatile("	.pushsection __rseq_cs, \"aw\"\n"
			 "	.balign 32\n"
			 "3:	.long 0, 0\n"
			 "	.quad 1f, 2f - 1f, 4f\n"
			 "	.popsection\n"
			 "	leaq 3b(%%rip), %%rax\n"
			 "	movl 4(%[area]), %%ecx\n" /* cpu_id */
			 "	movq %%rax, 8(%[area])\n" /* rseq_cs */
			 "1:	cmpl %%ecx, 4(%[area])\n"
			 "	jne 5f\n"
			 "	pause\n"
			 "	cmpq $0, %[go]\n"
			 "	je 1b\n"
			 "	lock incq %[commits]\n"
			 "2:	movl $1, %[result]\n"
			 "	jmp 6f\n"
			 "5:	movl $2, %[result]\n"
			 "	jmp 6f\n"
			 "	.byte 0x0f, 0xb9, 0x3d\n"
			 "	.long 0x53053053\n"
			 "4:	movl $0, %[result]\n"
			 "6:\n"
			 : [result] "=&r"(result), [commits] "+m"(commits)
			 : [area] "r"(area()), [go] "m"(go)
			 : "rax", "rcx", "memory", "cc");
	return result;
}

static void *thread(void *number)
{
	expect_registered();
	pthread_barrier_wait(&standing);
	if (number) {
		guest_wait_go();
	} else {
		int result;
		while ((result = section()) == 0)
			aborts++;
		EXPECT_EQ("end of the critical section", 1, result);
		EXPECT_EQ("commits", 1, commits);
	}
	expect_registered();
	follow_processors();
	return NULL;
}
#endif

int main(int argc, char **argv)
{
	guest_begin(argc, argv);
#if HAS_RSEQ
	pthread_t threads[THREADS];

	if (!__rseq_size)
		guest_skip("glibc has not registered rseq");
	MUST(sched_getaffinity(0, sizeof(allowed), &allowed));
	MUST0(pthread_barrier_init(&standing, NULL, THREADS + 1));
	for (intptr_t i = 0; i < THREADS; i++)
		MUST0(pthread_create(&threads[i], NULL, thread, (void *)i));
	expect_registered();
	pthread_barrier_wait(&standing);
	guest_ready();
	guest_wait_go();
	expect_registered();
	follow_processors();
	go = 1;
	for (int i = 0; i < THREADS; i++)
		MUST0(pthread_join(threads[i], NULL));
	guest_ok();
#else
	guest_skip("this C library has no rseq");
#endif
}
