// SPDX-License-Identifier: MIT OR Apache-2.0
//! Asking a job's init: status, signals, waiting.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ckpt_abi::init_protocol::{KillScope, Kind, MAX_DESCRIPTORS, MAX_PAYLOAD_BYTES, kill_arg};
use ckpt_sys::local_socket;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

use crate::ExitStatus;
use crate::channel::{self, Message, ReceiveError};
use crate::name::JobName;
use crate::registry::{Registry, RegistryError};
use crate::spec::JobRecord;
use crate::supervision::Supervision;

/// Why a job did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The registry refuses, or knows no such job.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// init refuses.
    #[error("job '{name}': {message}")]
    Refused {
        /// Which job.
        name: JobName,
        /// An errno, or 0.
        errno: i32,
        /// init's words.
        message: String,
    },
    /// init ended before it answered.
    #[error("job '{0}' ended")]
    Ended(JobName),
    /// It was killed, init included, and there is no exit status.
    #[error("job '{0}' was killed as a whole; the exit status of its main process is not known")]
    NoStatus(JobName),
    /// Talking failed.
    #[error("talking to job '{name}': {source}")]
    Io {
        /// Which job.
        name: JobName,
        /// Why.
        source: io::Error,
    },
}

/// What init says about its job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobStatus {
    /// What does not change.
    #[serde(flatten)]
    pub record: JobRecord,
    /// Whether the main process runs; what it left behind may go on without it.
    pub main_running: bool,
    /// How the main process ended.
    pub exit_status: Option<ExitStatus>,
    /// Number of processes, init not counted.
    pub processes: u32,
    /// Whether someone is attached to its terminal.
    pub attached: bool,
    /// Host name inside, as bytes in text (names are ASCII by convention, uname(2) does not insist).
    pub hostname: String,
    /// NIS domain name inside.
    pub domainname: String,
    /// System V shared memory segments and message queues in its namespace.
    pub sysv_objects: u64,
    /// System V semaphore sets there.
    pub semaphore_sets: u64,
    /// Memory that is still in the checkpoint only, in a job that was restored lazily.
    #[serde(default)]
    pub missing_memory: Option<MissingMemory>,
}

/// What a lazily restored job still depends on its checkpoint for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingMemory {
    /// Bytes that are still to come.
    pub missing_bytes: u64,
    /// Bytes that were to come at the start.
    pub total_bytes: u64,
}

/// A job that lives.
#[derive(Clone, Debug, Serialize)]
pub struct LiveJob {
    /// init's pid, here.
    pub init_pid: i32,
    /// Its supervision, if somebody asked for any.
    pub supervision: Option<Supervision>,
    /// What init says.
    #[serde(flatten)]
    pub status: JobStatus,
}

/// How waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitOutcome {
    /// How the main process ended.
    pub status: ExitStatus,
    /// Whether nothing of the job is left.
    pub job_ended: bool,
}

/// A connection to a job's init.
#[derive(Debug)]
pub(crate) struct Connection {
    pub name: JobName,
    pub socket: OwnedFd,
}

