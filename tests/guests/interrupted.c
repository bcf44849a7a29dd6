// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Blocks in the system call named by the second argument, across the dump. It must end as if nothing had been: no EINTR, no
 * early or short result. A second process sees that the first is blocked and says ready; after go it brings the event.
 */
#include "guest.h"
#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

/* Longer than any test: if a call ends by its timeout, that is wrong. */
static struct timespec long_time = { 1000, 0 };
static const size_t long_write_bytes = 3 << 20;

static int channel[2]; /* pipe or socket pair: the blocked process has [0], the other [1] */
static int epoll_fd, event_fd, semaphore, lock_fd, other_lock_fd;
static int *futex_word;
static char path[PATH_MAX];
static unsigned char *long_data;
static pid_t blocked_pid, exiting_child;
static volatile sig_atomic_t handled;
static int64_t began_ns;

static void on_signal(int signal)
{
	handled = signal;
}

/* Set-ups, before the fork. */

static void handler(void)
{
	struct sigaction action = { .sa_handler = on_signal };

	MUST(sigaction(SIGUSR1, &action, NULL));
}

static void open_pipe(void)
{
	MUST(pipe(channel));
}

static void open_sockets(void)
{
	struct timeval timeout = { 1000, 0 };

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, channel));
	MUST(setsockopt(channel[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)));
}

static struct sockaddr_in listener;

static void listen_with_timeout(void)
{
	struct timeval timeout = { 1000, 0 };
	socklen_t bytes = sizeof(listener);

	listener.sin_family = AF_INET;
	listener.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	channel[0] = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	MUST(bind(channel[0], (struct sockaddr *)&listener, sizeof(listener)));
	MUST(listen(channel[0], 1));
	MUST(getsockname(channel[0], (struct sockaddr *)&listener, &bytes));
	MUST(setsockopt(channel[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)));
}

static void open_plain_sockets(void)
{
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, channel));
}

/* No byte more goes into [0]. */
static void open_full_sockets(void)
{
	struct timeval timeout = { 1000, 0 };
	static const char filler[4096];

	open_plain_sockets();
	MUST(setsockopt(channel[0], SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)));
	while (send(channel[0], filler, sizeof(filler), MSG_DONTWAIT) > 0)
		;
	while (send(channel[0], filler, 1, MSG_DONTWAIT) > 0)
		;
	EXPECT_EQ("errno of a full socket", EAGAIN, errno);
}

static void open_epoll(void)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = 0x1122334455667788 };

	open_pipe();
	epoll_fd = MUST(epoll_create1(0));
	MUST(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, channel[0], &event));
}

static void open_eventfd(void)
{
	event_fd = MUST(eventfd(0, 0));
}

static void make_futex(void)
{
	futex_word = guest_shared(4096);
	*futex_word = 99;
}

static void make_semaphore(void)
{
	semaphore = MUST(semget(IPC_PRIVATE, 1, 0600));
}

static void block_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, 44);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
}

static void block_with_handler(void)
{
	block_signals();
	handler();
}

static void start_child(void)
{
	exiting_child = MUST(fork());
	if (!exiting_child) {
		guest_wait_go();
		_exit(77);
	}
}

static void open_locked(void)
{
	lock_fd = MUST(open(guest_path(path, sizeof(path), "locked"), O_CREAT | O_RDWR, 0600));
}

static void make_fifo(void)
{
	MUST(mkfifo(guest_path(path, sizeof(path), "fifo"), 0600));
}

static void fill_long_data(void)
{
	long_data = MUST(mmap(NULL, long_write_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	for (size_t i = 0; i < long_write_bytes; i++)
		long_data[i] = i * 2654435761u >> 13;
}

static void pipe_and_data(void)
{
	int ends[2];

	fill_long_data();
	/* The blocked process writes, so it has the writing end. */
	MUST(pipe(ends));
	channel[0] = ends[1];
	channel[1] = ends[0];
}

static void sockets_and_data(void)
{
	fill_long_data();
	open_plain_sockets();
}

/* In the second process before the first blocks: it takes what the first will wait for. */

static void take_flock(void)
{
	other_lock_fd = MUST(open(path, O_RDWR));
	MUST(flock(other_lock_fd, LOCK_EX));
}

static void take_posix_lock(void)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 20 };

	other_lock_fd = MUST(open(path, O_RDWR));
	MUST(fcntl(other_lock_fd, F_SETLK, &lock));
}

/* The calls. Each gives what a call without disturbance gives. */

