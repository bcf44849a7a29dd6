// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the memory limits of a process's control groups leave (cgroups(7); memory.max and memory.high of version 2,
//! memory.limit_in_bytes of version 1).

use ckpt_sys::Pid;
use std::path::{Path, PathBuf};

/// The limited groups that a process is in, innermost first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits(Vec<(PathBuf, Version)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The tightest of the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The group's directory.
    pub group: PathBuf,
    /// Bytes up to the limit, file pages that can be dropped counted as free.
    pub free_bytes: u64,
    /// Bytes that are left alone for the job to grow into.
    pub reserve_bytes: u64,
}

impl Limits {
    /// Those of a process. None where no control groups are to be seen.
    pub fn of(host: Pid) -> Limits {
        let groups = std::fs::read_to_string(format!("/proc/{host}/cgroup")).unwrap_or_default();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut limits = Limits(Vec::new());
        for (mount, dir, version) in directories(&groups, &mounts) {
            let files = match version {
                Version::One => &["memory.limit_in_bytes"][..],
                Version::Two => &["memory.max", "memory.high"],
            };
            let within = dir.ancestors().take_while(|d| d.starts_with(&mount));
            let limited = within.filter(|d| files.iter().any(|f| number(&d.join(f)).is_some()));
            limits.0.extend(limited.map(|d| (d.to_owned(), version)));
        }
        limits
    }

    /// What the tightest of them leaves now; none if nothing limits.
    pub fn room(&self) -> Option<Room> {
        self.0.iter().filter_map(|(dir, version)| room_in(dir, *version)).min_by_key(|r| r.free_bytes)
    }
}

/// A limit; none for "max" and for version 1's way to say it.
fn number(path: &Path) -> Option<u64> {
    let n = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
    (n < 1 << 62).then_some(n)
}

fn room_in(dir: &Path, version: Version) -> Option<Room> {
    let (limit, used, cache) = match version {
        Version::One => (
            number(&dir.join("memory.limit_in_bytes"))?,
            number(&dir.join("memory.usage_in_bytes"))?,
            ["total_inactive_file ", "total_active_file "],
        ),
        Version::Two => {
            let limits = ["memory.max", "memory.high"].map(|f| number(&dir.join(f)));
            let limit = limits.into_iter().flatten().min()?;
            (limit, number(&dir.join("memory.current"))?, ["inactive_file ", "active_file "])
        }
    };
    let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let value = |name: &str| stat.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok());
    let cached: u64 = cache.iter().filter_map(|n| value(n)).sum();
    Some(Room {
        group: dir.to_owned(),
        free_bytes: limit.saturating_sub(used.saturating_sub(cached)),
        reserve_bytes: (limit / 16).clamp(4 << 20, 64 << 20),
    })
}

/// Mount point and directory of the groups that account for memory: /proc/pid/cgroup, /proc/pid/mountinfo.
fn directories(groups: &str, mounts: &str) -> Vec<(PathBuf, PathBuf, Version)> {
    let mut out = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let version = match id {
            "0" => Version::Two,
            _ if controllers.split(',').any(|c| c == "memory") => Version::One,
            _ => continue,
        };
        for mount in mounts.lines() {
            let Some((left, right)) = mount.split_once(" - ") else { continue };
            let mut right = right.split(' ');
            let (kind, options) = (right.next().unwrap_or(""), right.nth(1).unwrap_or(""));
            let fits = match version {
                Version::One => kind == "cgroup" && options.split(',').any(|o| o == "memory"),
                Version::Two => kind == "cgroup2",
            };
            let mut left = left.split(' ').skip(3);
            let (Some(root), Some(point), true) = (left.next(), left.next(), fits) else { continue };
            let inner = Path::new(path).strip_prefix(root).unwrap_or(Path::new(path));
            let inner = inner.strip_prefix("/").unwrap_or(inner);
            out.push((PathBuf::from(point), Path::new(point).join(inner), version));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_both_versions() {
        let groups = "9:cpu,cpuacct:/x\n4:memory:/jobs/a\n0::/jobs/b\n";
        let mounts = "30 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      35 31 0:32 /jobs /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let one = PathBuf::from("/sys/fs/cgroup/memory");
        let two = PathBuf::from("/sys/fs/cgroup/unified");
        assert_eq!(
            directories(groups, mounts),
            [(one.clone(), one.join("a"), Version::One), (two.clone(), two.join("jobs/b"), Version::Two)]
        );
    }

    #[test]
    fn room_counts_file_pages_as_free() {
        let dir = std::env::temp_dir().join(format!("ckpt-limit-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.high", "max\n");
        write("memory.current", "900000000\n");
        write("memory.stat", "anon 1\ninactive_file 100000000\nactive_file 50000000\n");
        assert_eq!(room_in(&dir, Version::Two), None);
        write("memory.max", "1000000000\n");
        assert_eq!(room_in(&dir, Version::Two).unwrap().free_bytes, 250_000_000);
        write("memory.high", "950000000\n");
        assert_eq!(room_in(&dir, Version::Two).unwrap().free_bytes, 200_000_000);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
