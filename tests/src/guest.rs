// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest: a small C program of `guests/` that sets one kind of state up and checks it (see `guests/guest.h`).

use std::{fs, path::PathBuf, time::Duration};

use crate::{Failure, Outcome, process::poll_until, sandbox::Sandbox, stage::stage, user::Users};

/// How long a guest may take to set itself up or to check itself.
pub const GUEST_DEADLINE: Duration = Duration::from_secs(30);

/// What to run, and how.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The source is `guests/<source>.c`.
    pub source: String,
    /// Arguments after the work directory.
    pub args: Vec<String>,
    /// For whom it is meant.
    pub users: Users,
    /// Whether it is linked statically.
    pub is_static: bool,
    /// Why it cannot be linked statically, if so.
    pub no_static: Option<&'static str>,
    /// Whether the job runs with the interceptor.
    pub interceptor: bool,
    /// Whether the job gets a terminal.
    pub tty: bool,
    /// Whether its state changes while it waits for go, so that two fingerprints differ by themselves.
    pub in_motion: bool,
    /// Words in a dump's refusal that say this version of ckpt doesn't support what the guest is about.
    pub may_be_refused: Option<&'static str>,
    /// A command under which `ckpt run` is started, such as unshare.
    pub run_under: Vec<String>,
}

impl Guest {
    /// The guest of `guests/<source>.c`.
    pub fn new(source: &str) -> Guest {
        Guest {
            source: source.to_owned(),
            args: Vec::new(),
            users: Users::Both,
            is_static: false,
            no_static: None,
            interceptor: true,
            tty: false,
            in_motion: false,
            may_be_refused: None,
            run_under: Vec::new(),
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: &str) -> Guest {
        self.args.push(arg.to_owned());
        self
    }

    /// It needs root.
    pub fn only_root(mut self) -> Guest {
        self.users = Users::OnlyRoot;
        self
    }

    /// It needs to be without privilege.
    pub fn only_plain(mut self) -> Guest {
        self.users = Users::OnlyPlain;
        self
    }

    /// Link it statically.
    pub fn linked_statically(mut self) -> Guest {
        self.is_static = true;
        self
    }

    /// It cannot be linked statically, and why.
    pub fn never_static(mut self, why: &'static str) -> Guest {
        self.no_static = Some(why);
        self
    }

    /// Run the job without the interceptor.
    pub fn without_interceptor(mut self) -> Guest {
        self.interceptor = false;
        self
    }

    /// Run the job on a terminal of its own.
    pub fn on_tty(mut self) -> Guest {
        self.tty = true;
        self
    }

    /// Its state changes while it waits (timers run, positions move): no comparison of fingerprints.
    pub fn in_motion(mut self) -> Guest {
        self.in_motion = true;
        self
    }

    /// A dump may refuse it with a message that contains `words`: the test is skipped then, and says so.
    pub fn may_be_refused(mut self, words: &'static str) -> Guest {
        self.may_be_refused = Some(words);
        self
    }

    /// Start `ckpt run`, and only that, under this command.
    pub fn run_under(mut self, words: &[&str]) -> Guest {
        self.run_under = words.iter().copied().map(String::from).collect();
        self
    }

    /// A name for directories and messages.
    pub fn label(&self) -> String {
        let mut label = self.source.clone();
        for arg in &self.args {
            label.push('-');
            label.extend(arg.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }));
        }
        label
    }

    /// Builds it and gives its command line for `sandbox`.
    ///
    /// # Errors
    /// The compiler's.
    pub fn command(&self, sandbox: &Sandbox) -> Outcome<Vec<String>> {
        let binary: PathBuf = stage().compile(&self.source, self.is_static)?;
        let mut words =
            vec![binary.to_string_lossy().into_owned(), sandbox.work.to_string_lossy().into_owned()];
        words.extend(self.args.iter().cloned());
        Ok(words)
    }
}

/// What a guest said about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All is as it was.
    Ok,
    /// Something is not; with the guest's words.
    Fail(String),
    /// This host lacks what the guest is about.
    Skip(String),
}

