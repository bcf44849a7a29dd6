// SPDX-License-Identifier: MIT OR Apache-2.0
//! What belongs to a process: the tree, its names and argument areas, its attributes, limits, clocks.

ckpt_tests::guest_tests! {
    process_tree => Guest::new("process_tree"), needs [kinds::PROCESS, kinds::SESSION];
    zombie => Guest::new("zombie"), needs [kinds::PROCESS];
    limits => Guest::new("limits"), needs [kinds::LIMIT];
}
