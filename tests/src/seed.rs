// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random choices that can be repeated: the seed is printed, and CKPT_TEST_SEED sets it.

use crate::announce;

/// A splitmix64 generator.
pub struct Random(u64);

impl Random {
    /// Seeded by CKPT_TEST_SEED, else by the clock; prints the seed under `label`.
    pub fn announced(label: &str) -> Random {
        let chosen = std::env::var("CKPT_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let seed = chosen.unwrap_or_else(|| {
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .expect("a clock after 1970");
            now.as_nanos() as u64
        });
        announce(&format!("{label}: CKPT_TEST_SEED={seed}"));
        Random(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }
}

/// A count from the environment variable `name`, else `default`.
pub fn count_from(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
