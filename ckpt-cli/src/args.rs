// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line. The texts here are the manual: `ckpt help COMMAND` shows them.

use std::ffi::OsString;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use ckpt_job::JobName;
use ckpt_job::policy::{DumpOn, Recover, Span, Threshold};
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXIT_CODES: &str = "\
Exit status:
  run, wait, attach and restore in the foreground end with the job's status: the code of its main
  process, or 128+n if signal n killed it. ckpt's own:
    0    done
    1    failure (125 in the commands that end with a job's status)
    2    wrong usage
    112  not found: no such job, checkpoint or file
    113  conflict: a name, file or checkpoint is in use, a file has changed, another dump is going on
    114  refused: the job holds something that ckpt does not support; the job goes on
    115  corrupt: the image is damaged, or was made by a newer ckpt
    116  this host cannot: see `ckpt doctor`
    117  no space, or a store that cannot be written to
    118  saved: a dump ended the job (--dump-on SIGNAL:stop, dump --stop); `ckpt run --resume` goes on
    119  late: a process did not come to a safe point in time (dump --strict); the job goes on
    126  the command of `run` could not be executed
    127  the command of `run` was not found";

/// Checkpoint and restore for applications of many processes, unmodified.
///
/// `ckpt run` starts an application as a job, `ckpt dump` saves all of it while it goes on, and `ckpt restore` brings it back
/// later, here or on another host, after a crash, a reboot or a kill -9. No privilege is needed.
#[derive(Debug, Parser)]
#[command(name = "ckpt", version, after_help = EXIT_CODES, disable_help_subcommand = false, max_term_width = 100)]
pub struct Cli {
    /// Show no progress, even on a terminal.
    #[arg(long, short, global = true)]
    pub quiet: bool,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Run(RunArgs),
    Dump(DumpArgs),
    Restore(RestoreArgs),
    Ps(PsArgs),
    List(ListArgs),
    Inspect(InspectArgs),
    Verify(VerifyArgs),
    Kill(KillArgs),
    Wait(WaitArgs),
    Supervise(SuperviseArgs),
    Attach(AttachArgs),
    Rm(RmArgs),
    Squash(SquashArgs),
    Check(CheckArgs),
    Doctor(DoctorArgs),
}

/// Where checkpoints and logs are kept.
#[derive(Debug, Args)]
pub struct StoreArg {
    /// Directory for checkpoints and logs. May be on a network file system and shared by hosts.
    ///
    /// Default: $CKPT_STORE, else $XDG_STATE_HOME/ckpt, else ~/.local/state/ckpt.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}

/// Start an application as a job
///
/// The application runs as the same user with the same files, in namespaces of its own: its process ids, host name, System V IPC,
/// clocks, /proc, /dev/shm and terminals are private, so that a restore can give it the same ones again.
///
/// It finds everything else as if started without ckpt: environment, working directory, limits and open file descriptors.
/// (LD_PRELOAD gets ckpt's interceptor in front; see --no-interceptor.)
///
/// In the foreground, `ckpt run` stays until COMMAND ends, and ends with its status. Signals sent to it reach the job. Killing it
/// with SIGKILL does not: the job goes on. Processes that COMMAND leaves behind go on in the job, too; `ckpt ps` shows
/// it until the last one has ended.
///
/// If stdin and stdout are a terminal, the job gets a terminal of its own and ckpt passes everything through: keys, among them Ctrl-C
/// and Ctrl-Z, and the window's size.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct RunArgs {
    /// Name of the job: letters, digits, '.', '_', '-'. Without it one is made up and printed.
    #[arg(long, short, value_name = "NAME")]
    pub name: Option<JobName>,

    #[command(flatten)]
    pub store: StoreArg,

    /// Start the job and return at once.
    ///
    /// Its output goes to a log file, shown by `ckpt ps --json`; its stdin is empty (with --tty: the terminal, see `ckpt attach`).
    #[arg(long, short)]
    pub detach: bool,

    /// Give the job a terminal of its own, whatever stdin and stdout are.
    #[arg(long, short, overrides_with = "no_tty")]
    pub tty: bool,

    /// Give the job no terminal; it has stdin, stdout and stderr as they are.
    #[arg(long, overrides_with = "tty")]
    pub no_tty: bool,

    /// Do not preload ckpt's library into the job's programs.
    ///
    /// The job can be dumped all the same. Needed by programs that
    /// refuse preloaded libraries, such as those built with AddressSanitizer.
    #[arg(long)]
    pub no_interceptor: bool,

    /// Go on from the newest checkpoint of this name, or start COMMAND if there is none.
    ///
    /// The one line for a batch script or a service that may be started again at any time. Checkpoints that are damaged are skipped with a
    /// warning. Everything else that stands in the way is an error, never a fresh start: a running job of this name, files that have changed
    /// (see --files), a host that cannot restore the checkpoint.
    #[arg(long, requires = "name")]
    pub resume: bool,

    /// With --resume, and for recoveries: what to do about files that have changed since the dump; see `ckpt restore`.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub files: Option<FilesPolicy>,

    /// Every dump of the job saves the content of files that it has open for writing; --resume and recoveries put them back.
    ///
    /// See `ckpt dump --with-files` and `ckpt restore --rollback-files`. For a job whose files must fit its memory, such as a database.
    #[arg(long)]
    pub with_files: bool,

    /// What every dump of the job does about TCP connections, unless it says something else; see `ckpt dump`.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub tcp: Option<TcpChoice>,

    #[command(flatten)]
    pub supervision: SupervisionArgs,

    /// The hidden side of recoveries: the job's supervisor starts it again.
    #[arg(long, hide = true, value_name = "FD")]
    pub by_supervisor: Option<i32>,

    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// What `ckpt run` has done with a job on its own.
#[derive(Debug, Args)]
#[command(next_help_heading = "Long jobs")]
pub struct SupervisionArgs {
    /// Dump the job at this interval: 30s, 10m, 2h, 1h30m.
    ///
    /// Counted from the start of the job and from the end of each dump of this kind. A dump that fails is said in the job's log and in
    /// `ckpt ps`, and tried again after the same time.
    ///
    /// This, and all that follows, is the work of a supervisor: a process beside the job that outlives the terminal and `ckpt run`. If it
    /// is killed, the job goes on and `ckpt ps` shows it as unsupervised; `ckpt supervise NAME` starts another.
    #[arg(long, value_name = "DURATION")]
    pub every: Option<Span>,

    /// Keep the newest N checkpoints of this name and remove older ones, each time a dump by the supervisor is complete.
    ///
    /// Never removed is what a kept incremental checkpoint needs. With --incremental, up to 8 older ones stay for that, then a kept
    /// one is squashed, beside the job (see `ckpt rm --keep`).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep: Option<u32>,

    /// How these dumps compress memory; see `ckpt dump`.
    #[arg(long, value_enum, value_name = "METHOD")]
    pub compress: Option<Compression>,

    /// Each of these dumps stores only what has changed since the one before; see `ckpt dump --incremental`.
    #[arg(long)]
    pub incremental: bool,

    /// How these dumps keep memory while it is written; see `ckpt dump`.
    #[arg(long, value_enum, value_name = "ENGINE")]
    pub engine: Option<EngineChoice>,

    /// Bytes a second that these dumps, and squashing for --keep, write at most; see `ckpt dump`.
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    pub io_limit: Option<NonZeroU64>,

    /// Each of these dumps brings what the job has written to files to the disk, too; see `ckpt dump`.
    #[arg(long)]
    pub flush: bool,

    /// Dump the job when this signal is sent to it; with ":stop", end it after the dump.
    ///
    /// For the notice before a time limit or before a spot instance is taken away. The signal counts whether it is sent to `ckpt run`, by
    /// `ckpt kill`, to the job's init (its PID in `ckpt ps`) or to its supervisor, and does not reach the job. With ":stop" the dump is
    /// tried until it succeeds, and `ckpt run` and `ckpt wait` end with status 118. May be given several times.
    ///
    /// "request" instead of a signal: whenever the application asks for it (ckpt_dump_now in ckpt-hooks.h).
    #[arg(long, value_name = "SIGNAL[:stop]", value_parser = parse_dump_on)]
    pub dump_on: Vec<DumpOn>,

    /// Dump the job whenever it has used up so much since its last dump of this kind, or a file has changed.
    ///
    /// cpu:DURATION: CPU time of all its processes. written:SIZE: bytes that it caused to be written to storage (not to tmpfs).
    /// sent:SIZE: bytes that it sent over TCP (a dump that is refused because a
    /// connection is open is tried again every 10 seconds); what connections sent in the last second before they were closed is not seen.
    /// changed:PATH: PATH appeared, was replaced, or has another length or modification time. Looked at once a second. May be given several times.
    #[arg(long, value_name = "WHAT:AMOUNT")]
    pub dump_at: Vec<Threshold>,

    /// Dump the job whenever this shell command succeeds; see --probe-every.
    ///
    /// It runs outside the job, in the directory and environment of `ckpt run`, with the job's name in CKPT_JOB and the pid of its
    /// init in CKPT_INIT_PID.
    #[arg(long, value_name = "CMD")]
    pub dump_when: Option<String>,

    /// Start the job again when it fails: from its newest checkpoint, or anew if there is none.
    ///
    /// on-failure: its main process ended by a signal (the kernel's OOM killer among them) or with a status other than 0, all of it was killed,
    /// or --health or --hang-after say that it is not well. on-abnormal: the same, but for a status other than 0.
    ///
    /// Not a failure is what follows from TERM, INT, QUIT or KILL sent by `ckpt kill` or `ckpt run`, from the keys of the job's terminal,
    /// and from `dump --stop`.
    ///
    /// At most MAX times in a row (10) without a new checkpoint in between. A checkpoint that is damaged is skipped for an older one, and so is
    /// one that the job has failed from twice without making another. `ckpt run` in the foreground stays through all recoveries.
    #[arg(long, value_name = "on-failure|on-abnormal[:MAX]")]
    pub recover: Option<Recover>,

    /// How long to wait before the first recovery; doubles with each further one, up to 5 minutes.
    #[arg(long, value_name = "DURATION", default_value = "1s", requires = "recover")]
    pub recover_delay: Span,

    /// A shell command that fails when the job is not well: it is then ended and recovered.
    ///
    /// Runs as that of --dump-when. Not run while a dump is made.
    #[arg(long, value_name = "CMD", requires = "recover")]
    pub health: Option<String>,

    /// How often in a row it has to fail, or to take longer than --probe-timeout.
    #[arg(long, value_name = "N", default_value_t = 3, requires = "health", value_parser = clap::value_parser!(u32).range(1..))]
    pub health_failures: u32,

    /// How often the commands of --dump-when and --health are run.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub probe_every: Span,

    /// How long each may take; it is killed then, and counts as failed.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub probe_timeout: Span,

    /// End and recover the job when none of its processes has used CPU time or read or written anything for so long.
    ///
    /// ckpt cannot tell a job that hangs from one that waits for something that comes later: choose it longer than any such wait.
    #[arg(long, value_name = "DURATION", requires = "recover")]
    pub hang_after: Option<Span>,
}

impl SupervisionArgs {
    /// Whether there are options that only say how dumps are made.
    pub fn is_about_dumps(&self) -> bool {
        self.keep.is_some()
            || self.incremental
            || self.compress.is_some()
            || self.engine.is_some()
            || self.io_limit.is_some()
            || self.flush
    }
}

/// Save all of a job
///
/// The job goes on afterwards, unless --stop is given; it stands still only while its state is collected, not while that is written.
/// Everything that cannot be saved is named before anything is stopped, and the job is left alone.
///
/// Prints the checkpoint's name, its size and how long the job stood still. Ended by a signal (Ctrl-C) it leaves no checkpoint, and the job as it was.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct DumpArgs {
    /// The job.
    #[arg(value_name = "NAME")]
    pub name: JobName,

    /// End the job once it is saved.
    #[arg(long, conflicts_with = "leave_running")]
    pub stop: bool,

    /// Let the job go on once it is saved. This is what happens without options, too.
    #[arg(long)]
    pub leave_running: bool,

    /// Put the checkpoint into this directory instead of the store. It must not exist, or be empty.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,

    #[command(flatten)]
    pub store: StoreArg,

    /// Save only the memory that has changed since the last incremental dump, whose checkpoint is needed from then on.
    ///
    /// The first one is a full checkpoint, and so is one for which the earlier writes are not known for sure, with a line that says why.
    #[arg(long, conflicts_with = "dir")]
    pub incremental: bool,

    /// Where neither userfaultfd (Linux 6.7) nor the kernel module tells what was written, trust the kernel's soft-dirty bits.
    ///
    /// They are wrong, and the checkpoint with them, for memory that the job moves by mremap(2) in whole 2 MiB pieces to where other memory
    /// was, and for memory that the kernel merges (KSM). Use it only for a job that does neither.
    #[arg(long, requires = "incremental")]
    pub soft_dirty: bool,

    /// Make a full checkpoint when this many are built on each other.
    #[arg(long, value_name = "N", default_value_t = 16, requires = "incremental",
          value_parser = clap::value_parser!(u64).range(1..=128))]
    pub max_chain: u64,

    /// Save the content of the files that the job has open for writing, too, as it is at this moment.
    ///
    /// A restore with --rollback-files puts them back. The job stands still while they are copied, unless their file system shares extents
    /// (btrfs, XFS): there a clone is made at once. Files that SQLite keeps beside a database (-journal, -wal, -shm) go with it.
    /// Always on for a job of `ckpt run --with-files`.
    #[arg(long)]
    pub with_files: bool,

    /// What to do about TCP connections, which can't be kept. Without it, what `ckpt run --tcp` said; else "refuse".
    #[arg(long, value_enum, value_name = "WHAT")]
    pub tcp: Option<TcpChoice>,

    /// Bring what the job has written to files to the disk before the checkpoint is complete.
    ///
    /// Files open for writing, files behind shared mappings and their directories are flushed (fsync), while the job runs: the checkpoint
    /// and the files that it refers to survive a power cut together. A flush that fails makes the dump fail.
    #[arg(long)]
    pub flush: bool,

    /// Wait this long for all processes to come to a safe point; 0 to freeze them as they are.
    ///
    /// A process that is just starting another one (vfork, posix_spawn), or to which descriptors are on their way (SCM_RIGHTS), soon will be at
    /// one. Where ckpt's interceptor is in the processes, they begin nothing of that kind anew meanwhile. Who is late is named, and the job
    /// is frozen all the same.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse_timeout)]
    pub barrier_timeout: Duration,

    /// Dump nothing if a process is not at a safe point when that time is up (exit status 119); the job goes on.
    #[arg(long)]
    pub strict: bool,

    /// How to compress memory.
    #[arg(long, value_enum, default_value_t = Compression::None, value_name = "METHOD")]
    pub compress: Compression,

    /// How memory is kept while it is written: see `ckpt doctor` for what this host allows.
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto, value_name = "ENGINE")]
    pub engine: EngineChoice,

    /// Write no more than this many bytes a second (K, M, G: times 1024), on average.
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    pub io_limit: Option<NonZeroU64>,

    /// Give the dump up when the job has written to more than this many bytes of its memory (K, M, G: times 1024) while
    /// the checkpoint was being written: so much is held twice. The job goes on.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub duplicate_limit: Option<NonZeroU64>,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TcpChoice {
    /// Dump nothing while there are any, and name them.
    Refuse,
    /// The running job keeps them; a restored one finds them reset by their peers. What had been received and not read is lost,
    /// and so are connections that were not accepted yet.
    Close,
}

