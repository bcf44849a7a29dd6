// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starting a job, from outside.
//!
//! The launcher forks an intermediate process, which unshares the namespaces and forks init as the launcher's own child
//! (`CLONE_PARENT`), so that one parent-death signal is the whole chain: until init has committed, it dies with the
//! launcher. Descriptors reach init by plain inheritance: above all numbers that the job uses, their numbers in init's
//! arguments. What init has to do stands in a sealed memfd.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use ckpt_abi::init_protocol::Kind;
use ckpt_sys::{local_socket, namespace, spawn};
use nix::fcntl::{AtFlags, FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::channel::{self, Message};
use crate::external;
use crate::init::{INIT_ARGUMENT, StartErrorClass};
use crate::name::JobName;
use crate::namespaces;
use crate::registry::{Claim, Claimant, Registry, RegistryError};
use crate::spec::{InitSpec, LaunchSpec};

/// Init holds external fds from this number on, where RLIMIT_NOFILE allows.
const HOLD_FDS_FROM: RawFd = 512;

/// Why a job could not be started. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The registry refuses.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// init, or the process before it, says why.
    #[error("{message}")]
    Start {
        /// For the exit code.
        class: StartErrorClass,
        /// For a person.
        message: String,
    },
    /// init died without a word.
    #[error(
        "the job's init died while the job was being started{0}; was it killed, or is there no memory left?"
    )]
    InitDied(String),
    /// This signal arrived before the job was committed.
    #[error("interrupted by {0} before the job had started")]
    Interrupted(Signal),
    /// A path that cannot be written down.
    #[error("{}: the path is not valid UTF-8; choose another", .0.display())]
    PathNotUtf8(PathBuf),
    /// Something of the system failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> LaunchError {
    move |error| LaunchError::System { what, source: error.into() }
}

/// What a start tells while it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchEvent {
    /// How far it is.
    Progress(String),
    /// Something is not as it should be; the job starts all the same.
    Warning(String),
}

/// A job that has just been started, with the connection to its init: in the foreground ([`crate::foreground`]) or dropped.
#[derive(Debug)]
pub struct Job {
    /// Its name.
    pub name: JobName,
    /// init's pid, here.
    pub init_pid: i32,
    /// The main process's pid, inside the job.
    pub main_pid: i32,
    /// Whether it has a terminal of its own.
    pub tty: bool,
    /// Where its output goes while nobody is attached.
    pub log: PathBuf,
    /// What [`crate::Started::details`] says.
    pub details: serde_json::Value,
    /// Holds the lock of the supervisor that the job is to get: to be handed on to it.
    pub supervision: Option<File>,
    pub(crate) channel: OwnedFd,
    pub(crate) signals: SignalFd,
    /// Arrived during the start and are for the job.
    pub(crate) early_signals: Vec<i32>,
    pub(crate) ignored_signals: Vec<i32>,
    pub(crate) inherited: Vec<RawFd>,
}

/// Starts a job. Returns once it runs. Before it is committed, the death of this process ends all of it, later it changes
/// nothing. Signals of this process are blocked from here on: [`crate::foreground`] forwards them.
///
/// `pass` are descriptors for [`crate::InitContext::passed`]; `event` is told of progress and warnings.
///
/// # Errors
/// [`LaunchError`]; then nothing is left of the job.
pub fn launch(
    spec: LaunchSpec,
    pass: Vec<OwnedFd>,
    event: impl FnMut(LaunchEvent),
) -> Result<Job, LaunchError> {
    let mut blocked_before = None;
    let launched = try_launch(spec, pass, event, &mut blocked_before);
    if let (Err(_), Some(mask)) = (&launched, blocked_before) {
        // Whoever starts something else instead starts it as it would have without this.
        spawn::set_blocked_signals(mask).map_err(system("unblocking signals"))?;
    }
    launched
}