impl Connection {
    /// Connects to a live job.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] without a live job of this name.
    pub fn open(registry: &Registry, name: &JobName) -> Result<Connection, ClientError> {
        let not_found = || ClientError::from(RegistryError::NotFound(name.clone()));
        let directory = match File::open(registry.entry(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_found()),
            opened => opened.map_err(|source| ClientError::Io { name: name.clone(), source })?,
        };
        match local_socket::connect_in(directory.as_fd(), "sock".as_ref()) {
            Ok(socket) => Ok(Connection { name: name.clone(), socket }),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Err(not_found())
            }
            Err(source) => Err(ClientError::Io { name: name.clone(), source }),
        }
    }

    pub fn io(&self, source: impl Into<io::Error>) -> ClientError {
        ClientError::Io { name: self.name.clone(), source: source.into() }
    }

    pub fn send(&self, kind: Kind, arg: i64) -> Result<(), ClientError> {
        channel::send(&self.socket, kind, arg, b"").map_err(|error| self.lost(error))
    }

    /// The next message; [`ClientError::Refused`] for [`Kind::Error`].
    pub fn receive(&self) -> Result<Message, ClientError> {
        Ok(self.receive_with()?.0)
    }

    /// The next message and its descriptors.
    fn receive_with(&self) -> Result<(Message, Vec<OwnedFd>), ClientError> {
        let (message, descriptors) = loop {
            match channel::receive_with(self.socket.as_fd(), true) {
                // Why the job is being ended; what was asked for comes, or the end does.
                Ok(Some((message, _))) if message.kind == Some(Kind::Notice) => {}
                Ok(Some(received)) => break received,
                Ok(None) => return Err(ClientError::Ended(self.name.clone())),
                Err(ReceiveError::Io(error)) => return Err(self.lost(error)),
                Err(ReceiveError::Header(error)) => return Err(self.io(io::Error::other(error))),
            }
        };
        if message.kind == Some(Kind::Error) {
            return Err(ClientError::Refused {
                name: self.name.clone(),
                errno: i32::try_from(message.arg).unwrap_or(0),
                message: message.text(),
            });
        }
        Ok((message, descriptors))
    }

    fn lost(&self, error: io::Error) -> ClientError {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                ClientError::Ended(self.name.clone())
            }
            _ => self.io(error),
        }
    }

    pub(crate) fn ask(&self, kind: Kind, arg: i64, answer: Kind) -> Result<Message, ClientError> {
        self.send(kind, arg)?;
        self.expect(answer)
    }

    fn expect(&self, answer: Kind) -> Result<Message, ClientError> {
        let message = self.receive()?;
        if message.kind == Some(answer) { Ok(message) } else { Err(self.unexpected(&message)) }
    }

    fn unexpected(&self, message: &Message) -> ClientError {
        let text = format!("unexpected answer {:#06x}", message.kind_number);
        self.io(io::Error::other(text))
    }

    fn status(&self, registry: &Registry) -> Result<LiveJob, ClientError> {
        let peer = local_socket::peer(self.socket.as_fd()).map_err(|error| self.io(error))?;
        let message = self.ask(Kind::Status, 0, Kind::StatusReply)?;
        let status = serde_json::from_slice(&message.payload).map_err(|error| self.io(error))?;
        Ok(LiveJob { init_pid: peer.pid, supervision: registry.supervision(&self.name)?, status })
    }
}

/// What a live job's init says.
///
/// # Errors
/// [`RegistryError::NotFound`] if there is none of this name.
pub fn status(name: &JobName) -> Result<LiveJob, ClientError> {
    let registry = Registry::open()?;
    Connection::open(&registry, name)?.status(&registry)
}

/// What a supervisor hears from a job's init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// This signal was sent to the job and is to make a dump.
    DumpSignal(u8),
    /// The main process ended.
    Ended(WaitOutcome),
    /// init is gone, or does not speak any more.
    Lost,
}

/// A supervisor's connection to a job's init.
#[derive(Debug)]
pub struct Watch {
    connection: Connection,
    /// init's pid, here.
    pub init_pid: i32,
}

impl Watch {
    /// Connects to a live job as its supervisor, and asks to be told of the main process's end.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] without a live job of this name.
    pub fn start(registry: &Registry, name: &JobName) -> Result<Watch, ClientError> {
        let connection = Connection::open(registry, name)?;
        let peer = local_socket::peer(connection.socket.as_fd()).map_err(|error| connection.io(error))?;
        connection.ask(Kind::Supervise, 0, Kind::Done)?;
        connection.send(Kind::Wait, 0)?;
        Ok(Watch { connection, init_pid: peer.pid })
    }

