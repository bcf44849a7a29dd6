// SPDX-License-Identifier: MIT OR Apache-2.0
//! x86_64: registers of a stopped task, system call conventions, and the two pieces of machine code that ckpt runs
//! inside a tracee: the loop of a blank task, and the self-finishing block of a live one.

use std::arch::{global_asm, x86_64::__cpuid_count};

/// `uname -m` of this architecture, recorded in images.
pub const NAME: &str = "x86_64";
/// Length of the instruction that enters the kernel.
pub const SYSCALL_INSN_BYTES: u64 = 2;
/// End of the address space a process can map (47 bits), less the guard page.
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// Registers as PTRACE_GETREGS gives them (`sys/user.h`).
pub type Registers = libc::user_regs_struct;

/// The registers as a plain array in the order of `user_regs_struct`, for records.
pub fn registers_to_words(r: &Registers) -> [u64; 27] {
    [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi,
        r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ]
}

/// The inverse of [`registers_to_words`].
pub fn registers_from_words(w: &[u64; 27]) -> Registers {
    Registers {
        r15: w[0],
        r14: w[1],
        r13: w[2],
        r12: w[3],
        rbp: w[4],
        rbx: w[5],
        r11: w[6],
        r10: w[7],
        r9: w[8],
        r8: w[9],
        rax: w[10],
        rcx: w[11],
        rdx: w[12],
        rsi: w[13],
        rdi: w[14],
        orig_rax: w[15],
        rip: w[16],
        cs: w[17],
        eflags: w[18],
        rsp: w[19],
        ss: w[20],
        fs_base: w[21],
        gs_base: w[22],
        ds: w[23],
        es: w[24],
        fs: w[25],
        gs: w[26],
    }
}

/// True if the registers belong to a 32-bit task (code segment of compatibility mode).
pub fn is_compat(r: &Registers) -> bool {
    r.cs == 0x23
}

/// Registers that make the task execute one system call at `rip`, which must hold a `syscall` instruction.
pub fn with_syscall(base: &Registers, rip: u64, nr: i64, args: [u64; 6]) -> Registers {
    let mut r = *base;
    r.rip = rip;
    r.rax = nr as u64;
    r.orig_rax = u64::MAX;
    [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = args;
    r
}

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// System calls that return EINTR after a ptrace interrupt although no signal came (the kernel does not restart them
/// by itself; signal(7), "Interruption of system calls by stop signals").
const EINTR_AFTER_STOP: [i64; 20] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    // Of sockets that have a timeout. A connect(2) that is made again goes on with the attempt that is under way.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What a stop did to the system call the task was in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupted {
    /// Not in a system call, or one that had finished.
    No,
    /// The kernel restarts it by itself when it leaves the stop.
    ByKernel,
    /// The kernel continues it with restart_syscall(2), from state that it keeps in the task.
    ByRestartBlock,
    /// The kernel would return EINTR; ckpt must issue it again.
    ByUs,
}

/// Classifies the stop. `quiet`: no deliverable signal is pending, so an EINTR is the stop's own doing.
pub fn interrupted(r: &Registers, quiet: bool) -> Interrupted {
    if (r.orig_rax as i64) < 0 {
        return Interrupted::No;
    }
    match r.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Interrupted::ByKernel,
        ERESTART_RESTARTBLOCK => Interrupted::ByRestartBlock,
        n if n == -i64::from(libc::EINTR) && quiet && EINTR_AFTER_STOP.contains(&(r.orig_rax as i64)) => {
            Interrupted::ByUs
        }
        _ => Interrupted::No,
    }
}

/// Where a call is made, and by what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallSite {
    /// Address of the instruction.
    pub at: u64,
    /// Stack pointer.
    pub sp: u64,
    /// Its first three arguments.
    pub arguments: [u64; 3],
}

/// The call that the task, once it goes on, continues by restart_syscall(2): its number, which is that of restart_syscall from the second
/// stop on, or just before it is executed. Whether what is at that address is a system call the caller has to look for then.
pub fn continued(r: &Registers) -> Option<(i64, CallSite)> {
    let site = |at| CallSite { at, sp: r.rsp, arguments: [r.rdi, r.rsi, r.rdx] };
    if interrupted(r, false) == Interrupted::ByRestartBlock {
        Some((r.orig_rax as i64, site(r.rip - SYSCALL_INSN_BYTES)))
    } else if r.rax as i64 == libc::SYS_restart_syscall {
        Some((libc::SYS_restart_syscall, site(r.rip)))
    } else {
        None
    }
}

