// SPDX-License-Identifier: MIT OR Apache-2.0
//! The store: claims, publishing, listing, removal, and what is left when any of them is killed.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Barrier, Mutex};

use ckpt_image::store::{Claim, Store, StoreError, free_bytes};
use ckpt_image::{Compression, Reader, WriteError, Writer, ZeroPages};

use crate::scratch::{Random, SAMPLE_CREATED_NS, Scratch, seed, text_page, write_sample};

fn dump(store: &Store, job: &str) -> u64 {
    let claim = store.claim(job).unwrap();
    write_sample(claim.dir(), Compression::None);
    let number = claim.number().unwrap();
    claim.publish().unwrap();
    number
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_checkpoint_is_invisible_until_published() {
    let scratch = Scratch::new("store");
    let store = Store::open(&scratch.path().join("a/b")).unwrap();
    assert!(store.list().unwrap().is_empty());
    assert!(matches!(store.resolve("job"), Err(StoreError::NoSuchJob { .. })));
    let claim = store.claim("job").unwrap();
    write_sample(claim.dir(), Compression::None);
    assert!(store.list().unwrap().is_empty());
    assert!(store.jobs().unwrap().is_empty());
    assert!(matches!(store.resolve("job"), Err(StoreError::NoSuchJob { .. })));
    let partial = format!("{}/", claim.dir().display());
    assert!(matches!(store.resolve(&partial), Err(StoreError::Unfinished { .. })));
    let path = claim.publish().unwrap();
    assert_eq!(names(&path), set(&["records", "pages"]));
    assert_eq!(store.resolve("job").unwrap(), path);
    assert_eq!(store.resolve("job@1").unwrap(), path);
    assert_eq!(store.resolve(path.to_str().unwrap()).unwrap(), path);
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].job.as_str(), listed[0].number, &listed[0].path), ("job", 1, &path));
    let on_disk: u64 = ["records", "pages"].iter().map(|f| fs::metadata(path.join(f)).unwrap().len()).sum();
    assert_eq!(listed[0].bytes, on_disk);
    let since = listed[0].created.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(since.as_nanos(), u128::from(SAMPLE_CREATED_NS));
    for dir in [store.root(), path.parent().unwrap(), &path] {
        assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o7777, 0o700, "{}", dir.display());
    }
}

#[test]
fn numbers_grow_and_names_resolve() {
    let scratch = Scratch::new("numbers");
    let store = Store::open(scratch.path()).unwrap();
    for expected in 1..=11 {
        assert_eq!(dump(&store, "long-job"), expected);
    }
    dump(&store, "other");
    // By number, not as text: 11 is newer than 9.
    assert!(store.resolve("long-job").unwrap().ends_with("long-job/11"));
    let numbers: Vec<u64> = store.list_job("long-job").unwrap().iter().map(|e| e.number).collect();
    assert_eq!(numbers, (1..=11).collect::<Vec<_>>());
    assert_eq!(store.list().unwrap().len(), 12);
    let message = store.resolve("long-job@12").unwrap_err().to_string();
    assert!(message.contains("checkpoint 12") && message.contains("10, 11"), "{message}");
    let message = store.resolve("nobody").unwrap_err().to_string();
    assert!(message.contains("nobody") && message.contains("long-job, other"), "{message}");
    for bad in ["", "..x", ".hidden", "a b", "job@", "job@0", "job@x", "job@1@2", "@1"] {
        let error = store.resolve(bad).unwrap_err();
        assert!(
            matches!(error, StoreError::BadSpec { .. } | StoreError::BadJobName { .. }),
            "{bad}: {error}"
        );
    }
    assert!(matches!(store.claim("../x"), Err(StoreError::BadJobName { .. })));
    // A number below is not filled up again.
    store.remove("long-job", 5).unwrap();
    assert_eq!(dump(&store, "long-job"), 12);
    let error = store.remove("long-job", 5).unwrap_err();
    assert!(matches!(error, StoreError::NoSuchCheckpoint { .. }), "{error}");
    store.remove("other", 1).unwrap();
    assert_eq!(names(scratch.path()), set(&["long-job"]));
}

#[test]
fn an_abandoned_claim_leaves_nothing() {
    let scratch = Scratch::new("abandon");
    let store = Store::open(scratch.path()).unwrap();
    let claim = store.claim("job").unwrap();
    write_sample(claim.dir(), Compression::None);
    drop(claim);
    assert!(names(scratch.path()).is_empty());
    let claim = store.claim("job").unwrap();
    fs::create_dir(claim.dir().join("more")).unwrap();
    fs::write(claim.dir().join("more/file"), "x").unwrap();
    claim.abandon().unwrap();
    assert!(names(scratch.path()).is_empty());
}

