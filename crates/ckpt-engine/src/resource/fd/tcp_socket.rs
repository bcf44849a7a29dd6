// SPDX-License-Identifier: MIT OR Apache-2.0
//! TCP sockets (tcp(7)): unconnected, bound, listening. A connection can't be kept (ADR 0020): its peer would go on. Where the
//! person who dumps accepts that, it comes back as one that its peer has reset.

use super::Opened;
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::file::OpenFile;
use crate::model::{Job, TcpPolicy};
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;
use ckpt_sys::socket::{self, TcpState};
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

/// Version of [`TcpSocketRecord`].
pub const VERSION: u16 = 1;

/// An address with a port.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Address {
    /// Four bytes, or sixteen.
    pub ip: Vec<u8>,
    /// The port.
    pub port: u16,
    /// Interface of a link-local IPv6 address.
    pub scope: u32,
}

impl Address {
    fn of(a: SocketAddr) -> Address {
        match a {
            SocketAddr::V4(a) => Address { ip: a.ip().octets().to_vec(), port: a.port(), scope: 0 },
            SocketAddr::V6(a) => {
                Address { ip: a.ip().octets().to_vec(), port: a.port(), scope: a.scope_id() }
            }
        }
    }

    /// As the standard library has it.
    ///
    /// # Errors
    /// If it is neither of IPv4 nor of IPv6.
    pub fn to_std(&self) -> Result<SocketAddr, RestoreError> {
        if let Ok(ip) = <[u8; 4]>::try_from(self.ip.as_slice()) {
            return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(ip)), self.port));
        }
        let ip = <[u8; 16]>::try_from(self.ip.as_slice())
            .map_err(|_| RestoreError::Record(format!("an address of {} bytes", self.ip.len())))?;
        Ok(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(ip), self.port, 0, self.scope)))
    }

    /// `struct sockaddr_in` or `sockaddr_in6`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let family = if self.ip.len() == 4 { libc::AF_INET } else { libc::AF_INET6 } as u16;
        let mut out = [family.to_ne_bytes(), self.port.to_be_bytes()].concat();
        if self.ip.len() == 4 {
            out.extend_from_slice(&self.ip);
            out.extend_from_slice(&[0; 8]);
        } else {
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&self.ip);
            out.extend_from_slice(&self.scope.to_ne_bytes());
        }
        out
    }

    fn text(&self) -> String {
        self.to_std().map_or_else(|_| "?".to_owned(), |a| a.to_string())
    }
}

/// What a socket is about.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum State {
    /// Neither connected nor listening; bound if it has an address.
    Unconnected,
    /// Listening.
    Listening {
        /// How many connections may wait.
        backlog: u32,
    },
    /// A connection that is not kept, or one that was over.
    Closed {
        /// The other end, if it was still known.
        peer: Option<Address>,
        /// Somebody has yet to be told: the next call gives ECONNRESET.
        error: bool,
    },
}

/// An option that differs from that of a new socket.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SocketOption {
    /// SOL_SOCKET, IPPROTO_*.
    pub level: i32,
    /// Its number there.
    pub name: i32,
    /// As getsockopt(2) gives it.
    pub value: Vec<u8>,
}

/// A TCP socket.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TcpSocketRecord {
    /// What all have.
    pub opened: Opened,
    /// AF_INET or AF_INET6.
    pub family: i32,
    /// The address it is bound to.
    pub local: Option<Address>,
    /// What it is about.
    pub state: State,
    /// In the order in which they are set.
    pub options: Vec<SocketOption>,
}

impl TcpSocketRecord {
    /// The value of an option of the size of an int, if it is not that of a new socket.
    pub fn int(&self, level: i32, name: i32) -> Option<i32> {
        let o = self.options.iter().find(|o| (o.level, o.name) == (level, name))?;
        Some(i32::from_ne_bytes(o.value.get(..4)?.try_into().ok()?))
    }

    /// The address that this socket takes on the host at a restore, if it takes one.
    pub fn takes(&self) -> Option<&Address> {
        match self.state {
            State::Unconnected | State::Listening { .. } => self.local.as_ref(),
            State::Closed { .. } => None,
        }
    }
}

const IP: i32 = libc::IPPROTO_IP;
const IPV6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const SOCKET: i32 = libc::SOL_SOCKET;
// Not in the libc crate for all targets; from the kernel's uapi headers.
const SO_BUF_LOCK: i32 = 72;
const SO_PREFER_BUSY_POLL: i32 = 69;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const IPV6_MINHOPCOUNT: i32 = 73;
const IPV6_TRANSPARENT: i32 = 75;
const IPV6_FREEBIND: i32 = 78;
const TCP_SAVE_SYN: i32 = 27;
const TCP_FASTOPEN_NO_COOKIE: i32 = 34;
const TCP_INQ: i32 = 36;
const TCP_TX_DELAY: i32 = 37;
const NAME_BYTES: usize = 16;

