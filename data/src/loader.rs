//! Makes samples ahead of the consumer on worker threads and delivers them in order.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::error::{DataError, Result};

/// An endless stream of `(ordinal, make(ordinal))` in ordinal order, whatever the number of workers.
///
/// Worker `w` of `n` makes ordinals `first + w`, `first + w + n`, ... into a bounded channel of its own, so a slow sample
/// delays but never reorders. Dropping the loader stops and joins the threads.
pub struct Loader<T> {
    /// One channel a worker; emptied after a failure and on drop, which makes the workers' sends fail.
    channels: Vec<Receiver<std::thread::Result<T>>>,
    threads: Vec<JoinHandle<()>>,
    first: u64,
    next: u64,
}

impl<T: Send + 'static> Loader<T> {
    /// Starts `workers` threads (at least one) that run ahead by at most about `capacity` samples in all.
    ///
    /// # Errors
    /// The system refuses another thread.
    pub fn start(
        first_ordinal: u64,
        workers: usize,
        capacity: usize,
        make: impl Fn(u64) -> T + Send + Sync + 'static,
    ) -> Result<Self> {
        let workers = workers.max(1);
        let make = Arc::new(make);
        let mut loader =
            Self { channels: Vec::new(), threads: Vec::new(), first: first_ordinal, next: first_ordinal };
        for worker in 0..workers {
            let (sender, receiver) = sync_channel(capacity.div_ceil(workers));
            let make = Arc::clone(&make);
            let ordinals = (first_ordinal + worker as u64..).step_by(workers);
            let name = format!("m6-data-{worker}");
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || work(ordinals, &*make, &sender))
                .map_err(DataError::io("start thread", name.as_ref()))?;
            loader.channels.push(receiver);
            loader.threads.push(thread);
        }
        Ok(loader)
    }
}

/// Makes and sends until the consumer hangs up or `make` panics.
fn work<T>(
    ordinals: impl Iterator<Item = u64>,
    make: &impl Fn(u64) -> T,
    sender: &SyncSender<std::thread::Result<T>>,
) {
    for ordinal in ordinals {
        let made = catch_unwind(AssertUnwindSafe(|| make(ordinal)));
        let failed = made.is_err();
        if sender.send(made).is_err() || failed {
            return;
        }
    }
}

impl<T> Iterator for Loader<T> {
    type Item = Result<(u64, T)>;

    /// The next ordinal and its sample; an error when a worker panicked, and `None` after it.
    fn next(&mut self) -> Option<Self::Item> {
        let ordinal = self.next;
        let turn = (ordinal - self.first).checked_rem(self.channels.len() as u64)?;
        match self.channels[turn as usize].recv() {
            Ok(Ok(made)) => {
                self.next += 1;
                Some(Ok((ordinal, made)))
            }
            Ok(Err(panic)) => {
                self.channels.clear();
                Some(Err(DataError::Worker { ordinal, message: panic_message(&*panic) }))
            }
            Err(_) => None,
        }
    }
}

impl<T> Drop for Loader<T> {
    fn drop(&mut self) {
        self.channels.clear();
        for thread in self.threads.drain(..) {
            // Panics inside `make` are caught and delivered; there is nothing left to report here.
            let _ = thread.join();
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    #[test]
    fn the_order_does_not_depend_on_the_workers() {
        for workers in [0, 1, 3, 8] {
            let slow_sometimes = |ordinal: u64| {
                std::thread::sleep(Duration::from_micros(ordinal * 7 % 5 * 100));
                ordinal * 10
            };
            let loader = Loader::start(5, workers, 4, slow_sometimes).unwrap();
            let got: Vec<_> = loader.take(40).map(Result::unwrap).collect();
            assert_eq!(got, (5..45).map(|o| (o, o * 10)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn workers_do_not_run_ahead_without_bound_and_stop_on_drop() {
        let made = Arc::new(AtomicU64::new(0));
        let counter = made.clone();
        let mut loader = Loader::start(0, 2, 4, move |_| counter.fetch_add(1, Ordering::SeqCst)).unwrap();
        loader.next().unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        // 4 in the channels, 1 taken, and each of 2 workers holds at most one that does not fit.
        assert!(made.load(Ordering::SeqCst) <= 7);
        drop(loader);
        assert_eq!(Arc::strong_count(&made), 1, "the threads are gone and with them the closure");
    }

    #[test]
    fn a_panic_in_a_worker_is_an_error_in_its_place() {
        let mut loader = Loader::start(0, 2, 4, |ordinal| {
            assert!(ordinal != 3, "sample three is bad");
            ordinal
        })
        .unwrap();
        let good: Vec<_> = loader.by_ref().take(3).map(Result::unwrap).collect();
        assert_eq!(good.len(), 3);
        let error = loader.next().unwrap().unwrap_err().to_string();
        assert_eq!(error, "data worker failed at ordinal 3: sample three is bad");
        assert!(loader.next().is_none());
    }
}
