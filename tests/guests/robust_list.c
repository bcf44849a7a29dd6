// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Robust mutexes whose owners die after go, a thread and a process: the next who locks is told. The head of each thread's
 * robust list is where it was, and the kernel clears the tid of a thread that ends.
 */
#include "guest.h"
#include <pthread.h>

static pthread_mutex_t *shared_mutex, own_mutex;
static pthread_barrier_t standing;
static void *heads[2];
static size_t head_sizes[2];

static void *head_of_this_thread(size_t *size)
{
	void *head = NULL;

	MUST(syscall(SYS_get_robust_list, 0, &head, size));
	return head;
}

static void *owner(void *nothing)
{
	size_t size;

	heads[1] = head_of_this_thread(&head_sizes[1]);
	MUST0(pthread_mutex_lock(&own_mutex));
	pthread_barrier_wait(&standing);
	guest_wait_go();
	EXPECT_EQ("robust list of the thread", (uintptr_t)heads[1], (uintptr_t)head_of_this_thread(&size));
	EXPECT_EQ("its size", head_sizes[1], size);
	return nothing;
}

static void init_robust(pthread_mutex_t *mutex)
{
	pthread_mutexattr_t attributes;

	MUST0(pthread_mutexattr_init(&attributes));
	MUST0(pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST));
	MUST0(pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED));
	MUST0(pthread_mutex_init(mutex, &attributes));
}

static void expect_dead_owner(const char *what, pthread_mutex_t *mutex)
{
	EXPECT_EQ(what, EOWNERDEAD, pthread_mutex_lock(mutex));
	MUST0(pthread_mutex_consistent(mutex));
	MUST0(pthread_mutex_unlock(mutex));
	MUST0(pthread_mutex_lock(mutex));
	MUST0(pthread_mutex_unlock(mutex));
}

int main(int argc, char **argv)
{
	pthread_t thread;
	int channel[2];
	size_t size;
	char byte;

	guest_begin(argc, argv);
	shared_mutex = guest_shared(sizeof(*shared_mutex));
	init_robust(shared_mutex);
	init_robust(&own_mutex);
	MUST(pipe(channel));
	pid_t child = MUST(fork());
	if (!child) {
		MUST0(pthread_mutex_lock(shared_mutex));
		MUST(write(channel[1], "x", 1));
		close(channel[0]);
		close(channel[1]);
		for (;;)
			pause();
	}
	EXPECT_EQ("word of the child", 1, read(channel[0], &byte, 1));
	close(channel[0]);
	close(channel[1]);
	MUST0(pthread_barrier_init(&standing, NULL, 2));
	MUST0(pthread_create(&thread, NULL, owner, NULL));
	pthread_barrier_wait(&standing);
	heads[0] = head_of_this_thread(&head_sizes[0]);
	guest_ready();
	guest_wait_go();

	EXPECT_EQ("robust list", (uintptr_t)heads[0], (uintptr_t)head_of_this_thread(&size));
	EXPECT_EQ("its size", head_sizes[0], size);
	EXPECT_EQ("mutex of a living process", EBUSY, pthread_mutex_trylock(shared_mutex));
	MUST(kill(child, SIGKILL));
	EXPECT_EQ("status of the killed", SIGKILL, guest_reap(child));
	expect_dead_owner("mutex of a dead process", shared_mutex);
	MUST0(pthread_join(thread, NULL));
	expect_dead_owner("mutex of a dead thread", &own_mutex);
	guest_ok();
}
