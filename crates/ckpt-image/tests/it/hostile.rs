// SPDX-License-Identifier: MIT OR Apache-2.0
//! Damaged and malicious images: always an error, never a panic, never much memory.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ckpt_image::codec::{self, CodecError, Decode, Encode};
use ckpt_image::{Compression, Identity, ReadError, Reader, RunKind, VerifyReport, Writer, ZeroPages};
use xxhash_rust::xxh3::xxh3_64;

use crate::scratch::{Random, Scratch, seed, write_sample};

const ALL: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd];
const HEADER: usize = 256;
const FRAME: usize = 40;

fn check(dir: &Path) -> Result<VerifyReport, ReadError> {
    Reader::open(dir)?.verify(&mut |_, _| ())
}

fn sample(scratch: &Scratch, compression: Compression) -> PathBuf {
    let dir = scratch.dir(&compression.to_string());
    write_sample(&dir, compression);
    check(&dir).unwrap();
    dir
}

/// The two files of an image in memory, to be changed and written back.
#[derive(Clone)]
struct Image {
    records: Vec<u8>,
    pages: Vec<u8>,
}

impl Image {
    fn load(dir: &Path) -> Self {
        Image { records: fs::read(dir.join("records")).unwrap(), pages: fs::read(dir.join("pages")).unwrap() }
    }

    fn store(&self, dir: &Path) {
        fs::write(dir.join("records"), &self.records).unwrap();
        fs::write(dir.join("pages"), &self.pages).unwrap();
    }

    /// Where the frames begin, as far as their lengths lead.
    fn frames(&self) -> Vec<usize> {
        let mut found = Vec::new();
        let mut at = HEADER;
        while at + FRAME <= self.records.len() {
            found.push(at);
            let body = u32::from_le_bytes(self.records[at + 24..at + 28].try_into().unwrap()) as usize;
            at += FRAME + body.next_multiple_of(8);
        }
        found
    }