impl TcpChoice {
    /// As the command line and the job's record have it.
    pub fn word(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// The one that keeps the job still for the shortest time.
    Auto,
    /// Have the kernel module keep the memory of each process (/dev/ckpt); what it refuses is forked or copied.
    Kmod,
    /// Fork each process and read the copy while the job goes on; what cannot be kept that way is copied.
    Cow,
    /// Copy everything into ckpt's own memory while the job stands still.
    Copy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Fastest where the disk is fast.
    None,
    /// Little work, often half the size.
    Lz4,
    /// More work, smaller.
    Zstd,
}

/// Bring a job back
///
/// The processes come back under their old ids in fresh namespaces, with their memory, threads, files, pipes and timers, and go on where they
/// were. The checkpoint stays; it can be restored any number of times, also side by side under different names.
///
/// Until everything is in place nothing of the job runs; if anything fails, or ckpt is interrupted, all that was built is
/// removed again.
///
/// A file that the job had been writing at its end when it was dumped, and that has grown since, is put back to the length it
/// had; the cut tail is kept beside the checkpoint and named. Any other file that has changed is named, and the restore refused:
/// see --files and --allow-changed.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct RestoreArgs {
    /// The checkpoint: NAME for the newest of a job, NAME@N for a certain one, or a directory (with a '/' in it).
    #[arg(value_name = "NAME[@N]|./DIR")]
    pub checkpoint: OsString,

