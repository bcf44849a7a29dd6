// SPDX-License-Identifier: MIT OR Apache-2.0
/* An open directory in the middle of readdir: every entry comes exactly once, and openat through it works. */
#include "mem_pattern.h"

#include <dirent.h>

#define ENTRIES 300

static void take(DIR *dir, unsigned char *seen, int entries)
{
	struct dirent *entry;

	while (entries != 0 && (entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		seen[atoi(entry->d_name)]++;
		entries--;
	}
}

int main(int argc, char **argv)
{
	unsigned char seen[ENTRIES] = { 0 };
	char path[PATH_MAX], name[PATH_MAX + 32];
	struct linux_dirent64 {
		uint64_t ino;
		int64_t off;
		unsigned short reclen;
		unsigned char type;
		char name[];
	} *entry;
	char buffer[1024];
	int raw, plain, raw_entries = 0;
	long got;
	DIR *dir;

	pattern_begin(argc, argv);
	guest_path(path, sizeof(path), "directory");
	MUST(mkdir(path, 0700));
	for (int i = 0; i < ENTRIES; i++) {
		snprintf(name, sizeof(name), "%s/%d", path, i);
		close(MUST(open(name, O_CREAT | O_WRONLY, 0600)));
	}
	dir = opendir(path);
	EXPECT(dir);
	take(dir, seen, 100);
	/* The kernel's own position, without libc's buffer. */
	raw = MUST(open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	got = MUST(syscall(SYS_getdents64, raw, buffer, sizeof(buffer)));
	for (long at = 0; at < got; at += entry->reclen, raw_entries++)
		entry = (void *)(buffer + at);
	plain = MUST(open(path, O_RDONLY | O_DIRECTORY));

	guest_ready();
	guest_wait_go();

	take(dir, seen, -1);
	for (int i = 0; i < ENTRIES; i++)
		GUEST_CHECK(seen[i] == 1, "entry %d: expected once, got %d times", i, seen[i]);
	while ((got = MUST(syscall(SYS_getdents64, raw, buffer, sizeof(buffer)))) > 0)
		for (long at = 0; at < got; at += entry->reclen, raw_entries++)
			entry = (void *)(buffer + at);
	EXPECT_EQ("entries by getdents64, with . and ..", ENTRIES + 2, raw_entries);
	close(MUST(openat(plain, "new", O_CREAT | O_WRONLY | O_EXCL, 0600)));
	snprintf(name, sizeof(name), "%s/new", path);
	MUST(access(name, F_OK));
	EXPECT_EQ("FD_CLOEXEC", FD_CLOEXEC, fcntl(raw, F_GETFD));
	guest_ok();
}
