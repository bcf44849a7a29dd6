/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * ckpt-hooks.h - how an application works together with ckpt, which dumps and restores it.
 *
 * It is all that is needed: there is no library to link with. What is called here is found at run time in
 * ckpt's interceptor, which ckpt run loads; without it (the program runs by itself, is linked statically, or was
 * started by ckpt run --no-interceptor) every call returns CKPT_NOT_UNDER_CKPT, or what its comment says, and
 * does nothing. With a C library older than glibc 2.34 link with -ldl for anything else to happen.
 *
 * C99 and C++11, gcc and clang. See docs/hooks.md.
 */
#ifndef CKPT_HOOKS_H
#define CKPT_HOOKS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What calls return. */
enum {
	/* Done. */
	CKPT_OK = 0,
	/* ckpt_dump_now: the job has been dumped, and this is the job that goes on. */
	CKPT_DUMPED = 1,
	/* ckpt_dump_now: this is a copy of the job, restored from a checkpoint. */
	CKPT_RESTORED = 2,
	/* The program runs without ckpt, or without its interceptor. */
	CKPT_NOT_UNDER_CKPT = -1,
	/* ckpt_dump_now: the dump failed; the job goes on. The log of the job's supervisor says why: ckpt ps. */
	CKPT_FAILED = -2,
	/* ckpt_dump_now: not within the time given. The dump may still be made. */
	CKPT_TIMED_OUT = -3,
	/* ckpt_dump_now: nobody makes dumps when the job asks for them; start it with ckpt run --dump-on request. */
	CKPT_NOBODY = -4,
	/* Not from here: ckpt_dump_now in a critical section or in a callback, ckpt_critical_end without a begin. */
	CKPT_NOT_HERE = -5,
	/* An argument is wrong, or there are too many registrations (64 at a time). */
	CKPT_INVALID = -6,
	/* The system refuses: no thread can be made, no signal be queued, or the process is not dumpable. */
	CKPT_SYSTEM = -7
};

/* What a restored process is told of itself. */
struct ckpt_restored {
	/* sizeof(struct ckpt_restored), set by the caller of ckpt_get_restored(). */
	size_t size;
	/* How many restores lie between the start of the program (its execve) and now; 0: it was never restored. */
	uint32_t restores;
	/* How many times the checkpoint had been restored, this time included. From 2 on this process is a copy: another one
	 * has the same memory, the same identifiers and the same state of random generators, or has had. */
	uint32_t of_checkpoint;
	/* Which of the copies that were restored together (ckpt restore --copies) it is, from 1, and how many there are; both 0
	 * if it was restored alone. */
	uint32_t copy;
	uint32_t copies;
	/* Number of the checkpoint, 0 if it has none (ckpt dump --dir). */
	uint64_t checkpoint;
	/* Name of the job now. It may be another one than before. */
	char name[80];
};

/*
 * What is to be called, any of it may be NULL. Callbacks run in a thread of their own, called ckpt-hooks, in which all
 * signals are blocked; the other threads of the program run on meanwhile. Each on_dump is followed by exactly one
 * on_resume or on_restore.
 */
struct ckpt_hooks {
	/* sizeof(struct ckpt_hooks). */
	size_t size;
	/* Handed to each callback. */
	void *user;
	/* A dump is about to be made. Anything but 0 asks for it not to be made now. It is waited for as long as
	 * ckpt dump --barrier-timeout says; then the dump is made all the same, or given up with --strict. */
	int (*on_dump)(void *user);
	/* The dump has been made, or has failed, and the job goes on. */
	void (*on_resume)(void *user);
	/* This is a restored job. */
	void (*on_restore)(void *user, const struct ckpt_restored *restored);
};

/* --- How the calls are found; nothing to use directly. --- */

#if defined(__GNUC__) && defined(__linux__)
#define CKPT_FOUND_AT_RUN_TIME_ 1
/* Another name for dlsym, which is null where it is not linked. */
static void *ckpt_dlsym_(void *, const char *) __attribute__((weakref("dlsym")));
#endif

typedef void (*ckpt_function_)(void);

/* Stands for what was looked for in vain. */
static inline void ckpt_absent_(void)
{
}

static inline ckpt_function_ ckpt_find_(const char *name, ckpt_function_ *found)
{
#ifdef CKPT_FOUND_AT_RUN_TIME_
	ckpt_function_ function = __atomic_load_n(found, __ATOMIC_RELAXED);

	if (!function && ckpt_dlsym_) {
		union {
			void *data;
			ckpt_function_ function;
		} symbol;

		/* A null handle is RTLD_DEFAULT: all that is loaded. */
		symbol.data = ckpt_dlsym_((void *)0, name);
		function = symbol.function ? symbol.function : ckpt_absent_;
		__atomic_store_n(found, function, __ATOMIC_RELAXED);
	}
	return function == ckpt_absent_ ? (ckpt_function_)0 : function;
#else
	(void)name;
	(void)found;
	return (ckpt_function_)0;
#endif
}

