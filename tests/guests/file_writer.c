// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A long job that writes its output: a hundred lines before it is ready, fifty more each time the harness creates the
 * file "more" (answered by "wrote"), and a hundred to the end after go. MODE is argv[2]:
 *
 *   append      the output is open with O_APPEND
 *   sequential  it is open without, and written at its end
 *   middle      the position is in the middle of a file of fixed size; "more" overwrites a part of the middle
 *   reader      a file "input" is open for reading only
 *
 * The lines are numbered from the job's memory, so a restore that pairs old memory with new output shows.
 */
#include "mem_pattern.h"

#define BEFORE 100
#define MORE 50
#define END 100

static int line_number;

static void write_lines(int fd, int count)
{
	char line[128];

	for (int i = 0; i < count; i++) {
		int length = snprintf(line, sizeof(line), "line %d %s\n", line_number++, guest.nonce);

		EXPECT_EQ("write", length, write(fd, line, length));
	}
}

static void check_lines(const char *path)
{
	char line[256], expected[256];
	int n = 0;
	FILE *file = fopen(path, "re");

	EXPECT(file);
	while (fgets(line, sizeof(line), file)) {
		snprintf(expected, sizeof(expected), "line %d %s\n", n++, guest.nonce);
		EXPECT_STR("line of the output", expected, line);
	}
	fclose(file);
	EXPECT_EQ("lines of the output", line_number, n);
}

int main(int argc, char **argv)
{
	char path[PATH_MAX], text[64];
	const char *mode = argc > 2 ? argv[2] : "append";
	bool is_lines = !strcmp(mode, "append") || !strcmp(mode, "sequential"), is_reader = !strcmp(mode, "reader");
	int fd;

	pattern_begin(argc, argv);
	guest_path(path, sizeof(path), is_reader ? "input" : "output");
	fd = MUST(open(path, (is_reader ? O_RDONLY : is_lines ? O_WRONLY : O_RDWR) | O_CREAT |
		       (strcmp(mode, "append") ? 0 : O_APPEND), 0644));
	if (is_lines) {
		write_lines(fd, BEFORE);
	} else if (is_reader) {
		EXPECT_EQ("read", 8, read(fd, text, 8));
	} else {
		static char block[8192];

		memset(block, 'a', sizeof(block));
		EXPECT_EQ("write", 8192, write(fd, block, sizeof(block)));
		MUST(lseek(fd, 1000, SEEK_SET));
	}
	guest_ready();
	while (!guest_exists("go")) {
		if (guest_exists("more") && !guest_exists("wrote")) {
			if (is_lines)
				write_lines(fd, MORE);
			else if (!is_reader)
				EXPECT_EQ("pwrite", 6, pwrite(fd, "middle", 6, 500));
			guest_publish("wrote", guest.nonce);
		}
		guest_nap();
	}
	if (is_lines) {
		write_lines(fd, END);
		check_lines(path);
	} else if (is_reader) {
		EXPECT_EQ("position", 8, lseek(fd, 0, SEEK_CUR));
	} else {
		EXPECT_EQ("position", 1000, lseek(fd, 0, SEEK_CUR));
		EXPECT_EQ("write", 3, write(fd, "end", 3));
	}
	guest_ok();
}
