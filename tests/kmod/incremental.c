// SPDX-License-Identifier: MIT OR Apache-2.0
// Incremental snapshots: what is said to be the same is the same.
#include "harness.h"

#define INCREMENTAL (CKPT_SNAPSHOT_INCREMENTAL | CKPT_SNAPSHOT_CLEAR)

static char zeros[PAGE];

// A full snapshot that begins a generation, read and closed.
static uint64_t begin(int session)
{
	struct ckpt_snapshot_args args = take(session, CKPT_SNAPSHOT_CLEAR, 0);

	CHECK(args.generation != 0);
	CHECK_EQ(args.pages_same, 0);
	close(args.fd);
	return args.generation;
}

TEST(incremental_small_pages)
{
	char *memory = map_small(256 * PAGE);
	int session = open_session();
	uint64_t generation;

	memset(memory, 1, 256 * PAGE);
	generation = begin(session);
	for (int round = 0; round < 5; round++) {
		memory[(10 + (size_t)round) * PAGE] = (char)(2 + round);
		CHECK(madvise(memory + (20 + (size_t)round) * PAGE, PAGE, MADV_DONTNEED) == 0);
		struct ckpt_snapshot_args args = take(session, INCREMENTAL, generation);
		CHECK(args.generation != generation);
		generation = args.generation;
		for (size_t i = 0; i < 256; i++) {
			uint32_t kind = kind_of(args.fd, memory + i * PAGE);

			if (i == 10 + (size_t)round)
				CHECK_EQ(kind, CKPT_KIND_DATA);
			else if (i >= 20 && i <= 20 + (size_t)round)
				CHECK_EQ(kind, 0);
			else
				CHECK_EQ(kind, CKPT_KIND_SAME);
		}
		CHECK_EQ(pread(args.fd, zeros, 1, (off_t)memory + (10 + round) * (off_t)PAGE), 1);
		CHECK_EQ(zeros[0], 2 + round);
		// What is the same is not held.
		CHECK_ERRNO(pread(args.fd, zeros, PAGE, (off_t)memory), ENXIO);
		close(args.fd);
	}
}

TEST(incremental_huge_pages)
{
	char *memory = map_huge(4 * HUGE);
	int session = open_session();
	uint64_t generation = begin(session);
	struct ckpt_snapshot_args args = take(session, INCREMENTAL, generation);

	check_kinds(args.fd, memory, 4 * HUGE / PAGE, CKPT_KIND_SAME);
	close(args.fd);
	// Nothing shares it any more: the huge page is written as it is, and dirty as a whole.
	memory[HUGE + 5 * PAGE] = 2;
	args = take(session, INCREMENTAL, args.generation);
	check_kinds(args.fd, memory, HUGE / PAGE, CKPT_KIND_SAME);
	check_kinds(args.fd, memory + HUGE, HUGE / PAGE, CKPT_KIND_DATA);
	check_kinds(args.fd, memory + 2 * HUGE, 2 * HUGE / PAGE, CKPT_KIND_SAME);
	// Written while it is shared: it is copied by small pages.
	memory[HUGE] = 3;
	close(args.fd);
	args = take(session, INCREMENTAL, args.generation);
	CHECK_EQ(kind_of(args.fd, memory + HUGE), CKPT_KIND_DATA);
	close(args.fd);
	args = take(session, INCREMENTAL, args.generation);
	check_kinds(args.fd, memory, 4 * HUGE / PAGE, CKPT_KIND_SAME);
}

TEST(incremental_without_clear)
{
	char *memory = map_small(4 * PAGE);
	int session = open_session();
	uint64_t generation;

	memset(memory, 1, 4 * PAGE);
	generation = begin(session);
	memory[0] = 2;
	for (int round = 0; round < 3; round++) {
		// The generation goes on, and so does what is dirty in it.
		struct ckpt_snapshot_args args = take(session, CKPT_SNAPSHOT_INCREMENTAL, generation);

		CHECK_EQ(args.generation, generation);
		CHECK_EQ(kind_of(args.fd, memory), CKPT_KIND_DATA);
		CHECK_EQ(kind_of(args.fd, memory + PAGE), CKPT_KIND_SAME);
		close(args.fd);
		// One that is neither leaves it alone.
		close(take(session, 0, 0).fd);
	}
}