#[test]
fn leftovers_are_swept_and_live_claims_are_not() {
    let scratch = Scratch::new("leftovers");
    let store = Store::open(scratch.path()).unwrap();
    assert_eq!(dump(&store, "job"), 1);
    let job = scratch.path().join("job");
    let live = store.claim("job").unwrap();
    assert_eq!(live.number(), Some(2));
    write_sample(live.dir(), Compression::None);
    // Each state in which a killed dump or removal can leave a directory.
    fs::create_dir(job.join("3.partial")).unwrap();
    fs::create_dir(job.join("4.partial")).unwrap();
    fs::write(job.join("4.partial/lock"), "").unwrap();
    fs::create_dir(job.join("5.partial")).unwrap();
    write_sample(&job.join("5.partial"), Compression::None);
    fs::write(job.join("5.partial/lock"), "some-other-boot").unwrap();
    fs::create_dir(job.join("6.partial")).unwrap();
    fs::write(job.join("6.partial/pages"), "half").unwrap();
    fs::create_dir_all(job.join("7.partial/cut-tails/deep")).unwrap();
    fs::create_dir(job.join("2.removed.partial")).unwrap();
    fs::write(job.join("2.removed.partial/pages"), "half").unwrap();
    fs::create_dir(job.join("7.removed.partial")).unwrap();
    fs::write(job.join("7.removed.partial/lock"), "").unwrap();
    // Not the store's business.
    fs::create_dir(job.join("08.partial")).unwrap();
    fs::create_dir(job.join("notes")).unwrap();
    fs::write(job.join("9"), "a file").unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    let claim = store.claim("job").unwrap();
    assert_eq!(claim.number(), Some(8));
    assert_eq!(names(&job), set(&["1", "2.partial", "8.partial", "08.partial", "notes", "9"]));
    let report = store.sweep("job").unwrap();
    assert_eq!(report.in_use.len(), 2);
    assert!(report.removed.is_empty() && report.in_doubt.is_empty() && report.failed.is_empty());
    drop(claim);
    live.publish().unwrap();
    assert_eq!(store.list_job("job").unwrap().len(), 2);
    // A kill between rename and unlink leaves the lock in a complete checkpoint.
    fs::write(job.join("1/lock"), "").unwrap();
    Reader::open(&store.resolve("job@1").unwrap()).unwrap().verify(&mut |_, _| ()).unwrap();
    store.remove("job", 1).unwrap();
    assert_eq!(names(&job), set(&["2", "08.partial", "notes", "9"]));
}

#[test]
fn concurrent_claims_get_distinct_numbers() {
    let scratch = Scratch::new("race");
    let store = Store::open(scratch.path()).unwrap();
    let (threads, rounds) = (8, 50);
    let barrier = Barrier::new(threads);
    let published = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (store, barrier, published) = (&store, &barrier, &published);
            scope.spawn(move || {
                barrier.wait();
                for round in 0..rounds {
                    let claim = store.claim("job").unwrap();
                    let number = claim.number().unwrap();
                    fs::write(claim.dir().join("mine"), format!("{thread} {round}")).unwrap();
                    if round % 5 == 4 {
                        continue;
                    }
                    let path = claim.publish().unwrap();
                    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), format!("{thread} {round}"));
                    if round % 5 == 3 {
                        store.remove("job", number).unwrap();
                    } else {
                        published.lock().unwrap().push(number);
                    }
                }
            });
        }
    });
    let mut numbers = published.into_inner().unwrap();
    numbers.sort_unstable();
    let listed: Vec<u64> = store.list_job("job").unwrap().iter().map(|entry| entry.number).collect();
    assert_eq!(listed, numbers);
    assert_eq!(numbers.len(), threads * rounds * 3 / 5);
}

