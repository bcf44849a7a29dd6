// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt restore --copies`: several jobs of one checkpoint, all or none.
//!
//! Each copy is restored by a `ckpt restore` of its own. The stdin of all of them is the *gate*: a socket on which each copy's init
//! says that all is rebuilt ([`READY`]), and then waits to be told to commit ([`GO`]). All are told by one write. If this process
//! ends before that, the gate closes, and no copy runs.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use ckpt_abi::init_protocol::KillScope;
use ckpt_engine::error::RestoreError;
use ckpt_engine::restore::plan;
use ckpt_engine::restore::read::Image;
use ckpt_image::store::{Restoration, Store};
use ckpt_job::{JobName, Registry, RegistryError};
use ckpt_sys::task::pidfd_open;
use ckpt_sys::{Errno, Pid};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::args::{FilesPolicy, RestoreArgs};
use crate::commands::{restore, store_directory};
use crate::exit_code::ExitCode;
use crate::report::Report;

/// A copy is rebuilt and stands.
const READY: u8 = b'r';
/// It is to run.
const GO: u8 = b'g';
/// Whether the kernel merges equal pages of memory that may be merged (Documentation/admin-guide/mm/ksm.rst).
const KSM_RUN: &str = "/sys/kernel/mm/ksm/run";

#[derive(serde::Serialize)]
struct Outcome {
    copies: Vec<serde_json::Value>,
    /// Whether the copies come to share memory.
    memory_is_shared: bool,
    /// Why they do not.
    not_shared_because: Option<String>,
}

struct Copy {
    name: JobName,
    child: Child,
    errors: File,
}

/// Runs the command.
pub fn run(args: &RestoreArgs, number: u32, report: &Report) -> Result<ExitCode> {
    let store = store_directory(&args.store)?;
    let spec = args.checkpoint.to_str().context("the checkpoint's name is not valid UTF-8")?;
    let path = Store::open(&store)?.resolve(spec)?;
    let image = Image::open(&path)?;
    let prefix = args.name.as_ref().map_or_else(|| image.job.name.clone(), ToString::to_string);
    let names = (1..=number)
        .map(|n| format!("{prefix}-{n}").parse::<JobName>().map_err(|e| anyhow::anyhow!("{prefix}-{n}: {e}")))
        .collect::<Result<Vec<_>>>()?;
    let registry = Registry::open()?;
    for name in &names {
        if registry.is_live(name)? {
            bail!(RegistryError::NameTaken(name.clone()));
        }
    }
    if number > 1 {
        let conflicts = plan::copy_conflicts(&image)?;
        if !conflicts.0.is_empty() {
            return Err(RestoreError::Conflicts(conflicts).into());
        }
    }
    let not_shared_because = why_not_shared(&image)?;
    let mut noted = restore::note(&path, &image, number, report)?;
    drop(image);
    // Without a note none of them may have memory that another one has, either.
    let first = noted.as_ref().map_or(2, Restoration::number);
    let shared = not_shared_because;
    let ended = run_noted(args, number, names, (first, &mut noted), &prefix, shared, report);
    if let (Err(_), Some(noted)) = (&ended, noted) {
        noted.undo();
    }
    ended
}