    fn frame_of_kind(&self, kind: u16) -> usize {
        let is = |at: &usize| self.records[at + 4..at + 6] == kind.to_le_bytes();
        self.frames().into_iter().find(is).unwrap()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.records[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Makes all checksums right, so that what was changed gets past them. Lengths that lead outside are left.
    fn fix_checksums(&mut self) {
        fn seal(block: &mut [u8]) {
            let body = block.len() - 8;
            let sum = xxh3_64(&block[..body]);
            block[body..].copy_from_slice(&sum.to_le_bytes());
        }
        if self.records.len() >= HEADER {
            seal(&mut self.records[..HEADER]);
        }
        if self.pages.len() >= 4096 {
            seal(&mut self.pages[..4096]);
        }
        self.fix_run_checksums();
        let mut chain = self.records.get(HEADER - 8..HEADER).unwrap_or(&[]).to_vec();
        for at in self.frames() {
            let body = u32::from_le_bytes(self.records[at + 24..at + 28].try_into().unwrap()) as usize;
            let end = at + FRAME + body.next_multiple_of(8);
            if end > self.records.len() {
                return;
            }
            if self.records[at + 4..at + 6] == [0xff, 0xff] && body >= 32 {
                let sum = xxh3_64(&chain);
                self.put(at + FRAME + 24, &sum.to_le_bytes());
            }
            self.put(at + 32, &[0; 8]);
            let sum = xxh3_64(&self.records[at..end]);
            self.put(at + 32, &sum.to_le_bytes());
            chain.extend_from_slice(&sum.to_le_bytes());
        }
    }

    fn fix_run_checksums(&mut self) {
        for at in self.frames() {
            let body = u32::from_le_bytes(self.records[at + 24..at + 28].try_into().unwrap()) as usize;
            if self.records[at + 4..at + 6] != [0x00, 0xff] {
                continue;
            }
            let mut entry = at + FRAME;
            while entry + 48 <= (at + FRAME + body).min(self.records.len()) {
                let u64_at = |n: usize| u64::from_le_bytes(self.records[n..n + 8].try_into().unwrap());
                let from = u64_at(entry + 24);
                let len = u32::from_le_bytes(self.records[entry + 32..entry + 36].try_into().unwrap());
                let stored = usize::try_from(from).ok().and_then(|from| {
                    self.pages.get(from..from.checked_add((len as usize).next_multiple_of(8))?)
                });
                if let Some(sum) = stored.filter(|stored| !stored.is_empty()).map(xxh3_64) {
                    self.put(entry + 40, &sum.to_le_bytes());
                }
                entry += 48;
            }
        }
    }
}

#[test]
fn every_flipped_bit_is_found() {
    for compression in ALL {
        let scratch = Scratch::new("flip");
        let dir = sample(&scratch, compression);
        for name in ["records", "pages"] {
            let path = dir.join(name);
            let bytes = fs::read(&path).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            for (at, byte) in bytes.iter().enumerate() {
                for bit in 0..8 {
                    file.write_all_at(&[byte ^ (1 << bit)], at as u64).unwrap();
                    assert!(check(&dir).is_err(), "{compression}: bit {bit} of byte {at} of {name}");
                }
                file.write_all_at(&[*byte], at as u64).unwrap();
            }
        }
        check(&dir).unwrap();
    }
}

#[test]
fn every_truncation_and_extension_is_found() {
    for compression in ALL {
        let scratch = Scratch::new("cut");
        let dir = sample(&scratch, compression);
        for name in ["records", "pages"] {
            let path = dir.join(name);
            let bytes = fs::read(&path).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            for len in (0..bytes.len()).rev() {
                file.set_len(len as u64).unwrap();
                assert!(Reader::open(&dir).is_err(), "{compression}: {name} cut to {len}");
            }
            for extra in [1, 8, 40, 4096] {
                let mut longer = bytes.clone();
                longer.resize(bytes.len() + extra, 0);
                fs::write(&path, longer).unwrap();
                let error = Reader::open(&dir).unwrap_err();
                assert!(matches!(error, ReadError::Damaged { .. }), "{compression}: {name}+{extra}: {error}");
            }
            fs::write(&path, &bytes).unwrap();
        }
        check(&dir).unwrap();
    }
}

/// The image, changed and with right checksums, must be refused; returns the message.
fn refused(image: &Image, dir: &Path, change: impl FnOnce(&mut Image)) -> String {
    let mut image = image.clone();
    change(&mut image);
    image.fix_checksums();
    image.store(dir);
    check(dir).expect_err("a malicious image was accepted").to_string()
}

#[test]
fn newer_formats_are_refused_by_version() {
    let scratch = Scratch::new("newer");
    let dir = sample(&scratch, Compression::Lz4);
    let image = Image::load(&dir);
    let message = refused(&image, &dir, |image| image.put(8, &7u32.to_le_bytes()));
    assert!(message.contains("version 7") && message.contains("up to 1"), "{message}");
    let message = refused(&image, &dir, |image| image.pages[8] = 9);
    assert!(message.contains("version 9") && message.contains("pages"), "{message}");
    // A newer header whose checksum lies elsewhere still names its version.
    let mut odd = image.clone();
    odd.put(8, &3u32.to_le_bytes());
    odd.store(&dir);
    let message = check(&dir).unwrap_err().to_string();
    assert!(message.contains("version 3"), "{message}");
    let message = refused(&image, &dir, |image| image.put(28, &1u32.to_le_bytes()));
    assert!(message.contains("unknown flags 0x1"), "{message}");
    let message = refused(&image, &dir, |image| image.put(20, &65536u32.to_le_bytes()));
    assert!(message.contains("65536"), "{message}");
    let message = refused(&image, &dir, |image| image.put(24, &3u32.to_le_bytes()));
    assert!(message.contains("compression number 3"), "{message}");
    let runs = image.frame_of_kind(0xff00);
    let message = refused(&image, &dir, |image| image.put(runs + 6, &3u16.to_le_bytes()));
    assert!(message.contains("page index has version 3"), "{message}");
    // Version 2 is that of incremental images, which this one is not.
    let message = refused(&image, &dir, |image| image.put(runs + 6, &2u16.to_le_bytes()));
    assert!(message.contains("impossible version"), "{message}");
    let message = refused(&image, &dir, |image| image.put(runs + 4, &0xff05u16.to_le_bytes()));
    assert!(message.contains("0xff05"), "{message}");
}

#[test]
fn impossible_counts_and_lengths_are_refused() {
    let scratch = Scratch::new("counts");
    let dir = sample(&scratch, Compression::Lz4);
    let image = Image::load(&dir);
    for at in image.frames() {
        for len in [u32::MAX, 1 << 31, (64 << 20) + 1, 64 << 20, 1 << 20, 0] {
            let old = u32::from_le_bytes(image.records[at + 24..at + 28].try_into().unwrap());
            if len != old {
                refused(&image, &dir, |image| image.put(at + 24, &len.to_le_bytes()));
            }
        }
        refused(&image, &dir, |image| image.put(at + 28, &1u32.to_le_bytes()));
        refused(&image, &dir, |image| image.put(at, b"nope"));
    }
    let entry = image.frame_of_kind(0xff00) + FRAME;
    let end = image.frame_of_kind(0xffff) + FRAME;
    // (offset in the first run entry, what is put there): the first entry is a run of packed data.
    let changes: &[(usize, &[u8])] = &[
        (8, &1u64.to_le_bytes()),
        (8, &(u64::MAX - 4095).to_le_bytes()),
        (16, &0u32.to_le_bytes()),
        (16, &257u32.to_le_bytes()),
        (16, &u32::MAX.to_le_bytes()),
        (20, &0u32.to_le_bytes()),
        (20, &2u32.to_le_bytes()),
        (20, &3u32.to_le_bytes()),
        (24, &0u64.to_le_bytes()),
        (24, &u64::MAX.to_le_bytes()),
        (32, &0u32.to_le_bytes()),
        (32, &4096u32.to_le_bytes()),
        (32, &u32::MAX.to_le_bytes()),
        (36, &0u32.to_le_bytes()),
        (36, &2u32.to_le_bytes()),
        (36, &3u32.to_le_bytes()),
    ];
    for (at, bytes) in changes {
        refused(&image, &dir, |image| image.put(entry + at, bytes));
    }
    for (at, bytes) in [(0, u64::MAX), (0, 0), (8, 0), (8, u64::MAX), (16, 0), (16, u64::MAX)] {
        refused(&image, &dir, |image| image.put(end + at, &bytes.to_le_bytes()));
    }
    image.store(&dir);
    check(&dir).unwrap();
}

#[test]
fn frames_cannot_be_removed_repeated_or_exchanged() {
    let scratch = Scratch::new("order");
    let dir = sample(&scratch, Compression::None);
    let image = Image::load(&dir);
    let frames = image.frames();
    let cut = |n: usize| image.records[frames[n]..frames[n + 1]].to_vec();
    let (first, second) = (cut(0), cut(1));
    let (start, rest) = (&image.records[..HEADER], &image.records[frames[2]..]);
    // Every frame is whole, so only the digest in the last one can tell.
    for body in [second.clone(), [first.clone(), first.clone()].concat(), [second, first].concat()] {
        let changed = Image { records: [start, &body, rest].concat(), pages: image.pages.clone() };
        changed.store(&dir);
        let error = check(&dir).unwrap_err().to_string();
        assert!(error.contains("order"), "{error}");
    }
}

#[test]
fn overlapping_runs_are_refused() {
    let scratch = Scratch::new("overlap");
    let dir = sample(&scratch, Compression::None);
    let image = Image::load(&dir);
    let entry = image.frame_of_kind(0xff00) + FRAME;
    // The second entry is the zero page behind the first entry's page.
    let message = refused(&image, &dir, |image| image.put(entry + 48 + 8, &0x7000u64.to_le_bytes()));
    assert!(message.contains("overlap"), "{message}");
}

#[test]
fn files_of_two_images_are_not_mixed() {
    let scratch = Scratch::new("mixed");
    let dir = sample(&scratch, Compression::None);
    let image = Image::load(&dir);
    let message = refused(&image, &dir, |image| image.pages[24] ^= 1);
    assert!(message.contains("another checkpoint"), "{message}");
}

#[test]
fn what_is_no_image_is_said_to_be_none() {
    let scratch = Scratch::new("nothing");
    let error = Reader::open(&scratch.path().join("absent")).unwrap_err();
    assert!(matches!(error, ReadError::Io { .. }), "{error}");
    let error = Reader::open(scratch.path()).unwrap_err();
    assert!(matches!(&error, ReadError::FileMissing { path } if path.ends_with("/records")), "{error}");
    fs::write(scratch.path().join("records"), vec![b'x'; 5000]).unwrap();
    fs::write(scratch.path().join("pages"), vec![b'x'; 5000]).unwrap();
    let error = Reader::open(scratch.path()).unwrap_err();
    assert!(matches!(error, ReadError::NotAnImage { .. }), "{error}");
    // A FIFO must not block the reader, nor a directory confuse it.
    fs::remove_file(scratch.path().join("records")).unwrap();
    nix::unistd::mkfifo(&scratch.path().join("records"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = Reader::open(scratch.path()).unwrap_err();
    assert!(matches!(error, ReadError::NotAnImage { .. }), "{error}");
    fs::remove_file(scratch.path().join("records")).unwrap();
    fs::create_dir(scratch.path().join("records")).unwrap();
    let error = Reader::open(scratch.path()).unwrap_err();
    assert!(matches!(error, ReadError::NotAnImage { .. }), "{error}");
}

#[test]
fn a_huge_sparse_file_takes_no_memory() {
    let scratch = Scratch::new("sparse");
    let dir = sample(&scratch, Compression::None);
    let file = OpenOptions::new().write(true).open(dir.join("records")).unwrap();
    file.set_len(1 << 40).unwrap();
    let error = Reader::open(&dir).unwrap_err();
    assert!(error.to_string().contains("limit"), "{error}");
}

/// The highest resident size this process has had, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn mutated_images_never_panic() {
    let mut random = Random(seed("mutated_images_never_panic"));
    let mut accepted = 0;
    for compression in ALL {
        let scratch = Scratch::new("fuzz");
        let dir = sample(&scratch, compression);
        let image = Image::load(&dir);
        for _ in 0..3000 {
            let mut mutant = image.clone();
            for _ in 0..1 + random.below(4) {
                mutate(&mut mutant, &mut random);
            }
            // Most changes shall get past the checksums, to reach what is behind.
            if random.below(8) != 0 {
                mutant.fix_checksums();
            }
            mutant.store(&dir);
            // A change of a record's body is a valid other image; all that counts is that it reads without a panic.
            accepted += u32::from(check(&dir).is_ok());
        }
    }
    println!("accepted {accepted} mutants of 9000");
    assert!(accepted < 9000, "nothing was mutated");
    // The other tests of this process run at the same time; the images here are a few kilobytes.
    assert!(peak_kib() < 512 << 10, "peak memory {} KiB", peak_kib());
}

fn mutate(image: &mut Image, random: &mut Random) {
    let interesting =
        [0, 1, 7, 8, 40, 48, 255, 256, 4095, 4096, 1 << 20, 1 << 31, u64::from(u32::MAX), u64::MAX];
    let in_records = random.below(3) != 0;
    let file = if in_records { &mut image.records } else { &mut image.pages };
    if file.len() < 16 {
        return;
    }
    let at = random.below(file.len() - 8);
    match random.below(6) {
        0 => file[at] ^= 1 << random.below(8),
        1 => file[at] = random.next() as u8,
        2 => {
            let value = interesting[random.below(interesting.len())];
            let at = at & !7;
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        3 => {
            let value = interesting[random.below(interesting.len())] as u32;
            let at = at & !3;
            file[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        4 => file.truncate(at),
        _ => {
            // Repeat a stretch.
            let end = at + 1 + random.below(file.len() - at);
            let part = file[at..end].to_vec();
            file.splice(at..at, part);
        }
    }
}

#[test]
fn packed_bytes_cannot_unpack_to_more_or_less() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        let scratch = Scratch::new("bomb");
        let dir = sample(&scratch, compression);
        let image = Image::load(&dir);
        let entry = image.frame_of_kind(0xff00) + FRAME;
        for pages in [2u32, 256] {
            refused(&image, &dir, |image| image.put(entry + 16, &pages.to_le_bytes()));
        }
        let mut random = Random(seed("packed_bytes_cannot_unpack_to_more_or_less"));
        let stored = image.records[entry + 32] as usize;
        for _ in 0..500 {
            let mut mutant = image.clone();
            mutant.pages[4096 + random.below(stored)] = random.next() as u8;
            mutant.fix_checksums();
            mutant.store(&dir);
            // Other bytes may be valid packed data; then the length is right.
            if let Ok(reader) = Reader::open(&dir) {
                let run = reader.objects().flat_map(|o| o.runs).find(|r| r.kind == RunKind::Data).unwrap();
                let mut buf = Vec::new();
                if reader.read_run(run, &mut buf).is_ok() {
                    assert_eq!(buf.len() as u64, run.bytes);
                }
            }
        }
    }
}

#[derive(Encode, Decode, PartialEq, Debug)]
#[bincode(crate = "ckpt_image::codec::bincode")]
struct Body {
    names: Vec<String>,
    data: Vec<u8>,
}

#[test]
fn bodies_are_decoded_with_limits() {
    let body = Body { names: vec!["a".into(), "bc".into()], data: vec![1, 2, 3] };
    let bytes = codec::encode(&body).unwrap();
    assert_eq!(codec::decode::<Body>(&bytes).unwrap(), body);
    for len in 0..bytes.len() {
        assert!(codec::decode::<Body>(&bytes[..len]).is_err(), "cut to {len}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(codec::decode::<Body>(&longer), Err(CodecError::Trailing { .. })));
    for count in [u64::MAX, 1 << 62, 1 << 40, 1 << 30] {
        let mut huge = bytes.clone();
        huge[..8].copy_from_slice(&count.to_le_bytes());
        let error = codec::decode::<Body>(&huge).unwrap_err().to_string();
        assert!(error.contains("Body"), "{error}");
    }
    let mut random = Random(seed("bodies_are_decoded_with_limits"));
    for _ in 0..20_000 {
        let mut mutant = bytes.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(mutant.len());
            mutant[at] = random.next() as u8;
        }
        codec::decode::<Body>(&mutant).ok();
    }
}

#[test]
fn bodies_are_encoded_as_documented() {
    #[derive(Encode, Decode, PartialEq, Debug)]
    #[bincode(crate = "ckpt_image::codec::bincode")]
    enum Choice {
        Unit,
        Tuple(u16, i8),
        Named { flag: bool },
    }
    #[derive(Encode, Decode, PartialEq, Debug)]
    #[bincode(crate = "ckpt_image::codec::bincode")]
    struct All {
        a: u8,
        b: u16,
        c: u32,
        d: u64,
        e: i32,
        f: usize,
        g: Option<u16>,
        h: Option<u16>,
        i: Vec<u16>,
        j: String,
        k: [u8; 3],
        l: (bool, char),
        m: Vec<Choice>,
        n: u128,
        o: f64,
        p: std::collections::BTreeMap<u8, u8>,
    }
    let value = All {
        a: 1,
        b: 0x0203,
        c: 0x0405_0607,
        d: 0x08,
        e: -2,
        f: 9,
        g: None,
        h: Some(5),
        i: vec![1, 2],
        j: "hä".into(),
        k: [7, 8, 9],
        l: (true, 'ä'),
        m: vec![Choice::Unit, Choice::Tuple(3, -1), Choice::Named { flag: false }],
        n: 1,
        o: 1.0,
        p: [(1, 2)].into(),
    };
    let expected: Vec<u8> = [
        &[1][..],
        &[3, 2],
        &[7, 6, 5, 4],
        &[8, 0, 0, 0, 0, 0, 0, 0],
        &[0xfe, 0xff, 0xff, 0xff],
        &[9, 0, 0, 0, 0, 0, 0, 0],
        &[0],
        &[1, 5, 0],
        &[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0],
        &[3, 0, 0, 0, 0, 0, 0, 0, b'h', 0xc3, 0xa4],
        &[7, 8, 9],
        &[1, 0xc3, 0xa4],
        &[3, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0, 0],
        &[1, 0, 0, 0, 3, 0, 0xff],
        &[2, 0, 0, 0, 0],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0, 0, 0, 0, 0xf0, 0x3f],
        &[1, 0, 0, 0, 0, 0, 0, 0, 1, 2],
    ]
    .concat();
    assert_eq!(codec::encode(&value).unwrap(), expected);
    assert_eq!(codec::decode::<All>(&expected).unwrap(), value);
}

/// The example in docs/image-format.md, and an enum with numbers of its own, which do not count.
#[test]
fn the_documented_example_is_right() {
    #[derive(Encode)]
    #[bincode(crate = "ckpt_image::codec::bincode")]
    #[allow(dead_code)]
    enum Kind {
        A,
        B(u16),
    }
    #[derive(Encode)]
    #[bincode(crate = "ckpt_image::codec::bincode")]
    struct Example {
        kind: Kind,
        name: Option<String>,
        fds: Vec<i32>,
    }
    #[derive(Encode, Decode, PartialEq, Debug)]
    #[bincode(crate = "ckpt_image::codec::bincode")]
    enum Numbered {
        Five = 5,
        Next,
    }
    let bytes = codec::encode(&Example { kind: Kind::B(3), name: Some("x".into()), fds: vec![5] }).unwrap();
    let expected: [&[u8]; 3] =
        [&[1, 0, 0, 0, 3, 0], &[1, 1, 0, 0, 0, 0, 0, 0, 0, b'x'], &[1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0]];
    assert_eq!(bytes, expected.concat());
    assert_eq!(codec::encode(&[Numbered::Five, Numbered::Next]).unwrap(), [0, 0, 0, 0, 1, 0, 0, 0]);
    assert!(codec::decode::<Numbered>(&[5, 0, 0, 0]).is_err());
}

#[test]
fn several_threads_may_read() {
    let scratch = Scratch::new("threads");
    let dir = sample(&scratch, Compression::Zstd);
    let fd = File::open(&dir).unwrap();
    let reader = Reader::open_at(fd.into(), "by descriptor").unwrap();
    let read = |reader: &Reader| {
        let mut buf = Vec::new();
        let mut all = Vec::new();
        for run in reader.objects().flat_map(|object| object.runs) {
            reader.read_run(run, &mut buf).unwrap();
            all.extend_from_slice(&buf);
        }
        all
    };
    let expected = read(&reader);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| assert!(read(&reader) == expected)));
        }
    });
}