#[test]
fn a_directory_of_ones_own() {
    let scratch = Scratch::new("for-dir");
    let target = scratch.path().join("here");
    let claim = Claim::for_dir(&target).unwrap();
    assert_eq!(claim.dir(), scratch.path().join("here.partial"));
    let error = Claim::for_dir(&target).unwrap_err();
    assert!(matches!(error, StoreError::Busy { .. }), "{error}");
    write_sample(claim.dir(), Compression::None);
    assert_eq!(claim.publish().unwrap(), target);
    assert_eq!(names(scratch.path()), set(&["here"]));
    Reader::open(&target).unwrap();
    assert!(matches!(Claim::for_dir(&target), Err(StoreError::Exists { .. })));
    let error = Claim::for_dir(&scratch.path().join("x.partial")).unwrap_err();
    assert!(matches!(error, StoreError::ReservedName { .. }), "{error}");
    // What a killed dump left is no hindrance.
    let target = scratch.path().join("again");
    fs::create_dir(scratch.path().join("again.partial")).unwrap();
    fs::write(scratch.path().join("again.partial/lock"), "").unwrap();
    fs::write(scratch.path().join("again.partial/records"), "half").unwrap();
    let claim = Claim::for_dir(&target).unwrap();
    // Somebody makes the target meanwhile: it is not touched, and nothing of ours stays.
    fs::create_dir(&target).unwrap();
    assert!(matches!(claim.publish(), Err(StoreError::Exists { .. })));
    assert_eq!(names(scratch.path()), set(&["here", "again"]));
    let error = Claim::for_dir(&scratch.path().join("no/such/parent")).unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
}

#[test]
fn free_space_is_told_for_paths_to_come() {
    let scratch = Scratch::new("free");
    let here = free_bytes(scratch.path()).unwrap();
    assert!(here > 0);
    assert!(free_bytes(&scratch.path().join("not/yet/there")).unwrap() > 0);
    assert!(free_bytes(Path::new("relative-and-absent")).unwrap() > 0);
}

/// Set for the child of [`killed_at_any_moment`]: the store to work in.
const CHILD_STORE: &str = "CKPT_TEST_CHILD_STORE";

/// Not a test of its own: the process that is killed. It dumps, publishes and removes for ever and prints a line
/// before every step.
#[test]
fn child_that_is_killed() {
    let Some(root) = std::env::var_os(CHILD_STORE) else { return };
    let store = Store::open(Path::new(&root)).unwrap();
    // Not println, which the test harness captures.
    let say = |step: &str| writeln!(std::io::stderr(), "{step}").unwrap();
    let page = text_page("content ");
    loop {
        say("claim");
        let claim = store.claim("job").unwrap();
        say("create");
        let mut writer = Writer::create(claim.dir(), [0; 64], Compression::Lz4).unwrap();
        for n in 0..20 {
            say("write");
            writer.record(1, 1, n, 0, b"record").unwrap();
            writer.pages(1, n << 20, &page.repeat(200), ZeroPages::Elide).unwrap();
        }
        say("finish");
        writer.finish().unwrap();
        say("publish");
        let number = claim.number().unwrap();
        claim.publish().unwrap();
        say("published");
        if number.is_multiple_of(3) {
            say("remove");
            store.remove("job", number).unwrap();
            say("removed");
        }
    }
}

#[test]
fn killed_at_any_moment() {
    let mut random = Random(seed("killed_at_any_moment"));
    let scratch = Scratch::new("kill");
    let store = Store::open(scratch.path()).unwrap();
    dump(&store, "job");
    let mut leftovers = 0;
    for round in 0..60 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::child_that_is_killed", "--nocapture", "--test-threads=1"])
            .env(CHILD_STORE, scratch.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        // A seeded number of steps, then so many turns of this loop: some moment inside the step after.
        for _ in 0..1 + random.below(80) {
            lines.next().expect("the child lives until it is killed").unwrap();
        }
        for _ in 0..random.below(200_000) {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let listed = store.list_job("job").unwrap();
        assert!(listed.iter().any(|entry| entry.number == 1), "round {round}: the oldest checkpoint is gone");
        for entry in listed.iter().rev().take(3) {
            Reader::open(&entry.path)
                .and_then(|reader| reader.verify(&mut |_, _| ()))
                .unwrap_or_else(|e| panic!("round {round}: a visible checkpoint is not whole: {e}"));
        }
        leftovers += names(&scratch.path().join("job")).iter().filter(|n| n.ends_with(".partial")).count();
        store.claim("job").unwrap().abandon().unwrap();
        let left = names(&scratch.path().join("job"));
        assert!(!left.iter().any(|name| name.ends_with(".partial")), "round {round}: not swept: {left:?}");
        // Keep the loop short.
        for entry in listed.iter().filter(|entry| entry.number > 1) {
            store.remove("job", entry.number).unwrap();
        }
    }
    println!("{leftovers} of 60 kills left a partial directory");
    assert!(leftovers > 0, "no kill hit a dump");
}

/// A file system of its own, unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(at: PathBuf, options: &str) -> Option<Self> {
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&at).output();
        match done {
            Ok(output) if output.status.success() => Some(Mounted(at)),
            Ok(output) => {
                println!("skipped: cannot mount a tmpfs: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(e) => {
                println!("skipped: cannot run mount: {e}");
                None
            }
        }
    }

    fn remount(&self, options: &str) {
        let status =
            Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        Command::new("umount").arg(&self.0).status().ok();
    }
}

