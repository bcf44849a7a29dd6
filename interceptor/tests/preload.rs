// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interceptor, loaded into real programs: it is there after every way to start a program, and nothing
//! else differs from a start without it.
//!
//! Each comparison runs the same C program (`programs/*.c`) twice, without and with the library. The
//! library under test is the release build, the one that is installed; `CKPT_TEST_INTERCEPTOR` names
//! another one.

use ckpt_abi::interceptor as abi;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

/// What all tests share: the library, and the programs, built once.
struct Bench {
    directory: PathBuf,
    library: String,
}

impl Bench {
    fn get() -> &'static Bench {
        static BENCH: OnceLock<Bench> = OnceLock::new();
        BENCH.get_or_init(Bench::build)
    }

    fn build() -> Bench {
        let directory = std::env::temp_dir().join(format!("ckpt-interceptor-test-{}", std::process::id()));
        remove_leftovers(directory.parent().unwrap());
        std::fs::create_dir_all(&directory).unwrap();
        let compile = |source: &str, target: &str, flags: &[&str]| {
            let mut gcc = Command::new("gcc")
                .args(["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
                .arg(directory.join(target))
                .args(flags)
                .args(["-x", "c", "-"])
                .stdin(Stdio::piped())
                .spawn()
                .expect("gcc builds the test programs: install it (apt-get install gcc libc6-dev)");
            gcc.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
            assert!(gcc.wait().unwrap().success(), "gcc {target}");
        };
        // Part of the test itself: it may run as a user who cannot read the sources.
        compile(include_str!("programs/report.c"), "report", &[]);
        compile(include_str!("programs/start.c"), "start", &[]);
        compile(include_str!("programs/state.c"), "state", &[]);
        compile(include_str!("programs/no_heap.c"), "no_heap", &[]);
        // With the older of the two hash tables, which some libraries have.
        let counting = include_str!("programs/counting.c");
        compile(counting, "counting.so", &["-shared", "-fPIC", "-Wl,--hash-style=sysv"]);
        compile(include_str!("programs/early.c"), "early.so", &["-shared", "-fPIC"]);
        let script = directory.join("script");
        let report = directory.join("report");
        std::fs::write(&script, format!("exec {} script \"$@\"\n", report.display())).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(directory.join("not_executable"), "").unwrap();
        Bench { library: library().to_str().unwrap().to_owned(), directory }
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).to_str().unwrap().to_owned()
    }
}

