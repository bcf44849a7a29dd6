// SPDX-License-Identifier: MIT OR Apache-2.0
//! Real programs (`apps/`), each doing real work across dump, SIGKILL of the whole job and restore, at moments chosen at
//! random among its steps, and through three generations. CKPT_TEST_APP_MOMENTS sets the number of
//! moments (20).
#![forbid(unsafe_code)]

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use ckpt_tests::{
    Failure, Outcome, announce,
    job::{Job, RunOptions},
    process::{HostProcess, Running, poll_until},
    proof::each_user,
    sandbox::Sandbox,
    seed::{Random, count_from},
    stage::stage,
    user::Users,
};

/// How long a program may take for a step, and for all of its work.
const APP_DEADLINE: Duration = Duration::from_secs(120);

/// A program of `apps/` and what its steps are.
struct App {
    label: &'static str,
    /// The command, the work directory excepted, which is its last argument.
    command: fn(&Sandbox) -> Outcome<Vec<String>>,
    /// The number of lines "step …" in its log.
    steps: u64,
    /// Whether it deletes files soon after it wrote them, so that a job that ran on after the dump leaves a state of the
    /// file system that the checkpoint does not fit: then the dump itself ends the job.
    stops_at_dump: bool,
}

fn script(sandbox: &Sandbox, name: &str) -> Outcome<String> {
    let target = sandbox.root.join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("apps").join(name);
    fs::copy(&source, &target).map_err(|error| Failure(format!("{}: {error}", source.display())))?;
    Ok(target.to_string_lossy().into_owned())
}

fn log(sandbox: &Sandbox) -> String {
    fs::read_to_string(sandbox.work.join("log")).unwrap_or_default()
}

fn result(sandbox: &Sandbox) -> Option<String> {
    fs::read_to_string(sandbox.work.join("result")).ok()
}

/// Waits until the program has made `steps` steps and gives its nonce. Fails if it has finished already.
fn wait_steps(sandbox: &Sandbox, steps: u64) -> Outcome<String> {
    let text = poll_until(APP_DEADLINE, || {
        let text = log(sandbox);
        let made = text.lines().filter(|line| line.starts_with("step ")).count() as u64;
        (text.starts_with("begin ") && made >= steps).then_some(text)
    })
    .ok_or_else(|| Failure(format!("the program has not made {steps} steps within {APP_DEADLINE:?}")))?;
    Ok(text.lines().next().unwrap_or("").trim_start_matches("begin ").to_owned())
}

/// The program ends with its own nonce, and its log tells one whole life: every step, and each exactly once.
fn expect_finished(sandbox: &Sandbox, nonce: &str, steps: u64) -> Outcome<()> {
    let verdict = poll_until(APP_DEADLINE, || result(sandbox))
        .ok_or_else(|| Failure(format!("the program did not finish within {APP_DEADLINE:?}")))?;
    if verdict.trim() != format!("OK {nonce}") {
        return Err(Failure(format!("expected \"OK {nonce}\", got {verdict:?}")));
    }
    let text = log(sandbox);
    let lines: Vec<&str> = text.lines().collect();
    let distinct: std::collections::HashSet<&&str> = lines.iter().collect();
    let made = lines.iter().filter(|line| line.starts_with("step ")).count() as u64;
    let is_one_life =
        lines.iter().all(|line| line.ends_with(nonce)) && distinct.len() == lines.len() && made == steps;
    if is_one_life {
        Ok(())
    } else {
        Err(Failure(format!("the log is not that of one life with {steps} steps:\n{text}")))
    }
}

/// Whether there was a dump: a program that came to its end before it was frozen tells nothing about ckpt.
fn dump_kill_restore(app: &App, sandbox: &Sandbox, job: &Job<'_>) -> Outcome<bool> {
    let options: &[&str] = if app.stops_at_dump { &["--stop"] } else { &[] };
    let dumped = job.ckpt(&[&["dump", job.name.as_str()], options].concat(), &[])?;
    // 112: there is no such job, or it ended while it was being dumped.
    if dumped.code == 112 && result(sandbox).is_some() {
        return Ok(false);
    }
    if dumped.code != 0 {
        return Err(Failure(dumped.report()));
    }
    if !app.stops_at_dump {
        let processes = job.processes();
        // 112: the job went on after the dump, and came to its end.
        let killed = job.ckpt(&["kill", &job.name, "KILL"], &[])?;
        if killed.code != 0 && killed.code != 112 {
            return Err(Failure(killed.report()));
        }
        poll_until(APP_DEADLINE, || (!processes.iter().any(|process| process.is_alive())).then_some(()))
            .ok_or_else(|| Failure::new("the killed job does not go"))?;
    }
    // That end is not the one that counts.
    let _ = fs::remove_file(sandbox.work.join("result"));
    job.restore(None, &[]).map(|_| true)
}

