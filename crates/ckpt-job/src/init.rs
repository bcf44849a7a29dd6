// SPDX-License-Identifier: MIT OR Apache-2.0
//! init, from its first instruction to the moment the job runs.
//!
//! Order: adopt the fds, mounts, terminal, socket; then the caller's `start` builds the work; then *commit*: the
//! parent-death signal goes, and if the launcher is still there, the job is told to be alive; then `release` lets
//! the work run, and the external fds are closed here, so that a pipe ends when the job closes it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use ckpt_abi::init_protocol::{Kind, VERSION};
use ckpt_sys::{local_socket, namespace, pty, spawn};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::ExitStatus;
use crate::channel;
use crate::mounts;
use crate::registry;
use crate::spec::{External, InitSpec, JobRecord, LaunchSpec, Work};
use crate::supervise;

/// The first argument that makes the program an init; see [`init_main`].
pub const INIT_ARGUMENT: &str = "__init";

/// What kind of failure it was, for the launcher's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum StartErrorClass {
    /// Anything else.
    Failure = 0,
    /// The command does not exist.
    CommandNotFound = 1,
    /// The command exists and cannot be executed.
    CommandNotExecutable = 2,
    /// The host does not allow something that is needed.
    HostCannot = 3,
    /// The image is damaged or too new.
    Corrupt = 4,
    /// Something on this host is in the way: a name, a port, a file that changed or is being written.
    Conflict = 5,
    /// Something is not supported.
    Refused = 6,
    /// Something needed is not there.
    NotFound = 7,
    /// The store is full or can't be written to.
    Storage = 8,
}

impl StartErrorClass {
    pub(crate) fn from_number(number: i64) -> StartErrorClass {
        use StartErrorClass::*;
        [CommandNotFound, CommandNotExecutable, HostCannot, Corrupt, Conflict, Refused, NotFound, Storage]
            .into_iter()
            .find(|class| *class as i64 == number)
            .unwrap_or(Failure)
    }
}

/// Why the work could not be started; goes to the launcher, which shows the message and exits accordingly.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct StartError {
    /// For the exit code.
    pub class: StartErrorClass,
    /// For a person: what, why, what to do.
    pub message: String,
}

impl StartError {
    /// An error of this class.
    pub fn new(class: StartErrorClass, message: impl Into<String>) -> StartError {
        StartError { class, message: message.into() }
    }

    /// A failed system call or file operation.
    pub(crate) fn io(what: &str, error: impl Into<io::Error>) -> StartError {
        StartError::new(StartErrorClass::Failure, format!("{what}: {}", error.into()))
    }
}

/// Tells the launcher how the start goes on. Costs nothing when nobody listens any more.
#[derive(Clone, Debug)]
pub struct Progress(std::sync::Arc<OwnedFd>);

impl Progress {
    /// A line about how far the start is; shown on a terminal only.
    pub fn line(&self, text: &str) {
        // Progress must not hold up the start: a full queue loses the line.
        let packet = channel::packet(Kind::LaunchProgress, 0, text.as_bytes());
        let _ = local_socket::send_packet(self.0.as_fd(), &packet, false);
    }

    /// Something a person should know although the job starts; always shown.
    pub fn warning(&self, text: &str) {
        let _ = channel::send(&*self.0, Kind::LaunchWarning, 0, text.as_bytes());
    }
}

/// The job's terminal.
#[derive(Debug)]
pub struct JobPty {
    /// The master: close-on-exec, non-blocking, read by init alone.
    pub master: OwnedFd,
    /// The other end inside the job, `/dev/pts/N`.
    pub slave_path: PathBuf,
}

/// What init has for the work: everything is inside the job's namespaces already.
#[derive(Debug)]
pub struct InitContext {
    /// What the launcher asked for.
    pub spec: LaunchSpec,
    /// The job's terminal, if it has one.
    pub pty: Option<JobPty>,
    /// The fds that came from outside, without those that terminal or log stand in for. Closed once the job runs.
    pub external: Vec<External>,
    /// Opened if the job starts detached: its stdout and stderr, when it has no terminal.
    pub log: Option<File>,
    /// The `pass` of [`crate::launch()`], in order. Closed once the job runs, unless taken.
    pub passed: Vec<OwnedFd>,
    /// How to tell the launcher something.
    pub progress: Progress,
    /// Whether /proc is the job's own; if not, it shows the host's pids.
    pub fresh_proc: bool,
    /// Whether the job has a user namespace of its own.
    pub user_namespace: bool,
    /// Soft and hard RLIMIT_NOFILE as the launcher had them; init's own may be higher.
    pub open_files_limit: (u64, u64),
    /// Standard fds that the launcher was started without.
    pub closed: Vec<RawFd>,
    /// Signals that the launcher was started ignoring.
    pub ignored_signals: Vec<i32>,
    /// Signals that the launcher was started with blocked.
    pub blocked_signals: spawn::SignalMask,
}