fn try_launch(
    spec: LaunchSpec,
    pass: Vec<OwnedFd>,
    mut event: impl FnMut(LaunchEvent),
    blocked_before: &mut Option<spawn::SignalMask>,
) -> Result<Job, LaunchError> {
    for path in [&spec.store, &spec.log] {
        if path.to_str().is_none() {
            return Err(LaunchError::PathNotUtf8(path.clone()));
        }
    }
    let claimant =
        if spec.by_supervisor { Claimant::Supervisor } else { Claimant::Launcher(spec.supervised.as_ref()) };
    let mut claim = Registry::open()?.claim(&spec.name, claimant)?;
    let externals = external::inherited().map_err(system("listing the inherited fds"))?;
    let inherited: Vec<RawFd> = externals.iter().map(|record| record.number).collect();
    let externals = externals.into_iter().filter(|record| !is_replaced(&spec, record.number)).collect();
    let ignored_signals = spawn::ignored_signals();
    // From now on signals wait in the signalfd: those that end us must not leave a half-started job's terminal or entry.
    let blocked_signals = spawn::set_blocked_signals(!0).map_err(system("blocking signals"))?;
    *blocked_before = Some(blocked_signals);
    let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(system("making a signalfd"))?;
    let (name, log, tty) = (spec.name.clone(), spec.log.clone(), spec.tty);
    let init_spec = InitSpec {
        spec,
        externals,
        inherited: inherited.clone(),
        closed: external::closed_standard(),
        ignored_signals: ignored_signals.clone(),
        blocked_signals,
        open_files_limit: getrlimit(Resource::RLIMIT_NOFILE).map_err(system("getrlimit"))?,
        user_namespace: namespaces::needs_user_namespace(),
        started: std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
    };
    let (ours, theirs) = local_socket::pair().map_err(system("making a socket"))?;
    let parts = InitParts {
        program: File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open("/proc/self/exe")
            .map_err(system("opening /proc/self/exe"))?,
        channel: theirs,
        spec_file: sealed(&init_spec)?,
        claim: &claim,
        pass: &pass,
    };
    let launcher = nix::unistd::getpid();
    let intermediate =
        spawn::fork_child(|| intermediate(launcher, &init_spec, &parts)).map_err(system("forking"))?;
    drop(parts);
    let mut children = Children { intermediate: Some(intermediate), init: None };
    let mut committed = false;
    let mut early_signals = Vec::new();
    let (main_pid, details) = loop {
        // Messages first: a signal that arrives together with the news of the commit is for the job, not for us.
        let message = match channel::receive(ours.as_fd(), committed) {
            Ok(Some(message)) => message,
            Ok(None) => return Err(LaunchError::InitDied(children.how_init_ended())),
            Err(channel::ReceiveError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Some(signal) = take_signals(&signals, &ignored_signals, &mut early_signals) {
                    return Err(LaunchError::Interrupted(signal));
                }
                wait_for_either(&ours, &signals)?;
                continue;
            }
            Err(channel::ReceiveError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(LaunchError::InitDied(children.how_init_ended()));
            }
            Err(error) => return Err(system("talking to the job's init")(io::Error::other(error))),
        };
        match message.kind {
            // Comes from the intermediate process, which then ends.
            Some(Kind::Done) => {
                children.init = i32::try_from(message.arg).ok();
                claim.write_init_pid(message.arg)?;
                children.reap_intermediate();
            }
            Some(Kind::LaunchProgress) => event(LaunchEvent::Progress(message.text())),
            Some(Kind::LaunchWarning) => event(LaunchEvent::Warning(message.text())),
            Some(Kind::LaunchCommitted) => committed = true,
            Some(Kind::LaunchStarted) => {
                // Only a report: nothing depends on it.
                let details = serde_json::from_slice(&message.payload).unwrap_or_default();
                break (i32::try_from(message.arg).unwrap_or(0), details);
            }
            Some(Kind::LaunchFailed) => return Err(failure(&message)),
            _ => {
                let text = format!("unexpected message {:#06x} from the job's init", message.kind_number);
                return Err(system("starting the job")(io::Error::other(text)));
            }
        }
    };
    let init_pid = children.keep();
    let supervision = claim.supervision.take();
    claim.keep();
    Ok(Job {
        name,
        init_pid,
        main_pid,
        tty,
        log,
        details,
        supervision,
        channel: ours,
        signals,
        early_signals,
        ignored_signals,
        inherited,
    })
}

