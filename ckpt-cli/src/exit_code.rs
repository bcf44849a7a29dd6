// SPDX-License-Identifier: MIT OR Apache-2.0
//! ckpt's own exit codes.
//!
//! `run`, `wait`, `attach` and `restore` (in the foreground) end with the job's exit status: the main process's code, or 128 + n if signal n
//! killed it. Everything that is ckpt's own lies where programs rarely are:
//!
//! | code | meaning |
//! |-----:|---------|
//! | 0 | done (or the job's status) |
//! | 1 | a failure without a code of its own, in commands that do not end with a job's status |
//! | 2 | wrong usage |
//! | 112 | not found: no such job, checkpoint or file |
//! | 113 | conflict: the name, a port, a file or a checkpoint is in use, a file has changed, another dump is going on |
//! | 114 | refused: the job holds something that ckpt does not support; it goes on |
//! | 115 | corrupt: the image is damaged, or made by a newer ckpt |
//! | 116 | host cannot: this host or kernel lacks or forbids something, see `ckpt doctor` |
//! | 117 | no space, or a store that cannot be written to |
//! | 118 | a dump saved the job and ended it |
//! | 119 | late: a process did not come to a safe point in time (`dump --strict`); the job goes on |
//! | 125 | ckpt itself failed, in commands that end with a job's status |
//! | 126 | the command of `run` was found and could not be executed |
//! | 127 | the command of `run` was not found |

use std::process;

use ckpt_engine::error::{DumpError, RestoreError};
use ckpt_image::store::StoreError;
use ckpt_image::{ReadError, WriteError};
use ckpt_job::client::ClientError;
use ckpt_job::name::InvalidName;
use ckpt_job::{ExitStatus, LaunchError, RegistryError, StartErrorClass};

use crate::commands;

/// An exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitCode(pub u8);

impl ExitCode {
    /// Done.
    pub const SUCCESS: ExitCode = ExitCode(0);
    /// A failure without a code of its own.
    pub const FAILURE: ExitCode = ExitCode(1);
    /// Wrong usage; clap uses the same.
    pub const USAGE: ExitCode = ExitCode(2);
    /// No such job, checkpoint or file.
    pub const NOT_FOUND: ExitCode = ExitCode(112);
    /// Something is in use or has changed.
    pub const CONFLICT: ExitCode = ExitCode(113);
    /// Not supported.
    pub const REFUSED: ExitCode = ExitCode(114);
    /// The image is damaged or too new.
    pub const CORRUPT: ExitCode = ExitCode(115);
    /// This host lacks or forbids something.
    pub const HOST_CANNOT: ExitCode = ExitCode(116);
    /// No space, or a read-only store.
    pub const NO_SPACE: ExitCode = ExitCode(117);
    /// A dump saved the job and ended it.
    pub const SAVED: ExitCode = ExitCode(118);
    /// A process did not come to a safe point in time.
    pub const LATE: ExitCode = ExitCode(119);
    /// ckpt itself failed, in a command that ends with a job's status.
    pub const OWN_FAILURE: ExitCode = ExitCode(125);
    /// The command could not be executed.
    pub const NOT_EXECUTABLE: ExitCode = ExitCode(126);
    /// The command was not found.
    pub const COMMAND_NOT_FOUND: ExitCode = ExitCode(127);

    /// The code that stands for how a main process ended.
    pub fn of_job(status: ExitStatus) -> ExitCode {
        ExitCode(status.shell_code())
    }

    /// The code for an error; `fallback` for what has no code of its own.
    pub fn of_error(error: &anyhow::Error, fallback: ExitCode) -> ExitCode {
        error.chain().find_map(of_cause).unwrap_or(fallback)
    }
}

