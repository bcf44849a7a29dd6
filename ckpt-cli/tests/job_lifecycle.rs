// SPDX-License-Identifier: MIT OR Apache-2.0
//! The life of a job without dump and restore, with the real program: as the present user and, if that is root, also as uid 1000.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ckpt_abi::init_protocol::{HEADER_BYTES, Header, Kind, WindowSize};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Nothing here takes longer on a slow machine under load.
const DEADLINE: Duration = Duration::from_secs(60);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Waits until `condition` gives something.
fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One user with a registry, a store and a copy of the program of their own.
struct Ckpt {
    plain_user: bool,
    scratch: PathBuf,
}

impl Ckpt {
    /// One for each user that can be tried.
    fn for_each_user(test: &str, body: impl Fn(&Ckpt)) {
        let root = nix::unistd::geteuid().is_root();
        for plain_user in if root { vec![false, true] } else { vec![true] } {
            let ckpt = Ckpt::new(test, plain_user, root);
            if ckpt.allowed() {
                body(&ckpt);
            }
        }
    }

    fn new(test: &str, plain_user: bool, root: bool) -> Ckpt {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let scratch = PathBuf::from(format!("/tmp/ckpt-test-{}-{number}-{test}", std::process::id()));
        for directory in ["", "run", "bin"] {
            fs::create_dir(scratch.join(directory)).unwrap();
            let mode = if directory == "run" { 0o700 } else { 0o755 };
            fs::set_permissions(scratch.join(directory), fs::Permissions::from_mode(mode)).unwrap();
            if root && plain_user {
                chown(scratch.join(directory), Some(1000), Some(1000)).unwrap();
            }
        }
        // By another program: a descriptor open for writing here could be inherited by a child that another test is starting at
        // this moment, and the program would be busy for execve.
        let program = scratch.join("bin/ckpt");
        let copied =
            Command::new("install").args(["-m755", env!("CARGO_BIN_EXE_ckpt")]).arg(&program).status();
        assert!(copied.unwrap().success());
        Ckpt { plain_user, scratch }
    }

    /// Whether this host lets this user start jobs; says so if not.
    fn allowed(&self) -> bool {
        let output = self.ckpt(&["doctor", "--json"]).output().unwrap();
        let diagnosis: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let level = diagnosis["level"].as_str().unwrap().to_owned();
        if level != "full" {
            eprintln!("SKIPPED ({}): the level of this host is '{level}'", self.user());
        }
        level == "full"
    }

    fn user(&self) -> &'static str {
        if self.plain_user { "plain user" } else { "root" }
    }

    /// A command run as the user of this test.
    fn command(&self, program: &str) -> Command {
        let become_other = self.plain_user && nix::unistd::geteuid().is_root();
        let mut command = if become_other {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=1000", "--regid=1000", "--clear-groups", "--", program]);
            command
        } else {
            Command::new(program)
        };
        command
            .current_dir(&self.scratch)
            .env("XDG_RUNTIME_DIR", self.scratch.join("run"))
            .env("CKPT_STORE", self.scratch.join("store"))
            .env("PATH", "/usr/bin:/bin")
            .env_remove("LD_PRELOAD")
            .stdin(Stdio::null());
        command
    }

    fn program(&self) -> String {
        self.scratch.join("bin/ckpt").to_str().unwrap().to_owned()
    }

    fn ckpt(&self, args: &[&str]) -> Command {
        let mut command = self.command(&self.program());
        command.args(args);
        command
    }

    /// `ckpt run OPTIONS -- sh -c SCRIPT`.
    fn run(&self, options: &[&str], script: &str) -> Command {
        let mut command = self.ckpt(&["run", "--no-interceptor"]);
        command.args(options).args(["--", "sh", "-c", script]);
        command
    }

    fn output(&self, options: &[&str], script: &str) -> Output {
        self.run(options, script).output().unwrap()
    }

    fn jobs(&self) -> Vec<serde_json::Value> {
        let output = self.ckpt(&["ps", "--json"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn job(&self, name: &str) -> Option<serde_json::Value> {
        self.jobs().into_iter().find(|job| job["name"] == name)
    }

    /// A file that the user of this test owns.
    fn write(&self, name: &str, content: &str) {
        fs::write(self.file(name), content).unwrap();
        if self.plain_user && nix::unistd::geteuid().is_root() {
            chown(self.file(name), Some(1000), Some(1000)).unwrap();
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Entries of the registry.
    fn entries(&self) -> Vec<String> {
        let mut names = Vec::new();
        for host in fs::read_dir(self.file("run/ckpt")).into_iter().flatten() {
            for job in fs::read_dir(host.unwrap().path()).unwrap() {
                names.push(job.unwrap().file_name().into_string().unwrap());
            }
        }
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        names
    }

    /// Processes that execute `sleep` with this argument, and not those that are about to.
    fn sleepers(&self, marker: &str) -> Vec<i32> {
        let mut pids = self.processes(marker);
        pids.retain(|pid| fs::read(format!("/proc/{pid}/comm")).unwrap_or_default() == b"sleep\n");
        pids
    }

    /// Living processes with this text among their arguments.
    fn processes(&self, marker: &str) -> Vec<i32> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let path = entry.unwrap().path();
            let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok()) else {
                continue;
            };
            // Zombies have no arguments.
            let arguments = fs::read(path.join("cmdline")).unwrap_or_default();
            if arguments.split(|byte| *byte == 0).any(|argument| argument == marker.as_bytes()) {
                found.push(pid);
            }
        }
        found
    }
}

impl Drop for Ckpt {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("was running as {} in {}", self.user(), self.scratch.display());
        }
        // Jobs that a failed test left behind.
        for name in self.entries() {
            let _ = self.ckpt(&["kill", &name, "KILL"]).stderr(Stdio::null()).status();
        }
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// A child that does not outlive the test.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Running {
        Running(command.spawn().unwrap())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        eventually("the child ends", || self.0.try_wait().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Reads to the end, within the deadline.
fn read_to_end(mut from: impl Read + Send + 'static) -> String {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        let _ = send.send(bytes);
    });
    text(&receive.recv_timeout(DEADLINE).expect("the end of the stream"))
}