static long call_nanosleep(void)
{
	struct timespec rest = { 0, 0 };
	long result = syscall(SYS_nanosleep, &long_time, &rest);
	int error = errno;
	/* The signal ends it early; what remains is what has not been slept. */
	int64_t slept = guest_clock_ns(CLOCK_MONOTONIC) - began_ns;
	int64_t lost = 1000000000000 - slept - ((int64_t)rest.tv_sec * 1000000000 + rest.tv_nsec);

	if (lost > 1000000000 || lost < -1000000000)
		guest_fail("after %lld ns, the remaining time is off by %lld ns", (long long)slept, (long long)lost);
	errno = error;
	return result;
}

static long call_clock_nanosleep(void)
{
	return syscall(SYS_clock_nanosleep, CLOCK_BOOTTIME, 0, &long_time, NULL);
}

static long call_clock_nanosleep_abs(void)
{
	struct timespec end;

	MUST(clock_gettime(CLOCK_MONOTONIC, &end));
	end.tv_sec += 1000;
	return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL);
}

static long call_poll(void)
{
	struct pollfd entry = { channel[0], POLLIN, 0 };
	long result = syscall(SYS_poll, &entry, 1, 1000000);

	EXPECT_EQ("revents", POLLIN, entry.revents);
	return result;
}

static long call_poll_forever(void)
{
	struct pollfd entry = { channel[0], POLLIN, 0 };

	return syscall(SYS_poll, &entry, 1, -1);
}

static long call_ppoll(void)
{
	struct pollfd entry = { channel[0], POLLIN, 0 };
	struct timespec timeout = long_time;
	long result = syscall(SYS_ppoll, &entry, 1, &timeout, NULL, 0);

	EXPECT_EQ("revents", POLLIN, entry.revents);
	return result;
}

static long call_select(void)
{
	fd_set set;
	struct timeval timeout = { 1000, 0 };

	FD_ZERO(&set);
	FD_SET(channel[0], &set);
	long result = syscall(SYS_select, channel[0] + 1, &set, NULL, NULL, &timeout);
	EXPECT(FD_ISSET(channel[0], &set));
	return result;
}

static long call_pselect(void)
{
	fd_set set;
	struct timespec timeout = long_time;

	FD_ZERO(&set);
	FD_SET(channel[0], &set);
	long result = syscall(SYS_pselect6, channel[0] + 1, &set, NULL, NULL, &timeout, NULL);
	EXPECT(FD_ISSET(channel[0], &set));
	return result;
}

static long check_epoll(long result, const struct epoll_event *event)
{
	if (result == 1)
		EXPECT_EQ("epoll data", 0x1122334455667788, event->data.u64);
	return result;
}

static long call_epoll_wait(void)
{
	struct epoll_event event;

	return check_epoll(syscall(SYS_epoll_wait, epoll_fd, &event, 1, 1000000), &event);
}

static long call_epoll_pwait(void)
{
	struct epoll_event event;
	sigset_t mask;

	sigfillset(&mask);
	return check_epoll(syscall(SYS_epoll_pwait, epoll_fd, &event, 1, -1, &mask, 8), &event);
}

#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif
static long call_epoll_pwait2(void)
{
	struct epoll_event event;

	return check_epoll(syscall(SYS_epoll_pwait2, epoll_fd, &event, 1, &long_time, NULL, 0), &event);
}

static long call_futex(void)
{
	return syscall(SYS_futex, futex_word, FUTEX_WAIT, 99, NULL, NULL, 0);
}

static long call_futex_timeout(void)
{
	return syscall(SYS_futex, futex_word, FUTEX_WAIT, 99, &long_time, NULL, 0);
}

static long call_futex_until(void)
{
	struct timespec end;

	MUST(clock_gettime(CLOCK_MONOTONIC, &end));
	end.tv_sec += 1000;
	return syscall(SYS_futex, futex_word, FUTEX_WAIT_BITSET, 99, &end, NULL, FUTEX_BITSET_MATCH_ANY);
}

static long call_read(void)
{
	char byte;

	return syscall(SYS_read, channel[0], &byte, 1);
}

static long call_read_eventfd(void)
{
	uint64_t value = 0;
	long result = syscall(SYS_read, event_fd, &value, sizeof(value));

	EXPECT_EQ("value of the eventfd", 5, value);
	return result;
}

static long call_recv(void)
{
	char byte;

	return syscall(SYS_recvfrom, channel[0], &byte, 1, 0, NULL, NULL);
}

static long accepted(long socket)
{
	if (socket < 0)
		return socket;
	MUST(close((int)socket));
	return 1;
}

static long call_accept(void)
{
	return accepted(syscall(SYS_accept, channel[0], NULL, NULL));
}

