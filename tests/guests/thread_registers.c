// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Ten threads hold values in every register across the wait: general registers, flags, x87, SSE, AVX, AVX-512 and PKRU
 * as far as the processor has them, FS (thread-local variables) and GS bases. Two threads spin in user space, the
 * others sleep in nanosleep again and again, which must never give an error.
 */
#include "guest.h"
#include <asm/prctl.h>
#include <cpuid.h>
#include <pthread.h>

enum { THREADS = 10, SPINNERS = 2, GENERAL = 14 };

/* The assembly below knows the offsets. */
struct hold {
	uint64_t in[GENERAL]; /* 0: rax rbx rcx rdx rsi rbp r8-r15 */
	uint64_t out[GENERAL]; /* 112 */
	uint64_t flags_in, flags_out; /* 224, 232 */
	void *state_in, *state_out; /* 240, 248 */
	uint64_t components; /* 256 */
	volatile uint64_t *go; /* 264 */
	uint64_t go_out; /* 272 */
	struct timespec *nap; /* 280 */
	uint64_t nap_out; /* 288 */
};

void hold_spinning(struct hold *hold);
void hold_sleeping(struct hold *hold);

__asm__(".macro enter_hold\n"
	"	push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
	"	push %rdi\n"
	"	mov 256(%rdi), %eax; xor %edx, %edx\n"
	"	mov 240(%rdi), %rcx\n"
	"	xrstor64 (%rcx)\n"
	"	pushq 224(%rdi); popfq\n"
	"	mov 0(%rdi), %rax; mov 8(%rdi), %rbx; mov 16(%rdi), %rcx; mov 24(%rdi), %rdx\n"
	"	mov 32(%rdi), %rsi; mov 40(%rdi), %rbp; mov 48(%rdi), %r8; mov 56(%rdi), %r9\n"
	"	mov 64(%rdi), %r10; mov 72(%rdi), %r11; mov 80(%rdi), %r12; mov 88(%rdi), %r13\n"
	"	mov 96(%rdi), %r14; mov 104(%rdi), %r15\n"
	".endm\n"
	/* rdi is the struct again; what rdi held before is on the stack. */
	".macro leave_hold\n"
	"	mov %rax, 112(%rdi); mov %rbx, 120(%rdi); mov %rcx, 128(%rdi); mov %rdx, 136(%rdi)\n"
	"	mov %rsi, 144(%rdi); mov %rbp, 152(%rdi); mov %r8, 160(%rdi); mov %r9, 168(%rdi)\n"
	"	mov %r10, 176(%rdi); mov %r11, 184(%rdi); mov %r12, 192(%rdi); mov %r13, 200(%rdi)\n"
	"	mov %r14, 208(%rdi); mov %r15, 216(%rdi)\n"
	"	pushfq; popq 232(%rdi); cld\n"
	"	mov 256(%rdi), %eax; xor %edx, %edx\n"
	"	mov 248(%rdi), %rcx\n"
	"	xsave64 (%rcx)\n"
	"	emms\n"
	"	pop %rax\n"
	"	pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n"
	"	ret\n"
	".endm\n"
	".globl hold_spinning\n"
	"hold_spinning:\n"
	"	enter_hold\n"
	"	mov 264(%rdi), %rdi\n"
	"1:	pause\n"
	"	cmpq $0, (%rdi)\n"
	"	je 1b\n"
	"	xchg %rdi, (%rsp)\n"
	"	push %rax; mov 8(%rsp), %rax; mov %rax, 272(%rdi); pop %rax\n"
	"	leave_hold\n"
	/* The system call takes rax, rcx, r11, rdi and rsi; rbx points to go, r15 collects results. */
	".globl hold_sleeping\n"
	"hold_sleeping:\n"
	"	enter_hold\n"
	"	mov 264(%rdi), %rbx\n"
	"	mov 280(%rdi), %rdi\n"
	"	xor %esi, %esi\n"
	"	mov $0, %r15d\n"
	"1:	mov $35, %eax\n"
	"	syscall\n"
	"	or %rax, %r15\n"
	"	cmpq $0, (%rbx)\n"
	"	je 1b\n"
	"	xchg %rdi, (%rsp)\n"
	"	push %rax; mov 8(%rsp), %rax; mov %rax, 288(%rdi); pop %rax\n"
	"	leave_hold\n");

