// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * One attribute of a process, named by the second argument. It is set in a child only, so that one is restored per process
 * and not for all; the first process must keep what it had.
 */
#include "guest.h"
#include <grp.h>
#include <linux/securebits.h>
#include <sched.h>
#include <sys/fsuid.h>
#include <sys/personality.h>
#include <sys/utsname.h>

struct attribute {
	const char *name;
	/* In the child. */
	void (*set)(void);
	/* In both, what must not change; not every attribute has one number. */
	long (*get)(void);
	/* In the child after go: that it still works. */
	void (*check)(void);
};

static long get_personality(void)
{
	return personality(0xffffffff);
}

static void set_personality(void)
{
	MUST(personality(ADDR_NO_RANDOMIZE | UNAME26));
}

static void check_personality(void)
{
	struct utsname name;

	MUST(uname(&name));
	EXPECT(!strncmp(name.release, "2.6.", 4));
}

static long get_no_new_privs(void)
{
	return MUST(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
}

static void set_no_new_privs(void)
{
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

static long get_dumpable(void)
{
	return MUST(prctl(PR_GET_DUMPABLE));
}

static void set_dumpable(void)
{
	MUST(prctl(PR_SET_DUMPABLE, 0));
}

static long get_subreaper(void)
{
	int is_subreaper = 0;

	MUST(prctl(PR_GET_CHILD_SUBREAPER, &is_subreaper));
	return is_subreaper;
}

static void set_subreaper(void)
{
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
}

static long get_umask(void)
{
	mode_t mask = umask(0);

	umask(mask);
	return mask;
}

static void set_umask(void)
{
	umask(0137);
}

static void check_umask(void)
{
	char path[PATH_MAX];
	struct stat stat;

	int fd = MUST(open(guest_path(path, sizeof(path), "masked"), O_CREAT | O_EXCL | O_WRONLY, 0777));
	MUST(fstat(fd, &stat));
	EXPECT_EQ("mode of a new file", 0640, stat.st_mode & 07777);
}

static void set_cwd(void)
{
	char path[PATH_MAX];

	MUST(mkdir(guest_path(path, sizeof(path), "here"), 0755));
	MUST(chdir(path));
	MUST(mkdir("below", 0755));
}

static void check_cwd(void)
{
	char path[PATH_MAX], got[PATH_MAX];

	EXPECT(getcwd(got, sizeof(got)));
	EXPECT_STR("cwd", guest_path(path, sizeof(path), "here"), got);
	MUST(access("below", X_OK));
}

static void set_root(void)
{
	char path[PATH_MAX];

	MUST(mkdir(guest_path(path, sizeof(path), "inside"), 0755));
	MUST(chroot(guest.workdir));
	MUST(chdir("/inside"));
	/* From now on the work directory is the root. */
	guest.workdir[0] = 0;
}

static void check_root(void)
{
	char got[PATH_MAX];

	EXPECT(getcwd(got, sizeof(got)));
	EXPECT_STR("cwd in the new root", "/inside", got);
	MUST(access("/go", F_OK));
	EXPECT(access("/proc/self", F_OK) < 0);
	MUST(access("../../../go", F_OK));
}

static long get_keepcaps(void)
{
	return MUST(prctl(PR_GET_KEEPCAPS));
}

static void set_keepcaps(void)
{
	MUST(prctl(PR_SET_KEEPCAPS, 1));
}

static long get_securebits(void)
{
	return MUST(prctl(PR_GET_SECUREBITS));
}

static void set_securebits(void)
{
	MUST(prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE));
}

static long get_timer_slack(void)
{
	return MUST(prctl(PR_GET_TIMERSLACK));
}

static void set_timer_slack(void)
{
	MUST(prctl(PR_SET_TIMERSLACK, 123456));
}

static long get_thp_disable(void)
{
	return MUST(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0));
}

static void set_thp_disable(void)
{
	MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
}

static long get_oom_score_adj(void)
{
	char text[32];

	guest_read_file("/proc/self/oom_score_adj", text, sizeof(text));
	return atol(text);
}

static void set_oom_score_adj(void)
{
	int fd = MUST(open("/proc/self/oom_score_adj", O_WRONLY));

	/* More readily killed: that needs no privilege. */
	MUST(dprintf(fd, "%ld", get_oom_score_adj() / 2 + 321));
	close(fd);
}

static long get_fsuid(void)
{
	return (long)setfsgid(-1) << 32 | (unsigned)setfsuid(-1);
}