/// An argument that no other process has.
fn marker() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{}.{}", 100_000 + std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

#[test]
fn exit_status_passes_through() {
    Ckpt::for_each_user("exit", |ckpt| {
        for (script, code) in
            [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill $$", 143)]
        {
            assert_eq!(ckpt.output(&[], script).status.code(), Some(code), "{script}");
        }
        let run = |program: &str| ckpt.ckpt(&["run", "--no-interceptor", "--", program]).output().unwrap();
        let missing = run("no-such-program");
        assert_eq!(missing.status.code(), Some(127));
        assert_eq!(text(&missing.stderr), "ckpt: no-such-program: command not found in PATH\n");
        assert_eq!(run("/no/such/program").status.code(), Some(127));
        let directory = run("/etc");
        assert_eq!(directory.status.code(), Some(126));
        assert!(text(&directory.stderr).starts_with("ckpt: /etc: cannot be executed: "), "{directory:?}");
        // Nothing is left of the jobs that never started.
        assert_eq!(ckpt.jobs(), Vec::<serde_json::Value>::new());
        fs::write(ckpt.file("no-shebang"), "exit 12\n").unwrap();
        fs::set_permissions(ckpt.file("no-shebang"), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(run("./no-shebang").status.code(), Some(12));
    });
}

#[test]
fn signals_reach_the_main_process() {
    Ckpt::for_each_user("signals", |ckpt| {
        for signal in ["HUP", "INT", "TERM", "QUIT", "USR1", "USR2", "CONT"] {
            let marker = marker();
            let script = format!(
                "trap 'kill $!; echo caught; exit 5' {signal}; sleep {marker} & echo ready > {signal}; wait; exit 6"
            );
            let mut child = Running::start(ckpt.run(&[], &script).stdout(Stdio::piped()));
            eventually("the trap is set", || {
                fs::read_to_string(ckpt.file(signal)).ok().filter(|s| s == "ready\n")
            });
            // Before it executes sleep, the shell's child has the shell's traps and could swallow the signal.
            eventually("it sleeps", || ckpt.sleepers(&marker).first().copied());
            kill(child.pid(), format!("SIG{signal}").parse::<Signal>().unwrap()).unwrap();
            assert_eq!(child.wait().code(), Some(5), "{signal}");
            assert_eq!(read_to_end(child.0.stdout.take().unwrap()), "caught\n");
        }
    });
}

/// What a program sees of itself that ckpt must not change.
const SELF_PORTRAIT: &str = r#"
    pwd; umask; ulimit -a; ulimit -Ha; env | grep -v '^_=' | sort
    grep -E '^(Uid|Gid|Groups|SigPnd|ShdPnd|SigBlk|SigIgn|SigCgt|CapInh|CapPrm|CapEff|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status
    cat /proc/$$/oom_score_adj /proc/$$/personality
    for fd in /proc/$$/fd/*; do test -e $fd && echo ${fd##*/} $(readlink $fd) $(sed -n 's/flags://p' /proc/$$/fdinfo/${fd##*/}); done
    nice
"#;

#[test]
fn a_command_finds_what_it_would_find_without_ckpt() {
    Ckpt::for_each_user("portrait", |ckpt| {
        fs::write(ckpt.file("script"), SELF_PORTRAIT).unwrap();
        ckpt.write("input", "");
        let preparations = [
            "exec 7<input 9>>input 600<>input",
            "trap '' PIPE HUP CHLD",
            "exec <&-",
            "ulimit -Sn 100; exec 7<input 80<input",
            "ulimit -n 300; exec 7<input 290<input",
            "umask 027; cd /usr",
            "exec nice -n 5 sh -c \"$2\" sh \"$1\"",
            ":",
        ];
        for preparation in preparations {
            let look = |with: &str| {
                let last = format!("exec {with} sh {} 0", ckpt.file("script").display());
                let mut command = ckpt.command("bash");
                command.args(["-c", &format!("{preparation}; {last}"), "bash", "", &last]);
                command
                    .env("A_VARIABLE", "with a\nnewline")
                    .stdin(fs::File::open(ckpt.file("input")).unwrap());
                let output = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).output().unwrap();
                assert_eq!(output.status.code(), Some(0), "{preparation}: {output:?}");
                text(&output.stdout)
            };
            let portrait = |with: &str| {
                // Every run has a new stdout pipe, and a user namespace names no other groups.
                let lines = look(with);
                let stable = |line: &&str| !line.contains("pipe:") && !line.starts_with("Groups:");
                lines.lines().filter(stable).map(str::to_owned).collect::<Vec<_>>()
            };
            let name = "--name portrait --no-interceptor --no-tty --";
            assert_eq!(
                portrait(&format!("{} run {name}", ckpt.program())),
                portrait(""),
                "{preparation}, {}",
                ckpt.user()
            );
        }
    });
}

#[test]
fn a_job_has_its_own_world() {
    Ckpt::for_each_user("world", |ckpt| {
        let shm = marker();
        fs::write(format!("/dev/shm/{shm}"), "").unwrap();
        let script = format!(
            "echo pid $$; grep NSpid /proc/self/status | wc -w; ls /dev/shm /dev/pts; cat /proc/1/comm
             echo inside > /dev/shm/{shm}-inside; echo /proc/[0-9]*; uname -n"
        );
        let output = text(&ckpt.output(&[], &script).stdout);
        let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
        fs::remove_file(format!("/dev/shm/{shm}")).unwrap();
        let expected =
            format!("pid 2\n2\n/dev/pts:\nptmx\n\n/dev/shm:\nckpt-init\n/proc/1 /proc/2\n{host}\n");
        assert_eq!(output, expected);
        assert!(!Path::new(&format!("/dev/shm/{shm}-inside")).exists());
    });
}

#[test]
fn a_mount_made_later_propagates_in() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can mount outside of the job");
        return;
    }
    Ckpt::for_each_user("mounts", |ckpt| {
        // In a mount namespace of the test's own, with shared propagation as on a usual host.
        let script = format!(
            "mkdir point && mount --bind point point && mount --make-shared point && mkdir point/sub || exit 99
             {} run -d -n mounts --no-interceptor -- sh -c 'until test -e point/sub/file; do :; done; echo seen > result' || exit 98
             mount -t tmpfs none point/sub && touch point/sub/file && umount -l point/sub.none 2>/dev/null
             {} wait mounts",
            ckpt.program(),
            ckpt.program()
        );
        if ckpt.plain_user {
            // The job is the plain user's, the mount root's.
            return;
        }
        let status = ckpt.command("unshare").args(["-m", "sh", "-c", &script]).status().unwrap();
        assert_eq!(status.code(), Some(0));
        assert_eq!(fs::read_to_string(ckpt.file("result")).unwrap(), "seen\n");
    });
}

