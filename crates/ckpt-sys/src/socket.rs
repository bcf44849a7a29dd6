// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unix sockets: who is connected to whom (sock_diag(7)), and what is queued, without taking it out.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

type Result<T> = std::result::Result<T, Errno>;

/// One unix socket as sock_diag(7) shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: u8,
    /// TCP_ESTABLISHED (1), TCP_CLOSE (7) or TCP_LISTEN (10).
    pub state: u8,
    /// Inode of the peer, if there is one.
    pub peer: Option<u32>,
    /// True if it is bound to a name.
    pub named: bool,
    /// Bit 0: receiving shut down, bit 1: sending shut down.
    pub shutdown: u8,
}

fn align4(n: usize) -> usize {
    n.next_multiple_of(4)
}

/// All unix sockets of this network namespace by inode.
///
/// # Errors
/// Those of socket(2), send(2), recv(2) on a netlink socket.
pub fn unix_sockets() -> Result<HashMap<u32, UnixSocket>> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    let nl =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    let mut req = Vec::new();
    req.extend_from_slice(&40u32.to_ne_bytes());
    req.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    req.extend_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    req.extend_from_slice(&[0; 8]); // sequence, port
    req.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]); // family, protocol, pad
    req.extend_from_slice(&u32::MAX.to_ne_bytes()); // all states
    req.extend_from_slice(&0u32.to_ne_bytes()); // inode
    req.extend_from_slice(&(1u32 | 4).to_ne_bytes()); // UDIAG_SHOW_NAME | UDIAG_SHOW_PEER
    req.extend_from_slice(&[0xff; 8]); // cookie: none
    nix::sys::socket::send(nl.as_raw_fd(), &req, nix::sys::socket::MsgFlags::empty())?;
    let mut out = HashMap::new();
    let mut buf = vec![0u8; 256 * 1024];
    let u16_at = |b: &[u8], i: usize| u16::from_ne_bytes([b[i], b[i + 1]]);
    let u32_at = |b: &[u8], i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    loop {
        let n = nix::sys::socket::recv(nl.as_raw_fd(), &mut buf, nix::sys::socket::MsgFlags::empty())?;
        let mut at = 0;
        while at + 16 <= n {
            let len = u32_at(&buf, at) as usize;
            if len < 16 || at + len > n {
                return Err(Errno::EBADMSG);
            }
            match i32::from(u16_at(&buf, at + 4)) {
                libc::NLMSG_DONE => return Ok(out),
                libc::NLMSG_ERROR => return Err(Errno::from_raw(-(u32_at(&buf, at + 16) as i32))),
                _ => {}
            }
            let m = &buf[at + 16..at + len];
            if m.len() >= 16 {
                let mut s = UnixSocket { kind: m[1], state: m[2], ..UnixSocket::default() };
                let mut a = 16;
                while a + 4 <= m.len() {
                    let alen = u16_at(m, a) as usize;
                    if alen < 4 || a + alen > m.len() {
                        break;
                    }
                    let v = &m[a + 4..a + alen];
                    match u16_at(m, a + 2) & 0x3fff {
                        0 => s.named = !v.is_empty(),
                        2 if v.len() >= 4 => s.peer = Some(u32_at(v, 0)),
                        6 if !v.is_empty() => s.shutdown = v[0],
                        _ => {}
                    }
                    a += align4(alen);
                }
                out.insert(u32_at(m, 4), s);
            }
            at += align4(len);
        }
    }
}

/// One queued message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// Its bytes; for a stream whatever one peek gave.
    pub bytes: Vec<u8>,
    /// True if descriptors or credentials the caller can't keep came with it.
    pub carries_descriptors: bool,
}

/// Everything in the receive queue, in order, left where it is (MSG_PEEK with SO_PEEK_OFF, which is put back).
///
/// # Errors
/// Those of recvmsg(2).
///
/// `ends`: reading nothing means the end of the file (a stream, or an end that receives no more), not an empty message.
pub fn peek_queue(fd: BorrowedFd<'_>, ends: bool) -> Result<Vec<Queued>> {
    let old = get_int(fd, libc::SO_PEEK_OFF)?;
    set_int(fd, libc::SO_PEEK_OFF, 0)?;
    let result = peek_all(fd, ends);
    set_int(fd, libc::SO_PEEK_OFF, old)?;
    result
}