/// The program without ckpt: it must pass, else it is the program that is wrong.
fn control(app: &App) {
    each_user(&format!("app-{}-control", app.label), Users::Both, |sandbox| {
        let mut command = (app.command)(sandbox)?;
        command.push(sandbox.work.to_string_lossy().into_owned());
        let running = sandbox.start(&command, &[])?;
        let nonce = wait_steps(sandbox, 1)?;
        expect_finished(sandbox, &nonce, app.steps)?;
        let finished = running.finish(APP_DEADLINE)?;
        if finished.code == 0 { Ok(()) } else { Err(Failure(finished.report())) }
    });
}

/// One life of the program, dumped, killed and restored when it has made each of the numbers of steps. Whether all of these
/// dumps were made: on a busy machine the program may come to its end before.
fn live(app: &App, sandbox: &Sandbox, dumps_after: &[u64]) -> Outcome<bool> {
    for entry in fs::read_dir(&sandbox.work).into_iter().flatten().flatten() {
        let path = entry.path();
        let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    }
    let mut command = (app.command)(sandbox)?;
    command.push(sandbox.work.to_string_lossy().into_owned());
    let job = Job::run(sandbox, app.label, RunOptions::default(), &command)?;
    let mut nonce = String::new();
    let mut all = true;
    for steps in dumps_after {
        nonce = wait_steps(sandbox, *steps)?;
        if result(sandbox).is_some() || !dump_kill_restore(app, sandbox, &job)? {
            sandbox.record(&format!("(the program was done before the dump after {steps} steps)"));
            all = false;
            break;
        }
        // What a killed job wrote in its last moment must not count for the restored one.
        let now = log(sandbox);
        if !now.starts_with(&format!("begin {nonce}")) {
            return Err(Failure(format!("the log is another one after the restore:\n{now}")));
        }
    }
    expect_finished(sandbox, &nonce, app.steps)?;
    Ok(all)
}

/// Lives the program until `wanted` lives were dumped as planned; too many that were not are a failure of the test.
fn live_until(
    wanted: u64,
    app: &App,
    sandbox: &Sandbox,
    mut dumps_after: impl FnMut() -> Vec<u64>,
) -> Outcome<()> {
    let (mut lived, mut missed) = (0, 0);
    while lived < wanted {
        let steps = dumps_after();
        sandbox.record(&format!("(dump after {steps:?} steps)"));
        if live(app, sandbox, &steps)? {
            lived += 1;
        } else {
            missed += 1;
        }
        if missed > wanted + 5 {
            return Err(Failure(format!(
                "the program ended before its dump {missed} times of {}",
                lived + missed
            )));
        }
    }
    announce(&format!(
        "{} as {}: {lived} lives dumped as planned, {missed} ended before",
        app.label,
        sandbox.user.name()
    ));
    Ok(())
}

fn random_moments(app: &App) {
    each_user(&format!("app-{}", app.label), Users::Both, |sandbox| {
        let mut random = Random::announced(&format!("app-{} as {}", app.label, sandbox.user.name()));
        // Never after the last step: the program would be about to end.
        let moment = || vec![random.below(app.steps * 3 / 4)];
        live_until(count_from("CKPT_TEST_APP_MOMENTS", 20), app, sandbox, moment)
    });
}

fn three_generations(app: &App) {
    each_user(&format!("app-{}-generations", app.label), Users::Both, |sandbox| {
        live_until(1, app, sandbox, || vec![app.steps / 8, app.steps / 4, app.steps / 2])
    });
}

