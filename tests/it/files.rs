// SPDX-License-Identifier: MIT OR Apache-2.0
//! Regular files, directories, devices, deleted and renamed files, descriptor tables.

ckpt_tests::guest_tests! {
    flags => Guest::new("file_flags"), needs [kinds::REGULAR_FILE, kinds::FD_TABLE];
    shared => Guest::new("file_shared"), needs [kinds::REGULAR_FILE];
    directory => Guest::new("file_directory"), needs [kinds::DIRECTORY];
    devices => Guest::new("file_devices"), needs [kinds::CHAR_DEVICE];
    deleted => Guest::new("file_deleted"), needs [kinds::REGULAR_FILE];
    links => Guest::new("file_links");
    many => Guest::new("file_many"), needs [kinds::FD_TABLE];
    fd_table => Guest::new("file_fd_table"), needs [kinds::FD_TABLE];
    /// Refused for now.
    shared_fd_table => Guest::new("file_fd_table").arg("shared").may_be_refused("shares");
    workers => Guest::new("file_workers");
    undumpable_workers => Guest::new("file_workers").arg("undumpable"), needs [kinds::ATTRIBUTE];
}
