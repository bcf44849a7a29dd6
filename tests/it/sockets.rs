// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unix sockets.

ckpt_tests::guest_tests! {
    pair => Guest::new("sock_pair"), needs [kinds::UNIX_SOCKET];
}