TEST(incremental_belongs_to_the_address_space)
{
	char *memory = map_small(4 * PAGE);
	int first = open_session(), second = open_session();
	struct ckpt_snapshot_args args;
	uint64_t generation;

	memset(memory, 1, 4 * PAGE);
	generation = begin(first);
	args = take(second, INCREMENTAL, generation);
	CHECK_EQ(kind_of(args.fd, memory), CKPT_KIND_SAME);
	close(args.fd);
	// The other session has begun another generation: the first one's is over, and it is told.
	struct ckpt_snapshot_args stale;
	CHECK_ERRNO(try_take(first, INCREMENTAL, generation, &stale), ESTALE);
	close(take(first, INCREMENTAL, args.generation).fd);
	// When all sessions are gone, nobody looks after the bits.
	generation = begin(first);
	close(first);
	close(second);
	CHECK_ERRNO(try_take(open_session(), INCREMENTAL, generation, &stale), ESTALE);
}

TEST(incremental_new_mappings)
{
	char *memory = map_small(64 * PAGE);
	int session = open_session();
	uint64_t generation;
	struct ckpt_snapshot_args args;

	memset(memory, 1, 64 * PAGE);
	generation = begin(session);
	// Another mapping at the old place, next to the old, and one that merges with it.
	CHECK(mmap(memory + 8 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
		   -1, 0) == memory + 8 * PAGE);
	memory[8 * PAGE] = 2;
	CHECK_EQ(*(volatile char *)(memory + 9 * PAGE), 0);
	args = take(session, INCREMENTAL, generation);
	CHECK_EQ(kind_of(args.fd, memory + 8 * PAGE), CKPT_KIND_DATA);
	CHECK_EQ(kind_of(args.fd, memory + 9 * PAGE), CKPT_KIND_ZERO);
	CHECK_EQ(kind_of(args.fd, memory + 10 * PAGE), 0);
	// Dirty or not, never something else than what is there.
	CHECK(kind_of(args.fd, memory) & (CKPT_KIND_SAME | CKPT_KIND_DATA));
}

