// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images of format version 1 as first released. They must stay readable, and the format must not change unnoticed.
//!
//! The files are never changed: a new format version gets a directory of its own, made by [`write_sample`].

use std::fs;

use ckpt_image::{Compression, HeaderInfo, Reader, RunKind};

use crate::scratch::{
    Random, SAMPLE_CREATED_NS, SAMPLE_ID, Scratch, sample_features, text_page, write_incremental_sample,
    write_sample,
};

/// The files `records` and `pages` of a golden image, part of this program so that it can run anywhere.
macro_rules! image {
    ($name:literal) => {
        [
            include_bytes!(concat!("../golden/v1-", $name, "/records")),
            include_bytes!(concat!("../golden/v1-", $name, "/pages")),
        ]
    };
}

/// Built on `v1-none` in `../1`.
const INCREMENTAL: [&[u8]; 2] = image!("incremental");

fn golden(compression: Compression) -> [&'static [u8]; 2] {
    match compression {
        Compression::None => image!("none"),
        Compression::Lz4 => image!("lz4"),
        Compression::Zstd => image!("zstd"),
    }
}

#[test]
fn golden_images_read_as_ever() {
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        let scratch = Scratch::new("golden");
        let [records, pages] = golden(compression);
        fs::write(scratch.path().join("records"), records).unwrap();
        fs::write(scratch.path().join("pages"), pages).unwrap();
        let reader = Reader::open(scratch.path()).unwrap();
        let expected = HeaderInfo {
            version: 1,
            arch: 62,
            page_size: 4096,
            compression,
            created_unix_ns: SAMPLE_CREATED_NS,
            id: SAMPLE_ID,
            cpu_features: sample_features(),
        };
        assert_eq!(*reader.header(), expected);
        assert_eq!(reader.header().arch_name(), "x86_64");
        let records: Vec<_> = reader
            .records()
            .iter()
            .map(|record| (record.kind, record.version, record.owner, record.id, &record.body[..]))
            .collect();
        let expected: [(_, _, _, _, &[u8]); 3] =
            [(1, 1, 0, 0, b""), (2, 1, 42, 7, b"thirteen byte"), (0xfeff, 3, u64::MAX, u64::MAX, &[0xff; 8])];
        assert_eq!(records, expected);
        let expected = [
            (10, 0x1000, RunKind::Data, Random(1).bytes(4096)),
            (10, 0x7000, RunKind::Data, text_page("first page ")),
            (10, 0x8000, RunKind::Zero, vec![0; 4096]),
            (11, 0, RunKind::Data, text_page("first page ")),
        ];
        let mut found = Vec::new();
        for run in reader.objects().flat_map(|object| object.runs) {
            let mut buf = Vec::new();
            reader.read_run(run, &mut buf).unwrap();
            found.push((run.object, run.offset, run.kind, buf));
        }
        assert!(found == expected, "page content differs ({compression})");
        reader.verify(&mut |_, _| ()).unwrap();
    }
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    // Packed bytes depend on the version of the packing library, so only unpacked images are compared.
    if ckpt_image::format::HOST_ARCH != 62 {
        println!("skipped: the golden image is one of x86_64");
        return;
    }
    let scratch = Scratch::new("golden");
    write_sample(scratch.path(), Compression::None);
    for (file, then) in ["records", "pages"].into_iter().zip(golden(Compression::None)) {
        let now = fs::read(scratch.path().join(file)).unwrap();
        assert!(now == then, "{file} is written differently from format version 1");
    }
}

#[test]
fn a_golden_chain_reads_as_ever() {
    let scratch = Scratch::new("golden-chain");
    for (number, files) in [("1", golden(Compression::None)), ("2", INCREMENTAL)] {
        let dir = scratch.dir(number);
        for (name, content) in ["records", "pages"].into_iter().zip(files) {
            fs::write(dir.join(name), content).unwrap();
        }
    }
    let reader = Reader::open(&scratch.path().join("2")).unwrap();
    assert_eq!(reader.images().len(), 2);
    let records: Vec<_> = reader.records().iter().map(|r| (r.kind, r.version, r.owner, r.id)).collect();
    assert_eq!(records, [(3, 2, 4, 5)]);
    let expected = [
        (10, 0x2000, RunKind::Data, text_page("second page ")),
        (10, 0x7000, RunKind::Data, text_page("first page ")),
        (10, 0x8000, RunKind::Zero, vec![0; 4096]),
        (12, 0, RunKind::Data, text_page("first page ")),
        (12, 0x1000, RunKind::Zero, vec![0; 4096]),
    ];
    let mut found = Vec::new();
    for run in reader.objects().flat_map(|object| object.runs) {
        let mut buf = Vec::new();
        reader.read_run(run, &mut buf).unwrap();
        found.push((run.object, run.offset, run.kind, buf));
    }
    assert!(found == expected, "page content differs");
    reader.verify(&mut |_, _| ()).unwrap();
}

#[test]
fn the_same_chain_gives_the_same_bytes() {
    if ckpt_image::format::HOST_ARCH != 62 {
        println!("skipped: the golden image is one of x86_64");
        return;
    }
    let scratch = Scratch::new("golden-chain");
    let [first, second] = ["1", "2"].map(|number| scratch.dir(number));
    write_sample(&first, Compression::None);
    write_incremental_sample(&second);
    for (file, then) in ["records", "pages"].into_iter().zip(INCREMENTAL) {
        let now = fs::read(second.join(file)).unwrap();
        assert!(now == then, "{file} is written differently from format version 1");
    }
}
