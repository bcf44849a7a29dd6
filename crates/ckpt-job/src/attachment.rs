// SPDX-License-Identifier: MIT OR Apache-2.0
//! Staying with a job: the terminal in between, signals passed on, the exit status brought back.
//!
//! With a terminal of its own, the job's bytes go through unchanged, Ctrl-C and Ctrl-Z among them; the user's terminal is raw
//! meanwhile and is put back whatever ends us, SIGKILL and crashes excepted. Without one, the job has the user's
//! descriptors themselves and only signals pass through here.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::os::fd::{AsFd, BorrowedFd, RawFd};

use ckpt_abi::init_protocol::{KillScope, Kind, kill_arg};
use ckpt_sys::{local_socket, pty, spawn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::channel::{self, ReceiveError};
use crate::client::{ClientError, Connection, Verdict, WaitOutcome, outcome, verdict};
use crate::launch::Job;
use crate::name::JobName;
use crate::registry::{Registry, RegistryError};

/// How an attachment ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachmentEnd {
    /// The main process ended.
    Exited(WaitOutcome),
    /// Somebody else attached to the job's terminal, which goes on.
    TakenOver,
    /// The user asked to leave it running.
    Detached,
    /// A dump saved the job and ended it.
    Saved,
}

/// Stays with a job that was just started until its main process has ended, through all recoveries if it is supervised; `again` is told
/// of each. Descriptors that this process inherited are closed here
/// (standard ones replaced by /dev/null), so that a pipe's reader sees its end when the job closes it.
///
/// # Errors
/// [`ClientError::NoStatus`] if init was killed.
pub fn foreground(job: Job, mut again: impl FnMut()) -> Result<AttachmentEnd, ClientError> {
    let Job { name, init_pid, tty, channel, signals, early_signals, ignored_signals, inherited, .. } = job;
    let registry = Registry::open()?;
    let mut run = registry.run_of(&name);
    let supervised = registry.supervised(&name).ok();
    let connection = Connection { name: name.clone(), socket: channel };
    let stays_open = |fd: RawFd| match fd {
        0 | 1 => tty,
        // Messages may still come, unless somebody waits for the end of what stderr is.
        2 => tty || io::stderr().is_terminal() || !is_stream(io::stderr().as_fd()),
        _ => false,
    };
    for fd in inherited.into_iter().filter(|fd| !stays_open(*fd)) {
        close(fd).map_err(|error| connection.io(error))?;
    }
    let mut attachment =
        Attachment { connection, signals, ignored_signals, detach_key: None, unsent: VecDeque::new() };
    for signal in early_signals {
        attachment.pass_on(signal, KillScope::Main)?;
    }
    let mut child = Some(init_pid);
    loop {
        let mut end = attachment.run(tty);
        // One that connects when the job is just ending hears nothing, but the status is written down.
        if matches!(end, Err(ClientError::NoStatus(_)))
            && let Some(status) = registry.exit_status(&name)?
            && registry.run_of(&name) == run
        {
            end = Ok(AttachmentEnd::Exited(WaitOutcome { status, job_ended: true }));
        }
        if let Some(init_pid) = child
            && let Ok(AttachmentEnd::Exited(WaitOutcome { job_ended: true, .. }))
            | Err(ClientError::NoStatus(_)) = end
        {
            // init is our child and about to end: afterwards nothing of the job is left, its name included.
            let _ = waitpid(Pid::from_raw(init_pid), Some(WaitPidFlag::__WALL));
            child = None;
        }
        let status = match &end {
            Ok(AttachmentEnd::Exited(outcome)) => Some(outcome.status),
            Err(ClientError::NoStatus(_)) => None,
            _ => return end,
        };
        if registry.saved(&name).is_some() {
            return Ok(AttachmentEnd::Saved);
        }
        if !supervised.as_ref().is_some_and(|job| job.policy.is_failure(status, job.tty)) {
            return end;
        }
        let Some((connection, next)) = attachment.next_run(&registry, run.as_deref(), tty)? else {
            if registry.saved(&name).is_some() {
                return Ok(AttachmentEnd::Saved);
            }
            if registry.run_of(&name) == run {
                return end;
            }
            // The last run was over before it was seen here.
            let status = registry.exit_status(&name)?.ok_or(ClientError::NoStatus(name))?;
            return Ok(AttachmentEnd::Exited(WaitOutcome { status, job_ended: true }));
        };
        run = Some(next);
        attachment.connection = connection;
        attachment.unsent.clear();
        again();
    }
}

