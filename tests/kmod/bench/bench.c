// SPDX-License-Identifier: MIT OR Apache-2.0
// What a snapshot costs beside what user space has for the same work, in one boot and in one process: medians of rounds in
// which all take their turn, after every page has been written. Words: ROUNDS and MEBIBYTES. Prints a table and, on a line
// that begins with "json: ", the same as JSON.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ckpt.h"

#define PAGE 4096UL
#define HUGE (2UL << 20)
#define MAX_ROUNDS 101
#define CHUNK (1UL << 20)
// Pages that another processor's list of pages to activate still holds look like I/O in flight. They are few.
#define MAX_COPY 64

static void require(int ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "%s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static char *memory;
static size_t bytes;
static char *buffer;
static int huge;
static int session;
static uint64_t generation;

static char *map(size_t size, int advice)
{
	char *all = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *aligned = (char *)(((uintptr_t)all + HUGE - 1) & ~(HUGE - 1));

	require(all != MAP_FAILED, "mmap");
	require(madvise(aligned, size, advice) == 0, "madvise");
	return aligned;
}

// Every page written, so that each measurement begins with pages that are the process's alone. What a snapshot or a fork
// has made small pages of becomes huge again by new memory.
static void prepare(void)
{
	if (huge)
		require(madvise(memory, bytes, MADV_DONTNEED) == 0, "MADV_DONTNEED");
	// Without reading first, which would map the huge page of zeros, and make small pages of it.
	for (size_t i = 0; i < bytes; i += PAGE)
		memory[i] = 1;
}

static struct ckpt_snapshot_args snapshot(uint32_t flags)
{
	struct ckpt_snapshot_args args = { .size = sizeof(args), .flags = flags };

	if (flags & CKPT_SNAPSHOT_INCREMENTAL)
		args.generation = generation;
	require(ioctl(session, CKPT_IOC_SNAPSHOT, &args) == 0, "CKPT_IOC_SNAPSHOT");
	if (flags & CKPT_SNAPSHOT_CLEAR)
		generation = args.generation;
	return args;
}

static uint64_t measure_snapshot(void)
{
	uint64_t start = now_ns(), took;
	struct ckpt_snapshot_args args = snapshot(0);

	took = now_ns() - start;
	require(args.pages_data + args.pages_copy >= bytes / PAGE && args.pages_copy <= MAX_COPY, "pages are missing");
	close(args.fd);
	return took;
}

static uint64_t measure_fork(void)
{
	uint64_t start = now_ns(), took;
	pid_t pid = fork();

	if (pid == 0)
		_exit(0);
	took = now_ns() - start;
	require(pid > 0 && waitpid(pid, NULL, 0) == pid, "fork");
	return took;
}

static uint64_t measure_process_vm_readv(void)
{
	uint64_t start = now_ns();

	for (size_t done = 0; done < bytes; done += CHUNK) {
		struct iovec to = { buffer, CHUNK }, from = { memory + done, CHUNK };

		require(process_vm_readv(getpid(), &to, 1, &from, 1, 0) == (ssize_t)CHUNK, "process_vm_readv");
	}
	return now_ns() - start;
}

static uint64_t measure_proc_mem(void)
{
	int fd = open("/proc/self/mem", O_RDONLY);
	uint64_t start = now_ns(), took;

	require(fd >= 0, "/proc/self/mem");
	for (size_t done = 0; done < bytes; done += CHUNK)
		require(pread(fd, buffer, CHUNK, (off_t)(memory + done)) == (ssize_t)CHUNK, "/proc/self/mem");
	took = now_ns() - start;
	close(fd);
	return took;
}

static int out_file(void)
{
	int fd = open("/tmp/out", O_RDWR | O_CREAT | O_TRUNC, 0600);

	require(fd >= 0 && unlink("/tmp/out") == 0, "/tmp/out");
	return fd;
}

static uint64_t measure_read_write(void)
{
	struct ckpt_snapshot_args args = snapshot(0);
	int out = out_file();
	uint64_t start = now_ns(), took;

	for (size_t done = 0; done < bytes;) {
		size_t part = bytes - done < CHUNK ? bytes - done : CHUNK;
		ssize_t got = pread(args.fd, buffer, part, (off_t)(memory + done));

		if (got < 0 && errno == ENXIO) {
			done += PAGE;
			continue;
		}
		require(got > 0, "pread");
		require(write(out, buffer, (size_t)got) == got, "write");
		done += (size_t)got;
	}
	took = now_ns() - start;
	close(out);
	close(args.fd);
	return took;
}

static uint64_t measure_splice(void)
{
	struct ckpt_snapshot_args args = snapshot(0);
	int out = out_file(), pipes[2];
	off_t from = (off_t)memory;
	uint64_t start, took;

	require(pipe(pipes) == 0 && fcntl(pipes[1], F_SETPIPE_SZ, CHUNK) == (int)CHUNK, "pipe");
	start = now_ns();
	for (size_t done = 0; done < bytes;) {
		size_t part = bytes - done < CHUNK ? bytes - done : CHUNK;
		ssize_t got = splice(args.fd, &from, pipes[1], NULL, part, 0);

		if (got < 0 && errno == ENXIO) {
			from += (off_t)PAGE;
			done += PAGE;
			continue;
		}
		require(got > 0, "splice from the snapshot");
		for (ssize_t left = got; left > 0;) {
			ssize_t put = splice(pipes[0], NULL, out, NULL, (size_t)left, SPLICE_F_MOVE);

			require(put > 0, "splice to the file");
			left -= put;
		}
		done += (size_t)got;
	}
	took = now_ns() - start;
	close(pipes[0]);
	close(pipes[1]);
	close(out);
	close(args.fd);
	return took;
}

// One page of a hundred, of whichever size.
static void dirty_one_percent(void)
{
	for (size_t i = 0; i < bytes; i += 100 * (huge ? HUGE : PAGE))
		memory[i]++;
}

static uint64_t measure_incremental(void)
{
	uint64_t start, took;
	struct ckpt_snapshot_args args = snapshot(CKPT_SNAPSHOT_CLEAR);

	close(args.fd);
	dirty_one_percent();
	start = now_ns();
	args = snapshot(CKPT_SNAPSHOT_INCREMENTAL | CKPT_SNAPSHOT_CLEAR);
	took = now_ns() - start;
	require(args.pages_same >= bytes / PAGE / 100 * 95, "too few pages are the same");
	close(args.fd);
	return took;
}

// Everything again, and the bits cleared.
static uint64_t measure_full_and_clear(void)
{
	uint64_t start, took;
	struct ckpt_snapshot_args args = snapshot(CKPT_SNAPSHOT_CLEAR);

	close(args.fd);
	dirty_one_percent();
	start = now_ns();
	args = snapshot(CKPT_SNAPSHOT_CLEAR);
	took = now_ns() - start;
	close(args.fd);
	return took;
}

// What user space does to find the same pages.
static uint64_t measure_pagemap_and_clear_refs(void)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY), clear = open("/proc/self/clear_refs", O_WRONLY);
	size_t size = bytes / PAGE * 8, dirty = 0;
	uint64_t start, took;

	require(pagemap >= 0 && clear >= 0, "/proc/self/pagemap");
	require(write(clear, "4", 1) == 1, "/proc/self/clear_refs");
	dirty_one_percent();
	start = now_ns();
	for (size_t done = 0; done < size; done += CHUNK) {
		size_t part = size - done < CHUNK ? size - done : CHUNK;

		require(pread(pagemap, buffer, part, (off_t)((uintptr_t)memory / PAGE * 8 + done)) == (ssize_t)part,
			"/proc/self/pagemap");
		for (size_t i = 0; i < part / 8; i++)
			dirty += ((uint64_t *)buffer)[i] >> 55 & 1;
	}
	require(write(clear, "4", 1) == 1, "/proc/self/clear_refs");
	took = now_ns() - start;
	require(dirty > 0, "dirty pages are missing");
	close(pagemap);
	close(clear);
	return took;
}

