// SPDX-License-Identifier: MIT OR Apache-2.0
//! init once the job runs: reaps, serves clients, moves the terminal's bytes, and ends with the job.
//!
//! The terminal is always drained: to the attached client, else to the job's log. An attached client that does not read makes
//! the job wait, as a terminal that does not scroll does; one that is gone is no longer attached.
//!
//! Limits: [`MAX_CLIENTS`] connections; a client that lets answers pile up is dropped. No client can make init end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ckpt_abi::hooks::{ANSWER_NOBODY, DUMP_NOW_SIGNAL, HOOKS_OFFSET, Hooks, answer, unanswered};
use ckpt_abi::init_protocol::{KillScope, Kind, VERSION, WindowSize, parse_kill_arg};
use ckpt_abi::interceptor::{CONTROL_SIZE_BYTES, decode_control};
use ckpt_sys::spawn::Reaped;
use ckpt_sys::{local_socket, pty, spawn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::ExitStatus;
use crate::channel::{self, Message, ReceiveError};
use crate::client::{JobStatus, MissingMemory};
use crate::init::{Fetching, open_log};
use crate::registry::write_entry_file;
use crate::spec::{JobRecord, LaunchSpec};

/// Most connections at a time.
const MAX_CLIENTS: usize = 64;
/// Bytes of terminal data in one message.
const CHUNK_BYTES: usize = 16 * 1024;
/// Output waiting for the attached client above which the terminal is not read.
const MAX_OUTPUT_BYTES: usize = 256 * 1024;
/// Input waiting for the terminal above which the attached client is not read.
const MAX_INPUT_BYTES: usize = 64 * 1024;
/// Answers waiting above which a client is dropped; well above what the terminal may put there.
const MAX_OUTBOX_BYTES: usize = 8 * 1024 * 1024;
/// Most messages of a dumper that are kept for the next one; with their descriptors they cover some thousands of processes.
const MAX_KEPT_PARTS: usize = 64;
/// How long the end of the job waits for clients to take their last messages.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often a terminal whose other end is closed is looked at again.
const REOPEN_CHECK_MS: u16 = 1000;

/// What init goes on with.
pub(crate) struct Resources {
    pub spec: LaunchSpec,
    pub record: JobRecord,
    pub entry: File,
    /// Held as long as init lives.
    pub alive: File,
    pub listener: OwnedFd,
    pub signals: SignalFd,
    pub pty: Option<OwnedFd>,
    pub launcher: Option<OwnedFd>,
    pub main_exited: Option<ExitStatus>,
    pub fetching: Option<Box<dyn Fetching>>,
}

/// What a client waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WaitsFor {
    MainProcess,
    WholeJob,
}

/// A part of what a dumper had kept: descriptors and bytes that init does not look into.
struct KeptPart {
    descriptors: Vec<OwnedFd>,
    note: Vec<u8>,
}

struct Client {
    socket: OwnedFd,
    outbox: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    outbox_bytes: usize,
    waits_for: Option<WaitsFor>,
    /// Is to be told when the job needs its checkpoint no more.
    waits_to_settle: bool,
    attached: bool,
    /// What it wants kept, until it is complete.
    keeping: Vec<KeptPart>,
    /// Is told of signals that are to make a dump.
    supervises: bool,
    /// Answer what is queued, then close.
    closing: bool,
    gone: bool,
}

