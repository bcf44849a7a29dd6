// SPDX-License-Identifier: MIT OR Apache-2.0
//! TCP ports: a job shares the host's network, so that each port that it takes must be free before anything is built.

use super::read::Image;
use crate::error::{Conflict, RestoreError};
use crate::kind::Kind;
use crate::resource::decode;
use crate::resource::fd::tcp_socket::{Address, TcpSocketRecord, VERSION};
use ckpt_sys::{Errno, libc, socket};
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use std::collections::BTreeSet;
use std::os::fd::AsFd;

/// Records of sockets that take a port of the host.
fn taken(image: &Image) -> Result<Vec<(TcpSocketRecord, Address)>, RestoreError> {
    let mut out = Vec::new();
    for r in image.of_kind(Kind::TcpSocket) {
        let t: TcpSocketRecord = decode(r, VERSION)?;
        if let Some(a) = t.takes().cloned() {
            out.push((t, a));
        }
    }
    Ok(out)
}

/// What stands in the way of the job's ports. `jobs` are live ones by name and pid of their init, as far as they can be seen.
///
/// # Errors
/// If a record does not decode.
pub fn conflicts(image: &Image, jobs: &[(String, i32)]) -> Result<Vec<Conflict>, RestoreError> {
    let mut out = Vec::new();
    for (t, address) in taken(image)? {
        let at = address.to_std()?;
        let Err(errno) = try_bind(&t, &address, false) else { continue };
        let holder = (errno == Errno::EADDRINUSE).then(|| Holder::of(at.port())).flatten();
        // Several sockets of the job may share a port (SO_REUSEPORT); with somebody else's it must not be shared.
        if errno == Errno::EADDRINUSE
            && !matches!(holder, Some(Holder::Socket { .. }))
            && t.int(libc::SOL_SOCKET, libc::SO_REUSEPORT).is_some()
            && try_bind(&t, &address, true).is_ok()
        {
            continue;
        }
        let (why, advice) = match errno {
            Errno::EADDRINUSE => match holder {
                Some(Holder::Socket { process: Some((pid, name)) }) => match job_of(pid, jobs) {
                    Some(job) => (
                        format!("the running job {job} has it (process {pid}, {name})"),
                        format!("end that job first: ckpt kill {job}"),
                    ),
                    None => (format!("process {pid} ({name}) has it"), "end that first".to_owned()),
                },
                Some(Holder::Closing) => (
                    "connections of it that are being closed hold it".to_owned(),
                    "restore again in a minute".to_owned(),
                ),
                _ => ("somebody has it already".to_owned(), "see who: ss -tlnp".to_owned()),
            },
            Errno::EADDRNOTAVAIL => {
                ("this host does not have that address".to_owned(), "restore where it is".to_owned())
            }
            Errno::EACCES => (
                "this user may not take it".to_owned(),
                "restore as root, or lower net.ipv4.ip_unprivileged_port_start".to_owned(),
            ),
            e => (format!("it can't be taken: {}", e.desc()), "restore where it can".to_owned()),
        };
        out.push(Conflict { what: format!("TCP port {at}"), why, advice });
    }
    out.sort();
    out.dedup();
    Ok(out)
}

/// Ports that several copies of the image would take.
///
/// # Errors
/// If a record does not decode.
pub fn copy_conflicts(image: &Image) -> Result<Vec<Conflict>, RestoreError> {
    let mut out = Vec::new();
    for (_, address) in taken(image)? {
        out.push(Conflict {
            what: format!("TCP port {}", address.to_std()?),
            why: "the job has it, and only one copy could".to_owned(),
            advice: "restore one at a time".to_owned(),
        });
    }
    out.sort();
    out.dedup();
    Ok(out)
}

/// Binds a socket as the restore would, and lets it go.
fn try_bind(t: &TcpSocketRecord, address: &Address, share: bool) -> Result<(), Errno> {
    let family = if t.family == libc::AF_INET { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = nix::sys::socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    const WHERE: [(i32, i32); 5] = [
        (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
        (libc::IPPROTO_IP, libc::IP_FREEBIND),
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
        (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
    ];
    for o in t.options.iter().filter(|o| WHERE.contains(&(o.level, o.name))) {
        socket::set_option(fd.as_fd(), o.level, o.name, &o.value)?;
    }
    socket::set_int(fd.as_fd(), libc::SO_REUSEADDR, 1)?;
    if share {
        socket::set_int(fd.as_fd(), libc::SO_REUSEPORT, 1)?;
    }
    socket::bind(fd.as_fd(), &address.to_bytes())
}

/// Who has a port.
enum Holder {
    /// A socket, and the process if that can be seen.
    Socket { process: Option<(i32, String)> },
    /// Nobody any more, but connections are not over.
    Closing,
}

impl Holder {
    fn of(port: u16) -> Option<Holder> {
        const LISTEN: &str = "0A";
        let mut listening = BTreeSet::new();
        let mut others = BTreeSet::new();
        let mut closing = false;
        for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
            for line in std::fs::read_to_string(file).unwrap_or_default().lines().skip(1) {
                let words: Vec<&str> = line.split_whitespace().collect();
                let (Some(local), Some(state), Some(inode)) = (words.get(1), words.get(3), words.get(9))
                else {
                    continue;
                };
                let of = local.rsplit_once(':').and_then(|(_, p)| u16::from_str_radix(p, 16).ok());
                if of != Some(port) {
                    continue;
                }
                match inode.parse::<u64>() {
                    Ok(0) | Err(_) => closing = true,
                    Ok(inode) if *state == LISTEN => drop(listening.insert(inode)),
                    Ok(inode) => drop(others.insert(inode)),
                }
            }
        }
        let inodes = if listening.is_empty() { others } else { listening };
        if inodes.is_empty() {
            return closing.then_some(Holder::Closing);
        }
        Some(Holder::Socket { process: process_with(&inodes) })
    }
}

/// A process that has one of these sockets open, and its name.
fn process_with(inodes: &BTreeSet<u64>) -> Option<(i32, String)> {
    let links: BTreeSet<String> = inodes.iter().map(|n| format!("socket:[{n}]")).collect();
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|s| s.parse::<i32>().ok()) else { continue };
        let Ok(list) = std::fs::read_dir(entry.path().join("fd")) else { continue };
        let has = list.flatten().any(|e| {
            std::fs::read_link(e.path()).is_ok_and(|l| links.contains(l.to_string_lossy().as_ref()))
        });
        if has {
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            return Some((pid, name.trim().to_owned()));
        }
    }
    None
}

/// The job that a process belongs to.
fn job_of(pid: i32, jobs: &[(String, i32)]) -> Option<&str> {
    jobs.iter().find_map(|(name, init)| {
        let mut pending = crate::model::process::children(*init);
        while let Some(host) = pending.pop() {
            if host == pid {
                return Some(name.as_str());
            }
            pending.extend(crate::model::process::children(host));
        }
        None
    })
}
