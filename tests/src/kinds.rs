// SPDX-License-Identifier: MIT OR Apache-2.0
//! The names of the kernel resources as the engine's registry has them: the values that `CKPT_TEST_SKIP_RESTORE` takes
//! in a ckpt built with the feature `test-hooks`. This is the one place of the tests that spells them; a unit test
//! compares them with the registry.

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        $($(#[$doc])* pub const $name: &str = $text;)*
        /// All of them.
        pub const ALL: &[&str] = &[$($name,)*];
    };
}

kinds! {
    /// What belongs to the whole job, such as its clocks.
    JOB = "job";
    /// The tree: parents, sessions, process groups, zombies, stopped processes.
    PROCESS = "process";
    /// Registers, thread-local storage, tid addresses, robust lists, names.
    THREAD = "thread";
    /// Signal actions.
    SIGNAL = "signal";
    /// Signals that wait for delivery.
    PENDING_SIGNAL = "pending_signal";
    /// Interval and POSIX timers.
    TIMER = "timer";
    /// Mappings and their private contents.
    MEMORY_MAP = "memory_map";
    /// Shared memory, memfds, deleted files.
    SHARED_OBJECT = "shared_object";
    /// Users, groups, capabilities, securebits, no_new_privs, parent-death signals.
    CREDENTIAL = "credential";
    /// Resource limits.
    LIMIT = "limit";
    /// Working directory, root and umask.
    FS_CONTEXT = "fs_context";
    /// Policy, priority, niceness, affinity, timer slack.
    SCHEDULER = "scheduler";
    /// personality(2), dumpable, subreaper, oom_score_adj.
    ATTRIBUTE = "attribute";
    /// Restartable sequences.
    RSEQ = "rseq";
    /// The job's private /dev/shm.
    SHM_FILE = "shm_file";
    /// System V semaphore sets.
    SYSV_SEMAPHORE = "sysv_semaphore";
    /// Contexts of asynchronous I/O.
    AIO = "aio";
    /// Content of files that are written.
    SAVED_FILE = "saved_file";
    /// Descriptor tables.
    FD_TABLE = "fd_table";
    /// Regular files.
    REGULAR_FILE = "regular_file";
    /// Open directories.
    DIRECTORY = "directory";
    /// Character devices such as /dev/null.
    CHAR_DEVICE = "char_device";
    /// Pipes.
    PIPE = "pipe";
    /// Named pipes.
    FIFO = "fifo";
    /// Event counters.
    EVENTFD = "eventfd";
    /// Epoll sets.
    EPOLL = "epoll";
    /// Unix sockets.
    UNIX_SOCKET = "unix_socket";
    /// TCP sockets.
    TCP_SOCKET = "tcp_socket";
    /// Terminals.
    TTY = "tty";
    /// Descriptors inherited from outside the job.
    EXTERNAL = "external";
    /// flock and POSIX locks.
    FILE_LOCK = "file_lock";
    /// Signals as descriptors.
    SIGNALFD = "signalfd";
    /// Timers as descriptors.
    TIMERFD = "timerfd";
    /// inotify instances.
    INOTIFY = "inotify";
}

/// memfds are shared objects.
pub const MEMFD: &str = SHARED_OBJECT;

#[cfg(test)]
mod tests {
    #[test]
    fn are_those_of_the_registry() {
        let mut registered: Vec<&str> = ckpt_engine::kind::Kind::ALL.iter().map(|kind| kind.name()).collect();
        let mut ours = super::ALL.to_vec();
        registered.sort_unstable();
        ours.sort_unstable();
        assert_eq!(registered, ours);
    }
}