static const char *const register_names[GENERAL] = { "rax", "rbx", "rcx", "rdx", "rsi", "rbp", "r8",
						     "r9",  "r10", "r11", "r12", "r13", "r14", "r15" };
/* Which of them the sleeping variant needs for itself: rax rbx rcx rsi r11 r15. */
static const uint64_t taken_by_sleep = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 9 | 1 << 13;

/* Components of the extended state by their bit in XCR0. */
enum { X87 = 1, SSE = 2, AVX = 4, OPMASK = 1 << 5, ZMM_HIGH = 1 << 6, ZMM_16_31 = 1 << 7, PKRU = 1 << 9 };

static uint64_t components;
static size_t state_size;
static volatile uint64_t go;
static struct timespec nap = { 0, 20 * 1000 * 1000 };
static __thread uint64_t local = 1;
static __thread char local_zeroed[300];
static pthread_barrier_t standing;

static uint64_t mix(uint64_t seed)
{
	seed += 0x9e3779b97f4a7c15;
	seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9;
	seed = (seed ^ seed >> 27) * 0x94d049bb133111eb;
	return seed ^ seed >> 31;
}

static void fill(unsigned char *bytes, size_t size, uint64_t seed)
{
	for (size_t i = 0; i < size; i++)
		bytes[i] = mix(seed + i);
}

/* Offset and size of a component above SSE. */
static void locate(int bit, unsigned *offset, unsigned *size)
{
	unsigned c, d;

	__cpuid_count(0xd, bit, *size, *offset, c, d);
}

static void make_state(unsigned char *state, uint64_t seed)
{
	memset(state, 0, state_size);
	/* Control word: double precision, all exceptions masked; stack top 3; all registers in use. */
	uint16_t control = 0x27f, status = 3 << 11;
	memcpy(state, &control, 2);
	memcpy(state + 2, &status, 2);
	state[4] = 0xff;
	for (int i = 0; i < 8; i++)
		fill(state + 32 + 16 * i, 10, seed + 1000 * i);
	uint32_t mxcsr = 0x1f80 | (seed % 4) << 13 | (seed % 2) << 15;
	memcpy(state + 24, &mxcsr, 4);
	fill(state + 160, 256, seed + 10000);
	for (int bit = 2; bit < 10; bit++) {
		unsigned offset, size;

		if (!(components >> bit & 1))
			continue;
		locate(bit, &offset, &size);
		if (1 << bit == PKRU) {
			/* Rights of keys that no page has; key 0 stays usable. */
			uint32_t rights = (uint32_t)mix(seed) & ~3u;
			memcpy(state + offset, &rights, 4);
		} else {
			fill(state + offset, size, seed + 20000 * bit);
		}
	}
	memcpy(state + 512, &components, 8);
}

static void compare_state(const unsigned char *before, const unsigned char *now)
{
	EXPECT_MEM("x87 control, status, tag", before, now, 5);
	for (int i = 0; i < 8; i++)
		EXPECT_MEM("x87 register", before + 32 + 16 * i, now + 32 + 16 * i, 10);
	EXPECT_MEM("mxcsr", before + 24, now + 24, 4);
	EXPECT_MEM("xmm registers", before + 160, now + 160, 256);
	for (int bit = 2; bit < 10; bit++) {
		static const char *const names[10] = { [2] = "ymm upper halves", [5] = "opmask registers",
						       [6] = "zmm upper halves", [7] = "zmm16-31", [9] = "pkru" };
		unsigned offset, size;

		if (!(components >> bit & 1))
			continue;
		locate(bit, &offset, &size);
		EXPECT_MEM(names[bit], before + offset, now + offset, 1 << bit == PKRU ? 4 : size);
	}
	EXPECT_EQ("components in use", components, *(const uint64_t *)(now + 512) & components);
}

