// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chains in the store: squashing, at any instant of which the process may be killed, removing, and retention.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ckpt_image::store::{Keep, Squash, Squashed, Store, StoreError};
use ckpt_image::{Compression, Reader, RunKind, Writer, ZeroPages};

use crate::chain::{Chain, Pages, parent_of, read_all};
use crate::scratch::{Random, Scratch, sample_features, seed, text_page};

const JOB: &str = "job";

/// A store with one chain; the content of each of its checkpoints.
struct Sample {
    store: Store,
    contents: Vec<(u64, Pages)>,
}

fn sample(root: &Path, random: &mut Random, links: usize) -> Sample {
    sample_of(root, random, links, 60)
}

fn sample_of(root: &Path, random: &mut Random, links: usize, size: u64) -> Sample {
    let store = Store::open(root).unwrap();
    let job = root.join(JOB);
    fs::create_dir(&job).unwrap();
    let mut chain = Chain::new(&job, random, Compression::None, size);
    let mut contents = vec![(chain.newest, chain.pages.clone())];
    for _ in 0..links {
        let packing = [Compression::None, Compression::Lz4][random.below(2)];
        chain.grow(random, packing);
        contents.push((chain.newest, chain.pages.clone()));
    }
    Sample { store, contents }
}

impl Sample {
    fn dir(&self, number: u64) -> PathBuf {
        self.store.root().join(JOB).join(number.to_string())
    }

    /// The listed checkpoints are there and whole, and hold what they are to hold.
    fn check(&self, numbers: &[u64]) {
        let listed: Vec<u64> = self.store.list_job(JOB).unwrap().iter().map(|entry| entry.number).collect();
        assert_eq!(listed, numbers);
        for (number, pages) in self.contents.iter().filter(|(number, _)| numbers.contains(number)) {
            let reader = Reader::open(&self.dir(*number)).unwrap();
            // A squash lists zero pages that it was told of, and no others.
            assert!(read_all(&reader) == *pages, "checkpoint {number} has other pages");
            let record = format!("record of {number}");
            assert_eq!(reader.records()[0].body, record.as_bytes());
            reader.verify(&mut |_, _| ()).unwrap();
        }
    }

    fn numbers(&self) -> Vec<u64> {
        self.contents.iter().map(|(number, _)| *number).collect()
    }
}

fn squash(store: &Store, number: u64, without_exchange: bool) -> Result<Squashed, StoreError> {
    squash_to(store, number, without_exchange, None, &mut || ())
}

