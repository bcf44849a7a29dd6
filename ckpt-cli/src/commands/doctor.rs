// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt doctor`: what this host allows, what is missing, and what would allow it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use ckpt_job::namespaces::user_namespace_obstacles;
use ckpt_job::probe::{HostProbe, probe_host};
use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;
use nix::unistd::{AccessFlags, access};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::commands::run::find_interceptor;
use crate::commands::store_directory;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// How much of ckpt works here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Level {
    #[serde(rename = "full")]
    Full,
    #[serde(rename = "no fresh /proc")]
    NoFreshProc,
    #[serde(rename = "no user namespaces")]
    NoUserNamespaces,
}

impl Level {
    fn text(self) -> &'static str {
        match self {
            Level::Full => "full: jobs run, can be dumped, and can be restored here",
            Level::NoFreshProc => {
                "no fresh /proc: jobs run and can be dumped; restore them elsewhere or as root"
            }
            Level::NoUserNamespaces => "no user namespaces: jobs need root here",
        }
    }
}

/// One thing looked at.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    /// A fixed name, for scripts.
    name: &'static str,
    /// `true`: as it should be. `false`: something does not work because of it. `null`: works, but less well.
    ok: Option<bool>,
    /// What was found.
    detail: String,
    /// What would change it.
    remedies: Vec<String>,
}

impl Finding {
    fn good(name: &'static str, detail: impl Into<String>) -> Finding {
        Finding { name, ok: Some(true), detail: detail.into(), remedies: Vec::new() }
    }

    fn lacking(name: &'static str, detail: impl Into<String>, remedies: Vec<String>) -> Finding {
        Finding { name, ok: None, detail: detail.into(), remedies }
    }

    fn bad(name: &'static str, detail: impl Into<String>, remedies: Vec<String>) -> Finding {
        Finding { name, ok: Some(false), detail: detail.into(), remedies }
    }
}

#[derive(Debug, Serialize)]
struct Diagnosis {
    level: Level,
    kernel: String,
    findings: Vec<Finding>,
}

/// Runs the command.
pub fn run(args: &DoctorArgs, report: &Report) -> Result<ExitCode> {
    let probe = probe_host()?;
    let level = if probe.namespaces_error.is_some() {
        Level::NoUserNamespaces
    } else if !probe.fresh_proc {
        Level::NoFreshProc
    } else {
        Level::Full
    };
    let mut findings = vec![kernel_finding()];
    findings.extend(namespace_findings(&probe));
    findings.extend([
        tracing_finding(),
        userfaultfd_finding(),
        module_finding(),
        engine_finding(),
        interceptor_finding(),
    ]);
    findings.push(store_finding(&store_directory(&args.store)?));
    findings.push(logout_finding(&Session::of_this_process()));
    let diagnosis = Diagnosis { level, kernel: kernel_release(), findings };
    if args.json {
        report.print_json(&diagnosis)?;
    } else {
        report.print(&for_people(&diagnosis));
    }
    let all_work = diagnosis.findings.iter().all(|finding| finding.ok != Some(false));
    Ok(if level == Level::Full && all_work { ExitCode::SUCCESS } else { ExitCode::HOST_CANNOT })
}

fn for_people(diagnosis: &Diagnosis) -> String {
    let mut lines = vec![format!("Level: {}", diagnosis.level.text()), String::new()];
    for finding in &diagnosis.findings {
        let mark = match finding.ok {
            Some(true) => "ok  ",
            None => "less",
            Some(false) => "NO  ",
        };
        lines.push(format!("{mark} {}: {}", finding.name, finding.detail));
        lines.extend(finding.remedies.iter().map(|remedy| format!("       -> {remedy}")));
    }
    lines.join("\n")
}

