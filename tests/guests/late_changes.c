// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Changes its state at a moment of the harness's choice (when the file "change" appears; it then makes "changed"): the
 * flags of mappings whose line in /proc/self/maps stays the same, pages, a mapping, descriptors and a signal action. All of it
 * must be as it was changed. With the argument "wipe" one of the flags is that a fork does not keep the memory; with
 * "large" each mapping is.
 */
#include "mem_pattern.h"

#include <sys/mman.h>

static size_t area_bytes = (size_t)1 << 20;

static volatile sig_atomic_t handled;

static void handler(int signal)
{
	(void)signal;
	handled = 1;
}

static bool has_flag(const char *p, const char *flag)
{
	unsigned long start, end;
	char line[512], needle[8];
	bool found = false, has = false;
	FILE *smaps = fopen("/proc/self/smaps", "re");

	GUEST_CHECK(smaps, "open /proc/self/smaps: %s", strerror(errno));
	snprintf(needle, sizeof(needle), " %s ", flag);
	while (fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			found = (unsigned long)p >= start && (unsigned long)p < end;
		if (found && strncmp(line, "VmFlags:", 8) == 0)
			has = strstr(line, needle);
	}
	fclose(smaps);
	return has;
}

static char *area(void)
{
	/* Guard pages, so that no two of them merge. */
	char *p = mmap(NULL, area_bytes + 2 * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	GUEST_CHECK(mprotect(p + PAGE_BYTES, area_bytes, PROT_READ | PROT_WRITE) == 0, "mprotect: %s",
		    strerror(errno));
	return p + PAGE_BYTES;
}

int main(int argc, char **argv)
{
	bool wipe = argc > 2 && strcmp(argv[2], "wipe") == 0;
	char *undumped, *gains, *loses, *wiped, *rewritten, *later;
	struct sigaction action = { .sa_handler = handler }, now;
	char path[PATH_MAX];
	int first, second;

	pattern_begin(argc, argv);
	if (argc > 2 && strcmp(argv[2], "large") == 0)
		area_bytes = (size_t)24 << 20;
	undumped = area();
	gains = area();
	loses = area();
	wiped = area();
	rewritten = area();
	pattern_fill(gains, area_bytes, guest_seed);
	pattern_fill(loses, area_bytes, guest_seed + 1);
	pattern_fill(wiped, area_bytes, guest_seed + 2);
	pattern_fill(undumped, area_bytes, guest_seed + 3);
	pattern_fill(rewritten, area_bytes, guest_seed + 5);
	GUEST_CHECK(madvise(loses, area_bytes, MADV_RANDOM) == 0, "MADV_RANDOM: %s", strerror(errno));
	first = open(guest_path(path, sizeof(path), "kept"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	GUEST_CHECK(first >= 0, "open: %s", strerror(errno));
	guest_ready();

	while (!guest_exists("change"))
		guest_nap();
	GUEST_CHECK(madvise(gains, area_bytes, MADV_SEQUENTIAL) == 0, "MADV_SEQUENTIAL: %s", strerror(errno));
	GUEST_CHECK(madvise(undumped, area_bytes, MADV_DONTDUMP) == 0, "MADV_DONTDUMP: %s", strerror(errno));
	GUEST_CHECK(madvise(loses, area_bytes, MADV_NORMAL) == 0, "MADV_NORMAL: %s", strerror(errno));
	if (wipe)
		GUEST_CHECK(madvise(wiped, area_bytes, MADV_WIPEONFORK) == 0, "MADV_WIPEONFORK: %s",
			    strerror(errno));
	pattern_fill(rewritten, area_bytes, guest_seed + 6);
	later = area();
	pattern_fill(later, area_bytes, guest_seed + 4);
	GUEST_CHECK(madvise(later, area_bytes, MADV_RANDOM) == 0, "MADV_RANDOM: %s", strerror(errno));
	GUEST_CHECK(write(first, "abcdef", 6) == 6, "write: %s", strerror(errno));
	GUEST_CHECK(fcntl(first, F_SETFL, O_APPEND) == 0, "F_SETFL: %s", strerror(errno));
	GUEST_CHECK(fcntl(first, F_SETFD, 0) == 0, "F_SETFD: %s", strerror(errno));
	second = dup(first);
	GUEST_CHECK(second >= 0, "dup: %s", strerror(errno));
	GUEST_CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction: %s", strerror(errno));
	guest_publish("changed", "");
	guest_wait_go();

	GUEST_CHECK(has_flag(gains, "sr") && has_flag(undumped, "dd") && has_flag(later, "rr"),
		    "advice given before the dump is lost");
	GUEST_CHECK(!has_flag(loses, "rr") && !has_flag(loses, "sr"), "advice that was taken back is there");
	GUEST_CHECK(has_flag(wiped, "wf") == wipe, "MADV_WIPEONFORK is %d", !wipe);
	CHECK_PATTERN("gains", gains, area_bytes, guest_seed);
	CHECK_PATTERN("loses", loses, area_bytes, guest_seed + 1);
	CHECK_PATTERN("wiped", wiped, area_bytes, guest_seed + 2);
	CHECK_PATTERN("undumped", undumped, area_bytes, guest_seed + 3);
	CHECK_PATTERN("rewritten", rewritten, area_bytes, guest_seed + 6);
	CHECK_PATTERN("later", later, area_bytes, guest_seed + 4);
	GUEST_CHECK(fcntl(first, F_GETFL) & O_APPEND, "O_APPEND is lost");
	GUEST_CHECK(fcntl(first, F_GETFD) == 0, "FD_CLOEXEC is set");
	GUEST_CHECK(lseek(second, 2, SEEK_SET) == 2 && lseek(first, 0, SEEK_CUR) == 2,
		    "the second descriptor is not a duplicate");
	GUEST_CHECK(sigaction(SIGUSR2, NULL, &now) == 0 && now.sa_handler == handler, "the handler is lost");
	raise(SIGUSR2);
	GUEST_CHECK(handled, "the handler was not called");
	guest_ok();
}