static void *thread(void *argument)
{
	int number = (intptr_t)argument;
	bool spins = number < SPINNERS;
	uint64_t gs_area[4] = { mix(number), 1, 2, 3 }, got;
	struct hold hold = { .components = components, .go = &go, .nap = &nap };

	hold.state_in = aligned_alloc(64, (state_size + 63) / 64 * 64);
	hold.state_out = aligned_alloc(64, (state_size + 63) / 64 * 64);
	EXPECT(hold.state_in && hold.state_out);
	memset(hold.state_out, 0, state_size);
	make_state(hold.state_in, 77 * (number + 1));
	for (int i = 0; i < GENERAL; i++)
		hold.in[i] = mix(100 * number + i);
	/* Reserved bit 1 and IF as always, and the direction flag in every second thread. */
	hold.flags_in = 0x202 | (number % 2) << 10;
	local = mix(number + 5000);
	MUST(syscall(SYS_arch_prctl, ARCH_SET_GS, gs_area));
	pid_t tid = syscall(SYS_gettid);
	pthread_t self = pthread_self();
	pthread_barrier_wait(&standing);

	if (spins)
		hold_spinning(&hold);
	else
		hold_sleeping(&hold);

	for (int i = 0; i < GENERAL; i++) {
		if (!spins && taken_by_sleep >> i & 1)
			continue;
		char what[64];
		snprintf(what, sizeof(what), "%s of thread %d", register_names[i], number);
		EXPECT_EQ(what, hold.in[i], hold.out[i]);
	}
	if (spins)
		EXPECT_EQ("rdi", (uintptr_t)&go, hold.go_out);
	else {
		EXPECT_EQ("rdi", (uintptr_t)&nap, hold.nap_out);
		EXPECT_EQ("rbx", (uintptr_t)&go, hold.out[1]);
		EXPECT_EQ("rsi", 0, hold.out[4]);
		EXPECT_EQ("results of nanosleep, or'ed", 0, hold.out[13]);
	}
	/* Direction and alignment check. The kernel lets nobody else set the ID flag, a signal handler's return loses it, too. */
	uint64_t compared = 1 << 10 | 1 << 18;
	EXPECT_EQ("flags", hold.flags_in & compared, hold.flags_out & compared);
	compare_state(hold.state_in, hold.state_out);
	EXPECT_EQ("thread-local variable", mix(number + 5000), local);
	for (size_t i = 0; i < sizeof(local_zeroed); i++)
		EXPECT_EQ("zeroed thread-local variable", 0, local_zeroed[i]);
	EXPECT_EQ("tid", tid, syscall(SYS_gettid));
	EXPECT(pthread_equal(self, pthread_self()));
	MUST(syscall(SYS_arch_prctl, ARCH_GET_GS, &got));
	EXPECT_EQ("gs base", (uintptr_t)gs_area, got);
	__asm__ volatile("movq %%gs:0, %0" : "=r"(got));
	EXPECT_EQ("value at gs", mix(number), got);
	return argument;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	unsigned a, b, c, d;

	guest_begin(argc, argv);
	__cpuid(1, a, b, c, d);
	if (!(c & bit_OSXSAVE))
		guest_skip("the processor or the kernel has no XSAVE");
	unsigned low, high;
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	components = low & (X87 | SSE | AVX | OPMASK | ZMM_HIGH | ZMM_16_31 | PKRU);
	__cpuid_count(0xd, 0, a, b, c, d);
	state_size = b;

	MUST0(pthread_barrier_init(&standing, NULL, THREADS + 1));
	for (intptr_t i = 0; i < THREADS; i++)
		MUST0(pthread_create(&threads[i], NULL, thread, (void *)i));
	pthread_barrier_wait(&standing);
	guest_ready();
	guest_wait_go();
	go = 1;
	for (intptr_t i = 0; i < THREADS; i++) {
		void *result;

		MUST0(pthread_join(threads[i], &result));
		EXPECT_EQ("what the thread returned", i, (intptr_t)result);
	}
	guest_ok();
}
