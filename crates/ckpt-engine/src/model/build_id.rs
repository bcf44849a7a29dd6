// SPDX-License-Identifier: MIT OR Apache-2.0
//! The GNU build-id of an ELF file (elf(5), note NT_GNU_BUILD_ID): two files with the same one came out of one link.
//!
//! Read from the notes that the program headers name, of 64-bit little-endian files; few bytes of the file are looked
//! at. Any file may be given: one that isn't ELF, or whose headers make no sense, has none.

use super::Job;
use super::file::FileStat;
use crate::resource::shared_object::is_memory_object;
use ckpt_sys::libc;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Most program headers looked at; the linkers write about a dozen.
const MAX_HEADERS: u16 = 128;
/// Most bytes of a note segment looked at.
const MAX_NOTES_BYTES: u64 = 64 << 10;
/// Longest build-id; the linkers write 8 to 32 bytes.
const MAX_ID_BYTES: usize = 64;

const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(b.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(b.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(b.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// The build-id of the file that `read` fills buffers from, at offsets; it says whether it could.
fn parse(read: impl Fn(u64, &mut [u8]) -> bool) -> Option<Vec<u8>> {
    const HEADER_BYTES: usize = 64;
    const ENTRY_BYTES: usize = 56;
    let mut header = [0u8; HEADER_BYTES];
    // Magic, ELFCLASS64, ELFDATA2LSB.
    if !read(0, &mut header) || !header.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, entry_bytes, count) =
        (u64_at(&header, 32)?, u16_at(&header, 54)?, u16_at(&header, 56)?.min(MAX_HEADERS));
    if usize::from(entry_bytes) != ENTRY_BYTES {
        return None;
    }
    for i in 0..u64::from(count) {
        let mut entry = [0u8; ENTRY_BYTES];
        if !read(table.checked_add(i * ENTRY_BYTES as u64)?, &mut entry) {
            return None;
        }
        if u32_at(&entry, 0)? != PT_NOTE {
            continue;
        }
        let (offset, bytes, align) = (u64_at(&entry, 8)?, u64_at(&entry, 32)?, u64_at(&entry, 48)?);
        if bytes > MAX_NOTES_BYTES {
            continue;
        }
        let mut notes = vec![0u8; bytes as usize];
        if read(offset, &mut notes)
            && let Some(id) = find_note(&notes, if align == 8 { 8 } else { 4 })
        {
            return Some(id);
        }
    }
    None
}

/// Looks through a note segment: header of three words, name and descriptor, each padded to `align`.
fn find_note(notes: &[u8], align: usize) -> Option<Vec<u8>> {
    let mut at = 0usize;
    loop {
        let (name_bytes, id_bytes) = (u32_at(notes, at)? as usize, u32_at(notes, at + 4)? as usize);
        let kind = u32_at(notes, at + 8)?;
        let name_at = at + 12;
        let name = notes.get(name_at..name_at.checked_add(name_bytes)?)?;
        let id_at = (name_at + name_bytes).checked_next_multiple_of(align)?;
        let id = notes.get(id_at..id_at.checked_add(id_bytes)?)?;
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" && (1..=MAX_ID_BYTES).contains(&id.len()) {
            return Some(id.to_vec());
        }
        at = (id_at + id_bytes).checked_next_multiple_of(align)?;
    }
}

/// The build-id of the file at `path`, if that is the one that `stat` describes; none if it has none or can't be read.
pub fn of_file(path: &Path, stat: &FileStat) -> Option<Vec<u8>> {
    // Opening anything else may have effects.
    if stat.format() != libc::S_IFREG {
        return None;
    }
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
    if FileStat::of(&file.metadata().ok()?) != *stat {
        return None;
    }
    parse(|at, buf| file.read_exact_at(buf, at).is_ok())
}

/// In hexadecimal digits, as `file` and `readelf -n` print it.
pub fn hex(id: &[u8]) -> String {
    id.iter().map(|b| format!("{b:02x}")).collect()
}

/// Build-ids of mapped files, read while the job runs: what has not changed need not be read when it is frozen.
#[derive(Debug, Default, Clone)]
pub struct BuildIds(std::rc::Rc<HashMap<Version, Option<Vec<u8>>>>);

/// Device, inode, size, time of change of content and of anything.
type Version = (u64, u64, u64, i64, i64);

fn version(s: &FileStat) -> Version {
    (s.dev, s.ino, s.size, s.mtime_ns, s.ctime_ns)
}

impl BuildIds {
    /// Of all files that the job has mapped by name.
    pub fn of_job(job: &Job) -> BuildIds {
        let mut out = HashMap::new();
        let mut names: Vec<&str> = job
            .live()
            .flat_map(|p| &p.vmas)
            .filter(|v| v.is_file() && !is_memory_object(v))
            .map(|v| v.name.as_str())
            .collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let path = job.outside(name);
            if let Ok(m) = std::fs::metadata(&path) {
                let stat = FileStat::of(&m);
                out.entry(version(&stat)).or_insert_with(|| of_file(path.as_ref(), &stat));
            }
        }
        BuildIds(out.into())
    }

    /// That of the file at `path`, which `stat` describes.
    pub fn get(&self, path: &Path, stat: &FileStat) -> Option<Vec<u8>> {
        match self.0.get(&version(stat)) {
            Some(id) => id.clone(),
            // Mapped, or changed, since.
            None => of_file(path, stat),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_bytes(bytes: &[u8]) -> Option<Vec<u8>> {
        parse(|at, buf| {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            match at.checked_add(buf.len()).and_then(|end| bytes.get(at..end)) {
                Some(found) => {
                    buf.copy_from_slice(found);
                    true
                }
                None => false,
            }
        })
    }

    fn note(align: usize, kind: u32, name: &[u8], descriptor: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for n in [name.len() as u32, descriptor.len() as u32, kind] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        for part in [name, descriptor] {
            out.extend_from_slice(part);
            out.resize(out.len().next_multiple_of(align), 0);
        }
        out
    }

    fn elf(segments: &[(u32, u64, Vec<u8>)]) -> Vec<u8> {
        let mut out = vec![0u8; 64];
        out[..6].copy_from_slice(b"\x7fELF\x02\x01");
        out[32..40].copy_from_slice(&64u64.to_le_bytes());
        out[54..56].copy_from_slice(&56u16.to_le_bytes());
        out[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        let mut at = 64 + 56 * segments.len() as u64;
        for (kind, align, bytes) in segments {
            let mut entry = [0u8; 56];
            entry[..4].copy_from_slice(&kind.to_le_bytes());
            entry[8..16].copy_from_slice(&at.to_le_bytes());
            entry[32..40].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            entry[48..56].copy_from_slice(&align.to_le_bytes());
            out.extend_from_slice(&entry);
            at += bytes.len() as u64;
        }
        segments.iter().for_each(|(_, _, bytes)| out.extend_from_slice(bytes));
        out
    }

    fn sample() -> Vec<u8> {
        let notes = [note(4, 1, b"GNU\0", &[9; 16]), note(4, NT_GNU_BUILD_ID, b"GNU\0", &[7; 20])].concat();
        elf(&[(1, 4096, vec![1; 30]), (PT_NOTE, 8, note(8, 5, b"GNU\0", &[3; 10])), (PT_NOTE, 4, notes)])
    }

    #[test]
    fn finds_it_among_other_notes() {
        assert_eq!(of_bytes(&sample()), Some(vec![7; 20]));
        assert_eq!(hex(&[0, 0xab]), "00ab");
        let eight = note(8, NT_GNU_BUILD_ID, b"GNU\0", &[5; 20]);
        assert_eq!(of_bytes(&elf(&[(PT_NOTE, 8, eight)])), Some(vec![5; 20]));
    }

    #[test]
    fn what_is_no_elf_has_none() {
        let other = note(4, NT_GNU_BUILD_ID, b"Go\0\0", &[7; 20]);
        assert_eq!(of_bytes(&elf(&[(PT_NOTE, 4, other)])), None);
        assert_eq!(of_bytes(b"#!/bin/sh\n"), None);
        assert_eq!(of_bytes(&[]), None);
        let mut narrow = sample();
        narrow[4] = 1;
        assert_eq!(of_bytes(&narrow), None);
    }

    #[test]
    fn damaged_files_are_no_danger() {
        let whole = sample();
        for length in 0..whole.len() {
            assert_eq!(of_bytes(&whole[..length]), None, "cut to {length}");
        }
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                of_bytes(&bytes);
                let end = bytes.len().min(at + 8);
                bytes[at..end].fill(value);
                of_bytes(&bytes);
            }
        }
    }

    #[test]
    fn own_executable_has_the_one_that_its_notes_in_memory_show() {
        let path = Path::new("/proc/self/exe");
        let stat = FileStat::of(&std::fs::metadata(path).unwrap());
        let id = of_file(path, &stat).expect("linkers write one");
        let bytes = std::fs::read(path).unwrap();
        let needle = note(4, NT_GNU_BUILD_ID, b"GNU\0", &id);
        assert!(bytes.windows(needle.len()).any(|w| w == needle));
        assert_eq!(of_file(path, &FileStat { size: 1, ..stat }), None, "another file");
        assert_eq!(
            of_file(Path::new("/dev/zero"), &FileStat::of(&std::fs::metadata("/dev/zero").unwrap())),
            None
        );
    }
}
