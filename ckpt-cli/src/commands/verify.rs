// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt verify`: check every byte of a checkpoint.

use anyhow::{Context as _, Result};
use ckpt_engine::restore::read::Image;
use ckpt_image::store::Store;
use ckpt_image::{ImageInfo, ReadError, Reader};

use crate::args::VerifyArgs;
use crate::commands::store_directory;
use crate::exit_code::ExitCode;
use crate::report::Report;

#[derive(serde::Serialize)]
struct Outcome<'a> {
    path: &'a std::path::Path,
    whole: bool,
    bytes: u64,
    /// The images that were checked: this one, and those that it is built on.
    images: Vec<Link<'a>>,
}

#[derive(serde::Serialize)]
struct Link<'a> {
    path: &'a str,
    bytes: u64,
    parent: Option<u64>,
}

/// Runs the command.
pub fn run(args: &VerifyArgs, report: &Report) -> Result<ExitCode> {
    let store = store_directory(&args.store)?;
    let spec = args.checkpoint.to_str().context("the checkpoint's name is not valid UTF-8")?;
    let path = Store::open(&store)?.resolve(spec)?;
    let image = Image::open(&path)?;
    image.reader.verify(&mut |done, all| report.progress(&format!("{} of {} MiB", done >> 20, all >> 20)))?;
    // Bodies that are whole may still be of a newer version: decoding them tells.
    ckpt_engine::describe::describe(&image)?;
    let bytes = image.reader.total_bytes();
    if args.json {
        let images = image.reader.images().map(link).collect();
        report.print_json(&Outcome { path: &path, whole: true, bytes, images })?;
    } else {
        report.print(&format!("{}: whole, {bytes} bytes checked{}", path.display(), chain(&image.reader)));
    }
    Ok(ExitCode::SUCCESS)
}

fn link(i: ImageInfo<'_>) -> Link<'_> {
    Link { path: i.path, bytes: i.bytes, parent: i.parent.map(|p| p.number) }
}

/// Of what else it consists, if it is incremental.
fn chain(reader: &Reader) -> String {
    let below: Vec<&str> = reader.images().skip(1).map(|image| image.path).collect();
    match below.as_slice() {
        [] => String::new(),
        below => {
            format!(" in {} images, with those that it is built on: {}", below.len() + 1, below.join(", "))
        }
    }
}

/// The exit code for an image that can't be read.
pub fn code_of(error: &ReadError) -> Option<ExitCode> {
    match error {
        ReadError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Some(ExitCode::NOT_FOUND)
        }
        ReadError::Io { .. } => None,
        // The checkpoint is there, but a file of what it is built on is not, or cannot be opened.
        ReadError::Parent { source, .. } => match &**source {
            ReadError::Io { source, .. } if source.kind() != std::io::ErrorKind::NotFound => None,
            _ => Some(ExitCode::CORRUPT),
        },
        _ => Some(ExitCode::CORRUPT),
    }
}
