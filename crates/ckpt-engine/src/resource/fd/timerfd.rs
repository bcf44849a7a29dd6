// SPDX-License-Identifier: MIT OR Apache-2.0
//! timerfd_create(2): clock, time left, interval, expirations nobody has read.

use super::Opened;
use crate::error::{DumpError, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::file::{OpenFile, info_value};
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::{Errno, libc};
use std::os::fd::AsFd;

/// Version of [`TimerfdRecord`].
pub const VERSION: u16 = 1;

/// A timerfd.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TimerfdRecord {
    /// What all have.
    pub opened: Opened,
    /// CLOCK_*.
    pub clock: i32,
    /// Expirations not read.
    pub ticks: u64,
    /// `struct itimerspec`: interval and time left.
    pub spec: [u64; 4],
}

/// `_IOW('T', 0, u64)` of linux/timerfd.h.
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

/// The kind.
#[derive(Debug)]
pub struct TimerfdResource;

impl Resource for TimerfdResource {
    nothing_to_do! { asks, probe, content, connect, arm }

    fn kind(&self) -> Kind {
        Kind::Timerfd
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::Process]
    }

    fn claims(&self, _: &Job, f: &OpenFile) -> bool {
        f.seen.target == "anon_inode:[timerfd]"
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::File(f) = at else { return Ok(()) };
        // A timer that expired stands still until it is asked: that counts what was missed and starts it again.
        let err = |what: &str| DumpError::fd(f.pid, f.fd, what.to_owned());
        let spec =
            ckpt_sys::descriptor::timerfd_gettime(f.steal()?.as_fd()).map_err(err("timerfd_gettime"))?;
        let path = format!("/proc/{}/fdinfo/{}", f.host, f.fd);
        let text = std::fs::read_to_string(path).map_err(|_| err("its fdinfo")(Errno::ENODATA))?;
        let info = |key: &str| info_value(&text, key);
        let read = || {
            // The times are those of the answer: it may have expired again since, and show none left.
            let clock = info("clockid")?.parse().ok()?;
            Some((clock, info("ticks")?.parse().ok()?, spec.map(|n| n as u64)))
        };
        let (clock, ticks, spec) =
            read().ok_or_else(|| DumpError::fd(f.pid, f.fd, "its fdinfo")(Errno::ENODATA))?;
        let record = TimerfdRecord { opened: Opened::of(cx.job, f)?, clock, ticks, spec };
        cx.put(Kind::Timerfd, VERSION, f.id, 0, &record)
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let t: TimerfdRecord = decode(record, VERSION)?;
        Ok(format!("timerfd of clock {}, {} s left, {} unread", t.clock, t.spec[2], t.ticks))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let t: TimerfdRecord = decode(record, VERSION)?;
        let pid = t.opened.pid;
        let fd = cx.open_in(pid, |b| {
            let args = [t.clock as u64, libc::TFD_CLOEXEC as u64];
            b.call("timerfd_create", libc::SYS_timerfd_create, &args)
        })?;
        t.opened.set_flags(cx, fd)?;
        cx.add_file(record.owner, pid, fd);
        Ok(())
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let t: TimerfdRecord = decode(record, VERSION)?;
        let Some(&(_, fd)) = cx.files.get(&record.owner) else { return Ok(()) };
        // Armed here and not last: the descriptor it is kept under goes away with the tables.
        cx.run(t.opened.pid, |b| {
            if t.spec != [0; 4] {
                // A periodic one with no time left expires at once.
                let now = t.spec[2] | t.spec[3] == 0;
                let spec = b.words(&[t.spec[0], t.spec[1], t.spec[2], if now { 1 } else { t.spec[3] }]);
                b.call("timerfd_settime", libc::SYS_timerfd_settime, &[fd as u64, 0, spec, 0]);
            }
            if t.ticks > 0 {
                let ticks = b.words(&[t.ticks]);
                b.call("ioctl TFD_IOC_SET_TICKS", libc::SYS_ioctl, &[fd as u64, TFD_IOC_SET_TICKS, ticks]);
            }
        })?;
        t.opened.finish(cx, fd, false)
    }
}
