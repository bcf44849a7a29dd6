// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes of every record's body, compared with those in `golden/records-v1.txt`.
//!
//! Images outlive the ckpt that wrote them, so a record struct must not change its encoding under the same version. When this
//! test fails, either undo the change, or give the record a new version and keep decoding the old one. Then, and for new
//! kinds, write the new lines by
//!
//! ```sh
//! CKPT_GOLDEN_WRITE=1 cargo test -p ckpt-engine --test golden_records
//! ```
//!
//! which leaves lines of older versions as they are. Lines of a version that no release has written may be replaced.
//!
//! Format: one sample a line, `KIND NUMBER VERSION SAMPLE HEX`. Samples have different values in all fields, so that
//! fields that trade places are noticed.

use ckpt_engine::kind::Kind;
use ckpt_engine::model::file::FileStat;
use ckpt_engine::resource::fd::epoll::Watch;
use ckpt_engine::resource::fd::file_lock::Family;
use ckpt_engine::resource::fd::pipe::PipeContent;
use ckpt_engine::resource::fd::table::Entry;
use ckpt_engine::resource::fd::{
    Opened, char_device, directory, epoll, eventfd, external, fifo, file_lock, inotify, pipe, regular_file,
    signalfd, table, tcp_socket, timerfd, tty, unix_socket,
};
use ckpt_engine::resource::memory_map::{Backing, MappedFile, VmaRecord};
use ckpt_engine::resource::shared_object::Origin;
use ckpt_engine::resource::signal::Action;
use ckpt_engine::resource::timer::PosixTimer;
use ckpt_engine::resource::{
    aio, attribute, credential, fs_context, job, limit, memory_map, pending_signal, process, rseq,
    saved_file, scheduler, shared_object, shm_file, signal, sysv_semaphore, thread, timer,
};
use ckpt_image::codec::{self, Decode, Encode};
use std::collections::BTreeMap;
use std::fmt::{Debug, Write};
use std::path::{Path, PathBuf};

/// Kind, version and sample name, and the encoded body.
struct Sample {
    kind: Kind,
    version: u16,
    sample: &'static str,
    /// Last part of the type's path.
    record: &'static str,
    body: Vec<u8>,
}

impl Sample {
    fn key(&self) -> String {
        format!("{} {} {} {}", self.kind.name(), self.kind as u16, self.version, self.sample)
    }
}

