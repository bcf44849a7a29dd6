// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image: header, framed records, page runs, and the store that holds checkpoints.
