// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A thread executes this program again and again, and takes over the id of the main thread by that, at any moment of a dump.
 * The last one, which finds the file "go", is well if it has counted on.
 *
 * thread_exec WORKDIR [NONCE ROUND]
 */
#include "guest.h"

#include <pthread.h>

static char **arguments;
static unsigned long executed;

static void *thread_main(void *unused)
{
	struct timespec nap = { 0, 100000 };
	char number[32];
	char *next[] = { arguments[0], arguments[1], guest.nonce, number, NULL };

	nanosleep(&nap, NULL);
	snprintf(number, sizeof(number), "%lu", executed + 1);
	execv("/proc/self/exe", next);
	guest_fail("execv: %s", strerror(errno));
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t thread;

	arguments = argv;
	if (argc < 4) {
		guest_begin(argc, argv);
	} else {
		snprintf(guest.workdir, sizeof(guest.workdir), "%s", argv[1]);
		snprintf(guest.nonce, sizeof(guest.nonce), "%s", argv[2]);
		executed = strtoul(argv[3], NULL, 10);
	}
	if (executed == 1)
		guest_ready();
	if (executed > 1 && guest_exists("go"))
		guest_ok();
	MUST0(pthread_create(&thread, NULL, thread_main, NULL));
	for (;;)
		pause();
}