fn sample<T>(kind: Kind, version: u16, sample: &'static str, record: &T) -> Sample
where
    T: Encode + Decode<()> + PartialEq + Debug,
{
    let body = codec::encode(record).unwrap();
    assert_eq!(&codec::decode::<T>(&body).unwrap(), record, "{} does not survive encoding", kind.name());
    let record = std::any::type_name::<T>().rsplit("::").next().unwrap();
    Sample { kind, version, sample, record, body }
}

fn counting<const N: usize, T: From<u8>>(first: u8) -> [T; N] {
    std::array::from_fn(|i| T::from(first + i as u8))
}

fn opened() -> Opened {
    Opened {
        pid: 0x0102_0304,
        flags: 0x0506_0708,
        position: 0x090a_0b0c_0d0e_0f10,
        signal_owner: (17, 18, 19),
    }
}

fn stat() -> FileStat {
    FileStat {
        dev: 0x21,
        ino: 0x22,
        mode: 0x23,
        nlink: 0x24,
        rdev: 0x25,
        size: 0x26,
        mtime_ns: 0x27,
        ctime_ns: -0x28,
    }
}

fn vma(start: u64, locked: Option<u32>, backing: Backing) -> VmaRecord {
    VmaRecord {
        start,
        end: start + 0x1000,
        prot: 0x31,
        flags: 0x32,
        may_write: true,
        has_pages: false,
        locked,
        advice: vec![0x33, 0x34],
        backing,
        name: b"name".to_vec(),
    }
}

fn content() -> PipeContent {
    PipeContent { capacity: 0x41, pieces: vec![b"first".to_vec(), b"second".to_vec()], packets: true }
}

fn of_processes() -> Vec<Sample> {
    vec![
        sample(
            Kind::Job,
            job::VERSION,
            "ended",
            &job::JobRecord {
                name: "job".into(),
                main_pid: 2,
                main_status: Some(0x0300),
                argv: vec![b"a".to_vec(), b"bc".to_vec()],
                tty: true,
                hostname: b"host".to_vec(),
                domainname: b"domain".to_vec(),
                monotonic_ns: 0x51,
                boottime_ns: 0x52,
                uid: 0x53,
                kernel: "6.1.0".into(),
            },
        ),
        sample(
            Kind::Process,
            process::VERSION,
            "zombie",
            &process::ProcessRecord {
                pid: 1,
                ppid: 2,
                pgid: 3,
                sid: 4,
                exit_signal: 5,
                zombie: Some(6),
                stopped: true,
                untold_stops: vec![7, 8],
                threads: vec![9, 10],
                comm: b"comm".to_vec(),
            },
        ),
        sample(
            Kind::Thread,
            thread::VERSION,
            "thread",
            &thread::ThreadRecord {
                registers: counting(1),
                xstate: vec![0x61, 0x62],
                mask: 0x63,
                quiet: true,
                alternate_stack: (0x64, 0x65, 0x66),
                tid_address: 0x67,
                robust_list: (0x68, 0x69),
                name: b"thread".to_vec(),
            },
        ),
        sample(
            Kind::Signal,
            signal::VERSION,
            "action",
            &signal::SignalRecord {
                actions: vec![Action { signal: 1, handler: 2, flags: 3, restorer: 4, mask: 5 }],
            },
        ),
        sample(
            Kind::PendingSignal,
            pending_signal::VERSION,
            "queue",
            &pending_signal::PendingSignalRecord { queue: vec![vec![1; 3], vec![2; 2]] },
        ),
        sample(
            Kind::Timer,
            timer::VERSION,
            "both",
            &timer::TimerRecord {
                interval: [counting(1), counting(5), counting(9)],
                posix: vec![PosixTimer {
                    id: 0x71,
                    clock: -6,
                    notify: 0x72,
                    signal: 0x73,
                    value: 0x74,
                    tid: 0x75,
                    spec: counting(0x76),
                }],
            },
        ),
        sample(
            Kind::Credential,
            credential::VERSION,
            "thread",
            &credential::CredentialRecord {
                uid: counting(1),
                gid: counting(5),
                groups: vec![9, 10],
                capabilities: counting(11),
                securebits: 16,
                no_new_privs: true,
                parent_death_signal: 17,
            },
        ),
        sample(
            Kind::Limit,
            limit::VERSION,
            "all",
            &limit::LimitRecord { limits: std::array::from_fn(|i| (i as u64, 0x100 + i as u64)) },
        ),
        sample(
            Kind::FsContext,
            fs_context::VERSION,
            "process",
            &fs_context::FsContextRecord { cwd: b"/cwd".to_vec(), root: b"/".to_vec(), umask: 0o27 },
        ),
        sample(
            Kind::Scheduler,
            scheduler::VERSION,
            "thread",
            &scheduler::SchedulerRecord {
                policy: 1,
                flags: 2,
                nice: -3,
                priority: 4,
                deadline: counting(5),
                affinity: vec![8, 9],
                io_priority: 10,
                timer_slack_ns: 11,
            },
        ),
        sample(
            Kind::Attribute,
            attribute::VERSION,
            "process",
            &attribute::AttributeRecord {
                personality: 1,
                dumpable: 2,
                subreaper: true,
                thp_disabled: false,
                oom_score_adj: -3,
            },
        ),
        sample(
            Kind::Aio,
            aio::VERSION,
            "unread",
            &aio::AioRecord { bytes: 0x0102_0304, head: 5, tail: 0x0607_0809, events: vec![counting(10)] },
        ),
        sample(Kind::Rseq, rseq::VERSION, "thread", &rseq::RseqRecord { pointer: 1, size: 2, signature: 3 }),
    ]
}

fn of_memory() -> Vec<Sample> {
    let object = |sample_name, origin| {
        let record = shared_object::SharedObjectRecord { pid: 1, origin, bytes: 2, identity: (3, 4) };
        sample(Kind::SharedObject, shared_object::VERSION, sample_name, &record)
    };
    vec![
        sample(
            Kind::MemoryMap,
            memory_map::VERSION,
            "every_backing",
            &memory_map::MemoryMapRecord {
                object: 1,
                vmas: vec![
                    vma(0x1000, None, Backing::Anonymous),
                    vma(0x2000, Some(0), Backing::File { file: 0x35, offset: 0x36 }),
                    vma(0x3000, Some(1), Backing::Object { object: 0x37, offset: 0x38 }),
                    vma(0x4000, None, Backing::Kernel { name: "[vdso]".into() }),
                ],
                files: vec![MappedFile {
                    path: b"/lib".to_vec(),
                    stat: stat(),
                    build_id: Some(vec![0x3c, 0x3d]),
                }],
                fields: counting(2),
                auxv: vec![0x39, 0x3a],
                exe: b"/exe".to_vec(),
                vdso_hash: 0x3b,
                write_code: Some((0x3e, vec![0x3f, 0x40])),
            },
        ),
        object("anonymous", Origin::Anonymous),
        object("memfd", Origin::Memfd { name: b"memfd".to_vec(), seals: Some(5) }),
        object("deleted", Origin::Deleted { path: b"/deleted".to_vec(), mode: 6 }),
        sample(
            Kind::ShmFile,
            shm_file::VERSION,
            "file",
            &shm_file::ShmFileRecord {
                path: b"/dev/shm/f".to_vec(),
                mode: 1,
                uid: 2,
                gid: 3,
                bytes: 4,
                object: Some(5),
                link: None,
            },
        ),
        sample(
            Kind::ShmFile,
            shm_file::VERSION,
            "link",
            &shm_file::ShmFileRecord {
                path: b"/dev/shm/l".to_vec(),
                mode: 1,
                uid: 2,
                gid: 3,
                bytes: 0,
                object: None,
                link: Some(b"f".to_vec()),
            },
        ),
    ]
}

fn of_descriptors() -> Vec<Sample> {
    let lock = |sample_name, family, end| {
        let record = file_lock::FileLockRecord { pid: 1, fd: 2, family, write: true, start: 3, end };
        sample(Kind::FileLock, file_lock::VERSION, sample_name, &record)
    };
    vec![
        sample(
            Kind::FdTable,
            table::VERSION,
            "entry",
            &table::FdTableRecord { entries: vec![Entry { number: 1, file: 2, cloexec: true }] },
        ),
        sample(
            Kind::RegularFile,
            regular_file::VERSION,
            "deleted",
            &regular_file::RegularFileRecord {
                opened: opened(),
                path: b"/f".to_vec(),
                stat: stat(),
                object: Some(1),
                ends: Some(2),
            },
        ),
        sample(
            Kind::SavedFile,
            saved_file::VERSION,
            "saved",
            &saved_file::SavedFileRecord {
                path: b"/f".to_vec(),
                stat: stat(),
                owner: (1, 2),
                mapped: true,
                object: Some(3),
            },
        ),
        sample(
            Kind::SysvSemaphore,
            sysv_semaphore::VERSION,
            "sysv_semaphore",
            &sysv_semaphore::SysvSemaphoreRecord { key: 1, uid: 2, gid: 3, mode: 4, values: vec![5, 6] },
        ),
        sample(
            Kind::Directory,
            directory::VERSION,
            "directory",
            &directory::DirectoryRecord { opened: opened(), path: b"/d".to_vec() },
        ),
        sample(
            Kind::CharDevice,
            char_device::VERSION,
            "device",
            &char_device::CharDeviceRecord { opened: opened(), path: b"/dev/null".to_vec(), rdev: 1 },
        ),
        sample(
            Kind::Pipe,
            pipe::VERSION,
            "first_end",
            &pipe::PipeRecord { opened: opened(), content: Some(content()) },
        ),
        sample(
            Kind::Fifo,
            fifo::VERSION,
            "first_end",
            &fifo::FifoRecord { opened: opened(), path: b"/fifo".to_vec(), content: Some(content()) },
        ),
        sample(
            Kind::Inotify,
            inotify::VERSION,
            "full",
            &inotify::InotifyRecord {
                opened: opened(),
                number: 0x1516_1718,
                watches: vec![inotify::WatchRecord {
                    number: 0x0102_0304,
                    mask: 0x0506_0708,
                    path: b"/watched".to_vec(),
                    state: Some(0x090a_0b0c_0d0e_0f10),
                }],
                queued_bytes: 0x1112_1314,
            },
        ),
        sample(
            Kind::Eventfd,
            eventfd::VERSION,
            "semaphore",
            &eventfd::EventfdRecord { opened: opened(), count: 1, semaphore: true },
        ),
        sample(
            Kind::Epoll,
            epoll::VERSION,
            "watch",
            &epoll::EpollRecord {
                opened: opened(),
                watches: vec![Watch { pid: 1, number: 2, via: 3, instance: 4, events: 5, data: 6 }],
            },
        ),
        sample(
            Kind::UnixSocket,
            unix_socket::VERSION,
            "end",
            &unix_socket::UnixSocketRecord {
                opened: opened(),
                kind: 1,
                inode: (2, 3),
                creator: 4,
                queue: vec![b"message".to_vec()],
                shutdown: 5,
                options: counting(6),
                timeouts: [counting(9), counting(11)],
            },
        ),
        sample(
            Kind::TcpSocket,
            tcp_socket::VERSION,
            "listening",
            &tcp_socket::TcpSocketRecord {
                opened: opened(),
                family: 2,
                local: Some(tcp_socket::Address { ip: vec![127, 0, 0, 1], port: 3, scope: 0 }),
                state: tcp_socket::State::Listening { backlog: 4 },
                options: vec![tcp_socket::SocketOption { level: 5, name: 6, value: vec![7, 8] }],
            },
        ),
        sample(
            Kind::TcpSocket,
            tcp_socket::VERSION,
            "unconnected",
            &tcp_socket::TcpSocketRecord {
                opened: opened(),
                family: 10,
                local: None,
                state: tcp_socket::State::Unconnected,
                options: Vec::new(),
            },
        ),
        sample(
            Kind::TcpSocket,
            tcp_socket::VERSION,
            "closed",
            &tcp_socket::TcpSocketRecord {
                opened: opened(),
                family: 10,
                local: Some(tcp_socket::Address {
                    ip: counting::<16, u8>(1).to_vec(),
                    port: 0x21,
                    scope: 0x22,
                }),
                state: tcp_socket::State::Closed {
                    peer: Some(tcp_socket::Address {
                        ip: counting::<16, u8>(0x31).to_vec(),
                        port: 0x41,
                        scope: 0,
                    }),
                    error: true,
                },
                options: Vec::new(),
            },
        ),
        sample(
            Kind::Tty,
            tty::VERSION,
            "description",
            &tty::TtyRecord { opened: opened(), by_dev_tty: true },
        ),
        sample(
            Kind::Tty,
            tty::VERSION,
            "terminal",
            &tty::TerminalRecord {
                termios: counting(1),
                winsize: counting(0x81),
                session: Some((0x91, 0x92)),
            },
        ),
        sample(
            Kind::External,
            external::VERSION,
            "pipe",
            &external::ExternalRecord { opened: opened(), number: 1, target: "pipe:[2]".into() },
        ),
        lock("flock", Family::Flock, None),
        lock("posix", Family::Posix, Some(4)),
        lock("ofd", Family::Ofd, Some(5)),
        sample(
            Kind::Signalfd,
            signalfd::VERSION,
            "mask",
            &signalfd::SignalfdRecord { opened: opened(), mask: 1 },
        ),
        sample(
            Kind::Timerfd,
            timerfd::VERSION,
            "armed",
            &timerfd::TimerfdRecord { opened: opened(), clock: 1, ticks: 2, spec: counting(3) },
        ),
    ]
}

fn samples() -> Vec<Sample> {
    let mut all = of_processes();
    all.extend(of_memory());
    all.extend(of_descriptors());
    all
}

fn golden_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/records-v1.txt")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

/// Keys and hex of the checked-in lines, in their order.
fn golden() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(golden_path()).unwrap_or_default();
    let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.map(|l| l.rsplit_once(' ').unwrap_or_else(|| panic!("no such line: {l}"))).map(own).collect()
}