#[test]
fn a_pipe_ends_when_the_job_closes_it() {
    Ckpt::for_each_user("pipes", |ckpt| {
        let mut command = ckpt.run(&["--name", "pipes"], "echo some; exec >&- 2>&-; read line; exit 4");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Running::start(&mut command);
        assert_eq!(read_to_end(child.0.stdout.take().unwrap()), "some\n");
        assert_eq!(read_to_end(child.0.stderr.take().unwrap()), "");
        assert!(ckpt.job("pipes").is_some(), "the job still reads");
        // And the other way round: a writer sees that nobody reads.
        drop(child.0.stdin.take());
        assert_eq!(child.wait().code(), Some(4));

        let mut command = ckpt.run(&[], "exec <&-; echo closed; exec sleep 1000");
        let mut child = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut line = [0; 7];
        child.0.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        let mut stdin = child.0.stdin.take().unwrap();
        let errno = eventually("an error", || match stdin.write(b"x") {
            Ok(_) => None,
            Err(error) => Some(error.raw_os_error()),
        });
        assert_eq!(errno, Some(libc::EPIPE));
        kill(child.pid(), Signal::SIGTERM).unwrap();
        assert_eq!(child.wait().code(), Some(143));
    });
}

#[test]
fn a_name_belongs_to_one_job_at_a_time() {
    Ckpt::for_each_user("names", |ckpt| {
        assert_eq!(ckpt.output(&["-d", "-n", "one"], "exec sleep 1000").status.code(), Some(0));
        let second = ckpt.output(&["-n", "one"], "echo second");
        assert_eq!(second.status.code(), Some(113));
        assert!(text(&second.stderr).contains("a job named 'one' is running already"), "{second:?}");
        assert_eq!(text(&second.stdout), "");
        assert!(ckpt.ckpt(&["kill", "one", "KILL"]).status().unwrap().success());
        // Nothing of it is left when that returns.
        assert_eq!(ckpt.output(&["-n", "one"], "exit 3").status.code(), Some(3));
        assert_eq!(ckpt.ckpt(&["wait", "one"]).status().unwrap().code(), Some(3));
        // Nor is a job in the way whose init has just been killed.
        let marker = marker();
        assert!(ckpt.output(&["-d", "-n", "one"], &format!("exec sleep {marker}")).status.success());
        let init = ckpt.job("one").unwrap()["init_pid"].as_i64().unwrap() as i32;
        kill(Pid::from_raw(init), Signal::SIGKILL).unwrap();
        assert_eq!(ckpt.output(&["-n", "one"], "exit 4").status.code(), Some(4));
        assert_eq!(ckpt.processes(&marker), [] as [i32; 0]);
        assert_eq!(ckpt.output(&["-n", "../one"], "exit 3").status.code(), Some(2));
        assert_eq!(ckpt.ckpt(&["wait", "none"]).output().unwrap().status.code(), Some(112));
        assert_eq!(ckpt.ckpt(&["kill", "none"]).output().unwrap().status.code(), Some(112));
        // A foreground job is gone when ckpt returns, so that its name is free.
        for _ in 0..5 {
            assert_eq!(ckpt.output(&["-n", "again"], "exit 0").status.code(), Some(0));
        }
    });
}

