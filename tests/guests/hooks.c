// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * An application with hooks, critical sections, and dumps that it asks for (include/ckpt-hooks.h). What happens it writes to the
 * file `events`, a line each; the harness makes and removes files that it looks for:
 *
 *   veto    on_dump objects while it is there
 *   hold    on_dump waits while it is there
 *   leave   the section is left; die: the process, or the threads, in the section die
 *   enlist  hooks are registered
 *   ask     a dump is asked for
 *   wiped   memory that is to be shared with no copy has to be zero
 */
#include "guest.h"

#include "../../include/ckpt-hooks.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/time.h>

/* What can't be dumped: on_dump closes it. */
static int refused = -1;
/* on_dump less on_resume and on_restore, of each registration. */
static int outstanding[2];
static const char *const names[] = { "a", "b" };

__attribute__((format(printf, 1, 2))) static void event(const char *format, ...)
{
	char path[PATH_MAX], line[256];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	line[length++] = '\n';
	int fd = MUST(open(guest_path(path, sizeof(path), "events"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
	EXPECT_EQ("bytes of an event", length, write(fd, line, length));
	close(fd);
}

static void check_thread(void)
{
	char name[16] = "";
	sigset_t set;

	MUST(prctl(PR_GET_NAME, name));
	EXPECT_STR("name of the thread", "ckpt-hooks", name);
	MUST0(pthread_sigmask(SIG_SETMASK, NULL, &set));
	for (int signal = 1; signal < 32; signal++)
		if (signal != SIGKILL && signal != SIGSTOP)
			EXPECT(sigismember(&set, signal) == 1);
}

static int on_dump(void *user)
{
	int which = (int)(intptr_t)user;

	check_thread();
	EXPECT_EQ("dumps that have had no end", 0, outstanding[which]++);
	EXPECT_EQ("a dump asked for from a callback", CKPT_NOT_HERE, ckpt_dump_now(1000, NULL));
	event("dump %s %d", names[which], getpid());
	if (refused >= 0)
		close(refused);
	while (guest_exists("hold"))
		guest_nap();
	return guest_exists("veto");
}

static void on_resume(void *user)
{
	int which = (int)(intptr_t)user;

	check_thread();
	EXPECT_EQ("dumps that have an end", 1, outstanding[which]--);
	event("resume %s %d", names[which], getpid());
}

static void on_restore(void *user, const struct ckpt_restored *restored)
{
	int which = (int)(intptr_t)user;
	struct ckpt_restored again = { .size = sizeof(again) };

	check_thread();
	/* It may be that on_dump was not waited for, or not called at all. */
	outstanding[which] = 0;
	EXPECT_EQ("ckpt_get_restored", CKPT_OK, ckpt_get_restored(&again));
	EXPECT_MEM("what a copy is told", &again, restored, sizeof(again));
	event("restore %s %d restores=%u of=%u copy=%u/%u checkpoint=%llu name=%s", names[which], getpid(),
	      restored->restores, restored->of_checkpoint, restored->copy, restored->copies,
	      (unsigned long long)restored->checkpoint, restored->name);
}

static int enlist(int which)
{
	struct ckpt_hooks hooks = {
		.size = sizeof(hooks),
		.user = (void *)(intptr_t)which,
		.on_dump = on_dump,
		.on_resume = on_resume,
		.on_restore = on_restore,
	};
	return ckpt_hooks_register(&hooks);
}

/* Whether there is an interceptor; else nothing of all this happens, and the guest is dumped and restored all the same. */
static bool is_under_ckpt(void)
{
	int count = ckpt_restore_count();

	if (count == CKPT_NOT_UNDER_CKPT)
		event("alone");
	return count != CKPT_NOT_UNDER_CKPT;
}

static void finish(void)
{
	guest_wait_go();
	guest_ok();
}

static void *steps(void *unused)
{
	(void)unused;
	/* Nearly always in one. */
	for (;;) {
		EXPECT_EQ("begin", CKPT_OK, ckpt_critical_begin(NULL));
		int before = ckpt_restore_count();
		for (volatile int spin = 0; spin < 200000; spin++)
			;
		EXPECT_EQ("restores within a critical section", before, ckpt_restore_count());
		EXPECT_EQ("end", CKPT_OK, ckpt_critical_end());
	}
	return NULL;
}

/* Threads that end within their section, in one of these ways, when their turn has come. */
enum { BY_RETURN, BY_CANCEL, BY_SYSCALL, WAYS };
static volatile int in_section, turn;

static void *ends(void *way)
{
	EXPECT_EQ("begin", CKPT_OK, ckpt_critical_begin("of a thread"));
	EXPECT_EQ("begin within", CKPT_OK, ckpt_critical_begin(NULL));
	__atomic_add_fetch(&in_section, 1, __ATOMIC_SEQ_CST);
	while (!__atomic_load_n(&turn, __ATOMIC_SEQ_CST) || (intptr_t)way == BY_CANCEL)
		guest_nap();
	if ((intptr_t)way == BY_SYSCALL)
		syscall(SYS_exit, 0);
	return NULL;
}

static void begin_sections(pthread_t *threads, int count)
{
	in_section = turn = 0;
	for (int n = 0; n < count; n++)
		MUST0(pthread_create(&threads[n], NULL, ends, (void *)(intptr_t)(n % WAYS)));
	while (__atomic_load_n(&in_section, __ATOMIC_SEQ_CST) < count)
		guest_nap();
}

static void end_threads(pthread_t *threads, int count)
{
	turn = 1;
	for (int n = 0; n < count; n++) {
		if (n % WAYS == BY_CANCEL)
			MUST0(pthread_cancel(threads[n]));
		MUST0(pthread_join(threads[n], NULL));
	}
}

/* The fields "sections" and "in_flight" of the control word: whether the thread is noted, how many are not but counted. */
static const uint32_t *control;
static int handled;

static uint32_t counted(void)
{
	return __atomic_load_n(&control[64 / 4 + 4], __ATOMIC_SEQ_CST);
}

static bool is_noted(pid_t tid)
{
	for (int n = 0; n < 64; n++)
		if (__atomic_load_n(&control[640 / 4 + n], __ATOMIC_SEQ_CST) == (uint32_t)tid)
			return true;
	return false;
}

static void short_section(void)
{
	EXPECT_EQ("begin", CKPT_OK, ckpt_critical_begin(NULL));
	int before = ckpt_restore_count();
	/* With room for it, nobody is counted. */
	EXPECT(is_noted((pid_t)syscall(SYS_gettid)) || counted());
	EXPECT_EQ("restores within a critical section", before, ckpt_restore_count());
	EXPECT_EQ("end", CKPT_OK, ckpt_critical_end());
}

static void on_alarm(int signal)
{
	int error = errno;

	(void)signal;
	short_section();
	__atomic_add_fetch(&handled, 1, __ATOMIC_SEQ_CST);
	errno = error;
}

/* Sections of this thread, until so many handlers had theirs within it or between two, and there is a file. */
static void be_interrupted(int times, const char *file)
{
	struct itimerval often = { { 0, 50 }, { 0, 50 } };

	__atomic_store_n(&handled, 0, __ATOMIC_SEQ_CST);
	MUST(setitimer(ITIMER_REAL, &often, NULL));
	do
		for (int n = 0; n < 100; n++)
			short_section();
	while (__atomic_load_n(&handled, __ATOMIC_SEQ_CST) < times || !guest_exists(file));
	MUST(setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL));
}

static void *sections_of_another(void *stop)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGALRM);
	MUST0(pthread_sigmask(SIG_BLOCK, &set, NULL));
	while (!__atomic_load_n((int *)stop, __ATOMIC_SEQ_CST))
		short_section();
	return NULL;
}

