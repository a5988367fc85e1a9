//! The stream of packed batches: made ahead on threads of its own, resumable at any of them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use m6_data::{DataError, Loader};
use tch::Device;

use super::batch::{Batch, HostBatch, Packer};
use crate::error::{Error, Result};
use crate::objectives::{Example, ExampleSource};

/// Samples that may fail one after the other before the data set is taken to be broken.
const MAX_FAILURES_IN_A_ROW: u64 = 100;
/// Failures that are named; later ones are only counted.
const NAMED_FAILURES: u64 = 10;
/// Examples that each worker makes ahead.
const EXAMPLES_AHEAD: usize = 64;
/// Batches that are packed ahead.
const BATCHES_AHEAD: usize = 2;

/// Batches of examples in the order of the run.
pub struct Feed {
    /// Emptied on drop, which makes the packing thread's next send fail.
    batches: Option<Receiver<Result<Packed>>>,
    thread: Option<JoinHandle<()>>,
    position: u64,
    failures: u64,
    waited: Duration,
}

/// A batch with the state of the stream after it.
struct Packed {
    batch: HostBatch,
    /// Ordinal of the first example that is in none of the batches so far.
    position: u64,
    /// Samples that could not be used so far.
    failures: u64,
}

impl Feed {
    /// Starts at `ordinal` of the run with `workers` threads that make examples, and one that packs them.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(
        source: Arc<ExampleSource>,
        ordinal: u64,
        workers: usize,
        packer: Packer,
        device: Device,
    ) -> Result<Self> {
        let loader = Loader::start(ordinal, workers, EXAMPLES_AHEAD * workers, move |at| source.example(at))?;
        let mut packing = Packing {
            loader,
            packer,
            pending: None,
            failures: 0,
            failures_in_a_row: 0,
            fixed_shape: device.is_cuda(),
        };
        let (sender, batches) = sync_channel(BATCHES_AHEAD);
        let thread = std::thread::Builder::new()
            .name("m6-pack".into())
            .spawn(move || packing.run(&sender))
            .map_err(|error| Error::Usage(format!("no thread for packing batches: {error}")))?;
        Ok(Self {
            batches: Some(batches),
            thread: Some(thread),
            position: ordinal,
            failures: 0,
            waited: Duration::ZERO,
        })
    }

    /// Ordinal of the first example that is in none of the batches so far: where a resumed run starts.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Samples that could not be used so far.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Time spent waiting for batches since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// The next batch, on `device`.
    ///
    /// # Errors
    /// When too many samples in a row cannot be used, or the device has no memory.
    pub fn next_batch(&mut self, device: Device) -> Result<Batch> {
        let asked = Instant::now();
        let received = self.batches.as_ref().and_then(|batches| batches.recv().ok());
        self.waited += asked.elapsed();
        let packed = received.ok_or_else(|| Error::Usage("the packing thread has stopped".into()))??;
        self.position = packed.position;
        self.failures = packed.failures;
        packed.batch.upload(device)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has already been reported as a stream that stopped.
            let _ = thread.join();
        }
    }
}

struct Packing {
    loader: Loader<Result<Example>>,
    packer: Packer,
    pending: Option<Example>,
    failures: u64,
    failures_in_a_row: u64,
    fixed_shape: bool,
}

impl Packing {
    fn run(&mut self, sender: &SyncSender<Result<Packed>>) {
        loop {
            let packed = self.next();
            let failed = packed.is_err();
            if sender.send(packed).is_err() || failed {
                return;
            }
        }
    }

    /// Samples that cannot be used are named on stderr, counted and left out.
    fn next(&mut self) -> Result<Packed> {
        if let Some(example) = self.pending.take() {
            self.pending = self.packer.push(example);
        }
        loop {
            let (ordinal, made) =
                self.loader.next().ok_or_else(|| Error::Usage("the loader has stopped".into()))??;
            match made {
                Ok(example) => {
                    self.failures_in_a_row = 0;
                    if let Some(left) = self.packer.push(example) {
                        self.pending = Some(left);
                        let batch = self.packer.finish_host(self.fixed_shape)?;
                        return Ok(Packed { batch, position: ordinal, failures: self.failures });
                    }
                }
                Err(error) => self.count_failure(error)?,
            }
        }
    }

    fn count_failure(&mut self, error: Error) -> Result<()> {
        if !matches!(error, Error::Data(DataError::Sample { .. })) {
            return Err(error);
        }
        self.failures += 1;
        self.failures_in_a_row += 1;
        if self.failures <= NAMED_FAILURES {
            eprintln!("m6: skipped: {error}");
        }
        if self.failures_in_a_row == MAX_FAILURES_IN_A_ROW {
            return Err(error);
        }
        Ok(())
    }
}