/// What init does for a job that runs already: fetches memory that is still in the checkpoint.
pub trait Fetching {
    /// Bytes that are still to come, and how many there were at the start.
    fn missing_bytes(&self) -> (u64, u64);
    /// How it ended: nothing depends on the checkpoint any more, or why the job can't go on.
    fn outcome(&self) -> Option<Result<(), String>>;
    /// Readable once there is an outcome.
    fn ended(&self) -> BorrowedFd<'_>;
    /// Somebody waits for the end.
    fn hurry(&self);
}

/// The work, ready to run.
pub struct Started {
    /// The main process; its exit status is the job's.
    pub main_pid: i32,
    /// For a restored job whose main process had ended before: how. Then `main_pid` is not waited for.
    pub main_exited: Option<ExitStatus>,
    /// For whoever started the job, see [`crate::Job::details`].
    pub details: serde_json::Value,
    /// What goes on once it runs.
    pub fetching: Option<Box<dyn Fetching>>,
    /// Called after the commit; lets the work run. An error ends the job and is told to the launcher.
    pub release: Box<dyn FnOnce() -> Result<(), StartError>>,
}

/// The life of init: never returns. `start` makes the work, stopped; nothing of it may take effect outside the job before
/// `release`. To be called by `main` when the first argument is [`INIT_ARGUMENT`], before anything opens an fd or starts a
/// thread.
pub fn init_main(start: impl FnOnce(&mut InitContext) -> Result<Started, StartError>) -> ! {
    let Some(handed) = Handed::adopt() else {
        eprintln!("ckpt: {INIT_ARGUMENT} is for ckpt itself: it makes the first process of a job");
        std::process::exit(2);
    };
    let channel = std::sync::Arc::new(handed.channel);
    tell_of_panics(channel.clone());
    let failed = |error: StartError| -> ! {
        let _ = channel::send(&*channel, Kind::LaunchFailed, error.class as i64, error.message.as_bytes());
        // Everything in the pid namespace ends with its init.
        spawn::exit_now(1)
    };
    let prepared = match prepare(handed.rest, &channel) {
        Ok(prepared) => prepared,
        Err(error) => failed(error),
    };
    let Prepared { mut context, entry, alive, started_at } = prepared;
    let started = match start(&mut context) {
        Ok(started) => started,
        Err(error) => failed(error),
    };
    let Started { main_pid, main_exited, details, fetching, release } = started;
    let record = record(&context, main_pid, started_at);
    let (listener, signals) = match open_for_business(&entry, &record) {
        Ok(pair) => pair,
        Err(error) => failed(error),
    };
    commit(&channel);
    if let Err(error) = release() {
        failed(error);
    }
    let _ =
        channel::send(&*channel, Kind::LaunchStarted, i64::from(main_pid), details.to_string().as_bytes());
    let InitContext { spec, pty, external, log, passed, progress, .. } = context;
    drop((external, passed, log, progress));
    end_job_on_panic(spec.log.clone(), entry.try_clone().ok());
    let launcher = std::sync::Arc::try_unwrap(channel).or_else(|shared| shared.try_clone()).ok();
    let _ = std::env::set_current_dir("/");
    supervise::run(supervise::Resources {
        spec,
        record,
        entry,
        alive: File::from(alive),
        listener,
        signals,
        pty: pty.map(|pty| pty.master),
        launcher,
        main_exited,
        fetching,
    })
}

/// What the arguments name.
struct Handed {
    channel: OwnedFd,
    rest: HandedRest,
}

struct HandedRest {
    spec: File,
    entry: File,
    alive: OwnedFd,
    externals: Vec<OwnedFd>,
    passed: Vec<OwnedFd>,
}

