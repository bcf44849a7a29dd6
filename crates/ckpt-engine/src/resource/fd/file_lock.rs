// SPDX-License-Identifier: MIT OR Apache-2.0
//! File locks: flock(2), POSIX record locks and open file description locks (fcntl(2)).

use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::resource::{At, Collect, Resource, decode, nothing_to_do};
use crate::restore::build_tree::Build;
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::libc;

/// Version of [`FileLockRecord`].
pub const VERSION: u16 = 1;

/// How it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Family {
    /// flock(2), belongs to the open file description.
    Flock,
    /// fcntl F_SETLK, belongs to the process.
    Posix,
    /// fcntl F_OFD_SETLK, belongs to the open file description.
    Ofd,
}

/// A lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct FileLockRecord {
    /// A process that holds it.
    pub pid: i32,
    /// Its descriptor there.
    pub fd: i32,
    /// How it was taken.
    pub family: Family,
    /// Exclusive.
    pub write: bool,
    /// First byte.
    pub start: u64,
    /// Last byte; none: to the end of the file, wherever that is.
    pub end: Option<u64>,
}

/// The kind.
#[derive(Debug)]
pub struct FileLockResource;

/// A parsed `lock:` line: number: FAMILY ADVISORY MODE pid dev:ino start end.
fn parse(line: &str) -> Option<(Option<Family>, bool, u64, Option<u64>)> {
    let mut w = line.split_whitespace();
    let family = match w.nth(1)? {
        "FLOCK" => Some(Family::Flock),
        "POSIX" => Some(Family::Posix),
        "OFDLCK" => Some(Family::Ofd),
        _ => None,
    };
    let write = w.nth(1)? == "WRITE";
    let start = w.nth(2)?.parse().ok()?;
    let end = w.next()?;
    Some((family, write, start, if end == "EOF" { None } else { Some(end.parse().ok()?) }))
}

fn locks(info: &str) -> impl Iterator<Item = (Option<Family>, bool, u64, Option<u64>)> + '_ {
    info.lines().filter_map(|l| l.strip_prefix("lock:")).filter_map(parse)
}

impl Resource for FileLockResource {
    nothing_to_do! { claims, asks, content, create, connect, arm }

    fn kind(&self) -> Kind {
        Kind::FileLock
    }

    fn after(&self) -> &'static [Kind] {
        // Closing any descriptor of a file drops the process's POSIX locks on it.
        &[Kind::FdTable, Kind::MemoryMap, Kind::SharedObject]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for f in job.files.values() {
            if locks(&f.seen.info).any(|(family, ..)| family.is_none()) {
                refusals.fd(f.pid, f.fd, format!("lease on {}", f.seen.target), "not supported");
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        let mut posix = Vec::new();
        let mut n = 0;
        for (number, info) in &p.locks {
            let found = p.descriptors.iter().find(|d| d.number == *number);
            let Some((d, f)) = found.and_then(|d| Some((d, cx.job.files.get(&d.file)?))) else { continue };
            if f.seen.stat.format() != libc::S_IFREG && f.seen.stat.format() != libc::S_IFDIR {
                continue;
            }
            for (family, write, start, end) in locks(info) {
                let Some(family) = family else { continue };
                // Each once: locks of a description with its first holder, those of a process with its first descriptor.
                let first = match family {
                    Family::Posix => {
                        let key = (f.seen.stat.dev, f.seen.stat.ino, start, end);
                        let new = !posix.contains(&key);
                        posix.push(key);
                        new
                    }
                    _ => (f.pid, f.fd) == (p.pid, d.number),
                };
                if first {
                    let record = FileLockRecord { pid: p.pid, fd: d.number, family, write, start, end };
                    cx.put(Kind::FileLock, VERSION, p.pid as u64, n, &record)?;
                    n += 1;
                }
            }
        }
        Ok(())
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let l: FileLockRecord = decode(record, VERSION)?;
        let mode = if l.write { "write" } else { "read" };
        let end = l.end.map_or("the end".to_owned(), |e| e.to_string());
        Ok(format!("{:?} {mode} lock through fd {} from {} to {end}", l.family, l.fd, l.start))
    }

    fn finish(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        const F_OFD_SETLK: u64 = 37;
        let l: FileLockRecord = decode(record, VERSION)?;
        let fd = l.fd as u64;
        cx.run(l.pid, |b| {
            if l.family == Family::Flock {
                let mode = libc::LOCK_NB | if l.write { libc::LOCK_EX } else { libc::LOCK_SH };
                b.call(
                    format!("flock of fd {fd} (does somebody else hold it?)"),
                    libc::SYS_flock,
                    &[fd, mode as u64],
                );
                return;
            }
            // struct flock: type and whence, start, length, pid.
            let kind = if l.write { libc::F_WRLCK } else { libc::F_RDLCK };
            let length = l.end.map_or(0, |e| e.wrapping_sub(l.start).wrapping_add(1));
            let at = b.words(&[kind as u64, l.start, length, 0]);
            let command = if l.family == Family::Ofd { F_OFD_SETLK } else { libc::F_SETLK as u64 };
            b.call(
                format!("fcntl lock of fd {fd} (does somebody else hold it?)"),
                libc::SYS_fcntl,
                &[fd, command, at],
            );
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_parse() {
        let info = "pos:\t0\nlock:\t1: POSIX  ADVISORY  WRITE 1234 fe:00:5678 0 EOF\nlock:\t2: FLOCK  ADVISORY  READ 9 00:01:2 3 4\n";
        let v: Vec<_> = locks(info).collect();
        assert_eq!(v[0], (Some(Family::Posix), true, 0, None));
        assert_eq!(v[1], (Some(Family::Flock), false, 3, Some(4)));
        assert_eq!(parse("1: LEASE  ACTIVE  WRITE 1 0:0:1 0 EOF").unwrap().0, None);
    }
}
