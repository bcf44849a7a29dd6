// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings of a process as /proc/pid/smaps shows them (proc_pid_smaps(5)).
//!
//! Read here and not with a library, because a flag that is not known must become a refusal, not be lost.

use ckpt_sys::memory::PAGE;
use std::io::{BufRead, BufReader};

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Vma {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// PROT_READ, PROT_WRITE, PROT_EXEC.
    pub prot: i32,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset in bytes in the file.
    pub offset: u64,
    /// Device of the file, as in the maps file.
    pub dev: (u32, u32),
    /// Inode of the file, 0 for none.
    pub ino: u64,
    /// Path or bracketed name, unescaped, without " (deleted)".
    pub name: String,
    /// The file has no name any more.
    pub deleted: bool,
    /// The two-letter flags.
    pub flags: Vec<[u8; 2]>,
    /// Bytes of anonymous memory in it.
    pub anonymous_bytes: u64,
    /// Bytes swapped out.
    pub swap_bytes: u64,
    /// Protection key (pkeys(7)).
    pub protection_key: u64,
}

impl Vma {
    /// Whether it has this flag.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag.as_bytes())
    }

    /// Whether the maps file has the same line for both.
    pub fn has_line_of(&self, o: &Vma) -> bool {
        (self.start, self.end, self.prot, self.shared, self.offset, self.dev, self.ino, self.deleted)
            == (o.start, o.end, o.prot, o.shared, o.offset, o.dev, o.ino, o.deleted)
            && self.name == o.name
    }

    /// MAP_GROWSDOWN.
    pub fn grows_down(&self) -> bool {
        self.has("gd")
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// One of the kernel's own: `[vdso]`, `[vvar]`, `[vvar_vclock]`.
    pub fn is_vdso_part(&self) -> bool {
        self.name == "[vdso]" || self.name.starts_with("[vvar")
    }

    /// A file (or shared memory object) is behind it.
    pub fn is_file(&self) -> bool {
        self.ino != 0
    }
}

/// Undoes the octal escape of newlines in a path, the only one there is.
fn unescape(s: &str) -> String {
    s.replace("\\012", "\n")
}

fn parse_head(line: &str) -> Option<Vma> {
    let mut it = line.splitn(6, ' ');
    let (range, perms, offset, dev, ino) = (it.next()?, it.next()?, it.next()?, it.next()?, it.next()?);
    let rest = it.next().unwrap_or("").trim_start();
    let (start, end) = range.split_once('-')?;
    let (major, minor) = dev.split_once(':')?;
    let hex = |s| u64::from_str_radix(s, 16).ok();
    let p = perms.as_bytes();
    let bit = |i: usize, c: u8, v: i32| if p.get(i) == Some(&c) { v } else { 0 };
    let (name, deleted) = match rest.strip_suffix(" (deleted)") {
        Some(n) => (n, true),
        None => (rest, false),
    };
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        prot: bit(0, b'r', libc::PROT_READ) | bit(1, b'w', libc::PROT_WRITE) | bit(2, b'x', libc::PROT_EXEC),
        shared: p.get(3) == Some(&b's'),
        offset: hex(offset)?,
        dev: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        ino: ino.parse().ok()?,
        name: unescape(name),
        deleted,
        ..Vma::default()
    })
}

use ckpt_sys::libc;

/// Parses the text of /proc/pid/maps: all mappings but the vsyscall page, without what only smaps tells.
///
/// # Errors
/// InvalidData for a line that can't be parsed.
pub fn parse_maps(text: &[u8]) -> std::io::Result<Vec<Vma>> {
    let mut out = Vec::new();
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let line = String::from_utf8_lossy(line);
        out.push(parse_head(&line).ok_or_else(|| unknown(&line))?);
    }
    out.retain(|v| v.name != "[vsyscall]");
    Ok(out)
}

fn unknown(line: &str) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, format!("unknown line: {line}"))
}

/// All mappings of a process but the vsyscall page.
///
/// # Errors
/// What reading gives; InvalidData for a line that can't be parsed.
pub fn read_smaps(host: i32) -> std::io::Result<Vec<Vma>> {
    let file = std::fs::File::open(format!("/proc/{host}/smaps"))?;
    parse_smaps(BufReader::with_capacity(1 << 20, file))
}