/// Removes what earlier runs of this test built: a static is never dropped, so none removes its own.
fn remove_leftovers(parent: &Path) {
    for entry in std::fs::read_dir(parent).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let Some(pid) = name.strip_prefix("ckpt-interceptor-test-") else { continue };
        if !Path::new("/proc").join(pid).exists() {
            // Another user's stays.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The shared library; built now, in the profile that is installed, unless the environment names one.
fn library() -> PathBuf {
    if let Some(path) = std::env::var_os("CKPT_TEST_INTERCEPTOR") {
        return std::fs::canonicalize(path).expect("CKPT_TEST_INTERCEPTOR names the library");
    }
    // As cargo sets them when it runs a test, and not when it built it: the checkout may have moved since.
    let [cargo, package] = ["CARGO", "CARGO_MANIFEST_DIR"].map(|name| {
        std::env::var_os(name)
            .unwrap_or_else(|| panic!("run by cargo test, or with CKPT_TEST_INTERCEPTOR set"))
    });
    let output = Command::new(cargo)
        .args(["build", "--release", "--package", "ckpt-interceptor", "--message-format=json"])
        .current_dir(package)
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo build");
    let messages = String::from_utf8(output.stdout).unwrap();
    let end = messages.find(abi::LIBRARY_NAME).expect("cargo names the library") + abi::LIBRARY_NAME.len();
    let start = messages[..end].rfind('"').unwrap() + 1;
    PathBuf::from(&messages[start..end])
}

/// One run of `start`.
struct Start<'a> {
    way: &'a str,
    environment: &'a str,
    program: String,
    arguments: Vec<String>,
    own: Vec<(&'a str, String)>,
    preload: Option<String>,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Outcome {
    lines: Vec<String>,
    stderr: String,
    code: Option<i32>,
}

impl<'a> Start<'a> {
    fn new(way: &'a str, environment: &'a str) -> Self {
        let bench = Bench::get();
        Start {
            way,
            environment,
            program: bench.path("report"),
            arguments: vec![],
            own: vec![("PATH", bench.path("")), ("HOME", "/".into())],
            preload: Some(bench.library.clone()),
        }
    }

    fn run_with(&self, preload: Option<&str>) -> Outcome {
        let mut command = Command::new(Bench::get().path("start"));
        command.arg(self.way).arg(self.environment).arg(&self.program).args(&self.arguments);
        command.env_clear().envs(self.own.iter().map(|(name, value)| (name, value)));
        if let Some(preload) = preload {
            command.env("LD_PRELOAD", preload);
        }
        let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
        Outcome {
            lines: String::from_utf8(stdout).unwrap().lines().map(str::to_owned).collect(),
            stderr: String::from_utf8(stderr).unwrap(),
            code: status.code(),
        }
    }

    fn plain(&self) -> Outcome {
        self.run_with(None)
    }

    fn intercepted(&self) -> Outcome {
        self.run_with(self.preload.as_deref())
    }

    /// The new program is as it would be without the library, but for LD_PRELOAD and the library itself.
    fn assert_kept(&self) {
        let (plain, intercepted) = (self.plain(), self.intercepted());
        let what = format!("{} with {:?} and {} arguments", self.way, self.environment, self.arguments.len());
        assert_eq!(plain.code, Some(0), "{what}: {plain:?}");
        assert!(plain.lines.contains(&"mapped 0".into()), "{what}: {plain:?}");
        let added = format!("env LD_PRELOAD={}", Bench::get().library);
        let mut expected = plain.clone();
        expected
            .lines
            .iter_mut()
            .filter(|line| *line == "mapped 0")
            .for_each(|line| *line = "mapped 1".into());
        assert_eq!(
            expected.lines.iter().filter(|line| *line == "mapped 1").count(),
            intercepted.count(&added),
            "{what}"
        );
        let mut actual = intercepted.clone();
        actual.lines.retain(|line| *line != added);
        assert_eq!(expected, actual, "{what}");
    }

    /// The new program has exactly this environment.
    fn assert_environment(&self, mapped: bool, expected: &[&str]) {
        let outcome = self.intercepted();
        let environment: Vec<_> = outcome.lines.iter().filter_map(|line| line.strip_prefix("env ")).collect();
        assert_eq!(environment, expected, "{} with {:?}", self.way, self.environment);
        assert_eq!(outcome.count(if mapped { "mapped 1" } else { "mapped 0" }), 1, "{outcome:?}");
        assert_eq!((outcome.stderr.as_str(), outcome.code), ("", Some(0)));
    }
}

impl Outcome {
    fn count(&self, line: &str) -> usize {
        self.lines.iter().filter(|other| *other == line).count()
    }
}

const WAYS: [&str; 16] = [
    "execve",
    "execv",
    "execvp",
    "execvpe",
    "execveat",
    "execveat_fd",
    "fexecve",
    "execl",
    "execlp",
    "execle",
    "posix_spawn",
    "posix_spawnp",
    "posix_spawn_attributes",
    "vfork",
    "thread_small_stack",
    "signal_handler",
];

#[test]
fn every_way_keeps_it_with_an_empty_environment() {
    for way in WAYS {
        Start::new(way, "empty").assert_kept();
    }
}

#[test]
fn every_way_keeps_it_without_an_environment_at_all() {
    // execv and its like read environ, which posix allows to be null.
    for way in WAYS.into_iter().filter(|way| *way != "fexecve") {
        Start::new(way, "null").assert_kept();
    }
    // libc's fexecve refuses it.
    let refused = Start::new("fexecve", "null");
    assert_eq!(refused.plain().lines, [format!("failed {}", libc::EINVAL)]);
    assert_eq!(refused.plain(), refused.intercepted());
}

#[test]
fn every_way_hands_on_arguments_and_environment() {
    for way in WAYS {
        let mut start = Start::new(way, "A=1|LD_PRELOADED=no|B=two words|CKPT_NO_INTERCEPTOR=0|LD_PRELOA=x");
        start.arguments = ["", "a b", "LD_PRELOAD=x", "-x"].map(String::from).to_vec();
        start.assert_kept();
    }
}

#[test]
fn a_direct_system_call_is_not_seen() {
    // The negative of the tests above: they fail when the library does nothing.
    let start = Start::new("syscall", "A=1");
    assert_eq!(start.plain(), start.intercepted());
    assert_eq!(start.intercepted().count("mapped 0"), 1);
}

#[test]
fn execl_with_any_number_of_arguments() {
    for way in ["execl", "execlp", "execle"] {
        // None at all is beyond what libc counts; for execle it then misses the environment, and we do not.
        let none = format!("{way}_none");
        Start::new(&none, "A=1")
            .assert_environment(true, &["A=1", &format!("LD_PRELOAD={}", Bench::get().library)]);
        // With the program's name: 1 to 6, and 12; five are in registers.
        for count in [0, 1, 2, 3, 4, 5, 11] {
            let mut start = Start::new(way, "A=1");
            start.arguments = (0..count).map(|i| format!("argument {i}")).collect();
            start.assert_kept();
        }
    }
}

#[test]
fn an_inherited_environment_is_untouched() {
    let library = &Bench::get().library;
    for way in WAYS {
        let start = Start::new(way, "inherit");
        let outcome = start.intercepted();
        assert_eq!(
            outcome.count(&format!("env LD_PRELOAD={library}")),
            outcome.count("mapped 1"),
            "{outcome:?}"
        );
        assert!(outcome.count("mapped 1") > 0, "{way}: {outcome:?}");
        assert_eq!(start.plain().lines.len() + outcome.count("mapped 1"), outcome.lines.len());
    }
}

#[test]
fn other_preloads_are_kept() {
    let bench = Bench::get();
    let (library, counting) = (&bench.library, bench.path("counting.so"));
    let check = |old: String, expected: String| {
        let environment = format!("A=1|LD_PRELOAD={old}|B=2");
        Start::new("execve", &environment)
            .assert_environment(true, &["A=1", &format!("LD_PRELOAD={expected}"), "B=2"]);
    };
    check(String::new(), library.clone());
    check(counting.clone(), format!("{library}:{counting}"));
    check(format!("{counting}:{library}"), format!("{counting}:{library}"));
    check(format!("{counting} {library}"), format!("{counting} {library}"));
    // One whose name only begins like ours is another one.
    Start::new("execve", &format!("LD_PRELOAD={counting}|LD_PRELOAD={counting}")).assert_environment(
        true,
        &[&format!("LD_PRELOAD={counting}"), &format!("LD_PRELOAD={library}:{counting}")],
    );
}

#[test]
fn another_library_that_interposes_exec_still_does() {
    let bench = Bench::get();
    for preload in ["LIBRARY:OTHER", "OTHER:LIBRARY"] {
        for way in ["execve", "execl", "execle", "execv"] {
            let mut start = Start::new(way, "empty");
            start.preload =
                Some(preload.replace("LIBRARY", &bench.library).replace("OTHER", &bench.path("counting.so")));
            let outcome = start.intercepted();
            assert_eq!(outcome.count("mapped 1"), 1, "{way}: {outcome:?}");
            // Ahead of us it sees only what is called by its name.
            if preload.starts_with("LIBRARY") || way == "execve" {
                assert_eq!(outcome.stderr, "counting\n", "{way} {preload}");
            }
        }
    }
}

#[test]
fn the_opt_out_keeps_it_out() {
    let bench = Bench::get();
    let (library, counting) = (&bench.library, bench.path("counting.so"));
    for way in ["execve", "execvp", "execle", "posix_spawn"] {
        let out = &*format!("{}=1", abi::OPT_OUT_VARIABLE);
        Start::new(way, &format!("{out}|A=1")).assert_environment(false, &[out, "A=1"]);
        Start::new(way, &format!("A=1|LD_PRELOAD={library}|{out}")).assert_environment(false, &["A=1", out]);
        Start::new(way, &format!("LD_PRELOAD={library}:{counting}|{out}"))
            .assert_environment(false, &[&format!("LD_PRELOAD={counting}"), out]);
    }
}

#[test]
fn a_library_that_is_gone_is_not_named_to_the_loader() {
    let bench = Bench::get();
    for (index, environment) in ["A=1", "inherit", "LIST"].into_iter().enumerate() {
        let copy = bench.path(&format!("gone-{index}-{}", abi::LIBRARY_NAME));
        std::fs::copy(&bench.library, &copy).unwrap();
        let list = format!("LD_PRELOAD={}:{copy}", bench.path("counting.so"));
        let mut start = Start::new("execve", if environment == "LIST" { &list } else { environment });
        start.preload = Some(copy.clone());
        // Its execs are completed while the file is there…
        assert_eq!(start.intercepted().count("mapped 1"), 1);
        // … and not any more when it is not; the loader would say so on stderr.
        start.own.push(("REMOVE_FIRST", copy.clone()));
        let outcome = start.intercepted();
        assert_eq!((outcome.count("mapped 0"), outcome.stderr.as_str()), (1, ""), "{outcome:?}");
        let preload: Vec<_> =
            outcome.lines.iter().filter(|line| line.contains("LD_PRELOAD")).cloned().collect();
        let expected: Vec<_> = (environment == "LIST")
            .then(|| format!("env LD_PRELOAD={}", bench.path("counting.so")))
            .into_iter()
            .collect();
        assert_eq!(preload, expected);
    }
}

#[test]
fn path_search_is_that_of_libc() {
    let bench = Bench::get();
    let path = format!("PATH=/nonexistent:{}", bench.path(""));
    for way in ["execvp", "execvpe", "execlp", "posix_spawnp"] {
        let mut start = Start::new(way, &path);
        start.program = "report".into();
        start.assert_kept();
        // A script without `#!` is given to the shell by these, and by these only.
        start.program = "script".into();
        start.arguments = vec!["one".into(), "two words".into()];
        if way == "posix_spawnp" {
            assert_eq!(start.plain(), start.intercepted());
            assert_eq!(start.plain().lines, [format!("failed {}", libc::ENOEXEC)]);
        } else {
            let outcome = start.intercepted();
            assert_eq!(outcome.count("mapped 1"), 1, "{way}: {outcome:?}");
            let arguments = |outcome: &Outcome| -> Vec<String> {
                outcome.lines.iter().filter(|line| line.starts_with("arg ")).cloned().collect()
            };
            assert_eq!(arguments(&outcome)[1..], ["arg script", "arg one", "arg two words"][..]);
            assert_eq!(arguments(&outcome), arguments(&start.plain()));
        }
    }
}

#[test]
fn failures_are_those_of_libc() {
    let bench = Bench::get();
    let mut seen = std::collections::BTreeSet::new();
    for way in WAYS.into_iter().filter(|way| !matches!(*way, "vfork" | "signal_handler")) {
        for program in ["missing", "not_executable", "report/below", "script", ""] {
            for environment in ["empty", "inherit", "A=1"] {
                let mut start = Start::new(way, environment);
                start.program = bench.path(program);
                let (plain, intercepted) = (start.plain(), start.intercepted());
                if plain.lines.iter().any(|line| line.starts_with("failed ")) {
                    assert_eq!(plain, intercepted, "{way} of {program:?} with {environment:?}");
                    seen.extend(plain.lines);
                } else {
                    // The shell ran the script.
                    assert_eq!(program, "script", "{way}: {plain:?}");
                }
            }
        }
    }
    let too_big = Start::new("e2big", "empty");
    assert_eq!(too_big.plain(), too_big.intercepted());
    seen.extend(too_big.intercepted().lines);
    for error in [libc::ENOENT, libc::EACCES, libc::ENOTDIR, libc::ENOEXEC, libc::E2BIG] {
        assert!(seen.contains(&format!("failed {error}")), "no case had errno {error}: {seen:?}");
    }
}

#[test]
fn the_longest_command_line_still_fits() {
    // Where LD_PRELOAD itself is what makes the environment too big, the program is started without it.
    let start = |bytes: usize| {
        let mut start = Start::new("limit", "empty");
        start.arguments = vec![bytes.to_string()];
        start
    };
    let fits = |outcome: &Outcome| outcome.lines.iter().any(|line| line.starts_with("mapped"));
    let (mut longest, mut too_long) = (1000, 200_000);
    assert!(fits(&start(longest).plain()) && !fits(&start(too_long).plain()));
    while too_long - longest > 4 {
        let middle = (longest + too_long) / 2;
        if fits(&start(middle).plain()) { longest = middle } else { too_long = middle }
    }
    let outcome = start(longest).intercepted();
    assert_eq!(outcome, start(longest).plain());
    assert_eq!(start(longest - 1000).intercepted().count("mapped 1"), 1);
    assert_eq!(start(too_long + 4).intercepted().lines, [format!("failed {}", libc::E2BIG)]);
}

#[test]
fn large_environments() {
    Start::new("execve", "big:3000").assert_kept();
    Start::new("vfork", "big:1000").assert_kept();
    Start::new("posix_spawn", "big:3000").assert_kept();
    // Above the limit of what is taken from the stack it is handed on as it is.
    let start = Start::new("execve", "big:20000");
    assert_eq!(start.plain(), start.intercepted());
}

#[test]
fn a_program_started_before_our_constructor_ran() {
    let bench = Bench::get();
    let output = Command::new("/bin/true")
        .env_clear()
        .env("LD_PRELOAD", format!("{}:{}", bench.library, bench.path("early.so")))
        .env("EARLY_PROGRAM", bench.path("report"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.ends_with(&format!("env LD_PRELOAD={}\nmapped 1\n", bench.library)), "{text:?}");
}

#[test]
fn real_programs_with_a_cleaned_environment() {
    let bench = Bench::get();
    let report = bench.path("report");
    for command in [
        format!("env -i {report}"),
        format!("exec -c {report}"),
        format!("env -i /bin/sh -c 'unset LD_PRELOAD; {report}'"),
        format!("env -i xargs -n1 {report} < /etc/hostname"),
    ] {
        let run = |preload: &str| {
            let output = Command::new("/bin/bash")
                .args(["-c", &command])
                .env_clear()
                .env("PATH", "/usr/bin:/bin")
                .env("LD_PRELOAD", preload)
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert!(run("").ends_with("mapped 0\n"), "{command}");
        assert!(run(&bench.library).ends_with("mapped 1\n"), "{command}");
    }
}

#[test]
fn loading_leaves_nothing_behind() {
    let bench = Bench::get();
    let run = |program: &str, preload: &str| {
        Command::new(bench.path(program))
            .env_clear()
            .env("LD_PRELOAD", preload)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let plain = run("state", "");
    assert!(plain.status.success() && plain.stdout.len() > 100);
    assert_eq!(plain, run("state", &bench.library));
    assert_eq!(run("no_heap", "").status.code(), Some(0));
    assert_eq!(run("no_heap", &bench.library).status.code(), Some(0), "memory was allocated before main");
}

#[test]
fn exported_symbols_and_what_it_needs() {
    let output =
        Command::new("objdump").arg("-T").arg(&Bench::get().library).output().expect("objdump (binutils)");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut defined = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("0000")) {
        let name = line.split_whitespace().last().unwrap();
        if line.contains("*UND*") {
            assert!(
                !line.contains("GLIBC_") || line.contains("(GLIBC_2.2.5)"),
                "not in the oldest libc: {line}"
            );
        } else {
            defined.push(name);
        }
    }
    defined.sort_unstable();
    let mut expected = vec![
        "ckpt_control",
        "ckpt_interceptor_critical_begin",
        "ckpt_interceptor_critical_end",
        "ckpt_interceptor_dump_now",
        "ckpt_interceptor_hooks_register",
        "ckpt_interceptor_hooks_unregister",
        "ckpt_interceptor_restored",
        "execl",
        "execle",
        "execlp",
        "execv",
        "execve",
        "execveat",
        "execvp",
        "execvpe",
        "fexecve",
        "inotify_add_watch",
        "io_destroy",
        "io_setup",
        "io_submit",
        "posix_spawn",
        "posix_spawnp",
        "sendmmsg",
        "sendmsg",
        "syscall",
        "vfork",
    ];
    expected.sort_unstable();
    assert_eq!(defined, expected);
}

/// A `cat` that has answered: it is past the dynamic loader.
struct Cat {
    child: Child,
}

impl Cat {
    fn new(mut command: Command) -> Self {
        let mut child = command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"ready\n").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Cat { child }
    }

    fn preloaded() -> Self {
        let mut command = Command::new("/usr/bin/env");
        command.arg(format!("LD_PRELOAD={}", Bench::get().library)).arg("/bin/cat");
        Cat::new(command)
    }

    /// Address of the control word, as a dumper finds it.
    fn control_address(&self) -> Option<u64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap();
        let line = maps.lines().find(|line| {
            line.ends_with(abi::LIBRARY_NAME) && line.split_whitespace().nth(2) == Some("00000000")
        })?;
        let base = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        let file = std::fs::read(&line[line.find('/').unwrap()..]).unwrap();
        Some(base + symbol_value(&file, abi::CONTROL_SYMBOL)?)
    }

    fn memory(&self) -> std::fs::File {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/mem", self.child.id()))
            .unwrap()
    }

    fn control(&self) -> Option<abi::ControlSnapshot> {
        let mut bytes = vec![0; abi::CONTROL_SIZE_BYTES];
        self.memory().read_exact_at(&mut bytes, self.control_address()?).unwrap();
        let (before, watches) = (&bytes[32..256], &bytes[256..320]);
        let zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        assert!(
            zero(before) && zero(&bytes[320..]),
            "no field after the generation is set but those of the tables"
        );
        assert!(!zero(watches), "the tables are not announced");
        abi::decode_control(&bytes)
    }
}

impl Drop for Cat {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// `st_value` of a symbol in `.dynsym` of a 64-bit ELF file.
fn symbol_value(file: &[u8], name: &str) -> Option<u64> {
    let number = |at: usize, bytes: usize| -> u64 {
        file[at..at + bytes].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let (sections, size, count) =
        (number(0x28, 8) as usize, number(0x3a, 2) as usize, number(0x3c, 2) as usize);
    const SHT_DYNSYM: u64 = 11;
    let header = (0..count).map(|i| sections + i * size).find(|at| number(at + 4, 4) == SHT_DYNSYM)?;
    let strings = number(sections + number(header + 0x28, 4) as usize * size + 0x18, 8) as usize;
    let (offset, length) = (number(header + 0x18, 8) as usize, number(header + 0x20, 8) as usize);
    (0..length / 24).map(|i| offset + i * 24).find_map(|symbol| {
        let start = strings + number(symbol, 4) as usize;
        let end = start + file[start..].iter().position(|byte| *byte == 0)?;
        (&file[start..end] == name.as_bytes()).then(|| number(symbol + 8, 8))
    })
}

#[test]
fn the_control_word_is_found_from_outside() {
    let ready = abi::ControlSnapshot {
        state: abi::STATE_READY,
        generation: 0,
        gate: abi::GATE_OPEN,
        gate_deadline_ns: 0,
        in_flight: [0; abi::IN_FLIGHT_COUNT],
    };
    let cat = Cat::preloaded();
    assert_eq!(cat.control(), Some(ready));
    assert_eq!(cat.control_address().unwrap() % abi::CONTROL_SIZE_BYTES as u64, 0, "a page of its own");
    assert_eq!(Cat::new(Command::new("/bin/cat")).control(), None, "found without the library");
}

#[test]
fn the_control_word_belongs_to_one_process() {
    let (one, other) = (Cat::preloaded(), Cat::preloaded());
    one.memory().write_all_at(&41u64.to_le_bytes(), one.control_address().unwrap() + 24).unwrap();
    assert_eq!(one.control().unwrap().generation, 41);
    assert_eq!(other.control().unwrap().generation, 0);
}

#[test]
fn the_control_word_is_there_after_a_cleaned_exec() {
    // What `start` executes with nothing in its environment.
    let mut command = Command::new("/usr/bin/env");
    command.arg(format!("LD_PRELOAD={}", Bench::get().library)).arg(Bench::get().path("start"));
    command.args(["execl", "empty", "/bin/cat"]);
    assert_eq!(Cat::new(command).control().map(|control| control.state), Some(abi::STATE_READY));
}
