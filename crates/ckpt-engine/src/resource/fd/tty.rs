// SPDX-License-Identifier: MIT OR Apache-2.0
//! The job's own terminal: settings, window size, the session it controls, descriptors for it.
//!
//! One record (id 1) is about the terminal, the others (id 0) are open file descriptions.

use super::Opened;
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::{Build, open_call};
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::descriptor::Terminal;
use ckpt_sys::libc;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::os::fd::AsFd;

/// Version of [`TtyRecord`] and [`TerminalRecord`].
pub const VERSION: u16 = 1;

/// An open file description.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TtyRecord {
    /// What all have.
    pub opened: Opened,
    /// `/dev/tty`, or else the slave.
    pub by_dev_tty: bool,
}

/// The terminal.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TerminalRecord {
    /// `struct termios2`.
    pub termios: [u8; 44],
    /// `struct winsize`.
    pub winsize: [u8; 8],
    /// Session leader and foreground group, if it controls a session.
    pub session: Option<(i32, i32)>,
}

/// The kind.
#[derive(Debug)]
pub struct TtyResource;

const DESCRIPTION: u64 = 0;
const TERMINAL: u64 = 1;

fn outside(job: &Job) -> Option<String> {
    job.info.terminal.as_ref().map(|t| format!("/proc/{}/root{t}", job.info.init))
}

impl Resource for TtyResource {
    nothing_to_do! { asks, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Tty
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, job: &Job, f: &OpenFile) -> bool {
        job.info.terminal.as_ref().is_some_and(|t| f.seen.target == *t || f.seen.target == "/dev/tty")
    }

    fn probe(&self, job: &Job, refusals: &mut crate::error::Refusals) {
        if job.info.terminal.is_some() {
            return;
        }
        for p in job.live().filter(|p| p.stat.tty_nr != 0 && p.sid == p.pid) {
            refusals.process(
                p.pid,
                "it has a controlling terminal that is not the job's own",
                "not supported",
            );
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        match at {
            At::File(f) => {
                let by_dev_tty = f.seen.target == "/dev/tty";
                let record = TtyRecord { opened: Opened::of(cx.job, f)?, by_dev_tty };
                cx.put(Kind::Tty, VERSION, f.id, DESCRIPTION, &record)
            }
            At::Job => {
                let Some(path) = outside(cx.job) else { return Ok(()) };
                let err = |what: &str| DumpError::errno(0, format!("the job's terminal: {what}"));
                let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
                let fd = nix::fcntl::open(path.as_str(), flags, Mode::empty()).map_err(err("opening it"))?;
                let t = ckpt_sys::descriptor::terminal(fd.as_fd()).map_err(err("reading its settings"))?;
                let unread = ckpt_sys::descriptor::readable_bytes(fd.as_fd()).unwrap_or(0);
                if unread > 0 {
                    cx.warnings
                        .push(format!("{unread} bytes typed at the terminal and not read yet are not saved"));
                }
                let leader = cx.job.live().find(|p| p.sid == p.pid && p.stat.tty_nr != 0);
                let session = leader.map(|p| {
                    let group = cx.job.groups.get(&p.stat.tpgid).copied().unwrap_or(p.pgid);
                    (p.pid, group)
                });
                let record = TerminalRecord { termios: t.termios, winsize: t.winsize, session };
                cx.put(Kind::Tty, VERSION, 0, TERMINAL, &record)
            }
            At::Process(_) | At::Thread(..) => Ok(()),
        }
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        if record.id == TERMINAL {
            let t: TerminalRecord = decode(record, VERSION)?;
            let at = |i: usize| u16::from_le_bytes([t.winsize[i], t.winsize[i + 1]]);
            return Ok(format!("terminal of {} rows and {} columns", at(0), at(2)));
        }
        let t: TtyRecord = decode(record, VERSION)?;
        Ok(if t.by_dev_tty { "/dev/tty" } else { "the job's terminal" }.to_owned())
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let Some((_, slave)) = cx.request.terminal.clone() else {
            return Err(RestoreError::Host("the job had a terminal, and none was made for it".into()));
        };
        if record.id == TERMINAL {
            let t: TerminalRecord = decode(record, VERSION)?;
            let err = |what: &str| RestoreError::errno(1, format!("the job's terminal: {what}"));
            let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            let fd = nix::fcntl::open(slave.as_str(), flags, Mode::empty()).map_err(err("opening it"))?;
            let settings = Terminal { termios: t.termios, winsize: t.winsize };
            ckpt_sys::descriptor::set_terminal(fd.as_fd(), &settings).map_err(err("its settings"))?;
            if let Some((leader, group)) = t.session {
                cx.run(leader, |b| {
                    let fd = open_call(b, slave.as_bytes(), libc::O_RDWR);
                    let control = b.call("ioctl TIOCSCTTY", libc::SYS_ioctl, &[0, libc::TIOCSCTTY, 0]);
                    b.feed(fd, control, 0);
                    let group = b.bytes(&group.to_le_bytes());
                    let front = b.call("ioctl TIOCSPGRP", libc::SYS_ioctl, &[0, libc::TIOCSPGRP, group]);
                    b.feed(fd, front, 0);
                    let close = b.call("close", libc::SYS_close, &[0]);
                    b.feed(fd, close, 0);
                })?;
            }
            return Ok(());
        }
        let t: TtyRecord = decode(record, VERSION)?;
        let path = if t.by_dev_tty { "/dev/tty" } else { &slave };
        let fd = cx.open_in(t.opened.pid, |b| open_call(b, path.as_bytes(), t.opened.flags))?;
        cx.add_file(record.owner, t.opened.pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        if record.id == TERMINAL {
            return Ok(());
        }
        let t: TtyRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        t.opened.finish(cx, fd, false)
    }
}
