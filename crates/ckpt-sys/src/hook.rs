// SPDX-License-Identifier: MIT OR Apache-2.0
//! Points at which tests may end or divert ckpt. Empty functions unless built with the feature `test-hooks`.

#[cfg(feature = "test-hooks")]
mod counting {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static COUNT: AtomicU64 = AtomicU64::new(0);
    static KILL_AT: OnceLock<Option<u64>> = OnceLock::new();

    pub fn point() {
        let n = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
        let at = KILL_AT.get_or_init(|| std::env::var("CKPT_TEST_KILL_AT").ok()?.parse().ok());
        if *at == Some(n) {
            crate::task::kill_self();
        }
    }

    pub fn report() {
        if let Some(path) = std::env::var_os("CKPT_TEST_COUNT") {
            let _ = std::fs::write(path, COUNT.load(Ordering::Relaxed).to_string());
        }
    }
}

/// A moment at which ckpt may be killed (`CKPT_TEST_KILL_AT`).
#[inline]
pub fn point() {
    #[cfg(feature = "test-hooks")]
    counting::point();
}

#[cfg(feature = "test-hooks")]
fn first_time() -> bool {
    static BEEN_HERE: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    !BEEN_HERE.swap(true, std::sync::atomic::Ordering::Relaxed)
}

/// Makes the file that a variable names, if it is set, and waits until the file is gone.
#[cfg(feature = "test-hooks")]
fn hold(variable: &str) {
    if let Some(path) = std::env::var_os(variable) {
        let path = std::path::Path::new(&path);
        if std::fs::write(path, b"").is_ok() {
            while path.exists() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
}

/// Between *discover* and the first *freeze* of a dump: makes the file `CKPT_TEST_BEFORE_FREEZE` and waits until it is gone, so that
/// a job can be made to change just then.
pub fn before_freeze() {
    #[cfg(feature = "test-hooks")]
    if first_time() {
        hold("CKPT_TEST_BEFORE_FREEZE");
    }
}

/// Before written memory is copied while the job runs: the same with `CKPT_TEST_BEFORE_COPY`.
pub fn before_copy() {
    #[cfg(feature = "test-hooks")]
    hold("CKPT_TEST_BEFORE_COPY");
}

/// Between the writing of a checkpoint and its publication: the same with `CKPT_TEST_BEFORE_PUBLISH`.
pub fn before_publish() {
    #[cfg(feature = "test-hooks")]
    hold("CKPT_TEST_BEFORE_PUBLISH");
}

/// Writes the number of points passed to the file `CKPT_TEST_COUNT`.
pub fn report() {
    #[cfg(feature = "test-hooks")]
    counting::report();
}

/// A page of a lazily restored job is about to be fetched because somebody waits for it: here tests end the page server
/// (`CKPT_TEST_PAGE_SERVER`: `panic:PATH` or `kill:PATH`), once the path exists.
pub fn page_server() {
    #[cfg(feature = "test-hooks")]
    if let Ok(value) = std::env::var("CKPT_TEST_PAGE_SERVER")
        && let Some((what, path)) = value.split_once(':')
        && std::path::Path::new(path).exists()
    {
        match what {
            "panic" => panic!("as the test asked for"),
            _ => crate::task::kill_self(),
        }
    }
}

/// True if pages of a lazily restored job are to be fetched only when somebody waits for them (`CKPT_TEST_PAGE_SERVER`, whatever its
/// value), so that tests find them missing.
pub fn page_server_held() -> bool {
    cfg!(feature = "test-hooks") && std::env::var_os("CKPT_TEST_PAGE_SERVER").is_some()
}

/// True if the restore of this kind is to be left out (`CKPT_TEST_SKIP_RESTORE`).
pub fn skipped(kind: &str) -> bool {
    #[cfg(feature = "test-hooks")]
    return std::env::var("CKPT_TEST_SKIP_RESTORE").is_ok_and(|v| v.split(',').any(|k| k == kind));
    #[cfg(not(feature = "test-hooks"))]
    {
        let _ = kind;
        false
    }
}

/// True if the restore of any kind is left out, so that what depends on it must do without.
pub fn any_skipped() -> bool {
    cfg!(feature = "test-hooks") && std::env::var_os("CKPT_TEST_SKIP_RESTORE").is_some()
}
