// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where live jobs are found: one directory a job, below a directory for this host, boot and user.
//!
//! ```text
//! $XDG_RUNTIME_DIR/ckpt | /run/ckpt (root) | /tmp/ckpt-UID      0700, ours, no symlink
//!   <boot id>-<host name>/
//!     .changing            flock: held while entries are made or swept
//!     <job>/
//!       alive              flock: held by init as long as it lives
//!       lock               flock: held by whoever dumps the job
//!       init               pid of init, as its launcher sees it, and when that process started
//!       job.json           see JobRecord
//!       sock               init's socket
//!       exit               how the main process ended; kept for `ckpt wait` after the job's end
//!       saved              the checkpoint that a dump made before it ended the job
//!       end-requested      somebody sent a signal that ends programs, by way of init
//!     .supervised/         see supervision
//! ```
//! Nothing here is needed after a reboot, and nothing is read from another host's directory, so that the file system may
//! be shared. An entry whose `alive` nobody holds is a leftover: it is swept, unless it tells how an orderly ended job
//! ended; then it stays for a day or until its name is used again.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ckpt_abi::init_protocol::Kind;
use ckpt_sys::local_socket;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::ExitStatus;
use crate::channel::{self, ReceiveError};
use crate::name::JobName;
use crate::policy::Supervised;
use crate::spec::JobRecord;

/// How long the name of a job that is being killed is waited for: large memory takes a while to be given back.
const DYING: Duration = Duration::from_secs(10);
/// How long the exit status of an ended job is kept.
const KEEP_ENDED: Duration = Duration::from_secs(24 * 60 * 60);

/// Why the registry does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The directory is not safe to use.
    #[error("{}: {reason}; remove it or set XDG_RUNTIME_DIR to a directory of your own", .path.display())]
    Unsafe {
        /// Which directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A live job has the name.
    #[error(
        "a job named '{0}' is running already; choose another --name, or end it with: ckpt kill {0} KILL"
    )]
    NameTaken(JobName),
    /// A supervisor is about to start a job of that name again.
    #[error("job '{0}' has failed and its supervisor is about to start it again; end it with: ckpt kill {0}")]
    Recovering(JobName),
    /// Somebody supervises it.
    #[error("job '{0}' has a supervisor already; see: ckpt ps")]
    Supervised(JobName),
    /// Nobody asked for supervision.
    #[error(
        "job '{0}' is not supervised: it was started without --every, --dump-on, --dump-at, --dump-when or --recover"
    )]
    NotSupervised(JobName),
    /// There is no such job.
    #[error("no job named '{0}' is running here; see: ckpt ps")]
    NotFound(JobName),
    /// Another dump of the job is going on.
    #[error("job '{0}' is being dumped by another process; try again when that is done")]
    BeingDumped(JobName),
    /// A file operation failed.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> RegistryError + '_ {
    move |source| RegistryError::Io { path: path.to_owned(), source }
}

/// The registry of this user on this host since this boot.
#[derive(Clone, Debug)]
pub struct Registry {
    directory: PathBuf,
}

/// An entry made for a job about to start; its `alive` lock passes on to init. Dropped before the job has been committed,
/// it removes the entry.
#[derive(Debug)]
pub struct Claim {
    registry: Registry,
    name: JobName,
    /// The entry's directory.
    pub directory: File,
    /// Holds the lock.
    pub alive: File,
    /// Holds the lock of the supervisor that the job is to get.
    pub supervision: Option<File>,
    kept: bool,
}

/// Holds a job's dump lock until dropped.
#[derive(Debug)]
pub struct LockGuard {
    _file: File,
}

impl Registry {
    /// Opens the registry, making its directory if needed.
    ///
    /// # Errors
    /// [`RegistryError::Unsafe`] if someone else could have put things there.
    pub fn open() -> Result<Registry, RegistryError> {
        let uid = nix::unistd::geteuid().as_raw();
        let candidates = [
            std::env::var_os("XDG_RUNTIME_DIR").filter(|value| !value.is_empty()).map(PathBuf::from),
            (uid == 0).then(|| PathBuf::from("/run")),
        ];
        for parent in candidates.into_iter().flatten() {
            // A variable left over from `su` names a directory of somebody else: not usable, not an error.
            let ours = fs::metadata(&parent).is_ok_and(|status| status.is_dir() && status.uid() == uid);
            if ours && let Ok(registry) = Registry::open_below(parent.join("ckpt"), uid) {
                return Ok(registry);
            }
        }
        Registry::open_below(PathBuf::from(format!("/tmp/ckpt-{uid}")), uid)
    }