fn squash_to(
    store: &Store,
    number: u64,
    without_exchange: bool,
    compression: Option<Compression>,
    step: &mut dyn FnMut(),
) -> Result<Squashed, StoreError> {
    store.squash(JOB, number, Squash { compression, progress: &mut |_, _| (), step, without_exchange })
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_squashed_checkpoint_is_the_same_checkpoint() {
    let mut random = Random(seed("a_squashed_checkpoint_is_the_same_checkpoint"));
    for without_exchange in [false, true] {
        for compression in [None, Some(Compression::Zstd), Some(Compression::None)] {
            let scratch = Scratch::new("squash");
            let sample = sample(scratch.path(), &mut random, 4);
            let numbers = sample.numbers();
            let middle = numbers[2];
            let before = ckpt_image::read_header(&sample.dir(middle)).unwrap();
            // Open descriptors stay valid, those of the newest one, which goes through it, too.
            let readers = [middle, numbers[4]].map(|number| Reader::open(&sample.dir(number)).unwrap());
            let dir = sample.dir(middle);
            fs::write(dir.join("cuts"), "a line\n").unwrap();
            fs::write(dir.join("cut-1-0-x"), "a tail").unwrap();
            let done = squash_to(&sample.store, middle, without_exchange, compression, &mut || ()).unwrap();
            assert_eq!(done.images, 3);
            let reader = Reader::open(&dir).unwrap();
            assert_eq!(reader.parent(), None);
            assert_eq!(done.bytes, reader.total_bytes());
            let packing = compression.unwrap_or(before.compression);
            assert_eq!(*reader.header(), ckpt_image::HeaderInfo { compression: packing, ..before });
            for (reader, number) in readers.iter().zip([middle, numbers[4]]) {
                let pages = &sample.contents.iter().find(|(n, _)| *n == number).unwrap().1;
                assert!(read_all(reader) == *pages);
            }
            sample.check(&numbers);
            assert_eq!(fs::read_to_string(dir.join("cuts")).unwrap(), "a line\n");
            assert_eq!(fs::read_to_string(dir.join("cut-1-0-x")).unwrap(), "a tail");
            assert_eq!(names(&dir).len(), 4);
            assert_eq!(names(&scratch.path().join(JOB)), numbers.iter().map(u64::to_string).collect());
            // What is full stays as it is.
            let again = squash(&sample.store, middle, without_exchange).unwrap();
            assert_eq!(again, Squashed { images: 1, bytes_before: done.bytes, bytes: done.bytes });
            // And does not need those below it.
            sample.store.remove(JOB, numbers[1]).unwrap();
            sample.store.remove(JOB, numbers[0]).unwrap();
            sample.check(&numbers[2..]);
        }
    }
}

/// What a full checkpoint of the same memory lists, and what a chain and a squashed chain list.
#[test]
fn a_chain_equals_a_full_checkpoint() {
    let mut random = Random(seed("a_chain_equals_a_full_checkpoint"));
    let scratch = Scratch::new("equal");
    let sample = sample_of(&scratch.dir("store"), &mut random, 6, 1200);
    let (newest, pages) = sample.contents.last().unwrap();
    let full = scratch.dir("full");
    let mut writer = Writer::create(&full, sample_features(), Compression::None).unwrap();
    for (object, pages) in pages {
        for (at, page) in pages {
            let page = page.clone().unwrap_or_else(|| vec![0; 4096]);
            writer.pages(*object, at * 4096, &page, ZeroPages::Record).unwrap();
        }
    }
    writer.finish().unwrap();
    let expected = read_all(&Reader::open(&full).unwrap());
    assert!(read_all(&Reader::open(&sample.dir(*newest)).unwrap()) == expected);
    squash(&sample.store, *newest, false).unwrap();
    let squashed = Reader::open(&sample.dir(*newest)).unwrap();
    assert!(read_all(&squashed) == expected);
    // Scattered pages were put together: a run ends only at a gap, a change of sort, or after 1 MiB.
    let runs = squashed.objects().map(|object| object.runs.len()).sum::<usize>();
    let ends: usize = expected
        .values()
        .map(|pages| {
            let pages: Vec<_> = pages.iter().map(|(at, page)| (*at, page.is_some())).collect();
            1 + pages.windows(2).filter(|w| w[1].0 != w[0].0 + 1 || w[1].1 != w[0].1).count()
        })
        .sum();
    assert!(
        runs <= ends + expected.values().map(|p| p.len() / 256 + 1).sum::<usize>() + ends,
        "{runs} runs, {ends} stretches"
    );
}

/// Not a test: the process that [`squash_killed_at_every_step`] starts.
#[test]
#[ignore = "a part of squash_killed_at_every_step"]
fn process_that_is_killed() {
    let var = |name: &str| std::env::var(name).unwrap();
    let (number, at) = (var("SQUASH_NUMBER").parse().unwrap(), var("SQUASH_KILL_AT").parse::<u32>().unwrap());
    let store = Store::open(Path::new(&var("SQUASH_STORE"))).unwrap();
    let mut n = 0;
    squash_to(&store, number, var("SQUASH_TWICE") == "true", None, &mut || {
        n += 1;
        if n == at {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    })
    .unwrap();
}

#[test]
fn squash_killed_at_every_step() {
    let mut random = Random(seed("squash_killed_at_every_step"));
    for without_exchange in [false, true] {
        let scratch = Scratch::new("kill");
        let original = sample_of(&scratch.dir("original"), &mut random, 3, 20);
        let numbers = original.numbers();
        let number = numbers[2];
        fs::write(original.dir(number).join("cuts"), "a line\n").unwrap();
        fs::write(original.dir(number).join("cut-1-0-x"), "a tail").unwrap();
        let mut states = BTreeSet::new();
        for at in 1.. {
            let root = scratch.path().join(format!("killed-{at}"));
            copy_tree(original.store.root(), &root);
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "squash::process_that_is_killed"])
                .env("SQUASH_STORE", &root)
                .env("SQUASH_NUMBER", number.to_string())
                .env("SQUASH_TWICE", without_exchange.to_string())
                .env("SQUASH_KILL_AT", at.to_string())
                .output()
                .unwrap()
                .status;
            let killed = status.signal() == Some(nix::sys::signal::Signal::SIGKILL as i32);
            assert!(killed || status.success(), "{status}");
            states.insert(names(&root.join(JOB)));
            let store = Store::open(&root).unwrap();
            let copy = Sample { store, contents: original.contents.clone() };
            // Whoever looks first: a listing, or a removal, which also sweeps.
            copy.check(&numbers);
            if at % 2 == 0 {
                copy.store.sweep(JOB).unwrap();
                assert_eq!(names(&root.join(JOB)), numbers.iter().map(u64::to_string).collect());
                copy.check(&numbers);
            }
            let done = squash(&copy.store, number, without_exchange).unwrap();
            assert!(done.images == 3 || done.images == 1);
            copy.store.sweep(JOB).unwrap();
            copy.check(&numbers);
            assert_eq!(Reader::open(&copy.dir(number)).unwrap().parent(), None);
            let dir = copy.dir(number);
            assert_eq!(fs::read_to_string(dir.join("cuts")).unwrap(), "a line\n");
            assert_eq!(fs::read_to_string(dir.join("cut-1-0-x")).unwrap(), "a tail");
            assert_eq!(names(&root.join(JOB)), numbers.iter().map(u64::to_string).collect());
            fs::remove_dir_all(&root).unwrap();
            if !killed {
                assert!(at > 10, "only {at} steps");
                break;
            }
        }
        // Kills have really met the states in between.
        assert!(states.len() >= if without_exchange { 4 } else { 2 }, "{states:?}");
    }
}