/// A chain of two in `<dir>/1` and `<dir>/2`, packed by `compression`. The incremental one lists, in this order: content, a zero
/// page, pages of the parent's object 10 that are zero there, content, and not listed there, and its object 11 under
/// another number.
fn sample_chain(scratch: &Scratch, compression: Compression) -> [PathBuf; 2] {
    let job = scratch.dir(&format!("chain-{compression}"));
    let dirs = ["1", "2"].map(|name| job.join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    write_sample(&dirs[0], compression);
    let parent = crate::chain::parent_of(&dirs[0]);
    let identity = Identity { id: [7; 16], created_unix_ns: 5 };
    let fd = File::open(&dirs[1]).unwrap();
    let features = crate::scratch::sample_features();
    let mut writer =
        Writer::create_incremental_at(fd.into(), &dirs[1], features, compression, identity, parent).unwrap();
    writer.record(2, 1, 42, 7, b"thirteen byte").unwrap();
    let mut data = crate::scratch::text_page("newer ");
    data.extend_from_slice(&[0; 4096]);
    writer.pages(10, 0, &data[..4096], ZeroPages::Record).unwrap();
    writer.pages(12, 0x2000, &data, ZeroPages::Record).unwrap();
    writer.same(10, 0x1000, 0x20_0000, 10).unwrap();
    writer.same(13, 0, 0x1000, 11).unwrap();
    writer.finish().unwrap();
    check(&dirs[1]).unwrap();
    dirs
}

/// Index of the SAME entry of object 10 in the incremental sample.
const SAME_ENTRY: usize = 3 * 48;

#[test]
fn every_flipped_bit_of_a_chain_is_found() {
    for compression in ALL {
        let scratch = Scratch::new("chain-flip");
        let [parent, child] = sample_chain(&scratch, compression);
        for (dir, name) in [(&child, "records"), (&child, "pages"), (&parent, "records"), (&parent, "pages")]
        {
            let path = dir.join(name);
            let bytes = fs::read(&path).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            // All bits of each byte were flipped one by one in a full image; here it is about reading all of a chain.
            for (at, byte) in bytes.iter().enumerate().filter(|(at, _)| *at < 5000 || at % 7 == 0) {
                file.write_all_at(&[byte ^ (1 << (at % 8))], at as u64).unwrap();
                let error =
                    check(&child).expect_err(&format!("{compression}: byte {at} of {}", path.display()));
                if dir == &parent {
                    let message = error.to_string();
                    assert!(message.contains(parent.to_str().unwrap()), "{message}");
                    assert!(message.contains(child.to_str().unwrap()), "{message}");
                }
                file.write_all_at(&[*byte], at as u64).unwrap();
            }
            for len in (0..bytes.len()).rev().step_by(11) {
                file.set_len(len as u64).unwrap();
                assert!(Reader::open(&child).is_err(), "{compression}: {} cut to {len}", path.display());
            }
            fs::write(&path, &bytes).unwrap();
        }
        check(&child).unwrap();
    }
}

#[test]
fn impossible_chains_are_refused() {
    let scratch = Scratch::new("chain-odd");
    let [parent_dir, child_dir] = sample_chain(&scratch, Compression::Lz4);
    let child = Image::load(&child_dir);
    let parent = HEADER + FRAME;
    assert_eq!(child.frame_of_kind(0xff01), HEADER);
    let refuse = |change: &dyn Fn(&mut Image), words: &str| {
        let message = refused(&child, &child_dir, change);
        assert!(message.contains(words), "{message}");
    };
    // The parent: another id, no number, itself, nobody, a version or a place of its own.
    refuse(&|i| i.records[parent] ^= 1, "built on another one");
    refuse(&|i| i.put(parent + 16, &0u64.to_le_bytes()), "number 0");
    refuse(&|i| i.put(parent + 16, &2u64.to_le_bytes()), "built on another one");
    refuse(&|i| i.put(parent + 16, &u64::MAX.to_le_bytes()), "is not there");
    refuse(&|i| i.put(HEADER + 6, &2u16.to_le_bytes()), "parent record has version 2");
    refuse(&|i| i.put(HEADER + 4, &1u16.to_le_bytes()), "impossible version");
    let second = child.frames()[1];
    let twice = |i: &mut Image| {
        i.put(second + 4, &0xff01u16.to_le_bytes());
        i.put(second + 8, &[0; 16]);
    };
    refuse(&twice, "not the first");
    let runs = child.frame_of_kind(0xff00);
    refuse(&|i| i.put(runs + 6, &1u16.to_le_bytes()), "impossible version");
    refuse(&|i| i.put(runs + 6, &3u16.to_le_bytes()), "page index has version 3");
    // The SAME run: claims of stored bytes, lengths, overlaps here and in the parent.
    let same = runs + FRAME + SAME_ENTRY;
    assert_eq!(child.records[same + 20], 3);
    refuse(&|i| i.put(same + 20, &4u32.to_le_bytes()), "unknown type 4");
    refuse(&|i| i.put(same + 16, &0u32.to_le_bytes()), "0 pages");
    refuse(&|i| i.put(same + 32, &1u32.to_le_bytes()), "claims stored bytes");
    refuse(&|i| i.put(same + 36, &1u32.to_le_bytes()), "claims stored bytes");
    refuse(&|i| i.put(same + 40, &1u64.to_le_bytes()), "claims stored bytes");
    refuse(&|i| i.put(same + 8, &1u64.to_le_bytes()), "impossible offset");
    refuse(&|i| i.put(same + 8, &(u64::MAX - 4095).to_le_bytes()), "impossible offset");
    refuse(&|i| i.put(same + 8, &0u64.to_le_bytes()), "overlap");
    refuse(&|i| i.put(same + 48, &10u64.to_le_bytes()), "overlap");
    let twice = |i: &mut Image| {
        i.put(same + 48 + 8, &0x1000u64.to_le_bytes());
        i.put(same + 48 + 24, &10u64.to_le_bytes());
    };
    refuse(&twice, "used twice");
    // What the parent does not list is not listed here; that is allowed, however much it is.
    let mut wide = child.clone();
    wide.put(same + 16, &u32::MAX.to_le_bytes());
    wide.put(same + 24, &77u64.to_le_bytes());
    wide.fix_checksums();
    wide.store(&child_dir);
    let reader = Reader::open(&child_dir).unwrap();
    assert_eq!(reader.runs(10).iter().map(|run| run.bytes).sum::<u64>(), 4096);
    child.store(&child_dir);
    check(&child_dir).unwrap();
    // A full image cannot list SAME runs.
    let full = Image::load(&parent_dir);
    let entry = full.frame_of_kind(0xff00) + FRAME;
    refused(&full, &parent_dir, |i| i.put(entry + 20, &3u32.to_le_bytes()));
    full.store(&parent_dir);
    check(&child_dir).unwrap();
}

/// Images that name each other, or themselves: numbers must fall.
#[test]
fn circles_and_endless_chains_are_refused() {
    let scratch = Scratch::new("circle");
    let [parent_dir, child_dir] = sample_chain(&scratch, Compression::None);
    let child = Image::load(&child_dir);
    // 1 is a copy of 2 that names 2, with the id that 2 expects.
    let mut circle = child.clone();
    circle.put(40, &crate::scratch::SAMPLE_ID);
    circle.pages[24..40].copy_from_slice(&crate::scratch::SAMPLE_ID);
    circle.put(HEADER + FRAME, &[7; 16]);
    circle.put(HEADER + FRAME + 16, &2u64.to_le_bytes());
    circle.fix_checksums();
    circle.store(&parent_dir);
    let message = check(&child_dir).unwrap_err().to_string();
    assert!(message.contains("lower number"), "{message}");
    // One that names itself.
    let mut own = child.clone();
    own.put(HEADER + FRAME, &[7; 16]);
    own.put(HEADER + FRAME + 16, &2u64.to_le_bytes());
    own.fix_checksums();
    own.store(&child_dir);
    let message = check(&child_dir).unwrap_err().to_string();
    assert!(message.contains("lower number"), "{message}");
    // A chain of 100000: all of them under one id, so that one pair of files does, linked.
    let long = scratch.dir("long");
    let store = scratch.dir("files");
    let mut link = child.clone();
    link.put(40, &[7; 16]);
    let number_of = |n: u64| {
        let mut link = link.clone();
        link.put(HEADER + FRAME, &[7; 16]);
        link.put(HEADER + FRAME + 16, &(n - 1).to_le_bytes());
        link.fix_checksums();
        link
    };
    number_of(2).store(&store);
    for n in (99_800..=100_000u64).rev() {
        let dir = long.join(n.to_string());
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("records"), &number_of(n).records).unwrap();
        fs::hard_link(store.join("pages"), dir.join("pages")).unwrap();
    }
    let error = Reader::open(&long.join("100000")).unwrap_err();
    assert!(matches!(error, ReadError::ChainTooLong { limit: 128, .. }), "{error}");
}