/// Options that do not go together, where the parser cannot tell.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub &'static str);

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<ExitCode> {
    if let Some(error) = cause.downcast_ref::<LaunchError>() {
        return match error {
            LaunchError::Registry(error) => of_registry(error),
            LaunchError::Start { class, .. } => of_class(*class),
            LaunchError::Interrupted(signal) => Some(ExitCode(128u8.saturating_add(*signal as i32 as u8))),
            _ => None,
        };
    }
    if let Some(error) = cause.downcast_ref::<ClientError>() {
        return match error {
            ClientError::Registry(error) => of_registry(error),
            ClientError::NoStatus(_) => Some(ExitCode(128 + libc::SIGKILL as u8)),
            _ => None,
        };
    }
    if let Some(error) = cause.downcast_ref::<RegistryError>() {
        return of_registry(error);
    }
    if let Some(error) = cause.downcast_ref::<DumpError>() {
        return commands::dump::code_of(error);
    }
    if let Some(error) = cause.downcast_ref::<commands::copies::CopyFailed>() {
        return error.code.map(ExitCode);
    }
    if let Some(error) = cause.downcast_ref::<RestoreError>() {
        return commands::restore::code_of(error);
    }
    if let Some(error) = cause.downcast_ref::<ReadError>() {
        return commands::verify::code_of(error);
    }
    if let Some(error) = cause.downcast_ref::<StoreError>() {
        return of_store(error);
    }
    (cause.is::<InvalidName>() || cause.is::<Usage>()).then_some(ExitCode::USAGE)
}

fn of_store(error: &StoreError) -> Option<ExitCode> {
    match error {
        StoreError::NoSuchJob { .. } | StoreError::NoSuchCheckpoint { .. } => Some(ExitCode::NOT_FOUND),
        StoreError::Exists { .. }
        | StoreError::Busy { .. }
        | StoreError::Needed { .. }
        | StoreError::ParentGone { .. }
        | StoreError::Changed { .. } => Some(ExitCode::CONFLICT),
        StoreError::Read(error) => commands::verify::code_of(error),
        StoreError::Write(WriteError::Io { source, .. }) => is_storage(source).then_some(ExitCode::NO_SPACE),
        StoreError::Write(_) => None,
        StoreError::BadJobName { .. } | StoreError::BadSpec { .. } | StoreError::ReservedName { .. } => {
            Some(ExitCode::USAGE)
        }
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Some(ExitCode::NOT_FOUND)
        }
        StoreError::Io { source, .. } => is_storage(source).then_some(ExitCode::NO_SPACE),
        StoreError::Unfinished { .. } => Some(ExitCode::CORRUPT),
        StoreError::NotDurable { .. } | StoreError::NoDefaultRoot => None,
    }
}

/// A full, read-only or forbidden file system.
pub fn is_storage(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::PermissionDenied
    )
}

fn of_registry(error: &RegistryError) -> Option<ExitCode> {
    match error {
        RegistryError::NotFound(_) | RegistryError::NotSupervised(_) => Some(ExitCode::NOT_FOUND),
        RegistryError::NameTaken(_)
        | RegistryError::BeingDumped(_)
        | RegistryError::Recovering(_)
        | RegistryError::Supervised(_) => Some(ExitCode::CONFLICT),
        _ => None,
    }
}

/// The code for a failed start; `None` for a failure without a code of its own.
pub fn of_class(class: StartErrorClass) -> Option<ExitCode> {
    match class {
        StartErrorClass::Failure => None,
        StartErrorClass::CommandNotFound => Some(ExitCode::COMMAND_NOT_FOUND),
        StartErrorClass::CommandNotExecutable => Some(ExitCode::NOT_EXECUTABLE),
        StartErrorClass::HostCannot => Some(ExitCode::HOST_CANNOT),
        StartErrorClass::Corrupt => Some(ExitCode::CORRUPT),
        StartErrorClass::Conflict => Some(ExitCode::CONFLICT),
        StartErrorClass::Refused => Some(ExitCode::REFUSED),
        StartErrorClass::NotFound => Some(ExitCode::NOT_FOUND),
        StartErrorClass::Storage => Some(ExitCode::NO_SPACE),
    }
}

impl From<ExitCode> for process::ExitCode {
    fn from(code: ExitCode) -> process::ExitCode {
        process::ExitCode::from(code.0)
    }
}
