// SPDX-License-Identifier: MIT OR Apache-2.0
//! Epoll sets.

ckpt_tests::guest_tests! {
    epoll => Guest::new("epoll"), needs [kinds::EPOLL];
}
