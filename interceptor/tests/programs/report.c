// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * report - prints what it was started with, one item a line, for the test to compare: its arguments, its
 * environment, and whether the interceptor is mapped.
 */
#include <stdio.h>
#include <string.h>

extern char **environ;

int main(int argc, char **argv)
{
	char line[8192];
	int mapped = 0;
	FILE *maps = fopen("/proc/self/maps", "r");

	if (!maps)
		return 3;
	while (fgets(line, sizeof(line), maps))
		if (strstr(line, "libckpt_interceptor.so"))
			mapped = 1;
	fclose(maps);
	for (int i = 0; i < argc; i++)
		printf("arg %s\n", argv[i]);
	for (char **variable = environ; *variable; variable++)
		printf("env %s\n", *variable);
	printf("mapped %d\n", mapped);
	return 0;
}
