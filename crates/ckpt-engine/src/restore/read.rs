// SPDX-License-Identifier: MIT OR Apache-2.0
//! Read: the image's records, by kind. A kind that this build does not know is refused by its number.

use super::RestoreRequest;
use crate::error::RestoreError;
use crate::kind::Kind;
use crate::resource::decode;
use crate::resource::job::JobRecord;
use ckpt_image::{Reader, Record};
use std::path::Path;

/// An image, read.
#[derive(Debug)]
pub struct Image {
    /// Its pages.
    pub reader: Reader,
    /// The job's record.
    pub job: JobRecord,
}

impl Image {
    /// Opens an image by path.
    ///
    /// # Errors
    /// Any damage.
    pub fn open(dir: &Path) -> Result<Image, RestoreError> {
        Image::of(Reader::open(dir)?)
    }

    fn of(reader: Reader) -> Result<Image, RestoreError> {
        if let Some(r) = reader.records().iter().find(|r| Kind::from_number(r.kind).is_none()) {
            let text = format!("record of unknown kind {}; it was written by a newer ckpt", r.kind);
            return Err(RestoreError::Record(text));
        }
        let record = reader
            .records()
            .iter()
            .find(|r| r.kind == Kind::Job as u16)
            .ok_or_else(|| RestoreError::Record("there is no job record".into()))?;
        let job = decode(record, crate::resource::job::VERSION)?;
        Ok(Image { reader, job })
    }

    /// Records of one kind, in the order in which they were written.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Record> {
        self.reader.records().iter().filter(move |r| r.kind == kind as u16)
    }
}

/// Reads the image that init was given.
///
/// # Errors
/// Any damage.
pub fn read(request: &RestoreRequest) -> Result<Image, RestoreError> {
    let dir = request.dir.try_clone().map_err(RestoreError::io(1, "duplicating the image's descriptor"))?;
    Image::of(Reader::open_at(dir, &request.label)?)
}