struct measurement {
	const char *name;
	uint64_t (*run)(void);
	uint64_t samples[2][MAX_ROUNDS];
	double median_ms[2];
};

enum {
	SNAPSHOT,
	FORK,
	READV,
	PROC_MEM,
	READ_WRITE,
	SPLICE,
	INCREMENTAL,
	FULL_CLEAR,
	PAGEMAP,
	MEASUREMENTS,
};

static struct measurement measurements[MEASUREMENTS] = {
	[SNAPSHOT] = { .name = "snapshot", .run = measure_snapshot },
	[FORK] = { .name = "fork", .run = measure_fork },
	[READV] = { .name = "process_vm_readv", .run = measure_process_vm_readv },
	[PROC_MEM] = { .name = "proc_pid_mem", .run = measure_proc_mem },
	[READ_WRITE] = { .name = "read_write", .run = measure_read_write },
	[SPLICE] = { .name = "splice", .run = measure_splice },
	[INCREMENTAL] = { .name = "incremental_1_percent", .run = measure_incremental },
	[FULL_CLEAR] = { .name = "full_and_clear", .run = measure_full_and_clear },
	[PAGEMAP] = { .name = "pagemap_and_clear_refs", .run = measure_pagemap_and_clear_refs },
};

static int compare(const void *a, const void *b)
{
	const uint64_t *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

// A ratio of medians, and that of the prototype.
static const struct {
	const char *name;
	int of, to, huge;
	double prototype;
} ratios[] = {
	{ "snapshot / fork, 4 KiB pages", SNAPSHOT, FORK, 0, 0.79 },
	{ "snapshot / fork, huge pages", SNAPSHOT, FORK, 1, 0.45 },
	{ "process_vm_readv / snapshot, 4 KiB pages", READV, SNAPSHOT, 0, 12 },
	{ "/proc/PID/mem / snapshot, 4 KiB pages", PROC_MEM, SNAPSHOT, 0, 30 },
	{ "read and write / splice, 4 KiB pages", READ_WRITE, SPLICE, 0, 1.4 },
	{ "incremental at 1 % / full and clear, 4 KiB pages", INCREMENTAL, FULL_CLEAR, 0, 0.5 },
	{ "incremental at 1 % / pagemap and clear_refs, 4 KiB pages", INCREMENTAL, PAGEMAP, 0, 0.5 },
};

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 11;
	struct utsname name;

	bytes = (argc > 2 ? strtoul(argv[2], NULL, 10) : 128) << 20;
	require(rounds > 0 && rounds <= MAX_ROUNDS && bytes >= HUGE, "ROUNDS or MEBIBYTES");
	uname(&name);
	buffer = malloc(CHUNK);
	session = open("/dev/ckpt", O_RDWR | O_CLOEXEC);
	require(buffer && session >= 0 && ioctl(session, CKPT_IOC_ATTACH, 0) == 0, "/dev/ckpt");
	for (huge = 0; huge < 2; huge++) {
		memory = map(bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
		for (int round = -1; round < rounds; round++)
			for (int i = 0; i < MEASUREMENTS; i++) {
				uint64_t took;

				prepare();
				took = measurements[i].run();
				// The first round warms up.
				if (round >= 0)
					measurements[i].samples[huge][round] = took;
			}
		for (int i = 0; i < MEASUREMENTS; i++) {
			uint64_t *samples = measurements[i].samples[huge];

			qsort(samples, (size_t)rounds, sizeof(*samples), compare);
			measurements[i].median_ms[huge] = (double)samples[rounds / 2] / 1e6;
		}
		munmap(memory, bytes);
	}
	printf("Linux %s, %zu MiB, medians of %d rounds in ms, emulated: only ratios mean anything\n\n", name.release,
	       bytes >> 20, rounds);
	printf("%-26s %12s %12s\n", "", "4 KiB pages", "huge pages");
	for (int i = 0; i < MEASUREMENTS; i++)
		printf("%-26s %12.3f %12.3f\n", measurements[i].name, measurements[i].median_ms[0],
		       measurements[i].median_ms[1]);
	printf("\n%-58s %8s %10s\n", "ratio", "here", "prototype");
	for (size_t i = 0; i < sizeof(ratios) / sizeof(*ratios); i++)
		printf("%-58s %8.2f %10.2f\n", ratios[i].name,
		       measurements[ratios[i].of].median_ms[ratios[i].huge] /
			       measurements[ratios[i].to].median_ms[ratios[i].huge],
		       ratios[i].prototype);
	printf("\njson: {\"kernel\":\"%s\",\"mib\":%zu,\"rounds\":%d,\"median_ms\":{", name.release, bytes >> 20, rounds);
	for (int i = 0; i < MEASUREMENTS; i++)
		printf("%s\"%s\":{\"4k\":%.4f,\"thp\":%.4f}", i ? "," : "", measurements[i].name,
		       measurements[i].median_ms[0], measurements[i].median_ms[1]);
	printf("},\"ratios\":[");
	for (size_t i = 0; i < sizeof(ratios) / sizeof(*ratios); i++)
		printf("%s{\"name\":\"%s\",\"here\":%.3f,\"prototype\":%.2f}", i ? "," : "", ratios[i].name,
		       measurements[ratios[i].of].median_ms[ratios[i].huge] /
			       measurements[ratios[i].to].median_ms[ratios[i].huge],
		       ratios[i].prototype);
	printf("]}\n");
	return 0;
}