static void set_credentials(void)
{
	gid_t groups[] = { 5, 7, 1001 };

	MUST(setgroups(3, groups));
	MUST(setresgid(11, 12, 13));
	setfsgid(14);
	/* Last, as it takes the privilege away. */
	MUST(setresuid(21, 22, 23));
}

static void check_credentials(void)
{
	uid_t ids[3];
	gid_t groups[8];

	EXPECT_EQ("groups", 3, getgroups(8, groups));
	EXPECT_EQ("first group", 5, groups[0]);
	EXPECT_EQ("second group", 7, groups[1]);
	EXPECT_EQ("third group", 1001, groups[2]);
	MUST(getresgid(&ids[0], &ids[1], &ids[2]));
	for (int i = 0; i < 3; i++)
		EXPECT_EQ("gid (real, effective, saved)", 11 + i, ids[i]);
	MUST(getresuid(&ids[0], &ids[1], &ids[2]));
	for (int i = 0; i < 3; i++)
		EXPECT_EQ("uid (real, effective, saved)", 21 + i, ids[i]);
}

/* Effective, permitted, inheritable, bounding and ambient sets. */
static char capabilities_before[5][32];

static void look_at_capabilities(char sets[5][32])
{
	static const char *const names[5] = { "CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb" };

	for (int i = 0; i < 5; i++)
		guest_field("/proc/self/status", names[i], sets[i], 32);
}

static void set_capabilities(void)
{
	struct {
		uint32_t version;
		int pid;
	} header = { 0x20080522, 0 };
	struct {
		uint32_t effective, permitted, inheritable;
	} data[2] = { 0 };
	enum { CHOWN = 0, FOWNER = 3, NET_RAW = 13, SYS_TIME = 25 };

	MUST(prctl(PR_CAPBSET_DROP, SYS_TIME, 0, 0, 0));
	MUST(syscall(SYS_capget, &header, data));
	data[0].inheritable = 1 << CHOWN | 1 << FOWNER;
	data[0].permitted &= ~(1u << NET_RAW);
	data[0].effective = data[0].permitted & ~(1u << CHOWN);
	MUST(syscall(SYS_capset, &header, data));
	MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, FOWNER, 0, 0));
	look_at_capabilities(capabilities_before);
}

static void check_capabilities(void)
{
	char now[5][32];

	look_at_capabilities(now);
	for (int i = 0; i < 5; i++)
		EXPECT_STR("capabilities (eff, prm, inh, bnd, amb)", capabilities_before[i], now[i]);
}

/* A parent's death sends the signal that the child asked for: the child is made below one who leaves. */
static volatile bool *told;

static long get_pdeathsig(void)
{
	int signal = 0;

	MUST(prctl(PR_GET_PDEATHSIG, &signal));
	return signal;
}

static void set_pdeathsig(void)
{
	int channel[2];
	char byte;

	MUST(pipe(channel));
	if (!MUST(fork())) {
		sigset_t set;
		struct timespec patience = { 20, 0 };

		sigemptyset(&set);
		sigaddset(&set, SIGUSR2);
		MUST(sigprocmask(SIG_BLOCK, &set, NULL));
		MUST(prctl(PR_SET_PDEATHSIG, SIGUSR2));
		MUST(write(channel[1], "x", 1));
		close(channel[0]);
		close(channel[1]);
		guest_wait_go();
		EXPECT_EQ("pdeathsig", SIGUSR2, get_pdeathsig());
		told[0] = true;
		int got = sigtimedwait(&set, NULL, &patience);
		if (got != SIGUSR2)
			guest_fail("no signal when the parent died, but %d (%s)", got, strerror(errno));
		told[1] = true;
		_exit(0);
	}
	EXPECT_EQ("word of the grandchild", 1, read(channel[0], &byte, 1));
	close(channel[0]);
	close(channel[1]);
}

/* The child leaves when this returns; the first process awaits what the grandchild has to tell. */
static void check_pdeathsig(void)
{
	while (!told[0] && !guest_exists("result"))
		guest_nap();
}

/* Children whose end is told by another signal, or by none. */
static pid_t odd_children[2];
static const int exit_signals[2] = { SIGUSR1, 0 };

static void set_exit_signal(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGCHLD);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	for (int i = 0; i < 2; i++) {
		odd_children[i] = MUST(syscall(SYS_clone, exit_signals[i], 0, 0, 0, 0));
		if (!odd_children[i]) {
			guest_wait_go();
			_exit(50 + i);
		}
	}
}