    /// Return as soon as the job runs. Its output goes to its log.
    #[arg(long, short)]
    pub detach: bool,

    /// Let the job run at once; its memory comes when it is touched, and the rest in the background.
    ///
    /// What the job touched first after the last lazy restore is fetched first. Until all memory has come (see `ckpt ps`) the job depends
    /// on the checkpoint: if that turns out to be damaged, the job is ended, with a line in its log and status 115.
    /// Needs CAP_SYS_PTRACE on the host; elsewhere the restore says why and brings all memory back first.
    #[arg(long)]
    pub lazy: bool,

    /// Start this many copies, named NAME-1, NAME-2 and so on, each with its own log (implies --detach).
    ///
    /// All of them or none: none runs before all are rebuilt, and if one can't be, the others are removed again. Where the kernel merges
    /// equal pages (KSM, /sys/kernel/mm/ksm/run is 1), the copies come to share the memory that they do not change. A checkpoint
    /// whose job has files open for writing is refused.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), conflicts_with = "by_supervisor")]
    pub copies: Option<u32>,

    /// The hidden side of --copies: stdin is the gate, and the kernel is to merge memory or not.
    #[arg(long, hide = true, value_enum, requires = "detach", conflicts_with = "copies")]
    pub as_copy: Option<AsCopy>,

