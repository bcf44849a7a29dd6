// SPDX-License-Identifier: MIT OR Apache-2.0
//! As whom a test runs. Tests started by root run twice, as root and as uid 1000; others once, as whoever started them.

use std::path::Path;

use crate::{Failure, Outcome, announce};

/// The uid and gid that root's tests use as a plain user.
pub const PLAIN_ID: u32 = 1000;

/// A variable that names the groups which the plain user of root's tests is to be a member of, separated by commas.
const GROUPS_VARIABLE: &str = "CKPT_TEST_GROUPS";

/// As whom the job of a test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// uid 0.
    Root,
    /// A user without any privilege.
    Plain,
}

impl User {
    /// A short name for messages and directories.
    pub fn name(self) -> &'static str {
        match self {
            User::Root => "root",
            User::Plain => "plain",
        }
    }

    /// The words to put before a command line so that it runs as this user.
    pub fn command_prefix(self) -> Vec<String> {
        if self == User::Plain && nix::unistd::geteuid().is_root() {
            let id = PLAIN_ID;
            let groups = std::env::var(GROUPS_VARIABLE)
                .map_or("--clear-groups".to_owned(), |groups| format!("--groups={groups}"));
            ["setpriv", &format!("--reuid={id}"), &format!("--regid={id}"), &groups, "--"]
                .map(String::from)
                .to_vec()
        } else {
            Vec::new()
        }
    }

    /// Gives `path` to this user.
    ///
    /// # Errors
    /// chown(2) failed.
    pub fn give(self, path: &Path) -> Outcome<()> {
        if self == User::Plain && nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(path, Some(PLAIN_ID), Some(PLAIN_ID)).map_err(|error| {
                Failure(format!("cannot give {} to the plain user: {error}", path.display()))
            })?;
        }
        Ok(())
    }
}

/// Which users a guest is meant for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Users {
    /// Root and a plain user.
    Both,
    /// Needs a privilege.
    OnlyRoot,
    /// Needs to be without privilege.
    OnlyPlain,
}

impl Users {
    /// The users of this run of the tests. Prints a line when root is left out because the tests
    /// were not started by root. `CKPT_TEST_USER=root|plain` narrows the choice, and whoever sets it knows.
    pub fn of_this_run(self, test: &str) -> Vec<User> {
        let is_root = nix::unistd::geteuid().is_root();
        let wanted = std::env::var("CKPT_TEST_USER").ok();
        let mut users = Vec::new();
        for user in [User::Root, User::Plain] {
            let meant = match user {
                User::Root => self != Users::OnlyPlain,
                User::Plain => self != Users::OnlyRoot,
            };
            if !meant {
                continue;
            }
            if wanted.as_deref().is_some_and(|wanted| wanted != user.name()) {
                continue;
            }
            if user == User::Root && !is_root {
                announce(&format!("skipped: {test} as root: the tests were not started by root"));
            } else {
                users.push(user);
            }
        }
        users
    }
}
