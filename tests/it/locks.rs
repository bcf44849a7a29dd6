// SPDX-License-Identifier: MIT OR Apache-2.0
//! File locks of the three sorts.

ckpt_tests::guest_tests! {
    flock => Guest::new("lock_flock"), needs [kinds::FILE_LOCK];
    posix => Guest::new("lock_posix"), needs [kinds::FILE_LOCK];
    ofd => Guest::new("lock_ofd"), needs [kinds::FILE_LOCK];
}