/* --- The calls. --- */

/*
 * Registers callbacks; *hooks is copied. on_dump is called in reverse order of registration, the others in order. The first
 * registration starts the thread. Returns a number from 1 for ckpt_hooks_unregister, or CKPT_NOT_UNDER_CKPT,
 * CKPT_INVALID, CKPT_SYSTEM.
 *
 * A forked child has no registrations; it makes its own, from where it was forked or with pthread_atfork(3).
 */
static inline int ckpt_hooks_register(const struct ckpt_hooks *hooks)
{
	static ckpt_function_ found;
	int (*call)(const struct ckpt_hooks *) =
		(int (*)(const struct ckpt_hooks *))ckpt_find_("ckpt_interceptor_hooks_register", &found);

	return call ? call(hooks) : CKPT_NOT_UNDER_CKPT;
}

/*
 * Takes a registration back. When it returns, no callback of it runs any more, unless it is called by one. Returns CKPT_OK,
 * CKPT_INVALID without such a registration, CKPT_NOT_UNDER_CKPT.
 */
static inline int ckpt_hooks_unregister(int number)
{
	static ckpt_function_ found;
	int (*call)(int) = (int (*)(int))ckpt_find_("ckpt_interceptor_hooks_unregister", &found);

	return call ? call(number) : CKPT_NOT_UNDER_CKPT;
}

/*
 * Begins a critical section of the calling thread: until its end no dump is made, whatever ckpt dump was told; one that is asked for
 * waits, and is refused after --barrier-timeout, naming the process and the section. If a dump is being made already, this
 * call waits until that is over. Sections nest. They end with their thread, however that ends (with more than 64 threads of a
 * process in sections at a time, one beyond these that ends in its section still holds off dumps); a forked child is in none.
 * name is for messages, may be NULL, and is cut to 31 bytes. Returns CKPT_OK, CKPT_NOT_UNDER_CKPT.
 *
 * Signal handlers may begin and end sections, if they end what they begin and don't leave by siglongjmp(3). Each of the two calls
 * must have been made before outside of a handler, in the same source file: the first one looks for the function, by dlsym(3).
 */
static inline int ckpt_critical_begin(const char *name)
{
	static ckpt_function_ found;
	int (*call)(const char *) =
		(int (*)(const char *))ckpt_find_("ckpt_interceptor_critical_begin", &found);

	return call ? call(name) : CKPT_NOT_UNDER_CKPT;
}

/* Ends it. Returns CKPT_OK, CKPT_NOT_HERE if the thread is in none, CKPT_NOT_UNDER_CKPT. */
static inline int ckpt_critical_end(void)
{
	static ckpt_function_ found;
	int (*call)(void) = (int (*)(void))ckpt_find_("ckpt_interceptor_critical_end", &found);

	return call ? call() : CKPT_NOT_UNDER_CKPT;
}

/*
 * "Dump me now": asks for a dump of the whole job and waits for it, at most timeout_ms milliseconds (0: without end).
 * It returns once in the job that goes on, with CKPT_DUMPED, and once more in each job that is restored from the checkpoint,
 * with CKPT_RESTORED. Otherwise it returns one of the negative values, and there is no checkpoint that it knows of.
 * *checkpoint gets the number of the checkpoint in both cases; it may be NULL.
 */
static inline int ckpt_dump_now(uint32_t timeout_ms, uint64_t *checkpoint)
{
	static ckpt_function_ found;
	int (*call)(uint32_t, uint64_t *) =
		(int (*)(uint32_t, uint64_t *))ckpt_find_("ckpt_interceptor_dump_now", &found);

	return call ? call(timeout_ms, checkpoint) : CKPT_NOT_UNDER_CKPT;
}

/* Fills *restored, of which size is set. Returns CKPT_OK, also if restores is 0; CKPT_INVALID, CKPT_NOT_UNDER_CKPT. */
static inline int ckpt_get_restored(struct ckpt_restored *restored)
{
	static ckpt_function_ found;
	int (*call)(struct ckpt_restored *) =
		(int (*)(struct ckpt_restored *))ckpt_find_("ckpt_interceptor_restored", &found);

	return call ? call(restored) : CKPT_NOT_UNDER_CKPT;
}

/* How many restores lie between the start of the program (its execve) and now; CKPT_NOT_UNDER_CKPT. */
static inline int ckpt_restore_count(void)
{
	struct ckpt_restored restored;
	int result;

	restored.size = sizeof(restored);
	result = ckpt_get_restored(&restored);
	return result == CKPT_OK ? (int)restored.restores : result;
}

#ifdef __cplusplus
}
#endif

#endif /* CKPT_HOOKS_H */
