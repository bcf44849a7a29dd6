// SPDX-License-Identifier: MIT OR Apache-2.0
//! How many times a checkpoint has been restored, noted beside it.
//!
//! A file `restored` in its directory, one line for each restore: seconds since 1970, the host's name. Whoever makes the file has the
//! first restore, as open(2) with O_EXCL lets only one do that, on NFS too; the number of a later one is that of the lines, which two
//! at the same moment may both have. The image itself is left alone. A checkpoint that is copied takes its file along.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Name of the file in the checkpoint's directory.
pub const RESTORED_FILE: &str = "restored";
/// Most bytes of it that are read: many thousand restores.
const MOST_BYTES: u64 = 1 << 20;

/// Restores that have been noted, and are not known to have come about.
#[derive(Debug)]
#[must_use]
pub struct Restoration {
    path: PathBuf,
    /// The number of the first of them, from 1.
    number: u32,
    copies: u32,
}

impl Restoration {
    /// Notes that the checkpoint in `dir` is restored so many times together. With `durable` it is on the disk when this returns.
    ///
    /// # Errors
    /// That of the file system: it is read-only, full, or another user's. Then nothing is known of earlier restores.
    pub fn note(dir: &Path, copies: u32, durable: bool) -> io::Result<Restoration> {
        let path = dir.join(RESTORED_FILE);
        let mut options = OpenOptions::new();
        options.append(true).read(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
        let (mut file, number) = match options.clone().create_new(true).open(&path) {
            Ok(file) => (file, 1),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                let mut file = options.open(&path)?;
                let mut text = Vec::new();
                (&mut file).take(MOST_BYTES).read_to_end(&mut text)?;
                let lines = text.iter().filter(|byte| **byte == b'\n').count();
                // Its maker may not have written its line yet.
                (file, u32::try_from(lines).unwrap_or(u32::MAX - 1).max(1).saturating_add(1))
            }
            Err(e) => return Err(e),
        };
        let this = Restoration { path, number, copies };
        let seconds = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let line = format!("{seconds} {}\n", host.trim_end());
        let written = file.write_all(line.repeat(copies as usize).as_bytes()).and_then(|()| {
            if durable {
                file.sync_all()?;
                super::sync_dir(&File::open(dir)?)?;
            }
            Ok(())
        });
        match written {
            Ok(()) => Ok(this),
            Err(e) => {
                this.undo();
                Err(e)
            }
        }
    }

    /// The number of the first of them: 1 if the checkpoint was never restored before.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Takes the note back: none of them came about. One that was not the first is left as it is, as is one after which others have
    /// been noted.
    pub fn undo(self) {
        let lines = |text: Vec<u8>| text.iter().filter(|byte| **byte == b'\n').count();
        if self.number == 1 && fs::read(&self.path).is_ok_and(|text| lines(text) <= self.copies as usize) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ckpt-restored-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        dir
    }

    #[test]
    fn only_one_is_the_first() {
        let dir = scratch("first");
        assert_eq!(Restoration::note(&dir, 1, true).unwrap().number(), 1);
        assert_eq!(Restoration::note(&dir, 3, false).unwrap().number(), 2);
        assert_eq!(Restoration::note(&dir, 1, false).unwrap().number(), 5);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn at_the_same_time_only_one_is_the_first() {
        let dir = scratch("together");
        let note = || Restoration::note(&dir, 1, false).unwrap().number();
        let numbers: Vec<u32> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..8).map(|_| s.spawn(note)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(numbers.iter().filter(|n| **n == 1).count(), 1, "{numbers:?}");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_is_taken_back_does_not_count() {
        let dir = scratch("undo");
        Restoration::note(&dir, 2, false).unwrap().undo();
        let first = Restoration::note(&dir, 1, false).unwrap();
        assert_eq!(first.number(), 1);
        let second = Restoration::note(&dir, 1, false).unwrap();
        assert_eq!(second.number(), 2);
        // Another one has been told that it is not the first.
        first.undo();
        second.undo();
        assert_eq!(Restoration::note(&dir, 1, false).unwrap().number(), 3);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_cannot_be_noted_is_an_error() {
        let dir = scratch("link");
        std::os::unix::fs::symlink("elsewhere", dir.join(RESTORED_FILE)).unwrap();
        assert!(Restoration::note(&dir, 1, false).is_err());
        assert!(Restoration::note(&dir.join("absent"), 1, false).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