impl Handed {
    /// `None` if the arguments are not those of [`crate::launch()`].
    fn adopt() -> Option<Handed> {
        let arguments: Vec<String> = std::env::args().skip(2).collect();
        let [channel, spec, entry, alive, externals, passed] = arguments.as_slice() else {
            return None;
        };
        let adopt = |text: &str| spawn::adopt_inherited(text.parse().ok()?).ok();
        let adopt_list = |list: &str| {
            list.split(',').filter(|text| !text.is_empty()).map(adopt).collect::<Option<Vec<_>>>()
        };
        Some(Handed {
            channel: adopt(channel)?,
            rest: HandedRest {
                spec: File::from(adopt(spec)?),
                entry: File::from(adopt(entry)?),
                alive: adopt(alive)?,
                externals: adopt_list(externals)?,
                passed: adopt_list(passed)?,
            },
        })
    }
}

struct Prepared {
    context: InitContext,
    entry: File,
    alive: OwnedFd,
    started_at: u64,
}

/// Namespaces' contents: names, mounts, terminal, log.
fn prepare(handed: HandedRest, channel: &std::sync::Arc<OwnedFd>) -> Result<Prepared, StartError> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|errno| StartError::io("PR_SET_PDEATHSIG", errno))?;
    // The launcher may have died before that.
    if local_socket::hung_up(channel.as_fd()).unwrap_or(true) {
        spawn::exit_now(1);
    }
    let _ = prctl::set_name(c"ckpt-init");
    spawn::set_blocked_signals(!0).map_err(|error| StartError::io("blocking signals", error))?;
    // Inherited as ignored, SIGCHLD would make the kernel reap the children itself and lose their status.
    spawn::set_ignored(libc::SIGCHLD, false).map_err(|error| StartError::io("SIGCHLD", error))?;
    let mut bytes = Vec::new();
    let mut spec_file = handed.spec;
    spec_file
        .read_to_end(&mut bytes)
        .map_err(|error| StartError::io("reading the job's description", error))?;
    drop(spec_file);
    let init_spec: InitSpec = serde_json::from_slice(&bytes)
        .map_err(|error| StartError::io("reading the job's description", io::Error::from(error)))?;
    let spec = init_spec.spec;
    let progress = Progress(channel.clone());
    if let Some(name) = &spec.hostname {
        nix::unistd::sethostname(name)
            .map_err(|errno| StartError::io("setting the job's host name", errno))?;
    }
    if let Some(name) = &spec.domainname {
        namespace::set_domain_name(name)
            .map_err(|error| StartError::io("setting the job's domain name", error))?;
    }
    let mounts =
        mounts::build().map_err(|error| StartError::new(StartErrorClass::HostCannot, error.to_string()))?;
    for warning in &mounts.warnings {
        progress.warning(warning);
    }
    let log = if spec.detach && !spec.tty { Some(open_log(&spec.log)?) } else { None };
    let pty = if spec.tty { Some(open_terminal(&spec)?) } else { None };
    let external = init_spec
        .externals
        .into_iter()
        .zip(handed.externals)
        .map(|(record, fd)| External { record, fd })
        .collect();
    Ok(Prepared {
        context: InitContext {
            spec,
            pty,
            external,
            log,
            passed: handed.passed,
            progress,
            fresh_proc: mounts.fresh_proc,
            user_namespace: init_spec.user_namespace,
            open_files_limit: init_spec.open_files_limit,
            closed: init_spec.closed,
            ignored_signals: init_spec.ignored_signals,
            blocked_signals: init_spec.blocked_signals,
        },
        entry: handed.entry,
        alive: handed.alive,
        started_at: init_spec.started,
    })
}

/// Opens a job's log for appending; makes its directory if needed.
///
/// # Errors
/// As mkdir(2) and open(2).
pub fn open_log(path: &Path) -> Result<File, StartError> {
    let open = || {
        if let Some(parent) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        File::options().append(true).create(true).mode(0o600).open(path)
    };
    open().map_err(|error| {
        StartError::new(
            StartErrorClass::Storage,
            format!("opening the job's log {}: {error}", path.display()),
        )
    })
}

