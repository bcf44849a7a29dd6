// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unix `SOCK_SEQPACKET` sockets: what the standard library does not have.
//!
//! Addresses go through `/proc/self/fd/<directory>/<name>`, so that the path of the directory may be longer than the
//! 108 bytes of `sun_path` and a renamed or mounted-over path does not matter.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    bind, connect, getsockopt, listen, recv, recvmsg, send, sendmsg, socket, socketpair, sockopt,
};

/// Who is at the other end, as `SO_PEERCRED` tells: the process that connected, or the one that called
/// `listen(2)`, in the caller's namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its pid; 0 if it is not in the caller's pid namespace.
    pub pid: i32,
    /// Its uid; the overflow uid (65534) if it has no name in the caller's user namespace.
    pub uid: u32,
    /// Its gid.
    pub gid: u32,
}

/// A connected pair, close-on-exec.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

fn address(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<UnixAddr> {
    let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.as_bytes());
    Ok(UnixAddr::new(OsStr::from_bytes(&path))?)
}

/// A listening socket `name` in `directory`, close-on-exec and non-blocking.
///
/// # Errors
/// As socket(2), bind(2), listen(2): `EADDRINUSE` if the name exists.
pub fn listen_in(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(fd.as_raw_fd(), &address(directory, name)?)?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(fd)
}

/// Connects to the socket `name` in `directory`; the result is close-on-exec and blocking.
///
/// # Errors
/// As connect(2): `ENOENT` without such a name, `ECONNREFUSED` when nobody listens any more, `EAGAIN` when the queue of
/// connections is full.
pub fn connect_in(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &address(directory, name)?)?;
    Ok(fd)
}

/// Takes the next connection of a non-blocking listener; close-on-exec and non-blocking. `None` if there is none.
///
/// # Errors
/// As accept4(2).
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null pointers ask for no address.
    let fd =
        unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
    if fd == -1 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ECONNABORTED | libc::EINTR) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else knows its number.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Who is at the other end.
///
/// # Errors
/// As getsockopt(2).
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
    Ok(Peer { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() })
}

