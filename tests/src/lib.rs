// SPDX-License-Identifier: MIT OR Apache-2.0
//! The harness of the end-to-end tests: guests that check themselves, run under the `ckpt` binary.
//!
//! A *guest* (`guests/*.c`) draws a random nonce that lives only in its memory, sets its state up, says ready, waits for
//! the word *go*, checks its state and gives a verdict that contains the nonce. Between ready and go the harness dumps
//! it, kills all of it and restores it; a program that was merely started again cannot know the nonce.
//!
//! - [`guest`]: what a guest is and how it is built.
//! - [`proof`]: the flows that tests consist of (`prove`, `prove_goes_on`, `prove_generations`, `prove_needs`, `control`).
//! - [`job`]: one job under ckpt, for tests that need another flow (real programs, terminals, kills at random moments).
//! - [`fingerprint`]: a job's state as seen from outside, to show that nothing was left behind in it.
//! - [`pages`]: the pages of images, to compare them.
//! - [`kinds`]: the names of the kernel resources, as the engine's registry has them.
//! - [`seed`]: random choices that can be repeated.
//! - [`sandbox`], [`stage`], [`user`], [`process`]: directories, executables, uids and deadlines of a test.
//!
//! Nothing here is global state: each test has its own directory, store and registry, and tests run in parallel.
#![forbid(unsafe_code)]

pub mod fingerprint;
pub mod guest;
pub mod job;
pub mod kinds;
pub mod pages;
pub mod process;
pub mod proof;
pub mod sandbox;
pub mod seed;
pub mod stage;
pub mod user;

/// Why a step of a test failed: everything its reader needs, in several lines.
#[derive(Debug, Clone)]
pub struct Failure(pub String);

impl Failure {
    /// A failure described by `what`.
    pub fn new(what: impl Into<String>) -> Self {
        Failure(what.into())
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

/// The result of a step of a test.
pub type Outcome<T> = Result<T, Failure>;

/// Prints a line although the test harness captures output: for what was skipped and why.
pub fn announce(line: &str) {
    use std::io::Write;
    // Not eprintln!, which is swallowed when the test passes. A closed stderr is no reason to fail a test.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Makes the tests of one guest: `control`, `goes_on`, `restored`, `generations`, `without_interceptor`, `static_build`,
/// and `needs_its_kinds` where kinds are named.
///
/// The kinds that are named become the module's `proven::KINDS`, which `main.rs` compares with the registry.
///
/// ```ignore
/// guest_tests! {
///     umask => Guest::new("umask");
///     timers => Guest::new("timers").in_motion(), needs [kinds::TIMER];
/// }
/// ```
#[macro_export]
macro_rules! guest_tests {
    ($($(#[$attribute:meta])* $name:ident => $guest:expr $(, needs [$($kind:expr),+ $(,)?])?;)+) => {
        $($(#[$attribute])* mod $name {
            #[allow(unused_imports)]
            use $crate::{guest::Guest, kinds, proof};
            #[test]
            fn control() { proof::control(&$guest) }
            #[test]
            fn goes_on() { proof::prove_goes_on(&$guest) }
            #[test]
            fn restored() { proof::prove(&$guest) }
            #[test]
            fn generations() { proof::prove_generations(&$guest, 3) }
            #[test]
            fn without_interceptor() { proof::prove(&$guest.without_interceptor()) }
            #[test]
            fn static_build() { proof::prove_static(&$guest) }
            $(
            #[test]
            fn needs_its_kinds() { $(proof::prove_needs($kind, &$guest);)+ }
            )?
        })+

        /// What the guests of this module prove.
        #[allow(unused_imports)]
        pub mod proven {
            use $crate::kinds;
            /// Kinds whose restore can't be left out without a guest here noticing.
            pub const KINDS: &[&str] = &[$($($($kind,)+)?)+];
        }
    };
}
