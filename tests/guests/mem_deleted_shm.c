// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A file of /dev/shm, mapped by two processes and unlinked: what sem_open(3)
 * followed by sem_unlink(3) leaves, and so what Python's multiprocessing and
 * its locks are made of. The two go on handing a semaphore to each other.
 */
#include "mem_pattern.h"

#include <semaphore.h>
#include <sys/mman.h>

struct shared {
	sem_t to_child;
	sem_t to_parent;
	uint64_t counter;
};

int main(int argc, char **argv)
{
	struct shared *shared;
	sem_t *named, *second;
	char name[64], *content;
	pid_t child;
	int fd;

	pattern_begin(argc, argv);
	snprintf(name, sizeof(name), "/guest-%s", guest.nonce);
	fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
	GUEST_CHECK(fd >= 0 && ftruncate(fd, 4 * PAGE_BYTES) == 0, "shm_open: %s", strerror(errno));
	shared = mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	GUEST_CHECK(shared != MAP_FAILED, "mmap: %s", strerror(errno));
	content = (char *)shared + PAGE_BYTES;
	close(fd);
	sem_init(&shared->to_child, 1, 0);
	sem_init(&shared->to_parent, 1, 0);
	shared->counter = guest_seed;
	pattern_fill(content, 2 * PAGE_BYTES, guest_seed);
	named = sem_open(name + 1, O_CREAT | O_EXCL, 0600, 3);
	GUEST_CHECK(named != SEM_FAILED, "sem_open: %s", strerror(errno));
	sem_unlink(name + 1);

	child = fork();
	if (child == 0) {
		for (int i = 0; i < 20; i++) {
			sem_wait(&shared->to_child);
			shared->counter++;
			sem_post(&shared->to_parent);
		}
		sem_wait(named);
		_exit(0);
	}
	shm_unlink(name);
	for (int i = 0; i < 5; i++) {
		sem_post(&shared->to_child);
		sem_wait(&shared->to_parent);
	}

	/* The child waits in sem_wait, a futex in the deleted mapping. */
	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("deleted mapping", content, 2 * PAGE_BYTES, guest_seed);
	CHECK_ZERO("deleted mapping, hole", content + 2 * PAGE_BYTES, PAGE_BYTES);
	for (int i = 5; i < 20; i++) {
		sem_post(&shared->to_child);
		while (sem_wait(&shared->to_parent) < 0)
			GUEST_CHECK(errno == EINTR, "sem_wait: %s", strerror(errno));
	}
	guest_join(child);
	GUEST_CHECK(shared->counter == guest_seed + 20, "counter: expected +20, got %+ld",
		    (long)(shared->counter - guest_seed));
	int value = -1;

	sem_getvalue(named, &value);
	GUEST_CHECK(value == 2, "unlinked named semaphore: expected 2, got %d", value);
	/* The name is free again, and its object is another one. */
	second = sem_open(name + 1, O_CREAT | O_EXCL, 0600, 9);
	GUEST_CHECK(second != SEM_FAILED, "sem_open again: %s", strerror(errno));
	sem_unlink(name + 1);
	sem_getvalue(named, &value);
	GUEST_CHECK(second != named && value == 2, "the deleted semaphore came back under its name");
	guest_ok();
}