#[test]
fn a_detached_job_writes_its_log() {
    Ckpt::for_each_user("detach", |ckpt| {
        let mut command =
            ckpt.run(&["-d", "-n", "d"], "echo out; echo err >&2; cat; read x < go; echo end; exit 9");
        assert!(Command::new("mkfifo").arg(ckpt.file("go")).status().unwrap().success());
        fs::set_permissions(ckpt.file("go"), fs::Permissions::from_mode(0o666)).unwrap();
        let start = command.stdin(Stdio::piped()).output().unwrap();
        assert_eq!(start.status.code(), Some(0), "{start:?}");
        let job = ckpt.job("d").expect("it runs");
        let log = PathBuf::from(job["log"].as_str().unwrap());
        assert!(text(&start.stderr).contains(log.to_str().unwrap()), "{start:?}");
        eventually("output", || (fs::read_to_string(&log).unwrap() == "out\nerr\n").then_some(()));
        assert_eq!(job["main_running"], true);
        assert_eq!(job["main_pid"], 2);
        let waiter = Running::start(&mut ckpt.ckpt(&["wait", "d"]));
        fs::write(ckpt.file("go"), "go\n").unwrap();
        let mut waiter = waiter;
        assert_eq!(waiter.wait().code(), Some(9));
        assert_eq!(fs::read_to_string(&log).unwrap(), "out\nerr\nend\n");
        // Also when asked later.
        eventually("the job is gone", || ckpt.job("d").is_none().then_some(()));
        assert_eq!(ckpt.ckpt(&["wait", "d"]).status().unwrap().code(), Some(9));
    });
}

#[test]
fn killing_the_launcher_does_not_end_the_job() {
    Ckpt::for_each_user("launcher", |ckpt| {
        for options in [&["-n", "l", "--no-tty"], &["-n", "l", "--tty"]] {
            let marker = marker();
            let script = format!("echo started > started; sleep {marker}; exit 3");
            let mut child = Running::start(ckpt.run(options, &script).stdout(Stdio::null()));
            eventually("it runs", || fs::read(ckpt.file("started")).ok().filter(|text| !text.is_empty()));
            eventually("it sleeps", || ckpt.sleepers(&marker).first().copied());
            kill(child.pid(), Signal::SIGKILL).unwrap();
            assert_eq!(child.wait().signal(), Some(9));
            let job = ckpt.job("l").expect("the job lives");
            assert_eq!(job["main_running"], true);
            assert_eq!(ckpt.processes(&marker).len(), 1);
            assert!(ckpt.ckpt(&["kill", "l"]).status().unwrap().success());
            assert_eq!(ckpt.ckpt(&["wait", "l"]).status().unwrap().code(), Some(143));
            eventually("all gone", || ckpt.processes(&marker).is_empty().then_some(()));
            fs::remove_file(ckpt.file("started")).unwrap();
            eventually("the name is free", || ckpt.job("l").is_none().then_some(()));
        }
    });
}

#[test]
fn killing_init_ends_everything() {
    Ckpt::for_each_user("init", |ckpt| {
        let marker = marker();
        let script = format!("setsid sleep {marker} & sleep {marker} & sleep {marker}");
        let mut child = Running::start(&mut ckpt.run(&["-n", "i"], &script));
        eventually("three sleep", || (ckpt.sleepers(&marker).len() == 3).then_some(()));
        let init = ckpt.job("i").unwrap()["init_pid"].as_i64().unwrap() as i32;
        kill(Pid::from_raw(init), Signal::SIGKILL).unwrap();
        assert_eq!(child.wait().code(), Some(137));
        eventually("all gone", || ckpt.processes(&marker).is_empty().then_some(()));
        assert_eq!(ckpt.jobs(), Vec::<serde_json::Value>::new());
        assert_eq!(ckpt.entries(), Vec::<String>::new(), "the leftover is swept");
    });
}

#[test]
fn a_start_interrupted_at_any_moment_leaves_a_whole_job_or_nothing() {
    Ckpt::for_each_user("interrupt", |ckpt| {
        let seed = u64::from(std::process::id());
        eprintln!("seed {seed}");
        let mut random = seed;
        let (mut lived, mut nothing) = (0, 0);
        for _ in 0..60 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let marker = marker();
            let mut command = ckpt.run(&["-n", "x"], &format!("exec sleep {marker}"));
            let mut child = Running::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
            // Not to wait for anything: a random moment of the start, which takes some 10 ms.
            std::thread::sleep(Duration::from_micros((random >> 33) % 12_000));
            kill(child.pid(), Signal::SIGKILL).unwrap();
            child.wait();
            // What is dying is gone soon; what lives goes on until it is killed.
            let lives = eventually("a decision", || match (ckpt.job("x"), ckpt.processes(&marker).len()) {
                (Some(job), 1) if job["main_running"] == true => Some(true),
                (None, 0) if ckpt.processes("ckpt-init:x").is_empty() => Some(false),
                _ => None,
            });
            if lives {
                lived += 1;
                assert!(ckpt.ckpt(&["kill", "x", "KILL"]).status().unwrap().success());
                eventually("gone", || ckpt.job("x").is_none().then_some(()));
            } else {
                nothing += 1;
            }
        }
        eprintln!("{}: {lived} lived, {nothing} left nothing", ckpt.user());
        assert!(lived + nothing == 60 && nothing > 0, "the start was never interrupted");
    });
}