static long call_accept4(void)
{
	return accepted(syscall(SYS_accept4, channel[0], NULL, NULL, SOCK_CLOEXEC));
}

static long call_readv(void)
{
	char byte;
	struct iovec part = { &byte, 1 };

	return syscall(SYS_readv, channel[0], &part, 1);
}

static long call_write_byte(void)
{
	return syscall(SYS_write, channel[0], "w", 1);
}

static long call_writev(void)
{
	struct iovec part = { "w", 1 };

	return syscall(SYS_writev, channel[0], &part, 1);
}

static long call_sendmmsg(void)
{
	struct iovec part = { "w", 1 };
	struct mmsghdr message = { .msg_hdr = { .msg_iov = &part, .msg_iovlen = 1 } };

	return syscall(SYS_sendmmsg, channel[0], &message, 1, 0);
}

static long call_semop(void)
{
	struct sembuf take = { 0, -1, 0 };

	return syscall(SYS_semop, semaphore, &take, 1);
}

static long call_semtimedop(void)
{
	struct sembuf take = { 0, -1, 0 };

	return syscall(SYS_semtimedop, semaphore, &take, 1, &long_time);
}

static long wait_for_signal(const struct timespec *timeout)
{
	sigset_t set;
	siginfo_t info = { 0 };

	sigemptyset(&set);
	sigaddset(&set, 44);
	long result = syscall(SYS_rt_sigtimedwait, &set, &info, timeout, 8);
	EXPECT_EQ("value of the signal", result == 44 ? 31337 : 0, info.si_value.sival_int);
	return result;
}

static long call_sigtimedwait(void)
{
	return wait_for_signal(&long_time);
}

static long call_sigwaitinfo(void)
{
	return wait_for_signal(NULL);
}

static long call_sigsuspend(void)
{
	sigset_t none, after;

	sigemptyset(&none);
	long result = syscall(SYS_rt_sigsuspend, &none, 8);
	int error = errno;
	MUST(sigprocmask(SIG_SETMASK, NULL, &after));
	EXPECT_EQ("SIGUSR1 blocked again", 1, sigismember(&after, SIGUSR1));
	errno = error;
	return result;
}

static long call_pause(void)
{
	return syscall(SYS_pause);
}

static long call_wait4(void)
{
	int status = 0;
	long result = syscall(SYS_wait4, exiting_child, &status, 0, NULL);

	EXPECT_EQ("status", result > 0 ? 77 << 8 : 0, status);
	return result == exiting_child ? 0 : result;
}

static long call_waitid(void)
{
	siginfo_t info = { 0 };
	long result = syscall(SYS_waitid, P_PID, exiting_child, &info, WEXITED, NULL);

	EXPECT_EQ("status", result ? 0 : 77, info.si_status);
	return result;
}

static long call_flock(void)
{
	return syscall(SYS_flock, lock_fd, LOCK_EX);
}

static long call_setlkw(void)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 15, .l_len = 1 };

	return syscall(SYS_fcntl, lock_fd, F_SETLKW, &lock);
}

static long call_ofd_setlkw(void)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 15, .l_len = 1 };

	return syscall(SYS_fcntl, lock_fd, F_OFD_SETLKW, &lock);
}

static long call_write(void)
{
	return syscall(SYS_write, channel[0], long_data, long_write_bytes);
}

static long call_open_fifo(void)
{
	long fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY, 0);

	return fd > 0 ? 0 : fd;
}

/* Slept out: it ends by itself, not before its time by CLOCK_MONOTONIC. */
static struct timespec short_time = { 2, 0 };

static long call_sleep_out(void)
{
	long result = syscall(SYS_nanosleep, &short_time, NULL);

	EXPECT(guest_clock_ns(CLOCK_MONOTONIC) - began_ns >= 2000000000);
	guest_wait_go();
	return result;
}

static long call_poll_out(void)
{
	long result = syscall(SYS_poll, NULL, 0, 2000);

	EXPECT(guest_clock_ns(CLOCK_MONOTONIC) - began_ns >= 2000000000);
	guest_wait_go();
	return result;
}

/* The events. */

static void send_signal(void)
{
	MUST(kill(blocked_pid, SIGUSR1));
}

static void write_byte(void)
{
	EXPECT_EQ("write", 1, write(channel[1], "e", 1));
}

static void connect_to_it(void)
{
	int socket_fd = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));

	MUST(connect(socket_fd, (struct sockaddr *)&listener, sizeof(listener)));
	MUST(close(socket_fd));
}

