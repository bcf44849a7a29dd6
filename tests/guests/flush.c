// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * What a job has written to files is on the disk after `dump --flush`: one file open for writing, one that is only mapped.
 * cachestat(2) tells which pages of a file are not.
 */
#include "guest.h"

#include <sys/vfs.h>

#define FILE_BYTES 65536
#define SYS_CACHESTAT 451
#define TMPFS 0x01021994

struct range {
	uint64_t offset, length;
};

struct counts {
	uint64_t cache, dirty, writeback, evicted, recently_evicted;
};

/* Pages that are not on the disk. */
static uint64_t unwritten(int fd)
{
	struct range all = { 0, 0 };
	struct counts counts;

	if (syscall(SYS_CACHESTAT, fd, &all, &counts, 0)) {
		if (errno == ENOSYS || errno == EPERM || errno == EOPNOTSUPP)
			guest_skip("cachestat(2): %s", strerror(errno));
		guest_fail("cachestat: %s", strerror(errno));
	}
	return counts.dirty + counts.writeback;
}

static int create(const char *name)
{
	char path[PATH_MAX];

	return MUST(open(guest_path(path, sizeof(path), name), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
}

static uint64_t unwritten_of(const char *name)
{
	char path[PATH_MAX];
	int fd = MUST(open(guest_path(path, sizeof(path), name), O_RDONLY | O_CLOEXEC));
	uint64_t pages = unwritten(fd);

	close(fd);
	return pages;
}

int main(int argc, char **argv)
{
	static char bytes[FILE_BYTES];
	struct statfs fs;

	guest_begin(argc, argv);
	int written = create("written"), mapped = create("mapped");
	MUST(fstatfs(written, &fs));
	if (fs.f_type == TMPFS)
		guest_skip("the work directory is on a tmpfs, which has no disk");
	MUST(ftruncate(mapped, FILE_BYTES));
	char *memory = MUST(mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, mapped, 0));
	close(mapped);
	/* The kernel may be writing of its own accord just now. */
	do {
		memset(bytes, 'w', sizeof(bytes));
		EXPECT_EQ("pwrite", FILE_BYTES, pwrite(written, bytes, FILE_BYTES, 0));
		memset(memory, 'm', FILE_BYTES);
	} while (!unwritten(written) || !unwritten_of("mapped"));
	guest_ready();
	guest_wait_go();
	EXPECT_EQ("pages of the written file that are not on the disk", 0, unwritten(written));
	EXPECT_EQ("pages of the mapped file that are not on the disk", 0, unwritten_of("mapped"));
	guest_ok();
}