/// Whether these bytes are the instruction of a system call.
pub fn is_syscall_instruction(code: &[u8]) -> bool {
    code == [0x0f, 0x05]
}

/// The registers of a task that would continue a call ([`continued`]) for one that makes that call anew.
pub fn begun_anew(r: &Registers, number: i64) -> Registers {
    let mut r = *r;
    if interrupted(&r, false) == Interrupted::ByRestartBlock {
        r.orig_rax = number as u64;
    } else {
        r.rax = number as u64;
    }
    r
}

/// Registers with which the task executes its interrupted call again, in user mode and without the kernel's help.
pub fn reissued(r: &Registers) -> Registers {
    let mut r = *r;
    r.rip -= SYSCALL_INSN_BYTES;
    r.rax = r.orig_rax;
    r.orig_rax = u64::MAX;
    r
}

/// Registers for a live task to go on with, at a stop in which the kernel still handles restarts.
pub fn resume_live(r: &Registers, quiet: bool) -> Registers {
    match interrupted(r, quiet) {
        Interrupted::ByUs => reissued(r),
        _ => *r,
    }
}

/// Registers for a restored task. A restart block doesn't survive in an image, so the call starts over.
pub fn resume_restored(r: &Registers, quiet: bool) -> Registers {
    match interrupted(r, quiet) {
        Interrupted::ByUs => reissued(r),
        Interrupted::ByRestartBlock => {
            let mut r = *r;
            r.rax = ERESTARTNOHAND as u64;
            r
        }
        _ => *r,
    }
}

/// Makes the call of the entry at rbx: number and six arguments; the result goes behind them.
macro_rules! call_entry {
    () => {
        "mov rax, [rbx]
        mov rdi, [rbx + 8]
        mov rsi, [rbx + 16]
        mov rdx, [rbx + 24]
        mov r10, [rbx + 32]
        mov r8, [rbx + 40]
        mov r9, [rbx + 48]
        syscall
        mov [rbx + 56], rax"
    };
}