    /// Opens the registry below `base`, which must be a directory that `uid` alone may write to.
    ///
    /// # Errors
    /// As [`Registry::open`].
    pub fn open_below(base: PathBuf, uid: u32) -> Result<Registry, RegistryError> {
        private_directory(&base, uid)?;
        let boot_path = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(boot_path).map_err(at(boot_path))?;
        let host = nix::unistd::gethostname().map_err(|errno| at(Path::new("gethostname"))(errno.into()))?;
        let host: String = host
            .to_string_lossy()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') { c } else { '_' })
            .collect();
        let directory = base.join(format!("{}-{host}", boot.trim()));
        private_directory(&directory, uid)?;
        Ok(Registry { directory })
    }

    /// The directory of this host and boot.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of one job, whether it exists or not.
    pub fn entry(&self, name: &JobName) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn changing(&self) -> Result<File, RegistryError> {
        let path = self.directory.join(".changing");
        let file = open_lock(&path)?;
        file.lock().map_err(at(&path))?;
        Ok(file)
    }

    /// Makes the entry of a job about to start.
    ///
    /// # Errors
    /// [`RegistryError::NameTaken`] if a live job has the name, [`RegistryError::Recovering`] if a supervisor has it.
    pub fn claim(&self, name: &JobName, by: Claimant<'_>) -> Result<Claim, RegistryError> {
        let deadline = Instant::now() + DYING;
        loop {
            let changing = self.changing()?;
            match self.occupant(name)? {
                Occupant::None if !matches!(by, Claimant::Supervisor) && self.has_supervisor(name)? => {
                    // It may just be ending.
                    if Instant::now() >= deadline {
                        return Err(RegistryError::Recovering(name.clone()));
                    }
                    drop(changing);
                    std::thread::sleep(Duration::from_millis(10));
                }
                Occupant::None => {
                    let mut claim = self.make_entry(name)?;
                    match by {
                        Claimant::Supervisor => {}
                        Claimant::Launcher(None) => self.forget_supervision(name),
                        Claimant::Launcher(Some(job)) => match self.begin_supervision(job) {
                            Ok(lock) => claim.supervision = Some(lock),
                            Err(error) => {
                                // The claim takes the lock that is held here when it is dropped.
                                drop(changing);
                                return Err(error);
                            }
                        },
                    }
                    return Ok(claim);
                }
                Occupant::Dying if Instant::now() < deadline => {
                    drop(changing);
                    std::thread::sleep(Duration::from_millis(10));
                }
                Occupant::Dying | Occupant::Living => return Err(RegistryError::NameTaken(name.clone())),
            }
        }
    }

