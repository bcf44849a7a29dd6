// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls that are blocked across the dump: each must end as if there had been none, in the job that goes on and in
//! the restored one.

macro_rules! blocked_in {
    ($($call:ident $(.$option:ident($($argument:expr),*))*;)+) => {
        $(mod $call {
            use ckpt_tests::{guest::Guest, proof};
            fn guest() -> Guest {
                Guest::new("interrupted").arg(stringify!($call)) $(.$option($($argument),*))*
            }
            #[test]
            fn control() { proof::control(&guest()) }
            #[test]
            fn goes_on() { proof::prove_goes_on(&guest()) }
            #[test]
            fn restored() { proof::prove(&guest()) }
            #[test]
            fn generations() { proof::prove_generations(&guest(), 3) }
            #[test]
            fn without_interceptor() { proof::prove(&guest().without_interceptor()) }
        })+
    };
}

blocked_in! {
    nanosleep;
    nanosleep_out;
    clock_nanosleep;
    clock_nanosleep_abs;
    poll;
    poll_forever;
    poll_out;
    ppoll;
    select;
    pselect;
    epoll_wait;
    epoll_pwait;
    epoll_pwait2;
    futex;
    futex_timeout;
    futex_until;
    read_pipe;
    read_eventfd;
    recv;
    recv_timeout;
    accept_timeout;
    accept4_timeout;
    readv_timeout;
    semop;
    semtimedop;
    sigtimedwait;
    sigwaitinfo;
    sigsuspend;
    pause;
    wait4;
    waitid;
    flock;
    setlkw;
    ofd_setlkw;
    write_pipe;
    write_socket;
    open_fifo;
}

/// Not restored: a queue that is filled anew has room for more.
macro_rules! blocked_by_a_full_socket_in {
    ($($call:ident;)+) => {
        $(mod $call {
            use ckpt_tests::{guest::Guest, proof};
            #[test]
            fn control() { proof::control(&Guest::new("interrupted").arg(stringify!($call))) }
            #[test]
            fn goes_on() { proof::prove_goes_on(&Guest::new("interrupted").arg(stringify!($call))) }
        })+
    };
}

blocked_by_a_full_socket_in! {
    write_timeout;
    writev_timeout;
    sendmmsg_timeout;
}

/// The kernel continues these by another call from the second stop on, which a restored task can't make.
macro_rules! dumped_again_in {
    ($($call:ident;)+) => {
        mod dumped_again {
            $(#[test]
            fn $call() {
                ckpt_tests::proof::prove_dumped_again(&ckpt_tests::guest::Guest::new("interrupted").arg(stringify!($call)));
            })+
        }
    };
}

dumped_again_in! {
    nanosleep;
    nanosleep_out;
    clock_nanosleep;
    poll;
    poll_forever;
    poll_out;
    futex_timeout;
    futex_until;
}
