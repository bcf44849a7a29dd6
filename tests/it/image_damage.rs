// SPDX-License-Identifier: MIT OR Apache-2.0
//! Damaged images give an error, never a panic nor a process; a store that is full or read-only costs a checkpoint,
//! never the job.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use ckpt_tests::{
    Failure, Outcome, announce,
    fingerprint::Fingerprint,
    guest::{Guest, passes},
    job::Job,
    process::Finished,
    proof::{each_user, left_nothing_behind, with_ready_job},
    sandbox::Sandbox,
    seed::{Random, count_from},
    user::{User, Users},
};
use xxhash_rust::xxh3::xxh3_64;

/// The status for a damaged or too new image.
const CORRUPT: i32 = 115;
/// The status for a full or read-only store.
const NO_SPACE: i32 = 117;
/// Bytes before each frame of a records file.
const FRAME_MAGIC: &[u8] = b"ckfr";
/// Of the header of the records file, in bytes; its checksum is the last eight.
const HEADER_BYTES: usize = 256;

fn failure(what: &str, error: std::io::Error) -> Failure {
    Failure(format!("{what}: {error}"))
}

/// A directory with the same image files.
fn copy_of(image: &Path, sandbox: &Sandbox, name: &str) -> Outcome<PathBuf> {
    let copy = sandbox.root.join(name);
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir(&copy).map_err(|error| failure("cannot copy the image", error))?;
    sandbox.user.give(&copy)?;
    for entry in fs::read_dir(image).map_err(|error| failure("cannot read the image", error))?.flatten() {
        let target = copy.join(entry.file_name());
        fs::copy(entry.path(), &target).map_err(|error| failure("cannot copy the image", error))?;
        sandbox.user.give(&target)?;
    }
    Ok(copy)
}

fn expect_corrupt(finished: &Finished, what: &str) -> Outcome<()> {
    let panicked = finished.stderr.contains("panicked") || finished.code >= 128;
    if finished.code != CORRUPT || panicked || finished.stderr.trim().is_empty() {
        return Err(Failure(format!(
            "{what}: expected status {CORRUPT} and a message:\n{}",
            finished.report()
        )));
    }
    Ok(())
}

/// verify, inspect and restore of the damaged image all say so, and no job comes of it.
fn expect_all_refuse(job: &Job<'_>, dir: &Path, what: &str, with_restore: bool) -> Outcome<()> {
    let dir = format!("{}/", dir.display());
    expect_corrupt(&job.ckpt(&["verify", &dir], &[])?, &format!("verify, {what}"))?;
    if with_restore {
        let restored = job.ckpt(&["restore", &dir, "--detach", "--name", "damaged"], &[])?;
        let adopted = job.adopt("damaged");
        expect_corrupt(&restored, &format!("restore, {what}"))?;
        if adopted.init().is_some() {
            return Err(Failure(format!("restore, {what}: a job came of it")));
        }
    }
    Ok(())
}

fn flip(path: &Path, at: u64, bit: u32) -> Outcome<()> {
    let file =
        fs::File::options().read(true).write(true).open(path).map_err(|error| failure("open", error))?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).map_err(|error| failure("read", error))?;
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, at).map_err(|error| failure("write", error))
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).map(|metadata| metadata.len()).unwrap_or(0)
}

