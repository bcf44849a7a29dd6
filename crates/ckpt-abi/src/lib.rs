// SPDX-License-Identifier: MIT OR Apache-2.0
//! Binary interfaces between the parts of ckpt, without dependencies and without the standard library, so
//! that every part can share the same definitions.
#![no_std]
#![forbid(unsafe_code)]

pub mod hooks;
pub mod init_protocol;
pub mod interceptor;
pub mod kmod;
pub mod recorded;
