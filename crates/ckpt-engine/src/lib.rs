// SPDX-License-Identifier: MIT OR Apache-2.0
//! The engine: dump and restore, one file per kind of kernel resource.
//!
//! The pipeline is visible in the module names: `dump::{discover, barrier, freeze, collect, snapshot, write}` and
//! `restore::{read, plan, build_tree, fill_memory, resume}`. What a kind of resource does at each step is in
//! [`resource`].
#![forbid(unsafe_code)]

pub mod describe;
pub mod dump;
pub mod error;
pub mod kind;
pub mod model;
pub mod resource;
pub mod restore;
pub mod snapshot;
pub mod track;
