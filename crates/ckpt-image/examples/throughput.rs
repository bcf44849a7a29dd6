// SPDX-License-Identifier: MIT OR Apache-2.0
//! How fast an image is written, beside a plain write of the same memory into the same directory; and how fast it is
//! read back. `cargo run --release -p ckpt-image --example throughput -- DIR [MIB] [ROUNDS]`
//!
//! The best of several rounds is shown, in MiB per second.
//!
//! `throughput chain DIR`: how long it takes to open, read and verify 1 GiB in a chain of 20 links of which each has 1 % of
//! the pages anew, scattered.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use ckpt_image::{Compression, Reader, Writer, ZeroPages};

const PIECE: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if(|word| word == "chain").is_some() {
        return chain(Path::new(&args.next().ok_or("usage: throughput chain DIR")?));
    }
    let dir = args.next().ok_or("usage: throughput DIR [MIB] [ROUNDS]")?;
    let mib: usize = args.next().map_or(Ok(1024), |word| word.parse())?;
    let rounds: usize = args.next().map_or(Ok(5), |word| word.parse())?;
    let dir = Path::new(&dir).join("throughput");
    let memory = content(mib << 20);
    let image = dir.join("image");
    let plain = |piece: usize| -> Result<Duration, Box<dyn Error>> {
        let mut file = File::create(dir.join("plain"))?;
        let started = Instant::now();
        for part in memory.chunks(piece) {
            file.write_all(part)?;
        }
        Ok(started.elapsed())
    };
    let write = |compression, owned: bool| -> Result<Duration, Box<dyn Error>> {
        fs::create_dir(&image)?;
        let started = Instant::now();
        let mut writer = Writer::create(&image, [0; 64], compression)?;
        let pool = writer.buffers();
        for (n, part) in memory.chunks(PIECE).enumerate() {
            let offset = (n * PIECE) as u64;
            if owned {
                let mut buffer = pool.take();
                buffer.set_len(part.len());
                // Stands for reading the frozen copy.
                buffer.copy_from_slice(part);
                writer.pages_owned(1, offset, buffer, ZeroPages::Elide)?;
            } else {
                writer.pages(1, offset, part, ZeroPages::Elide)?;
            }
        }
        writer.finish()?;
        Ok(started.elapsed())
    };
    let mut best = vec![Duration::MAX; 8];
    let names = [
        "plain, 1 MiB",
        "plain, 64 KiB",
        "none",
        "none, owned",
        "lz4, owned",
        "zstd, owned",
        "read",
        "verify",
    ];
    for _ in 0..rounds {
        let mut note = |n: usize, took: Duration| best[n] = best[n].min(took);
        fs::create_dir_all(&dir)?;
        note(0, plain(1 << 20)?);
        fs::remove_file(dir.join("plain"))?;
        note(1, plain(64 << 10)?);
        fs::remove_file(dir.join("plain"))?;
        for (n, compression, owned) in [
            (4, Compression::Lz4, true),
            (5, Compression::Zstd, true),
            (3, Compression::None, true),
            (2, Compression::None, false),
        ] {
            note(n, write(compression, owned)?);
            if n != 2 {
                fs::remove_dir_all(&image)?;
            }
        }
        let reader = Reader::open(&image)?;
        let started = Instant::now();
        let mut buf = Vec::new();
        for run in reader.runs(1) {
            reader.read_run(run, &mut buf)?;
        }
        note(6, started.elapsed());
        let started = Instant::now();
        reader.verify(&mut |_, _| ())?;
        note(7, started.elapsed());
        fs::remove_dir_all(&dir)?;
    }
    for (name, took) in names.iter().zip(&best) {
        let rate = mib as f64 / took.as_secs_f64();
        println!(
            "{name:>14}  {rate:8.0} MiB/s  {:5.2} of plain",
            best[0].min(best[1]).as_secs_f64() / took.as_secs_f64()
        );
    }
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("unknown");
    println!("peak memory {} with {mib} MiB of content", peak.trim());
    Ok(())
}

fn chain(dir: &Path) -> Result<(), Box<dyn Error>> {
    const PAGES: u64 = (1 << 30) / 4096;
    let dir = dir.join("throughput");
    fs::create_dir(&dir)?;
    let memory = content(PIECE);
    let mut parent = None;
    let mut state = 1u64;
    for number in 1..=21u64 {
        let path = dir.join(number.to_string());
        fs::create_dir(&path)?;
        let mut writer = match parent {
            None => Writer::create(&path, [0; 64], Compression::None)?,
            Some(parent) => Writer::create_incremental(&path, [0; 64], Compression::None, parent)?,
        };
        if parent.is_none() {
            for n in 0..PAGES / 256 {
                writer.pages(1, n << 20, &memory, ZeroPages::Elide)?;
            }
        } else {
            let mut dirty = std::collections::BTreeSet::new();
            while (dirty.len() as u64) < PAGES / 100 {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                dirty.insert((state >> 33) % PAGES);
            }
            let mut at = 0;
            for page in dirty {
                writer.same(1, at * 4096, (page - at) * 4096, 1)?;
                writer.pages(1, page * 4096, &memory[8192..12288], ZeroPages::Elide)?;
                at = page + 1;
            }
            writer.same(1, at * 4096, (PAGES - at) * 4096, 1)?;
        }
        writer.finish()?;
        parent = Some(ckpt_image::Parent { id: ckpt_image::read_header(&path)?.id, number });
    }
    let newest = dir.join("21");
    let mut opening = Duration::MAX;
    for _ in 0..5 {
        let started = Instant::now();
        Reader::open(&newest)?;
        opening = opening.min(started.elapsed());
    }
    let reader = Reader::open(&newest)?;
    println!("opened in {opening:?}: {} images, {} runs", reader.images().len(), reader.runs(1).len());
    let started = Instant::now();
    let mut buf = Vec::new();
    for run in reader.runs(1) {
        reader.read_run(run, &mut buf)?;
    }
    println!("read in {:?}", started.elapsed());
    let started = Instant::now();
    reader.verify(&mut |_, _| ())?;
    println!("verified in {:?}", started.elapsed());
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// Pages as programs have them: a third each of text, small numbers and noise.
fn content(bytes: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        state >> 20
    };
    let mut out = Vec::with_capacity(bytes);
    for page in 0..bytes / 4096 {
        match page % 3 {
            0 => (0..512).for_each(|n| {
                out.extend_from_slice(format!("{:07} ", n % 97 + page).as_bytes()[..8].as_ref())
            }),
            1 => (0..512).for_each(|_| out.extend_from_slice(&(next() % 1000).to_le_bytes())),
            _ => (0..512).for_each(|_| out.extend_from_slice(&next().to_le_bytes())),
        }
    }
    out.resize(bytes, 1);
    out
}
