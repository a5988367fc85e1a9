//! The stream of packed batches: made ahead on threads of its own, resumable at any of them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use m6_data::{Item, Loader, RowPacker};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::error::{Error, Result};
use crate::model::{Positions, Transformer, Vocab};
use crate::objectives::{Batch, Example, ExampleSource, HostBatch, Skipped, lay_out};

/// Examples that each worker makes ahead.
const EXAMPLES_AHEAD: usize = 64;
/// Batches that are packed ahead.
const BATCHES_AHEAD: usize = 2;

/// Where in its data a run is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Place {
    /// Ordinal of the first example that was not looked at yet.
    pub position: u64,
    /// Ordinals of the examples before it that are in none of the batches so far, the longest waiting first.
    pub waiting: Vec<u64>,
    /// Samples that could not be used so far.
    pub skipped: u64,
}

/// Batches of examples in the order of the run.
pub struct Feed {
    /// Emptied on drop, which makes the packing thread's next send fail.
    batches: Option<Receiver<Result<Packed>>>,
    thread: Option<JoinHandle<()>>,
    place: Place,
    waited: Duration,
}

/// A batch and where the run is after it.
struct Packed {
    batch: HostBatch,
    place: Place,
}

impl Feed {
    /// Starts at `place` in the run with `workers` threads that make examples, and one that packs them into rows of
    /// `tokens`.
    ///
    /// # Errors
    /// When the system refuses a thread, or an example that waited cannot be made again.
    pub fn start(
        source: Arc<ExampleSource>,
        place: Place,
        workers: usize,
        tokens: usize,
        transformer: &Transformer,
        device: Device,
    ) -> Result<Self> {
        let (vocab, positions) = (transformer.vocab(), transformer.positions());
        let item =
            move |ordinal, value: Example| Item { ordinal, tokens: value.tokens(positions.patches()), value };
        let waiting: Vec<_> =
            place.waiting.iter().map(|&at| Ok(item(at, source.example(at)?))).collect::<Result<_>>()?;
        let ahead = EXAMPLES_AHEAD * workers;
        let loader = Loader::start(place.position, workers, ahead, move |at| {
            source.example(at).map(|example| item(at, example))
        })?;
        let mut packing = Packing {
            loader,
            packer: RowPacker::resume(tokens, waiting),
            skipped: Skipped::resume(place.skipped),
            vocab,
            positions,
            fill_to: device.is_cuda().then_some(tokens),
        };
        let (sender, batches) = sync_channel(BATCHES_AHEAD);
        let thread = std::thread::Builder::new()
            .name("m6-pack".into())
            .spawn(move || packing.run(&sender))
            .map_err(|error| Error::Usage(format!("no thread for packing batches: {error}")))?;
        Ok(Self { batches: Some(batches), thread: Some(thread), place, waited: Duration::ZERO })
    }

    /// Where a run that is resumed after the batches so far starts.
    pub fn place(&self) -> &Place {
        &self.place
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
        let Some(packed) = received else {
            match self.thread.take().map(JoinHandle::join) {
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                _ => unreachable!(
                    "the packing thread ends only after an error or a panic, or when it is dropped"
                ),
            }
        };
        let packed = packed?;
        self.place = packed.place;
        packed.batch.upload(device)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the stream and was passed on by `next_batch`.
            let _ = thread.join();
        }
    }
}

struct Packing {
    loader: Loader<Result<Item<Example>>>,
    packer: RowPacker<Example>,
    skipped: Skipped,
    vocab: Vocab,
    positions: Positions,
    fill_to: Option<usize>,
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
        loop {
            let (ordinal, made) =
                self.loader.next().ok_or_else(|| Error::Usage("the loader has stopped".into()))??;
            let Some(item) = self.skipped.check(made)? else { continue };
            if let Some(row) = self.packer.push(item) {
                let examples = row.into_iter().map(|item| item.value);
                let batch = lay_out(self.vocab, self.positions, examples, self.fill_to)?;
                let waiting = self.packer.waiting().collect();
                let place = Place { position: ordinal + 1, waiting, skipped: self.skipped.count() };
                return Ok(Packed { batch, place });
            }
        }
    }
}
