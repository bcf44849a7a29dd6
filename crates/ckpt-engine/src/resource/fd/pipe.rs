// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pipes with the data in them. Each end is a record of its own; the ends of one pipe share the record's id, which is
//! the number of the first of them. What is in the pipe is saved with that.

use super::Opened;
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::{Build, keep_descriptor, open_call};
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;
use std::os::fd::AsFd;

/// Version of [`PipeRecord`].
pub const VERSION: u16 = 1;

/// One end of a pipe.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PipeRecord {
    /// What all have.
    pub opened: Opened,
    /// For the first end of a pipe: its capacity in bytes and its content.
    pub content: Option<PipeContent>,
}

/// A pipe's state.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PipeContent {
    /// Capacity in bytes.
    pub capacity: i32,
    /// Unread bytes as reads will give them: packets, or one piece.
    pub pieces: Vec<Vec<u8>>,
    /// Written with O_DIRECT: each piece is a packet.
    pub packets: bool,
}

/// The kind.
#[derive(Debug)]
pub struct PipeResource;

/// Reads what is in a pipe or FIFO without taking it out.
///
/// # Errors
/// If it can't be read.
pub fn content_of(job: &Job, f: &OpenFile) -> Result<PipeContent, DumpError> {
    let err = |what: &str| DumpError::fd(f.pid, f.fd, what.to_owned());
    let fd = f.steal()?;
    let capacity = ckpt_sys::descriptor::pipe_capacity(fd.as_fd()).map_err(err("F_GETPIPE_SZ"))?;
    // Through /proc a read end of our own is had, whichever end this is; with O_NONBLOCK it waits for no writer.
    let link = format!("/proc/{}/fd/{}", f.host, f.fd);
    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
    let read_end = if f.access() == libc::O_RDONLY || f.access() == libc::O_RDWR {
        fd
    } else {
        nix::fcntl::open(link.as_str(), flags, nix::sys::stat::Mode::empty())
            .map_err(err("opening its other end"))?
    };
    let pieces = ckpt_sys::descriptor::peek_pipe(read_end.as_fd()).map_err(err("reading what is in it"))?;
    let same = |g: &&OpenFile| (g.seen.stat.dev, g.seen.stat.ino) == (f.seen.stat.dev, f.seen.stat.ino);
    let packets = job.files.values().filter(same).any(|g| g.seen.flags & libc::O_DIRECT != 0);
    Ok(PipeContent { capacity, pieces, packets })
}

/// Id of the first of the descriptions with its inode: that stands for the pipe.
pub fn first_of(job: &Job, f: &OpenFile) -> u64 {
    let key = |g: &OpenFile| (g.seen.stat.dev, g.seen.stat.ino);
    job.files.values().find(|g| key(g) == key(f) && g.kind == f.kind).map_or(f.id, |g| g.id)
}

/// Writes content into a pipe of which `fd` in `pid` can be opened for writing through /proc.
///
/// # Errors
/// If it doesn't take all of it.
pub fn fill(cx: &mut Build<'_>, pid: i32, fd: i32, content: &PipeContent) -> Result<(), RestoreError> {
    let path = format!("/proc/self/fd/{fd}");
    let w = cx.open_in(pid, |b| open_call(b, path.as_bytes(), libc::O_RDWR | libc::O_NONBLOCK))? as u64;
    let mode = libc::O_NONBLOCK | if content.packets { libc::O_DIRECT } else { 0 };
    cx.run(pid, |b| {
        let capacity = content.capacity as u64;
        b.call("fcntl F_SETPIPE_SZ", libc::SYS_fcntl, &[w, libc::F_SETPIPE_SZ as u64, capacity]);
        b.call("fcntl F_SETFL", libc::SYS_fcntl, &[w, libc::F_SETFL as u64, mode as u64]);
    })?;
    for piece in &content.pieces {
        let bytes = piece.len();
        let (results, ()) = cx.run(pid, |b| {
            let data = b.bytes(piece);
            b.call("write", libc::SYS_write, &[w, data, bytes as u64]);
        })?;
        if results[0] != bytes as u64 {
            let text = format!("a pipe of process {pid} takes {} of {bytes} bytes", results[0]);
            return Err(RestoreError::Host(text));
        }
    }
    cx.call(pid, "close", libc::SYS_close, &[w])?;
    Ok(())
}

impl Resource for PipeResource {
    nothing_to_do! { asks, probe, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Pipe
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        f.seen.link.starts_with(b"pipe:")
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        let content = if first_of(cx.job, f) == f.id { Some(content_of(cx.job, f)?) } else { None };
        let record = PipeRecord { opened: Opened::of(cx.job, f)?, content };
        cx.put(Kind::Pipe, VERSION, f.id, first_of(cx.job, f), &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let p: PipeRecord = decode(record, VERSION)?;
        let end = match p.opened.flags & libc::O_ACCMODE {
            libc::O_RDONLY => "read end",
            libc::O_WRONLY => "write end",
            _ => "both ends",
        };
        let held = p.content.map_or(String::new(), |c| {
            format!(", {} unread bytes", c.pieces.iter().map(Vec::len).sum::<usize>())
        });
        Ok(format!("{end} of pipe {}{held}", record.id))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let p: PipeRecord = decode(record, VERSION)?;
        let pid = p.opened.pid;
        let flags = p.opened.flags;
        // The first end makes the pipe and keeps both; the others are opened anew from it.
        let known = cx.pipes.get(&record.id).copied();
        let from = match known {
            Some(from) => from,
            None => {
                let base = cx.free_number(pid);
                let (_, ends) = cx.run(pid, |b| {
                    let ends = b.bytes(&[0xff; 8]);
                    b.call("pipe2", libc::SYS_pipe2, &[ends, libc::O_CLOEXEC as u64]);
                    ends
                })?;
                let mut at = [0u8; 8];
                cx.area.batch().read(ends, &mut at);
                let end = |i: usize| i32::from_le_bytes([at[i], at[i + 1], at[i + 2], at[i + 3]]);
                let (r, w) = (end(0), end(4));
                // One read-write end stands for both.
                let path = format!("/proc/self/fd/{r}");
                let (results, keep) = cx.run(pid, |b| {
                    let both = open_call(b, path.as_bytes(), libc::O_RDWR);
                    let keep = keep_descriptor(b, both, base);
                    b.call("close", libc::SYS_close, &[r as u64]);
                    b.call("close", libc::SYS_close, &[w as u64]);
                    keep
                })?;
                let from = (pid, results[keep.index()] as i32);
                cx.pipes.insert(record.id, from);
                from
            }
        };
        if let Some(content) = &p.content {
            fill(cx, from.0, from.1, content)?;
        }
        let fd = cx.reopen_in(pid, from, flags)?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let p: PipeRecord = decode(record, VERSION)?;
        if let Some((pid, fd)) = cx.pipes.remove(&record.id) {
            cx.call(pid, "close", libc::SYS_close, &[fd as u64])?;
        }
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        p.opened.set_flags(cx, fd)?;
        p.opened.finish(cx, fd, false)
    }
}
