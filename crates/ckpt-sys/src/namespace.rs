// SPDX-License-Identifier: MIT OR Apache-2.0
//! Namespaces and the capabilities that come with a user namespace.
//!
//! Only what has no safe wrapper elsewhere; mounting, id maps and time offsets are ordinary file work of the
//! caller.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

/// A set of `CLONE_NEW*` flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespaces(libc::c_int);

impl Namespaces {
    /// No namespace.
    pub const NONE: Namespaces = Namespaces(0);
    /// user_namespaces(7).
    pub const USER: Namespaces = Namespaces(libc::CLONE_NEWUSER);
    /// pid_namespaces(7), for the children to come.
    pub const PID: Namespaces = Namespaces(libc::CLONE_NEWPID);
    /// mount_namespaces(7).
    pub const MOUNT: Namespaces = Namespaces(libc::CLONE_NEWNS);
    /// ipc_namespaces(7).
    pub const IPC: Namespaces = Namespaces(libc::CLONE_NEWIPC);
    /// uts_namespaces(7).
    pub const UTS: Namespaces = Namespaces(libc::CLONE_NEWUTS);
    /// time_namespaces(7), for the children to come.
    pub const TIME: Namespaces = Namespaces(libc::CLONE_NEWTIME);

    /// Both sets.
    #[must_use]
    pub const fn and(self, other: Namespaces) -> Namespaces {
        Namespaces(self.0 | other.0)
    }
}

/// `unshare(2)`.
///
/// # Errors
/// As the system call: `EPERM` where the host forbids it, `ENOSPC` where `/proc/sys/user/max_*_namespaces` is used
/// up, `EINVAL` for a namespace that the kernel was built without or from a process with several threads.
pub fn unshare(namespaces: Namespaces) -> io::Result<()> {
    // SAFETY: takes an integer; affects kernel state of this process only.
    check(unsafe { libc::unshare(namespaces.0) })
}

/// `setdomainname(2)`: the NIS domain name of this UTS namespace.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN in the namespace's owner, `EINVAL` for more than 64 bytes.
pub fn set_domain_name(name: &OsStr) -> io::Result<()> {
    let bytes = name.as_bytes();
    // SAFETY: pointer and length describe the live slice.
    check(unsafe { libc::setdomainname(bytes.as_ptr().cast(), bytes.len()) })
}

/// The capability sets of a thread as bit masks, bit n standing for capability n (capabilities(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    /// What counts in permission checks.
    pub effective: u64,
    /// What may be made effective.
    pub permitted: u64,
    /// What may be kept across execve.
    pub inheritable: u64,
}

/// CAP_SYS_ADMIN, see capabilities(7).
pub const CAP_SYS_ADMIN: u32 = 21;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h: two words of 32 bits each.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// The capability sets of the calling thread.
///
/// # Errors
/// None known for the calling thread; whatever `capget(2)` says.
pub fn capabilities() -> io::Result<CapabilitySets> {
    let mut header = CapHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 writes exactly two elements; both pointers are to live, correctly laid out memory.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    check(result as libc::c_int)?;
    let join = |word: fn(&CapData) -> u32| u64::from(word(&data[0])) | u64::from(word(&data[1])) << 32;
    Ok(CapabilitySets {
        effective: join(|d| d.effective),
        permitted: join(|d| d.permitted),
        inheritable: join(|d| d.inheritable),
    })
}

/// Sets the capability sets of the calling thread.
///
/// # Errors
/// `EPERM` if a set would gain what it may not.
pub fn set_capabilities(sets: CapabilitySets) -> io::Result<()> {
    let mut header = CapHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let half = |shift: u32| CapData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads exactly two elements; both pointers are to live, correctly laid out memory.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    check(result as libc::c_int)
}

/// Makes every permitted capability survive the next `execve` of an ordinary program (ambient set). Meant for the
/// first process of a fresh user namespace, whose uid there need not be 0.
///
/// # Errors
/// Whatever `capset(2)` or `PR_CAP_AMBIENT` say, for instance `EPERM` under `SECBIT_NO_CAP_AMBIENT_RAISE`.
pub fn keep_capabilities_across_exec() -> io::Result<()> {
    let mut sets = capabilities()?;
    sets.inheritable = sets.permitted;
    set_capabilities(sets)?;
    for capability in (0..64u64).filter(|bit| sets.permitted & (1 << bit) != 0) {
        let raise = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
        // SAFETY: this prctl takes integers only.
        check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, capability as libc::c_ulong, 0, 0) })?;
    }
    Ok(())
}

/// Gives up all capabilities: ambient, inheritable, permitted, effective. The bounding set stays.
///
/// # Errors
/// Whatever `capset(2)` says; nothing is expected.
pub fn drop_capabilities() -> io::Result<()> {
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong;
    // SAFETY: this prctl takes integers only.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0) })?;
    set_capabilities(CapabilitySets::default())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_agree_with_proc() {
        let sets = capabilities().unwrap();
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        assert_eq!(sets.effective, field("CapEff:"));
        assert_eq!(sets.permitted, field("CapPrm:"));
        assert_eq!(sets.inheritable, field("CapInh:"));
    }
}