#[test]
fn a_tail_that_comes_late_is_not_lost() {
    let mut random = Random(7);
    for without_exchange in [false, true] {
        let scratch = Scratch::new("late");
        let sample = sample(scratch.path(), &mut random, 1);
        let number = sample.numbers()[1];
        let dir = sample.dir(number);
        fs::write(dir.join("cuts"), "before\n").unwrap();
        // A restore holds the directory, and puts something there at every step.
        let held = File::open(&dir).unwrap();
        let by_descriptor =
            PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held)));
        let mut n = 0;
        let mut kept = BTreeSet::new();
        squash_to(&sample.store, number, without_exchange, None, &mut || {
            n += 1;
            let name = format!("cut-{n}");
            // Once the directory is gone, nothing can be made in it, and the restore says so.
            if fs::write(by_descriptor.join(&name), "tail").is_ok() {
                use std::io::Write as _;
                kept.insert(name);
                let mut cuts = fs::OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(by_descriptor.join("cuts"))
                    .unwrap();
                writeln!(cuts, "{n}").unwrap();
            }
        })
        .unwrap();
        let found: BTreeSet<String> =
            names(&dir).into_iter().filter(|name| name.starts_with("cut-")).collect();
        assert_eq!(found, kept);
        let cuts = fs::read_to_string(dir.join("cuts")).unwrap();
        let lines: BTreeSet<&str> = cuts.lines().collect();
        assert!(lines.contains("before"), "{cuts}");
        for name in &kept {
            assert!(lines.contains(name.strip_prefix("cut-").unwrap()), "{name} of {cuts}");
        }
        sample.check(&sample.numbers());
    }
}