#[test]
fn what_the_main_process_leaves_behind_goes_on() {
    Ckpt::for_each_user("leftover", |ckpt| {
        let marker = marker();
        let script = format!("sleep {marker} > /dev/null 2>&1 & exit 8");
        assert_eq!(ckpt.output(&["-n", "left"], &script).status.code(), Some(8));
        let job = ckpt.job("left").expect("the job lives on");
        assert_eq!(job["main_running"], false);
        assert_eq!(job["exit_status"]["exited"], 8);
        assert_eq!(job["processes"], 1);
        assert_eq!(ckpt.ckpt(&["wait", "left"]).status().unwrap().code(), Some(8));
        let mut waiter = Running::start(&mut ckpt.ckpt(&["wait", "--all", "left"]));
        assert!(waiter.0.try_wait().unwrap().is_none());
        // Its main process is gone, so that the signal reaches what is left.
        assert!(ckpt.ckpt(&["kill", "left"]).status().unwrap().success());
        assert_eq!(waiter.wait().code(), Some(8));
        eventually("gone", || {
            (ckpt.job("left").is_none() && ckpt.processes(&marker).is_empty()).then_some(())
        });
    });
}

#[test]
fn kill_reaches_the_process_group_or_everything() {
    Ckpt::for_each_user("kill", |ckpt| {
        let (first, second) = (marker(), marker());
        let script = format!("setsid sleep {first} & sleep {second} & echo > up; wait; wait; exit 1");
        assert!(ckpt.output(&["-d", "-n", "k"], &script).status.success());
        let count = |one: usize, other: usize| {
            eventually("as many processes as expected", || {
                ((ckpt.sleepers(&first).len(), ckpt.sleepers(&second).len()) == (one, other)).then_some(())
            });
        };
        count(1, 1);
        assert!(ckpt.ckpt(&["kill", "k", "TERM"]).status().unwrap().success());
        count(1, 0);
        assert_eq!(ckpt.ckpt(&["wait", "k"]).status().unwrap().code(), Some(143));
        assert!(ckpt.ckpt(&["kill", "--all", "k", "TERM"]).status().unwrap().success());
        count(0, 0);
    });
}

#[test]
fn a_malformed_client_does_no_harm() {
    Ckpt::for_each_user("malformed", |ckpt| {
        assert!(ckpt.output(&["-d", "-n", "m"], "exec sleep 1000").status.success());
        let host = fs::read_dir(ckpt.file("run/ckpt")).unwrap().next().unwrap().unwrap().path();
        let entry = fs::File::open(host.join("m")).unwrap();
        let talk = |packet: &[u8]| -> Option<(u16, i64, String)> {
            let socket = ckpt_sys::local_socket::connect_in(entry.as_fd(), "sock".as_ref()).unwrap();
            ckpt_sys::local_socket::send_packet(socket.as_fd(), packet, true).unwrap();
            let mut buffer = vec![0; 200_000];
            let length = ckpt_sys::local_socket::receive_packet(socket.as_fd(), &mut buffer, true).unwrap();
            let (header, payload) = Header::decode(&buffer[..length]).ok()?;
            Some((header.kind, header.arg, text(payload)))
        };
        let error = Kind::Error as u16;
        let (kind, _, message) = talk(b"GET / HTTP/1.0\r\n\r\n            ").unwrap();
        assert_eq!((kind, message.contains("not a message of ckpt")), (error, true), "{message}");
        assert_eq!(talk(b"x").unwrap().0, error);
        let mut newer = Header::new(Kind::Status, 0, 0);
        newer.version = 2;
        let (kind, _, message) = talk(&newer.encode()).unwrap();
        assert_eq!((kind, message.contains("protocol version 2")), (error, true), "{message}");
        let mut unknown = Header::new(Kind::Status, 0, 0);
        unknown.kind = 0x0777;
        let (kind, errno, message) = talk(&unknown.encode()).unwrap();
        assert_eq!((kind, errno), (error, i64::from(libc::ENOSYS)));
        assert!(message.contains("0x0777") && message.contains("older ckpt"), "{message}");
        assert_eq!(talk(&Header::new(Kind::Kill, 0x0fff, 0).encode()).unwrap().1, i64::from(libc::EINVAL));
        assert_eq!(talk(&Header::new(Kind::Attach, 0, 0).encode()).unwrap().1, i64::from(libc::ENOTTY));
        let mut oversized = Header::new(Kind::Data, 0, 100_000).encode().to_vec();
        oversized.resize(HEADER_BYTES + 100_000, 0);
        assert_eq!(talk(&oversized).unwrap().0, error);
        // Connections that say nothing, more than there may be.
        let idle: Vec<OwnedFd> = (0..100)
            .map_while(|_| ckpt_sys::local_socket::connect_in(entry.as_fd(), "sock".as_ref()).ok())
            .collect();
        assert!(idle.len() > 64);
        drop(idle);
        eventually("it answers", || {
            ckpt.ckpt(&["ps", "--json"]).output().unwrap().status.success().then_some(())
        });
        assert_eq!(ckpt.job("m").unwrap()["main_running"], true);
    });
}