/// Sends one packet, without SIGPIPE. With `wait` false a full queue gives `WouldBlock`.
///
/// # Errors
/// As send(2): `EPIPE` when the peer is gone, `EMSGSIZE` for a packet above the socket's buffer.
pub fn send_packet(socket: BorrowedFd<'_>, packet: &[u8], wait: bool) -> io::Result<()> {
    let mut flags = MsgFlags::MSG_NOSIGNAL;
    if !wait {
        flags |= MsgFlags::MSG_DONTWAIT;
    }
    loop {
        match send(socket.as_raw_fd(), packet, flags) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one packet into `buffer`; returns its length, 0 at the end of the connection. With `wait` false an empty queue
/// gives `WouldBlock`.
///
/// # Errors
/// As recv(2); `InvalidData` for a packet that is longer than the buffer.
pub fn receive_packet(socket: BorrowedFd<'_>, buffer: &mut [u8], wait: bool) -> io::Result<usize> {
    let mut flags = MsgFlags::MSG_TRUNC;
    if !wait {
        flags |= MsgFlags::MSG_DONTWAIT;
    }
    loop {
        match recv(socket.as_raw_fd(), buffer, flags) {
            Ok(length) if length > buffer.len() => {
                let text = format!("a packet of {length} bytes does not fit into {}", buffer.len());
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            Ok(length) => return Ok(length),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends a packet of one byte, with a copy of a descriptor if there is one. Waits while the queue is full.
///
/// # Errors
/// As sendmsg(2): `EPIPE` when the peer is gone, `ETOOMANYREFS` with too many descriptors on their way.
pub fn send_descriptor(socket: BorrowedFd<'_>, byte: u8, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[] } else { &rights[..] };
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[io::IoSlice::new(&[byte])],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives what [`send_descriptor`] sent, the descriptor close-on-exec; `None` at the end of the connection.
///
/// # Errors
/// As recvmsg(2).
pub fn receive_descriptor(socket: BorrowedFd<'_>) -> io::Result<Option<(u8, Option<OwnedFd>)>> {
    let mut byte = [0u8];
    let mut space = nix::cmsg_space!(RawFd);
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    let got = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made these descriptors for this message; nobody else knows their numbers.
            fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let bytes = got.bytes;
    Ok((bytes > 0).then(|| (byte[0], fds.into_iter().next())))
}

/// As [`send_packet`], with descriptors (SCM_RIGHTS), of which the receiver gets copies.
///
/// # Errors
/// Also `EINVAL` for more than 253 descriptors, `ETOOMANYREFS` if too many are on their way.
pub fn send_packet_with(
    socket: BorrowedFd<'_>,
    packet: &[u8],
    descriptors: &[OwnedFd],
    wait: bool,
) -> io::Result<()> {
    if descriptors.is_empty() {
        return send_packet(socket, packet, wait);
    }
    let mut flags = MsgFlags::MSG_NOSIGNAL;
    if !wait {
        flags |= MsgFlags::MSG_DONTWAIT;
    }
    let numbers: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let data = [io::IoSlice::new(packet)];
    loop {
        let rights = [ControlMessage::ScmRights(&numbers)];
        match sendmsg::<()>(socket.as_raw_fd(), &data, &rights, flags, None) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// As [`receive_packet`], with the descriptors that come with the packet, close-on-exec.
///
/// # Errors
/// Also `InvalidData` if there was no room for all descriptors (RLIMIT_NOFILE).
pub fn receive_packet_with(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    wait: bool,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut flags = MsgFlags::MSG_CMSG_CLOEXEC;
    if !wait {
        flags |= MsgFlags::MSG_DONTWAIT;
    }
    let mut space = nix::cmsg_space!([i32; 253]);
    let (length, end, cut, descriptors) = loop {
        let mut data = [io::IoSliceMut::new(buffer)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), flags) {
            Ok(message) => {
                let mut descriptors = Vec::new();
                for control in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(numbers) = control {
                        // SAFETY: the kernel just gave us these descriptors; nobody else knows their numbers.
                        let owned = numbers.iter().map(|n| unsafe { OwnedFd::from_raw_fd(*n) });
                        descriptors.extend(owned);
                    }
                }
                let cut = message.flags.intersects(MsgFlags::MSG_CTRUNC);
                break (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC), cut, descriptors);
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if end {
        let text = "a packet does not fit into the buffer";
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    if cut {
        let text = "there was no room for all descriptors that came with a packet";
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok((length, descriptors))
}

/// Whether the peer of a connected socket is gone.
///
/// # Errors
/// As poll(2).
pub fn hung_up(socket: BorrowedFd<'_>) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let fd = socket.as_fd();
    let mut polled = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_keep_their_bounds() {
        let (left, right) = pair().unwrap();
        send_packet(left.as_fd(), b"one", true).unwrap();
        send_packet(left.as_fd(), b"three", true).unwrap();
        let mut buffer = [0; 4];
        assert_eq!(receive_packet(right.as_fd(), &mut buffer, false).unwrap(), 3);
        let error = receive_packet(right.as_fd(), &mut buffer, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error = receive_packet(right.as_fd(), &mut buffer, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(!hung_up(right.as_fd()).unwrap());
        drop(left);
        assert!(hung_up(right.as_fd()).unwrap());
        assert_eq!(receive_packet(right.as_fd(), &mut buffer, false).unwrap(), 0);
    }

    #[test]
    fn descriptors_come_along() {
        let (left, right) = pair().unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let descriptors: Vec<OwnedFd> = (0..200).map(|_| writer.try_clone().unwrap()).collect();
        send_packet_with(left.as_fd(), b"take", &descriptors, true).unwrap();
        send_packet_with(left.as_fd(), b"none", &[], true).unwrap();
        drop((writer, descriptors));
        let mut buffer = [0; 8];
        let (length, received) = receive_packet_with(right.as_fd(), &mut buffer, false).unwrap();
        assert_eq!((&buffer[..length], received.len()), (b"take".as_slice(), 200));
        nix::unistd::write(&received[199], b"x").unwrap();
        let mut byte = [0];
        assert_eq!(nix::unistd::read(&reader, &mut byte).unwrap(), 1);
        let (_, received) = receive_packet_with(right.as_fd(), &mut buffer, false).unwrap();
        assert!(received.is_empty());
        let error = receive_packet_with(right.as_fd(), &mut buffer, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_long_path_is_no_obstacle() {
        let mut path = std::env::temp_dir().join(format!("ckpt-local-socket-{}", std::process::id()));
        let top = path.clone();
        for _ in 0..4 {
            path.push("a".repeat(60));
        }
        std::fs::create_dir_all(&path).unwrap();
        let directory = std::fs::File::open(&path).unwrap();
        let listener = listen_in(directory.as_fd(), OsStr::new("sock")).unwrap();
        assert!(accept(listener.as_fd()).unwrap().is_none());
        let client = connect_in(directory.as_fd(), OsStr::new("sock")).unwrap();
        let server = accept(listener.as_fd()).unwrap().unwrap();
        assert_eq!(peer(server.as_fd()).unwrap().pid, std::process::id() as i32);
        assert_eq!(peer(client.as_fd()).unwrap().pid, std::process::id() as i32);
        std::fs::remove_dir_all(top).unwrap();
    }
}
