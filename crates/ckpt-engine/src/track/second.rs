// SPDX-License-Identifier: MIT OR Apache-2.0
//! A second thread for the work in the freeze: the processor that the job used is free then.
//!
//! It is there before the job is stopped, as starting one takes as long as a tenth of the work. Who has the work done takes part in
//! it, piece by piece, so that nothing waits for a thread that gets no processor.

use ckpt_sys::Pid;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

type Piece = Box<dyn FnOnce() + Send>;

/// The thread, if there is one.
#[derive(Debug, Default)]
pub(super) struct Second(Option<Running>);

#[derive(Debug)]
struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Who it is, once it runs.
    tid: Option<Pid>,
    pieces: VecDeque<Piece>,
    /// It is at one of them.
    is_busy: bool,
    ends: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl Second {
    /// Starts it, where two threads can work at the same time.
    pub(super) fn start() -> Second {
        if std::thread::available_parallelism().is_ok_and(|n| n.get() > 1) {
            Second::start_anyway()
        } else {
            Second::default()
        }
    }

    fn start_anyway() -> Second {
        let shared = Arc::<Shared>::default();
        let other = Arc::clone(&shared);
        // Without it there is one thread less.
        let Ok(thread) = std::thread::Builder::new().name("ckpt-second".into()).spawn(move || other.run())
        else {
            return Second::default();
        };
        let mut state = shared.lock();
        while state.tid.is_none() {
            state = shared.wait(state);
        }
        drop(state);
        Second(Some(Running { shared, thread: Some(thread) }))
    }

    /// Does all pieces; gives what they give, in order.
    pub(super) fn all<T: Send + 'static>(
        &self,
        pieces: impl IntoIterator<Item = impl FnOnce() -> T + Send + 'static>,
    ) -> Vec<T> {
        let Some(Running { shared, .. }) = &self.0 else {
            return pieces.into_iter().map(|piece| piece()).collect();
        };
        let done = Arc::<Mutex<Vec<(usize, T)>>>::default();
        let pieces: VecDeque<Piece> = (pieces.into_iter().enumerate())
            .map(|(i, piece)| -> Piece {
                let done = Arc::clone(&done);
                Box::new(move || {
                    let gives = piece();
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((i, gives));
                })
            })
            .collect();
        if pieces.len() > 1 {
            shared.offer(pieces);
            while let Some(piece) = shared.take() {
                piece();
            }
            shared.wait_until_idle();
        } else {
            pieces.into_iter().for_each(|piece| piece());
        }
        let mut done = std::mem::take(&mut *done.lock().unwrap_or_else(PoisonError::into_inner));
        done.sort_unstable_by_key(|(i, _)| *i);
        done.into_iter().map(|(_, gives)| gives).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // One that panicked has nothing to say.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// To both threads.
    fn offer(&self, pieces: VecDeque<Piece>) {
        let mut state = self.lock();
        // Woken where it can run at once, and not where this thread does.
        state.tid.into_iter().for_each(ckpt_sys::task::keep_off);
        state.pieces = pieces;
        drop(state);
        self.changed.notify_all();
    }

    /// Until the thread has nothing under way. It is at its last piece: to sleep would take as long, and to yield would give the
    /// processor to somebody else for much longer.
    fn wait_until_idle(&self) {
        const SPIN: Duration = Duration::from_millis(1);
        let started = Instant::now();
        let mut state = self.lock();
        while state.is_busy {
            if started.elapsed() < SPIN {
                drop(state);
                std::hint::spin_loop();
                state = self.lock();
            } else {
                // Where it is, somebody more important may run for long.
                state.tid.into_iter().for_each(ckpt_sys::task::keep_off_no_more);
                state = self.wait(state);
            }
        }
    }

    fn take(&self) -> Option<Piece> {
        self.lock().pieces.pop_front()
    }

    fn run(&self) {
        let mut state = self.lock();
        state.tid = Some(ckpt_sys::task::this());
        self.changed.notify_all();
        while !state.ends {
            let Some(piece) = state.pieces.pop_front() else {
                state = self.wait(state);
                continue;
            };
            state.is_busy = true;
            drop(state);
            piece();
            state = self.lock();
            state.is_busy = false;
            if state.pieces.is_empty() {
                self.changed.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn what_is_given_is_in_order() {
        for second in [Second::start_anyway(), Second::default()] {
            for n in [0, 1, 2, 1000] {
                let given = second.all((0..n).map(|i| move || i * i));
                assert_eq!(given, (0..n).map(|i| i * i).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn two_threads_do_it() {
        let second = Second::start_anyway();
        // Each waits until both have begun.
        let begun = Arc::<AtomicUsize>::default();
        let meet = |_| {
            let begun = Arc::clone(&begun);
            move || {
                begun.fetch_add(1, Ordering::SeqCst);
                while begun.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
                ckpt_sys::task::this()
            }
        };
        let who = second.all((0..2).map(meet));
        assert_ne!(who[0], who[1]);
    }
}
