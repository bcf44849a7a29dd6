// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * AIO contexts by system calls: rings of several lengths at their addresses, with ends in the middle and events that were not
 * taken; a context that was destroyed; a thread that waits for events; a child that has inherited the memory of a ring; O_DIRECT
 * reads and writes before and after.
 *
 * Argument "held": a request waits for a pipe until the file "fire" is there; then its event is awaited.
 * "busy": a thread reads and writes all the time, and most of the time a request is in flight.
 */
#include "guest.h"

#include <linux/aio_abi.h>
#include <poll.h>
#include <pthread.h>

#define BLOCK 4096
#define BLOCKS 64

struct ring {
	unsigned id, places, head, tail, magic, compatible, incompatible, header;
	struct io_event events[];
};

static aio_context_t set_up(unsigned requests)
{
	aio_context_t context = 0;

	MUST(syscall(SYS_io_setup, requests, &context));
	return context;
}

static void submit(aio_context_t context, struct iocb *request)
{
	EXPECT_EQ("io_submit", 1, MUST(syscall(SYS_io_submit, context, 1, &request)));
}

static struct io_event take(aio_context_t context)
{
	struct io_event event;
	long got;

	do
		got = syscall(SYS_io_getevents, context, 1, 1, &event, NULL);
	while (got < 0 && errno == EINTR);
	EXPECT_EQ("io_getevents", 1, got);
	return event;
}

static struct iocb request(int operation, int fd, void *buffer, size_t bytes, off_t at, uint64_t data)
{
	return (struct iocb){ .aio_data = data, .aio_lio_opcode = operation, .aio_fildes = fd,
			      .aio_buf = (uintptr_t)buffer, .aio_nbytes = bytes, .aio_offset = at };
}

/* A request that is over at once: 3 bytes of /dev/zero. */
static void quick(aio_context_t context, uint64_t data)
{
	static char bytes[3];
	static int zero = -1;
	struct iocb r;

	if (zero < 0)
		zero = MUST(open("/dev/zero", O_RDONLY | O_CLOEXEC));
	r = request(IOCB_CMD_PREAD, zero, bytes, sizeof(bytes), 0, data);
	submit(context, &r);
}

static int open_file(void)
{
	char path[PATH_MAX];
	int fd = open(guest_path(path, sizeof(path), "file"), O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0644);

	if (fd < 0 && errno == EINVAL)
		guest_skip("no O_DIRECT here");
	MUST(ftruncate(fd, BLOCKS * BLOCK));
	return fd;
}

static void write_and_read(aio_context_t context, int fd, unsigned char *buffer, int round)
{
	struct iocb r = request(IOCB_CMD_PWRITE, fd, buffer, BLOCK, round % BLOCKS * BLOCK, round);

	memset(buffer, round, BLOCK);
	submit(context, &r);
	struct io_event event = take(context);
	EXPECT_EQ("data of the write", round, event.data);
	EXPECT_EQ("result of the write", BLOCK, event.res);
	memset(buffer, ~round, BLOCK);
	r.aio_lio_opcode = IOCB_CMD_PREAD;
	submit(context, &r);
	event = take(context);
	EXPECT_EQ("object of the read", (uintptr_t)&r, event.obj);
	EXPECT_EQ("result of the read", BLOCK, event.res);
	for (int i = 0; i < BLOCK; i++)
		EXPECT_EQ("what was read", (unsigned char)round, buffer[i]);
}

static void held(void)
{
	aio_context_t context = set_up(8);
	int ends[2];
	struct iocb r;

	MUST(pipe(ends));
	r = request(IOCB_CMD_POLL, ends[0], (void *)POLLIN, 0, 0, 77);
	submit(context, &r);
	guest_ready();
	while (!guest_exists("fire"))
		guest_nap();
	MUST(write(ends[1], "x", 1));
	guest_publish("fired", "");
	guest_wait_go();
	struct io_event event = take(context);
	EXPECT_EQ("data", 77, event.data);
	EXPECT_EQ("result", POLLIN, event.res & POLLIN);
	guest_ok();
}