/// Level, number and size of every option that is saved, in the order in which they are set: IP_TOS changes SO_PRIORITY.
const OPTIONS: &[(i32, i32, usize)] = &[
    (IP, libc::IP_TOS, 4),
    (IP, libc::IP_TTL, 4),
    (IP, libc::IP_MTU_DISCOVER, 4),
    (IP, libc::IP_RECVERR, 4),
    (IP, libc::IP_PKTINFO, 4),
    (IP, libc::IP_RECVTOS, 4),
    (IP, libc::IP_RECVTTL, 4),
    (IP, libc::IP_FREEBIND, 4),
    (IP, libc::IP_TRANSPARENT, 4),
    (IP, libc::IP_MINTTL, 4),
    (IP, libc::IP_BIND_ADDRESS_NO_PORT, 4),
    (IP, IP_LOCAL_PORT_RANGE, 4),
    (IPV6, libc::IPV6_V6ONLY, 4),
    (IPV6, libc::IPV6_TCLASS, 4),
    (IPV6, libc::IPV6_UNICAST_HOPS, 4),
    (IPV6, libc::IPV6_MTU_DISCOVER, 4),
    (IPV6, libc::IPV6_RECVERR, 4),
    (IPV6, libc::IPV6_RECVPKTINFO, 4),
    (IPV6, libc::IPV6_RECVHOPLIMIT, 4),
    (IPV6, libc::IPV6_RECVTCLASS, 4),
    (IPV6, libc::IPV6_DONTFRAG, 4),
    (IPV6, IPV6_MINHOPCOUNT, 4),
    (IPV6, IPV6_TRANSPARENT, 4),
    (IPV6, IPV6_FREEBIND, 4),
    (TCP, libc::TCP_NODELAY, 4),
    (TCP, libc::TCP_MAXSEG, 4),
    (TCP, libc::TCP_CORK, 4),
    (TCP, libc::TCP_KEEPIDLE, 4),
    (TCP, libc::TCP_KEEPINTVL, 4),
    (TCP, libc::TCP_KEEPCNT, 4),
    (TCP, libc::TCP_SYNCNT, 4),
    (TCP, libc::TCP_LINGER2, 4),
    (TCP, libc::TCP_DEFER_ACCEPT, 4),
    (TCP, libc::TCP_WINDOW_CLAMP, 4),
    (TCP, libc::TCP_CONGESTION, NAME_BYTES),
    (TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, 4),
    (TCP, libc::TCP_USER_TIMEOUT, 4),
    (TCP, libc::TCP_FASTOPEN, 4),
    (TCP, libc::TCP_NOTSENT_LOWAT, 4),
    (TCP, TCP_SAVE_SYN, 4),
    (TCP, libc::TCP_FASTOPEN_CONNECT, 4),
    (TCP, TCP_FASTOPEN_NO_COOKIE, 4),
    (TCP, TCP_INQ, 4),
    (TCP, TCP_TX_DELAY, 4),
    (SOCKET, libc::SO_REUSEADDR, 4),
    (SOCKET, libc::SO_REUSEPORT, 4),
    (SOCKET, libc::SO_KEEPALIVE, 4),
    (SOCKET, libc::SO_OOBINLINE, 4),
    (SOCKET, libc::SO_DONTROUTE, 4),
    (SOCKET, libc::SO_BROADCAST, 4),
    (SOCKET, libc::SO_LINGER, 8),
    (SOCKET, libc::SO_RCVLOWAT, 4),
    (SOCKET, libc::SO_RCVTIMEO, 16),
    (SOCKET, libc::SO_SNDTIMEO, 16),
    (SOCKET, libc::SO_TIMESTAMP, 4),
    (SOCKET, libc::SO_TIMESTAMPNS, 4),
    (SOCKET, libc::SO_MARK, 4),
    (SOCKET, libc::SO_BUSY_POLL, 4),
    (SOCKET, SO_PREFER_BUSY_POLL, 4),
    (SOCKET, libc::SO_ZEROCOPY, 4),
    (SOCKET, libc::SO_MAX_PACING_RATE, 8),
    (SOCKET, libc::SO_PEEK_OFF, 4),
    (SOCKET, libc::SO_BINDTODEVICE, NAME_BYTES),
    (SOCKET, libc::SO_SNDBUF, 4),
    (SOCKET, libc::SO_RCVBUF, 4),
    (SOCKET, libc::SO_PRIORITY, 4),
];

