// SPDX-License-Identifier: MIT OR Apache-2.0
//! What belongs to a process: the tree, its names and argument areas, its attributes, limits.

ckpt_tests::guest_tests! {
    sysv_semaphore => Guest::new("sysv_semaphore"), needs [kinds::SYSV_SEMAPHORE];
    vfork_wait => Guest::new("vfork_wait").in_motion();
    process_tree => Guest::new("process_tree"), needs [kinds::PROCESS];
    zombie => Guest::new("zombie"), needs [kinds::PROCESS];
    names => Guest::new("process_names"), needs [kinds::THREAD, kinds::MEMORY_MAP];
    limits => Guest::new("limits"), needs [kinds::LIMIT];
    shm_file => Guest::new("shm_file"), needs [kinds::SHM_FILE];
    personality => Guest::new("attribute").arg("personality"), needs [kinds::ATTRIBUTE];
    no_new_privs => Guest::new("attribute").arg("no_new_privs"), needs [kinds::CREDENTIAL];
    dumpable => Guest::new("attribute").arg("dumpable"), needs [kinds::ATTRIBUTE];
    subreaper => Guest::new("attribute").arg("subreaper"), needs [kinds::ATTRIBUTE];
    umask => Guest::new("attribute").arg("umask"), needs [kinds::FS_CONTEXT];
    cwd => Guest::new("attribute").arg("cwd"), needs [kinds::FS_CONTEXT];
    root => Guest::new("attribute").arg("root").only_root(), needs [kinds::FS_CONTEXT];
    shared_fs => Guest::new("attribute").arg("shared_fs").may_be_refused("shares");
    keepcaps => Guest::new("attribute").arg("keepcaps"), needs [kinds::CREDENTIAL];
    securebits => Guest::new("attribute").arg("securebits").only_root(), needs [kinds::CREDENTIAL];
    credentials => Guest::new("attribute").arg("credentials").only_root(), needs [kinds::CREDENTIAL];
    capabilities => Guest::new("attribute").arg("capabilities").only_root(), needs [kinds::CREDENTIAL];
    timer_slack => Guest::new("attribute").arg("timer_slack"), needs [kinds::SCHEDULER];
    thp_disable => Guest::new("attribute").arg("thp_disable"), needs [kinds::ATTRIBUTE];
    oom_score_adj => Guest::new("attribute").arg("oom_score_adj"), needs [kinds::ATTRIBUTE];
    pdeathsig => Guest::new("attribute").arg("pdeathsig"), needs [kinds::CREDENTIAL];
    exit_signal => Guest::new("attribute").arg("exit_signal"), needs [kinds::PROCESS];
}
