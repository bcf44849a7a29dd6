// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unix socket pairs (unix(7)): type, what is queued in each direction, what has been shut down, options.

use super::Opened;
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::socket::{Queued, UnixSocket};
use ckpt_sys::{Errno, libc};
use nix::sys::socket::SockType;
use std::os::fd::AsFd;

/// Version of [`UnixSocketRecord`].
pub const VERSION: u16 = 1;

/// One end of a pair.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct UnixSocketRecord {
    /// What all have.
    pub opened: Opened,
    /// SOCK_*.
    pub kind: i32,
    /// Inode numbers of this end and of the other; 0 if that has been closed.
    pub inode: (u32, u32),
    /// The process that made it, as SO_PEERCRED tells.
    pub creator: i32,
    /// Messages queued for this end (for a stream, pieces).
    pub queue: Vec<Vec<u8>>,
    /// Bit 0: receiving shut down, bit 1: sending.
    pub shutdown: u8,
    /// SO_SNDBUF, SO_RCVBUF as getsockopt(2) shows them, SO_PASSCRED.
    pub options: [i32; 3],
    /// SO_RCVTIMEO, SO_SNDTIMEO: seconds, microseconds.
    pub timeouts: [[i64; 2]; 2],
}

/// The kind.
#[derive(Debug)]
pub struct UnixSocketResource;

fn diag<'a>(job: &'a Job, f: &OpenFile) -> Option<&'a UnixSocket> {
    f.seen.link.starts_with(b"socket:").then(|| job.unix_sockets.get(&(f.seen.stat.ino as u32)))?
}

/// Whether reading nothing means the end: on a stream, and where receiving has been shut down.
fn reads_end(s: &UnixSocket) -> bool {
    i32::from(s.kind) == libc::SOCK_STREAM || s.shutdown & 1 != 0
}

/// Whether an empty message is in the queue of `f` that a peek does not show.
fn hides_messages(job: &Job, f: &OpenFile, queue: &[Queued]) -> bool {
    let kind = match diag(job, f).map(|s| i32::from(s.kind)) {
        Some(libc::SOCK_DGRAM) => SockType::Datagram,
        Some(libc::SOCK_SEQPACKET) => SockType::SeqPacket,
        _ => return false,
    };
    let peer = diag(job, f).and_then(|s| s.peer).unwrap_or(0);
    let peer =
        job.files.values().find(|g| g.seen.stat.ino as u32 == peer && g.kind == Some(Kind::UnixSocket));
    let Some(Ok(peer)) = peer.map(OpenFile::steal) else { return false };
    ckpt_sys::socket::hides_messages(peer.as_fd(), kind, queue).unwrap_or(true)
}

impl Resource for UnixSocketResource {
    nothing_to_do! { asks, content, arm }