/// Tells a process that waits for a dump that nobody makes one. Who queues a signal says himself where his control word is and who he
/// is: it is written only to what is a control word, of that process, in which a call waits.
fn tell_nobody(pid: ckpt_sys::Pid, control_word: u64) -> Result<(), ckpt_sys::Errno> {
    let mut word = [0; CONTROL_SIZE_BYTES];
    if !control_word.is_multiple_of(CONTROL_SIZE_BYTES as u64) {
        return Ok(());
    }
    ckpt_sys::memory::read(pid, control_word, &mut word)?;
    let get = |field: usize| {
        let bytes = word[HOOKS_OFFSET + field..].first_chunk();
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    if decode_control(&word).is_none() || get(offset_of!(Hooks, owner)) != pid.as_raw() as u32 {
        return Ok(());
    }
    let (asking, answered) = (get(offset_of!(Hooks, asking)), get(offset_of!(Hooks, answer)));
    let Some(ticket) = unanswered(asking, answered) else { return Ok(()) };
    let at = control_word + (HOOKS_OFFSET + offset_of!(Hooks, answer)) as u64;
    ckpt_sys::memory::write(pid, at, &answer(ticket, ANSWER_NOBODY).to_le_bytes())
}

impl Client {
    fn new(socket: OwnedFd) -> Client {
        Client {
            socket,
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            waits_for: None,
            waits_to_settle: false,
            attached: false,
            keeping: Vec::new(),
            supervises: false,
            closing: false,
            gone: false,
        }
    }

    fn push(&mut self, kind: Kind, arg: i64, payload: &[u8]) {
        self.push_with(kind, arg, payload, Vec::new());
    }

    fn push_with(&mut self, kind: Kind, arg: i64, payload: &[u8], descriptors: Vec<OwnedFd>) {
        let packet = channel::packet(kind, arg, payload);
        self.outbox_bytes += packet.len();
        self.outbox.push_back((packet, descriptors));
        if self.outbox_bytes > MAX_OUTBOX_BYTES {
            self.gone = true;
        }
        self.flush();
    }

    fn flush(&mut self) {
        while let Some((packet, descriptors)) = self.outbox.front() {
            match local_socket::send_packet_with(self.socket.as_fd(), packet, descriptors, false) {
                Ok(()) => {
                    self.outbox_bytes -= packet.len();
                    self.outbox.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
        if self.closing {
            self.gone = true;
        }
    }
}

struct Supervisor {
    spec: LaunchSpec,
    record: JobRecord,
    entry: File,
    alive: File,
    clients: Vec<Client>,
    main_running: bool,
    main_status: Option<ExitStatus>,
    pty: Option<OwnedFd>,
    pty_closed: bool,
    input: VecDeque<u8>,
    log: Option<File>,
    kept: Vec<KeptPart>,
    /// Signals that are to make a dump; they came before anybody asked for them.
    untold: Vec<u8>,
    /// Somebody has asked for them.
    was_supervised: bool,
    fetching: Option<Box<dyn Fetching>>,
    /// The job is being ended because its memory can't be fetched: the status that stands for that.
    failed: Option<ExitStatus>,
}

/// The exit status of a job whose checkpoint turns out to be damaged while it runs; that of the commands that find it before.
const CORRUPT: ExitStatus = ExitStatus::Exited(115);

/// The path of a registry entry that does not depend on what is mounted where.
pub(crate) fn entry_path(entry: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", entry.as_raw_fd()))
}

/// Serves the job until its last process has ended. Never returns.
pub(crate) fn run(resources: Resources) -> ! {
    let Resources { spec, record, entry, alive, listener, signals, pty, launcher, main_exited, fetching } =
        resources;
    let mut clients = Vec::new();
    if let Some(socket) = launcher {
        // A launcher in the foreground need not ask: the job might be over before it could.
        let mut client = Client::new(socket);
        client.waits_for = Some(WaitsFor::MainProcess);
        client.attached = pty.is_some() && !spec.detach;
        clients.push(client);
    }
    let mut supervisor = Supervisor {
        spec,
        record,
        entry,
        alive,
        clients,
        main_running: main_exited.is_none(),
        main_status: None,
        pty,
        pty_closed: false,
        input: VecDeque::new(),
        log: None,
        kept: Vec::new(),
        untold: Vec::new(),
        was_supervised: false,
        fetching,
        failed: None,
    };
    if let Some(status) = main_exited {
        supervisor.main_ended(status);
    }
    loop {
        let ended = supervisor.reap();
        if ended {
            supervisor.end();
        }
        supervisor.tell_waiters(WaitsFor::MainProcess);
        if let Err(errno) = supervisor.turn(&listener, &signals) {
            // Out of memory at worst: the job must not end for that. Not a busy loop.
            supervisor.note(&format!("ckpt init: {errno}; going on"));
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Supervisor {
    /// Waits for something to happen and deals with it.
    fn turn(&mut self, listener: &OwnedFd, signals: &SignalFd) -> Result<(), Errno> {
        let output_waiting = self.attached().map_or(0, |client| client.outbox_bytes);
        let mut pty_events = PollFlags::empty();
        if output_waiting < MAX_OUTPUT_BYTES {
            pty_events |= PollFlags::POLLIN;
        }
        if !self.input.is_empty() {
            pty_events |= PollFlags::POLLOUT;
        }
        let watch_pty = self.pty.is_some() && !self.pty_closed && !pty_events.is_empty();
        let mut polled = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(pty) = self.pty.as_ref().filter(|_| watch_pty) {
            polled.push(PollFd::new(pty.as_fd(), pty_events));
        }
        let fetched_at = polled.len();
        polled.extend(self.fetching.iter().map(|f| PollFd::new(f.ended(), PollFlags::POLLIN)));
        let first_client = polled.len();
        for client in &self.clients {
            let mut events = PollFlags::empty();
            let has_enough = client.attached && self.input.len() > MAX_INPUT_BYTES;
            if !has_enough && !client.closing {
                events |= PollFlags::POLLIN;
            }
            if !client.outbox.is_empty() {
                events |= PollFlags::POLLOUT;
            }
            polled.push(PollFd::new(client.socket.as_fd(), events));
        }
        // A closed terminal may be opened again by what is left in the job; there is no event for that.
        let timeout = if self.pty_closed { PollTimeout::from(REOPEN_CHECK_MS) } else { PollTimeout::NONE };
        match poll(&mut polled, timeout) {
            Ok(0) => self.pty_closed = false,
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(errno),
        }
        let happened: Vec<PollFlags> =
            polled.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
        drop(polled);

        if !happened[0].is_empty() {
            self.take_signals(signals);
        }
        if watch_pty && !happened[2].is_empty() {
            self.serve_terminal(happened[2]);
        }
        if first_client > fetched_at && !happened[fetched_at].is_empty() {
            self.fetching_ended();
        }
        for (index, events) in happened[first_client..].iter().enumerate() {
            if events.contains(PollFlags::POLLOUT) {
                self.clients[index].flush();
            }
            if events.contains(PollFlags::POLLIN) {
                self.serve_client(index);
            } else if events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
                self.clients[index].gone = true;
            }
        }
        if !happened[1].is_empty() {
            self.accept(listener);
        }
        self.clients.retain(|client| !client.gone);
        Ok(())
    }

    fn attached(&self) -> Option<&Client> {
        self.clients.iter().find(|client| client.attached && !client.gone)
    }

    /// Waits for every child that has ended; true if none is left.
    fn reap(&mut self) -> bool {
        loop {
            match spawn::reap_any() {
                Ok(Reaped::Child { pid, status }) if self.main_running && pid == self.record.main_pid => {
                    // A stop is not reported without WUNTRACED, so that this is an end.
                    if let Some(status) = ExitStatus::from_wait_status(status) {
                        self.main_running = false;
                        self.main_ended(status);
                    }
                }
                Ok(Reaped::Child { .. }) => {}
                Ok(Reaped::NoneEnded) | Err(_) => return false,
                Ok(Reaped::NoChildren) => return true,
            }
        }
    }

    /// All memory has been fetched, or can't be.
    fn fetching_ended(&mut self) {
        let Some(outcome) = self.fetching.as_ref().and_then(|f| f.outcome()) else { return };
        match outcome {
            Ok(()) => {
                self.fetching = None;
                for client in self.clients.iter_mut().filter(|client| client.waits_to_settle) {
                    client.waits_to_settle = false;
                    client.push(Kind::Done, 0, b"");
                }
            }
            Err(_) if self.failed.is_some() => {}
            Err(why) => {
                // The threads that wait for memory must never find any other: they are killed while it is still withheld.
                let _ = self.kill(libc::SIGKILL, KillScope::Everything);
                self.failed = Some(CORRUPT);
                let text = format!("the job is ended: {why}");
                self.note(&format!("ckpt init: {text}"));
                for client in self.clients.iter_mut().filter(|c| c.attached || c.waits_for.is_some()) {
                    client.push(Kind::Notice, 0, text.as_bytes());
                }
                // Until the last process is gone nothing more is to be heard from it.
                std::mem::forget(self.fetching.take());
            }
        }
    }

    fn main_ended(&mut self, status: ExitStatus) {
        let status = crate::init::defect().or(self.failed).unwrap_or(status);
        self.main_status = Some(status);
        let line = format!("{}\n", status.to_wait_status());
        if let Err(error) = write_entry_file(&entry_path(&self.entry), "exit", line.as_bytes()) {
            self.note(&format!("ckpt init: the job's exit status could not be written down: {error}"));
        }
    }

    /// Answers those who wait for the main process, once it has ended; at the job's end also those who wait for that.
    fn tell_waiters(&mut self, what: WaitsFor) {
        if self.main_running {
            return;
        }
        let whole_job = what == WaitsFor::WholeJob;
        let asked = |client: &Client| match client.waits_for {
            Some(WaitsFor::MainProcess) => true,
            Some(WaitsFor::WholeJob) => whole_job,
            None => false,
        };
        if !self.clients.iter().any(asked) {
            return;
        }
        // What the main process wrote last comes before the news of its end.
        self.drain_terminal();
        let arg = self.main_status.map_or(-1, |status| i64::from(status.to_wait_status()));
        let payload: &[u8] = if whole_job { b"job ended" } else { b"" };
        for client in self.clients.iter_mut().filter(|client| asked(client)) {
            client.waits_for = None;
            client.push(Kind::Exited, arg, payload);
        }
    }

    /// The last process of the job is gone.
    fn end(&mut self) -> ! {
        self.main_running = false;
        self.drain_terminal();
        let _ = std::fs::remove_file(entry_path(&self.entry).join("sock"));
        // Whoever hears of the end can use the name at once.
        let _ = self.alive.unlock();
        self.tell_waiters(WaitsFor::WholeJob);
        let deadline = Instant::now() + FAREWELL;
        loop {
            self.clients.retain(|client| !client.gone && !client.outbox.is_empty());
            let left = deadline.saturating_duration_since(Instant::now());
            if self.clients.is_empty() || left.is_zero() {
                spawn::exit_now(0);
            }
            let mut polled: Vec<PollFd<'_>> = self
                .clients
                .iter()
                .map(|client| PollFd::new(client.socket.as_fd(), PollFlags::POLLOUT))
                .collect();
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let _ = poll(&mut polled, timeout);
            drop(polled);
            self.clients.iter_mut().for_each(Client::flush);
        }
    }

    fn take_signals(&mut self, signals: &SignalFd) {
        while let Ok(Some(info)) = signals.read_signal() {
            let signal = info.ssi_signo as i32;
            let from_outside = info.ssi_pid == 0;
            if !from_outside && signal == DUMP_NOW_SIGNAL && info.ssi_code == libc::SI_QUEUE {
                self.asked_for_dump(info.ssi_pid as i32, info.ssi_ptr);
                continue;
            }
            let forwarded =
                [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];
            // Who finds init in the host's process list and signals it means the job. From inside, pid 1 is immune, as
            // every init is.
            if from_outside && self.makes_dump(signal) {
                if let Err(error) = self.tell_supervisor(signal) {
                    self.note(&format!("ckpt init: signal {signal}: {error}"));
                }
            } else if from_outside && forwarded.contains(&signal) {
                let _ = self.kill(signal, KillScope::Job);
            }
        }
    }

    /// A process of the job asks for a dump (`ckpt_abi::hooks`). If nobody is there to make one it is told so at once.
    fn asked_for_dump(&mut self, pid: i32, control_word: u64) {
        let told = match self.spec.supervised {
            Some(_) => self.tell_supervisor(DUMP_NOW_SIGNAL),
            None => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        };
        if told.is_err() && pid > 1 {
            // One that is gone needs no answer.
            let _ = tell_nobody(ckpt_sys::Pid::from_raw(pid), control_word);
        }
    }

    fn makes_dump(&self, signal: i32) -> bool {
        let job = self.spec.supervised.as_ref();
        job.is_some_and(|job| job.policy.dump_on.iter().any(|dump| i32::from(dump.signal) == signal))
    }

    /// Hands a signal that is to make a dump to the supervisor, or keeps it until there is one.
    fn tell_supervisor(&mut self, signal: i32) -> io::Result<()> {
        match self.clients.iter_mut().find(|client| client.supervises && !client.gone) {
            Some(client) => client.push(Kind::DumpSignal, i64::from(signal), b""),
            None if self.was_supervised => {
                let name = &self.record.name;
                let text = format!(
                    "the signal is to make a dump, and the job has lost its supervisor; start another with: ckpt supervise {name}"
                );
                return Err(io::Error::other(text));
            }
            None => self.untold.extend(u8::try_from(signal).ok().filter(|new| !self.untold.contains(new))),
        }
        Ok(())
    }

    /// A signal that a client asks for.
    fn kill_for(&mut self, index: usize, signal: i32, scope: KillScope) -> io::Result<()> {
        const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGKILL];
        if self.makes_dump(signal) {
            return self.tell_supervisor(signal);
        }
        if ENDING.contains(&signal) && !self.clients[index].supervises {
            // The supervisor is to take the end that may follow for what it is.
            write_entry_file(&entry_path(&self.entry), "end-requested", b"")?;
        }
        self.kill(signal, scope)
    }

    fn kill(&self, signal: i32, scope: KillScope) -> io::Result<()> {
        const EVERYTHING: i32 = -1;
        if signal == libc::SIGKILL {
            return spawn::send_signal(EVERYTHING, signal);
        }
        match scope {
            KillScope::Everything => spawn::send_signal(EVERYTHING, signal),
            KillScope::Main if self.main_running => spawn::send_signal(self.record.main_pid, signal),
            KillScope::Main => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            KillScope::Job => {
                let foreground =
                    self.pty.as_ref().and_then(|pty| pty::foreground_group(pty.as_fd()).ok().flatten());
                if let Some(group) = foreground
                    && spawn::send_signal(-group, signal).is_ok()
                {
                    return Ok(());
                }
                if self.main_running {
                    return self.kill_main_group(signal);
                }
                spawn::send_signal(EVERYTHING, signal)
            }
        }
    }

    fn kill_main_group(&self, signal: i32) -> io::Result<()> {
        let main = nix::unistd::Pid::from_raw(self.record.main_pid);
        match nix::unistd::getpgid(Some(main)) {
            Ok(group) if group.as_raw() > 1 => spawn::send_signal(-group.as_raw(), signal),
            _ => spawn::send_signal(main.as_raw(), signal),
        }
    }

    fn accept(&mut self, listener: &OwnedFd) {
        while let Ok(Some(socket)) = local_socket::accept(listener.as_fd()) {
            let mut client = Client::new(socket);
            let refusal = match local_socket::peer(client.socket.as_fd()) {
                Err(error) => Some(format!("your identity could not be found out: {error}")),
                Ok(peer) if !self.may_talk(peer.uid) => {
                    Some(format!("uid {} may not control this job", peer.uid))
                }
                Ok(_) if self.clients.len() >= MAX_CLIENTS => {
                    Some(format!("this job serves {MAX_CLIENTS} connections already"))
                }
                Ok(_) => None,
            };
            if let Some(text) = refusal {
                client.closing = true;
                client.push(Kind::Error, i64::from(libc::EPERM), text.as_bytes());
            }
            if !client.gone {
                self.clients.push(client);
            }
        }
    }

    fn may_talk(&self, uid: u32) -> bool {
        // In a user namespace, root outside shows as the overflow uid. So does everyone else, but the socket lies in a
        // directory that only its owner and root can enter.
        const OVERFLOW_UID: u32 = 65534;
        uid == nix::unistd::geteuid().as_raw()
            || uid == 0
            || (self.record.user_namespace && uid == OVERFLOW_UID)
    }

    fn serve_client(&mut self, index: usize) {
        // One message a turn, so that no client keeps the others waiting.
        let (message, descriptors) = match channel::receive_with(self.clients[index].socket.as_fd(), false) {
            Ok(Some(received)) => received,
            Ok(None) => {
                self.clients[index].gone = true;
                return;
            }
            Err(ReceiveError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                let client = &mut self.clients[index];
                client.closing = true;
                client.push(Kind::Error, i64::from(libc::EPROTO), error.to_string().as_bytes());
                return;
            }
        };
        self.answer(index, &message, descriptors);
    }

    fn answer(&mut self, index: usize, message: &Message, descriptors: Vec<OwnedFd>) {
        match message.kind {
            Some(Kind::Keep) => self.keep(index, message, descriptors),
            Some(Kind::Take) => self.give(index, message.arg == 1),
            Some(Kind::Status) => {
                let status = self.status();
                let json = serde_json::to_vec(&status).unwrap_or_default();
                self.clients[index].push(Kind::StatusReply, 0, &json);
            }
            Some(Kind::Kill) => {
                let result = match parse_kill_arg(message.arg) {
                    Some((signal, scope)) => self.kill_for(index, i32::from(signal), scope),
                    None => Err(io::Error::from_raw_os_error(libc::EINVAL)),
                };
                self.reply(index, result);
            }
            Some(Kind::Wait) => {
                let whole_job = message.arg == 1;
                self.clients[index].waits_for =
                    Some(if whole_job { WaitsFor::WholeJob } else { WaitsFor::MainProcess });
            }
            Some(Kind::Supervise) => {
                for client in &mut self.clients {
                    client.supervises = false;
                }
                self.clients[index].supervises = true;
                self.was_supervised = true;
                self.clients[index].push(Kind::Done, 0, b"");
                for signal in std::mem::take(&mut self.untold) {
                    self.clients[index].push(Kind::DumpSignal, i64::from(signal), b"");
                }
            }
            Some(Kind::Settle) => match &self.fetching {
                Some(fetching) => {
                    fetching.hurry();
                    self.clients[index].waits_to_settle = true;
                }
                None => self.clients[index].push(Kind::Done, 0, b""),
            },
            Some(Kind::Attach) => self.attach(index, message.arg),
            Some(Kind::Detach) => {
                self.clients[index].attached = false;
                self.clients[index].push(Kind::Done, 0, b"");
            }
            Some(Kind::Resize) => {
                if self.clients[index].attached {
                    self.resize(message.arg);
                }
            }
            Some(Kind::Data) => {
                if self.clients[index].attached {
                    self.input.extend(&message.payload);
                    self.write_input();
                }
            }
            _ => {
                let text = format!(
                    "this job's init (protocol version {VERSION}) does not know request {:#06x}; the job was started by an older ckpt",
                    message.kind_number
                );
                self.clients[index].push(Kind::Error, i64::from(libc::ENOSYS), text.as_bytes());
            }
        }
    }

    fn keep(&mut self, index: usize, message: &Message, descriptors: Vec<OwnedFd>) {
        let client = &mut self.clients[index];
        if client.keeping.len() >= MAX_KEPT_PARTS {
            client.keeping.clear();
            let text = format!("no more than {MAX_KEPT_PARTS} messages are kept");
            client.push(Kind::Error, i64::from(libc::E2BIG), text.as_bytes());
            return;
        }
        client.keeping.push(KeptPart { descriptors, note: message.payload.clone() });
        if message.arg == 0 {
            self.kept = std::mem::take(&mut client.keeping);
        }
        client.push(Kind::Done, 0, b"");
    }

    fn give(&mut self, index: usize, copy: bool) {
        // Given away before it is sent: whatever becomes of the client, nobody gets it twice.
        let parts = std::mem::take(&mut self.kept);
        if copy {
            let copies = |p: &KeptPart| {
                let descriptors = p.descriptors.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
                Ok(KeptPart { descriptors, note: p.note.clone() })
            };
            match parts.iter().map(copies).collect::<io::Result<_>>() {
                Ok(copied) => self.kept = copied,
                Err(error) => {
                    self.kept = parts;
                    return self.reply(index, Err(error));
                }
            }
        }
        let client = &mut self.clients[index];
        for part in parts {
            client.push_with(Kind::Kept, 0, &part.note, part.descriptors);
        }
        client.push(Kind::Done, 0, b"");
    }

    fn reply(&mut self, index: usize, result: io::Result<()>) {
        let client = &mut self.clients[index];
        match result {
            Ok(()) => client.push(Kind::Done, 0, b""),
            Err(error) => {
                let errno = i64::from(error.raw_os_error().unwrap_or(0));
                client.push(Kind::Error, errno, error.to_string().as_bytes());
            }
        }
    }

    fn attach(&mut self, index: usize, window: i64) {
        if self.pty.is_none() {
            let text = "this job has no terminal: it was started without one";
            self.clients[index].push(Kind::Error, i64::from(libc::ENOTTY), text.as_bytes());
            return;
        }
        for client in self.clients.iter_mut().filter(|client| client.attached) {
            client.attached = false;
            client.push(Kind::Detached, 0, b"");
        }
        self.clients[index].push(Kind::Done, 0, b"");
        self.clients[index].attached = true;
        self.log = None;
        if window != 0 {
            self.resize(window);
        }
    }

    fn resize(&self, arg: i64) {
        if let Some(pty) = &self.pty {
            // A size cannot be refused for its value, and the terminal is there as long as its master is open.
            let _ = pty::set_window_size(pty.as_fd(), WindowSize::from_arg(arg));
        }
    }

    fn serve_terminal(&mut self, events: PollFlags) {
        if events.contains(PollFlags::POLLOUT) {
            self.write_input();
        }
        if events.contains(PollFlags::POLLIN) {
            self.read_output();
        } else if events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            self.pty_closed = true;
        }
    }

    fn write_input(&mut self) {
        let Some(pty) = &self.pty else { return };
        while !self.input.is_empty() {
            match nix::unistd::write(pty, self.input.as_slices().0) {
                Ok(0) | Err(Errno::EAGAIN) => return,
                Ok(written) => drop(self.input.drain(..written)),
                Err(Errno::EINTR) => {}
                // The other end is closed: nobody will read it.
                Err(_) => self.input.clear(),
            }
        }
    }

    /// Moves one chunk of output to where it belongs; false if there was none.
    fn read_output(&mut self) -> bool {
        let Some(pty) = &self.pty else { return false };
        let mut chunk = [0; CHUNK_BYTES];
        match nix::unistd::read(pty, &mut chunk) {
            Ok(0) => false,
            Ok(length) => {
                self.deliver_output(&chunk[..length]);
                true
            }
            Err(Errno::EIO) => {
                self.pty_closed = true;
                false
            }
            Err(_) => false,
        }
    }

    fn deliver_output(&mut self, bytes: &[u8]) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.attached && !client.gone) {
            client.push(Kind::Data, 0, bytes);
            return;
        }
        if self.log.is_none() {
            self.log = open_log(&self.spec.log).ok();
        }
        if let Some(log) = &mut self.log {
            // A full disk loses output but must not stop the job.
            let _ = log.write_all(bytes);
        }
    }

    fn drain_terminal(&mut self) {
        // Bounded, as what is left of the job may go on writing.
        const MOST: usize = 4 * 1024 * 1024 / CHUNK_BYTES;
        for _ in 0..MOST {
            if !self.read_output() {
                return;
            }
        }
    }

    /// A line in the job's log, for lack of anyone to tell.
    fn note(&mut self, text: &str) {
        if self.log.is_none() {
            self.log = open_log(&self.spec.log).ok();
        }
        if let Some(log) = &mut self.log {
            let _ = writeln!(log, "{text}");
        }
    }

    fn status(&self) -> JobStatus {
        let kernel = |name: &str| {
            std::fs::read_to_string(format!("/proc/sys/kernel/{name}"))
                .unwrap_or_default()
                .trim_end()
                .to_owned()
        };
        // Each table has a line of titles.
        let table = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sysvipc/{name}")).unwrap_or_default();
            text.lines().count().saturating_sub(1) as u64
        };
        JobStatus {
            record: self.record.clone(),
            main_running: self.main_running,
            exit_status: self.main_status,
            processes: self.count_processes(),
            attached: self.attached().is_some(),
            hostname: kernel("hostname"),
            domainname: kernel("domainname"),
            sysv_objects: table("shm") + table("msg"),
            semaphore_sets: table("sem"),
            missing_memory: self.fetching.as_ref().map(|fetching| {
                let (missing_bytes, total_bytes) = fetching.missing_bytes();
                MissingMemory { missing_bytes, total_bytes }
            }),
        }
    }

    /// Processes of the job without init.
    fn count_processes(&self) -> u32 {
        let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
        let own = std::fs::read_link("/proc/self/ns/pid").ok();
        let pids = entries.filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.parse::<u32>().ok()
        });
        let ours = pids.filter(|pid| {
            // In a fresh /proc there is nobody else.
            self.record.fresh_proc || std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok() == own
        });
        (ours.count() as u32).saturating_sub(1)
    }
}