static void post_eventfd(void)
{
	uint64_t value = 5;

	EXPECT_EQ("write", 8, write(event_fd, &value, sizeof(value)));
}

/* After a restore the other may not have reached the futex yet. */
static void wake(void)
{
	while (MUST(syscall(SYS_futex, futex_word, FUTEX_WAKE, 1, NULL, NULL, 0)) != 1)
		guest_nap();
}

static void post_semaphore(void)
{
	struct sembuf give = { 0, 1, 0 };

	MUST(semop(semaphore, &give, 1));
}

static void queue_signal(void)
{
	MUST(sigqueue(blocked_pid, 44, (union sigval){ .sival_int = 31337 }));
}

static void release_flock(void)
{
	MUST(flock(other_lock_fd, LOCK_UN));
}

static void release_posix_lock(void)
{
	struct flock lock = { .l_type = F_UNLCK, .l_whence = SEEK_SET };

	MUST(fcntl(other_lock_fd, F_SETLK, &lock));
}

static void drain(void)
{
	unsigned char part[65536];

	for (size_t done = 0; done < long_write_bytes;) {
		size_t wanted = long_write_bytes - done < sizeof(part) ? long_write_bytes - done : sizeof(part);
		ssize_t got = MUST(read(channel[1], part, wanted));

		if (!got)
			guest_fail("end of data after %zu of %zu bytes", done, long_write_bytes);
		EXPECT_MEM("data written", long_data + done, part, got);
		done += got;
	}
}

/* Until the byte has come that the other has been waiting to write. */
static void make_room(void)
{
	char part[4096];
	ssize_t got;

	do
		got = MUST(read(channel[1], part, sizeof(part)));
	while (got && part[got - 1] != 'w');
	EXPECT(got > 0);
}

static void open_fifo_to_write(void)
{
	MUST(open(path, O_WRONLY));
}

static void no_event(void)
{
}

static const struct blocking {
	const char *name;
	int number; /* of the system call */
	void (*set_up)(void);
	void (*prepare)(void); /* in the second process */
	long (*call)(void);
	void (*event)(void);
	long result; /* -EINTR: allowed after the signal, whose handler must have run */
} calls[] = {
	{ "nanosleep", SYS_nanosleep, handler, NULL, call_nanosleep, send_signal, -EINTR },
	{ "nanosleep_out", SYS_nanosleep, NULL, NULL, call_sleep_out, no_event, 0 },
	{ "clock_nanosleep", SYS_clock_nanosleep, handler, NULL, call_clock_nanosleep, send_signal, -EINTR },
	{ "clock_nanosleep_abs", SYS_clock_nanosleep, handler, NULL, call_clock_nanosleep_abs, send_signal, -EINTR },
	{ "poll", SYS_poll, open_pipe, NULL, call_poll, write_byte, 1 },
	{ "poll_forever", SYS_poll, open_pipe, NULL, call_poll_forever, write_byte, 1 },
	{ "poll_out", SYS_poll, NULL, NULL, call_poll_out, no_event, 0 },
	{ "ppoll", SYS_ppoll, open_pipe, NULL, call_ppoll, write_byte, 1 },
	{ "select", SYS_select, open_pipe, NULL, call_select, write_byte, 1 },
	{ "pselect", SYS_pselect6, open_pipe, NULL, call_pselect, write_byte, 1 },
	{ "epoll_wait", SYS_epoll_wait, open_epoll, NULL, call_epoll_wait, write_byte, 1 },
	{ "epoll_pwait", SYS_epoll_pwait, open_epoll, NULL, call_epoll_pwait, write_byte, 1 },
	{ "epoll_pwait2", SYS_epoll_pwait2, open_epoll, NULL, call_epoll_pwait2, write_byte, 1 },
	{ "futex", SYS_futex, make_futex, NULL, call_futex, wake, 0 },
	{ "futex_timeout", SYS_futex, make_futex, NULL, call_futex_timeout, wake, 0 },
	{ "futex_until", SYS_futex, make_futex, NULL, call_futex_until, wake, 0 },
	{ "read_pipe", SYS_read, open_pipe, NULL, call_read, write_byte, 1 },
	{ "read_eventfd", SYS_read, open_eventfd, NULL, call_read_eventfd, post_eventfd, 8 },
	{ "recv", SYS_recvfrom, open_plain_sockets, NULL, call_recv, write_byte, 1 },
	{ "recv_timeout", SYS_recvfrom, open_sockets, NULL, call_recv, write_byte, 1 },
	{ "accept_timeout", SYS_accept, listen_with_timeout, NULL, call_accept, connect_to_it, 1 },
	{ "accept4_timeout", SYS_accept4, listen_with_timeout, NULL, call_accept4, connect_to_it, 1 },
	{ "readv_timeout", SYS_readv, open_sockets, NULL, call_readv, write_byte, 1 },
	{ "write_timeout", SYS_write, open_full_sockets, NULL, call_write_byte, make_room, 1 },
	{ "writev_timeout", SYS_writev, open_full_sockets, NULL, call_writev, make_room, 1 },
	{ "sendmmsg_timeout", SYS_sendmmsg, open_full_sockets, NULL, call_sendmmsg, make_room, 1 },
	{ "semop", SYS_semop, make_semaphore, NULL, call_semop, post_semaphore, 0 },
	{ "semtimedop", SYS_semtimedop, make_semaphore, NULL, call_semtimedop, post_semaphore, 0 },
	{ "sigtimedwait", SYS_rt_sigtimedwait, block_signals, NULL, call_sigtimedwait, queue_signal, 44 },
	{ "sigwaitinfo", SYS_rt_sigtimedwait, block_signals, NULL, call_sigwaitinfo, queue_signal, 44 },
	{ "sigsuspend", SYS_rt_sigsuspend, block_with_handler, NULL, call_sigsuspend, send_signal, -EINTR },
	{ "pause", SYS_pause, handler, NULL, call_pause, send_signal, -EINTR },
	{ "wait4", SYS_wait4, start_child, NULL, call_wait4, no_event, 0 },
	{ "waitid", SYS_waitid, start_child, NULL, call_waitid, no_event, 0 },
	{ "flock", SYS_flock, open_locked, take_flock, call_flock, release_flock, 0 },
	{ "setlkw", SYS_fcntl, open_locked, take_posix_lock, call_setlkw, release_posix_lock, 0 },
	{ "ofd_setlkw", SYS_fcntl, open_locked, take_posix_lock, call_ofd_setlkw, release_posix_lock, 0 },
	{ "write_pipe", SYS_write, pipe_and_data, NULL, call_write, drain, 3 << 20 },
	{ "write_socket", SYS_write, sockets_and_data, NULL, call_write, drain, 3 << 20 },
	{ "open_fifo", SYS_openat, make_fifo, NULL, call_open_fifo, open_fifo_to_write, 0 },
};