macro_rules! app_tests {
    ($($name:ident => $app:expr;)+) => {
        $(mod $name {
            use super::*;
            #[test]
            fn control() { super::control(&$app) }
            #[test]
            fn random_moments() { super::random_moments(&$app) }
            #[test]
            fn three_generations() { super::three_generations(&$app) }
        })+
    };
}

app_tests! {
    python_pool => App {
        label: "python-pool",
        command: |sandbox| Ok(vec!["/usr/bin/python3".to_owned(), script(sandbox, "pool.py")?]),
        steps: 40,
        stops_at_dump: false,
    };
    bash_pipelines => App {
        label: "bash-pipelines",
        command: |sandbox| Ok(vec!["/bin/bash".to_owned(), script(sandbox, "pipelines.sh")?]),
        steps: 20,
        // Its background jobs write files afresh, which the job that ran on has truncated and filled again.
        stops_at_dump: true,
    };
    make_gcc => App {
        label: "make-gcc",
        command: |sandbox| Ok(vec!["/bin/bash".to_owned(), script(sandbox, "build.sh")?]),
        steps: 21,
        stops_at_dump: true,
    };
    static_primes => App {
        label: "static-primes",
        command: |sandbox| {
            let source = script(sandbox, "primes.c")?;
            let program = sandbox.root.join("primes");
            if !program.exists() {
                // Not as the sandbox's user: it does not own the directory of the executables.
                let made = std::process::Command::new("gcc")
                    .args(["-static", "-O1", "-o"])
                    .args([program.as_os_str(), source.as_ref()])
                    .output()
                    .map_err(|error| Failure(format!("gcc: {error}")))?;
                if !made.status.success() {
                    return Err(Failure(String::from_utf8_lossy(&made.stderr).into_owned()));
                }
            }
            Ok(vec![program.to_string_lossy().into_owned()])
        },
        steps: 20,
        stops_at_dump: false,
    };
}

/// A person at a terminal: `script` gives the command a pty, the test types through a FIFO and reads the typescript.
struct Person {
    screen: PathBuf,
    keyboard: fs::File,
    // Held so that it ends with the person.
    _terminal: Running,
}

impl Person {
    fn sits_down(sandbox: &Sandbox, label: &str, command: &[String]) -> Outcome<Person> {
        let (screen, keys) =
            (sandbox.work.join(format!("{label}.screen")), sandbox.work.join(format!("{label}.keys")));
        let failure = |error: &dyn std::fmt::Display| Failure(format!("{}: {error}", keys.display()));
        let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
        nix::unistd::mkfifo(&keys, mode).map_err(|error| failure(&error))?;
        sandbox.user.give(&keys)?;
        let keyboard =
            fs::File::options().read(true).write(true).open(&keys).map_err(|error| failure(&error))?;
        let line =
            format!("script -qfc '{}' '{}' < '{}'", command.join(" "), screen.display(), keys.display());
        let terminal = sandbox.start(&["sh".to_owned(), "-c".to_owned(), format!("exec {line}")], &[])?;
        Ok(Person { screen, keyboard, _terminal: terminal })
    }

    fn types(&mut self, line: &str) -> Outcome<()> {
        self.keyboard
            .write_all(format!("{line}\n").as_bytes())
            .map_err(|error| Failure(format!("typing: {error}")))
    }

    /// Waits for text between `open` and `close` made of digits only, as the echo of the typed command is not.
    fn reads_digits(&self, open: &str, close: &str) -> Outcome<String> {
        let mut seen = String::new();
        poll_until(Duration::from_secs(30), || {
            seen = String::from_utf8_lossy(&fs::read(&self.screen).unwrap_or_default()).into_owned();
            seen.split(open).skip(1).filter_map(|rest| rest.split(close).next()).find_map(|word| {
                let is_number = !word.is_empty() && word.chars().all(|c| c.is_ascii_digit());
                is_number.then(|| word.to_owned())
            })
        })
        .ok_or_else(|| Failure(format!("the screen never shows {open}digits{close}:\n{seen}")))
    }
}