    /// Readable when there may be a notice.
    pub fn socket(&self) -> std::os::fd::BorrowedFd<'_> {
        self.connection.socket.as_fd()
    }

    /// The next notice; `None` if there is none now.
    pub fn notice(&self) -> Option<Notice> {
        loop {
            let message = match channel::receive(self.connection.socket.as_fd(), false) {
                Err(ReceiveError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Ok(Some(message)) => message,
                _ => return Some(Notice::Lost),
            };
            match message.kind {
                Some(Kind::DumpSignal) => return u8::try_from(message.arg).ok().map(Notice::DumpSignal),
                Some(Kind::Exited) => return Some(outcome(&message).map_or(Notice::Lost, Notice::Ended)),
                _ => {}
            }
        }
    }

    /// After [`Notice::Ended`] of a job that goes on: asks to be told of the end of all of it.
    ///
    /// # Errors
    /// If init is gone.
    pub fn wait_for_all(&self) -> Result<(), ClientError> {
        self.connection.send(Kind::Wait, 1)
    }

    /// Ends all of the job, without that counting as somebody's wish.
    ///
    /// # Errors
    /// If init is gone.
    pub fn end_job(&self) -> Result<(), ClientError> {
        self.connection.send(Kind::Kill, kill_arg(libc::SIGKILL as u8, KillScope::Everything))
    }
}

/// What is to be made of the end of a supervised job's run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// That was the end.
    Final,
    /// It runs again.
    RunsAgain,
    /// Its supervisor has not started it again yet.
    Open,
}

/// Whether the run `run` of a job ([`Registry::run_of`]), which has ended, was its last.
///
/// # Errors
/// If the registry cannot be read.
pub fn verdict(registry: &Registry, name: &JobName, run: Option<&str>) -> Result<Verdict, RegistryError> {
    // In this order: the supervisor starts the next run before it can end.
    let supervised = registry.has_supervisor(name)?;
    if registry.is_live(name)? && registry.run_of(name).as_deref().is_some_and(|now| Some(now) != run) {
        return Ok(match Connection::open(registry, name) {
            Ok(_) => Verdict::RunsAgain,
            // Being started.
            Err(_) if supervised => Verdict::Open,
            Err(_) => Verdict::Final,
        });
    }
    let state = registry.supervision(name)?.map(|supervision| supervision.state);
    let is_final = !supervised
        || state.is_none_or(|state| state.final_run.is_some() && state.final_run.as_deref() == run);
    Ok(if is_final { Verdict::Final } else { Verdict::Open })
}

/// How often an open verdict is looked for.
const VERDICT_POLL: Duration = Duration::from_millis(50);

/// Waits as [`wait`] does, through all recoveries of a supervised job. The checkpoint is that of a dump that ended it.
///
/// # Errors
/// As [`wait`].
pub fn wait_through(name: &JobName, whole_job: bool) -> (Result<WaitOutcome, ClientError>, Option<String>) {
    let registry = match Registry::open() {
        Ok(registry) => registry,
        Err(error) => return (Err(error.into()), None),
    };
    loop {
        let run = registry.run_of(name);
        let policy = registry.supervised(name).ok();
        let ended = wait(name, whole_job);
        let status = match &ended {
            Ok(outcome) => Some(outcome.status),
            Err(ClientError::NoStatus(_)) => None,
            // Between two runs.
            Err(ClientError::Registry(RegistryError::NotFound(_)))
                if registry.has_supervisor(name).unwrap_or(false) =>
            {
                None
            }
            Err(_) => return (ended, registry.saved(name)),
        };
        let failed = policy.is_some_and(|job| job.policy.is_failure(status, job.tty));
        if let Some(checkpoint) = registry.saved(name) {
            return (ended, Some(checkpoint));
        }
        if !failed {
            return (ended, None);
        }
        loop {
            match verdict(&registry, name, run.as_deref()) {
                Ok(Verdict::Open) => std::thread::sleep(VERDICT_POLL),
                Ok(Verdict::RunsAgain) => break,
                Ok(Verdict::Final) if registry.run_of(name) == run => return (ended, registry.saved(name)),
                // The last run was over before it was seen here.
                Ok(Verdict::Final) => return (wait(name, whole_job), registry.saved(name)),
                Err(error) => return (Err(error.into()), None),
            }
        }
    }
}