#[test]
fn what_others_are_built_on_is_not_removed() {
    let mut random = Random(3);
    let scratch = Scratch::new("needed");
    let sample = sample(scratch.path(), &mut random, 2);
    let numbers = sample.numbers();
    let name = |number: u64| format!("{JOB}@{number}");
    let error = sample.store.remove(JOB, numbers[0]).unwrap_err();
    let StoreError::Needed { needed_by, writing, .. } = &error else { panic!("{error}") };
    assert_eq!((needed_by.as_slice(), writing.as_slice()), (&numbers[1..2], &[][..]));
    let message = error.to_string();
    for part in [name(numbers[0]), format!("ckpt squash {}", name(numbers[1])), format!("ckpt rm {JOB}")] {
        assert!(message.contains(&part), "{message}");
    }
    // One that is being written counts, from the moment on in which it has its files.
    let claim = sample.store.claim(JOB).unwrap();
    let parent = parent_of(&sample.dir(numbers[2]));
    let writer = Writer::create_incremental(claim.dir(), [0; 64], Compression::None, parent).unwrap();
    let error = sample.store.remove(JOB, numbers[2]).unwrap_err();
    assert!(error.to_string().contains("being written"), "{error}");
    sample.check(&numbers);
    assert_eq!(names(&sample.dir(numbers[2])), ["pages", "records"].map(String::from).into());
    drop(writer);
    drop(claim);
    sample.store.remove(JOB, numbers[2]).unwrap();
    squash(&sample.store, numbers[1], false).unwrap();
    sample.store.remove(JOB, numbers[0]).unwrap();
    sample.check(&numbers[1..2]);
}

#[test]
fn nothing_is_published_on_a_parent_that_is_gone() {
    let mut random = Random(3);
    let scratch = Scratch::new("gone");
    let sample = sample(scratch.path(), &mut random, 1);
    let newest = sample.numbers()[1];
    let claim = sample.store.claim(JOB).unwrap();
    let parent = parent_of(&sample.dir(newest));
    let writer = Writer::create_incremental(claim.dir(), [0; 64], Compression::None, parent).unwrap();
    writer.finish().unwrap();
    // By hand, since the store refuses.
    fs::remove_dir_all(sample.dir(newest)).unwrap();
    let error = claim.publish().unwrap_err();
    assert!(matches!(error, StoreError::ParentGone { number, .. } if number == newest), "{error}");
    assert_eq!(names(&scratch.path().join(JOB)).len(), 1);
}

/// Dumps and removals at the same time: whatever is published can be read.
#[test]
fn removals_race_with_dumps() {
    let scratch = Scratch::new("race");
    let store = Store::open(scratch.path()).unwrap();
    let page = text_page("x");
    let full = |store: &Store| {
        let claim = store.claim(JOB).unwrap();
        let mut writer = Writer::create(claim.dir(), [0; 64], Compression::None).unwrap();
        writer.pages(1, 0, &page, ZeroPages::Elide).unwrap();
        writer.finish().unwrap();
        claim.publish().unwrap();
    };
    full(&store);
    let published = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..60 {
                    let Some(newest) = store.list_job(JOB).unwrap().pop() else {
                        full(&store);
                        continue;
                    };
                    let (Ok(claim), Some(id)) = (store.claim(JOB), newest.id) else { continue };
                    let parent = ckpt_image::Parent { id, number: newest.number };
                    let Ok(mut writer) =
                        Writer::create_incremental(claim.dir(), [0; 64], Compression::None, parent)
                    else {
                        continue;
                    };
                    writer.same(1, 0, 4096, 1).unwrap();
                    writer.finish().unwrap();
                    claim.publish().unwrap();
                    published.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..120 {
                    for entry in store.list_job(JOB).unwrap() {
                        match store.remove(JOB, entry.number) {
                            Ok(_)
                            | Err(
                                StoreError::Needed { .. }
                                | StoreError::NoSuchCheckpoint { .. }
                                | StoreError::NoSuchJob { .. },
                            ) => {}
                            // The other one is removing it.
                            Err(StoreError::Io { .. }) => {}
                            Err(e) => panic!("{e}"),
                        }
                    }
                }
            });
        }
    });
    for entry in store.list_job(JOB).unwrap() {
        let reader = Reader::open(&entry.path).unwrap();
        assert!(reader.runs(1).iter().all(|run| run.kind == RunKind::Data && run.bytes == 4096));
        assert_eq!(reader.runs(1).len(), 1);
    }
    println!("{} incremental checkpoints were published", published.into_inner());
}

