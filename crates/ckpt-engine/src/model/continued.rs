// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls that the kernel goes on with after a stop (restart_syscall(2)): nanosleep, clock_nanosleep, poll and futex with a timeout.
//!
//! What is left of the timeout is in the task alone, so a restored one has to make the call anew. But from its second stop on the
//! registers show restart_syscall, and no longer which call it was: that is known from an earlier stop of the same dump, from what it
//! slept in when the job was looked at, or from the instruction before the call.

use super::Job;
use ckpt_sys::arch::{self, CallSite, Registers};
use ckpt_sys::{Pid, libc};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// The calls in which threads were seen, by thread as ckpt sees it.
#[derive(Debug, Default)]
pub struct Calls(Mutex<HashMap<Pid, (i64, CallSite)>>);

/// What a stopped thread goes on with that its registers don't name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continued {
    /// Nothing.
    No,
    /// The call of this number.
    Call(i64),
    /// A call, and nothing tells which.
    Unknown,
}

/// Calls that can be continued.
const CONTINUED: [i64; 4] = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];

/// `mov eax, imm32`, the usual instruction before a call.
const MOV_EAX: u8 = 0xb8;

impl Calls {
    fn note(&self, tid: Pid, number: i64, site: CallSite) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(tid, (number, site));
    }

    fn get(&self, tid: Pid, site: &CallSite) -> Option<i64> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&tid).filter(|(_, seen)| seen == site).map(|(number, _)| *number)
    }

    /// Notes in which calls the threads of a running job sleep.
    pub fn look(&self, job: &Job) {
        for (p, t) in job.live().flat_map(|p| p.threads.iter().map(move |t| (p, t))) {
            let file = |name: &str| {
                std::fs::read_to_string(format!("/proc/{}/task/{}/{name}", p.host, t.host))
                    .unwrap_or_default()
            };
            let Some((number, site)) = parse(&file("syscall")) else { continue };
            let number = match number {
                libc::SYS_restart_syscall => sleeps_in(&file("wchan"), &site),
                n => CONTINUED.contains(&n).then_some(n),
            };
            if let Some(number) = number {
                self.note(t.host, number, site);
            }
        }
    }

    /// What a stopped thread goes on with.
    pub fn of_stopped(&self, tid: Pid, r: &Registers) -> Continued {
        let Some((number, site)) = arch::continued(r) else { return Continued::No };
        if number != libc::SYS_restart_syscall {
            self.note(tid, number, site);
            return Continued::No;
        }
        let mut code = [0; 7];
        let is_read = ckpt_sys::memory::read(tid, site.at.wrapping_sub(5), &mut code).is_ok();
        if site.at == r.rip && !(is_read && arch::is_syscall_instruction(&code[5..])) {
            // Not just before a call: any number in a register.
            return Continued::No;
        }
        let known = self.get(tid, &site).or_else(|| {
            let number = i64::from(i32::from_le_bytes([code[1], code[2], code[3], code[4]]));
            (is_read && code[0] == MOV_EAX && CONTINUED.contains(&number)).then_some(number)
        });
        known.map_or(Continued::Unknown, Continued::Call)
    }
}

/// A line of /proc/pid/task/tid/syscall (proc_pid_syscall(5)): number, six arguments, stack pointer, program counter.
fn parse(line: &str) -> Option<(i64, CallSite)> {
    let mut words = line.split_whitespace();
    let number = words.next()?.parse().ok()?;
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let all: Vec<u64> = words.map_while(hex).collect();
    let [first, second, third, _, _, _, sp, pc] = all[..] else { return None };
    let at = pc.checked_sub(arch::SYSCALL_INSN_BYTES)?;
    Some((number, CallSite { at, sp, arguments: [first, second, third] }))
}

/// By the function of the kernel in which a thread sleeps (proc_pid_wchan(5)).
fn sleeps_in(function: &str, site: &CallSite) -> Option<i64> {
    let clock = site.arguments[0];
    // The other begins with an address. Clocks of processes are negative numbers of 32 bits.
    let is_clock = clock < 64 || clock >> 31 == 1 || clock >> 31 == u64::MAX >> 31;
    // What continues a sleep leaves no function of its own on the stack: then it is the entry of all calls that is seen.
    const SLEEP: [&str; 4] = ["nanosleep", "alarmtimer", "do_syscall_64", "sys_call"];
    match function {
        f if f.contains("poll") => Some(libc::SYS_poll),
        f if f.contains("futex") => Some(libc::SYS_futex),
        f if SLEEP.iter().any(|name| f.contains(name)) => {
            Some(if is_clock { libc::SYS_clock_nanosleep } else { libc::SYS_nanosleep })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed() {
        let site = CallSite { at: 0x7f21a8c41f0e, sp: 0x7ffd4e0c5aa8, arguments: [0, 0, 0x7ffd4e0c5ac0] };
        let line = "230 0x0 0x0 0x7ffd4e0c5ac0 0x0 0x0 0x0 0x7ffd4e0c5aa8 0x7f21a8c41f10\n";
        assert_eq!(parse(line), Some((230, site)));
        for line in ["running\n", "-1 0x7ffd4e0c5aa8 0x7f21a8c41f10\n", ""] {
            assert_eq!(parse(line), None);
        }
    }

    #[test]
    fn calls_are_told_by_where_they_sleep() {
        let of = |function, first| sleeps_in(function, &CallSite { at: 0, sp: 0, arguments: [first, 0, 0] });
        assert_eq!(of("hrtimer_nanosleep_restart", 0x7ffd_4e0c_5ac0), Some(libc::SYS_nanosleep));
        assert_eq!(of("do_syscall_64", 0x7ffd_4e0c_5ac0), Some(libc::SYS_nanosleep));
        assert_eq!(of("hrtimer_nanosleep", 1), Some(libc::SYS_clock_nanosleep));
        assert_eq!(of("do_cpu_nanosleep", 0xffff_fffa), Some(libc::SYS_clock_nanosleep));
        assert_eq!(of("do_cpu_nanosleep", -6_i64 as u64), Some(libc::SYS_clock_nanosleep));
        assert_eq!(of("poll_schedule_timeout.constprop.0", 0), Some(libc::SYS_poll));
        assert_eq!(of("futex_wait_queue", 0x1000), Some(libc::SYS_futex));
        assert_eq!(of("0", 0x1000), None);
    }

    #[test]
    fn another_call_of_the_thread_is_another() {
        let calls = Calls::default();
        let site = CallSite { at: 1000, sp: 2000, arguments: [1, 2, 3] };
        calls.note(Pid::from_raw(7), libc::SYS_poll, site);
        assert_eq!(calls.get(Pid::from_raw(7), &site), Some(libc::SYS_poll));
        assert_eq!(calls.get(Pid::from_raw(8), &site), None);
        for other in [
            CallSite { at: 1002, ..site },
            CallSite { sp: 2008, ..site },
            CallSite { arguments: [1, 2, 4], ..site },
        ] {
            assert_eq!(calls.get(Pid::from_raw(7), &other), None);
        }
    }
}