/// All live jobs of this user on this host, sorted by name. Jobs that end meanwhile are left out; leftovers are swept.
///
/// # Errors
/// If the registry cannot be read, or a job does not answer.
pub fn live_jobs() -> Result<Vec<LiveJob>, ClientError> {
    let registry = Registry::open()?;
    let mut jobs = Vec::new();
    for name in registry.live_names()? {
        match Connection::open(&registry, &name).and_then(|connection| connection.status(&registry)) {
            Ok(job) => jobs.push(job),
            // Just starting, or just ended.
            Err(ClientError::Registry(RegistryError::NotFound(_)) | ClientError::Ended(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(jobs)
}

/// What a dumper leaves with init for the next one: descriptors, and a note that init does not look into.
#[derive(Debug, Default)]
pub struct Kept {
    /// The descriptors, in order.
    pub descriptors: Vec<OwnedFd>,
    /// The note.
    pub note: Vec<u8>,
}

/// Leaves something with a job's init, in place of what was kept there before. It is dropped when the job ends.
///
/// # Errors
/// [`ClientError::Refused`] with `ENOSYS` by the init of an older ckpt, with `E2BIG` if it is too much; then what was kept before stays.
pub fn keep(name: &JobName, kept: &Kept) -> Result<(), ClientError> {
    let connection = Connection::open(&Registry::open()?, name)?;
    let (mut descriptors, mut note) = (kept.descriptors.as_slice(), kept.note.as_slice());
    loop {
        let (now, rest) = descriptors.split_at(descriptors.len().min(MAX_DESCRIPTORS));
        let (bytes, more) = note.split_at(note.len().min(MAX_PAYLOAD_BYTES));
        let last = rest.is_empty() && more.is_empty();
        let packet = channel::packet(Kind::Keep, i64::from(!last), bytes);
        local_socket::send_packet_with(connection.socket.as_fd(), &packet, now, true)
            .map_err(|error| connection.lost(error))?;
        connection.expect(Kind::Done)?;
        if last {
            return Ok(());
        }
        (descriptors, note) = (rest, more);
    }
}

/// What was left with a job's init, `None` if nothing was. With `copy` init keeps it, too; else it is the caller's alone, and gone when
/// the caller ends.
///
/// # Errors
/// [`ClientError::Refused`] with `ENOSYS` by the init of an older ckpt.
pub fn take(name: &JobName, copy: bool) -> Result<Option<Kept>, ClientError> {
    let connection = Connection::open(&Registry::open()?, name)?;
    connection.send(Kind::Take, i64::from(copy))?;
    let mut kept: Option<Kept> = None;
    loop {
        let (message, descriptors) = connection.receive_with()?;
        match message.kind {
            Some(Kind::Done) => return Ok(kept),
            Some(Kind::Kept) => {
                let kept = kept.get_or_insert_default();
                kept.descriptors.extend(descriptors);
                kept.note.extend(message.payload);
            }
            _ => return Err(connection.unexpected(&message)),
        }
    }
}

/// Waits until nothing of a job depends any more on the checkpoint that it was restored from.
///
/// # Errors
/// [`RegistryError::NotFound`]; [`ClientError::Ended`] if the job ends before.
pub fn settle(name: &JobName) -> Result<(), ClientError> {
    let connection = Connection::open(&Registry::open()?, name)?;
    match connection.ask(Kind::Settle, 0, Kind::Done) {
        // An init that does not know this has no such job either.
        Err(ClientError::Refused { errno: libc::ENOSYS, .. }) => Ok(()),
        settled => settled.map(drop),
    }
}

/// How long a killed job is waited for.
const KILLED: TimeVal = TimeVal::new(10, 0);
/// How long its supervisor is waited for, which may still be waiting for a dump that is being written.
const SUPERVISOR_GOES: Duration = Duration::from_secs(2);

/// Sends a signal to a job; see [`KillScope`] for whom it reaches. SIGKILL ends all of it, which is waited for, so that files, ports and
/// the name are free again afterwards; but no longer than ten seconds, as a process may be stuck in the kernel.
///
/// # Errors
/// [`RegistryError::NotFound`]; [`ClientError::Refused`] with the errno of kill(2).
pub fn kill(name: &JobName, signal: u8, scope: KillScope) -> Result<(), ClientError> {
    let registry = Registry::open()?;
    let connection = match Connection::open(&registry, name) {
        // It has failed and is about to be started again: the signal is for whoever does that.
        Err(error @ ClientError::Registry(RegistryError::NotFound(_))) => {
            let supervision = registry.supervision(name)?.filter(|known| known.supervised);
            let pid = supervision.map_or(0, |known| known.state.pid);
            // Told to end, as SIGKILL would leave a job that nobody ends.
            let signal = if i32::from(signal) == libc::SIGKILL { libc::SIGTERM } else { i32::from(signal) };
            return match pid {
                2.. => ckpt_sys::spawn::send_signal(pid, signal)
                    .map_err(|source| ClientError::Io { name: name.clone(), source }),
                _ => Err(error),
            };
        }
        opened => opened?,
    };
    connection.ask(Kind::Kill, kill_arg(signal, scope), Kind::Done)?;
    if i32::from(signal) == libc::SIGKILL {
        setsockopt(&connection.socket, sockopt::ReceiveTimeout, &KILLED)
            .map_err(|errno| connection.io(errno))?;
        // However this ends, the signal has been delivered.
        let _ = connection.ask(Kind::Wait, 1, Kind::Exited);
        // Its supervisor sees the end, too, and goes; until then it has the name.
        let until = Instant::now() + SUPERVISOR_GOES;
        while registry.has_supervisor(name)? && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// Waits until the main process of a job has ended, or with `whole_job` all of it. For a job that has ended before, tells how, as
/// long as the registry remembers it.
///
/// # Errors
/// [`RegistryError::NotFound`]; [`ClientError::NoStatus`] if init was killed.
pub fn wait(name: &JobName, whole_job: bool) -> Result<WaitOutcome, ClientError> {
    let registry = Registry::open()?;
    let connection = match Connection::open(&registry, name) {
        Err(ClientError::Registry(RegistryError::NotFound(_))) => {
            // It may have ended between two looks.
            return match registry.exit_status(name)? {
                Some(status) => Ok(WaitOutcome { status, job_ended: true }),
                None => Err(RegistryError::NotFound(name.clone()).into()),
            };
        }
        opened => opened?,
    };
    let from_registry = |error| match (error, registry.exit_status(name)) {
        (ClientError::Ended(_), Ok(Some(status))) => Ok(WaitOutcome { status, job_ended: true }),
        (ClientError::Ended(name), _) => Err(ClientError::NoStatus(name)),
        (error, _) => Err(error),
    };
    match connection.ask(Kind::Wait, i64::from(whole_job), Kind::Exited) {
        Ok(message) => outcome(&message).ok_or_else(|| ClientError::NoStatus(name.clone())),
        Err(error) => from_registry(error),
    }
}

/// What a [`Kind::Exited`] says; `None` if it does not know the status.
pub(crate) fn outcome(message: &Message) -> Option<WaitOutcome> {
    let status = ExitStatus::from_wait_status(i32::try_from(message.arg).ok()?)?;
    Some(WaitOutcome { status, job_ended: !message.payload.is_empty() })
}
