//! The stream of packed batches: made ahead on threads of its own, resumable at any of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use m6_data::{FlawClass, Item, Loader, RowPacker, SkipCounts, SkipLimits, SkipLog, Skipped};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::error::{Error, Result};
use crate::model::{Positions, Vocab};
use crate::objectives::{Batch, Example, ExampleSource, HostBatch, lay_out};

/// Examples that each worker makes ahead.
const EXAMPLES_AHEAD: usize = 64;
/// Batches that are packed ahead.
const BATCHES_AHEAD: usize = 2;

/// Where in its data a run is: the micro-batches of an update come from a stream each, and each stream has its own examples,
/// every n-th of the run. So the examples of an update do not depend on how many processes share its streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Place {
    /// Of each stream of this process.
    streams: BTreeMap<usize, StreamPlace>,
}

/// Where in its examples, which it counts from 0, a stream is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamPlace {
    /// The first example that was not looked at yet.
    position: u64,
    /// Examples before it that are in none of the batches so far, the longest waiting first.
    waiting: Vec<u64>,
    /// Samples that could not be used so far.
    samples: SkipCounts,
}

impl Place {
    /// The start of a run with these streams.
    pub fn start(streams: impl IntoIterator<Item = usize>) -> Self {
        Self { streams: streams.into_iter().map(|stream| (stream, StreamPlace::default())).collect() }
    }

    /// Examples that were looked at.
    pub fn examples(&self) -> u64 {
        self.streams.values().map(|stream| stream.position).sum()
    }

    /// Samples that could not be used, by what is wrong with them.
    pub fn skipped(&self) -> BTreeMap<FlawClass, u64> {
        let mut sums = BTreeMap::new();
        for (class, count) in self.streams.values().flat_map(|stream| &stream.samples.skipped) {
            *sums.entry(*class).or_default() += count;
        }
        sums
    }
}

/// Batches of examples in the order of the run.
pub struct Feed {
    /// Emptied on drop, which makes the packing thread's next send fail.
    batches: Option<Receiver<Result<Packed>>>,
    thread: Option<JoinHandle<()>>,
    place: Place,
    waited: Duration,
}

/// A batch and where its stream is after it.
struct Packed {
    stream: usize,
    batch: HostBatch,
    place: StreamPlace,
}

/// What batches are made of, and how.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// Streams of the run, over all processes: micro-batches of an update.
    pub streams: usize,
    /// Threads that make examples.
    pub workers: usize,
    /// When samples that cannot be used are too many.
    pub skip: SkipLimits,
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// The model's vocabulary.
    pub vocab: Vocab,
    /// Its positions.
    pub positions: Positions,
    /// Where batches go.
    pub device: Device,
}