/// What `fd` has; an option that this kernel does not know is left out.
fn all_options(fd: BorrowedFd<'_>, family: i32) -> Vec<SocketOption> {
    let get = |&(level, name, bytes): &(i32, i32, usize)| {
        let value = socket::option(fd, level, name, bytes).ok()?;
        Some(SocketOption { level, name, value })
    };
    // Those of IPv6 an IPv4 socket doesn't have.
    OPTIONS.iter().filter(|(level, ..)| *level != IPV6 || family == libc::AF_INET6).filter_map(get).collect()
}

/// Those of a new socket of this family on this host.
fn new_options(family: i32) -> &'static [SocketOption] {
    static OF: [OnceLock<Vec<SocketOption>>; 2] = [OnceLock::new(), OnceLock::new()];
    let (index, of) =
        if family == libc::AF_INET { (0, AddressFamily::Inet) } else { (1, AddressFamily::Inet6) };
    OF[index].get_or_init(|| {
        let fd = nix::sys::socket::socket(of, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        fd.map(|fd| all_options(fd.as_fd(), family)).unwrap_or_default()
    })
}

/// What the application, or the kernel on its behalf, has changed.
fn changed_options(fd: BorrowedFd<'_>, family: i32, connection: bool) -> Vec<SocketOption> {
    let locked = socket::get_int(fd, SO_BUF_LOCK).unwrap_or(0);
    let keep = |o: &SocketOption| match (o.level, o.name) {
        // Sizes that were never set are the kernel's to choose, and what a connection has here was found with its peer.
        (SOCKET, libc::SO_SNDBUF) => locked & 1 != 0,
        (SOCKET, libc::SO_RCVBUF) => locked & 2 != 0,
        (TCP, libc::TCP_MAXSEG | libc::TCP_WINDOW_CLAMP) if connection => false,
        // IP_TOS, which is set before, changes it.
        (SOCKET, libc::SO_PRIORITY) => true,
        _ => !new_options(family).contains(o),
    };
    all_options(fd, family).into_iter().filter(keep).collect()
}

/// The kind.
#[derive(Debug)]
pub struct TcpSocketResource;

const LISTEN: u8 = 10;
const CLOSE: u8 = 7;
const SYN_SENT: u8 = 2;

/// What a socket in this state is, in words.
fn state_name(state: u8) -> &'static str {
    match state {
        1 => "established",
        2 | 3 => "being made",
        8 => "closed by its peer",
        _ => "being closed",
    }
}

/// Whether it has a connection, or is about to.
fn is_connection(s: TcpState) -> bool {
    s.state != CLOSE && s.state != LISTEN
}

/// Where it is bound, if anywhere.
fn local(fd: &TcpStream) -> Option<Address> {
    let a = Address::of(fd.local_addr().ok()?);
    (a.port != 0 || a.ip.iter().any(|b| *b != 0)).then_some(a)
}

fn peer(fd: &TcpStream) -> Option<Address> {
    fd.peer_addr().ok().map(Address::of)
}

fn text(a: Option<Address>) -> String {
    a.map_or_else(|| "?".to_owned(), |a| a.text())
}

/// The way out for what can't be kept.
const WAY_OUT: &str =
    "ckpt dump --tcp close: the job keeps it, and a restored one finds it reset by its peer";

fn observe(f: &OpenFile) -> Option<(TcpStream, TcpState)> {
    let fd = f.steal().ok()?;
    let state = socket::tcp_state(fd.as_fd()).ok()??;
    // Whatever its state is: that type tells the addresses.
    Some((TcpStream::from(fd), state))
}

impl Resource for TcpSocketResource {
    nothing_to_do! { asks, content, arm }

