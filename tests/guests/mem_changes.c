// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Memory that changes between dumps, in all the ways that a tracker of writes could miss: pages written, dropped, read again,
 * mappings made anew in the same place, moved, grown, protected; processes forked, ended, executed; files mapped privately;
 * shared memory written through mappings and descriptors. Beside each page a model of what it must hold is kept, in memory
 * as well: in a restored process both are of one moment, or the check fails.
 *
 * Arguments: WORKDIR SEED [free]. Step N begins with the file stepN and is over with doneN; with `free`, steps follow
 * each other until go.
 */
#include "mem_pattern.h"

enum kind { ANON, HUGE, FILE_COPY, SHARED, MEMFD, KINDS };

#define AREAS 10
#define MOST_PAGES 1024
#define HUGE_BYTES ((size_t)2 << 20)
#define CHILDREN 3

struct area {
	enum kind kind;
	char *at;
	size_t pages;
	int fd;
	/* 0: as mapped (zero, or the file's content); else the version of the pattern in it. */
	uint32_t version[MOST_PAGES];
};

static struct {
	struct area *areas;
	uint64_t random;
	uint32_t versions;
	char name[32];
} self;

static uint64_t draw(uint64_t below)
{
	uint64_t z = (self.random += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return (z ^ (z >> 31)) % below;
}

static void fill(char *page, uint32_t version)
{
	uint64_t words[PAGE_BYTES / 8];

	for (size_t i = 0; i < PAGE_BYTES / 8; i++)
		words[i] = pattern_word(guest_seed ^ version, i);
	memcpy(page, words, PAGE_BYTES);
}

static void file_page(char *page, size_t index)
{
	memset(page, (int)(index % 250) + 1, PAGE_BYTES);
}

static int backing_file(void)
{
	char path[PATH_MAX], page[PAGE_BYTES];
	int fd;

	guest_path(path, sizeof(path), "backing");
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd >= 0) {
		for (size_t i = 0; i < MOST_PAGES; i++) {
			file_page(page, i);
			MUST(pwrite(fd, page, PAGE_BYTES, i * PAGE_BYTES));
		}
		close(fd);
	}
	return MUST(open(path, O_RDONLY | O_CLOEXEC));
}

