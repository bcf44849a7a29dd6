// SPDX-License-Identifier: MIT OR Apache-2.0
/* The job's terminal: settings, window size, foreground process group, controlling terminal, session, unread input. */
#include "mem_pattern.h"

#include <sys/ioctl.h>
#include <termios.h>

int main(int argc, char **argv)
{
	struct winsize size = { .ws_row = 37, .ws_col = 91 }, size_got;
	struct termios settings, got;
	int controlling, duplicate;
	pid_t child, foreground, session;
	char name[PATH_MAX], name_got[PATH_MAX];

	pattern_begin(argc, argv);
	if (!isatty(0))
		guest_skip("standard input is no terminal");
	EXPECT_EQ("ttyname_r", 0, ttyname_r(0, name, sizeof(name)));
	controlling = MUST(open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY));
	duplicate = MUST(open(name, O_RDWR | O_NOCTTY | O_NONBLOCK));
	MUST(tcgetattr(0, &settings));
	settings.c_lflag &= ~(ICANON | ECHO);
	settings.c_cc[VINTR] = 0x07;
	settings.c_cc[VMIN] = 3;
	settings.c_cc[VTIME] = 9;
	settings.c_iflag ^= IXON | INLCR;
	MUST(tcsetattr(0, TCSANOW, &settings));
	MUST(tcgetattr(0, &settings));
	MUST(ioctl(0, TIOCSWINSZ, &size));
	session = MUST(getsid(0));
	EXPECT_EQ("session of the terminal", session, tcgetsid(0));

	/* A foreground group that is not the leader's, as a shell makes it. */
	signal(SIGTTOU, SIG_IGN);
	child = MUST(fork());
	if (child == 0) {
		signal(SIGTTOU, SIG_DFL);
		for (;;)
			pause();
	}
	MUST(setpgid(child, child));
	MUST(tcsetpgrp(0, child));
	foreground = MUST(tcgetpgrp(0));
	EXPECT_EQ("foreground group", child, foreground);

	guest_ready();
	guest_wait_go();

	MUST(tcgetattr(0, &got));
	EXPECT_EQ("c_iflag", settings.c_iflag, got.c_iflag);
	EXPECT_EQ("c_oflag", settings.c_oflag, got.c_oflag);
	EXPECT_EQ("c_cflag", settings.c_cflag, got.c_cflag);
	EXPECT_EQ("c_lflag", settings.c_lflag, got.c_lflag);
	EXPECT_MEM("c_cc", settings.c_cc, got.c_cc, NCCS);
	MUST(ioctl(0, TIOCGWINSZ, &size_got));
	EXPECT_EQ("rows", 37, size_got.ws_row);
	/* The terminal survives execve(2), what was opened for that does not. */
	for (int fd = 0; fd < 3; fd++)
		EXPECT_EQ("FD_CLOEXEC of a standard descriptor", 0, fcntl(fd, F_GETFD));
	EXPECT_EQ("FD_CLOEXEC of /dev/tty", FD_CLOEXEC, fcntl(controlling, F_GETFD));
	EXPECT_EQ("columns", 91, size_got.ws_col);
	EXPECT_EQ("foreground group", foreground, tcgetpgrp(0));
	EXPECT_EQ("foreground group by /dev/tty", foreground, tcgetpgrp(controlling));
	EXPECT_EQ("session of the terminal", session, tcgetsid(duplicate));
	EXPECT_EQ("ttyname_r", 0, ttyname_r(0, name_got, sizeof(name_got)));
	EXPECT_STR("name of the terminal", name, name_got);
	EXPECT_EQ("flags", O_RDWR | O_NONBLOCK, fcntl(duplicate, F_GETFL) & (O_ACCMODE | O_NONBLOCK));
	EXPECT_EQ("FD_CLOEXEC", FD_CLOEXEC, fcntl(controlling, F_GETFD));
	int again = MUST(open("/dev/tty", O_RDWR));

	MUST(tcsetpgrp(again, getpgrp()));
	EXPECT_EQ("output", 6, write(1, "alive\n", 6));
	MUST(kill(child, SIGKILL));
	guest_reap(child);
	guest_ok();
}
