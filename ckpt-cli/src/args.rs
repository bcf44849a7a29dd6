// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line. The texts here are the manual: `ckpt help COMMAND` shows them.

use std::ffi::OsString;
use std::num::NonZeroU64;
use std::path::PathBuf;

use ckpt_job::JobName;
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXIT_CODES: &str = "\
Exit status:
  run, wait, attach and restore in the foreground end with the job's status: the code of its main
  process, or 128+n if signal n killed it. ckpt's own:
    0    done
    1    failure (125 in the commands that end with a job's status)
    2    wrong usage
    112  not found: no such job, checkpoint or file
    113  conflict: a name or file is in use, a file has changed, another dump is going on
    114  refused: the job holds something that ckpt does not support; the job goes on
    115  corrupt: the image is damaged, or was made by a newer ckpt
    116  this host cannot: see `ckpt doctor`
    117  no space, or a store that cannot be written to
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
    Attach(AttachArgs),
    Rm(RmArgs),
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

    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Save all of a job
///
/// The job goes on afterwards, unless --stop is given; it stands still only while its state is collected, not while that is written.
/// Everything that cannot be saved is named before anything is stopped, and the job is left alone.
///
/// Prints the checkpoint's name, its size and how long the job stood still.
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

    /// Make a full checkpoint when this many are built on each other.
    #[arg(long, value_name = "N", default_value_t = 16, requires = "incremental",
          value_parser = clap::value_parser!(u64).range(1..=128))]
    pub max_chain: u64,

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
pub enum EngineChoice {
    /// The one that keeps the job still for the shortest time.
    Auto,
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

    /// Give the restored job another name.
    #[arg(long, short, value_name = "NEW")]
    pub name: Option<JobName>,

    #[command(flatten)]
    pub store: StoreArg,

    /// What to do about files that have changed since the dump.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub files: Option<FilesPolicy>,

    /// Go on although this file has changed: the job sees it as it is now. May be given several times.
    #[arg(long, value_name = "PATH")]
    pub allow_changed: Vec<PathBuf>,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
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
/// KILL ends the whole job at once. Any other signal goes where the keys of a terminal would send it: to the foreground process group
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
#[derive(Debug, Args)]
pub struct RmArgs {
    /// What to remove: NAME for all checkpoints of a job, NAME@N for a certain one.
    #[arg(value_name = "NAME[@N]", required = true)]
    pub checkpoints: Vec<String>,

    #[command(flatten)]
    pub store: StoreArg,
}

/// Could this job be dumped now?
///
/// Names everything that stands in the way, by process and descriptor. The job is not stopped.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct CheckArgs {
    /// The job.
    #[arg(value_name = "NAME")]
    pub name: JobName,

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
