// SPDX-License-Identifier: MIT OR Apache-2.0
//! The names of the kernel resources as the engine's registry has them: the values that `CKPT_TEST_SKIP_RESTORE` takes
//! in a ckpt built with the feature `test-hooks`. This is the one place of the tests that spells them.

/// Parents, names, argument areas and the other attributes of a process.
pub const PROCESS: &str = "process";
/// Registers, thread-local storage, tid addresses, robust lists.
pub const THREAD: &str = "thread";
/// Signal actions, masks and alternate stacks.
pub const SIGNAL: &str = "signal";
/// Signals that wait for delivery.
pub const PENDING_SIGNAL: &str = "pending_signal";
/// Interval and POSIX timers.
pub const TIMER: &str = "timer";
/// Mappings and their contents.
pub const MEMORY_MAP: &str = "memory_map";
/// Users, groups, capabilities and securebits.
pub const CREDENTIAL: &str = "credential";
/// Resource limits.
pub const LIMIT: &str = "limit";
/// Sessions and process groups.
pub const SESSION: &str = "session";
/// The namespaces of a job.
pub const NAMESPACE: &str = "namespace";
/// Offsets of the monotonic and boottime clocks.
pub const CLOCK: &str = "clock";
/// Working directory, root and umask.
pub const CWD_ROOT: &str = "cwd_root";
/// Policy, priority, niceness, affinity.
pub const SCHEDULER: &str = "scheduler";
/// Restartable sequences.
pub const RSEQ: &str = "rseq";
/// Descriptor tables.
pub const FD_TABLE: &str = "fd_table";
/// Regular files.
pub const REGULAR_FILE: &str = "regular_file";
/// Open directories.
pub const DIRECTORY: &str = "directory";
/// Character devices such as /dev/null.
pub const CHAR_DEVICE: &str = "char_device";
/// Pipes.
pub const PIPE: &str = "pipe";
/// Named pipes.
pub const FIFO: &str = "fifo";
/// Event counters.
pub const EVENTFD: &str = "eventfd";
/// Epoll sets.
pub const EPOLL: &str = "epoll";
/// Unix sockets.
pub const UNIX_SOCKET: &str = "unix_socket";
/// Anonymous memory files.
pub const MEMFD: &str = "memfd";
/// Terminals.
pub const TTY: &str = "tty";
/// Descriptors inherited from outside the job.
pub const EXTERNAL: &str = "external";
/// flock and POSIX locks.
pub const FILE_LOCK: &str = "file_lock";
