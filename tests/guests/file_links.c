// SPDX-License-Identifier: MIT OR Apache-2.0
/* Open files whose name changed: one of two hard links removed, renamed, replaced by another file, its directory moved. */
#include "mem_pattern.h"

static char *in(char *out, const char *name)
{
	guest_path(out, PATH_MAX, name);
	return out;
}

static void check_link(int fd, const char *expected)
{
	char link[64], got[PATH_MAX], path[PATH_MAX];
	ssize_t n;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = MUST(readlink(link, got, sizeof(got) - 1));
	got[n] = 0;
	EXPECT_STR("path of the fd", in(path, expected), got);
}

int main(int argc, char **argv)
{
	char a[PATH_MAX], b[PATH_MAX], text[64];
	int linked, renamed, replaced, moved;
	struct stat st;

	pattern_begin(argc, argv);
	linked = MUST(open(in(a, "link a"), O_RDWR | O_CREAT, 0600));
	EXPECT_EQ("write", 32, write(linked, guest.nonce, 32));
	MUST(link(a, in(b, "link b")));
	MUST(unlink(a));

	renamed = MUST(open(in(a, "old name"), O_RDWR | O_CREAT, 0600));
	EXPECT_EQ("write", 16, write(renamed, guest.nonce, 16));
	MUST(rename(a, in(b, "new name")));

	/* Another file takes the name: the open one has none, and must not be mistaken for it. */
	replaced = MUST(open(in(a, "replaced"), O_RDWR | O_CREAT, 0600));
	EXPECT_EQ("write", 8, write(replaced, guest.nonce, 8));
	int other = MUST(open(in(b, "replacement"), O_RDWR | O_CREAT, 0600));
	EXPECT_EQ("write", 5, write(other, "other", 5));
	close(other);
	MUST(rename(b, a));

	MUST(mkdir(in(a, "dir"), 0700));
	moved = MUST(open(in(a, "dir/file"), O_RDWR | O_CREAT, 0600));
	EXPECT_EQ("write", 4, write(moved, guest.nonce, 4));
	MUST(rename(in(a, "dir"), in(b, "moved dir")));

	guest_ready();
	guest_wait_go();

	MUST(fstat(linked, &st));
	EXPECT_EQ("links", 1, st.st_nlink);
	EXPECT_EQ("pread", 32, pread(linked, text, 64, 0));
	EXPECT_MEM("hard link", guest.nonce, text, 32);
	EXPECT_EQ("pwrite", 1, pwrite(linked, "!", 1, 0));
	int by_name = MUST(open(in(b, "link b"), O_RDONLY));
	EXPECT_EQ("pread", 1, pread(by_name, text, 1, 0));
	EXPECT_MEM("the remaining link is another file", "!", text, 1);

	check_link(renamed, "new name");
	EXPECT_EQ("pread", 16, pread(renamed, text, 64, 0));
	EXPECT_MEM("renamed", guest.nonce, text, 16);

	EXPECT_EQ("pread", 8, pread(replaced, text, 64, 0));
	EXPECT_MEM("replaced", guest.nonce, text, 8);
	int replacement = MUST(open(in(a, "replaced"), O_RDONLY));
	EXPECT_EQ("pread", 5, pread(replacement, text, 64, 0));
	EXPECT_MEM("replacement", "other", text, 5);

	check_link(moved, "moved dir/file");
	EXPECT_EQ("pread", 4, pread(moved, text, 64, 0));
	EXPECT_MEM("moved", guest.nonce, text, 4);
	guest_ok();
}
