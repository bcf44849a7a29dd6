// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kinds of records. Numbers are part of the image format: never reuse one.

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// A kind of kernel resource.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// All kinds.
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            /// The name used in messages.
            pub fn name(self) -> &'static str {
                match self { $(Kind::$name => $text,)* }
            }

            /// The kind with this number.
            pub fn from_number(n: u16) -> Option<Kind> {
                match n { $($number => Some(Kind::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    /// The job as a whole.
    Job = 1, "job";
    /// The process tree.
    Process = 2, "process";
    /// Registers and per-thread addresses.
    Thread = 3, "thread";
    /// Signal actions and masks.
    Signal = 4, "signal";
    /// Queued signals.
    PendingSignal = 5, "pending_signal";
    /// Interval and POSIX timers.
    Timer = 6, "timer";
    /// Mappings and private memory.
    MemoryMap = 7, "memory_map";
    /// Shared memory objects, memfds and deleted files.
    SharedObject = 8, "shared_object";
    /// User and group ids, capabilities.
    Credential = 9, "credential";
    /// Resource limits.
    Limit = 10, "limit";
    /// Working directory, root, umask.
    FsContext = 11, "fs_context";
    /// Scheduling policy, nice, affinity.
    Scheduler = 12, "scheduler";
    /// prctl(2) attributes, personality, oom_score_adj.
    Attribute = 13, "attribute";
    /// Restartable sequences.
    Rseq = 14, "rseq";
    /// Content of the job's /dev/shm.
    ShmFile = 15, "shm_file";
    /// System V semaphore sets.
    SysvSemaphore = 16, "sysv_semaphore";
    /// Contexts of asynchronous I/O.
    Aio = 17, "aio";
    /// Content of files that the job is writing.
    SavedFile = 24, "saved_file";
    /// Descriptor tables.
    FdTable = 32, "fd_table";
    /// Regular files.
    RegularFile = 33, "regular_file";
    /// Directories.
    Directory = 34, "directory";
    /// Character devices without state.
    CharDevice = 35, "char_device";
    /// Pipes.
    Pipe = 36, "pipe";
    /// Named pipes.
    Fifo = 37, "fifo";
    /// eventfd(2).
    Eventfd = 38, "eventfd";
    /// epoll(7).
    Epoll = 39, "epoll";
    /// Unix socket pairs.
    UnixSocket = 40, "unix_socket";
    /// The job's terminal.
    Tty = 41, "tty";
    /// Descriptors from outside the job.
    External = 42, "external";
    /// File locks.
    FileLock = 43, "file_lock";
    /// signalfd(2).
    Signalfd = 44, "signalfd";
    /// timerfd_create(2).
    Timerfd = 45, "timerfd";
    /// TCP sockets.
    TcpSocket = 46, "tcp_socket";
    /// inotify(7).
    Inotify = 47, "inotify";
}
