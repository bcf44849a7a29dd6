// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was written is read back, with every compression.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use ckpt_image::{Compression, Origin, PAGE_SIZE, Reader, RunKind, WriteError, Writer, ZeroPages};

use crate::scratch::{Random, Scratch, sample_features, seed, text_page};

const ALL: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd];

/// Objects as they must read: pages by offset, absent ones being left out.
type Model = BTreeMap<u64, BTreeMap<u64, Vec<u8>>>;

/// Random content in pieces up to 3 MiB, with zero pages, text and noise mixed.
fn random_content(random: &mut Random) -> Vec<u8> {
    let pages = match random.below(4) {
        0 => 1,
        1 => 1 + random.below(20),
        2 => 256 + random.below(3),
        _ => 256 * 2 + random.below(200),
    };
    let noise = random.bytes(PAGE_SIZE);
    let mut data = Vec::with_capacity(pages * PAGE_SIZE);
    while data.len() < pages * PAGE_SIZE {
        let stretch = (1 + random.below(300)).min(pages - data.len() / PAGE_SIZE);
        let page = match random.below(3) {
            0 => vec![0; PAGE_SIZE],
            1 => text_page("some text that packs "),
            _ => noise.clone(),
        };
        for _ in 0..stretch {
            data.extend_from_slice(&page);
        }
    }
    data
}

#[test]
fn everything_reads_back() {
    let mut random = Random(seed("everything_reads_back"));
    for compression in ALL {
        let scratch = Scratch::new("round-trip");
        let mut writer = Writer::create(scratch.path(), sample_features(), compression).unwrap();
        let mut model = Model::new();
        let mut records = Vec::new();
        for n in 0..40u64 {
            let len = random.below(100);
            let body = random.bytes(len);
            writer.record(n as u16, 1, n, n * n, &body).unwrap();
            records.push((n as u16, n, n * n, body));
            if n % 4 != 0 {
                continue;
            }
            let object = n / 8;
            let zeros = if object % 2 == 0 { ZeroPages::Elide } else { ZeroPages::Record };
            let data = random_content(&mut random);
            let offset = n * (64 << 20);
            writer.pages(object, offset, &data, zeros).unwrap();
            for (at, page) in data.chunks_exact(PAGE_SIZE).enumerate() {
                if zeros == ZeroPages::Record || page.iter().any(|byte| *byte != 0) {
                    let pages = model.entry(object).or_default();
                    pages.insert(offset + (at * PAGE_SIZE) as u64, page.to_vec());
                }
            }
        }
        let announced = writer.bytes_written();
        let summary = writer.finish().unwrap();
        assert!(announced <= summary.records_bytes + summary.pages_bytes);

        let reader = Reader::open(scratch.path()).unwrap();
        assert_eq!(reader.header().cpu_features, sample_features());
        assert_eq!(reader.header().compression, compression);
        let read: Vec<_> = reader.records().iter().map(|r| (r.kind, r.owner, r.id, r.body.clone())).collect();
        assert_eq!(read, records);
        let mut buf = Vec::new();
        let mut found = Model::new();
        let (mut data_pages, mut last) = (0, None);
        for object in reader.objects() {
            assert!(last < Some(object.object), "objects come in order");
            last = Some(object.object);
            assert_eq!(object.runs, reader.runs(object.object));
            for run in object.runs {
                assert!(run.bytes <= 1 << 20);
                reader.read_run(run, &mut buf).unwrap();
                assert_eq!(buf.len() as u64, run.bytes);
                if run.kind == RunKind::Data {
                    data_pages += run.bytes / PAGE_SIZE as u64;
                }
                for (at, page) in buf.chunks_exact(PAGE_SIZE).enumerate() {
                    let pages = found.entry(object.object).or_default();
                    pages.insert(run.offset + (at * PAGE_SIZE) as u64, page.to_vec());
                }
            }
        }
        assert!(found == model, "page content differs ({compression})");
        assert_eq!(data_pages, summary.data_pages);
        assert!(reader.runs(u64::MAX).is_empty());

        let mut last_progress = (0, 0);
        let report = reader.verify(&mut |done, total| last_progress = (done, total)).unwrap();
        let on_disk: u64 =
            ["records", "pages"].map(|f| fs::metadata(scratch.path().join(f)).unwrap().len()).iter().sum();
        assert_eq!(last_progress, (on_disk, on_disk));
        assert_eq!(report.bytes, on_disk);
        assert_eq!(report.records, 40);
        assert_eq!(report.data_pages, summary.data_pages);
        for file in ["records", "pages"] {
            let mode = fs::metadata(scratch.path().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o600, "{file}");
        }
    }
}

