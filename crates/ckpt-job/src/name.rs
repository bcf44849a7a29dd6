// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names of jobs: what is allowed, and names made up for those who give none.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// Longest name in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// The name of a job: 1 to 64 of `A-Z a-z 0-9 . _ -`, the first a letter or a digit. It names directories and stands before
/// `@` and in shell commands, hence no other bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobName(String);

/// Why a text is no name of a job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{}' is no name for a job: use 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or a digit",
    .0.escape_debug()
)]
pub struct InvalidName(pub String);

impl FromStr for JobName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<JobName, InvalidName> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let first_fits = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if first_fits && text.len() <= MAX_NAME_BYTES && text.bytes().all(allowed) {
            Ok(JobName(text.to_owned()))
        } else {
            Err(InvalidName(text.to_owned()))
        }
    }
}

impl TryFrom<String> for JobName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<JobName, InvalidName> {
        text.parse()
    }
}

impl From<JobName> for String {
    fn from(name: JobName) -> String {
        name.0
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl JobName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<Path> for JobName {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

const ADJECTIVES: [&str; 48] = [
    "amber", "ancient", "autumn", "bold", "brave", "bright", "calm", "clever", "copper", "crimson", "dusty",
    "eager", "early", "emerald", "gentle", "golden", "happy", "hidden", "honest", "indigo", "ivory", "jolly",
    "keen", "late", "lively", "lucky", "mellow", "misty", "modest", "noble", "patient", "placid", "polite",
    "quick", "quiet", "rapid", "rustic", "sandy", "silent", "silver", "steady", "sunny", "swift", "tidy",
    "violet", "warm", "winter", "wise",
];

const NOUNS: [&str; 48] = [
    "acorn", "anchor", "aspen", "badger", "beacon", "birch", "bridge", "brook", "canyon", "cedar", "cloud",
    "comet", "cove", "crane", "delta", "dune", "ember", "falcon", "fern", "fjord", "forest", "glacier",
    "harbor", "hazel", "heron", "island", "juniper", "lagoon", "lantern", "linden", "maple", "marsh",
    "meadow", "meteor", "orchid", "otter", "pebble", "pine", "prairie", "quartz", "raven", "reef", "river",
    "sparrow", "spruce", "summit", "valley", "willow",
];

/// Makes up a name such as `quiet-heron` that `taken` says nobody has; with a number at its end when the short ones are
/// used up.
pub fn made_up_name(mut taken: impl FnMut(&JobName) -> bool) -> JobName {
    use std::hash::{BuildHasher, Hasher};
    // RandomState is seeded by the kernel; two processes started at once get different names.
    let random = std::collections::hash_map::RandomState::new();
    for attempt in 0u64.. {
        let mut hasher = random.build_hasher();
        hasher.write_u64(attempt);
        let bits = hasher.finish();
        let adjective = ADJECTIVES[bits as usize % ADJECTIVES.len()];
        let noun = NOUNS[(bits >> 16) as usize % NOUNS.len()];
        let text = if attempt < 16 {
            format!("{adjective}-{noun}")
        } else {
            format!("{adjective}-{noun}-{}", (bits >> 32) as u16)
        };
        let name = JobName(text);
        if !taken(&name) {
            return name;
        }
    }
    unreachable!("2^64 attempts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "-x", "a@1", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert!(bad.parse::<JobName>().is_err(), "{bad:?}");
        }
        for good in ["a", "7", "quiet-heron", "a.b_c-D9", &"x".repeat(64)] {
            assert_eq!(good.parse::<JobName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn made_up_names_are_valid_and_free() {
        let mut taken = std::collections::BTreeSet::new();
        for _ in 0..5000 {
            let name = made_up_name(|name| taken.contains(name));
            assert_eq!(name.as_str().parse::<JobName>().unwrap(), name);
            assert!(taken.insert(name));
        }
    }
}