/// Attaches this process's terminal to a live job until its main process ends or the user types `detach_key`.
///
/// # Errors
/// [`crate::RegistryError::NotFound`]; [`ClientError::Refused`] if the job has no terminal.
pub fn attach(name: &JobName, detach_key: Option<u8>) -> Result<AttachmentEnd, ClientError> {
    let connection = Connection::open(&Registry::open()?, name)?;
    let ignored_signals = spawn::ignored_signals();
    let failed = |errno: Errno| ClientError::Io { name: name.clone(), source: errno.into() };
    spawn::set_blocked_signals(!0).map_err(|error| connection.io(error))?;
    let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(failed)?;
    let window = pty::window_size(io::stdin().as_fd()).map_or(0, |size| size.to_arg());
    connection.send(Kind::Attach, window)?;
    // Done or the refusal; nothing else can come before it.
    connection.receive()?;
    connection.send(Kind::Wait, 0)?;
    Attachment { connection, signals, ignored_signals, detach_key, unsent: VecDeque::new() }.run(true)
}

fn is_stream(fd: BorrowedFd<'_>) -> bool {
    use nix::sys::stat::{SFlag, fstat};
    fstat(fd).is_ok_and(|status| {
        matches!(SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT, SFlag::S_IFIFO | SFlag::S_IFSOCK)
    })
}

fn close(fd: RawFd) -> io::Result<()> {
    if fd > 2 {
        return spawn::close_inherited(fd);
    }
    spawn::replace_standard(fd, &File::options().read(true).write(true).open("/dev/null")?)
}

struct Attachment {
    connection: Connection,
    signals: SignalFd,
    ignored_signals: Vec<i32>,
    detach_key: Option<u8>,
    /// Packets that init had no room for. Waiting for room instead could wait for ever: init may be waiting for us to take
    /// the job's output.
    unsent: VecDeque<Vec<u8>>,
}