static void check_exit_signal(void)
{
	sigset_t pending;

	errno = 0;
	EXPECT_EQ("an ordinary wait sees them", -1, waitpid(-1, NULL, 0));
	EXPECT_EQ("errno", ECHILD, errno);
	for (int i = 0; i < 2; i++) {
		int status;

		EXPECT_EQ("clone child", odd_children[i], waitpid(odd_children[i], &status, __WCLONE));
		EXPECT_EQ("its status", (50 + i) << 8, status);
	}
	MUST(sigpending(&pending));
	EXPECT_EQ("SIGUSR1 pending", 1, sigismember(&pending, SIGUSR1));
	EXPECT_EQ("SIGCHLD pending", 0, sigismember(&pending, SIGCHLD));
}

/* Two processes with one working directory, root and umask. */
static pid_t fs_sharer;

static void set_shared_fs(void)
{
	char path[PATH_MAX];

	MUST(mkdir(guest_path(path, sizeof(path), "elsewhere"), 0755));
	fs_sharer = MUST(syscall(SYS_clone, CLONE_FS | SIGCHLD, 0, 0, 0, 0));
	if (!fs_sharer) {
		guest_wait_go();
		MUST(chdir(path));
		umask(0123);
		_exit(0);
	}
}

static void check_shared_fs(void)
{
	char path[PATH_MAX], got[PATH_MAX];

	EXPECT_EQ("the sharer's verdict", 0, guest_reap(fs_sharer));
	EXPECT(getcwd(got, sizeof(got)));
	EXPECT_STR("cwd that the other changed", guest_path(path, sizeof(path), "elsewhere"), got);
	EXPECT_EQ("umask that the other changed", 0123, get_umask());
}

static const struct attribute attributes[] = {
	{ "personality", set_personality, get_personality, check_personality },
	{ "no_new_privs", set_no_new_privs, get_no_new_privs, NULL },
	{ "dumpable", set_dumpable, get_dumpable, NULL },
	{ "subreaper", set_subreaper, get_subreaper, NULL },
	{ "umask", set_umask, get_umask, check_umask },
	{ "cwd", set_cwd, NULL, check_cwd },
	{ "root", set_root, NULL, check_root },
	{ "keepcaps", set_keepcaps, get_keepcaps, NULL },
	{ "securebits", set_securebits, get_securebits, NULL },
	{ "timer_slack", set_timer_slack, get_timer_slack, NULL },
	{ "thp_disable", set_thp_disable, get_thp_disable, NULL },
	{ "oom_score_adj", set_oom_score_adj, get_oom_score_adj, NULL },
	{ "credentials", set_credentials, get_fsuid, check_credentials },
	{ "capabilities", set_capabilities, NULL, check_capabilities },
	{ "pdeathsig", set_pdeathsig, NULL, check_pdeathsig },
	{ "exit_signal", set_exit_signal, NULL, check_exit_signal },
	{ "shared_fs", set_shared_fs, NULL, check_shared_fs },
};

int main(int argc, char **argv)
{
	const struct attribute *attribute = NULL;
	int channel[2];
	char byte;

	guest_begin(argc, argv);
	for (size_t i = 0; i < sizeof(attributes) / sizeof(*attributes); i++)
		if (argc == 3 && !strcmp(argv[2], attributes[i].name))
			attribute = &attributes[i];
	if (!attribute)
		guest_fail("no attribute is called %s", argc == 3 ? argv[2] : "nothing");
	/* A child that is someone else must be able to say what is wrong. */
	MUST(chmod(guest.workdir, 0777));
	long first = attribute->get ? attribute->get() : 0;
	told = guest_shared(4096);
	MUST(pipe(channel));
	pid_t child = MUST(fork());
	if (!child) {
		attribute->set();
		long before = attribute->get ? attribute->get() : 0;
		if (attribute->get)
			EXPECT(before != first);
		MUST(write(channel[1], "x", 1));
		close(channel[0]);
		close(channel[1]);
		guest_wait_go();
		if (attribute->get)
			EXPECT_EQ(attribute->name, before, attribute->get());
		if (attribute->check)
			attribute->check();
		_exit(0);
	}
	close(channel[1]);
	EXPECT_EQ("word of the child", 1, read(channel[0], &byte, 1));
	close(channel[0]);
	guest_ready();
	guest_wait_go();
	if (attribute->get)
		EXPECT_EQ("the first process", first, attribute->get());
	EXPECT_EQ("the child's verdict", 0, guest_reap(child));
	if (attribute->set == set_pdeathsig)
		while (!told[1] && !guest_exists("result"))
			guest_nap();
	guest_ok();
}