fn kernel_release() -> String {
    uname().map_or_else(
        |errno| format!("unknown ({errno})"),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

fn kernel_finding() -> Finding {
    let release = kernel_release();
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|text| text.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 1) {
        Finding::good("kernel", format!("Linux {release}"))
    } else {
        let remedy = "ckpt is made for Linux 6.1 and newer".to_owned();
        Finding::lacking("kernel", format!("Linux {release}"), vec![remedy])
    }
}

fn namespace_findings(probe: &HostProbe) -> Vec<Finding> {
    let what = if probe.user_namespace { "as a plain user, in a user namespace" } else { "as root" };
    if let Some(error) = &probe.namespaces_error {
        let mut remedies = user_namespace_obstacles();
        if remedies.is_empty() {
            remedies.push(
                "nothing known was found in the way; run as root, or ask who runs this host".to_owned(),
            );
        }
        // The error repeats the obstacles below its first line.
        return vec![Finding::bad("namespaces", error.lines().next().unwrap_or_default(), remedies)];
    }
    let mut findings = vec![Finding::good("namespaces", format!("can be made {what}"))];
    findings.push(match &probe.mounts_error {
        None => Finding::good("mounts", "a job gets its own /dev/shm, /dev/mqueue and /dev/pts"),
        Some(error) => Finding::bad("mounts", error, Vec::new()),
    });
    findings.push(if probe.fresh_proc {
        Finding::good("fresh /proc", "can be mounted")
    } else {
        let covers = proc_covers();
        let detail =
            format!("forbidden, because something is mounted over parts of /proc: {}", covers.join(", "));
        let remedies = vec![
            "in a container: start it with an uncovered /proc (docker: --security-opt systempaths=unconfined)"
                .to_owned(),
            "or run ckpt as root".to_owned(),
        ];
        Finding::bad("fresh /proc", detail, remedies)
    });
    findings.push(match &probe.chosen_pid_error {
        None => Finding::good("old process ids", "can be given again (clone3 with set_tid)"),
        Some(error) => Finding::bad(
            "old process ids",
            format!("cannot be given again: clone3 with set_tid: {error}"),
            vec!["allow clone3 where a seccomp filter forbids it".to_owned()],
        ),
    });
    findings.push(match &probe.clocks_error {
        None => Finding::good("clocks", "can go on from where they were (time namespaces)"),
        Some(error) => Finding::bad(
            "clocks",
            error.lines().next().unwrap_or_default(),
            vec!["a kernel with CONFIG_TIME_NS".to_owned()],
        ),
    });
    findings
}

/// What is mounted below /proc.
fn proc_covers() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    points.filter(|point| point.starts_with("/proc/")).map(str::to_owned).collect()
}

fn tracing_finding() -> Finding {
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    match scope.as_deref().map(str::trim) {
        Some("3") => Finding::bad(
            "tracing",
            "forbidden for everyone (Yama ptrace_scope 3): nothing can be dumped or restored",
            vec!["boot with kernel.yama.ptrace_scope below 3; it cannot be lowered at run time".to_owned()],
        ),
        Some(scope) => Finding::good("tracing", format!("allowed for jobs (Yama ptrace_scope {scope})")),
        None => Finding::good("tracing", "allowed (no Yama)"),
    }
}

fn userfaultfd_finding() -> Finding {
    if ckpt_sys::probe::userfaultfd(true).is_ok() {
        return Finding::good("userfaultfd", "full");
    }
    match ckpt_sys::probe::userfaultfd(false) {
        Ok(_) => Finding::good("userfaultfd", "for faults in user mode"),
        Err(error) => Finding::lacking(
            "userfaultfd",
            format!("{error}; this ckpt does not need it"),
            vec!["a kernel with CONFIG_USERFAULTFD, and a seccomp filter that allows it".to_owned()],
        ),
    }
}

fn module_finding() -> Finding {
    match ckpt_engine::snapshot::kmod::host_obstacle() {
        None => Finding::good("kernel module", "/dev/ckpt keeps memory for `ckpt dump`"),
        Some(why) if !std::path::Path::new("/dev/ckpt").exists() => {
            Finding::good("kernel module", format!("{why}; everything works without it"))
        }
        Some(why) => Finding::lacking(
            "kernel module",
            format!("{why}; everything works without it"),
            vec!["add this user to the group ckpt, or load the module that belongs to this ckpt".to_owned()],
        ),
    }
}

/// How memory is kept while it is written.
fn engine_finding() -> Finding {
    if ckpt_engine::snapshot::kmod::host_obstacle().is_none() {
        return Finding::good(
            "snapshot engine",
            "kmod: a job goes on while its memory is written; what the module refuses is forked or copied",
        );
    }
    match ckpt_engine::snapshot::cow::host_obstacle() {
        None => Finding::good(
            "snapshot engine",
            "cow: a job goes on while its memory is written; `ckpt dump` says which processes could not be forked",
        ),
        Some(why) => Finding::lacking(
            "snapshot engine",
            format!("copy: a job stands still while its memory is copied. Not cow: {why}"),
            vec!["sysctl vm.overcommit_memory=0".to_owned()],
        ),
    }
}

fn interceptor_finding() -> Finding {
    match find_interceptor() {
        Some(path) => Finding::good("interceptor", path.display().to_string()),
        None => Finding::lacking(
            "interceptor",
            "libckpt_interceptor.so was not found; dumps work without it",
            vec!["put it beside the ckpt program, or into ../lib/ckpt".to_owned()],
        ),
    }
}

fn store_finding(store: &Path) -> Finding {
    // It is made by the first dump; until then the directory it will be made in counts.
    let existing: PathBuf = store.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned();
    let free = statvfs(&existing).map_or(0, |status| status.blocks_available() * status.fragment_size());
    let free_gib = free as f64 / f64::from(1 << 30);
    match access(&existing, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => Finding::good("store", format!("{}: writable, {free_gib:.1} GiB free", store.display())),
        Err(errno) => Finding::bad(
            "store",
            format!("{}: {}: {errno}", store.display(), existing.display()),
            vec!["choose another with --store DIR or CKPT_STORE".to_owned()],
        ),
    }
}