fn own((key, hex): (&str, &str)) -> (String, String) {
    (key.to_owned(), hex.to_owned())
}

/// Where two texts of hex begin to differ, for a person.
fn difference(was: &str, is: &str) -> String {
    let same = was.bytes().zip(is.bytes()).take_while(|(a, b)| a == b).count() / 2;
    let tail = |text: &str| text.get(same * 2..).unwrap_or_default().to_owned();
    let (was_bytes, is_bytes) = (was.len() / 2, is.len() / 2);
    format!(
        "from byte {same} on\n    checked in ({was_bytes} bytes): …{}\n    now        ({is_bytes} bytes): …{}",
        tail(was),
        tail(is)
    )
}

fn write(samples: &[Sample]) {
    let mut lines = golden();
    for s in samples {
        let (key, body) = (s.key(), hex(&s.body));
        match lines.iter_mut().find(|(k, _)| *k == key) {
            Some(line) => line.1 = body,
            None => lines.push((key, body)),
        }
    }
    let mut text = "# SPDX-License-Identifier: MIT OR Apache-2.0\n\
                    # Bodies of records: KIND NUMBER VERSION SAMPLE HEX. See ../golden_records.rs.\n"
        .to_owned();
    for (key, body) in lines {
        text.push_str(&format!("{key} {body}\n"));
    }
    std::fs::write(golden_path(), text).unwrap();
}

