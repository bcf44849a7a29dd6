// SPDX-License-Identifier: MIT OR Apache-2.0
//! `launch` and `init_main` with works of the test's own: what a restore needs and `ckpt run` does not use.
//!
//! No test harness: this program is itself the init of the jobs it launches, and it must have one thread.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use ckpt_job::attachment::AttachmentEnd;
use ckpt_job::launch::LaunchEvent;
use ckpt_job::{
    ExitStatus, INIT_ARGUMENT, InitContext, JobName, Kept, LaunchError, LaunchSpec, Registry, StartError,
    StartErrorClass, Started, TimeTarget, WaitOutcome, Work, init_main, launch,
};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, pause};

fn main() {
    if std::env::args().nth(1).as_deref() == Some(INIT_ARGUMENT) {
        init_main(start);
    }
    if ckpt_job::probe::probe_host().unwrap().namespaces_error.is_some() {
        println!("SKIPPED: this host does not let this user start jobs; see ckpt doctor");
        return;
    }
    let scratch = PathBuf::from(format!("/tmp/ckpt-launch-test-{}", std::process::id()));
    fs::create_dir(&scratch).unwrap();
    type Test = fn(&LaunchSpec);
    let tests: [(&str, Test); 7] = [
        ("keeps", init_keeps_descriptors),
        ("context", names_clocks_and_descriptors_reach_the_job),
        ("failed-start", a_failed_start_is_told_with_its_class),
        ("failed-release", a_failed_release_ends_the_job),
        ("panic", a_panic_in_init_is_told),
        ("main-ended", a_main_process_that_ended_before),
        ("launcher-dies", the_launchers_death_before_the_commit_ends_all),
    ];
    for (name, test) in tests {
        // Each in a process of its own: launching leaves signals blocked.
        let pid = ckpt_sys::spawn::fork_child(|| {
            test(&spec(&scratch, name));
            0
        });
        match waitpid(Pid::from_raw(pid.unwrap()), None).unwrap() {
            WaitStatus::Exited(_, 0) => println!("test {name} ... ok"),
            other => {
                println!("test {name} ... FAILED ({other:?})");
                std::process::exit(1);
            }
        }
    }
    fs::remove_dir_all(&scratch).unwrap();
}

fn spec(scratch: &Path, test: &str) -> LaunchSpec {
    LaunchSpec {
        name: format!("launch-{}-{test}", std::process::id()).parse().unwrap(),
        store: scratch.to_owned(),
        work: Work::Restore(serde_json::json!({ "do": test })),
        tty: false,
        window: None,
        detach: false,
        interceptor: None,
        hostname: None,
        domainname: None,
        time: None,
        log: scratch.join("log"),
        restored_from: Some("a checkpoint".to_owned()),
        mergeable: false,
        restored_command: Vec::new(),
        with_files: false,
        tcp: None,
        supervised: None,
        by_supervisor: false,
    }
}

const DAY_NS: i64 = 86_400_000_000_000;

/// In init: the work that the payload names.
fn start(context: &mut InitContext) -> Result<Started, StartError> {
    let Work::Restore(payload) = context.spec.work.clone() else { panic!("no payload") };
    let child = |code: i32| ckpt_sys::spawn::fork_child(move || code).unwrap();
    let ready = |main_pid| Started {
        main_pid,
        main_exited: None,
        details: serde_json::Value::Null,
        fetching: None,
        release: Box::new(|| Ok(())),
    };
    match payload["do"].as_str().unwrap() {
        "context" => {
            context.progress.line("half way");
            context.progress.warning("look out");
            let days = |id| clock_gettime(id).unwrap().tv_sec() / 86_400;
            let mut report = File::from(context.passed.remove(0));
            assert!(report.as_raw_fd() >= 512, "{report:?}");
            write!(
                report,
                "{} {} {} {} {}",
                nix::unistd::gethostname().unwrap().to_str().unwrap(),
                fs::read_to_string("/proc/sys/kernel/domainname").unwrap().trim(),
                days(ClockId::CLOCK_MONOTONIC),
                days(ClockId::CLOCK_BOOTTIME),
                std::process::id(),
            )
            .unwrap();
            Ok(ready(child(3)))
        }
        "keeps" => Ok(ready(
            ckpt_sys::spawn::fork_child(|| {
                loop {
                    pause();
                }
            })
            .unwrap(),
        )),
        "failed-start" => {
            child(0);
            Err(StartError::new(StartErrorClass::Conflict, "port 80 is in use"))
        }
        "failed-release" => Ok(Started {
            release: Box::new(|| Err(StartError::new(StartErrorClass::Corrupt, "too late"))),
            ..ready(child(0))
        }),
        "panic" => panic!("as the test asked for"),
        "main-ended" => {
            child(1);
            Ok(Started { main_exited: Some(ExitStatus::Signalled(15)), ..ready(2) })
        }
        "launcher-dies" => {
            // A process that would live on, and a start that never ends by itself.
            let sleeper = ckpt_sys::spawn::fork_child(|| {
                loop {
                    pause();
                }
            });
            context.progress.line(&format!("started {}", sleeper.unwrap()));
            loop {
                pause();
            }
        }
        other => panic!("no work named {other}"),
    }
}

fn entry_exists(name: &JobName) -> bool {
    Registry::open().unwrap().entry(name).exists()
}

