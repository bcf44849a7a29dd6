// SPDX-License-Identifier: MIT OR Apache-2.0
//! The store.
use std::fs::File;
use std::io;

/// Brings directory entries to the disk.
pub(crate) fn sync_dir(dir: &File) -> io::Result<()> {
    use nix::errno::Errno;
    match dir.sync_all() {
        // File systems that cannot sync a directory (some FUSE and network ones) say so like this.
        Err(e) if matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EINVAL | Errno::ENOTSUP)) => {
            Ok(())
        }
        other => other,
    }
}
