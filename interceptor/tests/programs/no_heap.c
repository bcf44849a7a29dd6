// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * no_heap - exits with 0 if nothing has allocated before main: the program break is where the kernel put
 * it.
 */
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

int main(void)
{
	static char maps[65536];
	int fd = open("/proc/self/maps", O_RDONLY);
	size_t length = 0;

	for (ssize_t got; (got = read(fd, maps + length, sizeof(maps) - 1 - length)) > 0;)
		length += (size_t)got;
	maps[length] = 0;
	if (length == 0)
		return 2;
	return strstr(maps, "[heap]") ? 1 : 0;
}