static void check_mremap(bool huge, size_t bytes, size_t alignment)
{
	char *area = mmap(NULL, 64 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char *from = (char *)(((unsigned long)area + alignment) & ~(alignment - 1)), *to;
	int session = open_session();
	uint64_t generation;

	CHECK(area != MAP_FAILED);
	to = from + ((bytes + alignment - 1) & ~(alignment - 1));
	CHECK(to + bytes <= area + 64 * HUGE);
	CHECK(mprotect(from, bytes, PROT_READ | PROT_WRITE) == 0);
	CHECK(mprotect(to, bytes, PROT_READ | PROT_WRITE) == 0);
	CHECK(madvise(from, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0);
	CHECK(madvise(to, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0);
	memset(from, 1, bytes);
	memset(to, 2, bytes);
	CHECK_EQ(is_huge(from), huge);
	generation = begin(session);
	// Moved as whole tables, the entries keep their clean bits, and say nothing about the new place.
	CHECK(mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
	CHECK_EQ(to[0], 1);
	struct ckpt_snapshot_args args = take(session, INCREMENTAL, generation);
	check_kinds(args.fd, to, bytes / PAGE, CKPT_KIND_DATA);
	check_kinds(args.fd, from, bytes / PAGE, 0);
	close(args.fd);
	args = take(session, INCREMENTAL, args.generation);
	check_kinds(args.fd, to, bytes / PAGE, CKPT_KIND_SAME);
}

TEST(incremental_mremap_of_pages)
{
	check_mremap(false, 16 * PAGE, PAGE);
}

TEST(incremental_mremap_of_whole_tables)
{
	check_mremap(false, 4 * HUGE, HUGE);
}

TEST(incremental_mremap_of_huge_pages)
{
	check_mremap(true, 4 * HUGE, HUGE);
}

TEST(incremental_mremap_of_tables_of_huge_pages)
{
	// A whole gigabyte of addresses moves at once, with one huge page in it.
	size_t giga = 1UL << 30;
	char *area = mmap(NULL, 3 * giga, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char *from = (char *)(((unsigned long)area + giga - 1) & ~(giga - 1)), *to = from + giga;
	int session = open_session();
	uint64_t generation;

	CHECK(area != MAP_FAILED);
	CHECK(mmap(from, giga, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1,
		   0) == from);
	CHECK(madvise(from, giga, MADV_HUGEPAGE) == 0);
	from[HUGE] = 1;
	CHECK(is_huge(from + HUGE));
	generation = begin(session);
	CHECK(mremap(from, giga, giga, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
	CHECK_EQ(to[HUGE], 1);
	struct ckpt_snapshot_args args = take(session, INCREMENTAL, generation);
	CHECK_EQ(kind_of(args.fd, to + HUGE), CKPT_KIND_DATA);
	CHECK_EQ(kind_of(args.fd, from + HUGE), 0);
}

static int write_one(void *memory)
{
	*(char *)memory = 7;
	return 0;
}

TEST(incremental_fork_and_protection)
{
	char *memory = map_small(64 * PAGE);
	int session = open_session();
	uint64_t generation;
	struct ckpt_snapshot_args args;

	memset(memory, 1, 64 * PAGE);
	generation = begin(session);
	// What a child writes is the child's.
	CHECK_EQ(wait_for(spawn(write_one, memory)), 0);
	CHECK(mprotect(memory, 32 * PAGE, PROT_NONE) == 0);
	CHECK(mprotect(memory, 32 * PAGE, PROT_READ | PROT_WRITE) == 0);
	args = take(session, INCREMENTAL, generation);
	check_kinds(args.fd, memory, 64, CKPT_KIND_SAME);
	close(args.fd);
	memory[PAGE] = 2;
	CHECK(mprotect(memory, 32 * PAGE, PROT_READ) == 0);
	args = take(session, INCREMENTAL, args.generation);
	CHECK_EQ(kind_of(args.fd, memory), CKPT_KIND_SAME);
	CHECK_EQ(kind_of(args.fd, memory + PAGE), CKPT_KIND_DATA);
}

TEST(incremental_swap)
{
	char *memory = map_small(64 * PAGE);
	int session = open_session();
	uint64_t generation;
	struct ckpt_snapshot_args args;

	memset(memory, 1, 64 * PAGE);
	generation = begin(session);
	swap_out(memory, 64 * PAGE);
	args = take(session, INCREMENTAL, generation);
	check_kinds(args.fd, memory, 64, CKPT_KIND_SAME);
	close(args.fd);
	memset(memory + 8 * PAGE, 2, 8 * PAGE);
	swap_out(memory, 64 * PAGE);
	args = take(session, INCREMENTAL, args.generation);
	check_kinds(args.fd, memory, 8, CKPT_KIND_SAME);
	check_kinds(args.fd, memory + 8 * PAGE, 8, CKPT_KIND_DATA);
	check_kinds(args.fd, memory + 16 * PAGE, 48, CKPT_KIND_SAME);
}

TEST(incremental_bits_cleared_by_others)
{
	char *memory = map_small(16 * PAGE);
	int session = open_session();
	uint64_t generation;
	struct ckpt_snapshot_args args;

	memset(memory, 1, 16 * PAGE);
	generation = begin(session);
	memory[PAGE] = 2;
	// What has been written before does not show any more, and nothing may be said to be the same.
	write_file("/proc/self/clear_refs", "4");
	CHECK_ERRNO(try_take(session, CKPT_SNAPSHOT_INCREMENTAL, generation, &args), ESTALE);
	CHECK_ERRNO(try_take(session, INCREMENTAL, generation, &args), ESTALE);
	generation = begin(session);
	// Other requests clear other bits.
	write_file("/proc/self/clear_refs", "1");
	memory[2 * PAGE] = 3;
	args = take(session, INCREMENTAL, generation);
	CHECK_EQ(kind_of(args.fd, memory + PAGE), CKPT_KIND_SAME);
	CHECK_EQ(kind_of(args.fd, memory + 2 * PAGE), CKPT_KIND_DATA);
	close(args.fd);
	// And again, in a generation that came of another.
	write_file("/proc/self/clear_refs", "4");
	CHECK_ERRNO(try_take(session, INCREMENTAL, args.generation, &args), ESTALE);
}

TEST(incremental_dirty_through_the_kernel)
{
	char *memory = map_small(16 * PAGE);
	int session = open_session(), zero = open("/dev/zero", O_RDONLY), mem = open("/proc/self/mem", O_RDWR);
	uint64_t generation;
	struct iovec local = { zeros, PAGE }, remote = { memory + 2 * PAGE, PAGE };

	memset(memory, 1, 16 * PAGE);
	generation = begin(session);
	CHECK_EQ(read(zero, memory, 1), 1);
	CHECK_EQ(pwrite(mem, "x", 1, (off_t)memory + (off_t)PAGE), 1);
	CHECK_EQ(process_vm_writev(getpid(), &local, 1, &remote, 1, 0), PAGE);
	struct ckpt_snapshot_args args = take(session, INCREMENTAL, generation);
	check_kinds(args.fd, memory, 3, CKPT_KIND_DATA);
	check_kinds(args.fd, memory + 3 * PAGE, 13, CKPT_KIND_SAME);
}

// A random process, and a reader who rebuilds its memory from increments alone.

#define MODEL_PAGES (4 * HUGE / PAGE)

struct model {
	struct rng rng;
	char *memory;
	// Where whole tables are moved to and fro.
	char *elsewhere;
	// The same memory as the increments tell it.
	char *image;
	int mem;
};

// New memory at a place where there may be none.
static void model_map(char *at, size_t bytes)
{
	CHECK(mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
}

// Moves pages and leaves new memory behind. What is made of several mappings cannot be moved, and the kernel has
// emptied the other place by the time that it says so.
static bool model_move(char *from, char *to, size_t bytes)
{
	if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to) {
		model_map(from, bytes);
		return true;
	}
	model_map(to, bytes);
	return false;
}

static void model_act(struct model *model)
{
	struct rng *rng = &model->rng;
	size_t page = rng_below(rng, MODEL_PAGES), count = 1 + rng_below(rng, 64);
	char *at = model->memory + page * PAGE;
	size_t bytes;

	if (count > MODEL_PAGES - page)
		count = MODEL_PAGES - page;
	bytes = count * PAGE;
	switch (rng_below(rng, 16)) {
	case 0:
	case 1:
	case 2:
	case 3:
	case 4:
		for (size_t i = 0; i < count; i++) {
			uint64_t value = rng_next(rng);

			CHECK_EQ(pwrite(model->mem, &value, 8, (off_t)(at + i * PAGE) + 8 * (off_t)(value % 500)),
				 8);
		}
		break;
	case 5:
		CHECK(mprotect(at, bytes, PROT_READ | PROT_WRITE) == 0);
		memset(at, (int)rng_next(rng), bytes);
		break;
	case 6:
		CHECK(madvise(at, bytes, MADV_DONTNEED) == 0);
		break;
	case 7:
		model_map(at, bytes);
		break;
	case 8: {
		static const int protections[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE };

		CHECK(mprotect(at, bytes, protections[rng_below(rng, 3)]) == 0);
		break;
	}
	case 9:
		madvise(at, bytes, MADV_PAGEOUT);
		break;
	case 10: {
		pid_t child = fork();

		if (child == 0)
			_exit(0);
		CHECK_EQ(wait_for(child), 0);
		break;
	}
	case 11: {
		// Two tables change places.
		char *a = model->memory + rng_below(rng, 4) * HUGE, *b = model->memory + rng_below(rng, 4) * HUGE;

		if (a == b)
			break;
		// mremap(2) moves one mapping: make it one again.
		CHECK(mprotect(a, HUGE, PROT_READ | PROT_WRITE) == 0);
		CHECK(mprotect(b, HUGE, PROT_READ | PROT_WRITE) == 0);
		if (model_move(a, model->elsewhere, HUGE)) {
			model_move(b, a, HUGE);
			model_move(model->elsewhere, b, HUGE);
		}
		break;
	}
	case 12:
		madvise(model->memory + page / 512 * HUGE, HUGE, MADV_HUGEPAGE);
		madvise(model->memory + page / 512 * HUGE, HUGE, 25 /* MADV_COLLAPSE */);
		break;
	case 13: {
		// Pages move to a place that is not theirs.
		size_t other = rng_below(rng, MODEL_PAGES - count);
		char *to = model->memory + other * PAGE;

		if (to + bytes > at && at + bytes > to)
			break;
		CHECK(mprotect(at, bytes, PROT_READ | PROT_WRITE) == 0);
		model_move(at, to, bytes);
		break;
	}
	case 14: {
		char byte;

		CHECK_EQ(pread(model->mem, &byte, 1, (off_t)at), 1);
		break;
	}
	case 15:
		madvise(at, bytes, MADV_FREE);
		memset(zeros, 0, PAGE);
		// Made certain: freed lazily, a page may be gone now or later.
		madvise(at, bytes, MADV_DONTNEED);
		break;
	}
}

// Brings the image up to date with a snapshot.
static void model_apply(struct model *model, int snapshot)
{
	static struct ckpt_run runs[64];
	struct ckpt_getruns args = { .size = sizeof(args), .kinds = 31, .va = (uint64_t)model->memory,
				     .npages = MODEL_PAGES, .runs = (uint64_t)runs };
	uint64_t at = args.va;

	do {
		args.nruns = 1 + rng_below(&model->rng, 64);
		CHECK(ioctl(snapshot, CKPT_IOC_GETRUNS, &args) == 0);
		for (uint32_t i = 0; i < args.nruns; i++) {
			size_t bytes = runs[i].npages * PAGE;
			char *to = model->image + (runs[i].va - (uint64_t)model->memory);

			// Absent pages before it.
			memset(model->image + (at - (uint64_t)model->memory), 0, runs[i].va - at);
			at = runs[i].va + bytes;
			switch (runs[i].kind) {
			case CKPT_KIND_SAME:
				break;
			case CKPT_KIND_ZERO:
				memset(to, 0, bytes);
				break;
			case CKPT_KIND_DATA:
				CHECK_EQ(pread(snapshot, to, bytes, (off_t)runs[i].va), bytes);
				break;
			case CKPT_KIND_COPY:
				CHECK_EQ(pread(model->mem, to, bytes, (off_t)runs[i].va), bytes);
				break;
			default:
				FAIL("kind %u", runs[i].kind);
			}
		}
	} while (args.npages);
	memset(model->image + (at - (uint64_t)model->memory), 0,
	       (uint64_t)model->memory + MODEL_PAGES * PAGE - at);
}

static void model_check(struct model *model, int round)
{
	static char now[PAGE];

	for (size_t i = 0; i < MODEL_PAGES; i++) {
		CHECK_EQ(pread(model->mem, now, PAGE, (off_t)(model->memory + i * PAGE)), PAGE);
		if (memcmp(now, model->image + i * PAGE, PAGE))
			FAIL("page %zu differs after round %d (seed %llu)", i, round, (unsigned long long)seed);
	}
}

TEST_WITHIN(random_process_rebuilt_from_increments, 300)
{
	struct model model = { .rng = { seed }, .mem = open("/proc/self/mem", O_RDWR) };
	const char *rounds = getenv("CKPT_TEST_ROUNDS");
	int session = open_session(), open_snapshot = -1, count = rounds ? atoi(rounds) : 60;
	uint64_t generation = 0;

	model.memory = map_huge(5 * HUGE);
	model.elsewhere = model.memory + 4 * HUGE;
	model.image = mmap(NULL, MODEL_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(model.image != MAP_FAILED && model.mem >= 0);
	for (int round = 0; round < count; round++) {
		struct ckpt_snapshot_args args;

		for (uint64_t actions = rng_below(&model.rng, 40); actions; actions--)
			model_act(&model);
		args = take(session, generation ? INCREMENTAL : CKPT_SNAPSHOT_CLEAR, generation);
		generation = args.generation;
		model_apply(&model, args.fd);
		// Some live on while the process does, as while a dump is being written.
		if (open_snapshot >= 0)
			close(open_snapshot);
		open_snapshot = args.fd;
		if (rng_below(&model.rng, 2)) {
			close(open_snapshot);
			open_snapshot = -1;
		}
		model_check(&model, round);
	}
}
