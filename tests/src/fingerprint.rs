// SPDX-License-Identifier: MIT OR Apache-2.0
//! A job's state as /proc shows it: what must be the same before and after a dump that left the job running.
//!
//! Taken of all descendants of the job's pid 1 (pid 1 itself is ckpt's own and opens what it needs): mappings,
//! descriptors with flags and position, whether they are dumpable, threads with their signal sets, the tracer, namespaces, mounts, and the number of
//! processes. Counters (times, faults, sizes) are left out. What cannot be read is recorded with its error, so it
//! compares as well.

use std::{collections::BTreeMap, fmt::Write, fs, os::unix::fs::MetadataExt, path::Path};

use crate::process::HostProcess;

/// The fields of /proc/PID/task/TID/status that are state and not counters.
const STATUS_FIELDS: &[&str] = &[
    "Name",
    "Umask",
    "Tgid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "FDSize",
    "Groups",
    "NSpid",
    "NSpgid",
    "NSsid",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Cpus_allowed",
];
const NAMESPACES: &[&str] =
    &["cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children", "user", "uts"];

/// A comparable picture of a job: a section (such as `pid 12 (guest) maps`) and its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    sections: BTreeMap<String, Vec<String>>,
}

fn lines_of(path: &Path) -> Vec<String> {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).lines().map(String::from).collect(),
        Err(error) => vec![format!("unreadable: {error}")],
    }
}

fn names_in(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = match fs::read_dir(path) {
        Ok(entries) => {
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        }
        Err(error) => return vec![format!("unreadable: {error}")],
    };
    names.sort();
    names
}

fn link(path: &Path) -> String {
    match fs::read_link(path) {
        Ok(target) => target.to_string_lossy().into_owned(),
        Err(error) => format!("unreadable: {error}"),
    }
}

impl Fingerprint {
    /// Of all descendants of `init` now.
    pub fn take(init: HostProcess) -> Fingerprint {
        let mut sections = BTreeMap::new();
        let tree = init.tree();
        sections.insert("job".to_owned(), vec![format!("processes: {}", tree.len())]);
        let init_status = lines_of(Path::new(&format!("/proc/{}/status", init.pid)));
        let tracer = init_status.into_iter().filter(|line| line.starts_with("TracerPid")).collect();
        sections.insert("pid 1".to_owned(), tracer);
        for process in &tree[1..] {
            Self::add_process(&mut sections, process.pid);
        }
        Fingerprint { sections }
    }

    fn add_process(sections: &mut BTreeMap<String, Vec<String>>, pid: i32) {
        let proc = Path::new("/proc").join(pid.to_string());
        let name = lines_of(&proc.join("comm")).join(" ");
        let mut add = |what: &str, lines: Vec<String>| {
            sections.insert(format!("host pid {pid} ({name}) {what}"), lines);
        };
        add("maps", lines_of(&proc.join("maps")));
        add("mountinfo", lines_of(&proc.join("mountinfo")));
        add(
            "paths",
            ["exe", "cwd", "root"].map(|name| format!("{name} -> {}", link(&proc.join(name)))).to_vec(),
        );
        let namespaces =
            NAMESPACES.iter().map(|name| format!("{name} -> {}", link(&proc.join("ns").join(name))));
        add("namespaces", namespaces.collect());
        let descriptors = names_in(&proc.join("fd")).into_iter().map(|fd| {
            let info = lines_of(&proc.join("fdinfo").join(&fd));
            let kept = info.iter().filter(|line| {
                ["pos:", "flags:", "mnt_id:", "ino:", "tfd:", "eventfd-count:", "lock:"]
                    .iter()
                    .any(|prefix| line.starts_with(prefix))
            });
            let kept: Vec<String> =
                kept.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
            format!("{fd} -> {} [{}]", link(&proc.join("fd").join(&fd)), kept.join(", "))
        });
        add("descriptors", descriptors.collect());
        // Those of a process that is not dumpable belong to root.
        let owner = fs::metadata(proc.join("fd"))
            .map_or_else(|error| format!("unreadable: {error}"), |metadata| metadata.uid().to_string());
        add("owner of its descriptors in /proc", vec![owner]);
        for tid in names_in(&proc.join("task")) {
            let status = lines_of(&proc.join("task").join(&tid).join("status"));
            let kept = status
                .into_iter()
                .filter(|line| line.split_once(':').is_some_and(|(field, _)| STATUS_FIELDS.contains(&field)));
            add(&format!("thread {tid}"), kept.collect());
        }
    }

    /// The differences, one line each with its section; empty if there are none.
    pub fn diff(&self, later: &Fingerprint) -> String {
        let mut text = String::new();
        let nothing = Vec::new();
        let keys: std::collections::BTreeSet<&String> =
            self.sections.keys().chain(later.sections.keys()).collect();
        for key in keys {
            let before = self.sections.get(key).unwrap_or(&nothing);
            let after = later.sections.get(key).unwrap_or(&nothing);
            if before == after {
                continue;
            }
            let _ = writeln!(text, "{key}:");
            for (sign, lines, others) in [('-', before, after), ('+', after, before)] {
                for line in lines.iter().filter(|line| !others.contains(line)) {
                    let _ = writeln!(text, "  {sign} {line}");
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead, BufReader, Write},
        process::{Command, Stdio},
    };

    /// A child of a child that opens a descriptor on demand shows up with that descriptor and nothing else.
    #[test]
    fn shows_what_was_left_behind() {
        let mut shell = Command::new("sh")
            .args(["-c", "sh -c 'echo up; read x; exec 7</dev/null; echo open; read x'; true"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let mut to = shell.stdin.take().expect("a pipe");
        let mut from = BufReader::new(shell.stdout.take().expect("a pipe"));
        let mut hear = |word: &str| {
            let mut line = String::new();
            from.read_line(&mut line).expect("a line");
            assert_eq!(line.trim(), word);
        };
        hear("up");
        let init = HostProcess::find(shell.id() as i32).expect("the shell");
        let before = Fingerprint::take(init);
        assert_eq!(before.diff(&Fingerprint::take(init)), "");
        to.write_all(b"\n").expect("the shell reads");
        hear("open");
        let diff = before.diff(&Fingerprint::take(init));
        assert!(diff.contains("+ 7 -> /dev/null"), "{diff}");
        assert_eq!(diff.lines().count(), 2, "{diff}");
        drop(to);
        shell.wait().expect("the shell ends");
    }
}
