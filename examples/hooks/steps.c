/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A computation that works together with ckpt: it flushes its output before a dump, takes no dump in the midst of a step, asks
 * for one after each tenth, and draws new random numbers when it finds that it is a copy.
 *
 *     cc -I include -o steps examples/hooks/steps.c -pthread        (before glibc 2.34: -ldl)
 *     ckpt run --name steps --dump-on request -- ./steps 100
 *     ckpt restore steps --copies 3
 *
 * With its output in a file (ckpt run ... > out), restore --copies ends with 113: several copies would write to it.
 * Without ckpt it runs as well.
 */
#define _POSIX_C_SOURCE 200809L

#include "ckpt-hooks.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static unsigned int seed = 1;
static volatile int is_copy;

static int on_dump(void *user)
{
	/* Everything that lies in buffers of this process would else be written by each of its copies. */
	fflush(user);
	return 0;
}

static void on_restore(void *user, const struct ckpt_restored *restored)
{
	(void)user;
	is_copy = restored->of_checkpoint > 1;
}

int main(int argc, char **argv)
{
	int steps = argc > 1 ? atoi(argv[1]) : 30;
	struct ckpt_hooks hooks = { sizeof(hooks), stdout, on_dump, NULL, on_restore };
	struct timespec nap = { 0, 20 * 1000 * 1000 };

	if (ckpt_hooks_register(&hooks) == CKPT_NOT_UNDER_CKPT)
		printf("without ckpt\n");
	for (int step = 1; step <= steps; step++) {
		ckpt_critical_begin("step");
		if (is_copy) {
			seed ^= (unsigned int)time(NULL) ^ (unsigned int)getpid();
			is_copy = 0;
			printf("a copy: new random numbers\n");
		}
		seed = seed * 1103515245u + 12345u;
		printf("step %d\n", step);
		ckpt_critical_end();
		if (step % 10 == 0) {
			uint64_t checkpoint = 0;

			switch (ckpt_dump_now(60000, &checkpoint)) {
			case CKPT_DUMPED:
				printf("dumped: checkpoint %llu\n", (unsigned long long)checkpoint);
				break;
			case CKPT_RESTORED:
				printf("restored from checkpoint %llu\n", (unsigned long long)checkpoint);
				break;
			case CKPT_NOBODY:
				printf("nobody makes dumps: ckpt run --dump-on request\n");
				break;
			default:
				break;
			}
		}
		nanosleep(&nap, NULL);
	}
	printf("done\n");
	return 0;
}