/// Clones a helper, which goes on at 4; the task waits for it (wait4(2), __WALL) and goes on where the first word at `$data` says.
macro_rules! clone_helper {
    ($data:literal) => {
        concat!(
            "syscall
            test rax, rax
            js 3f
            jz 4f
            mov rdi, rax
            xor esi, esi
            mov edx, 0x40000000
            xor r10d, r10d
            mov eax, 61
            syscall
            3: jmp qword ptr [rip + ",
            $data,
            "]"
        )
    };
}

/// Leaves the table of descriptors for an empty one (close_range(2), CLOSE_RANGE_UNSHARE).
macro_rules! leave_descriptors {
    () => {
        "xor edi, edi
        mov esi, 0xffffffff
        mov edx, 2
        mov eax, 436
        syscall"
    };
}

/// Exits with the errno in rax, 0 if it is none.
macro_rules! exit_with_errno {
    () => {
        "xor edi, edi
        neg rax
        cmovns edi, eax
        mov eax, 60
        syscall"
    };
}

// The loop of a blank task. rbx: next entry {nr, six arguments, result, three addresses that get the result too}, r13:
// how many are left. Ends with int3.
global_asm!(
    ".pushsection .rodata.ckpt_blank, \"a\", @progbits",
    ".globl ckpt_blank_start",
    ".globl ckpt_blank_end",
    "ckpt_blank_start:",
    "test r13, r13",
    "jz 2f",
    call_entry!(),
    "mov rcx, [rbx + 64]",
    "mov [rcx], rax",
    "mov rcx, [rbx + 72]",
    "mov [rcx], rax",
    "mov rcx, [rbx + 80]",
    "mov [rcx], rax",
    "add rbx, 96",
    "dec r13",
    "jmp ckpt_blank_start",
    "2: int3",
    "jmp ckpt_blank_start",
    "ckpt_blank_end:",
    ".popsection",
);

// The self-finishing block of a live task. It is entered at `batch`, with rbx and r13 as in a blank task but entries of
// eight words, or at `call` with the registers of one system call, whose result goes to rbp. Then it rings: it sends
// itself the signal r12, which its actions ignore, by gettid(2) and tkill(2); that stops it if there is a tracer.
// Whatever instruction the tracer dies at, the task falls through to the end: unmaps the scratch pages, makes the one call
// it was given, puts flags, signal mask and registers back and goes on where it was. It writes to no memory of the
// application; in particular it leaves the stack alone, which may be a few bytes that someone else manages.
// Flags are restored while signals are still masked, as `popfq` needs rsp to point here for a moment.
global_asm!(
    ".pushsection .rodata.ckpt_live, \"a\", @progbits",
    ".globl ckpt_live_start",
    ".globl ckpt_live_call",
    ".globl ckpt_live_rung",
    ".globl ckpt_live_data",
    ".globl ckpt_live_end",
    ".balign 8",
    "ckpt_live_start:",
    "test r13, r13",
    "jz 2f",
    call_entry!(),
    "add rbx, 64",
    "dec r13",
    "jmp ckpt_live_start",
    "ckpt_live_call:",
    "syscall",
    "mov rbp, rax",
    "2: mov eax, 186",
    "syscall",
    "mov edi, eax",
    "mov esi, r12d",
    "mov eax, 200",
    "syscall",
    "ckpt_live_rung:",
    "lea rbx, [rip + ckpt_live_data + 120]",
    "mov eax, 14",
    "mov edi, 2",
    "lea rsi, [rbx + 104]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    "mov eax, 11",
    "mov rdi, [rbx - 120]",
    "mov rsi, [rbx - 112]",
    "syscall",
    "mov rax, [rbx + 48]",
    "mov rdi, [rbx + 56]",
    "mov rsi, [rbx + 64]",
    "mov rdx, [rbx + 72]",
    "mov r10, [rbx + 80]",
    "mov r8, [rbx + 88]",
    "mov r9, [rbx + 96]",
    "syscall",
    "lea rsp, [rbx - 96]",
    "popfq",
    "mov rsp, [rbx - 88]",
    "mov eax, 14",
    "mov edi, 2",
    "lea rsi, [rbx - 104]",
    // No instruction from here on changes flags.
    "mov edx, 0",
    "mov r10d, 8",
    "syscall",
    "mov r15, [rbx - 72]",
    "mov r14, [rbx - 64]",
    "mov r13, [rbx - 56]",
    "mov r12, [rbx - 48]",
    "mov rbp, [rbx - 40]",
    "mov r11, [rbx - 24]",
    "mov r10, [rbx - 16]",
    "mov r9, [rbx - 8]",
    "mov r8, [rbx]",
    "mov rax, [rbx + 8]",
    "mov rcx, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov rsi, [rbx + 32]",
    "mov rdi, [rbx + 40]",
    "mov rbx, [rbx - 32]",
    "jmp qword ptr [rip + ckpt_live_data + 40]",
    ".balign 8",
    "ckpt_live_data:",
    ".fill 28, 8, 0",
    ".quad -1",
    "ckpt_live_end:",
    ".popsection",
);

// The rest of a write that a stop cut short. Writes what is left and returns the sum, with the registers that the
// application had; an error after a part has been written is a short count, as the kernel has it.
global_asm!(
    ".pushsection .rodata.ckpt_write, \"a\", @progbits",
    ".globl ckpt_write_start",
    ".globl ckpt_write_data",
    ".globl ckpt_write_end",
    ".balign 8",
    "ckpt_write_start:",
    "mov eax, [rip + ckpt_write_data + 0]",
    "syscall",
    "test rax, rax",
    "js 2f",
    "add rax, [rip + ckpt_write_data + 8]",
    "jmp 3f",
    "2: mov rax, [rip + ckpt_write_data + 8]",
    "3: mov rsi, [rip + ckpt_write_data + 16]",
    "mov rdx, [rip + ckpt_write_data + 24]",
    "jmp qword ptr [rip + ckpt_write_data + 32]",
    ".balign 8",
    "ckpt_write_data:",
    ".fill 5, 8, 0",
    "ckpt_write_end:",
    ".popsection",
);

// Makes a frozen copy of a live process that it never sees: clones a helper with the same memory, which leaves session
// and descriptors, takes a name, forks the copy and exits; the task waits for the helper and goes on in its
// self-finishing block. The copy is adopted by the job's init. It is traced from its first moment on; without a tracer
// all it does is to exit. Nothing here uses a stack. The helper's exit code is the errno of its fork.
global_asm!(
    ".pushsection .rodata.ckpt_fork, \"a\", @progbits",
    ".globl ckpt_fork_start",
    ".globl ckpt_fork_data",
    ".globl ckpt_fork_end",
    ".balign 8",
    "ckpt_fork_start:",
    clone_helper!("ckpt_fork_data"),
    "4: mov eax, 112",
    "syscall",
    leave_descriptors!(),
    "mov edi, 15",
    "lea rsi, [rip + ckpt_fork_data + 8]",
    "mov eax, 157",
    "syscall",
    "xor edi, edi",
    "xor esi, esi",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "mov eax, 56",
    "syscall",
    "test rax, rax",
    "jz 5f",
    exit_with_errno!(),
    "5: xor edi, edi",
    "mov eax, 231",
    "syscall",
    ".balign 8",
    "ckpt_fork_data:",
    ".quad 0",
    ".asciz \"ckpt-copy\"",
    "ckpt_fork_end:",
    ".popsection",
);

// Makes a descriptor in the memory of a live process and in a table of its own, so that the process never has it: clones a helper,
// which leaves the table that it shares for an empty one, makes two calls, the second with the result of the first for its first
// argument, and exits with the errno of what has failed. The task waits for the helper and goes on in its self-finishing block. The
// tracer takes the descriptor out before the helper exits; without a tracer it is closed at the exit. Nothing here uses a stack.
global_asm!(
    ".pushsection .rodata.ckpt_helper, \"a\", @progbits",
    ".globl ckpt_helper_start",
    ".globl ckpt_helper_data",
    ".globl ckpt_helper_end",
    ".balign 8",
    "ckpt_helper_start:",
    clone_helper!("ckpt_helper_data"),
    "4:",
    leave_descriptors!(),
    "test rax, rax",
    "js 5f",
    "mov rax, [rip + ckpt_helper_data + 8]",
    "mov rdi, [rip + ckpt_helper_data + 16]",
    "mov rsi, [rip + ckpt_helper_data + 24]",
    "mov rdx, [rip + ckpt_helper_data + 32]",
    "syscall",
    "test rax, rax",
    "js 5f",
    "mov edi, eax",
    "mov rax, [rip + ckpt_helper_data + 40]",
    "mov rsi, [rip + ckpt_helper_data + 48]",
    "mov rdx, [rip + ckpt_helper_data + 56]",
    "syscall",
    "5:",
    exit_with_errno!(),
    ".balign 8",
    "ckpt_helper_data:",
    ".fill 8, 8, 0",
    "ckpt_helper_end:",
    ".popsection",
);

unsafe extern "C" {
    static ckpt_helper_start: u8;
    static ckpt_helper_data: u8;
    static ckpt_helper_end: u8;
    static ckpt_fork_start: u8;
    static ckpt_fork_data: u8;
    static ckpt_fork_end: u8;
    static ckpt_write_start: u8;
    static ckpt_write_data: u8;
    static ckpt_write_end: u8;
    static ckpt_blank_start: u8;
    static ckpt_blank_end: u8;
    static ckpt_live_start: u8;
    static ckpt_live_call: u8;
    static ckpt_live_rung: u8;
    static ckpt_live_data: u8;
    static ckpt_live_end: u8;
}

/// The code of a blank task's loop.
pub fn blank_code() -> &'static [u8] {
    // SAFETY: both symbols bound the one read-only section defined above, start before end.
    unsafe {
        let start = &raw const ckpt_blank_start;
        std::slice::from_raw_parts(start, (&raw const ckpt_blank_end).offset_from(start) as usize)
    }
}