#[test]
fn mutated_chains_never_panic() {
    let mut random = Random(seed("mutated_chains_never_panic"));
    let mut accepted = 0;
    for compression in ALL {
        let scratch = Scratch::new("chain-fuzz");
        let dirs = sample_chain(&scratch, compression);
        let images = dirs.each_ref().map(|dir| Image::load(dir));
        for _ in 0..1500 {
            let which = random.below(2);
            let mut mutant = images[which].clone();
            for _ in 0..1 + random.below(4) {
                mutate(&mut mutant, &mut random);
            }
            if random.below(8) != 0 {
                mutant.fix_checksums();
            }
            mutant.store(&dirs[which]);
            let result = Reader::open(&dirs[1]).and_then(|reader| {
                let mut buf = Vec::new();
                for run in reader.objects().flat_map(|object| object.runs) {
                    reader.read_run(run, &mut buf)?;
                }
                reader.verify(&mut |_, _| ())
            });
            accepted += u32::from(result.is_ok());
            images[which].store(&dirs[which]);
        }
    }
    println!("accepted {accepted} mutants of 4500");
    assert!(accepted < 4500, "nothing was mutated");
}

/// What a chain resolves to is not longer than what its images list, however often they list it.
#[test]
fn a_chain_cannot_list_more_than_it_holds() {
    let scratch = Scratch::new("amplify");
    let job = scratch.path();
    let mut writer = crate::chain::start(job, 1, 0, Compression::None);
    let page = crate::scratch::text_page("x");
    for n in 0..5000 {
        writer.pages(1, n * 0x2000, &page, ZeroPages::Elide).unwrap();
    }
    writer.finish().unwrap();
    for number in 2..=20 {
        let mut writer = crate::chain::start(job, number, number - 1, Compression::None);
        for object in 1..100 {
            let same = writer.same(object, 0, 5000 * 0x2000, 1);
            assert_eq!(same.is_ok(), object == 1);
        }
        writer.finish().unwrap();
    }
    let reader = Reader::open(&job.join("20")).unwrap();
    assert_eq!(reader.objects().map(|object| object.runs.len()).sum::<usize>(), 5000);
}
