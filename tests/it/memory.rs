// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory: private and shared, anonymous and of files, stacks, protections, advice, and what the kernel puts there.

ckpt_tests::guest_tests! {
    private_anon => Guest::new("mem_private_anon"), needs [kinds::MEMORY_MAP];
    private_file => Guest::new("mem_private_file"), needs [kinds::MEMORY_MAP];
    shared_anon => Guest::new("mem_shared_anon"), needs [kinds::MEMORY_MAP, "shared_object"];
    shared_views => Guest::new("mem_shared_views");
    shared_file => Guest::new("mem_shared_file");
    memfd => Guest::new("mem_memfd"), needs ["shared_object"];
    deleted_shm => Guest::new("mem_deleted_shm"), needs ["shared_object"];
    deleted_file => Guest::new("mem_deleted_file");
    named_shm => Guest::new("mem_named_shm"), needs ["shm_file"];
    stack => Guest::new("mem_stack");
    guard => Guest::new("mem_guard");
    brk => Guest::new("mem_brk");
    boundaries => Guest::new("mem_boundaries");
    madvise => Guest::new("mem_madvise");
    mlock => Guest::new("mem_mlock");
    vma_names => Guest::new("mem_vma_names");
    vdso => Guest::new("mem_vdso");
    many_vmas => Guest::new("mem_many_vmas");
    jit => Guest::new("mem_jit");
    malloc => Guest::new("mem_malloc");
    reserve => Guest::new("mem_reserve");
    huge => Guest::new("mem_huge");
}