/// The person and a shell without ckpt.
#[test]
fn interactive_shell_control() {
    each_user("app-shell-control", Users::Both, |sandbox| {
        let shell = ["bash", "--norc", "--noprofile", "-i"].map(String::from);
        let mut person = Person::sits_down(sandbox, "control", &shell)?;
        person.types("n=$RANDOM$RANDOM; echo \"<$n>\"")?;
        let number = person.reads_digits("<", ">")?;
        person.types("echo \"[$n]\"")?;
        let again = person.reads_digits("[", "]")?;
        person.types("sleep 600")?;
        person.types("\u{3}")?;
        person.types("echo \"($((n + 0)))\"; exit 0")?;
        person.reads_digits("(", ")")?;
        if again == number { Ok(()) } else { Err(Failure(format!("expected {number}, got {again}"))) }
    });
}

/// An interactive shell in a pty: its variables, its background job and its line editing are there after the restore.
#[test]
fn interactive_shell() {
    each_user("app-shell", Users::Both, |sandbox| {
        let ckpt = stage().ckpt()?.to_string_lossy().into_owned();
        let store = sandbox.store.to_string_lossy().into_owned();
        // The harness makes jobs detached; another one is the handle by which it drives the shell.
        let handle =
            Job::run(sandbox, "handle", RunOptions::default(), &["sleep".to_owned(), "600".to_owned()])?;
        let run = [
            &ckpt,
            "run",
            "--tty",
            "--name",
            "shell",
            "--store",
            &store,
            "--",
            "bash",
            "--norc",
            "--noprofile",
            "-i",
        ];
        let mut person = Person::sits_down(sandbox, "first", &run.map(String::from))?;
        person.types("n=$RANDOM$RANDOM; echo \"<$n>\"")?;
        let number = person.reads_digits("<", ">")?;
        person.types("sleep 600 & echo \"{$!}\"")?;
        let sleeper = person.reads_digits("{", "}")?;
        let shell = handle.adopt("shell");
        for generation in 1..=3 {
            shell.dump(&[])?;
            shell.kill()?;
            drop(person);
            let restore = [ckpt.clone(), "restore".to_owned(), "shell".to_owned()];
            person = Person::sits_down(sandbox, &format!("restored-{generation}"), &restore)?;
            person.types(&format!("echo \"[$n]\"; g{generation}=yes"))?;
            let got = person.reads_digits("[", "]")?;
            if got != number {
                return Err(Failure(format!(
                    "generation {generation}: the variable was {number} and is {got}"
                )));
            }
            person.types("echo \"{$(jobs -p)}\"")?;
            let job_of_shell = person.reads_digits("{", "}")?;
            if job_of_shell != sleeper {
                return Err(Failure(format!("the background job was {sleeper} and is {job_of_shell}")));
            }
        }
        // Ctrl-C interrupts the foreground job and not the shell.
        person.types("sleep 600")?;
        let names = || -> Vec<String> {
            shell.processes().iter().filter_map(comm_of).filter(|name| name == "sleep").collect()
        };
        poll_until(Duration::from_secs(10), || (names().len() == 2).then_some(()))
            .ok_or_else(|| Failure::new("the shell starts no second sleep"))?;
        person.types("\u{3}")?;
        person.types("echo \"($((n + 0)))\"")?;
        let sum = person.reads_digits("(", ")")?;
        person.types("kill %1; exit 0")?;
        if sum == number { Ok(()) } else { Err(Failure(format!("expected {number}, got {sum}"))) }
    });
}

fn comm_of(process: &HostProcess) -> Option<String> {
    fs::read_to_string(format!("/proc/{}/comm", process.pid)).ok().map(|name| name.trim().to_owned())
}

