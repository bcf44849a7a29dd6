// SPDX-License-Identifier: MIT OR Apache-2.0
//! The engine: dump and restore, one file per kind of kernel resource.