    fn make_entry(&self, name: &JobName) -> Result<Claim, RegistryError> {
        let path = self.entry(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path)(error)),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(&path).map_err(at(&path))?;
        let directory = File::open(&path).map_err(at(&path))?;
        let alive_path = path.join("alive");
        let alive = open_lock(&alive_path)?;
        alive.try_lock().map_err(|error| at(&alive_path)(error.into()))?;
        Ok(Claim {
            registry: self.clone(),
            name: name.clone(),
            directory,
            alive,
            supervision: None,
            kept: false,
        })
    }

    /// Who has a name. A job whose init was killed loses its lock and its socket before its last processes are gone.
    fn occupant(&self, name: &JobName) -> Result<Occupant, RegistryError> {
        let path = self.entry(name);
        if !path.exists() {
            return Ok(Occupant::None);
        }
        if self.is_dead(name)? {
            return Ok(if init_exists(&path) { Occupant::Dying } else { Occupant::None });
        }
        // An entry without job.json belongs to a job that is just starting.
        let served = init_answers(&path) || !path.join("job.json").exists();
        Ok(if served { Occupant::Living } else { Occupant::Dying })
    }

    /// Whether nobody holds the entry's `alive` lock.
    fn is_dead(&self, name: &JobName) -> Result<bool, RegistryError> {
        let path = self.entry(name).join("alive");
        match File::open(&path) {
            // Shared, so that two who look at the same time do not take each other for init.
            Ok(file) => match file.try_lock_shared() {
                Ok(()) => Ok(true),
                Err(TryLockError::WouldBlock) => Ok(false),
                Err(TryLockError::Error(error)) => Err(at(&path)(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// The names of all live jobs, sorted; leftovers are swept on the way.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn live_names(&self) -> Result<Vec<JobName>, RegistryError> {
        let _changing = self.changing()?;
        let mut live = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(at(&self.directory))? {
            let entry = entry.map_err(at(&self.directory))?;
            let Some(name) = entry.file_name().to_str().and_then(|text| text.parse::<JobName>().ok()) else {
                continue;
            };
            if !self.is_dead(&name)? {
                live.push(name);
                continue;
            }
            let path = entry.path();
            let age_of = |file: &str| {
                let modified = fs::metadata(path.join(file)).and_then(|status| status.modified());
                modified.map(|time| time.elapsed().unwrap_or_default())
            };
            // A supervisor has to see how its job ended.
            let told = ["exit", "saved"].iter().any(|file| age_of(file).is_ok_and(|age| age < KEEP_ENDED));
            if !told && !self.has_supervisor(&name)? {
                match fs::remove_dir_all(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path)(error)),
                    _ => {}
                }
            }
        }
        live.sort();
        self.sweep_supervision(&live)?;
        Ok(live)
    }

    /// Whether a job of this name lives.
    ///
    /// # Errors
    /// If its entry cannot be read.
    pub fn is_live(&self, name: &JobName) -> Result<bool, RegistryError> {
        Ok(self.entry(name).exists() && !self.is_dead(name)?)
    }

    /// What the entry says about a job, live or ended.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] without an entry.
    pub fn record(&self, name: &JobName) -> Result<JobRecord, RegistryError> {
        let path = self.entry(name).join("job.json");
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RegistryError::NotFound(name.clone()));
            }
            read => read.map_err(at(&path))?,
        };
        serde_json::from_slice(&bytes).map_err(|error| at(&path)(error.into()))
    }

    /// How the main process of a job ended, if it did.
    ///
    /// # Errors
    /// If the file is there and cannot be read.
    pub fn exit_status(&self, name: &JobName) -> Result<Option<ExitStatus>, RegistryError> {
        let path = self.entry(name).join("exit");
        let mut text = String::new();
        match File::open(&path).and_then(|mut file| file.read_to_string(&mut text)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path)(error)),
            Ok(_) => Ok(text.trim().parse().ok().and_then(ExitStatus::from_wait_status)),
        }
    }

    /// Notes that a dump saved a job and is about to end it.
    ///
    /// # Errors
    /// As write(2).
    pub fn write_saved(&self, name: &JobName, checkpoint: &str) -> Result<(), RegistryError> {
        let path = self.entry(name);
        write_entry_file(&path, "saved", checkpoint.as_bytes()).map_err(at(&path))
    }

    /// The checkpoint that was made of a job by the dump that ended it.
    pub fn saved(&self, name: &JobName) -> Option<String> {
        fs::read_to_string(self.entry(name).join("saved")).ok()
    }

    /// Whether somebody sent a job, by way of its init, a signal that ends programs.
    pub fn end_requested(&self, name: &JobName) -> bool {
        self.entry(name).join("end-requested").exists()
    }

    /// A name for this run of a job, live or ended: another run of the same name has another.
    pub fn run_of(&self, name: &JobName) -> Option<String> {
        fs::read_to_string(self.entry(name).join("init")).ok()
    }

    /// Takes the dump lock of a live job.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], [`RegistryError::BeingDumped`].
    pub fn lock_for_dump(&self, name: &JobName) -> Result<LockGuard, RegistryError> {
        if !self.is_live(name)? {
            return Err(RegistryError::NotFound(name.clone()));
        }
        let path = self.entry(name).join("lock");
        let file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => {
                // Of a dump that died before it could end the job.
                let _ = fs::remove_file(self.entry(name).join("saved"));
                Ok(LockGuard { _file: file })
            }
            Err(TryLockError::WouldBlock) => Err(RegistryError::BeingDumped(name.clone())),
            Err(TryLockError::Error(error)) => Err(at(&path)(error)),
        }
    }
}

/// Takes the dump lock of a live job of this user: one dump at a time.
///
/// # Errors
/// As [`Registry::lock_for_dump`].
pub fn lock_for_dump(name: &JobName) -> Result<LockGuard, RegistryError> {
    Registry::open()?.lock_for_dump(name)
}

