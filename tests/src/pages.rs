// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pages of images, for comparing one with another.

use std::{collections::BTreeMap, path::Path};

use ckpt_image::{PAGE_SIZE, Reader};

use crate::{Failure, Outcome};

/// A page: its object and its offset there.
pub type Place = (u64, u64);

/// Pages by place.
pub type Pages = BTreeMap<Place, Vec<u8>>;

/// The stored pages of every object, of an incremental image with all that it is built on. Zero pages that are named count as pages.
///
/// # Errors
/// The image can't be read.
pub fn pages_of(image: &Path) -> Outcome<Pages> {
    let failure = |error: &dyn std::fmt::Display| Failure(format!("{}: {error}", image.display()));
    let reader = Reader::open(image).map_err(|error| failure(&error))?;
    let mut pages = BTreeMap::new();
    let mut data = Vec::new();
    for object in reader.objects() {
        for run in object.runs {
            reader.read_run(run, &mut data).map_err(|error| failure(&error))?;
            for (index, page) in data.chunks(PAGE_SIZE).enumerate() {
                pages.insert((object.object, run.offset + (index * PAGE_SIZE) as u64), page.to_vec());
            }
        }
    }
    Ok(pages)
}

/// How a page of one image, called by its name, differs from that of another.
pub fn difference(place: Place, one: (&str, Option<&Vec<u8>>), other: (&str, Option<&Vec<u8>>)) -> String {
    let (object, offset) = place;
    let what = match (one.1, other.1) {
        (Some(_), None) => format!("only from {}", one.0),
        (None, Some(_)) => format!("only from {}", other.0),
        (a, b) => {
            let bytes = a.into_iter().flatten().zip(b.into_iter().flatten());
            let differing: Vec<String> = bytes
                .enumerate()
                .filter(|(_, (a, b))| a != b)
                .map(|(at, (a, b))| format!("{at:#x}: {a:#04x} and {b:#04x}"))
                .collect();
            format!("{} bytes differ: {}", differing.len(), differing[..differing.len().min(16)].join(", "))
        }
    };
    format!("object {object}, offset {offset:#x}: {what}")
}