/// What decides about this process's children when its user logs out.
#[derive(Clone, Debug, Default)]
struct Session {
    /// In the scope of a login session.
    in_session: bool,
    /// logind ends such processes with the session.
    ends_processes: bool,
    /// The user's manager and runtime directory stay after the last logout.
    lingers: bool,
    /// The registry is in a directory that goes with the last logout.
    runtime_directory: bool,
    user: String,
}

impl Session {
    fn of_this_process() -> Session {
        let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let uid = nix::unistd::geteuid();
        let user =
            nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").unwrap_or_default();
        Session {
            in_session: is_session_scope(&cgroup),
            // Root is spared by default (KillExcludeUsers).
            ends_processes: !uid.is_root() && ends_processes(&logind_settings()),
            lingers: Path::new("/var/lib/systemd/linger").join(&user).exists(),
            runtime_directory: Path::new(&runtime).starts_with("/run/user"),
            user,
        }
    }
}

/// Whether a process with this /proc/pid/cgroup is in the scope of a login session.
fn is_session_scope(cgroup: &str) -> bool {
    cgroup.lines().any(|line| {
        let last = line.rsplit('/').next().unwrap_or_default();
        last.starts_with("session-") && last.ends_with(".scope")
    })
}

/// logind's settings, those that count most last (logind.conf(5)).
fn logind_settings() -> String {
    let mut text = String::new();
    for root in ["/usr/lib/systemd", "/run/systemd", "/etc/systemd"] {
        text.push_str(&fs::read_to_string(format!("{root}/logind.conf")).unwrap_or_default());
        text.push('\n');
    }
    let mut files: Vec<PathBuf> = ["/usr/lib/systemd", "/run/systemd", "/etc/systemd"]
        .iter()
        .flat_map(|root| fs::read_dir(format!("{root}/logind.conf.d")).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "conf"))
        .collect();
    // By name, whatever directory they are in.
    files.sort_by_key(|path| path.file_name().map(ToOwned::to_owned));
    for file in files {
        text.push_str(&fs::read_to_string(file).unwrap_or_default());
        text.push('\n');
    }
    text
}

fn ends_processes(settings: &str) -> bool {
    let mut values = settings.lines().filter_map(|line| line.trim().strip_prefix("KillUserProcesses="));
    values.next_back().is_some_and(|value| matches!(value.trim(), "yes" | "true" | "1" | "on"))
}

fn logout_finding(session: &Session) -> Finding {
    const NAME: &str = "logout";
    let linger = format!("loginctl enable-linger {}", session.user);
    if session.in_session && session.ends_processes {
        return Finding::lacking(
            NAME,
            "detached jobs end when you log out (logind's KillUserProcesses=yes)",
            vec![
                format!(
                    "start them outside the session: {linger}, then systemd-run --user --scope ckpt run …"
                ),
                "or as a service: see examples/systemd".to_owned(),
            ],
        );
    }
    if session.in_session && session.runtime_directory && !session.lingers {
        return Finding::lacking(
            NAME,
            "detached jobs go on when you log out, but ckpt does not find them any more: \
             their registry is in XDG_RUNTIME_DIR, which is removed then",
            vec![linger],
        );
    }
    Finding::good(NAME, "detached jobs go on")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_at_a_logout() {
        let session = Session {
            in_session: true,
            runtime_directory: true,
            user: "me".to_owned(),
            ..Session::default()
        };
        let found = logout_finding(&session);
        assert_eq!(
            (found.ok, found.remedies.as_slice()),
            (None, &["loginctl enable-linger me".to_owned()][..])
        );
        assert_eq!(logout_finding(&Session { lingers: true, ..session.clone() }).ok, Some(true));
        let killed = logout_finding(&Session { lingers: true, ends_processes: true, ..session.clone() });
        assert!(killed.ok.is_none() && killed.detail.contains("KillUserProcesses"));
        assert_eq!(
            logout_finding(&Session { in_session: false, ends_processes: true, ..session }).ok,
            Some(true)
        );
    }

    #[test]
    fn settings_of_logind() {
        assert!(!ends_processes(""));
        assert!(!ends_processes("[Login]\n#KillUserProcesses=yes\n"));
        assert!(ends_processes("KillUserProcesses=no\n[Login]\nKillUserProcesses=yes"));
        assert!(!ends_processes("KillUserProcesses=yes\nKillUserProcesses=no\n"));
        assert!(is_session_scope("0::/user.slice/user-1000.slice/session-3.scope\n"));
        assert!(!is_session_scope("0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope\n"));
    }
}