fn names_clocks_and_descriptors_reach_the_job(spec: &LaunchSpec) {
    let mut spec = spec.clone();
    spec.hostname = Some("elsewhere".into());
    spec.domainname = Some("a.domain".into());
    // Half a day on top, so that the time that passes does not matter.
    spec.time =
        Some(TimeTarget { monotonic_ns: 700 * DAY_NS + DAY_NS / 2, boottime_ns: 800 * DAY_NS + DAY_NS / 2 });
    let (mut read, write) = std::io::pipe().unwrap();
    let mut events = Vec::new();
    let job = launch(spec, vec![OwnedFd::from(write)], |event| events.push(event)).unwrap();
    let expected =
        [LaunchEvent::Progress("half way".to_owned()), LaunchEvent::Warning("look out".to_owned())];
    assert_eq!(events, expected);
    let mut report = String::new();
    read.read_to_string(&mut report).unwrap();
    assert_eq!(report, "elsewhere a.domain 700 800 1");
    assert_ne!(nix::unistd::gethostname().unwrap(), OsStr::new("elsewhere"));
    let end = ckpt_job::foreground(job, || {}).unwrap();
    assert_eq!(end, AttachmentEnd::Exited(WaitOutcome { status: ExitStatus::Exited(3), job_ended: true }));
}

/// Launches what fails to start; nothing may be left of it.
/// What a dumper leaves with init comes back to the next one, whole and once.
fn init_keeps_descriptors(spec: &LaunchSpec) {
    let name = spec.name.clone();
    let spec = LaunchSpec { detach: true, ..spec.clone() };
    launch(spec, Vec::new(), |_| ()).unwrap();
    assert!(ckpt_job::take(&name, false).unwrap().is_none());
    let (mut read, write) = std::io::pipe().unwrap();
    let write = OwnedFd::from(write);
    // More than fits into one message, of both.
    let descriptors = (0..450).map(|_| write.try_clone().unwrap()).collect();
    let note: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
    ckpt_job::keep(&name, &Kept { descriptors, note: note.clone() }).unwrap();
    let copy = ckpt_job::take(&name, true).unwrap().unwrap();
    assert_eq!((copy.descriptors.len(), copy.note == note), (450, true));
    drop(copy);
    let kept = ckpt_job::take(&name, false).unwrap().unwrap();
    assert_eq!((kept.descriptors.len(), kept.note == note), (450, true));
    assert!(ckpt_job::take(&name, true).unwrap().is_none());
    File::from(kept.descriptors[449].try_clone().unwrap()).write_all(b"x").unwrap();
    let mut byte = [0];
    assert_eq!(read.read(&mut byte).unwrap(), 1);
    // Nobody has one any more: init has given them away.
    drop((kept, write));
    assert_eq!(read.read(&mut byte).unwrap(), 0);
    // One that is replaced is closed.
    let (mut read, write) = std::io::pipe().unwrap();
    ckpt_job::keep(&name, &Kept { descriptors: vec![write.into()], note: Vec::new() }).unwrap();
    ckpt_job::keep(&name, &Kept::default()).unwrap();
    assert_eq!(read.read(&mut byte).unwrap(), 0);
    ckpt_job::kill(&name, 9, ckpt_abi::init_protocol::KillScope::Everything).unwrap();
}

fn failure(spec: &LaunchSpec) -> (StartErrorClass, String) {
    match launch(spec.clone(), Vec::new(), |_| ()) {
        Err(LaunchError::Start { class, message }) => {
            assert!(!entry_exists(&spec.name));
            (class, message)
        }
        other => panic!("{other:?}"),
    }
}

fn a_failed_start_is_told_with_its_class(spec: &LaunchSpec) {
    assert_eq!(failure(spec), (StartErrorClass::Conflict, "port 80 is in use".to_owned()));
}

fn a_failed_release_ends_the_job(spec: &LaunchSpec) {
    assert_eq!(failure(spec), (StartErrorClass::Corrupt, "too late".to_owned()));
}

fn a_panic_in_init_is_told(spec: &LaunchSpec) {
    let (class, message) = failure(spec);
    assert_eq!(class, StartErrorClass::Failure);
    assert!(message.contains("defect in the job's init"), "{message}");
    assert!(message.contains("as the test asked for"), "{message}");
}

fn a_main_process_that_ended_before(spec: &LaunchSpec) {
    let job = launch(spec.clone(), Vec::new(), |_| ()).unwrap();
    match ckpt_job::foreground(job, || {}).unwrap() {
        AttachmentEnd::Exited(outcome) => assert_eq!(outcome.status, ExitStatus::Signalled(15)),
        other => panic!("{other:?}"),
    }
}

/// As when a restore is killed half way: nothing may be left.
fn the_launchers_death_before_the_commit_ends_all(spec: &LaunchSpec) {
    // Held by every process of the launch; its end tells that all of them are gone.
    let (mut read, write) = std::io::pipe().unwrap();
    let (mut started_read, mut started_write) = std::io::pipe().unwrap();
    let launcher = ckpt_sys::spawn::fork_child(|| {
        let pass = vec![OwnedFd::from(write.try_clone().unwrap())];
        let result = launch(spec.clone(), pass, |event| write!(started_write, "{event:?}").unwrap());
        panic!("{result:?}");
    })
    .unwrap();
    drop((write, started_write));
    let mut byte = [0];
    started_read.read_exact(&mut byte).unwrap();
    nix::sys::signal::kill(Pid::from_raw(launcher), nix::sys::signal::Signal::SIGKILL).unwrap();
    waitpid(Pid::from_raw(launcher), None).unwrap();
    assert_eq!(read.read(&mut byte).unwrap(), 0, "the end of the pipe");
    // A process that ends closes one file after the other: the lock may go after the pipe.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while Registry::open().unwrap().live_names().unwrap().contains(&spec.name) {
        assert!(std::time::Instant::now() < until, "still alive");
        std::thread::yield_now();
    }
    assert!(!entry_exists(&spec.name), "swept");
}
