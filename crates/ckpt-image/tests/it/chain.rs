// SPDX-License-Identifier: MIT OR Apache-2.0
//! Incremental images: a chain reads as one image.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ckpt_image::{
    Compression, Identity, PAGE_SIZE, Parent, ReadError, Reader, RunKind, WriteError, Writer, ZeroPages,
    read_link,
};

use crate::scratch::{Random, Scratch, sample_features, seed, text_page};

const ALL: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd];
const PAGE: u64 = PAGE_SIZE as u64;

/// What each listed page of each object is, by number of the page. `None`: listed as zero.
pub type Pages = BTreeMap<u64, BTreeMap<u64, Option<Vec<u8>>>>;

/// A chain in `<scratch>/<number>` together with what its newest image must read as.
pub struct Chain {
    pub job: PathBuf,
    pub newest: u64,
    pub pages: Pages,
    /// About how many pages an object has.
    size: u64,
}

pub fn parent_of(dir: &Path) -> Parent {
    let number = dir.file_name().unwrap().to_str().unwrap().parse().unwrap();
    Parent { id: read_link(dir).unwrap().0.id, number }
}

/// Starts the image `number` of the job in `job`, on `parent` unless that is 0.
pub fn start(job: &Path, number: u64, parent: u64, compression: Compression) -> Writer {
    let dir = job.join(number.to_string());
    fs::create_dir(&dir).unwrap();
    if parent == 0 {
        return Writer::create(&dir, sample_features(), compression).unwrap();
    }
    let parent = parent_of(&job.join(parent.to_string()));
    Writer::create_incremental(&dir, sample_features(), compression, parent).unwrap()
}

impl Chain {
    /// A full image with objects 1 to 3, of which 2 has its zero pages listed, as if a file were below it.
    pub fn new(job: &Path, random: &mut Random, compression: Compression, size: u64) -> Chain {
        let mut chain = Chain { job: job.to_owned(), newest: 1, pages: Pages::new(), size };
        let mut writer = start(job, 1, 0, compression);
        let mut pages = Pages::new();
        for object in 1..=3 {
            let mut at = random.below(5) as u64;
            while at < size {
                let n = 1 + random.below(size as usize / 3);
                let content = content(random, n);
                put(&mut writer, &mut pages, object, at, &content);
                at += n as u64 + random.below(9) as u64;
            }
        }
        writer.record(1, 1, 0, 0, b"record of 1").unwrap();
        writer.finish().unwrap();
        chain.pages = pages;
        chain
    }

    /// Adds an incremental image. Object 3 is object 2 of the parent and the other way round, object 9 is new.
    pub fn grow(&mut self, random: &mut Random, compression: Compression) {
        let number = self.newest + 1 + random.below(3) as u64;
        let mut writer = start(&self.job, number, self.newest, compression);
        let before = std::mem::take(&mut self.pages);
        let mut pages = Pages::new();
        for (object, parent_object) in [(1, 1), (2, 3), (3, 2), (9, 9)] {
            let mut at = 0;
            while at < self.size * 11 / 10 {
                let most = if random.below(3) == 0 { self.size as usize / 4 } else { 6 };
                let n = 1 + random.below(most);
                match random.below(5) {
                    0 => {
                        let content = content(random, n);
                        put(&mut writer, &mut pages, object, at, &content);
                    }
                    // Dropped since.
                    1 => {}
                    _ => {
                        writer.same(object, at * PAGE, n as u64 * PAGE, parent_object).unwrap();
                        let old =
                            before.get(&parent_object).into_iter().flat_map(|p| p.range(at..at + n as u64));
                        let new = pages.entry(object).or_default();
                        old.for_each(|(at, page)| drop(new.insert(*at, page.clone())));
                    }
                }
                at += n as u64;
            }
        }
        let body = format!("record of {number}");
        writer.record(1, 1, 0, 0, body.as_bytes()).unwrap();
        writer.finish().unwrap();
        self.newest = number;
        pages.retain(|_, pages| !pages.is_empty());
        self.pages = pages;
    }

    pub fn dir(&self) -> PathBuf {
        self.job.join(self.newest.to_string())
    }
}

