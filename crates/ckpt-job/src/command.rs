// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starting the user's command as the main process of a job (pid 2).
//!
//! The command finds what it would find without ckpt: its fds, environment, signal dispositions, limits, working
//! directory; plus the interceptor in front of LD_PRELOAD. It has the capabilities that the user has, not those of init.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use ckpt_sys::{pty, spawn};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::init::{InitContext, StartError, StartErrorClass, Started};
use crate::spec::Work;

/// The `start` of [`crate::init_main`] for [`Work::Command`].
///
/// # Errors
/// If the process cannot be made; that the command cannot be executed shows when it is released.
pub fn start(context: &mut InitContext) -> Result<Started, StartError> {
    let Work::Command { argv, environment } = &context.spec.work else {
        return Err(StartError::new(StartErrorClass::Failure, "this job is not a command"));
    };
    let argv = argv.iter().map(|word| c_string(word)).collect::<Result<Vec<_>, _>>()?;
    let environment = with_interceptor(environment, context.spec.interceptor.as_deref())
        .iter()
        .map(|(name, value)| {
            let mut variable = name.clone();
            variable.push("=");
            variable.push(value);
            c_string(&variable)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let failed = |error: io::Error| StartError::io("starting the command", error);
    let slave = match &context.pty {
        Some(pty) => Some(pty::open_peer(pty.master.as_fd()).map_err(failed)?),
        None => None,
    };
    let plan = Plan::new(context, slave, argv, environment).map_err(failed)?;
    let program = plan.argv.first().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
    // The child waits for a byte before it becomes the command, and tells its errno if it cannot.
    let (go_read, go_write) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed(errno.into()))?;
    let (errno_read, errno_write) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed(errno.into()))?;
    let errno_write = out_of_the_way(context, errno_write.as_fd()).map_err(failed)?;
    let main_pid = spawn::fork_child(|| {
        let mut byte = [0];
        if !matches!(nix::unistd::read(&go_read, &mut byte), Ok(1)) {
            return 1;
        }
        let error = plan.execute();
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
        let _ = nix::unistd::write(&errno_write, &errno.to_ne_bytes());
        127
    })
    .map_err(failed)?;
    drop((go_read, errno_write));
    let release = move || {
        File::from(go_write).write_all(b"!").map_err(failed)?;
        let mut errno = Vec::new();
        File::from(errno_read).read_to_end(&mut errno).map_err(failed)?;
        match <[u8; 4]>::try_from(errno.as_slice()) {
            Err(_) => Ok(()),
            Ok(bytes) => Err(exec_failed(&program, io::Error::from_raw_os_error(i32::from_ne_bytes(bytes)))),
        }
    };
    Ok(Started {
        main_pid,
        main_exited: None,
        details: serde_json::Value::Null,
        fetching: None,
        release: Box::new(release),
    })
}

fn exec_failed(program: &str, error: io::Error) -> StartError {
    match error.raw_os_error() {
        Some(libc::ENOENT) if program.contains('/') && Path::new(program).exists() => StartError::new(
            StartErrorClass::CommandNotFound,
            format!(
                "{program}: its interpreter or loader does not exist (see its #! line, or: file {program})"
            ),
        ),
        Some(libc::ENOENT) if program.contains('/') => {
            StartError::new(StartErrorClass::CommandNotFound, format!("{program}: no such file"))
        }
        Some(libc::ENOENT) => {
            StartError::new(StartErrorClass::CommandNotFound, format!("{program}: command not found in PATH"))
        }
        _ => StartError::new(
            StartErrorClass::CommandNotExecutable,
            format!("{program}: cannot be executed: {error}"),
        ),
    }
}

fn c_string(text: &OsStr) -> Result<CString, StartError> {
    CString::new(text.as_bytes()).map_err(|_| {
        StartError::new(StartErrorClass::Failure, "a NUL byte in an argument or the environment")
    })
}

/// A copy under a number that the command gets no fd under: what the child needs until it executes.
fn out_of_the_way(context: &InitContext, fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut at_least = 3;
    loop {
        let copy = spawn::duplicate_above(fd, at_least)?;
        if !context.external.iter().any(|external| external.record.number == copy.as_raw_fd()) {
            return Ok(copy);
        }
        at_least = copy.as_raw_fd() + 1;
    }
}