/// A terminal as a person has it, with `ckpt` in it.
struct Terminal {
    master: fs::File,
    slave: OwnedFd,
    child: Running,
    seen: String,
    /// How the terminal was set before ckpt had it.
    settings_before: String,
}

impl Terminal {
    /// Runs `ckpt` with these arguments in a new session on a new terminal of 24 x 80.
    fn start(ckpt: &Ckpt, args: &[&str]) -> Terminal {
        let pty = ckpt_sys::pty::open().unwrap();
        let slave = ckpt_sys::pty::open_peer(pty.master.as_fd()).unwrap();
        if ckpt.plain_user && nix::unistd::geteuid().is_root() {
            chown(format!("/dev/pts/{}", pty.number), Some(1000), None).unwrap();
        }
        let size = WindowSize { rows: 24, columns: 80, ..WindowSize::default() };
        ckpt_sys::pty::set_window_size(pty.master.as_fd(), size).unwrap();
        let mut command = ckpt.command("setsid");
        command.args(["--ctty", "--wait", &ckpt.program()]).args(args).env("PS1", "P> ").env("TERM", "dumb");
        let stdio = || Stdio::from(slave.try_clone().unwrap());
        let settings_before = settings(&slave);
        let child = Running::start(command.stdin(stdio()).stdout(stdio()).stderr(stdio()));
        Terminal { settings_before, master: fs::File::from(pty.master), slave, child, seen: String::new() }
    }