fn run_noted(
    args: &RestoreArgs,
    number: u32,
    names: Vec<JobName>,
    (first, noted): (u32, &mut Option<Restoration>),
    prefix: &str,
    not_shared_because: Option<String>,
    report: &Report,
) -> Result<ExitCode> {
    let (gate, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .map_err(io::Error::from)
        .context("making a gate")?;
    let mut gate = File::from(gate);
    let mut copies = Vec::new();
    for (place, name) in (1..).zip(names) {
        let numbers = [place, number, first.saturating_add(place - 1)];
        match start(args, name, numbers, not_shared_because.is_none(), &theirs) {
            Ok(copy) => copies.push(copy),
            Err(error) => {
                drop(gate);
                end(copies);
                return Err(error);
            }
        }
    }
    drop(theirs);
    if let Err(failed) = wait_until_ready(&mut gate, &copies, prefix, report) {
        drop(gate);
        return Err(give_up(copies, failed));
    }
    // From here on they may run.
    *noted = None;
    // At once: a pipe or socket takes so few bytes whole.
    let told = gate.write_all(&vec![GO; copies.len()]);
    drop(gate);
    if let Err(error) = told {
        end(copies);
        return Err(error).context("telling the copies to run");
    }
    let mut said = Vec::new();
    for at in 0..copies.len() {
        let copy = &mut copies[at];
        let mut text = String::new();
        let read = copy.child.stdout.take().map_or(Ok(0), |mut out| out.read_to_string(&mut text));
        let done = copy.child.wait().is_ok_and(|status| status.success());
        match serde_json::from_str(&text) {
            Ok(value) if done && read.is_ok() => said.push(value),
            _ => return Err(give_up(copies, at)),
        }
    }
    report.clear();
    for copy in &mut copies {
        for line in what_it_said(copy).lines() {
            report.note(&format!("{}: {}", copy.name, line.strip_prefix("ckpt: ").unwrap_or(line)));
        }
    }
    if args.json {
        let memory_is_shared = not_shared_because.is_none();
        report.print_json(&Outcome { copies: said, memory_is_shared, not_shared_because })?;
    } else {
        let names: Vec<String> = copies.iter().map(|copy| copy.name.to_string()).collect();
        report.print(&format!("{number} copies run: {}", names.join(" ")));
        match &not_shared_because {
            None => report.note("the kernel merges equal pages of their memory as it finds them"),
            Some(why) => report.note(&format!("their memory is not shared: {why}")),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until all copies are rebuilt; or tells which one has ended before.
fn wait_until_ready(gate: &mut File, copies: &[Copy], prefix: &str, report: &Report) -> Result<(), usize> {
    let mut ready = 0;
    // A pidfd is readable when its process has ended; without one the end would not be noticed.
    let ends: Vec<OwnedFd> = copies
        .iter()
        .enumerate()
        .map(|(at, copy)| pidfd_open(Pid::from_raw(copy.child.id() as i32)).map_err(|_| at))
        .collect::<Result<_, _>>()?;
    while ready < copies.len() {
        report.progress(&format!("{prefix}: {ready} of {} copies are rebuilt", copies.len()));
        let mut polled = vec![PollFd::new(gate.as_fd(), PollFlags::POLLIN)];
        polled.extend(ends.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        if !matches!(poll(&mut polled, PollTimeout::NONE), Ok(_) | Err(Errno::EINTR)) {
            return Err(0);
        }
        let happened: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        drop(polled);
        if let Some(at) = happened[1..].iter().position(|ended| *ended) {
            return Err(at);
        }
        if happened[0] {
            let mut bytes = [0; 64];
            let n = gate.read(&mut bytes).map_err(|_| 0usize)?;
            ready += bytes[..n].iter().filter(|byte| **byte == READY).count();
        }
    }
    Ok(())
}

fn why_not_shared(image: &Image) -> Result<Option<String>> {
    if plan::is_mergeable_by_itself(image)? {
        return Ok(Some("the application asks for merging of its own accord (MADV_MERGEABLE)".to_owned()));
    }
    Ok(match std::fs::read_to_string(KSM_RUN) {
        Ok(text) if text.trim() == "1" => None,
        Ok(_) => Some(format!("merging of equal pages is off; root turns it on: echo 1 > {KSM_RUN}")),
        Err(error) => Some(format!("this kernel does not merge equal pages ({KSM_RUN}: {error})")),
    })
}

/// `numbers`: which copy it is, of how many, and how many times the checkpoint has been restored with it.
fn start(
    args: &RestoreArgs,
    name: JobName,
    numbers: [u32; 3],
    mergeable: bool,
    gate: &OwnedFd,
) -> Result<Copy> {
    let memfd = nix::sys::memfd::memfd_create(c"ckpt-copy", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map_err(io::Error::from)
        .context("making a place for messages")?;
    let errors = File::from(memfd);
    let mut command = Command::new(std::env::current_exe().context("finding ckpt itself")?);
    command.args(["--quiet", "restore", "--detach", "--json"]).arg("--name").arg(name.as_str());
    command.arg(if mergeable { "--as-copy=mergeable" } else { "--as-copy=alone" });
    command.arg("--copy-number").arg(numbers.map(|n| n.to_string()).join(","));
    if args.lazy {
        command.arg("--lazy");
    }
    if let Some(tcp) = args.tcp {
        command.arg("--tcp").arg(tcp.word());
    }
    if let Some(store) = &args.store.store {
        command.arg("--store").arg(store);
    }
    if let Some(files) = args.files {
        command.arg("--files").arg(match files {
            FilesPolicy::Keep => "keep",
            FilesPolicy::Rollback => "rollback",
            FilesPolicy::Refuse => "refuse",
        });
    }
    for path in &args.allow_changed {
        command.arg("--allow-changed").arg(path);
    }
    let child = command
        .arg("--")
        .arg(&args.checkpoint)
        .stdin(Stdio::from(gate.try_clone().context("handing on the gate")?))
        .stdout(Stdio::piped())
        .stderr(Stdio::from(errors.try_clone().context("keeping messages")?))
        .spawn()
        .with_context(|| format!("starting copy {name}"))?;
    Ok(Copy { name, child, errors })
}

fn what_it_said(copy: &mut Copy) -> String {
    use std::io::Seek as _;
    let mut text = String::new();
    let _ = copy.errors.rewind().and_then(|()| copy.errors.read_to_string(&mut text));
    text
}

/// Ends all copies, and says what one of them said.
fn give_up(mut copies: Vec<Copy>, failed: usize) -> anyhow::Error {
    let mut copy = copies.remove(failed);
    end(copies);
    // The one that failed ends by itself.
    let code = copy.child.wait().ok().and_then(|status| status.code());
    let (name, said) = (copy.name.clone(), what_it_said(&mut copy));
    let why = said.trim();
    let why = why.strip_prefix("ckpt: ").unwrap_or(why);
    let message = format!("copy {name} could not be restored, and no other was left running: {why}");
    CopyFailed { message, code: code.and_then(|code| u8::try_from(code).ok()) }.into()
}

/// Ends copies: those that have not been told to go see the gate closed, the others are killed.
fn end(copies: Vec<Copy>) {
    let mut children: Vec<(JobName, Child)> =
        copies.into_iter().map(|copy| (copy.name, copy.child)).collect();
    for (name, child) in &mut children {
        if child.wait().is_ok_and(|status| status.success()) {
            let _ = ckpt_job::kill(name, libc::SIGKILL as u8, KillScope::Everything);
        }
    }
}

/// One of the copies failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CopyFailed {
    message: String,
    /// With which status.
    pub code: Option<u8>,
}

/// The gate that `ckpt restore --as-copy` was started with.
pub fn own_gate() -> Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned().context("taking the gate of a copy")
}

/// In a copy's init: says that it stands, and waits until it may run.
///
/// # Errors
/// If it may not, as another copy has failed or whoever restores is gone.
pub fn wait_at_gate(gate: BorrowedFd<'_>) -> Result<()> {
    let mut gate = File::from(gate.try_clone_to_owned().context("taking the gate of a copy")?);
    let mut byte = [0];
    let told = gate.write_all(&[READY]).and_then(|()| gate.read(&mut byte));
    if !matches!(told, Ok(1)) || byte[0] != GO {
        bail!("it was to run only together with the other copies, and these do not run");
    }
    Ok(())
}
