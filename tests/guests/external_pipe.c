// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Standard input and output from outside the job: bound anew at the restore to what the restoring command has. Answers
 * each line of its input with the nonce, to the end of the input.
 */
#include "mem_pattern.h"

int main(int argc, char **argv)
{
	char line[256];

	pattern_begin(argc, argv);
	guest_ready();
	guest_wait_go();
	EXPECT_EQ("FD_CLOEXEC of standard output", 0, fcntl(1, F_GETFD));
	/* Unbuffered: libc holds no input of before the dump. */
	setvbuf(stdin, NULL, _IONBF, 0);
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\n")] = 0;
		GUEST_CHECK(printf("%s %s\n", line, guest.nonce) > 0 && fflush(stdout) == 0, "cannot write to the output: %s",
			    strerror(errno));
	}
	GUEST_CHECK(!ferror(stdin), "cannot read the input: %s", strerror(errno));
	guest_ok();
}
