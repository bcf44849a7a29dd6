// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * What a process is called and was given at its start: comm, cmdline, environ, auxv, exe, the bounds of these areas, also
 * after prctl(PR_SET_NAME) and an overwritten argv. A child has another name and another cmdline.
 */
#include "guest.h"
#include <elf.h>
#include <sys/auxv.h>

static const char *const files[] = { "cmdline", "environ", "auxv", "comm" };
enum { FILES = sizeof(files) / sizeof(*files), AREA = 16384 };

struct names {
	size_t lengths[FILES];
	char contents[FILES][AREA];
	char exe[PATH_MAX];
	/* Fields 26-28 and 45-51 of /proc/self/stat: where code, stack, data, brk, arguments and environment lie. */
	char bounds[10][24];
};

static void look(struct names *names)
{
	char path[64], stat[2048];

	memset(names, 0, sizeof(*names));
	for (int i = 0; i < FILES; i++) {
		snprintf(path, sizeof(path), "/proc/self/%s", files[i]);
		names->lengths[i] = guest_read_file(path, names->contents[i], AREA);
	}
	MUST(readlink("/proc/self/exe", names->exe, sizeof(names->exe) - 1));
	guest_read_file("/proc/self/stat", stat, sizeof(stat));
	int field = 3, kept = 0;
	for (char *word = strtok(strrchr(stat, ')') + 1, " \n"); word; word = strtok(NULL, " \n"), field++)
		if ((field >= 26 && field <= 28) || (field >= 45 && field <= 51))
			snprintf(names->bounds[kept++], sizeof(names->bounds[0]), "%s", word);
	EXPECT_EQ("bounds", 10, kept);
}

static void compare(const struct names *before)
{
	static struct names now;

	look(&now);
	for (int i = 0; i < FILES; i++) {
		EXPECT_EQ(files[i], before->lengths[i], now.lengths[i]);
		EXPECT_MEM(files[i], before->contents[i], now.contents[i], now.lengths[i]);
	}
	EXPECT_STR("exe", before->exe, now.exe);
	for (int i = 0; i < 10; i++)
		EXPECT_STR("a bound of an area", before->bounds[i], now.bounds[i]);
}

int main(int argc, char **argv)
{
	static struct names before;
	int channel[2];
	char byte, name[32];

	guest_begin(argc, argv);
	EXPECT(getauxval(AT_EXECFN));
	MUST(pipe(channel));
	pid_t child = MUST(fork());
	if (child) {
		/* Wider than the 15 characters that fit, so it is cut. */
		MUST(prctl(PR_SET_NAME, "first-of-all-names"));
	} else {
		MUST(prctl(PR_SET_NAME, "the (child) %s"));
		/* As daemons do to tell what they are at. */
		memset(argv[0], 'T', strlen(argv[0]));
		memcpy(argv[0], "title: ", 7);
		MUST(setenv("LATER", "not in the area", 1));
	}
	look(&before);
	if (child) {
		EXPECT_EQ("word of the child", 1, read(channel[0], &byte, 1));
		close(channel[0]);
		close(channel[1]);
		guest_ready();
	} else {
		MUST(write(channel[1], "x", 1));
		close(channel[0]);
		close(channel[1]);
	}
	guest_wait_go();

	compare(&before);
	MUST(prctl(PR_GET_NAME, name));
	EXPECT_STR("name", child ? "first-of-all-na" : "the (child) %s", name);
	if (!child)
		_exit(0);
	EXPECT_EQ("the child's verdict", 0, guest_reap(child));
	guest_ok();
}