/// The user's terminal in raw mode; put back when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` if stdin is no terminal.
    fn enter() -> Option<RawTerminal> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw).ok()?;
        Some(RawTerminal { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done if the terminal is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}

impl Attachment {
    /// Waits for the next run of a job that has failed, and names it; `None` if there will be none.
    fn next_run(
        &self,
        registry: &Registry,
        run: Option<&str>,
        tty: bool,
    ) -> Result<Option<(Connection, String)>, ClientError> {
        let name = &self.connection.name;
        loop {
            match verdict(registry, name, run)? {
                Verdict::Final => return Ok(None),
                Verdict::RunsAgain => {
                    let next = registry.run_of(name);
                    let attached = Connection::open(registry, name).and_then(|connection| {
                        if tty {
                            let window =
                                pty::window_size(io::stdin().as_fd()).map_or(0, |size| size.to_arg());
                            connection.ask(Kind::Attach, window, Kind::Done)?;
                        }
                        connection.send(Kind::Wait, 0)?;
                        Ok(connection)
                    });
                    match attached {
                        Ok(connection) => {
                            // Otherwise it may be one that came after it.
                            if let Some(next) =
                                next.filter(|next| registry.run_of(name).as_ref() == Some(next))
                            {
                                return Ok(Some((connection, next)));
                            }
                        }
                        // Ended again already: what comes of that shows in the next round.
                        Err(ClientError::Registry(RegistryError::NotFound(_)) | ClientError::Ended(_)) => {}
                        Err(error) => return Err(error),
                    }
                }
                Verdict::Open => {}
            }
            let poll_again = PollTimeout::from(50u16);
            let _ = poll(&mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)], poll_again);
            while let Ok(Some(info)) = self.signals.read_signal() {
                let signal = info.ssi_signo as i32;
                let supervisor = registry.supervision(name)?.map_or(0, |supervision| supervision.state.pid);
                let for_it = !self.ignored_signals.contains(&signal)
                    && ![libc::SIGCHLD, libc::SIGPIPE, libc::SIGWINCH, libc::SIGTSTP, libc::SIGCONT]
                        .contains(&signal);
                if for_it && supervisor > 1 {
                    // There is no job that it could reach.
                    let _ = spawn::send_signal(supervisor, signal);
                }
            }
        }
    }

    fn run(&mut self, tty: bool) -> Result<AttachmentEnd, ClientError> {
        let mut raw = if tty { RawTerminal::enter() } else { None };
        if tty {
            // The window may have changed since the start.
            self.send_window_size()?;
        }
        let mut input_open = tty;
        let mut chunk = vec![0; 4096];
        loop {
            self.flush()?;
            let mut channel_events = PollFlags::POLLIN;
            if !self.unsent.is_empty() {
                channel_events |= PollFlags::POLLOUT;
            }
            let mut polled = vec![
                PollFd::new(self.connection.socket.as_fd(), channel_events),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            let stdin = io::stdin();
            if input_open && self.unsent.is_empty() {
                polled.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.connection.io(errno)),
            }
            let happened: Vec<bool> =
                polled.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
            drop(polled);
            if happened[1] {
                self.take_signals(tty, &mut raw)?;
            }
            if happened[0]
                && let Some(end) = self.take_message()?
            {
                return Ok(end);
            }
            if happened.get(2) == Some(&true) {
                match nix::unistd::read(&stdin, &mut chunk) {
                    Ok(0) | Err(Errno::EIO) => {
                        input_open = false;
                        // What a terminal's user types to say that there is no more.
                        const END_OF_INPUT: u8 = 4;
                        if raw.is_none() {
                            self.send(Kind::Data, 0, &[END_OF_INPUT])?;
                        }
                    }
                    Ok(length) => {
                        let typed = &chunk[..length];
                        if self.detach_key.is_some_and(|key| typed.contains(&key)) {
                            return Ok(AttachmentEnd::Detached);
                        }
                        self.send(Kind::Data, 0, typed)?;
                    }
                    Err(Errno::EAGAIN | Errno::EINTR) => {}
                    Err(errno) => return Err(self.connection.io(errno)),
                }
            }
        }
    }

    fn take_message(&mut self) -> Result<Option<AttachmentEnd>, ClientError> {
        let message = match channel::receive(self.connection.socket.as_fd(), false) {
            Err(ReceiveError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Ok(Some(message)) => message,
            // init is gone without a farewell.
            Ok(None) => return Err(ClientError::NoStatus(self.connection.name.clone())),
            Err(ReceiveError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(ClientError::NoStatus(self.connection.name.clone()));
            }
            Err(error) => return Err(self.connection.io(io::Error::other(error))),
        };
        match message.kind {
            Some(Kind::Data) => {
                // A reader that has gone away is no reason to end: the job goes on, its output is lost here.
                let _ = write_all(io::stdout().as_fd(), &message.payload);
                Ok(None)
            }
            Some(Kind::Exited) => match outcome(&message) {
                Some(outcome) => Ok(Some(AttachmentEnd::Exited(outcome))),
                None => Err(ClientError::NoStatus(self.connection.name.clone())),
            },
            Some(Kind::Notice) => {
                // The terminal may be raw.
                let text = format!("ckpt: {}\r\n", message.text());
                let _ = write_all(io::stderr().as_fd(), text.as_bytes());
                Ok(None)
            }
            Some(Kind::Detached) => Ok(Some(AttachmentEnd::TakenOver)),
            // Answers to signals passed on: a job without the process meant has nothing to do with them.
            _ => Ok(None),
        }
    }

    fn take_signals(&mut self, tty: bool, raw: &mut Option<RawTerminal>) -> Result<(), ClientError> {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = info.ssi_signo as i32;
            match signal {
                libc::SIGCHLD | libc::SIGPIPE | libc::SIGTTIN | libc::SIGTTOU => {}
                libc::SIGWINCH if tty => self.send_window_size()?,
                _ if self.ignored_signals.contains(&signal) => {}
                libc::SIGTSTP => self.stop(tty, raw)?,
                // Sent to us when a shell resumes us, and by stop() itself.
                libc::SIGCONT => {
                    if tty && raw.is_none() {
                        *raw = RawTerminal::enter();
                        self.send_window_size()?;
                    }
                    self.pass_on(signal, KillScope::Job)?;
                }
                // The terminal's keys reach a process group; kill(1) reaches the process it names.
                _ if info.ssi_code == libc::SI_KERNEL => self.pass_on(signal, KillScope::Job)?,
                _ => self.pass_on(signal, if tty { KillScope::Job } else { KillScope::Main })?,
            }
        }
        Ok(())
    }

    /// SIGTSTP: the job stops, then we do, so that the shell gets its terminal back. The job's process group has no parent
    /// in its session, and for such the kernel drops SIGTSTP: hence SIGSTOP.
    fn stop(&mut self, tty: bool, raw: &mut Option<RawTerminal>) -> Result<(), ClientError> {
        self.pass_on(libc::SIGSTOP, KillScope::Job)?;
        *raw = None;
        // SIGSTOP cannot be blocked: this returns when we are continued, and SIGCONT waits in the signalfd.
        spawn::send_signal(nix::unistd::getpid().as_raw(), libc::SIGSTOP)
            .map_err(|error| self.connection.io(error))?;
        if tty {
            *raw = RawTerminal::enter();
            self.send_window_size()?;
        }
        Ok(())
    }

    fn pass_on(&mut self, signal: i32, scope: KillScope) -> Result<(), ClientError> {
        self.send(Kind::Kill, kill_arg(signal as u8, scope), b"")
    }

    fn send_window_size(&mut self) -> Result<(), ClientError> {
        match pty::window_size(io::stdin().as_fd()) {
            Ok(size) => self.send(Kind::Resize, size.to_arg(), b""),
            Err(_) => Ok(()),
        }
    }

    fn send(&mut self, kind: Kind, arg: i64, payload: &[u8]) -> Result<(), ClientError> {
        self.unsent.push_back(channel::packet(kind, arg, payload));
        self.flush()
    }

    fn flush(&mut self) -> Result<(), ClientError> {
        while let Some(packet) = self.unsent.front() {
            match local_socket::send_packet(self.connection.socket.as_fd(), packet, false) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // A job that has just ended takes nothing any more, but its last messages still wait to be read.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
                {
                    self.unsent.clear();
                }
                Err(error) => return Err(self.connection.io(error)),
                Ok(()) => drop(self.unsent.pop_front()),
            }
        }
        Ok(())
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match nix::unistd::write(fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], PollTimeout::NONE)?;
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
