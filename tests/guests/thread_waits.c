// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Threads that wait for each other in every way pthreads have: mutex, condition (with and without a time limit), read-write
 * lock, semaphore, barrier, join; also between two processes.
 */
#include "guest.h"
#include <pthread.h>
#include <semaphore.h>

struct meeting {
	pthread_mutex_t mutex, held;
	pthread_cond_t condition, limited;
	pthread_rwlock_t lock;
	sem_t semaphore;
	pthread_barrier_t barrier;
	int open, passed;
};

static struct meeting own, *shared;

static void prepare(struct meeting *at, int pshared)
{
	pthread_mutexattr_t mutex;
	pthread_condattr_t condition;
	pthread_rwlockattr_t lock;
	pthread_barrierattr_t barrier;

	MUST0(pthread_mutexattr_init(&mutex));
	MUST0(pthread_mutexattr_setpshared(&mutex, pshared));
	MUST0(pthread_mutex_init(&at->mutex, &mutex));
	/* Priority inheritance keeps the owner's tid in the kernel. */
	MUST0(pthread_mutexattr_setprotocol(&mutex, PTHREAD_PRIO_INHERIT));
	MUST0(pthread_mutex_init(&at->held, &mutex));
	MUST0(pthread_condattr_init(&condition));
	MUST0(pthread_condattr_setpshared(&condition, pshared));
	MUST0(pthread_cond_init(&at->condition, &condition));
	MUST0(pthread_condattr_setclock(&condition, CLOCK_MONOTONIC));
	MUST0(pthread_cond_init(&at->limited, &condition));
	MUST0(pthread_rwlockattr_init(&lock));
	MUST0(pthread_rwlockattr_setpshared(&lock, pshared));
	MUST0(pthread_rwlock_init(&at->lock, &lock));
	MUST0(pthread_barrierattr_init(&barrier));
	MUST0(pthread_barrierattr_setpshared(&barrier, pshared));
	MUST0(pthread_barrier_init(&at->barrier, &barrier, 2));
	MUST(sem_init(&at->semaphore, pshared, 0));
	MUST0(pthread_mutex_lock(&at->held));
	MUST0(pthread_rwlock_wrlock(&at->lock));
}

static void pass(struct meeting *at)
{
	__atomic_add_fetch(&at->passed, 1, __ATOMIC_SEQ_CST);
}

static void *wait_condition(void *argument)
{
	struct meeting *at = argument;

	MUST0(pthread_mutex_lock(&at->mutex));
	while (!at->open)
		MUST0(pthread_cond_wait(&at->condition, &at->mutex));
	MUST0(pthread_mutex_unlock(&at->mutex));
	pass(at);
	return NULL;
}

static void *wait_limited(void *argument)
{
	struct meeting *at = argument;
	struct timespec end;

	MUST(clock_gettime(CLOCK_MONOTONIC, &end));
	end.tv_sec += 1000;
	MUST0(pthread_mutex_lock(&at->mutex));
	while (!at->open)
		MUST0(pthread_cond_timedwait(&at->limited, &at->mutex, &end));
	MUST0(pthread_mutex_unlock(&at->mutex));
	pass(at);
	return NULL;
}

static void *wait_mutex(void *argument)
{
	struct meeting *at = argument;

	MUST0(pthread_mutex_lock(&at->held));
	EXPECT(at->open);
	MUST0(pthread_mutex_unlock(&at->held));
	pass(at);
	return NULL;
}

static void *wait_reading(void *argument)
{
	struct meeting *at = argument;

	MUST0(pthread_rwlock_rdlock(&at->lock));
	EXPECT(at->open);
	MUST0(pthread_rwlock_unlock(&at->lock));
	pass(at);
	return NULL;
}

static void *wait_semaphore(void *argument)
{
	struct meeting *at = argument;

	MUST(sem_wait(&at->semaphore));
	EXPECT(at->open);
	pass(at);
	return NULL;
}

static void *wait_barrier(void *argument)
{
	struct meeting *at = argument;
	int result = pthread_barrier_wait(&at->barrier);

	EXPECT(result == 0 || result == PTHREAD_BARRIER_SERIAL_THREAD);
	EXPECT(at->open);
	pass(at);
	return NULL;
}

static void *wait_join(void *argument)
{
	pthread_t *other = argument;

	MUST0(pthread_join(*other, NULL));
	return NULL;
}

static void *(*const waits[])(void *) = {
	wait_condition, wait_condition, wait_limited, wait_mutex, wait_mutex, wait_reading, wait_semaphore, wait_barrier,
};
enum { WAITS = sizeof(waits) / sizeof(*waits) };

static void start(struct meeting *at, pthread_t *threads)
{
	for (int i = 0; i < WAITS; i++)
		MUST0(pthread_create(&threads[i], NULL, waits[i], at));
	MUST0(pthread_create(&threads[WAITS], NULL, wait_join, &threads[0]));
}

static void open_all(struct meeting *at)
{
	EXPECT_EQ("passed before time", 0, at->passed);
	MUST0(pthread_mutex_lock(&at->mutex));
	at->open = 1;
	MUST0(pthread_cond_broadcast(&at->condition));
	MUST0(pthread_cond_broadcast(&at->limited));
	MUST0(pthread_mutex_unlock(&at->mutex));
	MUST0(pthread_mutex_unlock(&at->held));
	MUST0(pthread_rwlock_unlock(&at->lock));
	MUST(sem_post(&at->semaphore));
	int result = pthread_barrier_wait(&at->barrier);
	EXPECT(result == 0 || result == PTHREAD_BARRIER_SERIAL_THREAD);
}

/* All threads but the first sleep in futex (number 202). */
static void until_all_wait(pid_t pid)
{
	char path[64], text[256];
	pid_t tids[WAITS + 2];
	int sleeping;

	do {
		sleeping = 0;
		EXPECT_EQ("threads", WAITS + 2, guest_threads(pid, tids, WAITS + 2));
		for (int i = 0; i < WAITS + 2; i++) {
			snprintf(path, sizeof(path), "/proc/%d/task/%d/syscall", pid, tids[i]);
			guest_read_file(path, text, sizeof(text));
			sleeping += !strncmp(text, "202 ", 4);
		}
		guest_nap();
	} while (sleeping < WAITS + 1);
}

static void join(pthread_t *threads)
{
	for (int i = 1; i <= WAITS; i++)
		MUST0(pthread_join(threads[i], NULL));
}

int main(int argc, char **argv)
{
	pthread_t threads[WAITS + 1];
	int channel[2];
	char byte;

	guest_begin(argc, argv);
	shared = guest_shared(sizeof(*shared));
	prepare(&own, PTHREAD_PROCESS_PRIVATE);
	prepare(shared, PTHREAD_PROCESS_SHARED);
	MUST(pipe(channel));
	pid_t child = MUST(fork());
	if (!child) {
		start(shared, threads);
		until_all_wait(getpid());
		MUST(write(channel[1], "x", 1));
		close(channel[0]);
		close(channel[1]);
		join(threads);
		EXPECT_EQ("passed in the child", WAITS, shared->passed);
		_exit(0);
	}
	EXPECT_EQ("word of the child", 1, read(channel[0], &byte, 1));
	close(channel[0]);
	close(channel[1]);
	start(&own, threads);
	until_all_wait(getpid());
	guest_ready();
	guest_wait_go();

	open_all(&own);
	join(threads);
	EXPECT_EQ("passed", WAITS, own.passed);
	open_all(shared);
	EXPECT_EQ("the child's verdict", 0, guest_reap(child));
	guest_ok();
}
