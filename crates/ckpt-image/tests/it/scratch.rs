// SPDX-License-Identifier: MIT OR Apache-2.0
//! Temporary directories, seeded random numbers and a sample image for the tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use ckpt_image::{Compression, Identity, PAGE_SIZE, Parent, Writer, ZeroPages};

/// A directory that is removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique =
            format!("ckpt-image-{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(unique);
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A new, empty directory inside.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir(&path).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// SplitMix64: small, good enough, and the same everywhere for a given seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// The seed of a randomised test: `CKPT_TEST_SEED` or a new one; printed, so that a failure can be repeated.
pub fn seed(test: &str) -> u64 {
    let seed = std::env::var("CKPT_TEST_SEED")
        .ok()
        .and_then(|word| word.parse().ok())
        .unwrap_or_else(|| u64::from_le_bytes(Identity::fresh().unwrap().id[..8].try_into().unwrap()));
    println!("{test}: CKPT_TEST_SEED={seed}");
    seed
}

pub const SAMPLE_ID: [u8; 16] = *b"0123456789abcdef";
pub const SAMPLE_CREATED_NS: u64 = 1_700_000_000_123_456_789;

pub fn sample_features() -> [u8; 64] {
    std::array::from_fn(|n| n as u8)
}

/// A page with text in it, which packs well.
pub fn text_page(word: &str) -> Vec<u8> {
    word.bytes().cycle().take(PAGE_SIZE).collect()
}

/// Writes an image that has each feature of the format once: records with and without a body, of every padding, runs of
/// data, of zeros, left-out zeros, and (packed) pages that pack and pages that do not.
pub fn write_sample(dir: &Path, compression: Compression) {
    let identity = Identity { id: SAMPLE_ID, created_unix_ns: SAMPLE_CREATED_NS };
    let fd = fs::File::open(dir).unwrap();
    let mut writer = Writer::create_at(fd.into(), dir, sample_features(), compression, identity).unwrap();
    writer.record(1, 1, 0, 0, b"").unwrap();
    writer.record(2, 1, 42, 7, b"thirteen byte").unwrap();
    writer.record(0xfeff, 3, u64::MAX, u64::MAX, &[0xff; 8]).unwrap();
    let mut data = text_page("first page ");
    data.extend_from_slice(&[0; PAGE_SIZE]);
    writer.pages(10, 0x7000, &data, ZeroPages::Record).unwrap();
    writer.pages(11, 0, &data, ZeroPages::Elide).unwrap();
    writer.pages(10, 0x1000, &Random(1).bytes(PAGE_SIZE), ZeroPages::Record).unwrap();
    writer.finish().unwrap();
}

/// Writes an image on top of [`write_sample`]'s in `../1`: pages that are its, also of another object and of zeros, pages
/// anew, and pages that are listed no more.
pub fn write_incremental_sample(dir: &Path) {
    let identity = Identity { id: *b"fedcba9876543210", created_unix_ns: SAMPLE_CREATED_NS + 1 };
    let fd = fs::File::open(dir).unwrap();
    let parent = Parent { id: SAMPLE_ID, number: 1 };
    let mut writer =
        Writer::create_incremental_at(fd.into(), dir, sample_features(), Compression::None, identity, parent)
            .unwrap();
    writer.record(3, 2, 4, 5, b"of the second").unwrap();
    writer.same(10, 0x7000, 0x2000, 10).unwrap();
    writer.same(12, 0, 0x1000, 11).unwrap();
    writer.pages(10, 0x2000, &text_page("second page "), ZeroPages::Record).unwrap();
    writer.pages(12, 0x1000, &[0; PAGE_SIZE], ZeroPages::Record).unwrap();
    writer.finish().unwrap();
}