fn open_terminal(spec: &LaunchSpec) -> Result<JobPty, StartError> {
    let failed = |error| StartError::io("opening a terminal for the job (without one: --no-tty)", error);
    let pty::Pty { master, number } = pty::open().map_err(failed)?;
    if let Some(size) = spec.window_size() {
        pty::set_window_size(master.as_fd(), size).map_err(failed)?;
    }
    Ok(JobPty { master, slave_path: PathBuf::from(format!("/dev/pts/{number}")) })
}

fn record(context: &InitContext, main_pid: i32, started: u64) -> JobRecord {
    let spec = &context.spec;
    JobRecord {
        name: spec.name.clone(),
        protocol_version: VERSION,
        main_pid,
        started,
        store: spec.store.clone(),
        log: spec.log.clone(),
        command: match &spec.work {
            Work::Command { argv, .. } => {
                argv.iter().map(|word| word.to_string_lossy().into_owned()).collect()
            }
            Work::Restore(_) => spec.restored_command.clone(),
        },
        restored_from: spec.restored_from.clone(),
        with_files: spec.with_files,
        tcp: spec.tcp.clone(),
        tty: spec.tty,
        user_namespace: context.user_namespace,
        fresh_proc: context.fresh_proc,
        external: context.external.iter().map(|external| external.record.clone()).collect(),
        mergeable: spec.mergeable,
        terminal: context.pty.as_ref().map(|pty| pty.slave_path.clone()),
    }
}

/// The registry entry and everything else that could still fail.
fn open_for_business(entry: &File, record: &JobRecord) -> Result<(OwnedFd, SignalFd), StartError> {
    let failed = |error: io::Error| StartError::io("entering the job into the registry", error);
    let json = serde_json::to_vec_pretty(record).map_err(|error| failed(error.into()))?;
    registry::write_entry_file(&supervise::entry_path(entry), "job.json", &json).map_err(failed)?;
    let listener = local_socket::listen_in(entry.as_fd(), "sock".as_ref()).map_err(failed)?;
    let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|errno| failed(errno.into()))?;
    Ok((listener, signals))
}

/// The point of no return: before it the launcher's death ends the job, after it nothing of the launcher matters.
fn commit(channel: &OwnedFd) {
    let cleared = prctl::set_pdeathsig(None).is_ok();
    // A launcher that died before the line above is seen here; one that dies after it finds a living job.
    let launcher_lives = !local_socket::hung_up(channel.as_fd()).unwrap_or(true);
    if !cleared || !launcher_lives || channel::send(channel, Kind::LaunchCommitted, 0, b"").is_err() {
        spawn::exit_now(1);
    }
}

/// The exit status of a job that init's own defect ends.
const DEFECT: ExitStatus = ExitStatus::Exited(125);
/// A thread of init has panicked.
static DEFECT_FOUND: AtomicBool = AtomicBool::new(false);

/// The status of a job that is being ended by a defect of its init.
pub(crate) fn defect() -> Option<ExitStatus> {
    DEFECT_FOUND.load(Ordering::SeqCst).then_some(DEFECT)
}

/// A panic in init ends the job, as the kernel would; but the log and the registry say why.
fn end_job_on_panic(log: PathBuf, entry: Option<File>) {
    std::panic::set_hook(Box::new(move |info| {
        // First, as another thread may reap what is killed below, and tell how it ended.
        DEFECT_FOUND.store(true, Ordering::SeqCst);
        if let Ok(mut log) = open_log(&log) {
            let _ = writeln!(log, "ckpt init: defect in the job's init, which ends the job: {info}");
        }
        if let Some(entry) = &entry {
            let line = format!("{}\n", DEFECT.to_wait_status());
            let _ = registry::write_entry_file(&supervise::entry_path(entry), "exit", line.as_bytes());
        }
        kill_all();
    }));
}

/// SIGKILL to every process of the job, so that none runs on while this init closes its descriptors.
fn kill_all() {
    // Of any other process than an init these would be all processes of the user.
    if nix::unistd::getpid().as_raw() == 1 {
        let _ = spawn::send_signal(-1, libc::SIGKILL);
    }
}

/// A panic in init is told to whoever waits for the start, as stderr leads nowhere.
fn tell_of_panics(channel: std::sync::Arc<OwnedFd>) {
    std::panic::set_hook(Box::new(move |info| {
        kill_all();
        let text = format!("defect in the job's init: {info}");
        let _ =
            channel::send(&*channel, Kind::LaunchFailed, StartErrorClass::Failure as i64, text.as_bytes());
    }));
}
