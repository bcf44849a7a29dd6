// SPDX-License-Identifier: MIT OR Apache-2.0
//! The private mounts of a job: /proc, /dev/shm, /dev/mqueue and devpts; everything else propagates in from the host.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ckpt_sys::pty;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

/// Why the mounts could not be made.
#[derive(Debug, thiserror::Error)]
#[error("mounting {what} for the job: {source}")]
pub(crate) struct MountError {
    what: &'static str,
    source: io::Error,
}

/// What came of it.
pub(crate) struct Mounts {
    /// Whether /proc is the job's own.
    pub fresh_proc: bool,
    /// For a person.
    pub warnings: Vec<String>,
}

fn do_mount(
    source: Option<&str>,
    target: &'static str,
    kind: &str,
    flags: MsFlags,
    data: &str,
) -> Result<(), Errno> {
    mount(source, target, Some(kind), flags, Some(data))
}

/// Builds the mounts of a job in the calling process's mount namespace, which no other process must be in.
///
/// # Errors
/// If something that a job cannot be without fails.
pub(crate) fn build() -> Result<Mounts, MountError> {
    let failed = |what| move |errno: Errno| MountError { what, source: errno.into() };
    let mut mounts = Mounts { fresh_proc: true, warnings: Vec::new() };
    let nothing: Option<&str> = None;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_SLAVE, nothing)
        .map_err(failed("/ as slave"))?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    match do_mount(Some("proc"), "/proc", "proc", safe | MsFlags::MS_NOEXEC, "") {
        Ok(()) => {}
        // The kernel gives a fresh /proc only to those who see all of the present one; containers cover parts of it.
        Err(Errno::EPERM) => {
            mounts.fresh_proc = false;
            mounts.warnings.push(
                "the host does not allow a fresh /proc (something is mounted over a part of it): the job sees the host's processes, and its checkpoints can be restored only elsewhere or by root; see: ckpt doctor"
                    .to_owned(),
            );
        }
        Err(errno) => return Err(failed("a fresh /proc")(errno)),
    }
    if Path::new("/dev/shm").is_dir() {
        do_mount(Some("tmpfs"), "/dev/shm", "tmpfs", safe, "mode=1777")
            .map_err(failed("a private /dev/shm"))?;
    }
    if Path::new("/dev/mqueue").is_dir() {
        do_mount(Some("mqueue"), "/dev/mqueue", "mqueue", safe | MsFlags::MS_NOEXEC, "")
            .map_err(failed("a private /dev/mqueue"))?;
    }
    if Path::new("/dev/pts").is_dir() {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        do_mount(Some("devpts"), "/dev/pts", "devpts", flags, "newinstance,ptmxmode=0666,mode=620")
            .map_err(failed("a private /dev/pts"))?;
        if !ptmx_is_private() {
            let flags = MsFlags::MS_BIND;
            mount(Some("/dev/pts/ptmx"), "/dev/ptmx", nothing, flags, nothing)
                .map_err(failed("/dev/pts/ptmx over /dev/ptmx"))?;
            if !ptmx_is_private() {
                mounts.warnings.push("/dev/ptmx gives no terminals in the job's own /dev/pts".to_owned());
            }
        }
    }
    Ok(mounts)
}

/// Whether /dev/ptmx allocates from what is mounted on /dev/pts.
fn ptmx_is_private() -> bool {
    let slave_device = || -> io::Result<u64> {
        let pty = pty::open()?;
        Ok(fs::File::from(pty::open_peer(pty.master.as_fd())?).metadata()?.dev())
    };
    match (slave_device(), fs::metadata("/dev/pts")) {
        (Ok(device), Ok(mounted)) => device == mounted.dev(),
        _ => false,
    }
}