/// Parses (a part of) the text of /proc/pid/smaps, without the vsyscall page.
///
/// # Errors
/// As [`read_smaps`].
pub fn parse_smaps(text: impl BufRead) -> std::io::Result<Vec<Vma>> {
    let mut out: Vec<Vma> = Vec::new();
    for line in text.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let kib = |rest: &str| {
            rest.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        if let Some(rest) = line.strip_prefix("VmFlags:") {
            if let Some(v) = out.last_mut() {
                v.flags = rest.split_whitespace().filter_map(|f| f.as_bytes().try_into().ok()).collect();
            }
        } else if let Some(rest) = line.strip_prefix("Anonymous:") {
            out.last_mut().into_iter().for_each(|v| v.anonymous_bytes = kib(rest));
        } else if let Some(rest) = line.strip_prefix("ProtectionKey:") {
            out.last_mut()
                .into_iter()
                .for_each(|v| v.protection_key = rest.trim().parse().unwrap_or(u64::MAX));
        } else if let Some(rest) = line.strip_prefix("Swap:") {
            out.last_mut().into_iter().for_each(|v| v.swap_bytes = kib(rest));
        } else if line.as_bytes().first().is_some_and(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)) {
            out.push(parse_head(&line).ok_or_else(|| unknown(&line))?);
        }
    }
    out.retain(|v| v.name != "[vsyscall]");
    Ok(out)
}

/// Bounds of a process's vDSO, from /proc/pid/maps.
pub fn vdso_of(host: i32) -> Option<std::ops::Range<u64>> {
    let text = super::process::read_proc_text(format!("/proc/{host}/maps")).ok()?;
    let v = text.lines().filter_map(parse_head).find(|v| v.name == "[vdso]")?;
    Some(v.start..v.end)
}

/// A hole of `bytes` (plus a page on each side) between mappings given as (start, end, grows down).
pub fn hole(vmas: impl Iterator<Item = (u64, u64, bool)>, bytes: u64) -> Option<u64> {
    const STACK_ROOM: u64 = 1 << 30;
    const LOWEST: u64 = 0x10_0000_0000;
    let mut taken: Vec<(u64, u64)> =
        vmas.map(|(s, e, down)| (if down { s.saturating_sub(STACK_ROOM) } else { s }, e)).collect();
    taken.sort_unstable();
    let mut at = LOWEST;
    for (start, end) in taken {
        if start >= at + bytes + 2 * PAGE {
            break;
        }
        at = at.max(end + PAGE);
    }
    let start = at + PAGE;
    (start + bytes < ckpt_sys::arch::TASK_SIZE - STACK_ROOM).then_some(start)
}

/// A page of a process in /proc/pid/pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry(pub u64);

impl PageEntry {
    /// In memory or in swap.
    pub fn exists(self) -> bool {
        self.0 & (3 << 62) != 0
    }

    /// A page of a file or of shared memory, not a private copy.
    pub fn is_file(self) -> bool {
        self.0 & (1 << 61) != 0
    }
}

/// Reads the entries of `[start, end)`.
///
/// # Errors
/// What reading gives.
pub fn pagemap(file: &std::fs::File, start: u64, end: u64) -> std::io::Result<Vec<PageEntry>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0u8; ((end - start) / PAGE * 8) as usize];
    file.read_exact_at(&mut bytes, start / PAGE * 8)?;
    Ok(bytes
        .chunks_exact(8)
        .map(|c| PageEntry(u64::from_le_bytes(c.try_into().unwrap_or_default())))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_lines_parse() {
        let v = parse_head("7f00-8f00 rw-s 00001000 fe:0a 1234    /a b (deleted)").unwrap();
        assert_eq!((v.start, v.end, v.offset, v.dev, v.ino), (0x7f00, 0x8f00, 0x1000, (0xfe, 0xa), 1234));
        assert_eq!((v.name.as_str(), v.deleted, v.shared, v.prot), ("/a b", true, true, 3));
    }

    #[test]
    fn own_smaps_have_flags() {
        let v = read_smaps(std::process::id() as i32).unwrap();
        assert!(v.iter().all(|v| v.has("rd") == (v.prot & libc::PROT_READ != 0)));
        assert!(v.iter().any(|v| v.name == "[vdso]"));
    }

    #[test]
    fn holes_are_clear() {
        let taken =
            [(0x10_0000_0000u64, 0x10_0010_0000u64, false), (0x10_0020_0000, 0x7fff_0000_0000, false)];
        assert_eq!(hole(taken.into_iter(), 0x1000), Some(0x10_0010_2000));
        assert!(hole([(0, ckpt_sys::arch::TASK_SIZE, false)].into_iter(), 4096).is_none());
    }
}
