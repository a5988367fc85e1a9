//! The stream of packed batches, resumable at any of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use m6_data::{DataError, Loader};
use tch::Device;

use super::batch::{Batch, Packer};
use crate::error::{Error, Result};
use crate::objectives::{Example, ExampleSource};

/// Samples that may fail one after the other before the data set is taken to be broken.
const MAX_FAILURES_IN_A_ROW: u64 = 100;
/// Failures that are named; later ones are only counted.
const NAMED_FAILURES: u64 = 10;
/// Examples that each worker makes ahead.
const AHEAD: usize = 64;

/// Batches of examples in the order of the run.
pub struct Feed {
    loader: Loader<Result<Example>>,
    packer: Packer,
    pending: Option<(u64, Example)>,
    position: u64,
    failures: u64,
    failures_in_a_row: u64,
    waited: Duration,
}

impl Feed {
    /// Starts at `ordinal` of the run with `workers` threads.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(source: Arc<ExampleSource>, ordinal: u64, workers: usize, packer: Packer) -> Result<Self> {
        let loader = Loader::start(ordinal, workers, AHEAD * workers, move |at| source.example(at))?;
        Ok(Self {
            loader,
            packer,
            pending: None,
            position: ordinal,
            failures: 0,
            failures_in_a_row: 0,
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

    /// Time spent waiting for examples since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// The next batch, on `device`. Samples that cannot be used are named on stderr, counted and left out.
    ///
    /// # Errors
    /// When too many samples in a row cannot be used.
    pub fn next_batch(&mut self, device: Device) -> Result<Batch> {
        if let Some((ordinal, example)) = self.pending.take() {
            self.position = ordinal + 1;
            let _ = self.packer.push(example);
        }
        loop {
            let asked = Instant::now();
            let (ordinal, made) =
                self.loader.next().ok_or_else(|| Error::Usage("the loader has stopped".into()))??;
            self.waited += asked.elapsed();
            match made {
                Ok(example) => {
                    self.failures_in_a_row = 0;
                    if let Some(left) = self.packer.push(example) {
                        self.pending = Some((ordinal, left));
                        self.position = ordinal;
                        return self.packer.finish(device);
                    }
                    self.position = ordinal + 1;
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