static void *worker(void *arg)
{
	int fd = open_file(), n;
	aio_context_t context = set_up(BLOCKS);
	static struct iocb requests[BLOCKS];
	struct iocb *list[BLOCKS];
	struct io_event events[BLOCKS];
	unsigned char *buffer = MUST(mmap(NULL, BLOCKS * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

	for (int round = 0; !guest_exists("go"); round++) {
		memset(buffer, round, BLOCKS * BLOCK);
		for (int i = 0; i < BLOCKS; i++) {
			requests[i] = request(IOCB_CMD_PWRITE, fd, buffer + i * BLOCK, BLOCK, i * BLOCK, round);
			list[i] = &requests[i];
		}
		for (int done = 0; done < BLOCKS; done += n)
			n = MUST(syscall(SYS_io_submit, context, BLOCKS - done, list + done));
		for (int done = 0; done < BLOCKS; done += n) {
			n = syscall(SYS_io_getevents, context, 1, BLOCKS, events, NULL);
			if (n < 0 && errno == EINTR)
				n = 0;
			MUST(n);
			for (int i = 0; i < n; i++) {
				EXPECT_EQ("data", round, events[i].data);
				EXPECT_EQ("result", BLOCK, events[i].res);
			}
		}
		EXPECT_EQ("nothing left", 0, MUST(syscall(SYS_io_getevents, context, 0, 1, events, &(struct timespec){ 0, 0 })));
	}
	return arg;
}

static void busy(void)
{
	pthread_t thread;

	MUST0(pthread_create(&thread, NULL, worker, NULL));
	guest_ready();
	MUST0(pthread_join(thread, NULL));
	guest_ok();
}

static aio_context_t awaited;
static _Atomic int waiting;

static void *waiter(void *arg)
{
	waiting = 1;
	EXPECT_EQ("awaited", 4711, take(awaited).data);
	return arg;
}

int main(int argc, char **argv)
{
	aio_context_t idle, unread, large, gone, child_sees;
	struct ring *ring;
	unsigned head, tail;
	unsigned char *buffer;
	pthread_t thread;
	pid_t child;
	int fd;

	guest_begin(argc, argv);
	if (argc > 2 && !strcmp(argv[2], "held"))
		held();
	if (argc > 2)
		busy();
	fd = open_file();
	buffer = MUST(mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	idle = set_up(1);
	for (int round = 0; round < 100; round++)
		write_and_read(idle, fd, buffer, round);

	unread = set_up(16);
	for (int i = 0; i < 120; i++) {
		quick(unread, i);
		take(unread);
	}
	/* Over the end of the ring. */
	for (int i = 0; i < 20; i++)
		quick(unread, 1000 + i);
	take(unread);
	ring = (void *)unread;
	head = ring->head, tail = ring->tail;
	EXPECT_EQ("head", 121 % ring->places, head);

	large = set_up(5000);
	for (int i = 0; i < 6000; i++) {
		quick(large, i);
		take(large);
	}
	quick(large, 6000);

	gone = set_up(1);
	MUST(syscall(SYS_io_destroy, gone));
	awaited = set_up(1);
	child_sees = large;
	child = MUST(fork());
	if (!child) {
		guest_wait_go();
		EXPECT_EQ("inherited ring", 0xa10a10a1, ((struct ring *)child_sees)->magic);
		EXPECT_EQ("not its own", -1, syscall(SYS_io_getevents, child_sees, 0, 0, NULL, NULL));
		EXPECT_EQ("errno", EINVAL, errno);
		aio_context_t own = set_up(1);
		quick(own, 5);
		EXPECT_EQ("its own", 5, take(own).data);
		_exit(0);
	}
	MUST0(pthread_create(&thread, NULL, waiter, NULL));
	while (!waiting)
		guest_nap();
	guest_ready();
	guest_wait_go();

	EXPECT_EQ("head now", head, ring->head);
	EXPECT_EQ("tail now", tail, ring->tail);
	for (int i = 1; i < 20; i++) {
		struct io_event event = take(unread);

		EXPECT_EQ("data", 1000 + i, event.data);
		EXPECT_EQ("result", 3, event.res);
	}
	for (int i = 0; i < 300; i++) {
		quick(unread, i);
		EXPECT_EQ("data later", i, take(unread).data);
	}
	EXPECT_EQ("large", 6000, take(large).data);
	for (int round = 100; round < 200; round++)
		write_and_read(idle, fd, buffer, round);
	EXPECT_EQ("destroyed", -1, syscall(SYS_io_destroy, gone == awaited ? 0 : gone));
	quick(awaited, 4711);
	MUST0(pthread_join(thread, NULL));
	EXPECT_EQ("child", 0, guest_reap(child));
	MUST(syscall(SYS_io_destroy, unread));
	EXPECT_EQ("destroyed now", -1, syscall(SYS_io_getevents, unread, 0, 0, NULL, NULL));
	guest_ok();
}