/// A checkpoint of `guest` in a directory of its own, while the job goes on.
fn with_image(label: &str, users: Users, flow: impl Fn(&Sandbox, &Job<'_>, &Path, &str) -> Outcome<()>) {
    each_user(label, users, |sandbox| {
        with_ready_job(&Guest::new("mem_brk"), sandbox, |job, nonce| {
            let image = sandbox.root.join("image");
            let dir = format!("{}/", image.display());
            job.dump(&["--dir", &dir])?;
            job.succeed(&["verify", &dir], &[])?;
            job.kill()?;
            flow(sandbox, job, &image, nonce)
        })
    });
}

#[test]
fn flipped_bits() {
    let moments = count_from("CKPT_TEST_FLIPS", 60);
    with_image("damage-flipped", Users::OnlyPlain, |sandbox, job, image, _| {
        let mut random = Random::announced("damage-flipped");
        let records = fs::read(image.join("records")).map_err(|error| failure("records", error))?;
        // Every kind of frame once, in its header and in its body, then any bit of either file.
        let mut places: Vec<(&str, u64)> = Vec::new();
        let mut kinds = std::collections::HashSet::new();
        for at in (0..records.len().saturating_sub(40)).filter(|at| records[*at..].starts_with(FRAME_MAGIC)) {
            if kinds.insert([records[at + 4], records[at + 5]]) {
                places.push(("records", at as u64 + random.below(40)));
                places.push(("records", (at as u64 + 40 + random.below(16)).min(records.len() as u64 - 1)));
            }
        }
        if kinds.len() < 3 {
            return Err(Failure(format!(
                "only {} kinds of frames found: has the format changed?",
                kinds.len()
            )));
        }
        places.push(("records", random.below(HEADER_BYTES as u64)));
        places.push(("pages", random.below(4096)));
        for _ in 0..moments {
            let file = if random.below(2) == 0 { "records" } else { "pages" };
            places.push((file, random.below(len(&image.join(file)))));
        }
        let copy = copy_of(image, sandbox, "flipped")?;
        for (number, (file, at)) in places.iter().enumerate() {
            let bit = random.below(8) as u32;
            flip(&copy.join(file), *at, bit)?;
            let what = format!("bit {bit} of byte {at} of {file} flipped");
            // What restore reads is checked by it as well; page content only as far as it is needed.
            expect_all_refuse(job, &copy, &what, *file == "records" && number % 4 == 0)?;
            flip(&copy.join(file), *at, bit)?;
        }
        job.succeed(&["verify", &format!("{}/", copy.display())], &[]).map(|_| ())
    });
}

/// The guest's memory is a function of its nonce (`guests/mem_pattern.h`): where it lies in the image is known.
#[test]
fn flipped_bit_in_memory_of_the_job() {
    with_image("damage-memory", Users::Both, |sandbox, job, image, nonce| {
        let seed = u64::from_str_radix(&nonce[..16], 16)
            .map_err(|error| Failure(format!("nonce {nonce}: {error}")))?;
        let pattern: Vec<u8> = (0..8).flat_map(|i| pattern_word(seed, i).to_le_bytes()).collect();
        let pages = fs::read(image.join("pages")).map_err(|error| failure("pages", error))?;
        let at = pages.windows(pattern.len()).position(|window| window == pattern).ok_or_else(|| {
            Failure::new("the guest's memory is not in the image, though it is not compressed")
        })?;
        let copy = copy_of(image, sandbox, "flipped")?;
        flip(&copy.join("pages"), at as u64 + 5, 3)?;
        expect_all_refuse(job, &copy, &format!("memory of the job flipped at byte {at} of pages"), true)
    });
}

/// The i-th word of the pattern that starts at `seed`.
fn pattern_word(seed: u64, i: u64) -> u64 {
    let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn truncated() {
    with_image("damage-truncated", Users::OnlyPlain, |sandbox, job, image, _| {
        let mut random = Random::announced("damage-truncated");
        for file in ["records", "pages"] {
            let whole = len(&image.join(file));
            let mut lengths = vec![0, 1, 8, 255, 256, 4096, whole - 1, whole.saturating_sub(4096)];
            lengths.extend((0..8).map(|_| random.below(whole)));
            for length in lengths.into_iter().filter(|length| *length < whole) {
                let copy = copy_of(image, sandbox, "truncated")?;
                fs::File::options()
                    .write(true)
                    .open(copy.join(file))
                    .and_then(|file| file.set_len(length))
                    .map_err(|error| failure("truncate", error))?;
                expect_all_refuse(job, &copy, &format!("{file} cut to {length} of {whole} bytes"), true)?;
            }
        }
        Ok(())
    });
}

#[test]
fn missing() {
    with_image("damage-missing", Users::OnlyPlain, |sandbox, job, image, _| {
        for file in ["records", "pages"] {
            let copy = copy_of(image, sandbox, "missing")?;
            fs::remove_file(copy.join(file)).map_err(|error| failure("remove", error))?;
            expect_all_refuse(job, &copy, &format!("without {file}"), true)?;
            let verified = job.ckpt(&["verify", &format!("{}/", copy.display())], &[])?;
            if !verified.stderr.contains(&format!("/{file}: damaged")) {
                return Err(Failure(format!("{file} is not named:\n{}", verified.report())));
            }
        }
        Ok(())
    });
}

#[test]
fn too_new() {
    with_image("damage-too-new", Users::OnlyPlain, |sandbox, job, image, _| {
        let copy = copy_of(image, sandbox, "newer")?;
        let path = copy.join("records");
        let mut bytes = fs::read(&path).map_err(|error| failure("records", error))?;
        bytes[8..12].copy_from_slice(&99u32.to_le_bytes());
        let sum = xxh3_64(&bytes[..HEADER_BYTES - 8]);
        bytes[HEADER_BYTES - 8..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
        fs::write(&path, bytes).map_err(|error| failure("records", error))?;
        expect_all_refuse(job, &copy, "format version 99", true)?;
        let verified = job.ckpt(&["verify", &format!("{}/", copy.display())], &[])?;
        let is_named = verified.stderr.contains("99");
        if is_named {
            Ok(())
        } else {
            Err(Failure(format!("the version is not named:\n{}", verified.report())))
        }
    });
}

#[test]
fn files_of_two_checkpoints_mixed() {
    each_user("damage-mixed", Users::OnlyPlain, |sandbox| {
        with_ready_job(&Guest::new("mem_brk"), sandbox, |job, _| {
            let [first, second] = ["one", "two"].map(|name| sandbox.root.join(name));
            for image in [&first, &second] {
                job.dump(&["--dir", &format!("{}/", image.display())])?;
            }
            let mixed = copy_of(&first, sandbox, "mixed")?;
            fs::copy(second.join("pages"), mixed.join("pages")).map_err(|error| failure("pages", error))?;
            expect_all_refuse(job, &mixed, "records of one checkpoint, pages of another", true)
        })
    });
}

/// The dump fails with status `NO_SPACE`, the job goes on unharmed, no checkpoint is to be seen, and a dump elsewhere
/// works.
fn expect_dump_fails(sandbox: &Sandbox, job: &Job<'_>, nonce: &str, store: &str) -> Outcome<()> {
    let init = job.init().ok_or_else(|| Failure::new("the job does not run"))?;
    let before = Fingerprint::take(init);
    let failed = job.ckpt(&["dump", &job.name, "--store", store], &[])?;
    if failed.code != NO_SPACE || failed.stderr.contains("panicked") {
        return Err(Failure(format!("expected status {NO_SPACE}:\n{}", failed.report())));
    }
    left_nothing_behind(&before, init)?;
    let verified = job.ckpt(&["verify", &job.name, "--store", store], &[])?;
    if verified.code != 112 {
        return Err(Failure(format!("half a checkpoint is to be seen:\n{}", verified.report())));
    }
    job.dump(&["--dir", &format!("{}/elsewhere/", sandbox.root.display())])?;
    passes(sandbox, nonce)
}

/// A mount that is gone when the test ends, however it ends.
struct Mount<'a> {
    sandbox: &'a Sandbox,
    path: String,
}

impl<'a> Mount<'a> {
    fn new(sandbox: &'a Sandbox, path: &Path, options: &str) -> Outcome<Mount<'a>> {
        let path = path.to_string_lossy().into_owned();
        let words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", &path].map(String::from);
        let mounted = sandbox.execute(&words, &[], Duration::from_secs(10))?;
        if mounted.code == 0 { Ok(Mount { sandbox, path }) } else { Err(Failure(mounted.report())) }
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let words = ["umount", "-l", &self.path].map(String::from);
        let _ = self.sandbox.execute(&words, &[], Duration::from_secs(10));
    }
}

#[test]
fn full_store() {
    each_user("damage-full-store", Users::OnlyRoot, |sandbox| {
        let small = sandbox.root.join("small");
        fs::create_dir(&small).map_err(|error| failure("mkdir", error))?;
        let mount = match Mount::new(sandbox, &small, "size=300k") {
            Ok(mount) => mount,
            Err(why) => {
                announce(&format!("skipped: full store: this host allows no mount: {why}"));
                return Ok(());
            }
        };
        with_ready_job(&Guest::new("mem_malloc"), sandbox, |job, nonce| {
            expect_dump_fails(sandbox, job, nonce, &mount.path)
        })
    });
}

#[test]
fn read_only_store() {
    each_user("damage-read-only-store", Users::Both, |sandbox| {
        let read_only = sandbox.root.join("read-only");
        fs::create_dir(&read_only).map_err(|error| failure("mkdir", error))?;
        // Root writes where modes forbid it: it needs a read-only mount. The plain user meets a directory of root's.
        let _mount = match sandbox.user {
            User::Plain => None,
            User::Root => match Mount::new(sandbox, &read_only, "ro") {
                Ok(mount) => Some(mount),
                Err(why) => {
                    announce(&format!("skipped: read-only store as root: this host allows no mount: {why}"));
                    return Ok(());
                }
            },
        };
        if sandbox.user == User::Plain {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&read_only, fs::Permissions::from_mode(0o555))
                .map_err(|error| failure("chmod", error))?;
        }
        let store = read_only.to_string_lossy().into_owned();
        with_ready_job(&Guest::new("mem_malloc"), sandbox, |job, nonce| {
            expect_dump_fails(sandbox, job, nonce, &store)
        })
    });
}
