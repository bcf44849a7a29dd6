// SPDX-License-Identifier: MIT OR Apache-2.0
//! One file per command.

pub mod attach;
pub mod check;
pub mod copies;
pub mod doctor;
pub mod dump;
mod incremental;
pub mod init;
pub mod inspect;
mod job_info;
pub mod kill;
pub mod list;
pub mod ps;
pub mod restore;
pub mod rm;
pub mod run;
pub mod squash;
pub mod supervise;
pub mod verify;
pub mod wait;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::args::{self, StoreArg};

/// The store to use: what the user says, else the default of this user. Absolute; need not exist.
pub fn store_directory(arg: &StoreArg) -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let chosen = arg
        .store
        .clone()
        .or_else(|| variable("CKPT_STORE"))
        .or_else(|| variable("XDG_STATE_HOME").map(|state| state.join("ckpt")))
        .or_else(|| variable("HOME").map(|home| home.join(".local/state/ckpt")));
    let Some(chosen) = chosen else {
        bail!("there is no place for checkpoints: HOME is not set; give --store DIR");
    };
    let chosen = std::path::absolute(&chosen).with_context(|| format!("store {}", chosen.display()))?;
    if chosen.starts_with("/dev/shm") {
        bail!(
            "store {}: a job has a /dev/shm of its own, which hides it; choose another place",
            chosen.display()
        );
    }
    Ok(chosen)
}

/// The compression that the user chose.
pub fn compression(chosen: args::Compression) -> ckpt_image::Compression {
    match chosen {
        args::Compression::None => ckpt_image::Compression::None,
        args::Compression::Lz4 => ckpt_image::Compression::Lz4,
        args::Compression::Zstd => ckpt_image::Compression::Zstd,
    }
}