fn content(random: &mut Random, pages: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(pages * PAGE_SIZE);
    while all.len() < pages * PAGE_SIZE {
        match random.below(8) {
            0 => all.extend_from_slice(&[0; PAGE_SIZE]),
            1..=4 => all.extend(text_page(&format!("text {} ", random.next()))),
            _ => {
                let mut page = vec![0; PAGE_SIZE];
                page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
                all.extend(page);
            }
        }
    }
    all
}

fn put(writer: &mut Writer, pages: &mut Pages, object: u64, at: u64, content: &[u8]) {
    let zeros = if object == 2 { ZeroPages::Record } else { ZeroPages::Elide };
    writer.pages(object, at * PAGE, content, zeros).unwrap();
    for (n, page) in content.chunks_exact(PAGE_SIZE).enumerate() {
        let zero = page.iter().all(|byte| *byte == 0);
        if !zero || zeros == ZeroPages::Record {
            let page = (!zero).then(|| page.to_vec());
            pages.entry(object).or_default().insert(at + n as u64, page);
        }
    }
}

/// Every page that a reader lists.
pub fn read_all(reader: &Reader) -> Pages {
    let mut found = Pages::new();
    let mut buf = Vec::new();
    for run in reader.objects().flat_map(|object| object.runs) {
        assert!(run.bytes <= 1 << 20);
        reader.read_run(run, &mut buf).unwrap();
        for (n, page) in buf.chunks_exact(PAGE_SIZE).enumerate() {
            let page = (run.kind == RunKind::Data).then(|| page.to_vec());
            let again = found.entry(run.object).or_default().insert(run.offset / PAGE + n as u64, page);
            assert!(again.is_none(), "page {} of object {} is listed twice", run.offset / PAGE, run.object);
        }
    }
    found
}

#[test]
fn a_chain_reads_as_one_image() {
    let mut random = Random(seed("a_chain_reads_as_one_image"));
    for compression in ALL {
        let scratch = Scratch::new("chain");
        let mut chain = Chain::new(scratch.path(), &mut random, compression, 1200);
        for _ in 0..8 {
            // Links need not be packed alike.
            let packing = ALL[random.below(3)];
            chain.grow(&mut random, packing);
            let reader = Reader::open(&chain.dir()).unwrap();
            assert!(read_all(&reader) == chain.pages, "page content differs ({compression})");
            let record = format!("record of {}", chain.newest);
            assert_eq!(reader.records().iter().map(|r| &r.body[..]).collect::<Vec<_>>(), [record.as_bytes()]);
        }
        let reader = Reader::open(&chain.dir()).unwrap();
        let mut last = (0, 1);
        let report = reader.verify(&mut |done, total| last = (done, total)).unwrap();
        assert_eq!(last.0, last.1);
        assert_eq!(report.images, 9);
        assert_eq!(reader.images().len(), 9);
        let size = |path: PathBuf| fs::metadata(path).unwrap().len();
        let on_disk: u64 = fs::read_dir(scratch.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|dir| size(dir.join("records")) + size(dir.join("pages")))
            .sum();
        assert_eq!(report.bytes, on_disk);
        // By descriptor, and with the label of another place, as init opens it.
        let fd = File::open(chain.dir()).unwrap();
        let reader = Reader::open_at(fd.into(), "elsewhere").unwrap();
        assert!(read_all(&reader) == chain.pages);
    }
}