/// Whether the job gets something else under this number than the launcher has there.
pub(crate) fn is_replaced(spec: &LaunchSpec, number: RawFd) -> bool {
    use std::io::IsTerminal as _;
    match number {
        0 | 1 => spec.tty || spec.detach,
        // With a terminal, a redirected stderr stays redirected.
        2 => spec.detach || (spec.tty && io::stderr().is_terminal()),
        _ => false,
    }
}

fn failure(message: &Message) -> LaunchError {
    LaunchError::Start { class: StartErrorClass::from_number(message.arg), message: message.text() }
}

fn wait_for_either(channel: &OwnedFd, signals: &SignalFd) -> Result<(), LaunchError> {
    let mut polled =
        [PollFd::new(channel.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    match poll(&mut polled, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(system("poll")(errno)),
    }
}

/// Takes the waiting signals; tells of one that ends a program, and keeps the others for the job.
fn take_signals(signals: &SignalFd, ignored: &[i32], early: &mut Vec<i32>) -> Option<Signal> {
    while let Ok(Some(info)) = signals.read_signal() {
        let number = info.ssi_signo as i32;
        if ignored.contains(&number) {
            continue;
        }
        match Signal::try_from(number) {
            Ok(signal @ (Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM)) => {
                return Some(signal);
            }
            Ok(Signal::SIGCHLD | Signal::SIGWINCH) => {}
            _ => early.push(number),
        }
    }
    None
}

/// The processes of a start that may fail; killed and reaped when dropped.
struct Children {
    intermediate: Option<i32>,
    init: Option<i32>,
}

impl Children {
    fn reap_intermediate(&mut self) {
        if let Some(pid) = self.intermediate.take() {
            let _ = waitpid(Pid::from_raw(pid), None);
        }
    }

    fn how_init_ended(&mut self) -> String {
        self.reap_intermediate();
        match self.init.take().map(|pid| waitpid(Pid::from_raw(pid), None)) {
            Some(Ok(nix::sys::wait::WaitStatus::Signaled(_, signal, _))) => format!(" (by {signal})"),
            Some(Ok(nix::sys::wait::WaitStatus::Exited(_, code))) => format!(" (exit code {code})"),
            _ => String::new(),
        }
    }

    fn keep(mut self) -> i32 {
        self.reap_intermediate();
        self.init.take().unwrap_or(0)
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for pid in [self.init.take(), self.intermediate.take()].into_iter().flatten() {
            let _ = spawn::send_signal(pid, libc::SIGKILL);
            let _ = waitpid(Pid::from_raw(pid), None);
        }
    }
}

fn sealed(spec: &InitSpec) -> Result<File, LaunchError> {
    let bytes = serde_json::to_vec(spec)
        .map_err(|error| system("writing down the job's description")(io::Error::from(error)))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create("ckpt-job", flags).map_err(system("memfd_create"))?);
    file.write_all(&bytes).and_then(|()| file.rewind()).map_err(system("writing a memfd"))?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(system("sealing a memfd"))?;
    Ok(file)
}

/// What init is made from.
struct InitParts<'a> {
    program: File,
    channel: OwnedFd,
    spec_file: File,
    claim: &'a Claim,
    pass: &'a [OwnedFd],
}

impl InitParts<'_> {
    fn tell_failure(&self, class: StartErrorClass, message: &str) -> i32 {
        // Without a launcher there is nobody to tell.
        let _ = channel::send(&self.channel, Kind::LaunchFailed, class as i64, message.as_bytes());
        1
    }
}

/// The intermediate process: enters the namespaces, forks init, ends.
fn intermediate(launcher: Pid, spec: &InitSpec, parts: &InitParts<'_>) -> i32 {
    let die_with_launcher =
        || nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_ok() && nix::unistd::getppid() == launcher;
    if !die_with_launcher() {
        return 1;
    }
    if let Err(error) = namespaces::enter(spec.user_namespace, spec.spec.time) {
        return parts.tell_failure(StartErrorClass::HostCannot, &error.to_string());
    }
    match spawn::fork_sibling(|| become_init(spec, parts)) {
        Ok(init) => match channel::send(&parts.channel, Kind::Done, i64::from(init), b"") {
            Ok(()) => 0,
            Err(_) => 1,
        },
        Err(error) => {
            parts.tell_failure(StartErrorClass::HostCannot, &format!("forking the job's init: {error}"))
        }
    }
}