/* At `place`, where as many pages are free, if that is given. */
static void map_area(struct area *a, enum kind kind, char *place, size_t pages)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1;

	memset(a, 0, sizeof(*a));
	a->kind = kind;
	a->fd = -1;
	a->pages = place ? pages : kind == HUGE ? 2 * HUGE_BYTES / PAGE_BYTES : 64 + draw(200);
	if (kind == FILE_COPY) {
		flags = MAP_PRIVATE;
		fd = backing_file();
	} else if (kind == SHARED) {
		flags = MAP_SHARED | MAP_ANONYMOUS;
	} else if (kind == MEMFD) {
		flags = MAP_SHARED;
		fd = a->fd = MUST(memfd_create("changes", MFD_CLOEXEC));
		MUST(ftruncate(fd, MOST_PAGES * PAGE_BYTES));
	}
	if (kind == HUGE && !place) {
		char *room = MUST(mmap(NULL, 3 * HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

		place = (char *)(((uintptr_t)room + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1));
		MUST(munmap(room, 3 * HUGE_BYTES));
	}
	if (place)
		flags |= MAP_FIXED;
	a->at = MUST(mmap(place, a->pages * PAGE_BYTES, PROT_READ | PROT_WRITE, flags, fd, 0));
	if (kind == FILE_COPY)
		close(fd);
	/* Without huge pages in this kernel it is just memory. */
	madvise(a->at, a->pages * PAGE_BYTES, kind == HUGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

static void unmap_area(struct area *a)
{
	MUST(munmap(a->at, a->pages * PAGE_BYTES));
	if (a->fd >= 0)
		close(a->fd);
	a->fd = -1;
}

static void write_page(struct area *a, size_t page)
{
	uint32_t version = ++self.versions;

	if (a->kind == MEMFD && draw(2)) {
		char content[PAGE_BYTES];

		fill(content, version);
		MUST(pwrite(a->fd, content, PAGE_BYTES, page * PAGE_BYTES));
	} else {
		fill(a->at + page * PAGE_BYTES, version);
	}
	a->version[page] = version;
}

static void drop_pages(struct area *a, size_t from, size_t count)
{
	char *at = a->at + from * PAGE_BYTES;

	if (a->kind == MEMFD)
		MUST(fallocate(a->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from * PAGE_BYTES,
			       count * PAGE_BYTES));
	else if (a->kind == SHARED)
		MUST(madvise(at, count * PAGE_BYTES, MADV_REMOVE));
	else
		MUST(madvise(at, count * PAGE_BYTES, MADV_DONTNEED));
	memset(a->version + from, 0, count * sizeof(a->version[0]));
	/* Zero pages, or those of the file, come back. */
	for (size_t i = 0; i < count; i++)
		if (draw(2))
			(void)*(volatile char *)(at + i * PAGE_BYTES);
}

static void check_area(const struct area *a, size_t index)
{
	char expected[PAGE_BYTES];

	for (size_t i = 0; i < a->pages; i++) {
		if (a->version[i])
			fill(expected, a->version[i]);
		else if (a->kind == FILE_COPY)
			file_page(expected, i);
		else
			memset(expected, 0, PAGE_BYTES);
		GUEST_CHECK(!memcmp(expected, a->at + i * PAGE_BYTES, PAGE_BYTES),
			    "process %s, area %zu of kind %d, page %zu: not version %u", self.name, index, a->kind,
			    i, a->version[i]);
	}
}

static void change_once(void)
{
	struct area *a = &self.areas[draw(AREAS)];
	size_t page = draw(a->pages), count = 1 + draw(8);
	enum kind kind = a->kind;
	char *to;

	if (page + count > a->pages)
		count = a->pages - page;
	switch (draw(20)) {
	case 0: /* in the same place */
		to = draw(2) ? NULL : a->at;
		unmap_area(a);
		map_area(a, kind, to, a->pages);
		break;
	case 1: /* moved */
		if (kind == HUGE)
			break;
		to = MUST(mmap(NULL, a->pages * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		a->at = MUST(mremap(a->at, a->pages * PAGE_BYTES, a->pages * PAGE_BYTES,
				    MREMAP_MAYMOVE | MREMAP_FIXED, to));
		break;
	case 2: /* grown */
		if (kind != ANON || a->pages + count > MOST_PAGES)
			break;
		a->at = MUST(mremap(a->at, a->pages * PAGE_BYTES, (a->pages + count) * PAGE_BYTES, MREMAP_MAYMOVE));
		a->pages += count;
		break;
	case 3: /* its pages cannot be read for a moment */
		MUST(mprotect(a->at, a->pages * PAGE_BYTES, PROT_NONE));
		MUST(mprotect(a->at, a->pages * PAGE_BYTES, PROT_READ | PROT_WRITE));
		break;
	case 4:
	case 5:
		drop_pages(a, page, count);
		break;
	case 6: /* a child that writes to what it shares and ends */
		if (!draw(8)) {
			pid_t child = MUST(fork());

			if (!child) {
				for (size_t i = 0; i < AREAS; i++)
					if (self.areas[i].kind < SHARED)
						memset(self.areas[i].at, 0xee, PAGE_BYTES);
				_exit(0);
			}
			GUEST_CHECK(guest_reap(child) == 0, "the short-lived child failed");
		}
		break;
	default:
		while (count--)
			write_page(a, page + count);
	}
}

static void make_areas(void)
{
	self.areas = MUST(mmap(NULL, AREAS * sizeof(struct area), PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	for (size_t i = 0; i < AREAS; i++) {
		map_area(&self.areas[i], i < KINDS ? (enum kind)i : i % 2 ? ANON : FILE_COPY, NULL, 0);
		for (size_t page = 0; page < self.areas[i].pages; page++)
			if (draw(4))
				write_page(&self.areas[i], page);
	}
}

static void check_all(void)
{
	for (size_t i = 0; i < AREAS; i++)
		check_area(&self.areas[i], i);
}

static bool wait_for_step(int step, bool free_running)
{
	char name[64];

	snprintf(name, sizeof(name), "step%d", step);
	for (;; guest_nap()) {
		if (guest_exists("go"))
			return false;
		if (free_running || guest_exists(name))
			return true;
	}
}

/* Steps of a process other than the leader; ends with go, and then checks itself. */
__attribute__((noreturn)) static void follow(int step, bool free_running)
{
	char name[128];

	for (; wait_for_step(step, free_running); step++) {
		for (int i = 0; i < 40; i++)
			change_once();
		snprintf(name, sizeof(name), "done%d.%s", step, self.name);
		if (free_running)
			guest_nap();
		else
			guest_publish(name, "");
	}
	check_all();
	_exit(0);
}

static void rename_self(int slot, int step)
{
	snprintf(self.name, sizeof(self.name), "%d.%d", slot, step);
	self.random ^= (uint64_t)(slot + 1) << 32 | (uint64_t)step;
}

int main(int argc, char **argv)
{
	char name[128], names[CHILDREN][32], text[64], seed[32], slot_text[16];
	bool free_running = argc > 3 && !strcmp(argv[3], "free");
	pid_t children[CHILDREN] = { 0 };
	int step;

	if (argc == 7) {
		/* Executed by a child: a fresh process with the nonce of the guest. */
		snprintf(guest.workdir, sizeof(guest.workdir), "%s", argv[1]);
		snprintf(guest.nonce, sizeof(guest.nonce), "%s", argv[4]);
		guest_seed = strtoull(argv[2], NULL, 10);
		step = atoi(argv[5]);
		self.random = guest_seed;
		self.versions = 1u << 24;
		rename_self(atoi(argv[6]), step);
		make_areas();
		follow(step, free_running);
	}
	pattern_begin(argc, argv);
	self.random = strtoull(argv[2], NULL, 10);
	snprintf(self.name, sizeof(self.name), "leader");
	make_areas();
	guest_ready();
	for (step = 1; wait_for_step(step, free_running); step++) {
		int slot = step % CHILDREN;

		if (children[slot] && step % 2) {
			kill(children[slot], SIGKILL);
			guest_reap(children[slot]);
			children[slot] = 0;
		}
		/* Not while the others run through their steps by themselves. */
		if (!children[slot]) {
			snprintf(names[slot], sizeof(names[slot]), "%d.%d", slot, step);
			children[slot] = MUST(fork());
			if (!children[slot]) {
				rename_self(slot, step);
				/* Shared memory is the leader's to change. */
				for (size_t i = 0; i < AREAS; i++)
					if (self.areas[i].kind >= SHARED) {
						unmap_area(&self.areas[i]);
						map_area(&self.areas[i], ANON, NULL, 0);
					}
				if (slot == 1) {
					snprintf(seed, sizeof(seed), "%llu", (unsigned long long)guest_seed);
					snprintf(text, sizeof(text), "%d", step);
					snprintf(slot_text, sizeof(slot_text), "%d", slot);
					execl("/proc/self/exe", argv[0], argv[1], seed, free_running ? "free" : "steps",
					      guest.nonce, text, slot_text, NULL);
					guest_fail("exec: %s", strerror(errno));
				}
				follow(step, free_running);
			}
		}
		for (int i = 0; i < 40; i++)
			change_once();
		if (free_running) {
			guest_nap();
			continue;
		}
		for (int i = 0; i < CHILDREN; i++) {
			snprintf(name, sizeof(name), "done%d.%s", step, names[i]);
			while (children[i] && !guest_exists(name))
				guest_nap();
		}
		snprintf(name, sizeof(name), "done%d", step);
		guest_publish(name, "");
	}
	check_all();
	for (int i = 0; i < CHILDREN; i++)
		if (children[i])
			guest_join(children[i]);
	guest_ok();
}
