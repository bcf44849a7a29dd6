// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * All resource limits, soft and hard, each with values of its own; and that they still bind.
 *
 * limits WORKDIR as|data: all but a page of the memory that one limit allows is in use, until somebody raises it.
 */
#include "guest.h"
#include <sys/resource.h>

static const char *const names[RLIM_NLIMITS] = {
	"CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE",
	"MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME",
};

__attribute__((noreturn)) static void use_up(const char *name)
{
	int which = strcmp(name, "as") ? RLIMIT_DATA : RLIMIT_AS;
	const char *field = which == RLIMIT_AS ? "VmSize" : "VmData";
	char kib[32], line[64];
	struct rlimit before, now;

	/* What makes a thread, a buffer or a file of C's library comes before. */
	guest_field("/proc/self/status", field, kib, sizeof(kib));
	MUST(getrlimit(which, &before));
	before.rlim_cur = (strtoull(kib, NULL, 10) << 10) + 4096;
	MUST(setrlimit(which, &before));
	snprintf(line, sizeof(line), "no more than a page is left of %s", field);
	EXPECT_EQ(line, MAP_FAILED,
		  mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	guest_ready();
	guest_wait_go();
	MUST(getrlimit(which, &now));
	EXPECT(now.rlim_cur > before.rlim_cur && now.rlim_cur < before.rlim_cur + (1 << 20));
	EXPECT_EQ("hard limit", before.rlim_max, now.rlim_max);
	guest_ok();
}

int main(int argc, char **argv)
{
	struct rlimit before[RLIM_NLIMITS], child_before[2], now;
	int channel[2];

	guest_begin(argc, argv);
	if (argc > 2)
		use_up(argv[2]);
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		MUST(getrlimit(i, &before[i]));
		struct rlimit *limit = &before[i];
		/* Room enough to go on with, and never above what an unprivileged process may ask for. */
		rlim_t hard = i == RLIMIT_NOFILE ? 1500 : i == RLIMIT_NICE || i == RLIMIT_RTPRIO ? 0 :
				i == RLIMIT_NPROC ? 90000 : ((rlim_t)1 << 40) + 4096 * i;
		if (limit->rlim_max > hard)
			limit->rlim_max = hard;
		rlim_t soft = limit->rlim_max - limit->rlim_max / 8;
		if (i != RLIMIT_STACK && limit->rlim_cur > soft)
			limit->rlim_cur = soft;
		if (i == RLIMIT_NOFILE)
			limit->rlim_cur = 64;
		MUST(setrlimit(i, limit));
	}
	MUST(pipe(channel));
	pid_t child = MUST(fork());
	if (!child) {
		/* Limits belong to each process. */
		struct rlimit core = { 0, 0 }, open_files = { 32, 48 };

		MUST(setrlimit(RLIMIT_CORE, &core));
		MUST(setrlimit(RLIMIT_NOFILE, &open_files));
		MUST(write(channel[1], "x", 1));
		guest_wait_go();
		MUST(getrlimit(RLIMIT_CORE, &child_before[0]));
		MUST(getrlimit(RLIMIT_NOFILE, &child_before[1]));
		EXPECT_EQ("the child's hard CORE", 0, child_before[0].rlim_max);
		EXPECT_EQ("the child's soft NOFILE", 32, child_before[1].rlim_cur);
		EXPECT_EQ("the child's hard NOFILE", 48, child_before[1].rlim_max);
		_exit(0);
	}
	char byte;
	EXPECT_EQ("word of the child", 1, read(channel[0], &byte, 1));
	close(channel[0]);
	close(channel[1]);
	guest_ready();
	guest_wait_go();

	for (int i = 0; i < RLIM_NLIMITS; i++) {
		char what[64];

		MUST(getrlimit(i, &now));
		snprintf(what, sizeof(what), "soft limit %s", names[i]);
		EXPECT_EQ(what, before[i].rlim_cur, now.rlim_cur);
		snprintf(what, sizeof(what), "hard limit %s", names[i]);
		EXPECT_EQ(what, before[i].rlim_max, now.rlim_max);
	}
	/* It binds: no descriptor at 64 or above. */
	EXPECT_EQ("dup2 above the limit", -1, dup2(1, 64));
	EXPECT_EQ("errno", EBADF, errno);
	EXPECT_EQ("dup2 below the limit", 63, dup2(1, 63));
	EXPECT_EQ("the child's verdict", 0, guest_reap(child));
	guest_ok();
}