/// Everything the child needs, allocated before the fork.
struct Plan {
    argv: Vec<CString>,
    environment: Vec<CString>,
    fds: Vec<(i32, i32)>,
    closed: Vec<i32>,
    ignored_signals: Vec<i32>,
    blocked_signals: spawn::SignalMask,
    open_files_limit: (u64, u64),
    drop_capabilities: bool,
    terminal: Option<OwnedFd>,
    /// Keeps the sources of `fds` open.
    _stand_ins: Vec<OwnedFd>,
}

impl Plan {
    fn new(
        context: &InitContext,
        terminal: Option<OwnedFd>,
        argv: Vec<CString>,
        environment: Vec<CString>,
    ) -> io::Result<Plan> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let mut fds: Vec<(i32, i32)> = context
            .external
            .iter()
            .map(|external| (external.fd.as_raw_fd(), external.record.number))
            .collect();
        let mut stand_ins = Vec::new();
        for standard in
            (0..3).filter(|fd| !context.external.iter().any(|external| external.record.number == *fd))
        {
            let stand_in = match (&terminal, &context.log) {
                (Some(terminal), _) => terminal.as_fd(),
                (None, Some(_)) if standard == 0 => null.as_fd(),
                (None, Some(log)) => log.as_fd(),
                (None, None) => continue,
            };
            let held = out_of_the_way(context, stand_in)?;
            fds.push((held.as_raw_fd(), standard));
            stand_ins.push(held);
        }
        let closed =
            context.closed.iter().copied().filter(|fd| !fds.iter().any(|(_, to)| to == fd)).collect();
        Ok(Plan {
            argv,
            environment,
            fds,
            closed,
            ignored_signals: context.ignored_signals.clone(),
            blocked_signals: context.blocked_signals,
            open_files_limit: context.open_files_limit,
            drop_capabilities: context.user_namespace,
            terminal,
            _stand_ins: stand_ins,
        })
    }

    fn execute(&self) -> io::Error {
        if let Err(errno) = nix::unistd::setsid() {
            return errno.into();
        }
        if let Some(terminal) = &self.terminal
            && let Err(error) = pty::become_controlling(terminal.as_fd())
        {
            return error;
        }
        spawn::become_command(&spawn::Command {
            argv: &self.argv,
            environment: &self.environment,
            fds: &self.fds,
            closed: &self.closed,
            ignored_signals: &self.ignored_signals,
            blocked_signals: self.blocked_signals,
            open_files_limit: Some(self.open_files_limit),
            drop_capabilities: self.drop_capabilities,
        })
    }
}

/// The environment with the interceptor in front of LD_PRELOAD.
fn with_interceptor(
    environment: &[(OsString, OsString)],
    interceptor: Option<&Path>,
) -> Vec<(OsString, OsString)> {
    let mut environment = environment.to_vec();
    let Some(interceptor) = interceptor else {
        return environment;
    };
    let mut value = interceptor.as_os_str().as_bytes().to_vec();
    match environment.iter_mut().find(|(name, _)| name == "LD_PRELOAD") {
        Some((_, present)) => {
            if !present.is_empty() {
                value.push(b':');
                value.extend_from_slice(present.as_bytes());
            }
            *present = OsString::from_vec(value);
        }
        None => environment.push(("LD_PRELOAD".into(), OsString::from_vec(value))),
    }
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interceptor_comes_first() {
        let preload = |environment: &[(&str, &str)]| {
            let environment: Vec<_> = environment.iter().map(|(a, b)| (a.into(), b.into())).collect();
            with_interceptor(&environment, Some(Path::new("/i.so")))
                .into_iter()
                .filter(|(name, _)| name == "LD_PRELOAD")
                .map(|(_, value)| value)
                .collect::<Vec<_>>()
        };
        assert_eq!(preload(&[("A", "b")]), ["/i.so"]);
        assert_eq!(preload(&[("LD_PRELOAD", "/x.so /y.so")]), ["/i.so:/x.so /y.so"]);
        assert_eq!(preload(&[("LD_PRELOAD", "")]), ["/i.so"]);
        assert_eq!(with_interceptor(&[], None), []);
    }
}