#[test]
fn the_writer_refuses_impossible_chains() {
    let scratch = Scratch::new("refuse");
    let job = scratch.path();
    let page = text_page("x");
    let mut full = start(job, 1, 0, Compression::None);
    assert!(matches!(full.same(1, 0, PAGE, 1), Err(WriteError::Parent { .. })), "a full image has no parent");
    full.pages(1, 0, &page, ZeroPages::Elide).unwrap();
    full.finish().unwrap();
    let mut writer = start(job, 2, 1, Compression::None);
    for (offset, bytes) in [(1, PAGE), (0, 1), (u64::MAX - 4095, PAGE)] {
        assert!(matches!(writer.same(1, offset, bytes, 1), Err(WriteError::BadRange { .. })));
    }
    writer.same(1, 4 * PAGE, 2 * PAGE, 1).unwrap();
    writer.same(1, 6 * PAGE, 2 * PAGE, 1).unwrap();
    for (object, at) in [(1, 4), (1, 7), (2, 4), (2, 7)] {
        let result = writer.same(object, at * PAGE, PAGE, 1);
        assert!(matches!(result, Err(WriteError::Overlap { .. })), "page {at} of object {object}");
    }
    assert!(matches!(writer.pages(1, 5 * PAGE, &page, ZeroPages::Elide), Err(WriteError::Overlap { .. })));
    writer.pages(2, 5 * PAGE, &page, ZeroPages::Elide).unwrap();
    assert!(matches!(writer.same(2, 5 * PAGE, PAGE, 7), Err(WriteError::Overlap { .. })));
    writer.same(2, 4 * PAGE, PAGE, 7).unwrap();
    let summary = writer.finish().unwrap();
    assert_eq!((summary.same_pages, summary.runs, summary.data_pages), (5, 3, 1));
    assert_eq!(Reader::open(&job.join("2")).unwrap().runs(2).len(), 1);

    let create = |number: u64, parent| {
        let dir = job.join(number.to_string());
        fs::create_dir(&dir).unwrap();
        let error =
            Writer::create_incremental(&dir, sample_features(), Compression::None, parent).err().unwrap();
        assert!(matches!(error, WriteError::Parent { .. }), "{error}");
        // The directory can still be used for a full image.
        Writer::create(&dir, sample_features(), Compression::None).unwrap().finish().unwrap();
        error.to_string()
    };
    let id = parent_of(&job.join("2")).id;
    assert!(create(3, Parent { id, number: 77 }).contains("77"), "no such parent");
    assert!(create(4, Parent { id, number: 1 }).contains("another checkpoint"), "another image");
}

#[test]
fn a_chain_has_an_end() {
    let scratch = Scratch::new("long");
    let job = scratch.path();
    let mut writer = start(job, 1, 0, Compression::None);
    writer.pages(1, 0, &text_page("first").repeat(200), ZeroPages::Elide).unwrap();
    writer.finish().unwrap();
    for number in 2..=128 {
        let mut writer = start(job, number, number - 1, Compression::None);
        let at = number * PAGE;
        writer.same(1, 0, at, 1).unwrap();
        writer.pages(1, at, &text_page(&number.to_string()), ZeroPages::Elide).unwrap();
        writer.same(1, at + PAGE, 300 * PAGE, 1).unwrap();
        writer.finish().unwrap();
    }
    let reader = Reader::open(&job.join("128")).unwrap();
    assert_eq!(reader.images().len(), 128);
    let pages = read_all(&reader);
    assert_eq!(pages[&1].len(), 200);
    assert_eq!(pages[&1][&77], Some(text_page("77")));
    let dir = job.join("129");
    fs::create_dir(&dir).unwrap();
    let parent = parent_of(&job.join("128"));
    let result = Writer::create_incremental(&dir, sample_features(), Compression::None, parent);
    assert!(matches!(result, Err(WriteError::Parent { .. })));
}

#[test]
fn a_parent_is_told_by_its_id() {
    let scratch = Scratch::new("id");
    let job = scratch.path();
    let mut random = Random(1);
    let mut chain = Chain::new(job, &mut random, Compression::None, 100);
    chain.grow(&mut random, Compression::None);
    let (parent, child) = (job.join("1"), chain.dir());
    let aside = scratch.path().join("aside");
    fs::rename(&parent, &aside).unwrap();
    let error = Reader::open(&child).unwrap_err();
    assert!(matches!(error, ReadError::ParentMissing { .. }), "{error}");
    assert!(error.to_string().contains(child.to_str().unwrap()), "{error}");
    assert!(error.to_string().contains(parent.to_str().unwrap()), "{error}");
    // The same content under another id is another image.
    fs::create_dir(&parent).unwrap();
    let identity = Identity::fresh().unwrap();
    let fd = File::open(&parent).unwrap();
    let writer =
        Writer::create_at(fd.into(), &parent, sample_features(), Compression::None, identity).unwrap();
    writer.finish().unwrap();
    let error = Reader::open(&child).unwrap_err();
    assert!(matches!(error, ReadError::ParentMismatched { .. }), "{error}");
    fs::remove_dir_all(&parent).unwrap();
    fs::rename(&aside, &parent).unwrap();
    Reader::open(&child).unwrap();
}