/* Whether the process sleeps in that system call: /proc says "running" of one that doesn't. */
static bool is_blocked(pid_t pid, int number)
{
	char file[64], text[256];

	snprintf(file, sizeof(file), "/proc/%d/syscall", pid);
	guest_read_file(file, text, sizeof(text));
	return text[0] >= '0' && text[0] <= '9' && atoi(text) == number;
}

int main(int argc, char **argv)
{
	const struct blocking *chosen = NULL;
	int prepared[2];
	char byte;

	guest_begin(argc, argv);
	for (size_t i = 0; i < sizeof(calls) / sizeof(*calls); i++)
		if (argc == 3 && !strcmp(argv[2], calls[i].name))
			chosen = &calls[i];
	if (!chosen)
		guest_fail("no call is named %s", argc == 3 ? argv[2] : "nothing");
	blocked_pid = getpid();
	if (chosen->set_up)
		chosen->set_up();
	MUST(pipe(prepared));
	pid_t other = MUST(fork());
	if (!other) {
		if (chosen->prepare)
			chosen->prepare();
		MUST(write(prepared[1], "x", 1));
		close(prepared[0]);
		close(prepared[1]);
		while (!is_blocked(blocked_pid, chosen->number))
			guest_nap();
		guest_ready();
		guest_wait_go();
		chosen->event();
		_exit(0);
	}
	EXPECT_EQ("word of the other", 1, read(prepared[0], &byte, 1));
	close(prepared[0]);
	close(prepared[1]);

	began_ns = guest_clock_ns(CLOCK_MONOTONIC);
	errno = 0;
	long result = chosen->call();
	if (result < 0)
		result = -errno;
	if (!guest_exists("go"))
		guest_fail("%s ended before its event, with %ld", chosen->name, result);
	if (result != chosen->result)
		guest_fail("%s: expected %ld, got %ld (%s)", chosen->name, chosen->result, result,
			   result < 0 ? strerror(-result) : "no error");
	if (result == -EINTR)
		EXPECT_EQ("signal handled", SIGUSR1, handled);
	EXPECT_EQ("the other's verdict", 0, guest_reap(other));
	if (chosen->set_up == make_semaphore)
		MUST(semctl(semaphore, 0, IPC_RMID));
	guest_ok();
}