#[test]
fn a_full_disk_leaves_no_half_checkpoint() {
    let scratch = Scratch::new("full");
    let Some(mounted) = Mounted::new(scratch.dir("tmpfs"), "size=2m") else { return };
    let store = Store::open(&mounted.0).unwrap();
    dump(&store, "job");
    let claim = store.claim("job").unwrap();
    let mut writer = Writer::create(claim.dir(), [0; 64], Compression::None).unwrap();
    let noise = Random(3).bytes(1 << 20);
    let mut result = Ok(());
    // Far more than is kept on its way to the disk.
    for n in 0..64 {
        result = writer.pages(1, n << 20, &noise, ZeroPages::Elide);
        if result.is_err() {
            break;
        }
    }
    let message = result.unwrap_err().to_string();
    assert!(message.contains("full") && message.contains("pages"), "{message}");
    assert!(writer.record(1, 1, 1, 1, b"x").is_err(), "goes on after a failed write");
    assert!(matches!(writer.finish(), Err(WriteError::Incomplete)));
    // Fill up the rest: sweeping and removing must work on a full disk, too.
    let mut filler = fs::File::create(mounted.0.join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
    let error = store.claim("job").unwrap_err();
    assert!(error.to_string().contains("full"), "{error}");
    drop(claim);
    assert_eq!(names(&mounted.0.join("job")), set(&["1"]));
    Reader::open(&store.resolve("job").unwrap()).unwrap().verify(&mut |_, _| ()).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
    store.remove("job", 1).unwrap();
    assert_eq!(names(&mounted.0), set(&["filler"]));
}

#[test]
fn small_writes_to_a_full_disk_fail_at_the_end() {
    let scratch = Scratch::new("full-end");
    let Some(mounted) = Mounted::new(scratch.dir("tmpfs"), "size=64k") else { return };
    let store = Store::open(&mounted.0).unwrap();
    let claim = store.claim("job").unwrap();
    let mut writer = Writer::create(claim.dir(), [0; 64], Compression::None).unwrap();
    // Fits into the buffer, so that only the last flush meets the disk.
    writer.pages(1, 0, &Random(3).bytes(128 << 10), ZeroPages::Elide).unwrap();
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("full"), "{message}");
    claim.abandon().unwrap();
    assert!(names(&mounted.0).is_empty());
}

#[test]
fn a_read_only_store_can_be_read() {
    let scratch = Scratch::new("read-only");
    let Some(mounted) = Mounted::new(scratch.dir("tmpfs"), "size=2m") else { return };
    dump(&Store::open(&mounted.0).unwrap(), "job");
    mounted.remount("ro");
    let store = Store::open(&mounted.0).unwrap();
    Reader::open(&store.resolve("job").unwrap()).unwrap().verify(&mut |_, _| ()).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    for error in [
        store.claim("job").unwrap_err(),
        store.claim("new-job").unwrap_err(),
        store.remove("job", 1).unwrap_err(),
        Claim::for_dir(&mounted.0.join("dir")).unwrap_err(),
    ] {
        assert!(error.to_string().contains("read-only"), "{error}");
    }
    assert_eq!(store.list().unwrap().len(), 1);
}

/// What a restore cut off somebody's file is not in the checkpoint, and nowhere else.
#[test]
fn removing_keeps_what_restores_have_cut_off() {
    let scratch = Scratch::new("cut-ends");
    let store = Store::open(scratch.path()).unwrap();
    for number in [1, 2] {
        assert_eq!(dump(&store, "job"), number);
        let path = store.resolve("job").unwrap();
        fs::write(path.join("cut-77-0-log"), format!("end {number}")).unwrap();
        fs::write(path.join("cuts"), b"{}").unwrap();
    }
    let job_dir = scratch.path().join("job");
    let kept = store.remove("job", 1).unwrap();
    assert_eq!(kept, [job_dir.join("cut-1-77-0-log")]);
    // A removal that was interrupted after the checkpoint was hidden.
    fs::rename(job_dir.join("2"), job_dir.join("2.removed.partial")).unwrap();
    store.sweep("job").unwrap();
    assert!(!job_dir.join("2.removed.partial").exists());
    for number in [1, 2] {
        let text = fs::read_to_string(job_dir.join(format!("cut-{number}-77-0-log"))).unwrap();
        assert_eq!(text, format!("end {number}"));
    }
}