fn peek_all(fd: BorrowedFd<'_>, ends: bool) -> Result<Vec<Queued>> {
    let mut out = Vec::new();
    // The largest message a unix socket can carry is bounded by its peer's send buffer.
    let mut buf = vec![0u8; 4 << 20];
    let mut control = vec![0u64; 1024];
    loop {
        let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: an all-zero msghdr is a valid one.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = control.len() * 8;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: msg points to live buffers of the stated lengths.
        let n = match Errno::result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, flags) }) {
            Ok(n) => n as usize,
            Err(Errno::EAGAIN) => return Ok(out),
            Err(e) => return Err(e),
        };
        if msg.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(Errno::EMSGSIZE);
        }
        let mut carries = false;
        // SAFETY: the control buffer was filled by the kernel and is walked by its own macros.
        unsafe {
            let mut c = libc::CMSG_FIRSTHDR(&raw const msg);
            while !c.is_null() {
                if (*c).cmsg_level == libc::SOL_SOCKET && (*c).cmsg_type == libc::SCM_RIGHTS {
                    carries = true;
                    let fds = ((*c).cmsg_len - libc::CMSG_LEN(0) as usize) / 4;
                    for i in 0..fds {
                        let p = libc::CMSG_DATA(c).cast::<i32>().add(i);
                        // Installed by the peek; closed again.
                        drop(OwnedFd::from_raw_fd(p.read_unaligned()));
                    }
                }
                c = libc::CMSG_NXTHDR(&raw const msg, c);
            }
        }
        if n == 0 && ends {
            return Ok(out);
        }
        if n == 0 {
            // An empty datagram can't be told from the end of the queue by its length; SO_PEEK_OFF does not advance
            // over it, so what is behind it is out of reach.
            return Err(Errno::ENODATA);
        }
        out.push(Queued { bytes: buf[..n].to_vec(), carries_descriptors: carries });
    }
}

/// Whether the queue that `peer` fills holds more messages than `seen`: an empty one that somebody has peeked at before
/// is skipped by later peeks (SO_PEEK_OFF), but its memory is still charged to the sender (SIOCOUTQ). What the messages
/// seen should cost is found out by sending the same to ourselves.
///
/// # Errors
/// Those of socketpair(2), send(2).
pub fn hides_messages(peer: BorrowedFd<'_>, kind: SockType, seen: &[Queued]) -> Result<bool> {
    use nix::sys::socket::{MsgFlags, send, socketpair};
    let charged = out_queue_bytes(peer)?;
    let (a, _z) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
    use std::os::fd::AsFd;
    set_int(a.as_fd(), libc::SO_SNDBUF, get_int(peer, libc::SO_SNDBUF)? / 2)?;
    for m in seen {
        send(a.as_raw_fd(), &m.bytes, MsgFlags::MSG_DONTWAIT)?;
    }
    Ok(charged > out_queue_bytes(a.as_fd())?)
}

/// Memory charged to a unix socket for what its peer has not read (SIOCOUTQ).
fn out_queue_bytes(fd: BorrowedFd<'_>) -> Result<i32> {
    let mut n = 0i32;
    // SAFETY: SIOCOUTQ (TIOCOUTQ) writes one int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut n) })?;
    Ok(n)
}

/// getsockopt(2) of an int at SOL_SOCKET.
///
/// # Errors
/// ENOPROTOOPT.
pub fn get_int(fd: BorrowedFd<'_>, option: i32) -> Result<i32> {
    let mut v = 0i32;
    let mut len = 4u32;
    // SAFETY: v and len are live and of the stated size.
    Errno::result(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut v).cast(), &raw mut len)
    })?;
    Ok(v)
}