    fn type_in(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until `what` has been shown after what was waited for before.
    fn expect(&mut self, what: &str) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(at) = self.seen.find(what) {
                self.seen.drain(..at + what.len());
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{what:?} never came; after what was expected before: {:?}",
                self.seen
            );
            let mut chunk = [0; 4096];
            match self.master.read(&mut chunk) {
                Ok(length) => self.seen.push_str(&text(&chunk[..length])),
                // The master is non-blocking.
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Types a command whose output is `word`, in a way that its echo is not.
    fn say(&mut self, word: &str) {
        let (first, rest) = word.split_at(1);
        self.type_in(&format!("echo {first}''{rest}\n"));
        self.expect(&format!("{word}\r\n"));
        self.expect("P> ");
    }
}

/// All settings of a terminal but its size and speed.
fn settings(terminal: &OwnedFd) -> String {
    let output = Command::new("stty").arg("-a").stdin(terminal.try_clone().unwrap()).output().unwrap();
    assert!(output.status.success());
    text(&output.stdout).lines().skip(1).collect::<Vec<_>>().join("\n")
}

#[test]
fn an_interactive_shell_has_job_control() {
    Ckpt::for_each_user("shell", |ckpt| {
        let args = ["run", "-n", "sh", "--no-interceptor", "--", "bash", "--norc", "--noprofile", "-i"];
        let mut terminal = Terminal::start(ckpt, &args);
        terminal.expect("P> ");
        assert!(!terminal.seen.contains("no job control"), "{}", terminal.seen);
        terminal.say("hello");
        terminal.type_in("tty; stty size\n");
        terminal.expect("/dev/pts/0\r\n24 80\r\n");
        terminal.expect("P> ");
        assert_eq!(ckpt.job("sh").unwrap()["attached"], true);

        // Ctrl-C ends what runs, and not the shell.
        terminal.type_in("sh -c 'echo sl''eeping; exec sleep 1000'\n");
        terminal.expect("sleeping\r\n");
        terminal.type_in("\x03");
        terminal.expect("P> ");
        terminal.type_in("echo \"status=$?\"\n");
        terminal.expect("status=130\r\n");
        terminal.expect("P> ");

        // Ctrl-Z stops it, fg brings it back.
        terminal.type_in("sh -c 'echo sl''eeping; exec sleep 1000'\n");
        terminal.expect("sleeping\r\n");
        terminal.type_in("\x1a");
        terminal.expect("Stopped");
        terminal.expect("P> ");
        terminal.say("between");
        terminal.type_in("fg\n");
        terminal.expect("exec sleep 1000'\r\n");
        // Typed only once it is in the foreground again.
        eventually("the sleep runs", || {
            let job = ckpt.job("sh").unwrap();
            let sleeps = ckpt.processes("1000").into_iter().any(|pid| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
                // state, and process group against the terminal's foreground group.
                fields.first() == Some(&"S") && fields.get(2) == fields.get(5)
            });
            (job["processes"] == 2 && sleeps).then_some(())
        });
        terminal.type_in("\x03");
        terminal.expect("P> ");

        // The window's size follows.
        let size = WindowSize { rows: 50, columns: 132, ..WindowSize::default() };
        ckpt_sys::pty::set_window_size(terminal.master.as_fd(), size).unwrap();
        terminal.type_in("until test \"$(stty size)\" = '50 132'; do :; done; echo re''sized\n");
        terminal.expect("resized\r\n");
        terminal.expect("P> ");

        terminal.type_in("exit 9\n");
        assert_eq!(terminal.child.wait().code(), Some(9));
        assert_eq!(settings(&terminal.slave), terminal.settings_before);
    });
}

#[test]
fn all_output_arrives_before_the_exit() {
    Ckpt::for_each_user("output", |ckpt| {
        let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exit 2";
        let output = ckpt.output(&["--tty"], script);
        assert_eq!(output.status.code(), Some(2));
        let lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
        let expected: Vec<String> = (0..20_000).map(|i| format!("line {i}")).collect();
        assert_eq!(lines, expected);
    });
}

#[test]
fn input_and_output_of_a_terminal_do_not_block_each_other() {
    Ckpt::for_each_user("echo", |ckpt| {
        // cat gives back every line, while the terminal echoes it, too; nobody reads until all is typed.
        let mut command = ckpt.run(&["--tty"], "stty -echo; echo ready; exec cat");
        let mut child = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut stdout = child.0.stdout.take().unwrap();
        let mut ready = [0; 7];
        stdout.read_exact(&mut ready).unwrap();
        let mut stdin = child.0.stdin.take().unwrap();
        let lines = 20_000;
        let writer = std::thread::spawn(move || {
            for i in 0..lines {
                writeln!(stdin, "line {i} {}", "x".repeat(60)).unwrap();
            }
        });
        let output = read_to_end(stdout);
        writer.join().unwrap();
        assert_eq!(output.lines().count(), lines);
        assert!(output.ends_with(&format!("line {} {}\r\n", lines - 1, "x".repeat(60))));
        assert_eq!(child.wait().code(), Some(0));
    });
}

#[test]
fn a_detached_terminal_can_be_attached() {
    Ckpt::for_each_user("attach", |ckpt| {
        let mut start = ckpt.ckpt(&["run", "-d", "--tty", "-n", "a", "--no-interceptor", "--"]);
        start.args(["bash", "--norc", "--noprofile", "-i"]).env("PS1", "P> ").env("TERM", "dumb");
        assert!(start.output().unwrap().status.success());
        let log = PathBuf::from(ckpt.job("a").unwrap()["log"].as_str().unwrap());
        eventually("a prompt in the log", || fs::read_to_string(&log).ok()?.contains("P> ").then_some(()));
        assert_eq!(ckpt.job("a").unwrap()["attached"], false);
        let mut first = Terminal::start(ckpt, &["attach", "a"]);
        eventually("attached", || (ckpt.job("a").unwrap()["attached"] == true).then_some(()));
        first.say("one");
        // Another terminal takes over, and leaves by the detach key.
        let mut second = Terminal::start(ckpt, &["attach", "a"]);
        assert_eq!(first.child.wait().code(), Some(0));
        first.expect("another terminal is attached");
        second.say("two");
        second.type_in("\x1d");
        second.expect("goes on");
        assert_eq!(second.child.wait().code(), Some(0));
        eventually("detached", || (ckpt.job("a").unwrap()["attached"] == false).then_some(()));
        let mut third = Terminal::start(ckpt, &["attach", "a"]);
        eventually("attached", || (ckpt.job("a").unwrap()["attached"] == true).then_some(()));
        third.say("three");
        third.type_in("exit 6\n");
        assert_eq!(third.child.wait().code(), Some(6));
    });
}

#[test]
fn keys_become_signals_for_a_job_without_a_terminal() {
    Ckpt::for_each_user("keys", |ckpt| {
        let marker = marker();
        let script =
            format!("trap 'echo caught; kill $!; exit 5' INT; sleep {marker} & echo ready; wait; exit 6");
        let args = ["run", "-n", "keys", "--no-tty", "--no-interceptor", "--", "sh", "-c", &script];
        let mut terminal = Terminal::start(ckpt, &args);
        terminal.expect("ready\r\n");
        eventually("it sleeps", || ckpt.sleepers(&marker).first().copied());
        terminal.type_in("\x03");
        terminal.expect("caught\r\n");
        assert_eq!(terminal.child.wait().code(), Some(5));

        // Ctrl-Z stops the job and ckpt; both go on together.
        let marker = crate::marker();
        let args = ["run", "-n", "stop", "--no-tty", "--no-interceptor", "--", "sleep", &marker];
        let terminal = Terminal::start(ckpt, &args);
        let sleeper = eventually("it sleeps", || {
            let named = ckpt.processes(&marker);
            // The launcher has the marker among its arguments, too.
            named
                .into_iter()
                .find(|pid| fs::read(format!("/proc/{pid}/comm")).unwrap_or_default() == b"sleep\n")
        });
        let launcher = eventually("the launcher", || {
            let named = ckpt.processes(&marker);
            named
                .into_iter()
                .find(|pid| fs::read(format!("/proc/{pid}/comm")).unwrap_or_default() == b"ckpt\n")
        });
        let state = |pid: i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().unwrap_or_default().chars().next()
        };
        let both = |wanted: char| {
            eventually("both in the same state", || {
                (state(sleeper) == Some(wanted) && state(launcher) == Some(wanted)).then_some(())
            });
        };
        both('S');
        kill(Pid::from_raw(launcher), Signal::SIGTSTP).unwrap();
        both('T');
        kill(Pid::from_raw(launcher), Signal::SIGCONT).unwrap();
        both('S');
        assert!(ckpt.ckpt(&["kill", "stop"]).status().unwrap().success());
        let mut terminal = terminal;
        assert_eq!(terminal.child.wait().code(), Some(143));
    });
}

