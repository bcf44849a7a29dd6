// SPDX-License-Identifier: MIT OR Apache-2.0
//! ckpt-abi
#![no_std]

pub mod interceptor;
