// SPDX-License-Identifier: MIT OR Apache-2.0
//! The namespaces of a job: which ones, and how the intermediate process enters them.

use std::fs;
use std::io;

use ckpt_sys::namespace::{self, CAP_SYS_ADMIN, Namespaces};
use nix::time::{ClockId, clock_gettime};

use crate::spec::TimeTarget;

/// Why the namespaces could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The host does not let this user make them.
    #[error("this host does not allow {what}: {source}{}", hint_text(.hints))]
    Forbidden {
        /// Which namespaces.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// What would allow it.
        hints: Vec<String>,
    },
    /// The uid or gid could not be mapped to itself.
    #[error("writing {path} of the new user namespace: {source}{}", hint_text(.hints))]
    IdMap {
        /// Which file.
        path: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// What would allow it.
        hints: Vec<String>,
    },
    /// The clocks could not be set.
    #[error("setting the clocks of the new time namespace (CLOCK_{clock} by {offset_ns} ns): {source}")]
    Clock {
        /// Which clock.
        clock: &'static str,
        /// By how much, relative to the host's clock.
        offset_ns: i128,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn hint_text(hints: &[String]) -> String {
    hints.iter().map(|hint| format!("\n  {hint}")).collect()
}

/// Whether a job of this process needs a user namespace of its own: anyone but a root that may make the others without.
pub fn needs_user_namespace() -> bool {
    let is_admin = namespace::capabilities().is_ok_and(|sets| sets.effective & (1 << CAP_SYS_ADMIN) != 0);
    !(nix::unistd::geteuid().is_root() && is_admin)
}

/// What on this host stands in the way of user namespaces, each with its remedy. Empty if nothing was found.
pub fn user_namespace_obstacles() -> Vec<String> {
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let mut hints = Vec::new();
    if number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        hints.push(
            "user namespaces are switched off for plain users; as root: sysctl kernel.unprivileged_userns_clone=1"
                .to_owned(),
        );
    }
    if number("/proc/sys/user/max_user_namespaces") == Some(0) {
        hints.push(
            "user namespaces are switched off (user.max_user_namespaces is 0); as root: sysctl user.max_user_namespaces=10000"
                .to_owned(),
        );
    }
    if number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        hints.push(
            "AppArmor restricts user namespaces; as root either install an AppArmor profile for ckpt that contains \"userns,\", or: sysctl kernel.apparmor_restrict_unprivileged_userns=0"
                .to_owned(),
        );
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2")) {
        hints.push(
            "a seccomp filter is in force, probably of a container; start the container with a profile that allows unshare and clone3 (docker: --security-opt seccomp=unconfined)"
                .to_owned(),
        );
    }
    hints
}

/// Unshares the namespaces of a job in the calling process, which must have one thread; pid and time namespaces take effect
/// in its children. With `user` the caller's uid and gid are mapped to themselves.
///
/// # Errors
/// [`NamespaceError`], telling what would allow it.
pub(crate) fn enter(user: bool, time: Option<TimeTarget>) -> Result<(), NamespaceError> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let mut wanted = Namespaces::PID.and(Namespaces::MOUNT).and(Namespaces::IPC).and(Namespaces::UTS);
    if user {
        wanted = wanted.and(Namespaces::USER);
    }
    let what = if user { "user namespaces" } else { "new namespaces, although this is root" };
    let forbidden = |source| NamespaceError::Forbidden { what, source, hints: user_namespace_obstacles() };
    match namespace::unshare(wanted.and(Namespaces::TIME)) {
        // A kernel without time namespaces runs a job all the same, unless its clocks have to be set.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && time.is_none() => {
            namespace::unshare(wanted).map_err(forbidden)?;
        }
        result => result.map_err(forbidden)?,
    }
    if user {
        let write = |path: &'static str, text: String| {
            let hints = user_namespace_obstacles;
            fs::write(path, text).map_err(|source| NamespaceError::IdMap { path, source, hints: hints() })
        };
        write("/proc/self/setgroups", "deny".to_owned())?;
        write("/proc/self/uid_map", format!("{uid} {uid} 1\n"))?;
        write("/proc/self/gid_map", format!("{gid} {gid} 1\n"))?;
    }
    if let Some(target) = time {
        set_clock("monotonic", ClockId::CLOCK_MONOTONIC, target.monotonic_ns)?;
        set_clock("boottime", ClockId::CLOCK_BOOTTIME, target.boottime_ns)?;
    }
    Ok(())
}

const NS_PER_S: i128 = 1_000_000_000;

/// Makes a clock of the time namespace for the children show `target_ns` now.
fn set_clock(clock: &'static str, id: ClockId, target_ns: i64) -> Result<(), NamespaceError> {
    let path = "/proc/self/timens_offsets";
    let error = |offset_ns| move |source| NamespaceError::Clock { clock, offset_ns, source };
    // Offsets count from the initial time namespace; the new namespace starts with those of the present one, which
    // our own clock contains.
    let text = fs::read_to_string(path).map_err(error(0))?;
    let present = parse_offset(&text, clock).unwrap_or(0);
    let now = clock_gettime(id).map_err(|errno| error(0)(errno.into()))?;
    let now_ns = i128::from(now.tv_sec()) * NS_PER_S + i128::from(now.tv_nsec());
    let offset_ns = present + i128::from(target_ns) - now_ns;
    let line = format!("{clock} {} {}\n", offset_ns.div_euclid(NS_PER_S), offset_ns.rem_euclid(NS_PER_S));
    fs::write(path, line).map_err(error(offset_ns))
}

/// The offset of a clock in nanoseconds, out of /proc/pid/timens_offsets (`monotonic  -5  500000000`).
fn parse_offset(text: &str, clock: &str) -> Option<i128> {
    text.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        if fields.next()? != clock {
            return None;
        }
        let seconds: i128 = fields.next()?.parse().ok()?;
        let nanoseconds: i128 = fields.next()?.parse().ok()?;
        Some(seconds * NS_PER_S + nanoseconds)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read() {
        let text = "monotonic           0         0\nboottime           -2 500000000\n";
        assert_eq!(parse_offset(text, "monotonic"), Some(0));
        assert_eq!(parse_offset(text, "boottime"), Some(-1_500_000_000));
        assert_eq!(parse_offset(text, "realtime"), None);
    }
}