/// Content, from an address on.
#[derive(Debug)]
struct Memory(Vec<u8>, u64);

impl Origin for Memory {
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let at = at.checked_sub(self.1).ok_or("below it")? as usize;
        buf.copy_from_slice(self.0.get(at..at + buf.len()).ok_or("behind it")?);
        Ok(())
    }
}

#[test]
fn content_is_read_by_whoever_writes_it() {
    let mut random = Random(seed("content_is_read_by_whoever_writes_it"));
    for compression in ALL {
        let scratch = Scratch::new("read");
        let (given, read) = (scratch.dir("1"), scratch.dir("2"));
        let mut writer = Writer::create(&given, sample_features(), compression).unwrap();
        let mut other = Writer::create(&read, sample_features(), compression).unwrap();
        for n in 0..6 {
            let base = (n + 1) << 40;
            let data = random_content(&mut random);
            let memory: Arc<dyn Origin> = Arc::new(Memory(data.clone(), base));
            let mut at = 0;
            // Large and small, and some of them given instead, so that batches hold both.
            while at < data.len() {
                let pages = if random.below(2) == 0 { 256 } else { 1 + random.below(9) };
                let piece = &data[at..data.len().min(at + pages * PAGE_SIZE)];
                let offset = ((n * 64) << 20) + at as u64;
                writer.pages(7, offset, piece, ZeroPages::Record).unwrap();
                if random.below(4) == 0 {
                    other.pages(7, offset, piece, ZeroPages::Record).unwrap();
                } else {
                    let from = base + at as u64;
                    other.pages_from(7, offset, piece.len(), ZeroPages::Record, &memory, from).unwrap();
                }
                at += piece.len();
            }
        }
        let (summary, other) = (writer.finish().unwrap(), other.finish().unwrap());
        assert_eq!(summary, other);
        assert!(
            fs::read(given.join("pages")).unwrap()[PAGE_SIZE..]
                == fs::read(read.join("pages")).unwrap()[PAGE_SIZE..]
        );
    }
}

#[test]
fn few_origins_are_kept() {
    let scratch = Scratch::new("origins");
    let mut writer = Writer::create(scratch.path(), sample_features(), Compression::None).unwrap();
    let mut given = Vec::new();
    for n in 0..1000 {
        let memory: Arc<dyn Origin> = Arc::new(Memory(vec![1; PAGE_SIZE], 0));
        given.push(Arc::downgrade(&memory));
        let offset = n * PAGE_SIZE as u64;
        writer.pages_from(1, offset, PAGE_SIZE, ZeroPages::Elide, &memory, 0).unwrap();
        drop(memory);
        let kept = given.iter().filter(|origin| origin.strong_count() > 0).count();
        assert!(kept <= 100, "{kept} of {}", given.len());
    }
    assert_eq!(writer.finish().unwrap().data_pages, 1000);
}

