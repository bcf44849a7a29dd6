// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * state - prints what a process can see of itself that a preloaded library could have changed: open fds,
 * tasks, signal masks and handlers.
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(void)
{
	char path[300], target[300], line[512];
	DIR *fds = opendir("/proc/self/fd");

	for (struct dirent *entry; (entry = readdir(fds));) {
		if (entry->d_name[0] == '.' || atoi(entry->d_name) == dirfd(fds))
			continue;
		snprintf(path, sizeof(path), "/proc/self/fd/%s", entry->d_name);
		ssize_t length = readlink(path, target, sizeof(target) - 1);

		target[length < 0 ? 0 : length] = 0;
		printf("fd %s %s\n", entry->d_name, strncmp(target, "pipe:", 5) ? target : "pipe");
	}
	closedir(fds);
	DIR *tasks = opendir("/proc/self/task");
	int task_count = 0;

	for (struct dirent *entry; (entry = readdir(tasks));)
		task_count += entry->d_name[0] != '.';
	closedir(tasks);
	printf("tasks %d\n", task_count);
	FILE *status = fopen("/proc/self/status", "r");

	/* SigQ counts the queued signals of all processes of this user: what others do must not show. */
	while (fgets(line, sizeof(line), status))
		if (!strncmp(line, "SigQ", 4))
			continue;
		else if (!strncmp(line, "Sig", 3) || !strncmp(line, "Shd", 3) || !strncmp(line, "Threads", 7))
			fputs(line, stdout);
	fclose(status);
	return 0;
}
