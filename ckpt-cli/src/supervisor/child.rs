// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a supervisor starts: other commands of ckpt, and the user's probes.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::RawFd;
use std::process::{Child, Command, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Bytes of a command's output that are looked at.
const OUTPUT_BYTES: u64 = 64 * 1024;

/// A command that runs beside the supervisor, its output kept in memory: a pipe would have to be emptied all the time.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: File,
    stderr: File,
}

/// How a command ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status; 128 + n after signal n.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it said, or why it could not be started.
    pub stderr: String,
}

fn memory() -> io::Result<File> {
    Ok(File::from(memfd_create("ckpt-output", MFdFlags::MFD_CLOEXEC)?))
}

/// What was written to such a file, lossily.
pub fn content(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // Nothing in it is better than no supervision.
    let _ = file.rewind().and_then(|()| file.take(OUTPUT_BYTES).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Running {
    /// Starts it with an empty stdin; it dies with the supervisor if `dies_too`.
    ///
    /// # Errors
    /// As fork and exec.
    pub fn start(mut command: Command, dies_too: bool) -> io::Result<Running> {
        let (stdout, stderr) = (memory()?, memory()?);
        command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        ckpt_sys::spawn::clean_start(&mut command, Vec::new(), dies_too);
        Ok(Running { child: command.spawn()?, stdout, stderr })
    }

    /// How it ended, if it did.
    pub fn finished(&mut self) -> Option<Finished> {
        let status = self.child.try_wait().ok()??;
        Some(self.result(status))
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Finished {
        match self.child.wait() {
            Ok(status) => self.result(status),
            Err(error) => Finished { code: -1, stdout: String::new(), stderr: error.to_string() },
        }
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn result(&mut self, status: std::process::ExitStatus) -> Finished {
        Finished {
            code: code_of(status),
            stdout: content(&mut self.stdout),
            stderr: content(&mut self.stderr),
        }
    }
}

fn code_of(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Starts a job again by a command of ckpt that gets this process's descriptors, `pass` among them, for the job. The command is told by
/// `--by-supervisor FD`, put before `rest`, where its messages go.
pub fn launch(command: Command, rest: &[std::ffi::OsString], pass: &[RawFd]) -> Finished {
    try_launch(command, rest, pass).unwrap_or_else(|error| Finished {
        code: -1,
        stdout: String::new(),
        stderr: error.to_string(),
    })
}

fn try_launch(mut command: Command, rest: &[std::ffi::OsString], pass: &[RawFd]) -> io::Result<Finished> {
    use std::os::fd::AsRawFd as _;
    let mut messages = memory()?;
    command.arg("--by-supervisor").arg(messages.as_raw_fd().to_string()).args(rest);
    let mut all = pass.to_vec();
    all.push(messages.as_raw_fd());
    ckpt_sys::spawn::clean_start(&mut command, all, false);
    let code = code_of(command.status()?);
    Ok(Finished { code, stdout: String::new(), stderr: content(&mut messages) })
}