#[test]
fn content_that_cannot_be_had_ends_the_image() {
    let memory: Arc<dyn Origin> = Arc::new(Memory(vec![1; 4 << 20], 0));
    // Handed over to another thread, or still the caller's.
    for pages in [1, 3 << 8] {
        let scratch = Scratch::new("not-filled");
        let mut writer = Writer::create(scratch.path(), sample_features(), Compression::None).unwrap();
        let too_long = writer.pages_from(1, 0, (1 << 20) + PAGE_SIZE, ZeroPages::Elide, &memory, 0);
        assert!(matches!(too_long, Err(WriteError::BadRange { .. })));
        let mut from =
            |n: u64, at| writer.pages_from(1, n * PAGE_SIZE as u64, PAGE_SIZE, ZeroPages::Elide, &memory, at);
        from(0, 8 << 20).unwrap();
        (1..pages).for_each(|n| drop(from(n, 0)));
        let lost = writer.settle();
        match pages {
            1 => assert!(
                matches!(&lost, Err(WriteError::Origin(e)) if e.to_string() == "behind it"),
                "{lost:?}"
            ),
            _ => assert!(lost.is_err()),
        }
        assert!(matches!(writer.finish(), Err(WriteError::Incomplete)));
    }
}

#[test]
fn compression_makes_text_smaller() {
    let size = |compression| {
        let scratch = Scratch::new("pack");
        let mut writer = Writer::create(scratch.path(), [0; 64], compression).unwrap();
        let page = text_page("over and over ");
        writer.pages(1, 0, &page.repeat(256), ZeroPages::Elide).unwrap();
        writer.finish().unwrap().pages_bytes
    };
    assert!(size(Compression::Lz4) < size(Compression::None) / 50);
    assert!(size(Compression::Zstd) < size(Compression::None) / 50);
}

#[test]
fn an_empty_image_is_an_image() {
    let scratch = Scratch::new("empty");
    Writer::create(scratch.path(), [0; 64], Compression::None).unwrap().finish().unwrap();
    let reader = Reader::open(scratch.path()).unwrap();
    assert!(reader.records().is_empty());
    assert_eq!(reader.objects().count(), 0);
    reader.verify(&mut |_, _| ()).unwrap();
}

#[test]
fn the_writer_refuses_what_no_reader_accepts() {
    let scratch = Scratch::new("refuse");
    let mut writer = Writer::create(scratch.path(), [0; 64], Compression::None).unwrap();
    assert!(matches!(writer.record(0xff00, 1, 0, 0, b""), Err(WriteError::ReservedKind { kind: 0xff00 })));
    let long = vec![0; ckpt_image::format::MAX_BODY_BYTES + 1];
    assert!(matches!(writer.record(1, 1, 0, 0, &long), Err(WriteError::RecordTooLong { .. })));
    let page = text_page("x");
    for (offset, data) in [(1, &page[..]), (0, &page[1..]), (u64::MAX - 4095, &page[..])] {
        let result = writer.pages(1, offset, data, ZeroPages::Elide);
        assert!(matches!(result, Err(WriteError::BadRange { .. })), "{offset:#x}");
    }
    writer.pages(1, 0x3000, &page.repeat(2), ZeroPages::Elide).unwrap();
    writer.pages(1, 0x5000, &page, ZeroPages::Elide).unwrap();
    writer.pages(1, 0x2000, &page, ZeroPages::Elide).unwrap();
    writer.pages(1, 0, &page, ZeroPages::Elide).unwrap();
    for (offset, pages) in [(0x2000, 1), (0x5000, 1), (0x1000, 2), (0, 16), (0x5000, 3)] {
        let result = writer.pages(1, offset, &page.repeat(pages), ZeroPages::Elide);
        assert!(matches!(result, Err(WriteError::Overlap { .. })), "{offset:#x}+{pages}");
    }
    writer.pages(2, 0x3000, &page, ZeroPages::Elide).unwrap();
    // A refused call leaves the image as it was.
    writer.finish().unwrap();
    let reader = Reader::open(scratch.path()).unwrap();
    assert_eq!(reader.records().len(), 0);
    reader.verify(&mut |_, _| ()).unwrap();
    assert!(matches!(Writer::create(scratch.path(), [0; 64], Compression::None), Err(WriteError::Io { .. })));
}
