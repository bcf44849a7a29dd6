// SPDX-License-Identifier: MIT OR Apache-2.0
/* Deleted files that are still open: small, 10 MiB, sparse, empty, opened twice, O_TMPFILE; with content and size. */
#include "mem_pattern.h"

#define BIG_BYTES ((size_t)10 << 20)
#define SPARSE_BYTES ((off_t)1 << 30)

static int make(const char *name, int flags)
{
	char path[PATH_MAX];

	return MUST(open(guest_path(path, sizeof(path), name), O_CREAT | O_EXCL | flags, 0640));
}

static void drop(const char *name)
{
	char path[PATH_MAX];

	MUST(unlink(guest_path(path, sizeof(path), name)));
}

int main(int argc, char **argv)
{
	char path[PATH_MAX], small_text[64], *big_content;
	int small, big, sparse, empty, twice, again, readonly, nameless;
	struct stat st;

	pattern_begin(argc, argv);
	small = make("small", O_RDWR | O_APPEND);
	EXPECT_EQ("write", 32, write(small, guest.nonce, 32));
	big = make("big", O_RDWR | O_NOFOLLOW);
	big_content = malloc(BIG_BYTES);
	EXPECT(big_content);
	pattern_fill(big_content, BIG_BYTES, guest_seed);
	EXPECT_EQ("write", (ssize_t)BIG_BYTES, write(big, big_content, BIG_BYTES));
	MUST(lseek(big, 12345, SEEK_SET));
	sparse = make("sparse", O_RDWR);
	MUST(ftruncate(sparse, SPARSE_BYTES));
	EXPECT_EQ("pwrite", 32, pwrite(sparse, guest.nonce, 32, SPARSE_BYTES / 2));
	empty = make("empty", O_WRONLY | O_CLOEXEC);
	twice = make("twice", O_RDWR);
	EXPECT_EQ("write", 32, write(twice, guest.nonce, 32));
	again = MUST(open(guest_path(path, sizeof(path), "twice"), O_RDWR));
	readonly = MUST(open(path, O_RDONLY));
	MUST(lseek(again, 3, SEEK_SET));
	MUST(lseek(readonly, 5, SEEK_SET));
	drop("small");
	drop("big");
	drop("sparse");
	drop("empty");
	drop("twice");
	/* ENOTSUP: this file system has no O_TMPFILE. */
	nameless = open(guest.workdir, O_TMPFILE | O_RDWR, 0600);
	EXPECT(nameless >= 0 || errno == EOPNOTSUPP);
	if (nameless >= 0)
		EXPECT_EQ("write", 32, write(nameless, guest.nonce, 32));
	memset(big_content, 0, BIG_BYTES);

	guest_ready();
	guest_wait_go();

	EXPECT_EQ("pread of small", 32, pread(small, small_text, 64, 0));
	EXPECT_MEM("small", guest.nonce, small_text, 32);
	EXPECT_EQ("append to small", 3, write(small, "end", 3));
	MUST(fstat(small, &st));
	EXPECT_EQ("size of small", 35, st.st_size);
	EXPECT_EQ("mode of small", S_IFREG | 0640, st.st_mode);
	EXPECT_EQ("links of small", 0, st.st_nlink);
	EXPECT_EQ("position in big", 12345, lseek(big, 0, SEEK_CUR));
	EXPECT_EQ("pread of big", (ssize_t)BIG_BYTES, pread(big, big_content, BIG_BYTES, 0));
	CHECK_PATTERN("big", big_content, BIG_BYTES, guest_seed);
	MUST(fstat(sparse, &st));
	EXPECT_EQ("size of sparse", SPARSE_BYTES, st.st_size);
	GUEST_CHECK(st.st_blocks < 65536, "the sparse file is no longer sparse: %ld blocks", (long)st.st_blocks);
	EXPECT_EQ("pread of sparse", 32, pread(sparse, small_text, 32, SPARSE_BYTES / 2));
	EXPECT_MEM("sparse", guest.nonce, small_text, 32);
	EXPECT_EQ("pread of the hole", 32, pread(sparse, small_text, 32, SPARSE_BYTES / 4));
	CHECK_ZERO("hole", small_text, 32);
	EXPECT_EQ("write to empty", 1, write(empty, "x", 1));
	MUST(fstat(empty, &st));
	EXPECT_EQ("size of empty", 1, st.st_size);
	EXPECT_EQ("position of the second fd", 3, lseek(again, 0, SEEK_CUR));
	EXPECT_EQ("position of the third fd", 5, lseek(readonly, 0, SEEK_CUR));
	EXPECT_EQ("pwrite to the first", 4, pwrite(twice, "seen", 4, 100));
	EXPECT_EQ("pread through the third", 4, pread(readonly, small_text, 4, 100));
	EXPECT_MEM("the three fds are one file", "seen", small_text, 4);
	EXPECT_EQ("write to the read-only fd", -1, write(readonly, "x", 1));
	if (nameless >= 0) {
		EXPECT_EQ("pread of O_TMPFILE", 32, pread(nameless, small_text, 64, 0));
		EXPECT_MEM("O_TMPFILE", guest.nonce, small_text, 32);
	}
	EXPECT(!guest_exists("small") && !guest_exists("big") && !guest_exists("sparse") && !guest_exists("twice"));
	guest_ok();
}