    /// Which of the copies it is, how many there are, and how many times the checkpoint has been restored with it.
    #[arg(
        long,
        hide = true,
        value_name = "N,OF,RESTORE",
        requires = "as_copy",
        value_delimiter = ',',
        num_args = 1
    )]
    pub copy_number: Vec<u32>,

    /// Give the restored job another name; with --copies, another prefix.
    #[arg(long, short, value_name = "NEW")]
    pub name: Option<JobName>,

    #[command(flatten)]
    pub store: StoreArg,

    /// What to do about files that have changed since the dump.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub files: Option<FilesPolicy>,

    /// Put files back whose content is in the checkpoint (see `ckpt dump --with-files`), if they have changed since.
    ///
    /// What a file held is kept beside it, as NAME.ckpt-replaced-TIME-N, and named. A file that is still the same inode is written in place;
    /// one that was replaced or removed comes back by rename. What SQLite has put beside a database since the dump is moved aside.
    /// This happens when everything else is in place, before anything of the job runs; --files is about all other files.
    #[arg(long)]
    pub rollback_files: bool,

    /// What dumps of the restored job do about TCP connections, unless they say something else; see `ckpt dump`.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub tcp: Option<TcpChoice>,

    /// Go on although this file has changed: the job sees it as it is now. May be given several times.
    #[arg(long, value_name = "PATH")]
    pub allow_changed: Vec<PathBuf>,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,

    /// The hidden side of recoveries: the job's supervisor starts it again.
    #[arg(long, hide = true, value_name = "FD")]
    pub by_supervisor: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AsCopy {
    /// Memory is the copy's own.
    Alone,
    /// Equal pages are to be merged.
    Mergeable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FilesPolicy {
    /// Leave every file as it is now.
    Keep,
    /// Put files that have only grown back to the length they had, keeping the tails.
    Rollback,
    /// Refuse if any file has changed.
    Refuse,
}

/// Show the jobs that run on this host
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Print everything known about them as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Show the checkpoints in the store
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only those of this job.
    #[arg(value_name = "NAME")]
    pub name: Option<JobName>,

    #[command(flatten)]
    pub store: StoreArg,

    /// Print the list as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Show what is in a checkpoint: processes, memory, files
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The checkpoint: NAME, NAME@N, or a directory (with a '/' in it).
    #[arg(value_name = "NAME[@N]|./DIR")]
    pub checkpoint: OsString,

    #[command(flatten)]
    pub store: StoreArg,

    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Check every byte of a checkpoint
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The checkpoint: NAME, NAME@N, or a directory (with a '/' in it).
    #[arg(value_name = "NAME[@N]|./DIR")]
    pub checkpoint: OsString,

    #[command(flatten)]
    pub store: StoreArg,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Send a signal to a job
///
/// KILL ends the whole job at once. A signal of --dump-on makes a dump instead. After TERM, INT, QUIT or KILL a job with --recover is not
/// started again; one that has failed and waits for its recovery is given up. Any other signal goes where the keys of a terminal would send it: to the foreground process group
/// of the job's terminal, or, in a job without one, to the process group of its main process. If that has ended, it goes to
/// every process of the job.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct KillArgs {
    /// The job.
    #[arg(value_name = "NAME")]
    pub name: JobName,

    /// The signal, by name (TERM, SIGUSR1, RTMIN+3) or number.
    #[arg(value_name = "SIGNAL", default_value = "TERM", value_parser = parse_signal)]
    pub signal: u8,

    /// Send it to every process of the job.
    #[arg(long)]
    pub all: bool,
}

