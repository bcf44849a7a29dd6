// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where supervised jobs are found: beside the registry's entries, as an entry does not outlive one run of its job.
//!
//! ```text
//! .supervised/<job>/
//!   lock         flock: held by the supervisor as long as it lives
//!   job.json     see Supervised
//!   state.json   see SupervisorState
//! ```
//! A job that has such a directory whose lock nobody holds has lost its supervisor. A directory without a supervisor and without a
//! live job is a leftover and is swept.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::name::JobName;
use crate::policy::Supervised;
use crate::registry::{Registry, RegistryError, at, open_lock, write_entry_file};

/// Something that a supervisor did or saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since the epoch.
    pub unix: u64,
    /// What, for a person.
    pub what: String,
}

/// What a supervisor says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SupervisorState {
    /// Its pid.
    pub pid: i32,
    /// When the next periodic dump is due, in seconds since the epoch.
    pub next_dump_unix: Option<u64>,
    /// Dumps that succeeded.
    pub dumps: u64,
    /// Dumps that failed.
    pub failed_dumps: u64,
    /// The checkpoint that the last dump made.
    pub last_checkpoint: Option<String>,
    /// How often the job was started again.
    pub recoveries: u64,
    /// When the job is started again, in seconds since the epoch, if it has ended.
    pub restart_unix: Option<u64>,
    /// The run of the job whose end is the end, as [`Registry::run_of`] names it.
    pub final_run: Option<String>,
    /// The latest events, oldest first.
    pub events: Vec<Event>,
}

/// What is known of a job's supervision.
#[derive(Clone, Debug, Serialize)]
pub struct Supervision {
    /// Whether its supervisor lives.
    pub supervised: bool,
    /// What the supervisor says of itself, or said last.
    pub state: SupervisorState,
}

impl Registry {
    fn supervised_root(&self) -> PathBuf {
        self.directory().join(".supervised")
    }

    /// The directory of a job's supervision, whether it exists or not.
    pub fn supervised_directory(&self, name: &JobName) -> PathBuf {
        self.supervised_root().join(name)
    }

    /// Enters a job about to start as supervised; the file returned holds the lock.
    pub(crate) fn begin_supervision(&self, job: &Supervised) -> Result<File, RegistryError> {
        let path = self.supervised_directory(&job.name);
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(at(&path))?;
        let lock =
            self.lock_supervision(&job.name)?.ok_or_else(|| RegistryError::Recovering(job.name.clone()))?;
        let json = serde_json::to_vec_pretty(job).map_err(|error| at(&path)(error.into()))?;
        write_entry_file(&path, "job.json", &json).map_err(at(&path))?;
        self.write_supervisor_state(&job.name, &SupervisorState::default())?;
        Ok(lock)
    }

    /// Takes the lock of a job's supervisor; `None` if somebody has it.
    ///
    /// # Errors
    /// If the job is not to be supervised.
    pub fn lock_supervision(&self, name: &JobName) -> Result<Option<File>, RegistryError> {
        let path = self.supervised_directory(name).join("lock");
        let file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(at(&path)(error)),
        }
    }

    /// Whether a job's supervisor lives.
    ///
    /// # Errors
    /// If its lock cannot be tried.
    pub fn has_supervisor(&self, name: &JobName) -> Result<bool, RegistryError> {
        let path = self.supervised_directory(name).join("lock");
        match File::open(&path) {
            // Shared, so that two who look at the same time do not take each other for it.
            Ok(file) => match file.try_lock_shared() {
                Ok(()) => Ok(false),
                Err(fs::TryLockError::WouldBlock) => Ok(true),
                Err(fs::TryLockError::Error(error)) => Err(at(&path)(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// What is known of a job's supervision; `None` if nobody asked for any.
    ///
    /// # Errors
    /// If its lock cannot be tried.
    pub fn supervision(&self, name: &JobName) -> Result<Option<Supervision>, RegistryError> {
        if !self.supervised_directory(name).join("job.json").exists() {
            return Ok(None);
        }
        let supervised = self.has_supervisor(name)?;
        let state = fs::read(self.supervised_directory(name).join("state.json")).unwrap_or_default();
        Ok(Some(Supervision { supervised, state: serde_json::from_slice(&state).unwrap_or_default() }))
    }

    /// What a supervisor was asked to do.
    ///
    /// # Errors
    /// [`RegistryError::NotSupervised`] if nobody asked for supervision.
    pub fn supervised(&self, name: &JobName) -> Result<Supervised, RegistryError> {
        let path = self.supervised_directory(name).join("job.json");
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RegistryError::NotSupervised(name.clone()));
            }
            read => read.map_err(at(&path))?,
        };
        serde_json::from_slice(&bytes).map_err(|error| at(&path)(error.into()))
    }

    /// Tells what a supervisor does.
    ///
    /// # Errors
    /// As write(2).
    pub fn write_supervisor_state(
        &self,
        name: &JobName,
        state: &SupervisorState,
    ) -> Result<(), RegistryError> {
        let path = self.supervised_directory(name);
        let json = serde_json::to_vec_pretty(state).map_err(|error| at(&path)(error.into()))?;
        write_entry_file(&path, "state.json", &json).map_err(at(&path))
    }

    /// The supervision of a job is over. The caller holds its lock.
    ///
    /// # Errors
    /// If the registry cannot be locked.
    pub fn end_supervision(&self, name: &JobName) -> Result<(), RegistryError> {
        let _changing = self.changing()?;
        self.forget_supervision(name);
        Ok(())
    }

    /// Removes a job's directory. The caller holds `.changing`.
    pub(crate) fn forget_supervision(&self, name: &JobName) {
        // What cannot be removed now is swept later.
        let _ = fs::remove_dir_all(self.supervised_directory(name));
    }

    /// The jobs that somebody supervises, sorted, also those that are waiting to be started again.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn supervised_names(&self) -> Result<Vec<JobName>, RegistryError> {
        let mut names = self.supervised_entries()?;
        names.retain(|name| self.has_supervisor(name).unwrap_or(false));
        Ok(names)
    }

    fn supervised_entries(&self) -> Result<Vec<JobName>, RegistryError> {
        let root = self.supervised_root();
        let entries = match fs::read_dir(&root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(at(&root))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<JobName>().ok());
        let mut names: Vec<JobName> = names.collect();
        names.sort();
        Ok(names)
    }

    /// Removes what dead supervisors of dead jobs left. The caller holds `.changing`.
    pub(crate) fn sweep_supervision(&self, live: &[JobName]) -> Result<(), RegistryError> {
        for name in self.supervised_entries()? {
            if !live.contains(&name) && !self.has_supervisor(&name)? {
                self.forget_supervision(&name);
            }
        }
        // Empty only when nobody is supervised.
        let _ = fs::remove_dir(self.supervised_root());
        Ok(())
    }
}
