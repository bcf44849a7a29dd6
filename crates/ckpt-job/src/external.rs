// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fds that a launcher was started with, and that its job gets under the same numbers.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use ckpt_sys::spawn;

use crate::spec::ExternalRecord;

/// Every fd of this process that `execve` would pass on: 0, 1, 2 (unless the process was started without them) and whatever
/// the caller left open. Our own fds are close-on-exec and so not among them.
///
/// # Errors
/// If /proc/self/fd cannot be read.
pub fn inherited() -> io::Result<Vec<ExternalRecord>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|text| text.parse::<RawFd>().ok());
        numbers.extend(
            number.filter(|&number| spawn::is_inheritable(number) && !spawn::started_with_fd_closed(number)),
        );
    }
    numbers.sort_unstable();
    numbers.into_iter().map(describe).collect()
}

/// The standard fds that this process was started without.
pub fn closed_standard() -> Vec<RawFd> {
    (0..3).filter(|&fd| spawn::started_with_fd_closed(fd)).collect()
}

/// Describes one fd.
///
/// # Errors
/// `EBADF`, or whatever stat says.
pub fn describe(number: RawFd) -> io::Result<ExternalRecord> {
    let path = format!("/proc/self/fd/{number}");
    let status = std::fs::metadata(&path)?;
    let link = std::fs::read_link(&path)?;
    Ok(ExternalRecord {
        number,
        device: status.dev(),
        inode: status.ino(),
        special_device: status.rdev(),
        mode: status.mode(),
        flags: spawn::status_flags(number)?,
        description: String::from_utf8_lossy(link.as_os_str().as_bytes()).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn our_own_fds_are_not_external() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let copy = spawn::duplicate_for_exec(file.as_raw_fd(), 800).unwrap();
        let found = inherited().unwrap();
        let record = found.iter().find(|record| record.number == copy).unwrap();
        assert_eq!(record.description, "/dev/null");
        assert_eq!(record.flags & libc::O_ACCMODE, libc::O_RDONLY);
        assert!(!found.iter().any(|record| record.number == file.as_raw_fd()));
        spawn::close_inherited(copy).unwrap();
    }
}