/// Wait until a job's main process has ended, and end with its status
///
/// Works also for a job that has ended before, for a day or until its name is used again.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct WaitArgs {
    /// The job.
    #[arg(value_name = "NAME")]
    pub name: JobName,

    /// Wait until all of the job's processes have ended.
    #[arg(long)]
    pub all: bool,
}

/// Take up the supervision of a job whose supervisor was killed
///
/// A job that was started with --every, --dump-on, --dump-at, --dump-when or --recover has a supervisor: a process outside the job that
/// makes its dumps and starts it again. If that is killed, the job goes on, and `ckpt ps` shows it as "unsupervised". This starts another
/// with the options of the job's `ckpt run`; it goes on in the background.
///
/// Recoveries then have the descriptors of this command: a job in the foreground whose output went to a file or pipe of `ckpt run` writes
/// to the stdout and stderr of this command after its next recovery.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct SuperviseArgs {
    /// The job.
    #[arg(value_name = "NAME")]
    pub name: JobName,
}

/// Connect this terminal to a job that has a terminal of its own
///
/// Whoever was connected before is disconnected. Typing the detach key leaves the job running.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct AttachArgs {
    /// The job.
    #[arg(value_name = "NAME")]
    pub name: JobName,

    /// Key that disconnects: "ctrl-" and a letter or one of @[\]^_, or "none".
    #[arg(long, value_name = "KEY", default_value = "ctrl-]", value_parser = parse_key)]
    pub detach_key: DetachKey,
}