/// Redis under the traffic of a client: the dump closes nothing, and a restored server has all data and serves new clients.
#[test]
fn redis_under_traffic() {
    use std::io::{BufRead, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
    const KEYS: u64 = 20_000;
    const SERVER: &str = "/usr/bin/redis-server";
    if !Path::new(SERVER).exists() {
        announce(&format!("skipped: redis: there is no {SERVER}; scripts/prepare installs it"));
        return;
    }
    let error = |what: &str, e: std::io::Error| Failure(format!("redis, {what}: {e}"));
    let connect = |port: u16| {
        let stream = TcpStream::connect(("127.0.0.1", port)).map_err(|e| error("connect", e))?;
        stream.set_read_timeout(Some(APP_DEADLINE)).map_err(|e| error("timeout", e))?;
        Ok::<_, Failure>(BufReader::new(stream))
    };
    /// One command and the first line of its answer, and of a bulk answer the second.
    fn ask(client: &mut BufReader<TcpStream>, line: &str) -> std::io::Result<String> {
        client.get_mut().write_all(format!("{line}\r\n").as_bytes())?;
        let mut answer = String::new();
        if client.read_line(&mut answer)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if answer.starts_with('$') && answer.trim() != "$-1" {
            answer.clear();
            client.read_line(&mut answer)?;
        }
        Ok(answer.trim_end().to_owned())
    }
    let expect = |what: &str, expected: &str, got: &str| {
        if expected == got { Ok(()) } else { Err(Failure(format!("{what}: expected {expected}, got {got}"))) }
    };
    each_user("app-redis", Users::Both, |sandbox| {
        let probe = TcpListener::bind("127.0.0.1:0").map_err(|e| error("a port", e))?;
        let port = probe.local_addr().map_err(|e| error("a port", e))?.port();
        drop(probe);
        let (number, work) = (port.to_string(), sandbox.work.to_string_lossy().into_owned());
        let command = [
            SERVER,
            "--port",
            &number,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            &work,
        ];
        let job = Job::run(sandbox, "redis", RunOptions::default(), &command.map(String::from))?;
        let mut client = poll_until(APP_DEADLINE, || connect(port).ok())
            .ok_or_else(|| Failure::new("redis does not listen"))?;
        for key in 0..KEYS {
            ask(&mut client, &format!("SET key:{key} value-{key}")).map_err(|e| error("SET", e))?;
        }
        // Counts up until it is told to stop, without a break across the dump.
        let (stop, counted) = (AtomicBool::new(false), AtomicU64::new(0));
        let traffic = std::thread::scope(|threads| {
            let counter = threads.spawn(|| {
                let mut own = connect(port)?;
                while !stop.load(SeqCst) {
                    let n = ask(&mut own, "INCR counter").map_err(|e| error("INCR", e))?;
                    expect("INCR", &format!(":{}", counted.load(SeqCst) + 1), &n)?;
                    counted.fetch_add(1, SeqCst);
                }
                Ok::<(), Failure>(())
            });
            let more = |than: u64| {
                poll_until(APP_DEADLINE, || {
                    (counted.load(SeqCst) > than || counter.is_finished()).then_some(())
                })
            };
            more(100);
            let before = counted.load(SeqCst);
            let dumped = job.dump(&["--tcp", "close"]);
            let after = counted.load(SeqCst);
            more(after + 100);
            stop.store(true, SeqCst);
            let ended = counter.join().unwrap_or_else(|_| Err(Failure::new("the client panicked")));
            dumped.and(ended).map(|()| (before, after))
        });
        let (before, after) = traffic?;
        expect("an old client", "+PONG", &ask(&mut client, "PING").map_err(|e| error("PING", e))?)?;
        job.kill()?;
        if ask(&mut client, "PING").is_ok() {
            return Err(Failure::new("a killed redis answers"));
        }
        job.restore(None, &[])?;
        let mut client = connect(port)?;
        for key in 0..KEYS {
            let value = ask(&mut client, &format!("GET key:{key}")).map_err(|e| error("GET", e))?;
            expect(&format!("key:{key}"), &format!("value-{key}"), &value)?;
        }
        let counter = ask(&mut client, "GET counter").map_err(|e| error("GET", e))?;
        // An increment may have been made whose answer the client had not read.
        match counter.parse::<u64>() {
            Ok(n) if (before..=after + 1).contains(&n) => {}
            _ => {
                let text = format!("the counter is {counter}, and was {before} to {after} during the dump");
                return Err(Failure(text));
            }
        }
        expect("SET", "+OK", &ask(&mut client, "SET new 1").map_err(|e| error("SET", e))?)?;
        // The connections that were not kept are gone: the server has noticed.
        poll_until(APP_DEADLINE, || {
            let mut own = connect(port).ok()?;
            own.get_mut().write_all(b"INFO clients\r\nQUIT\r\n").ok()?;
            let text: Vec<String> = own.lines().map_while(Result::ok).collect();
            text.iter().any(|line| line.trim_end() == "connected_clients:2").then_some(())
        })
        .ok_or_else(|| Failure::new("redis still has the old clients"))
    });
}