#[test]
fn bodies_are_those_of_their_version() {
    let samples = samples();
    if std::env::var_os("CKPT_GOLDEN_WRITE").is_some_and(|v| v == "1") {
        write(&samples);
    }
    let golden: BTreeMap<String, String> = golden().into_iter().collect();
    let mut wrong = String::new();
    for s in &samples {
        let (key, is) = (s.key(), hex(&s.body));
        match golden.get(&key) {
            None => wrong.push_str(&format!("\n  {key} ({}): no line in the file", s.record)),
            Some(was) if *was != is => {
                wrong.push_str(&format!("\n  {key} ({}): differs {}", s.record, difference(was, &is)));
            }
            Some(_) => {}
        }
    }
    // Samples that are gone: of versions that are still current, a removed one would go unnoticed for ever.
    let current: Vec<String> = samples.iter().map(Sample::key).collect();
    for key in golden.keys().filter(|k| !current.contains(k)) {
        let words: Vec<&str> = key.split(' ').collect();
        let version = |s: &Sample| s.kind.name() == words[0] && s.version.to_string() == words[2];
        if samples.iter().any(version) {
            wrong.push_str(&format!("\n  {key}: its sample is gone"));
        }
    }
    assert!(
        wrong.is_empty(),
        "record bodies are not those in {}:{wrong}\na changed record needs a new version; see the top of this test",
        golden_path().display()
    );
}

#[test]
fn every_record_has_a_sample() {
    let samples = samples();
    for kind in Kind::ALL {
        assert!(samples.iter().any(|s| s.kind == *kind), "{} has no sample", kind.name());
    }
    // Parts of other records.
    let parts = ["VmaRecord", "WatchRecord"];
    let mut pending = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/resource")];
    let mut found = 0;
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let names =
                text.lines().filter_map(|l| l.strip_prefix("pub struct ")?.split([' ', '<', ';']).next());
            for name in names.filter(|n| n.ends_with("Record") && *n != "NewRecord" && !parts.contains(n)) {
                let known = samples.iter().any(|s| s.record == name);
                assert!(known, "{name} in {} has no sample", path.display());
                found += 1;
            }
        }
    }
    assert!(found >= Kind::ALL.len(), "only {found} records found in the source");
}