/// The byte that the detach key sends, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DetachKey(pub Option<u8>);

/// Remove checkpoints from the store
///
/// A checkpoint that incremental ones are built on is not removed unless they are, too; the message names them. `ckpt squash`
/// makes them independent of it, and so does --keep where it has to.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct RmArgs {
    /// What to remove: NAME for all checkpoints of a job, NAME@N for a certain one.
    #[arg(value_name = "NAME[@N]", required = true)]
    pub checkpoints: Vec<String>,

    #[command(flatten)]
    pub store: StoreArg,

    /// Of each job, remove all but the newest N checkpoints.
    ///
    /// What restores have cut off the job's files is moved beside the checkpoints, as with any removal, and named.
    ///
    /// Older ones stay as long as a kept incremental checkpoint is built on them, but no more than --keep-needed: then the kept one is
    /// made a full one first (see `ckpt squash`). Whatever interrupts this, the kept ones are whole.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep: Option<u32>,

    /// How many older checkpoints may stay only because kept ones are built on them; 0 squashes at once.
    ///
    /// Squashing costs as much as writing a full checkpoint.
    #[arg(long, value_name = "N", default_value_t = 8, requires = "keep")]
    pub keep_needed: u32,

    /// When squashing, go through no more than this many bytes of memory a second (K, M, G: times 1024), on average.
    #[arg(long, value_name = "RATE", value_parser = parse_size, requires = "keep")]
    pub io_limit: Option<NonZeroU64>,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Make an incremental checkpoint a full one, in place