/// The process that will be init, before it executes the program anew. Never returns 0.
fn become_init(spec: &InitSpec, parts: &InitParts<'_>) -> i32 {
    match try_become_init(spec, parts) {
        Ok(never) => match never {},
        Err((what, error)) => {
            parts.tell_failure(StartErrorClass::Failure, &format!("starting the job's init: {what}: {error}"))
        }
    }
}

fn try_become_init(
    spec: &InitSpec,
    parts: &InitParts<'_>,
) -> Result<std::convert::Infallible, (&'static str, io::Error)> {
    let failed = |what: &'static str| move |error: io::Error| (what, error);
    let failed_errno = |what: &'static str| move |errno: nix::errno::Errno| (what, io::Error::from(errno));
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(failed_errno("PR_SET_PDEATHSIG"))?;
    // A session of its own: the terminal of the launcher is none of init's business.
    nix::unistd::setsid().map_err(failed_errno("setsid"))?;
    // All fds of the job are open here under their numbers, so that no copy can get one of these.
    let count = spec.externals.len() + parts.pass.len() + 4;
    let (soft, hard) = spec.open_files_limit;
    let room = 2 * count as u64 + 64;
    let base = (HOLD_FDS_FROM as u64).min(hard.saturating_sub(room)).max(3) as RawFd;
    let needed = (base as u64 + room).min(hard);
    if soft < needed {
        setrlimit(Resource::RLIMIT_NOFILE, needed, hard).map_err(failed_errno("RLIMIT_NOFILE"))?;
    }
    let hold = |fd: RawFd| spawn::duplicate_for_exec(fd, base).map_err(failed("keeping an fd for the job"));
    let mut argv = vec![text(&format!("ckpt-init:{}", spec.spec.name)), text(INIT_ARGUMENT)];
    for fd in [
        parts.channel.as_raw_fd(),
        parts.spec_file.as_raw_fd(),
        parts.claim.directory.as_raw_fd(),
        parts.claim.alive.as_raw_fd(),
    ] {
        argv.push(text(&hold(fd)?.to_string()));
    }
    let list = |fds: Vec<RawFd>| -> Result<CString, (&'static str, io::Error)> {
        let held =
            fds.into_iter().map(|fd| hold(fd).map(|held| held.to_string())).collect::<Result<Vec<_>, _>>()?;
        Ok(text(&held.join(",")))
    };
    argv.push(list(spec.externals.iter().map(|record| record.number).collect())?);
    argv.push(list(parts.pass.iter().map(AsRawFd::as_raw_fd).collect())?);
    // Only the copies shall pass.
    for number in &spec.inherited {
        spawn::set_close_on_exec(*number, true).map_err(failed("close-on-exec"))?;
    }
    if spec.user_namespace {
        namespace::keep_capabilities_across_exec().map_err(failed("keeping capabilities"))?;
    }
    let environment = test_environment();
    match nix::unistd::execveat(&parts.program, c"", &argv, &environment, AtFlags::AT_EMPTY_PATH) {
        Ok(never) => Ok(never),
        Err(errno) => Err(failed_errno("executing ckpt")(errno)),
    }
}

/// What init finds in its environment: nothing, but for the settings of tests in a build that heeds them.
fn test_environment() -> Vec<CString> {
    if !cfg!(feature = "test-hooks") {
        return Vec::new();
    }
    let tests = std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"CKPT_TEST_"));
    let joined =
        tests.map(|(name, value)| [name.as_encoded_bytes(), b"=", value.as_encoded_bytes()].concat());
    joined.filter_map(|text| CString::new(text).ok()).collect()
}

/// Text of our own making, without NUL.
fn text(text: &str) -> CString {
    CString::new(OsStr::new(text).as_encoded_bytes()).unwrap_or_default()
}