/// The code that makes a frozen copy, for a task whose self-finishing block is at `block`; its first instruction is a
/// `syscall`, which must be [`HELPER_CALL`].
pub fn fork_code(block: u64) -> Vec<u8> {
    // SAFETY: the three symbols bound the one read-only section defined above, in this order.
    let (code, data) = unsafe {
        let start = &raw const ckpt_fork_start;
        let end = &raw const ckpt_fork_end;
        let data = &raw const ckpt_fork_data;
        (std::slice::from_raw_parts(start, end.offset_from(start) as usize), data.offset_from(start) as usize)
    };
    let mut code = code.to_vec();
    code[data..data + 8].copy_from_slice(&(block + live_offsets().1).to_le_bytes());
    code
}

/// A descriptor to be made by a helper: number and arguments of the call that makes it and of one with it, whose first argument it is.
#[derive(Debug, Clone)]
pub struct Making {
    /// A path, which stands for the argument of `open` that is `None`, if any; without the zero byte at its end.
    pub path: Vec<u8>,
    /// The first call.
    pub open: (i64, [Option<u64>; 3]),
    /// The second, without its first argument.
    pub with: (i64, [u64; 2]),
}

/// The code of a helper that makes a descriptor, for a task whose self-finishing block is at `block`, to be written at `at`; its first
/// instruction is a `syscall`, which must be [`HELPER_CALL`].
pub fn helper_code(block: u64, at: u64, making: &Making) -> Vec<u8> {
    // SAFETY: the three symbols bound the one read-only section defined above, in this order.
    let (code, data) = unsafe {
        let start = &raw const ckpt_helper_start;
        let end = &raw const ckpt_helper_end;
        let data = &raw const ckpt_helper_data;
        (std::slice::from_raw_parts(start, end.offset_from(start) as usize), data.offset_from(start) as usize)
    };
    let mut code = code.to_vec();
    let path = at + code.len() as u64;
    let (open, [a, b, c]) = &making.open;
    let [a, b, c] = [a, b, c].map(|word| word.unwrap_or(path));
    let (with, [d, e]) = making.with;
    let words = [block + live_offsets().1, *open as u64, a, b, c, with as u64, d, e];
    for (i, word) in words.into_iter().enumerate() {
        code[data + i * 8..data + i * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    code.extend_from_slice(&making.path);
    code.push(0);
    code
}

/// The call that makes the helper of [`fork_code`] and [`helper_code`]. It shares the descriptor table until it leaves it, so that none is
/// copied.
pub const HELPER_CALL: (i64, [u64; 6]) =
    (libc::SYS_clone, [(libc::CLONE_VM | libc::CLONE_FILES) as u64, 0, 0, 0, 0, 0]);

/// What the self-finishing block puts back.
#[derive(Debug, Clone, Copy)]
pub struct LiveFinish {
    /// The mapping to remove, address and length in bytes; nothing need be mapped there.
    pub scratch: (u64, u64),
    /// The task's signal mask.
    pub mask: u64,
    /// A last system call, with all signals masked: number and arguments. Its result is not looked at.
    pub last: (i64, [u64; 6]),
    /// Registers to go on with, when no tracer is there to let the kernel restart a call.
    pub registers: Registers,
}

/// Offset in a live block of the `syscall` for a single call, and of what follows when the bell has been rung.
pub fn live_offsets() -> (u64, u64) {
    // SAFETY: the symbols lie in the one read-only section defined above, `start` first.
    unsafe {
        let start = &raw const ckpt_live_start;
        let offset = |to: *const u8| to.offset_from(start) as u64;
        (offset(&raw const ckpt_live_call), offset(&raw const ckpt_live_rung))
    }
}

/// Registers that make a live task do one call in the block at `block`, and ring with the signal `bell` (0: not at all).
pub fn live_call(base: &Registers, block: u64, bell: i32, nr: i64, args: [u64; 6]) -> Registers {
    let mut r = with_syscall(base, block + live_offsets().0, nr, args);
    r.r12 = bell as u64;
    r
}

/// Bytes of a live block.
pub fn live_block_bytes() -> u64 {
    // SAFETY: both symbols bound the one read-only section defined above, start before end.
    unsafe { (&raw const ckpt_live_end).offset_from(&raw const ckpt_live_start) as u64 }
}

/// The result of [`live_call`] when the bell has been rung.
pub fn live_result(r: &Registers) -> i64 {
    r.rbp as i64
}

/// Words of an entry of a live task's batch: number, six arguments, and the result.
pub const LIVE_ENTRY_WORDS: usize = 8;

/// Registers that make a live task do the `count` calls at `entries` in the block at `block`, and ring.
pub fn live_batch(base: &Registers, block: u64, bell: i32, entries: u64, count: u64) -> Registers {
    let mut r = *base;
    r.rip = block;
    r.orig_rax = u64::MAX;
    [r.rbx, r.r13, r.r12] = [entries, count, bell as u64];
    r
}

/// The self-finishing block, ready to be written into the tracee.
pub fn live_block(f: &LiveFinish, quiet: bool) -> Vec<u8> {
    // SAFETY: the three symbols bound the one read-only section defined above, in this order.
    let (code, data) = unsafe {
        let start = &raw const ckpt_live_start;
        let end = &raw const ckpt_live_end;
        let data = &raw const ckpt_live_data;
        (std::slice::from_raw_parts(start, end.offset_from(start) as usize), data.offset_from(start) as usize)
    };
    let mut r = f.registers;
    match interrupted(&r, quiet) {
        Interrupted::No => {}
        Interrupted::ByKernel | Interrupted::ByUs => r = reissued(&r),
        Interrupted::ByRestartBlock => {
            r = reissued(&r);
            r.rax = libc::SYS_restart_syscall as u64;
        }
    }
    let words = [
        f.scratch.0,
        f.scratch.1,
        f.mask,
        r.eflags,
        r.rsp,
        r.rip,
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        f.last.0 as u64,
    ];
    let mut block = code.to_vec();
    for (i, w) in words.iter().chain(&f.last.1).enumerate() {
        block[data + i * 8..data + i * 8 + 8].copy_from_slice(&w.to_le_bytes());
    }
    block
}

/// Registers that make a blank task run `count` entries at `entries` with the loop at `code`.
pub fn blank_registers(base: &Registers, code: u64, entries: u64, count: u64) -> Registers {
    let mut r = *base;
    r.rip = code;
    r.rbx = entries;
    r.r13 = count;
    r.orig_rax = u64::MAX;
    r
}

/// A write that has been done in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartialWrite {
    /// The system call: its second and third arguments are buffer and length in bytes.
    pub nr: u64,
    /// Bytes written so far.
    pub done: u64,
    /// Buffer and length as the application gave them.
    pub buffer: (u64, u64),
    /// Where the application goes on.
    pub rip: u64,
}

/// Bytes of the code that [`write_block`] makes.
pub const WRITE_BLOCK_BYTES: usize = 112;

fn write_code() -> (&'static [u8], usize) {
    // SAFETY: the three symbols bound the one read-only section defined above, in this order.
    unsafe {
        let start = &raw const ckpt_write_start;
        let length = (&raw const ckpt_write_end).offset_from(start) as usize;
        let data = (&raw const ckpt_write_data).offset_from(start) as usize;
        (std::slice::from_raw_parts(start, length), data)
    }
}

/// Code that writes the rest and goes on in the application.
pub fn write_block(w: &PartialWrite) -> [u8; WRITE_BLOCK_BYTES] {
    let (code, data) = write_code();
    let mut block = [0; WRITE_BLOCK_BYTES];
    block[..code.len()].copy_from_slice(code);
    for (i, word) in [w.nr, w.done, w.buffer.0, w.buffer.1, w.rip].into_iter().enumerate() {
        block[data + i * 8..data + i * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    block
}

/// What a block was made from, if it is one.
pub fn read_write_block(block: &[u8; WRITE_BLOCK_BYTES]) -> Option<PartialWrite> {
    let (code, data) = write_code();
    let word =
        |i: usize| u64::from_le_bytes(block[data + i * 8..data + i * 8 + 8].try_into().unwrap_or_default());
    let made = PartialWrite { nr: word(0), done: word(1), buffer: (word(2), word(3)), rip: word(4) };
    (block[..data] == code[..data]).then_some(made)
}

/// A write that the stop cut short: the call, and how much of it is done. Whether its descriptor is one on which a stop
/// does that is for the caller to find out: it is the first argument.
pub fn short_write(r: &Registers) -> Option<PartialWrite> {
    let nr = r.orig_rax as i64;
    let is_write =
        nr == libc::SYS_write || (nr == libc::SYS_sendto && r.r10 as i32 & libc::MSG_DONTWAIT == 0);
    let short = (r.rax as i64) > 0 && r.rax < r.rdx;
    (is_write && short).then_some(PartialWrite {
        nr: r.orig_rax,
        done: r.rax,
        buffer: (r.rsi, r.rdx),
        rip: r.rip,
    })
}

/// Descriptor of the call that [`short_write`] tells of.
pub fn first_argument(r: &Registers) -> u64 {
    r.rdi
}

/// Registers with which a task writes the rest, `done_now` bytes having been written by the call it is in, by the block
/// at `at`.
pub fn write_rest(r: &Registers, at: u64, done_now: u64) -> Registers {
    let mut r = *r;
    r.rip = at;
    r.rsi += done_now;
    r.rdx -= done_now;
    r.orig_rax = u64::MAX;
    r
}

/// CPU features a restored process may rely on: CPUID leaves 1, 7.0, 7.1, and 0xD.0/0xD.1, as raw words.
pub fn cpu_features() -> [u8; 64] {
    let mut out = [0u8; 64];
    let (l1, l7, l71) = (__cpuid_count(1, 0), __cpuid_count(7, 0), __cpuid_count(7, 1));
    let (d0, d1) = (__cpuid_count(0xd, 0), __cpuid_count(0xd, 1));
    // OSXSAVE and the APIC id vary between CPUs of one machine; only feature words are kept.
    let words =
        [l1.ecx, l1.edx, l7.ebx, l7.ecx, l7.edx & !(1 << 29), l71.eax, d0.eax, d0.edx, d1.eax, d0.ecx];
    for (i, w) in words.iter().enumerate() {
        out[i * 4..i * 4 + 4].copy_from_slice(&w.to_le_bytes());
    }
    out
}

/// True if this CPU has every feature in `needed`, as [`cpu_features`] gave them. The last word is the size in bytes of
/// the register state, which must not have grown smaller.
pub fn cpu_has(needed: &[u8; 64]) -> bool {
    let have = cpu_features();
    let word =
        |b: &[u8; 64], i: usize| u32::from_le_bytes([b[i * 4], b[i * 4 + 1], b[i * 4 + 2], b[i * 4 + 3]]);
    (0..9).all(|i| word(needed, i) & !word(&have, i) == 0) && word(needed, 9) <= word(&have, 9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_round_trip() {
        let mut w = [0u64; 27];
        for (i, v) in w.iter_mut().enumerate() {
            *v = 0x1000 + i as u64;
        }
        assert_eq!(registers_to_words(&registers_from_words(&w)), w);
    }

    #[test]
    fn this_cpu_has_its_own_features() {
        let mut f = cpu_features();
        assert!(cpu_has(&f));
        f[3] ^= 0x80; // hypervisor bit of leaf 1 ecx: flips between virtual and bare machines
        f[0] = 0xff;
        f[1] = 0xff;
        f[2] = 0xff;
        f[3] = 0xff;
        assert!(!cpu_has(&f));
    }

    #[test]
    fn write_blocks_are_read_back() {
        let w = PartialWrite { nr: 1, done: 65536, buffer: (0x7000, 200_000), rip: 0x40_1234 };
        let mut block = write_block(&w);
        assert_eq!(read_write_block(&block), Some(w));
        assert!(write_code().0.len() <= WRITE_BLOCK_BYTES);
        block[0] ^= 1;
        assert_eq!(read_write_block(&block), None);
    }

    #[test]
    fn eintr_is_ours_only_when_quiet() {
        let mut r = registers_from_words(&[0; 27]);
        r.orig_rax = libc::SYS_epoll_wait as u64;
        r.rax = (-i64::from(libc::EINTR)) as u64;
        assert_eq!(interrupted(&r, true), Interrupted::ByUs);
        assert_eq!(interrupted(&r, false), Interrupted::No);
        r.orig_rax = u64::MAX;
        assert_eq!(interrupted(&r, true), Interrupted::No);
    }
}