///
/// It keeps its number, and those that are built on it stay valid; it needs the ones that it was built on no more, so that they can be
/// removed. Whatever interrupts this, the checkpoint is there and whole: as it was, or as it is to be. Doing it again is harmless.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct SquashArgs {
    /// The checkpoint: NAME for the newest of a job, NAME@N for a certain one.
    #[arg(value_name = "NAME[@N]")]
    pub checkpoint: String,

    #[command(flatten)]
    pub store: StoreArg,

    /// How to compress memory. Without it, as the checkpoint is now.
    #[arg(long, value_enum, value_name = "METHOD")]
    pub compress: Option<Compression>,

    /// Go through no more than this many bytes of memory a second (K, M, G: times 1024), on average.
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    pub io_limit: Option<NonZeroU64>,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Could this job be dumped now?
///
/// Names everything that stands in the way, by process and descriptor, and what a dump would wait for. The job is not stopped; its hooks
/// are not called: what they will close, or object to, is not known.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct CheckArgs {
    /// The job.
    #[arg(value_name = "NAME")]
    pub name: JobName,

    /// What that dump is to do about TCP connections; see `ckpt dump`.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub tcp: Option<TcpChoice>,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What does this host allow, what is missing, and what would allow it?
///
/// Everything is tried out, not looked up. Levels: "full"; "no fresh /proc" (jobs run and can be dumped, but restored only elsewhere or by
/// root); "no user namespaces" (jobs need root here). Ends with 0 for "full" and 116 otherwise.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub store: StoreArg,

    /// Print the findings as JSON.
    #[arg(long)]
    pub json: bool,
}

/// A number of bytes: 100000, 64K, 10M, 2G.
fn parse_size(text: &str) -> Result<NonZeroU64, String> {
    let (digits, shift) = match text.trim_end_matches(['K', 'M', 'G', 'k', 'm', 'g']) {
        digits if digits.len() + 1 < text.len() => ("", 0),
        digits => match text[digits.len()..].to_ascii_uppercase().as_str() {
            "K" => (digits, 10),
            "M" => (digits, 20),
            "G" => (digits, 30),
            _ => (digits, 0),
        },
    };
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).and_then(NonZeroU64::new);
    bytes.ok_or_else(|| "give a number of bytes above 0, such as 500000, 64K, 10M or 2G".to_owned())
}

/// A length of time, or 0 for none.
fn parse_timeout(text: &str) -> Result<Duration, String> {
    if text == "0" { Ok(Duration::ZERO) } else { text.parse::<Span>().map(Span::duration) }
}