    fn kind(&self) -> Kind {
        Kind::UnixSocket
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, job: &Job, f: &OpenFile) -> bool {
        const LISTEN: u8 = 10;
        diag(job, f).is_some_and(|s| !s.named && s.state != LISTEN && s.peer.is_some())
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for f in job.files.values().filter(|f| f.kind == Some(Kind::UnixSocket)) {
            let peer = diag(job, f).and_then(|s| s.peer).unwrap_or(0);
            let inside = job
                .files
                .values()
                .any(|g| g.seen.stat.ino as u32 == peer && g.kind == Some(Kind::UnixSocket));
            if peer != 0 && !inside {
                let what = format!("unix socket {} connected to something outside the job", f.seen.target);
                refusals.fd(f.pid, f.fd, what, "close it first");
                continue;
            }
            let Ok(fd) = f.steal() else { continue };
            let ends = diag(job, f).is_some_and(reads_end);
            match ckpt_sys::socket::peek_queue(fd.as_fd(), ends) {
                Ok(queue) if queue.iter().any(|q| q.carries_descriptors) => {
                    let what = "unix socket with descriptors on their way in it (SCM_RIGHTS)";
                    let advice = "dump again when they have been received";
                    refusals.passing(f.pid, Some(f.fd), what, advice);
                }
                Ok(queue) if hides_messages(job, f, &queue) => {
                    refusals.fd(
                        f.pid,
                        f.fd,
                        "unix socket with an empty message in it",
                        "dump again when it has been received",
                    );
                }
                Err(Errno::ENODATA) => {
                    refusals.fd(
                        f.pid,
                        f.fd,
                        "unix socket with an empty message in it",
                        "dump again when it has been received",
                    );
                }
                _ => {}
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let Some(s) = diag(cx.job, f).cloned() else { return Ok(()) };
        let err = |what: &str| DumpError::fd(f.pid, f.fd, what.to_owned());
        let fd = f.steal()?;
        let queue =
            ckpt_sys::socket::peek_queue(fd.as_fd(), reads_end(&s)).map_err(err("reading what is queued"))?;
        let int = |o| ckpt_sys::socket::get_int(fd.as_fd(), o).map_err(err("getsockopt"));
        let time = |o| ckpt_sys::socket::get_timeout(fd.as_fd(), o).map_err(err("getsockopt"));
        let creator = nix::sys::socket::getsockopt(&fd, nix::sys::socket::sockopt::PeerCredentials)
            .map_err(err("SO_PEERCRED"))?
            .pid();
        let record = UnixSocketRecord {
            opened: Opened::of(cx.job, f)?,
            kind: i32::from(s.kind),
            inode: (f.seen.stat.ino as u32, s.peer.unwrap_or(0)),
            creator: cx.job.inner_tid(creator).unwrap_or(f.pid),
            queue: queue.into_iter().map(|q| q.bytes).collect(),
            shutdown: s.shutdown,
            options: [int(libc::SO_SNDBUF)?, int(libc::SO_RCVBUF)?, int(libc::SO_PASSCRED)?],
            timeouts: [time(libc::SO_RCVTIMEO)?, time(libc::SO_SNDTIMEO)?],
        };
        cx.put(Kind::UnixSocket, VERSION, f.id, f.seen.stat.ino, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let s: UnixSocketRecord = decode(record, VERSION)?;
        let kind = match s.kind {
            libc::SOCK_STREAM => "stream",
            libc::SOCK_DGRAM => "datagram",
            _ => "seqpacket",
        };
        let bytes: usize = s.queue.iter().map(Vec::len).sum();
        Ok(format!("unix {kind} socket {} to {}, {bytes} bytes queued", s.inode.0, s.inode.1))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: UnixSocketRecord = decode(record, VERSION)?;
        // The other end may have been made with its own record's pair.
        let (pid, fd) = match cx.sockets.get(&u64::from(s.inode.0)).copied() {
            Some(end) => end,
            None => {
                let alive = cx.processes.get(&s.creator).is_some_and(|p| p.zombie.is_none());
                let pid = if alive { s.creator } else { s.opened.pid };
                let base = cx.free_number(pid);
                let (_, at) = cx.run(pid, |b| {
                    let ends = b.bytes(&[0xff; 8]);
                    let kind = (s.kind | libc::SOCK_CLOEXEC) as u64;
                    b.call("socketpair", libc::SYS_socketpair, &[libc::AF_UNIX as u64, kind, 0, ends]);
                    ends
                })?;
                let mut ends = [0u8; 8];
                cx.area.batch().read(at, &mut ends);
                let end =
                    |i: usize| i32::from_le_bytes([ends[i], ends[i + 1], ends[i + 2], ends[i + 3]]) as u64;
                let (a, z) = (end(0), end(4));
                let (r, kept) = cx.run(pid, |b| {
                    [a, z].map(|n| {
                        let dup = libc::F_DUPFD_CLOEXEC as u64;
                        let keep = b.call("fcntl F_DUPFD_CLOEXEC", libc::SYS_fcntl, &[n, dup, base]);
                        b.call("close", libc::SYS_close, &[n]);
                        keep
                    })
                })?;
                let [a, z] = kept.map(|k| r[k.index()] as i32);
                cx.sockets.insert(u64::from(s.inode.0), (pid, a));
                // An end that has been closed is known by its peer: it sends what is queued and is closed then.
                let other = if s.inode.1 == 0 { closed_end(s.inode.0) } else { u64::from(s.inode.1) };
                cx.sockets.insert(other, (pid, z));
                (pid, a)
            }
        };
        let [send, receive, credentials] = s.options;
        cx.run(pid, |b| {
            // getsockopt shows twice what was set.
            let level = libc::SOL_SOCKET as u64;
            for (option, value) in [(libc::SO_SNDBUF, send / 2), (libc::SO_RCVBUF, receive / 2)] {
                let v = b.bytes(&value.to_le_bytes());
                b.call("setsockopt", libc::SYS_setsockopt, &[fd as u64, level, option as u64, v, 4]);
            }
            for (option, value) in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO].into_iter().zip(s.timeouts) {
                let v = b.words(&value.map(|n| n as u64));
                b.call("setsockopt", libc::SYS_setsockopt, &[fd as u64, level, option as u64, v, 16]);
            }
            if credentials != 0 {
                let v = b.bytes(&1i32.to_le_bytes());
                b.call(
                    "setsockopt",
                    libc::SYS_setsockopt,
                    &[fd as u64, level, libc::SO_PASSCRED as u64, v, 4],
                );
            }
        })?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn connect(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: UnixSocketRecord = decode(record, VERSION)?;
        let other = if s.inode.1 == 0 { closed_end(s.inode.0) } else { u64::from(s.inode.1) };
        let Some(&(pid, fd)) = cx.sockets.get(&other) else { return Ok(()) };
        for message in &s.queue {
            // A stream takes its data in pieces; a message must go as one.
            let piece = if s.kind == libc::SOCK_STREAM { 1 << 20 } else { message.len().max(1) };
            for part in message.chunks(piece) {
                let (r, ()) = cx.run(pid, |b| {
                    let at = b.bytes(part);
                    let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
                    b.call("sendto", libc::SYS_sendto, &[fd as u64, at, part.len() as u64, flags, 0, 0]);
                })?;
                if r[0] != part.len() as u64 {
                    let text = format!("a socket of process {pid} takes {} of {} bytes", r[0], part.len());
                    return Err(RestoreError::Host(text));
                }
            }
        }
        if s.inode.1 == 0 {
            cx.call(pid, "close", libc::SYS_close, &[fd as u64])?;
            cx.sockets.remove(&other);
        }
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let s: UnixSocketRecord = decode(record, VERSION)?;
        let Some(&(pid, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        let flags = (s.opened.flags & !libc::O_ACCMODE) as u64;
        cx.call(pid, "fcntl F_SETFL", libc::SYS_fcntl, &[fd as u64, libc::F_SETFL as u64, flags])?;
        if s.inode.1 != 0 {
            // What the other end shut down for sending is shut down for receiving here by that.
            let how = match s.shutdown & 3 {
                0 => None,
                1 => Some(libc::SHUT_RD),
                2 => Some(libc::SHUT_WR),
                _ => Some(libc::SHUT_RDWR),
            };
            if let Some(how) = how {
                cx.call(pid, "shutdown", libc::SYS_shutdown, &[fd as u64, how as u64])?;
            }
        }
        let opened = Opened { pid, ..s.opened };
        opened.finish(cx, fd, false)
    }
}

/// The key of the closed end of a socket; inode numbers of sockets have 32 bits.
fn closed_end(inode: u32) -> u64 {
    u64::from(inode) | 1 << 32
}