/// The two ends of the talk with a guest, through files in its work directory.
pub struct Talk<'a> {
    sandbox: &'a Sandbox,
}

impl<'a> Talk<'a> {
    /// The talk with the guest in `sandbox`.
    pub fn with(sandbox: &'a Sandbox) -> Talk<'a> {
        Talk { sandbox }
    }

    /// Waits until the guest says ready and gives its nonce; `Err(Ok(verdict))` if it spoke a verdict instead.
    ///
    /// # Errors
    /// The guest did neither in time.
    pub fn wait_ready(&self) -> Outcome<Result<String, Verdict>> {
        poll_until(GUEST_DEADLINE, || {
            if let Some(verdict) = self.verdict(None) {
                return Some(Err(verdict));
            }
            fs::read_to_string(self.sandbox.work.join("ready")).ok().map(Ok)
        })
        .ok_or_else(|| Failure(format!("the guest did not say ready within {GUEST_DEADLINE:?}")))
    }

    /// Tells the guest to go on and check itself.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn go(&self) -> Outcome<()> {
        self.sandbox.record("(go)");
        fs::write(self.sandbox.work.join("go"), "")
            .map_err(|error| Failure(format!("cannot create go: {error}")))
    }

    /// The verdict, if it stands. With a nonce, a verdict of another run of the guest is a failure.
    pub fn verdict(&self, nonce: Option<&str>) -> Option<Verdict> {
        let text = fs::read_to_string(self.sandbox.work.join("result")).ok()?;
        let mut words = text.trim_end().splitn(3, ' ');
        let (verdict, got, why) =
            (words.next()?, words.next().unwrap_or(""), words.next().unwrap_or("").to_owned());
        if let Some(nonce) = nonce
            && nonce != got
        {
            return Some(Verdict::Fail(format!(
                "another guest answered: its nonce is {got}, not {nonce}: {text}"
            )));
        }
        Some(match verdict {
            "OK" => Verdict::Ok,
            "SKIP" => Verdict::Skip(why),
            _ => Verdict::Fail(why),
        })
    }

    /// Waits for the verdict; `None` when `deadline` passed.
    pub fn wait_verdict(&self, nonce: &str, deadline: Duration) -> Option<Verdict> {
        poll_until(deadline, || self.verdict(Some(nonce)))
    }

    /// Whether the log tells one whole life: begin first, end last, every step once, all of the same nonce.
    ///
    /// # Errors
    /// It doesn't; the message says where.
    pub fn check_log(&self, nonce: &str) -> Outcome<()> {
        let path = self.sandbox.work.join("log");
        let text = fs::read_to_string(&path).map_err(|error| Failure(format!("the guest's log: {error}")))?;
        let lines: Vec<&str> = text.lines().collect();
        let mut seen = std::collections::HashSet::new();
        for line in &lines {
            if line.rsplit(' ').next() != Some(nonce) {
                return Err(Failure(format!("the guest's log has a line of another run: {line:?}")));
            }
            if !seen.insert(line) {
                return Err(Failure(format!("the guest's log has a step twice: {line:?}")));
            }
        }
        let (begin, end) = (format!("begin {nonce}"), format!("end {nonce}"));
        if lines.first() != Some(&begin.as_str()) || lines.last() != Some(&end.as_str()) {
            return Err(Failure(format!("the guest's log does not reach from begin to end:\n{text}")));
        }
        Ok(())
    }
}

/// Tells the guest to go on, and waits until it has found all well.
///
/// # Errors
/// It hasn't; the message has its verdict.
pub fn passes(sandbox: &Sandbox, nonce: &str) -> Outcome<()> {
    let talk = Talk::with(sandbox);
    talk.go()?;
    match talk.wait_verdict(nonce, GUEST_DEADLINE) {
        Some(Verdict::Ok) => Ok(()),
        other => Err(Failure(format!("the guest says: {other:?}"))),
    }
}