impl Feed {
    /// Starts at `place` in the run, whose streams take turns; one thread packs their examples into rows. Samples that
    /// cannot be used go to `log`.
    ///
    /// # Errors
    /// When the system refuses a thread, or an example that waited cannot be made again.
    pub fn start(
        source: &Arc<ExampleSource>,
        place: Place,
        recipe: Recipe,
        log: Arc<SkipLog>,
    ) -> Result<Self> {
        let workers = recipe.workers.div_ceil(place.streams.len().max(1));
        let mut streams = place
            .streams
            .iter()
            .map(|(&stream, place)| {
                Stream::start(source.clone(), stream, place, workers, &recipe, log.clone())
            })
            .collect::<Result<Vec<_>>>()?;
        let (sender, batches) = sync_channel(BATCHES_AHEAD);
        let thread = std::thread::Builder::new()
            .name("m6-pack".into())
            .spawn(move || take_turns(&mut streams, &sender))
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
        self.place.streams.insert(packed.stream, packed.place);
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

fn take_turns(streams: &mut [Stream], sender: &SyncSender<Result<Packed>>) {
    loop {
        for stream in &mut *streams {
            let packed = stream.next();
            let failed = packed.is_err();
            if sender.send(packed).is_err() || failed {
                return;
            }
        }
    }
}

/// The examples of a stream on their way into rows.
struct Stream {
    number: usize,
    loader: Loader<Result<Item<Example>>>,
    packer: RowPacker<Example>,
    skipped: Skipped,
    log: Arc<SkipLog>,
    recipe: Recipe,
}

/// The value, or `None` for a sample that cannot be used; see [`Skipped::check`].
pub(super) fn check<T>(skipped: &mut Skipped, made: Result<T>, log: Option<&SkipLog>) -> Result<Option<T>> {
    let made = match made {
        Ok(value) => Ok(value),
        Err(Error::Data(error)) => Err(error),
        Err(error) => return Err(error),
    };
    Ok(skipped.check(made, log, |note| eprintln!("{note}"))?)
}

impl Stream {
    fn start(
        source: Arc<ExampleSource>,
        number: usize,
        place: &StreamPlace,
        workers: usize,
        recipe: &Recipe,
        log: Arc<SkipLog>,
    ) -> Result<Self> {
        let (patches, streams) = (recipe.positions.patches(), recipe.streams as u64);
        let make = move |ordinal: u64| -> Result<Item<Example>> {
            let value = source.example(ordinal * streams + number as u64)?;
            Ok(Item { ordinal, tokens: value.tokens(patches), value })
        };
        let waiting: Vec<_> = place.waiting.iter().map(|&ordinal| make(ordinal)).collect::<Result<_>>()?;
        Ok(Self {
            number,
            loader: Loader::start(place.position, workers, EXAMPLES_AHEAD * workers, make)?,
            packer: RowPacker::resume(recipe.tokens, waiting),
            skipped: Skipped::new(recipe.skip, place.samples.clone()),
            log,
            recipe: *recipe,
        })
    }

    /// Samples that cannot be used are named on stderr, counted and left out.
    fn next(&mut self) -> Result<Packed> {
        let Recipe { tokens, vocab, positions, device, .. } = self.recipe;
        loop {
            let (ordinal, made) =
                self.loader.next().ok_or_else(|| Error::Usage("the loader has stopped".into()))??;
            let Some(item) = check(&mut self.skipped, made, Some(&self.log))? else { continue };
            if let Some(row) = self.packer.push(item) {
                let examples = row.into_iter().map(|item| item.value);
                let fill_to = device.is_cuda().then_some(tokens);
                let batch = lay_out(vocab, positions, examples, fill_to)?;
                let waiting = self.packer.waiting().collect();
                let samples = self.skipped.counts().clone();
                let place = StreamPlace { position: ordinal + 1, waiting, samples };
                return Ok(Packed { stream: self.number, batch, place });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use m6_data::{ShardSet, ShardWriter, train_bpe};
    use tch::Tensor;

    use super::*;
    use crate::model::CodeOrder;
    use crate::objectives::{ModelView, OpenSource, SourceConfig};

    const STREAMS: usize = 4;

    /// A source of short texts; its shards are in the folder.
    fn source() -> (tempfile::TempDir, Arc<ExampleSource>, Recipe) {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> =
            (0..23).map(|i| format!("text {i} of {}", "many ".repeat(i % 5 + 1))).collect();
        let mut writer = ShardWriter::create(dir.path(), "texts", u64::MAX).unwrap();
        for (i, text) in texts.iter().enumerate() {
            writer.write(&i.to_string(), &[("txt", text.as_bytes())]).unwrap();
        }
        let shards: Vec<String> =
            writer.finish().unwrap().iter().map(|path| path.display().to_string()).collect();
        let tokenizer = train_bpe(texts.into_iter(), 300).unwrap();
        let vocab = Vocab { text: tokenizer.vocab_size() as i64, codes: 4 };
        let config: SourceConfig = toml::from_str(&format!(
            "shards = {shards:?}\ncaptions = [{{ member = \"txt\" }}]\ntasks = {{ language_modelling = 1.0, text_denoising = 1.0 }}"
        ))
        .unwrap();
        let open = OpenSource {
            name: "texts".into(),
            tasks: config.tasks.clone().unwrap(),
            shards: ShardSet::open(&shards).unwrap().into(),
            codes: None,
            config,
        };
        let view = ModelView { vocab, max_text: 32, resolution: 16, code_order: CodeOrder::Rows };
        let source = ExampleSource::new(vec![open], 1, &SkipLimits::default(), tokenizer, view).unwrap();
        let positions = Positions { text: 32, patch_grid: 1, code_grid: 1 };
        let recipe = Recipe {
            streams: STREAMS,
            workers: 2,
            skip: SkipLimits::default(),
            tokens: 64,
            vocab,
            positions,
            device: Device::Cpu,
        };
        (dir, Arc::new(source), recipe)
    }

    /// The ids of the next batches, and where the feed is then.
    fn take(
        source: &Arc<ExampleSource>,
        place: Place,
        recipe: Recipe,
        batches: usize,
    ) -> (Vec<Tensor>, Place) {
        let mut feed = Feed::start(source, place, recipe, SkipLog::new(Path::new("unused")).into()).unwrap();
        let ids = (0..batches).map(|_| feed.next_batch(Device::Cpu).unwrap().tokens.ids).collect();
        (ids, feed.place().clone())
    }

    #[test]
    fn the_batches_of_an_update_do_not_depend_on_the_processes_that_share_them() {
        const UPDATES: usize = 12;
        let (_dir, source, recipe) = source();
        let (alone, end) = take(&source, Place::start(0..STREAMS), recipe, UPDATES * STREAMS);
        assert!(end.examples() > 2 * 23, "into the third epoch");
        for (i, batch) in alone.iter().enumerate() {
            assert!(!alone[..i].contains(batch), "batch {i} comes twice");
        }
        // Two processes, of which each has every other stream, stop in mid-epoch; one goes on.
        for stop in [1, 5] {
            let mut updates: Vec<Vec<Vec<Tensor>>> = (0..stop).map(|_| Vec::new()).collect();
            let mut streams = BTreeMap::new();
            for rank in 0..2 {
                let (batches, place) =
                    take(&source, Place::start((rank..STREAMS).step_by(2)), recipe, stop * STREAMS / 2);
                for (update, batches) in updates.iter_mut().zip(batches.chunks(STREAMS / 2)) {
                    update.push(batches.iter().map(Tensor::shallow_clone).collect::<Vec<_>>());
                }
                streams.extend(place.streams);
            }
            let (rest, place) = take(&source, Place { streams }, recipe, (UPDATES - stop) * STREAMS);
            let together =
                updates.iter().flat_map(|ranks| (0..STREAMS).map(|stream| &ranks[stream % 2][stream / 2]));
            assert!(together.chain(&rest).eq(&alone), "stopped after {stop}");
            assert_eq!(place, end);
        }
    }
}
