// SPDX-License-Identifier: MIT OR Apache-2.0
//! Asking a job's init: status, signals, waiting.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

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
}

/// A job that lives.
#[derive(Clone, Debug, Serialize)]
pub struct LiveJob {
    /// init's pid, here.
    pub init_pid: i32,
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
        let (message, descriptors) = match channel::receive_with(self.socket.as_fd(), true) {
            Ok(Some(received)) => received,
            Ok(None) => return Err(ClientError::Ended(self.name.clone())),
            Err(ReceiveError::Io(error)) => return Err(self.lost(error)),
            Err(ReceiveError::Header(error)) => return Err(self.io(io::Error::other(error))),
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

    fn ask(&self, kind: Kind, arg: i64, answer: Kind) -> Result<Message, ClientError> {
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

    fn status(&self) -> Result<LiveJob, ClientError> {
        let peer = local_socket::peer(self.socket.as_fd()).map_err(|error| self.io(error))?;
        let message = self.ask(Kind::Status, 0, Kind::StatusReply)?;
        let status = serde_json::from_slice(&message.payload).map_err(|error| self.io(error))?;
        Ok(LiveJob { init_pid: peer.pid, status })
    }
}

/// What a live job's init says.
///
/// # Errors
/// [`RegistryError::NotFound`] if there is none of this name.
pub fn status(name: &JobName) -> Result<LiveJob, ClientError> {
    Connection::open(&Registry::open()?, name)?.status()
}

/// All live jobs of this user on this host, sorted by name. Jobs that end meanwhile are left out; leftovers are swept.
///
/// # Errors
/// If the registry cannot be read, or a job does not answer.
pub fn live_jobs() -> Result<Vec<LiveJob>, ClientError> {
    let registry = Registry::open()?;
    let mut jobs = Vec::new();
    for name in registry.live_names()? {
        match Connection::open(&registry, &name).and_then(|connection| connection.status()) {
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

/// How long a killed job is waited for.
const KILLED: TimeVal = TimeVal::new(10, 0);

/// Sends a signal to a job; see [`KillScope`] for whom it reaches. SIGKILL ends all of it, which is waited for, so that files, ports and
/// the name are free again afterwards; but no longer than ten seconds, as a process may be stuck in the kernel.
///
/// # Errors
/// [`RegistryError::NotFound`]; [`ClientError::Refused`] with the errno of kill(2).
pub fn kill(name: &JobName, signal: u8, scope: KillScope) -> Result<(), ClientError> {
    let connection = Connection::open(&Registry::open()?, name)?;
    connection.ask(Kind::Kill, kill_arg(signal, scope), Kind::Done)?;
    if i32::from(signal) == libc::SIGKILL {
        setsockopt(&connection.socket, sockopt::ReceiveTimeout, &KILLED)
            .map_err(|errno| connection.io(errno))?;
        // However this ends, the signal has been delivered.
        let _ = connection.ask(Kind::Wait, 1, Kind::Exited);
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