/// Who claims a name.
#[derive(Clone, Copy, Debug)]
pub enum Claimant<'a> {
    /// Whoever starts a job, to be supervised or not.
    Launcher(Option<&'a Supervised>),
    /// The supervisor that has the name, for its job's next run.
    Supervisor,
}

enum Occupant {
    None,
    Dying,
    Living,
}

/// Whether there is an init behind the entry's socket. A killed one may still be listening, but does not answer; a busy one gets
/// the benefit of the doubt.
fn init_answers(entry: &Path) -> bool {
    let Ok(directory) = File::open(entry) else { return false };
    let Ok(socket) = local_socket::connect_in(directory.as_fd(), "sock".as_ref()) else { return false };
    if setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(2, 0)).is_err() {
        return true;
    }
    if channel::send(&socket, Kind::Status, 0, b"").is_err() {
        return false;
    }
    match channel::receive(socket.as_fd(), true) {
        Ok(message) => message.is_some(),
        Err(ReceiveError::Io(error)) => error.kind() == io::ErrorKind::WouldBlock,
        Err(ReceiveError::Header(_)) => true,
    }
}

/// Whether the process that was this entry's init still exists, be it on its way out. A zombie has nothing left in its pid
/// namespace and does not count.
fn init_exists(entry: &Path) -> bool {
    let Ok(text) = fs::read_to_string(entry.join("init")) else { return false };
    let Some((pid, started)) = text.trim().split_once(' ') else { return false };
    let Ok(pid) = pid.parse() else { return false };
    matches!(state_and_start(pid), Some((state, start)) if state != 'Z' && state != 'X' && start == started)
}

/// State and start time (clock ticks since boot, as text) of a process; see proc_pid_stat(5).
fn state_and_start(pid: i64) -> Option<(char, String)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?.chars().next()?;
    // Field 22; the state was field 3.
    Some((state, fields.nth(18)?.to_owned()))
}

impl Claim {
    /// Notes who init is, so that later its end can be waited for.
    pub(crate) fn write_init_pid(&self, pid: i64) -> Result<(), RegistryError> {
        let path = self.registry.entry(&self.name);
        let Some((_, start)) = state_and_start(pid) else { return Ok(()) };
        write_entry_file(&path, "init", format!("{pid} {start}\n").as_bytes()).map_err(at(&path))
    }

    /// The job lives now: the entry stays, and init alone holds `alive`.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.kept
            && let Ok(_changing) = self.registry.changing()
        {
            // What cannot be removed now will be swept later.
            let _ = fs::remove_dir_all(self.registry.entry(&self.name));
            if self.supervision.is_some() {
                self.registry.forget_supervision(&self.name);
            }
        }
    }
}

