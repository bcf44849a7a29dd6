// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this host allows, found out by building a job's namespaces and mounts in a child that then ends.

use std::fs::File;
use std::io::{self, Read as _, Write as _};

use ckpt_sys::{probe, spawn};
use nix::fcntl::OFlag;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2};
use serde::{Deserialize, Serialize};

use crate::mounts;
use crate::namespaces;
use crate::spec::TimeTarget;

/// What worked; each error is the kernel's answer as text.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HostProbe {
    /// Whether a user namespace was used; root does without.
    pub user_namespace: bool,
    /// Why the namespaces could not be made.
    pub namespaces_error: Option<String>,
    /// Why clocks could not be set in a new time namespace.
    pub clocks_error: Option<String>,
    /// Why the private mounts could not be made.
    pub mounts_error: Option<String>,
    /// Whether /proc could be mounted afresh.
    pub fresh_proc: bool,
    /// Why a process could not be made under a chosen pid.
    pub chosen_pid_error: Option<String>,
}

/// Tries it out. The calling process must have one thread.
///
/// # Errors
/// If the child could not be made or told nothing.
pub fn probe_host() -> io::Result<HostProbe> {
    let user = namespaces::needs_user_namespace();
    // Clocks of a job that is restored soon after a reboot, and of one from a host that has been up for long.
    const DAY_NS: i64 = 86_400_000_000_000;
    let time = TimeTarget { monotonic_ns: 400 * DAY_NS, boottime_ns: 400 * DAY_NS };
    let mut found = in_child(|| try_everything(user, Some(time)))?;
    if let Some(error) = found.namespaces_error.take() {
        // Perhaps only the clocks stand in the way.
        found = in_child(|| try_everything(user, None))?;
        if found.namespaces_error.is_none() {
            found.clocks_error = Some(error);
        }
    }
    Ok(found)
}

/// Runs `probe` in a child and brings back what it found.
fn in_child(probe: impl FnOnce() -> HostProbe) -> io::Result<HostProbe> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    let pid = spawn::fork_child(|| {
        let reported = write.try_clone().and_then(|pipe| report(&probe(), File::from(pipe)));
        i32::from(reported.is_err())
    })?;
    drop(write);
    let mut json = Vec::new();
    File::from(read).read_to_end(&mut json)?;
    waitpid(Pid::from_raw(pid), None)?;
    Ok(serde_json::from_slice(&json)?)
}

fn report(found: &HostProbe, mut pipe: File) -> io::Result<()> {
    pipe.write_all(&serde_json::to_vec(found)?)
}

/// In a child: the namespaces; in its child, pid 1 there: the rest.
fn try_everything(user: bool, time: Option<TimeTarget>) -> HostProbe {
    let mut found = HostProbe { user_namespace: user, ..HostProbe::default() };
    if let Err(error) = namespaces::enter(user, time) {
        found.namespaces_error = Some(error.to_string());
        return found;
    }
    let with_user = found.clone();
    in_child(|| try_inside(with_user)).unwrap_or_else(|error| {
        found.namespaces_error = Some(format!("a process in the new namespaces: {error}"));
        found
    })
}

fn try_inside(mut found: HostProbe) -> HostProbe {
    match mounts::build() {
        Ok(mounts) => found.fresh_proc = mounts.fresh_proc,
        Err(error) => found.mounts_error = Some(error.to_string()),
    }
    found.chosen_pid_error = probe::child_with_pid(4242).err().map(|error| error.to_string());
    found
}
