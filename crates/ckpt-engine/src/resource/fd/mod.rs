// SPDX-License-Identifier: MIT OR Apache-2.0
//! Kinds of open file descriptions, and the tables that hold them.

pub mod char_device;
pub mod directory;
pub mod epoll;
pub mod eventfd;
pub mod external;
pub mod fifo;
pub mod file_lock;
pub mod inotify;
pub mod io_uring;
pub mod pipe;
pub mod regular_file;
pub mod signalfd;
pub mod table;
pub mod tcp_socket;
pub mod timerfd;
pub mod tty;
pub mod unix_socket;

use crate::error::{DumpError, RestoreError};
use crate::model::Job;
use crate::model::file::OpenFile;
use crate::restore::build_tree::Build;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;
use std::os::fd::AsFd;

/// What all open file descriptions have. The record's owner is the description's id.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Opened {
    /// A process that holds it: it is rebuilt there.
    pub pid: i32,
    /// O_* without O_CLOEXEC.
    pub flags: i32,
    /// Position in bytes.
    pub position: u64,
    /// F_SETOWN_EX type and id as the job sees it (0: nobody), F_SETSIG.
    pub signal_owner: (i32, i32, i32),
}

const F_SETOWN_EX: u64 = 15;
const F_SETSIG: u64 = 10;
const F_OWNER_PGRP: i32 = 2;

impl Opened {
    /// Of an observed one.
    ///
    /// # Errors
    /// If it can't be asked.
    pub fn of(job: &Job, f: &OpenFile) -> Result<Opened, DumpError> {
        // O_PATH descriptors have no owner.
        let mut signal_owner = (0, 0, 0);
        if f.seen.flags & libc::O_PATH == 0 {
            let fd = f.steal()?;
            let (kind, id, signal) =
                ckpt_sys::descriptor::owner(fd.as_fd()).map_err(DumpError::fd(f.pid, f.fd, "F_GETOWN_EX"))?;
            let inside = match (kind, id) {
                (_, 0) => 0,
                (F_OWNER_PGRP, id) => job.groups.get(&id).copied().unwrap_or(0),
                (_, id) => job.inner_tid(id).unwrap_or(0),
            };
            signal_owner = (kind, inside, signal);
        }
        Ok(Opened { pid: f.pid, flags: f.seen.flags, position: f.seen.position, signal_owner })
    }

    /// Sets flags that open(2) doesn't, position and owner.
    ///
    /// # Errors
    /// If a call fails.
    pub fn finish(&self, cx: &mut Build<'_>, fd: i32, seekable: bool) -> Result<(), RestoreError> {
        let (kind, id, signal) = self.signal_owner;
        let position = self.position;
        if self.flags & (libc::O_DIRECT | libc::O_PATH) == libc::O_DIRECT {
            self.set_flags(cx, fd)?;
        }
        let fd = fd as u64;
        cx.run(self.pid, |b| {
            if seekable {
                b.call("lseek", libc::SYS_lseek, &[fd, position, libc::SEEK_SET as u64]);
            }
            if id != 0 {
                let owner = b.bytes(&[kind.to_le_bytes(), id.to_le_bytes()].concat());
                b.call("fcntl F_SETOWN_EX", libc::SYS_fcntl, &[fd, F_SETOWN_EX, owner]);
            }
            if signal != 0 {
                b.call("fcntl F_SETSIG", libc::SYS_fcntl, &[fd, F_SETSIG, signal as u64]);
            }
        })?;
        Ok(())
    }

    /// Sets the status flags of a description that was made by another call than open(2).
    ///
    /// # Errors
    /// If it fails.
    pub fn set_flags(&self, cx: &mut Build<'_>, fd: i32) -> Result<(), RestoreError> {
        let flags = (self.flags & !libc::O_ACCMODE) as u64;
        cx.call(self.pid, "fcntl F_SETFL", libc::SYS_fcntl, &[fd as u64, libc::F_SETFL as u64, flags])?;
        Ok(())
    }
}

/// What an unsupported open file description is, and what to do about it.
pub fn unsupported(f: &OpenFile) -> (String, &'static str) {
    let target = &f.seen.target;
    let starts = |p: &str| target.starts_with(p);
    if target == io_uring::TARGET {
        (io_uring::words(&f.seen.info), io_uring::ADVICE)
    } else if starts("/dev/nvidia") || starts("/dev/dri/") || starts("/dev/kfd") {
        (format!("GPU device {target}"), "GPU users can't be checkpointed; finish or close the device first")
    } else if starts("/dev/infiniband") {
        (format!("RDMA device {target}"), "RDMA users can't be checkpointed")
    } else if starts("socket:") {
        (
            format!("{target}, neither of TCP nor of an unnamed unix socket pair"),
            "other sockets are not supported; close it first",
        )
    } else if starts("anon_inode:") {
        (target.clone(), "not supported; close it first")
    } else if starts("/proc/") || starts("/sys/") {
        (format!("kernel file {target}"), "not supported; close it first")
    } else if starts("/dev/") {
        (format!("device {target}"), "devices with state are not supported; close it first")
    } else {
        (target.clone(), "not supported; close it first")
    }
}