#[test]
fn retention_squashes_what_must_stay_readable() {
    let mut random = Random(seed("retention_squashes_what_must_stay_readable"));
    let scratch = Scratch::new("prune");
    let sample = sample(scratch.path(), &mut random, 6);
    let numbers = sample.numbers();
    let prune = |newest, needed| sample.store.prune(JOB, Keep { newest, needed }, &mut |_, _| ()).unwrap();
    let done = prune(7, 0);
    assert!(done.squashed.is_empty() && done.removed.is_empty() && done.needed.is_empty());
    // Two that are older are needed, and may stay.
    let done = prune(5, 2);
    assert!(done.squashed.is_empty() && done.removed.is_empty());
    assert_eq!(done.needed, numbers[..2]);
    sample.check(&numbers);
    let done = prune(4, 2);
    assert_eq!(done.squashed, numbers[3..4]);
    assert_eq!(done.removed, numbers[..3].iter().rev().copied().collect::<Vec<_>>());
    sample.check(&numbers[3..]);
    // One that is needed by a dump that goes on stays, and what it is built on.
    let claim = sample.store.claim(JOB).unwrap();
    let parent = parent_of(&sample.dir(numbers[4]));
    let writer = Writer::create_incremental(claim.dir(), [0; 64], Compression::None, parent).unwrap();
    let done = prune(1, 0);
    assert_eq!((done.squashed, done.removed), (numbers[6..].to_vec(), numbers[5..6].to_vec()));
    assert_eq!(done.needed, numbers[3..5]);
    drop(writer);
    drop(claim);
    let done = prune(0, 0);
    assert_eq!(done.removed, [numbers[4], numbers[3]]);
    sample.check(&numbers[6..]);
    assert_eq!(prune(1, 0), ckpt_image::store::Pruned::default());
}

/// Whoever opens a checkpoint by its path while that is squashed gets the old image or the new one.
#[test]
fn reading_races_with_squashing() {
    use std::sync::atomic::{AtomicU64, Ordering};
    let mut random = Random(seed("reading_races_with_squashing"));
    let scratch = Scratch::new("read-race");
    let sample = sample_of(scratch.path(), &mut random, 0, 20);
    let job = scratch.path().join(JOB);
    let newest = AtomicU64::new(1000);
    std::thread::scope(|scope| {
        let mut writer = crate::chain::start(&job, 1000, 0, Compression::None);
        writer.pages(1, 0, &text_page("base").repeat(20), ZeroPages::Elide).unwrap();
        writer.finish().unwrap();
        let reader = scope.spawn(|| {
            let mut opened = 0;
            loop {
                let number = newest.load(Ordering::SeqCst);
                if number == u64::MAX {
                    return opened;
                }
                let reader = match Reader::open(&job.join(number.to_string())) {
                    // There is a newer one, and this one may have been removed.
                    Err(_) if newest.load(Ordering::SeqCst) != number => continue,
                    opened => opened.unwrap(),
                };
                assert_eq!(read_all(&reader)[&1].len(), 20);
                opened += 1;
            }
        });
        for number in 1001..1040 {
            let mut writer = crate::chain::start(&job, number, number - 1, Compression::None);
            writer.same(1, 0, 10 * 4096, 1).unwrap();
            writer.pages(1, 10 * 4096, &text_page("newer").repeat(10), ZeroPages::Elide).unwrap();
            writer.finish().unwrap();
            newest.store(number, Ordering::SeqCst);
            squash(&sample.store, number, false).unwrap();
            // Its parent may go at once.
            sample.store.remove(JOB, number - 1).unwrap();
        }
        newest.store(u64::MAX, Ordering::SeqCst);
        println!("opened {} times", reader.join().unwrap());
    });
}
