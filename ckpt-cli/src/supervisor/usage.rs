// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a job has used up, as far as can be seen from outside.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// What a job has used up until now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in milliseconds, of processes that live and of those that were waited for.
    pub cpu_ms: u64,
    /// Bytes that it caused to be written to storage.
    pub written: u64,
    /// Bytes that went through read(2), write(2) and their like.
    pub moved: u64,
}

/// The processes of a job without its init.
pub fn processes(init: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut pending = ckpt_engine::model::process::children(init);
    while let Some(pid) = pending.pop() {
        pending.extend(ckpt_engine::model::process::children(pid));
        found.push(pid);
    }
    found
}

/// What the job of this init has used up.
pub fn of_job(init: i32) -> Usage {
    let mut all = Usage::default();
    // What orphans used up is init's.
    for pid in processes(init).into_iter().chain([init]) {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        all.cpu_ms += cpu_ms(&stat, pid == init);
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        if pid != init {
            all.moved += field(&io, "rchar:") + field(&io, "wchar:");
        }
        all.written += field(&io, "write_bytes:");
    }
    all
}

/// utime, stime, cutime and cstime of proc_pid_stat(5), which are in ticks; `waited_for` takes the last two alone.
fn cpu_ms(stat: &str, waited_for: bool) -> u64 {
    const MS_PER_TICK: u64 = 10;
    let Some((_, rest)) = stat.rsplit_once(") ") else { return 0 };
    // The state is field 3.
    let first = if waited_for { 16 } else { 14 } - 3;
    let last = 17 - 3;
    let ticks = rest.split(' ').skip(first).take(last - first + 1);
    ticks.filter_map(|text| text.parse::<u64>().ok()).sum::<u64>() * MS_PER_TICK
}

fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// Counts what a job sends over TCP: the kernel knows for each connection, as long as that is there.
#[derive(Debug, Default)]
pub struct SentCounter {
    seen: BTreeMap<u64, u64>,
}

impl SentCounter {
    /// Bytes until now, of all connections that were seen.
    pub fn look(&mut self, init: i32) -> u64 {
        let ours = sockets_of(init);
        for family in [libc::AF_INET, libc::AF_INET6] {
            for (inode, sent) in tcp_sockets(family).unwrap_or_default() {
                if ours.contains(&inode) {
                    let seen = self.seen.entry(inode).or_default();
                    *seen = sent.max(*seen);
                }
            }
        }
        self.seen.values().sum()
    }
}

/// The inodes of all sockets that processes of the job have open.
fn sockets_of(init: i32) -> Vec<u64> {
    let mut inodes = Vec::new();
    for pid in processes(init) {
        for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let link = std::fs::read_link(fd.path()).unwrap_or_default();
            let number = link.to_str().and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']'));
            inodes.extend(number.and_then(|number| number.parse::<u64>().ok()));
        }
    }
    inodes
}

/// Inode and sent bytes of each TCP connection of this network namespace; see sock_diag(7).
fn tcp_sockets(family: i32) -> nix::Result<Vec<(u64, u64)>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    send(socket.as_raw_fd(), &request(family as u8), MsgFlags::empty())?;
    let mut found = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if !parse(&buffer[..length], &mut found) {
            return Ok(found);
        }
    }
}

const HEADER_BYTES: usize = 16;

/// struct nlmsghdr and struct inet_diag_req_v2: all TCP sockets, with their struct tcp_info.
fn request(family: u8) -> Vec<u8> {
    const REQUEST_BYTES: usize = HEADER_BYTES + 56;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const INET_DIAG_INFO: u8 = 2;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let mut bytes = Vec::with_capacity(REQUEST_BYTES);
    bytes.extend((REQUEST_BYTES as u32).to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([family, libc::IPPROTO_TCP as u8]);
    bytes.resize(HEADER_BYTES + 8, 0);
    bytes[8..HEADER_BYTES].fill(0);
    bytes[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&[
        family,
        libc::IPPROTO_TCP as u8,
        1 << (INET_DIAG_INFO - 1),
        0,
    ]);
    // All states.
    bytes[HEADER_BYTES + 4..HEADER_BYTES + 8].fill(0xff);
    bytes.resize(REQUEST_BYTES, 0);
    bytes
}

/// Takes the messages of one packet; false after the last.
fn parse(mut packet: &[u8], found: &mut Vec<(u64, u64)>) -> bool {
    const INODE_AT: usize = HEADER_BYTES + 68;
    const ATTRIBUTES_AT: usize = HEADER_BYTES + 72;
    let u32_at =
        |bytes: &[u8], at: usize| bytes.get(at..at + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let u16_at = |bytes: &[u8], at: usize| bytes.get(at..at + 2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    while let (Some(length), Some(kind)) = (u32_at(packet, 0), u16_at(packet, 4)) {
        let length = length as usize;
        if length < HEADER_BYTES
            || length > packet.len()
            || matches!(i32::from(kind), libc::NLMSG_DONE | libc::NLMSG_ERROR)
        {
            return false;
        }
        let message = &packet[..length];
        if let (Some(inode), Some(sent)) =
            (u32_at(message, INODE_AT), message.get(ATTRIBUTES_AT..).and_then(bytes_sent))
        {
            found.push((u64::from(inode), sent));
        }
        packet = packet.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    true
}

/// tcpi_bytes_sent out of the attribute with the struct tcp_info.
fn bytes_sent(mut attributes: &[u8]) -> Option<u64> {
    const INET_DIAG_INFO: u16 = 2;
    const SENT_AT: usize = 4 + 200;
    while attributes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([attributes[0], attributes[1]]));
        let kind = u16::from_ne_bytes([attributes[2], attributes[3]]);
        if kind == INET_DIAG_INFO {
            let value = attributes.get(..length)?.get(SENT_AT..SENT_AT + 8)?;
            return Some(u64::from_ne_bytes(value.try_into().ok()?));
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn cpu_time_of_a_line() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4 9 9 9 9 100 20 3 4 20 0 1 0 5";
        assert_eq!(cpu_ms(stat, false), 1270);
        assert_eq!(cpu_ms(stat, true), 70);
        assert_eq!(cpu_ms("", false), 0);
    }

    #[test]
    fn bytes_sent_over_tcp_are_counted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        sender.write_all(&[7; 10_000]).unwrap();
        let mut all = vec![0; 10_000];
        receiver.read_exact(&mut all).unwrap();
        let link = format!("/proc/self/fd/{}", sender.as_raw_fd());
        let inode = std::fs::metadata(link).unwrap().ino();
        let found = tcp_sockets(libc::AF_INET).unwrap();
        let sent = found.iter().find(|(number, _)| *number == inode).map(|(_, sent)| *sent);
        assert_eq!(sent, Some(10_000));
    }
}
