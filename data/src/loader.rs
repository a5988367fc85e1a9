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
    /// One a worker; emptied after a failure and on drop, which makes the workers' sends fail.
    lanes: Vec<Lane<T>>,
    threads: Vec<JoinHandle<()>>,
    first: u64,
    next: u64,
}

/// What a worker delivers.
struct Lane<T> {
    channel: Receiver<Delivery<T>>,
    /// Arrived and not yet consumed.
    arrived: std::vec::IntoIter<std::thread::Result<T>>,
}

/// Samples that a worker hands over at once.
type Delivery<T> = Vec<std::thread::Result<T>>;

/// Deliveries that make up what a worker may hold ready. A consumer that is faster than its workers is woken for each
/// delivery, which costs more than all else that the loader does.
const DELIVERIES: usize = 8;

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
            Self { lanes: Vec::new(), threads: Vec::new(), first: first_ordinal, next: first_ordinal };
        let ahead = capacity.div_ceil(workers);
        let together = (ahead / DELIVERIES).max(1);
        for worker in 0..workers {
            let (sender, channel) = sync_channel(ahead / together);
            let make = Arc::clone(&make);
            let ordinals = (first_ordinal + worker as u64..).step_by(workers);
            let name = format!("m6-data-{worker}");
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || work(ordinals, together, &*make, &sender))
                .map_err(DataError::io("start thread", name.as_ref()))?;
            loader.lanes.push(Lane { channel, arrived: Vec::new().into_iter() });
            loader.threads.push(thread);
        }
        Ok(loader)
    }
}

/// Makes and sends, some `together`, until the consumer hangs up or `make` panics.
fn work<T>(
    mut ordinals: impl Iterator<Item = u64>,
    together: usize,
    make: &impl Fn(u64) -> T,
    sender: &SyncSender<Delivery<T>>,
) {
    loop {
        let mut delivery = Vec::with_capacity(together);
        let mut failed = false;
        for ordinal in ordinals.by_ref().take(together) {
            let made = catch_unwind(AssertUnwindSafe(|| make(ordinal)));
            failed = made.is_err();
            delivery.push(made);
            if failed {
                break;
            }
        }
        if sender.send(delivery).is_err() || failed {
            return;
        }
    }
}

impl<T> Iterator for Loader<T> {
    type Item = Result<(u64, T)>;

    /// The next ordinal and its sample; an error when a worker panicked, and `None` after it.
    fn next(&mut self) -> Option<Self::Item> {
        let ordinal = self.next;
        let turn = (ordinal - self.first).checked_rem(self.lanes.len() as u64)?;
        match self.lanes[turn as usize].next()? {
            Ok(made) => {
                self.next += 1;
                Some(Ok((ordinal, made)))
            }
            Err(panic) => {
                self.lanes.clear();
                Some(Err(DataError::Worker { ordinal, message: panic_message(&*panic) }))
            }
        }
    }
}

impl<T> Lane<T> {
    /// Waits for the worker; `None` when it is gone.
    fn next(&mut self) -> Option<std::thread::Result<T>> {
        if self.arrived.len() == 0 {
            self.arrived = self.channel.recv().ok()?.into_iter();
        }
        self.arrived.next()
    }
}

impl<T> Drop for Loader<T> {
    fn drop(&mut self) {
        self.lanes.clear();
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
        for (workers, capacity) in [(0, 4), (1, 4), (3, 4), (8, 4), (1, 64), (3, 100)] {
            let slow_sometimes = |ordinal: u64| {
                std::thread::sleep(Duration::from_micros(ordinal * 7 % 5 * 100));
                ordinal * 10
            };
            let loader = Loader::start(5, workers, capacity, slow_sometimes).unwrap();
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
        for capacity in [4, 64] {
            let mut loader = Loader::start(0, 2, capacity, |ordinal| {
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
}
