// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unix sockets.

ckpt_tests::guest_tests! {
    pair => Guest::new("sock_pair"), needs [kinds::UNIX_SOCKET];
    /// Refused for now.
    empty_datagram => Guest::new("sock_pair").arg("empty").may_be_refused("empty message");
}