/// Puts a small file into an entry, whole or not at all.
///
/// # Errors
/// As write(2) and rename(2).
pub(crate) fn write_entry_file(directory: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let temporary = directory.join(format!("{name}.new"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    fs::rename(&temporary, directory.join(OsStr::new(name)))
}

pub(crate) fn open_lock(path: &Path) -> Result<File, RegistryError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(at(path))
}

/// Makes sure that `path` is a directory of `uid` that nobody else may enter; makes it if it is not there.
fn private_directory(path: &Path, uid: u32) -> Result<(), RegistryError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(path)(error)),
        _ => {}
    }
    let status = fs::symlink_metadata(path).map_err(at(path))?;
    let unsafe_because = |reason: String| Err(RegistryError::Unsafe { path: path.to_owned(), reason });
    if status.file_type().is_symlink() {
        unsafe_because("is a symbolic link".to_owned())
    } else if !status.is_dir() {
        unsafe_because("is not a directory".to_owned())
    } else if status.uid() != uid {
        unsafe_because(format!("belongs to uid {}, not to {uid}", status.uid()))
    } else if status.mode() & 0o077 != 0 {
        unsafe_because(format!("may be entered by others (mode {:04o})", status.mode() & 0o7777))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(test: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("ckpt-registry-{}-{test}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Scratch(path)
        }

        fn registry(&self) -> Registry {
            Registry::open_below(self.0.join("base"), nix::unistd::geteuid().as_raw()).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn name(text: &str) -> JobName {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_belongs_to_one_live_job() {
        let scratch = Scratch::new("taken");
        let registry = scratch.registry();
        let claim = registry.claim(&name("a"), Claimant::Launcher(None)).unwrap();
        assert!(matches!(
            registry.claim(&name("a"), Claimant::Launcher(None)),
            Err(RegistryError::NameTaken(_))
        ));
        assert_eq!(registry.live_names().unwrap(), [name("a")]);
        drop(claim);
        assert!(!registry.entry(&name("a")).exists());
        registry.claim(&name("a"), Claimant::Launcher(None)).unwrap();
    }

    #[test]
    fn leftovers_are_swept_and_ended_jobs_kept() {
        let scratch = Scratch::new("sweep");
        let registry = scratch.registry();
        registry.claim(&name("killed"), Claimant::Launcher(None)).unwrap().keep();
        registry.claim(&name("ended"), Claimant::Launcher(None)).unwrap().keep();
        write_entry_file(&registry.entry(&name("ended")), "exit", b"768\n").unwrap();
        let running = registry.claim(&name("running"), Claimant::Launcher(None)).unwrap();
        fs::create_dir(registry.entry(&name("half-made"))).unwrap();
        assert_eq!(registry.live_names().unwrap(), [name("running")]);
        assert!(!registry.entry(&name("killed")).exists());
        assert!(!registry.entry(&name("half-made")).exists());
        assert_eq!(registry.exit_status(&name("ended")).unwrap(), Some(ExitStatus::Exited(3)));
        let old = std::time::SystemTime::now() - KEEP_ENDED - Duration::from_secs(60);
        let exit = registry.entry(&name("ended")).join("exit");
        File::options().write(true).open(exit).unwrap().set_modified(old).unwrap();
        assert_eq!(registry.live_names().unwrap(), [name("running")]);
        assert!(!registry.entry(&name("ended")).exists());
        drop(running);
    }

    #[test]
    fn a_dying_job_is_waited_for() {
        let scratch = Scratch::new("dying");
        let registry = scratch.registry();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let claim = registry.claim(&name("a"), Claimant::Launcher(None)).unwrap();
        claim.write_init_pid(i64::from(child.id())).unwrap();
        claim.keep();
        assert!(init_exists(&registry.entry(&name("a"))));
        let (send, receive) = std::sync::mpsc::channel();
        let waiting = registry.clone();
        let waiter = std::thread::spawn(move || {
            send.send(waiting.claim(&name("a"), Claimant::Launcher(None)).map(Claim::keep)).unwrap()
        });
        assert!(receive.try_recv().is_err(), "claimed while init still exists");
        child.kill().unwrap();
        receive.recv().unwrap().unwrap();
        waiter.join().unwrap();
        child.wait().unwrap();
        assert!(!init_exists(&registry.entry(&name("a"))));
    }

    #[test]
    fn one_dump_at_a_time() {
        let scratch = Scratch::new("dump");
        let registry = scratch.registry();
        assert!(matches!(registry.lock_for_dump(&name("a")), Err(RegistryError::NotFound(_))));
        let _claim = registry.claim(&name("a"), Claimant::Launcher(None)).unwrap();
        let guard = registry.lock_for_dump(&name("a")).unwrap();
        assert!(matches!(registry.lock_for_dump(&name("a")), Err(RegistryError::BeingDumped(_))));
        drop(guard);
        registry.lock_for_dump(&name("a")).unwrap();
    }

    #[test]
    fn directories_of_others_are_refused() {
        let scratch = Scratch::new("unsafe");
        let uid = nix::unistd::geteuid().as_raw();
        let open = |path: PathBuf| Registry::open_below(path, uid).map(drop);
        let link = scratch.0.join("link");
        std::os::unix::fs::symlink(&scratch.0, &link).unwrap();
        assert!(matches!(open(link), Err(RegistryError::Unsafe { .. })));
        let wide = scratch.0.join("wide");
        fs::create_dir(&wide).unwrap();
        fs::set_permissions(&wide, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(open(wide), Err(RegistryError::Unsafe { .. })));
        let file = scratch.0.join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(open(file), Err(RegistryError::Unsafe { .. })));
        let ours = scratch.0.join("ours");
        open(ours.clone()).unwrap();
        assert!(matches!(Registry::open_below(ours, uid + 1).map(drop), Err(RegistryError::Unsafe { .. })));
    }
}