static void wait_in_section(void)
{
	EXPECT_EQ("begin", CKPT_OK, ckpt_critical_begin("the outer one"));
	EXPECT_EQ("begin within", CKPT_OK, ckpt_critical_begin("a name that is longer than what there is room for"));
	EXPECT_EQ("a dump asked for from a section", CKPT_NOT_HERE, ckpt_dump_now(1000, NULL));
	EXPECT_EQ("end within", CKPT_OK, ckpt_critical_end());
}

static void wipe(size_t bytes)
{
	unsigned char *kept = MUST(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	unsigned char *gap = MUST(mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	unsigned char *wiped = MUST(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

	(void)gap;
	MUST(madvise(wiped, bytes, MADV_WIPEONFORK));
	for (size_t at = 0; at < bytes; at++)
		kept[at] = wiped[at] = at % 251 + 1;
	guest_ready();
	guest_wait_go();
	bool expected = guest_exists("wiped");
	for (size_t at = 0; at < bytes; at++) {
		EXPECT_EQ("memory that is the same in all copies", at % 251 + 1, kept[at]);
		EXPECT_EQ("memory that is the first one's", expected ? 0 : at % 251 + 1, wiped[at]);
	}
	/* It still is what it was. */
	pid_t child = MUST(fork());
	if (!child) {
		wiped[0] = 1;
		_exit(0);
	}
	EXPECT_EQ("the child's status", 0, guest_reap(child));
	wiped[0] = 7;
	child = MUST(fork());
	if (!child)
		_exit(wiped[0]);
	EXPECT_EQ("what a forked child finds", 0, guest_reap(child));
	guest_ok();
}

int main(int argc, char **argv)
{
	guest_begin(argc, argv);
	const char *mode = argc > 2 ? argv[2] : "callbacks";

	if (!strcmp(mode, "wipe"))
		wipe((size_t)atoi(argv[3]) << 10);
	bool under_ckpt = is_under_ckpt();
	if (!under_ckpt) {
		EXPECT_EQ("register", CKPT_NOT_UNDER_CKPT, enlist(0));
		EXPECT_EQ("begin", CKPT_NOT_UNDER_CKPT, ckpt_critical_begin("x"));
		EXPECT_EQ("end", CKPT_NOT_UNDER_CKPT, ckpt_critical_end());
		EXPECT_EQ("dump", CKPT_NOT_UNDER_CKPT, ckpt_dump_now(0, NULL));
		guest_ready();
		finish();
	}
	EXPECT_EQ("end without a begin", CKPT_NOT_HERE, ckpt_critical_end());
	if (!strcmp(mode, "callbacks")) {
		size_t bytes = argc > 3 ? (size_t)atoi(argv[3]) << 10 : 0;
		unsigned char *memory = malloc(bytes + 1);

		memset(memory, 0x5a, bytes + 1);
		struct ckpt_hooks wrong = { .size = 8 };

		EXPECT_EQ("a wrong size", CKPT_INVALID, ckpt_hooks_register(&wrong));
		int first = enlist(0), second = enlist(1), third = enlist(0);
		EXPECT(first > 0 && second > first && third > second);
		EXPECT_EQ("unregister", CKPT_OK, ckpt_hooks_unregister(third));
		EXPECT_EQ("unregister twice", CKPT_INVALID, ckpt_hooks_unregister(third));
		/* Many, but never more than two of them at a time. */
		for (int n = 0, last = 0; n < 200; n++) {
			int next = enlist(0);

			EXPECT(next > third);
			if (last)
				EXPECT_EQ("unregister the one before", CKPT_OK, ckpt_hooks_unregister(last));
			last = next;
			if (n == 199)
				EXPECT_EQ("unregister the last", CKPT_OK, ckpt_hooks_unregister(last));
		}
		EXPECT_EQ("threads", 2, guest_threads(getpid(), (pid_t[8]){ 0 }, 8));
		guest_ready();
		guest_wait_go();
		for (size_t at = 0; at <= bytes; at++)
			EXPECT_EQ("memory", 0x5a, memory[at]);
		guest_ok();
	} else if (!strcmp(mode, "closes")) {
		refused = MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0));
		EXPECT(enlist(0) > 0);
		guest_ready();
		finish();
	} else if (!strcmp(mode, "guarded")) {
		EXPECT(enlist(0) > 0);
		wait_in_section();
		guest_ready();
		while (!guest_exists("leave"))
			guest_nap();
		EXPECT_EQ("end", CKPT_OK, ckpt_critical_end());
		finish();
	} else if (!strcmp(mode, "later")) {
		guest_ready();
		while (!guest_exists("enlist"))
			guest_nap();
		EXPECT(enlist(0) > 0);
		event("enlisted");
		finish();
	} else if (!strcmp(mode, "family")) {
		int *stand = guest_shared(sizeof(int));

		EXPECT(enlist(0) > 0);
		EXPECT_EQ("begin", CKPT_OK, ckpt_critical_begin("not the children's"));
		for (int n = 0; n < 2; n++) {
			if (MUST(fork()))
				continue;
			EXPECT_EQ("the section of the parent", CKPT_NOT_HERE, ckpt_critical_end());
			EXPECT_EQ("threads of a child", 1, guest_threads(getpid(), (pid_t[8]){ 0 }, 8));
			outstanding[0] = 0;
			if (n == 0)
				EXPECT(enlist(1) > 0);
			__atomic_fetch_add(stand, 1, __ATOMIC_SEQ_CST);
			guest_wait_go();
			_exit(0);
		}
		/* This one does not call anything: it has its parent's section, and its thread's id, in a copy. */
		if (!MUST(fork())) {
			__atomic_fetch_add(stand, 1, __ATOMIC_SEQ_CST);
			guest_wait_go();
			_exit(0);
		}
		while (__atomic_load_n(stand, __ATOMIC_SEQ_CST) < 3)
			guest_nap();
		EXPECT_EQ("end", CKPT_OK, ckpt_critical_end());
		guest_ready();
		guest_wait_go();
		for (int n = 0, status; n < 3; n++) {
			MUST(wait(&status));
			EXPECT_EQ("a child's status", 0, status);
		}
		guest_ok();
	} else if (!strcmp(mode, "section")) {
		wait_in_section();
		guest_ready();
		while (!guest_exists("leave"))
			guest_nap();
		event("left");
		EXPECT_EQ("end", CKPT_OK, ckpt_critical_end());
		EXPECT_EQ("one end too many", CKPT_NOT_HERE, ckpt_critical_end());
		finish();
	} else if (!strcmp(mode, "dies")) {
		int *stand = guest_shared(sizeof(int));
		pid_t child = MUST(fork());

		if (!child) {
			wait_in_section();
			__atomic_store_n(stand, 1, __ATOMIC_SEQ_CST);
			while (!guest_exists("die"))
				guest_nap();
			kill(getpid(), SIGKILL);
		}
		while (!__atomic_load_n(stand, __ATOMIC_SEQ_CST))
			guest_nap();
		guest_ready();
		EXPECT_EQ("the child's status", SIGKILL, guest_reap(child));
		event("died");
		finish();
	} else if (!strcmp(mode, "ends")) {
		pthread_t threads[60];

		/* More in all than are remembered at a time. */
		begin_sections(threads, 60);
		end_threads(threads, 60);
		begin_sections(threads, 15);
		guest_ready();
		while (!guest_exists("die"))
			guest_nap();
		end_threads(threads, 15);
		event("died");
		guest_wait_go();
		EXPECT_EQ("end of a section of others", CKPT_NOT_HERE, ckpt_critical_end());
		EXPECT_EQ("begin", CKPT_OK, ckpt_critical_begin("its own"));
		EXPECT_EQ("end", CKPT_OK, ckpt_critical_end());
		guest_ok();
	} else if (!strcmp(mode, "handlers")) {
		pthread_t threads[64];
		int stop = 0;
		struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };

		control = dlsym(RTLD_DEFAULT, "ckpt_control");
		EXPECT(control);
		MUST(sigaction(SIGALRM, &action, NULL));
		short_section();
		MUST0(pthread_create(&threads[0], NULL, sections_of_another, &stop));
		guest_ready();
		be_interrupted(20000, "leave");
		__atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
		MUST0(pthread_join(threads[0], NULL));
		for (int n = 0; n < 64; n++)
			EXPECT_EQ("a place after all sections", 0, control[640 / 4 + n]);
		EXPECT_EQ("counted after all sections", 0, counted());
		/* All places taken: it is counted. */
		begin_sections(threads, 64);
		be_interrupted(20000, "leave");
		EXPECT_EQ("counted after its sections", 0, counted());
		end_threads(threads, 64);
		finish();
	} else if (!strcmp(mode, "steps")) {
		pthread_t threads[2];

		for (int n = 0; n < 2; n++)
			MUST0(pthread_create(&threads[n], NULL, steps, NULL));
		guest_ready();
		finish();
	} else if (!strcmp(mode, "now")) {
		uint64_t checkpoint = 0;

		guest_ready();
		while (!guest_exists("ask"))
			guest_nap();
		int result = ckpt_dump_now(atoi(argv[3]), &checkpoint);
		event("now %d checkpoint=%llu restores=%d", result, (unsigned long long)checkpoint, ckpt_restore_count());
		finish();
	} else if (!strcmp(mode, "twice")) {
		uint64_t checkpoint = 0;

		guest_ready();
		while (!guest_exists("ask"))
			guest_nap();
		int result = ckpt_dump_now(0, &checkpoint);
		event("first %d checkpoint=%llu", result, (unsigned long long)checkpoint);
		if (result == CKPT_FAILED) {
			result = ckpt_dump_now(0, &checkpoint);
			event("second %d checkpoint=%llu", result, (unsigned long long)checkpoint);
		}
		finish();
	}
	guest_fail("no such mode: %s", mode);
}