    fn kind(&self) -> Kind {
        Kind::TcpSocket
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, job: &Job, f: &OpenFile) -> bool {
        f.seen.link.starts_with(b"socket:")
            && !job.unix_sockets.contains_key(&(f.seen.stat.ino as u32))
            && observe(f).is_some()
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for f in job.files.values().filter(|f| f.kind == Some(Kind::TcpSocket)) {
            let Some((fd, s)) = observe(f) else { continue };
            let fd = &fd;
            // Not for the first time in the freeze.
            let _ = socket::get_int(fd.as_fd(), libc::SO_DOMAIN).map(new_options);
            let close = job.info.tcp == TcpPolicy::Close;
            if is_connection(s) {
                if !close {
                    let what = format!(
                        "TCP connection of {} with {}, {}",
                        text(local(fd)),
                        text(peer(fd)),
                        state_name(s.state)
                    );
                    refusals.fd(f.pid, f.fd, what, WAY_OUT);
                }
                continue;
            }
            if s.state == LISTEN && s.waiting > 0 && !close {
                let what = format!(
                    "TCP socket listening on {} with {} connections that are not accepted yet",
                    text(local(fd)),
                    s.waiting
                );
                refusals.fd(f.pid, f.fd, what, WAY_OUT);
            }
            if socket::filter_length(fd.as_fd()) != Ok(0) {
                let what = "TCP socket with a packet filter (SO_ATTACH_FILTER, SO_ATTACH_BPF)";
                refusals.fd(f.pid, f.fd, what, "not supported; detach it first");
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let err = |what: &str| DumpError::fd(f.pid, f.fd, what.to_owned());
        let stolen = TcpStream::from(f.steal()?);
        let (stream, fd) = (&stolen, stolen.as_fd());
        let Some(s) = socket::tcp_state(fd).map_err(err("TCP_INFO"))? else { return Ok(()) };
        let family = socket::get_int(fd, libc::SO_DOMAIN).map_err(err("SO_DOMAIN"))?;
        let blocking = f.seen.flags & libc::O_NONBLOCK == 0;
        let (state, local) = match s.state {
            LISTEN => (State::Listening { backlog: s.backlog }, local(stream)),
            // The call that waits for the connection is made again.
            SYN_SENT if blocking => (State::Unconnected, None),
            CLOSE => {
                let events = socket::events_now(fd, libc::POLLRDHUP).map_err(err("poll"))?;
                let error = events & libc::POLLERR != 0;
                if error || events & libc::POLLRDHUP != 0 {
                    (State::Closed { peer: None, error }, local(stream))
                } else {
                    (State::Unconnected, local(stream))
                }
            }
            _ => (State::Closed { peer: peer(stream), error: true }, local(stream)),
        };
        let connection = matches!(state, State::Closed { .. });
        let options = changed_options(fd, family, connection);
        let record = TcpSocketRecord { opened: Opened::of(cx.job, f)?, family, local, state, options };
        cx.put(Kind::TcpSocket, VERSION, f.id, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let t: TcpSocketRecord = decode(record, VERSION)?;
        let local = t.local.map_or_else(|| "no address".to_owned(), |a| a.text());
        Ok(match t.state {
            State::Unconnected => format!("TCP socket, unconnected, {local}"),
            State::Listening { backlog } => format!("TCP socket listening on {local}, backlog {backlog}"),
            State::Closed { peer: Some(peer), .. } => {
                format!("TCP connection of {local} with {}, not kept", peer.text())
            }
            State::Closed { peer: None, .. } => format!("TCP connection of {local}, over"),
        })
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let t: TcpSocketRecord = decode(record, VERSION)?;
        let pid = t.opened.pid;
        let family = t.family as u64;
        let open = |cx: &mut Build<'_>| {
            let kind = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as u64;
            cx.open_in(pid, |b| b.call("socket", libc::SYS_socket, &[family, kind, 0]))
        };
        let fd = open(cx)?;
        let closed = matches!(t.state, State::Closed { .. });
        if let State::Closed { error, .. } = t.state {
            let listener = open(cx)?;
            reset(cx, &t, (fd, listener), error)?;
        }
        let bound = t.takes();
        if let Some(a) = bound {
            a.to_std()?;
        }
        cx.run(pid, |b| {
            for o in &t.options {
                let mut value = o.value.clone();
                if o.level == SOCKET && [libc::SO_SNDBUF, libc::SO_RCVBUF].contains(&o.name) {
                    // getsockopt shows twice what was set.
                    let n = t.int(o.level, o.name).unwrap_or(0) / 2;
                    value = n.to_ne_bytes().to_vec();
                }
                // That of a connection is set already.
                if (o.level, o.name) == (IPV6, libc::IPV6_V6ONLY) && closed {
                    continue;
                }
                let at = b.bytes(&value);
                let what = format!("setsockopt {} {}", o.level, o.name);
                let args = [fd as u64, o.level as u64, o.name as u64, at, value.len() as u64];
                b.call(what, libc::SYS_setsockopt, &args);
            }
            if let Some(a) = bound {
                // What is left of the job's old connections (TIME_WAIT) must not stand in its way.
                set_int(b, fd, SOCKET, libc::SO_REUSEADDR, 1);
                let bytes = a.to_bytes();
                let at = b.bytes(&bytes);
                let what = format!("bind to TCP port {}", a.text());
                b.call(what, libc::SYS_bind, &[fd as u64, at, bytes.len() as u64]);
            }
        })?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn connect(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let t: TcpSocketRecord = decode(record, VERSION)?;
        let Some(&(pid, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        if t.takes().is_some() && t.int(SOCKET, libc::SO_REUSEADDR).is_none() {
            cx.run(pid, |b| set_int(b, fd, SOCKET, libc::SO_REUSEADDR, 0))?;
        }
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let t: TcpSocketRecord = decode(record, VERSION)?;
        let Some(&(pid, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        if let State::Listening { backlog } = t.state {
            // As late as can be: from now on the outside can connect.
            let what = format!("listen on TCP port {}", text(t.local.clone()));
            cx.call(pid, &what, libc::SYS_listen, &[fd as u64, u64::from(backlog)])?;
        }
        t.opened.set_flags(cx, fd)?;
        t.opened.finish(cx, fd, false)
    }
}

fn set_int(b: &mut ckpt_sys::area::Batch<'_>, fd: i32, level: i32, name: i32, value: i32) {
    let at = b.bytes(&value.to_ne_bytes());
    let what = format!("setsockopt {level} {name}");
    b.call(what, libc::SYS_setsockopt, &[fd as u64, level as u64, name as u64, at, 4]);
}

/// Connects the first socket over the loopback interface to the second, which does not outlive this, and has that end reset the
/// connection. `error`: the application has not been told yet.
fn reset(
    cx: &mut Build<'_>,
    t: &TcpSocketRecord,
    (fd, listener): (i32, i32),
    error: bool,
) -> Result<(), RestoreError> {
    const DEADLINE_MS: u64 = 5000;
    let pid = t.opened.pid;
    let only6 = t.int(IPV6, libc::IPV6_V6ONLY).unwrap_or(0) != 0;
    let ip = match t.family {
        libc::AF_INET => Ipv4Addr::LOCALHOST.octets().to_vec(),
        _ if only6 => Ipv6Addr::LOCALHOST.octets().to_vec(),
        _ => Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets().to_vec(),
    };
    let address = Address { ip, port: 0, scope: 0 }.to_bytes();
    let (results, ended) = cx.run(pid, |b| {
        if t.family == libc::AF_INET6 {
            for end in [fd, listener] {
                set_int(b, end, IPV6, libc::IPV6_V6ONLY, i32::from(only6));
            }
        }
        let bytes = address.len();
        let at = b.bytes(&address);
        let length = b.bytes(&(bytes as u32).to_ne_bytes());
        let (l, c) = (listener as u64, fd as u64);
        b.call("bind to the loopback interface", libc::SYS_bind, &[l, at, bytes as u64]);
        b.call("listen", libc::SYS_listen, &[l, 1]);
        b.call("getsockname", libc::SYS_getsockname, &[l, at, length]);
        b.call("connecting over the loopback interface", libc::SYS_connect, &[c, at, bytes as u64]);
        let end = b.call("accept4", libc::SYS_accept4, &[l, 0, 0, libc::SOCK_CLOEXEC as u64]);
        // Lingering for no time makes the close a reset.
        let linger = b.bytes(&[1i32.to_ne_bytes(), 0i32.to_ne_bytes()].concat());
        let (level, name) = (SOCKET as u64, libc::SO_LINGER as u64);
        let set = b.call("setsockopt SO_LINGER", libc::SYS_setsockopt, &[0, level, name, linger, 8]);
        b.feed(end, set, 0);
        let close = b.call("close", libc::SYS_close, &[0]);
        b.feed(end, close, 0);
        b.call("close", libc::SYS_close, &[l]);
        let wait = b.bytes(
            &[fd.to_ne_bytes().as_slice(), &libc::POLLRDHUP.to_ne_bytes(), &0i16.to_ne_bytes()].concat(),
        );
        let ended = b.call("poll", libc::SYS_poll, &[wait, 1, DEADLINE_MS]);
        if !error {
            let value = b.bytes(&[0; 4]);
            let length = b.bytes(&4u32.to_ne_bytes());
            let name = libc::SO_ERROR as u64;
            b.call("getsockopt SO_ERROR", libc::SYS_getsockopt, &[c, level, name, value, length]);
        }
        ended
    })?;
    if results[ended.index()] == 1 {
        return Ok(());
    }
    Err(RestoreError::Host("a connection over its loopback interface was not reset within 5 s".into()))
}
