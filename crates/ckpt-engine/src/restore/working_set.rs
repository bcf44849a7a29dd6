// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which runs a lazily restored job touched first, kept beside the checkpoint for the next restore.
//!
//! A file `working-set` of text: a head with the image's id, a line for each run (object and offset, hexadecimal) in the order in
//! which they were touched, a last line with a checksum. One that is absent, damaged or of another image counts as empty.

use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};

/// Its name in the checkpoint's directory.
pub const WORKING_SET_FILE: &str = "working-set";
/// Most runs that it names: 64 MiB of memory.
const MOST_RUNS: usize = 64;
/// Most bytes of the file that are read.
const MOST_BYTES: u64 = 64 << 10;

/// Runs in order.
#[derive(Debug, Default)]
pub struct WorkingSet {
    id: String,
    runs: Vec<(u64, u64)>,
    grown: bool,
}

impl WorkingSet {
    /// That of an image, empty if there is none.
    pub fn load(dir: &OwnedFd, id: &[u8]) -> WorkingSet {
        let id: String = id.iter().map(|b| format!("{b:02x}")).collect();
        let runs = read(dir).and_then(|text| parse(&text, &id)).unwrap_or_default();
        WorkingSet { id, runs, grown: false }
    }

    /// Object and offset of each.
    pub fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// A run was needed before it was there.
    pub fn touched(&mut self, object: u64, offset: u64) {
        if self.runs.len() < MOST_RUNS && !self.runs.contains(&(object, offset)) {
            self.runs.push((object, offset));
            self.grown = true;
        }
    }

    /// Writes it down if it has grown.
    ///
    /// # Errors
    /// What the file system says; the old one is then as it was.
    pub fn save(&mut self, dir: &OwnedFd) -> std::io::Result<()> {
        if !std::mem::take(&mut self.grown) {
            return Ok(());
        }
        let draft = format!(".{WORKING_SET_FILE}.{}", std::process::id());
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let file = openat(dir, draft.as_str(), flags, Mode::from_bits_truncate(0o600))?;
        std::fs::File::from(file).write_all(self.text().as_bytes())?;
        Ok(renameat(dir.as_fd(), draft.as_str(), dir.as_fd(), WORKING_SET_FILE)?)
    }

    fn text(&self) -> String {
        let mut text = head(&self.id);
        for (object, offset) in &self.runs {
            let _ = writeln!(text, "{object:x} {offset:x}");
        }
        let sum = crate::model::file::fnv1a(text.bytes());
        let _ = writeln!(text, "sum {sum:016x}");
        text
    }
}

fn head(id: &str) -> String {
    format!("ckpt working set 1 of {id}\n")
}

fn read(dir: &OwnedFd) -> Option<String> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = std::fs::File::from(openat(dir, WORKING_SET_FILE, flags, Mode::empty()).ok()?);
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}

fn parse(text: &str, id: &str) -> Option<Vec<(u64, u64)>> {
    let end = text.rfind("sum ")?;
    let sum = u64::from_str_radix(text[end..].strip_prefix("sum ")?.trim_end(), 16).ok()?;
    let body = text[..end].strip_prefix(&head(id))?;
    if crate::model::file::fnv1a(text[..end].bytes()) != sum {
        return None;
    }
    let number = |word: &str| u64::from_str_radix(word, 16).ok();
    let runs = body.lines().take(MOST_RUNS).map(|line| {
        let (object, offset) = line.split_once(' ')?;
        Some((number(object)?, number(offset)?))
    });
    runs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_and_is_picky() {
        let mut w = WorkingSet { id: "0a".into(), ..WorkingSet::default() };
        w.touched(3, 0x7f00_0000);
        w.touched(1, 0);
        w.touched(3, 0x7f00_0000);
        let text = w.text();
        assert_eq!(parse(&text, "0a"), Some(vec![(3, 0x7f00_0000), (1, 0)]));
        assert_eq!(parse(&text, "0b"), None, "of another image");
        assert_eq!(parse(&text.replace("3 7f", "3 7e"), "0a"), None, "damaged");
        assert_eq!(parse(&text[..text.len() - 4], "0a"), None, "cut");
        assert_eq!(parse("", "0a"), None);
    }
}