/// setsockopt(2) of an int at SOL_SOCKET.
///
/// # Errors
/// ENOPROTOOPT, EINVAL.
pub fn set_int(fd: BorrowedFd<'_>, option: i32, v: i32) -> Result<()> {
    // SAFETY: v is live and of the stated size.
    Errno::result(unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const v).cast(), 4)
    })
    .map(drop)
}

/// getsockopt(2) of a `struct timeval` at SOL_SOCKET: seconds, microseconds.
///
/// # Errors
/// ENOPROTOOPT.
pub fn get_timeout(fd: BorrowedFd<'_>, option: i32) -> Result<[i64; 2]> {
    let mut v = [0i64; 2];
    let mut len = 16u32;
    // SAFETY: v and len are live and of the stated size.
    Errno::result(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, v.as_mut_ptr().cast(), &raw mut len)
    })?;
    Ok(v)
}

/// getsockopt(2) of any option; what it gives is cut to `bytes`.
///
/// # Errors
/// ENOPROTOOPT if there is no such option.
pub fn option(fd: BorrowedFd<'_>, level: i32, name: i32, bytes: usize) -> Result<Vec<u8>> {
    let mut value = vec![0u8; bytes];
    let mut len = bytes as libc::socklen_t;
    // SAFETY: value has len bytes, and the kernel writes no more than that.
    Errno::result(unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len)
    })?;
    value.truncate(len as usize);
    Ok(value)
}

/// setsockopt(2) of any option.
///
/// # Errors
/// ENOPROTOOPT, EINVAL, EPERM.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<()> {
    // SAFETY: value is live and of the stated size.
    Errno::result(unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
    })
    .map(drop)
}

/// How many instructions the classic packet filter of a socket has; 0 if there is none.
///
/// # Errors
/// EACCES for an eBPF filter.
pub fn filter_length(fd: BorrowedFd<'_>) -> Result<usize> {
    let mut len: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel only tells how many instructions there are, and writes nothing to the buffer.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            std::ptr::null_mut(),
            &raw mut len,
        )
    };
    Errno::result(result)?;
    Ok(len as usize)
}

/// A TCP socket as TCP_INFO (tcp(7)) shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpState {
    /// TCP_* of the kernel: 1 established, 2 SYN sent, 7 closed, 10 listening.
    pub state: u8,
    /// Of a listening socket: connections that have not been accepted.
    pub waiting: u32,
    /// Of a listening socket: how many may wait.
    pub backlog: u32,
}

/// State of a TCP socket of IPv4 or IPv6; `None` for every other socket.
///
/// # Errors
/// Those of getsockopt(2).
pub fn tcp_state(fd: BorrowedFd<'_>) -> Result<Option<TcpState>> {
    let family = get_int(fd, libc::SO_DOMAIN)?;
    if family != libc::AF_INET && family != libc::AF_INET6
        || get_int(fd, libc::SO_PROTOCOL)? != libc::IPPROTO_TCP
    {
        return Ok(None);
    }
    let info = option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 104)?;
    // struct tcp_info: the state is its first byte; for a listening socket tcpi_unacked and tcpi_sacked tell of its queue.
    let word = |at: usize| info.get(at..at + 4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
    let (Some(waiting), Some(backlog)) = (word(24), word(28)) else { return Err(Errno::EBADMSG) };
    Ok(Some(TcpState { state: info[0], waiting, backlog }))
}

/// The events of poll(2) that are there now.
///
/// # Errors
/// Those of poll(2).
pub fn events_now(fd: BorrowedFd<'_>, events: i16) -> Result<i16> {
    let mut p = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one live pollfd.
    Errno::result(unsafe { libc::poll(&raw mut p, 1, 0) })?;
    Ok(p.revents)
}

/// bind(2) to an address given as the `struct sockaddr_*` of the socket's family.
///
/// # Errors
/// EADDRINUSE, EADDRNOTAVAIL, EACCES.
pub fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> Result<()> {
    // SAFETY: address is live and of the stated size; the kernel checks what it holds.
    Errno::result(unsafe {
        libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t)
    })
    .map(drop)
}