/// A signal by name or number.
fn parse_signal(text: &str) -> Result<u8, String> {
    if let Ok(number) = text.parse::<u8>() {
        return if number <= 64 { Ok(number) } else { Err("signals are numbered from 1 to 64".to_owned()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<i32>().ok(),
    };
    let real_time = if let Some(rest) = name.strip_prefix("RTMIN") {
        offset(rest, '+').map(|n| libc::SIGRTMIN() + n)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        offset(rest, '-').map(|n| libc::SIGRTMAX() - n)
    } else {
        None
    };
    if let Some(number) = real_time.filter(|n| (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(n)) {
        return Ok(number as u8);
    }
    format!("SIG{name}")
        .parse::<nix::sys::signal::Signal>()
        .map(|signal| signal as i32 as u8)
        .map_err(|_| "no such signal; examples: TERM, KILL, USR1, RTMIN+1, 15".to_owned())
}

/// A signal that makes a dump.
fn parse_dump_on(text: &str) -> Result<DumpOn, String> {
    let (name, stop) = match text.split_once(':') {
        Some((name, "stop")) => (name, true),
        Some(_) => return Err("give SIGNAL or SIGNAL:stop, as in USR1, TERM:stop".to_owned()),
        None => (text, false),
    };
    if name == "request" {
        return Ok(DumpOn { signal: ckpt_abi::hooks::DUMP_NOW_SIGNAL as u8, stop });
    }
    let signal = parse_signal(name)?;
    // Those cannot be caught, or have a meaning for terminals and parents that ckpt run heeds.
    const OTHERS: [i32; 9] = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGCONT,
        libc::SIGCHLD,
        libc::SIGPIPE,
        libc::SIGWINCH,
    ];
    if signal == 0 || OTHERS.contains(&i32::from(signal)) {
        return Err("this signal cannot make a dump; use USR1, USR2, TERM, HUP, RTMIN+n …".to_owned());
    }
    Ok(DumpOn { signal, stop })
}

/// A key such as `ctrl-]`.
fn parse_key(text: &str) -> Result<DetachKey, String> {
    if text == "none" {
        return Ok(DetachKey(None));
    }
    match text.strip_prefix("ctrl-").map(str::as_bytes) {
        Some([key]) if matches!(key.to_ascii_uppercase(), b'@'..=b'_') => {
            Ok(DetachKey(Some(key.to_ascii_uppercase() & 0x1f)))
        }
        _ => Err("give a key such as ctrl-] or ctrl-a, or none".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn signals_by_name_and_number() {
        for (text, number) in
            [("TERM", 15), ("sigusr1", 10), ("9", 9), ("0", 0), ("RTMIN", 34), ("rtmax-1", 63)]
        {
            assert_eq!(parse_signal(text), Ok(number), "{text}");
        }
        for text in ["", "FOO", "65", "RTMIN+40", "-9"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("1", 1), ("64K", 65536), ("10m", 10 << 20), ("2G", 2 << 30)] {
            assert_eq!(parse_size(text).map(NonZeroU64::get), Ok(bytes), "{text}");
        }
        for text in ["", "0", "K", "1KK", "-1", "1.5G", "1T", "99999999999G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn signals_that_dump() {
        assert_eq!(parse_dump_on("USR1"), Ok(DumpOn { signal: 10, stop: false }));
        assert_eq!(parse_dump_on("SIGTERM:stop"), Ok(DumpOn { signal: 15, stop: true }));
        assert_eq!(parse_dump_on("request"), Ok(DumpOn { signal: 64, stop: false }));
        for text in ["KILL", "0", "TERM:", "TERM:end", "CHLD:stop", "FOO"] {
            assert!(parse_dump_on(text).is_err(), "{text}");
        }
    }

    #[test]
    fn keys() {
        assert_eq!(parse_key("ctrl-]"), Ok(DetachKey(Some(0x1d))));
        assert_eq!(parse_key("ctrl-a"), Ok(DetachKey(Some(1))));
        assert_eq!(parse_key("none"), Ok(DetachKey(None)));
        assert!(parse_key("x").is_err());
        assert!(parse_key("ctrl-é").is_err());
    }

    #[test]
    fn the_command_keeps_its_options() {
        let cli = Cli::parse_from(["ckpt", "run", "--name", "a", "--", "ls", "--name", "b", "-d"]);
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.command, ["ls", "--name", "b", "-d"]);
        assert!(!run.detach);
    }
}