#[test]
fn external_fds_are_on_record() {
    Ckpt::for_each_user("external", |ckpt| {
        ckpt.write("data", "");
        let script = format!(
            "exec 7<data 8>>data; exec {} run -n e --no-interceptor -- sh -c 'echo > up; sleep 1000'",
            ckpt.program()
        );
        let mut command = ckpt.command("bash");
        let mut child =
            Running::start(command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()));
        eventually("it runs", || ckpt.file("up").exists().then_some(()));
        let job = ckpt.job("e").unwrap();
        let external = job["external"].as_array().unwrap();
        let numbers: BTreeSet<i64> = external.iter().map(|fd| fd["number"].as_i64().unwrap()).collect();
        assert!(numbers.is_superset(&BTreeSet::from([0, 1, 2, 7, 8])), "{numbers:?}");
        let of = |number: i64| external.iter().find(|fd| fd["number"] == number).unwrap();
        let stdin =
            fs::metadata(format!("/proc/self/fd/{}", child.0.stdin.as_ref().unwrap().as_raw_fd())).unwrap();
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(of(0)["inode"], stdin.ino());
        assert_eq!(of(0)["device"], stdin.dev());
        assert!(of(0)["description"].as_str().unwrap().starts_with("pipe:["));
        let access =
            |number: i64| of(number)["flags"].as_i64().unwrap() as i32 & (libc::O_ACCMODE | libc::O_APPEND);
        assert_eq!(access(7), libc::O_RDONLY);
        assert_eq!(access(8), libc::O_WRONLY | libc::O_APPEND);
        assert!(ckpt.ckpt(&["kill", "e", "KILL"]).status().unwrap().success());
        assert_eq!(child.wait().code(), Some(137));
    });
}

/// Runs a script as root of a user namespace, whoever runs the test; `None` (and says so) where that is not allowed.
fn in_user_namespace(ckpt: &Ckpt, script: &str) -> Option<(String, String)> {
    let output = ckpt.command("unshare").args(["-Urm", "sh", "-c", script]).output().unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    if output.status.code() == Some(77) || stderr.contains("unshare failed") {
        eprintln!("SKIPPED: the host does not let the test build this level: {stderr}");
        return None;
    }
    Some((stdout, stderr))
}

#[test]
fn a_covered_proc_is_said_and_survived() {
    let root = nix::unistd::geteuid().is_root();
    let ckpt = Ckpt::new("covered", !root, root);
    // The second namespace inherits the cover and cannot take it away: that is what makes /proc incomplete.
    let script = format!(
        "mount -t tmpfs none /proc/irq || exit 77
         exec unshare -Urm sh -c '{0} doctor; echo level $?
         {0} run -n covered --no-interceptor -- sh -c \"echo pid \\$\\$; exit 4\"
         echo status $?'",
        ckpt.program()
    );
    let Some((stdout, stderr)) = in_user_namespace(&ckpt, &script) else { return };
    assert!(stdout.contains("Level: no fresh /proc"), "{stdout}{stderr}");
    assert!(stdout.contains("/proc/irq"), "{stdout}{stderr}");
    assert!(stdout.contains("level 116\n"), "{stdout}{stderr}");
    assert!(stdout.ends_with("pid 2\nstatus 4\n"), "{stdout}{stderr}");
    assert!(stderr.contains("does not allow a fresh /proc"), "{stdout}{stderr}");
}

#[test]
fn forbidden_user_namespaces_are_said_with_the_remedy() {
    let root = nix::unistd::geteuid().is_root();
    let ckpt = Ckpt::new("forbidden", !root, root);
    let script = format!(
        "echo 0 > /proc/sys/user/max_user_namespaces || exit 77
         unprivileged() {{ setpriv --bounding-set=-all --inh-caps=-all \"$@\"; }}
         unprivileged {0} doctor; echo level $?
         unprivileged {0} run -n forbidden --no-interceptor -- true; echo status $?
         unprivileged {0} ps",
        ckpt.program()
    );
    let Some((stdout, stderr)) = in_user_namespace(&ckpt, &script) else { return };
    assert!(stdout.contains("Level: no user namespaces"), "{stdout}{stderr}");
    assert!(
        stdout.contains("-> user namespaces are switched off (user.max_user_namespaces is 0)"),
        "{stdout}{stderr}"
    );
    assert!(stdout.contains("level 116\n"), "{stdout}{stderr}");
    assert!(stdout.contains("status 116\n"), "{stdout}{stderr}");
    assert!(stderr.contains("this host does not allow user namespaces"), "{stdout}{stderr}");
    assert!(stderr.contains("sysctl user.max_user_namespaces"), "{stdout}{stderr}");
    // Nothing is left of the job that could not start.
    assert_eq!(ckpt.entries(), Vec::<String>::new());
}
