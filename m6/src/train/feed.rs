//! The stream of packed batches: made ahead on threads of its own, resumable at any of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use m6_data::{DataError, FlawClass, Item, Loader, RowPacker, SkipCounts, SkipLimits, SkipLog, Skipped};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::error::{Error, Result};
use crate::model::{Positions, Vocab};
use crate::objectives::{Batch, Drawn, ExampleSource, HostBatch, lay_out};

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
    /// Examples so far whose text was cut to the longest that the model takes.
    cut_texts: u64,
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

    /// Examples whose text was cut to the longest that the model takes.
    pub fn cut_texts(&self) -> u64 {
        self.streams.values().map(|stream| stream.cut_texts).sum()
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
    loader: Loader<Result<Item<Drawn>>>,
    packer: RowPacker<Drawn>,
    skipped: Skipped,
    cut_texts: u64,
    log: Arc<SkipLog>,
    recipe: Recipe,
}

/// Puts down how long an example is.
///
/// # Errors
/// Names its sample where it is longer than a row of `budget` tokens.
pub(super) fn measured(
    source: &ExampleSource,
    place: u64,
    drawn: Drawn,
    patches: usize,
    budget: usize,
) -> Result<Item<Drawn>> {
    let tokens = drawn.example.tokens(patches);
    if tokens > budget {
        let reason = format!("its example has {tokens} tokens, more than schedule.tokens = {budget}");
        return Err(DataError::Sample(source.flaw(place, FlawClass::Unfit, reason)).into());
    }
    Ok(Item { ordinal: place, tokens, value: drawn })
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
        let (patches, streams, budget) = (recipe.positions.patches(), recipe.streams as u64, recipe.tokens);
        let make = move |ordinal: u64| -> Result<Item<Drawn>> {
            let place = ordinal * streams + number as u64;
            let item = measured(&source, place, source.example(place)?, patches, budget)?;
            Ok(Item { ordinal, ..item })
        };
        let waiting: Vec<_> = place.waiting.iter().map(|&ordinal| make(ordinal)).collect::<Result<_>>()?;
        Ok(Self {
            number,
            loader: Loader::start(place.position, workers, EXAMPLES_AHEAD * workers, make)?,
            packer: RowPacker::resume(recipe.tokens, waiting),
            skipped: Skipped::new(recipe.skip, place.samples.clone()),
            cut_texts: place.cut_texts,
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
            self.cut_texts += u64::from(item.value.is_cut);
            if let Some(row) = self.packer.push(item) {
                let examples = row.into_iter().map(|item| item.value.example);
                let fill_to = device.is_cuda().then_some(tokens);
                let batch = lay_out(vocab, positions, examples, fill_to)?;
                let waiting = self.packer.waiting().collect();
                let samples = self.skipped.counts().clone();
                let cut_texts = self.cut_texts;
                let place = StreamPlace { position: ordinal + 1, waiting, samples, cut_texts };
                return Ok(Packed { stream: self.number, batch, place });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use m6_data::{ShardSet, ShardWriter, Tokenizer, train_bpe};
    use tch::Tensor;

    use super::*;
    use crate::model::CodeOrder;
    use crate::objectives::{ModelView, OpenSource, SourceConfig};

    const STREAMS: usize = 4;
    const RESOLUTION: i64 = 64;

    /// A source of so many short texts; its shards are in the folder.
    fn source(texts: usize) -> (tempfile::TempDir, Arc<ExampleSource>, Recipe) {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> =
            (0..texts).map(|i| format!("text {i} of {}", "many ".repeat(i % 5 + 1))).collect();
        let mut writer = ShardWriter::create(dir.path(), "texts", u64::MAX).unwrap();
        for (i, text) in texts.iter().enumerate() {
            writer.write(&i.to_string(), &[("txt", text.as_bytes())]).unwrap();
        }
        let shards: Vec<String> =
            writer.finish().unwrap().iter().map(|path| path.display().to_string()).collect();
        let tokenizer = train_bpe(texts.into_iter(), 300).unwrap();
        let config =
            "captions = [{ member = \"txt\" }]\ntasks = { language_modelling = 1.0, text_denoising = 1.0 }";
        let positions = Positions { text: 32, patch_grid: 1, code_grid: 1 };
        let (source, recipe) = open(&shards, config, tokenizer, positions);
        let recipe = Recipe { streams: STREAMS, tokens: 64, ..recipe };
        (dir, source, recipe)
    }

    /// A source, and one stream of rows of it.
    fn open(
        shards: &[String],
        config: &str,
        tokenizer: Tokenizer,
        positions: Positions,
    ) -> (Arc<ExampleSource>, Recipe) {
        let config: SourceConfig = toml::from_str(&format!("shards = {shards:?}\n{config}")).unwrap();
        let vocab = Vocab { text: tokenizer.vocab_size() as i64, codes: 4 };
        let open = OpenSource {
            name: "source".into(),
            tasks: config.tasks.clone().unwrap(),
            shards: ShardSet::open(shards).unwrap().into(),
            codes: None,
            config,
        };
        let view = ModelView {
            vocab,
            max_text: positions.text,
            resolution: RESOLUTION,
            code_order: CodeOrder::Rows,
        };
        let source = ExampleSource::new(vec![open], 1, &SkipLimits::default(), tokenizer, view).unwrap();
        let recipe = Recipe {
            streams: 1,
            workers: 2,
            skip: SkipLimits::default(),
            tokens: 1024,
            vocab,
            positions,
            device: Device::Cpu,
        };
        (source.into(), recipe)
    }

    /// The ids of the next updates' batches, made by `ranks` processes with every `ranks`-th stream each, and where
    /// the run is then.
    fn take(
        source: &Arc<ExampleSource>,
        place: &Place,
        recipe: Recipe,
        (ranks, updates): (usize, usize),
    ) -> (Vec<Tensor>, Place) {
        let mut batches = BTreeMap::new();
        let mut streams = BTreeMap::new();
        for rank in 0..ranks {
            let own = place.streams.iter().filter(|(stream, _)| *stream % ranks == rank);
            let own = Place { streams: own.map(|(stream, place)| (*stream, place.clone())).collect() };
            let log = SkipLog::new(Path::new("unused"));
            let mut feed = Feed::start(source, own.clone(), recipe, log.into()).unwrap();
            for update in 0..updates {
                for stream in own.streams.keys() {
                    batches.insert((update, *stream), feed.next_batch(Device::Cpu).unwrap().tokens.ids);
                }
            }
            streams.extend(feed.place().clone().streams);
        }
        (batches.into_values().collect(), Place { streams })
    }

    /// Runs as often as there are parts, each with its own number of processes and of workers.
    fn take_in_parts(
        source: &Arc<ExampleSource>,
        recipe: Recipe,
        parts: &[(usize, usize)],
    ) -> (Vec<Tensor>, Place) {
        let mut place = Place::start(0..recipe.streams);
        let mut all = Vec::new();
        for (workers, part) in (1..).zip(parts) {
            let (batches, next) = take(source, &place, Recipe { workers, ..recipe }, *part);
            all.extend(batches);
            place = next;
        }
        (all, place)
    }

    fn copies(tensors: &[Tensor]) -> Vec<Tensor> {
        tensors.iter().map(Tensor::shallow_clone).collect()
    }

    #[test]
    fn the_batches_of_an_update_do_not_depend_on_the_processes_that_share_them() {
        const UPDATES: usize = 12;
        let (_dir, source, recipe) = source(23);
        let (alone, end) = take_in_parts(&source, recipe, &[(1, UPDATES)]);
        assert!(end.examples() > 2 * 23, "into the third epoch");
        for (i, batch) in alone.iter().enumerate() {
            assert!(!alone[..i].contains(batch), "batch {i} comes twice");
        }
        for parts in [&[(2, 1), (1, 11)][..], &[(1, 2), (2, 3), (4, 4), (1, 1), (2, 2)]] {
            assert_eq!(parts.iter().map(|(_, updates)| updates).sum::<usize>(), UPDATES);
            assert_eq!(take_in_parts(&source, recipe, parts), (copies(&alone), end.clone()), "{parts:?}");
        }
    }

    #[test]
    fn one_sample_serves_more_processes_than_there_are_samples() {
        let (_dir, source, recipe) = source(1);
        let (alone, end) = take_in_parts(&source, recipe, &[(1, 5)]);
        assert_eq!(take_in_parts(&source, recipe, &[(4, 2), (2, 1), (4, 2)]), (alone, end));
    }

    #[test]
    fn a_run_goes_on_from_the_edge_of_an_epoch() {
        const BATCHES: usize = 60;
        let (_dir, source, recipe) = source(23);
        let recipe = Recipe { streams: 1, ..recipe };
        let (whole, end) = take_in_parts(&source, recipe, &[(1, BATCHES)]);
        let at_an_edge = |updates: &usize| {
            let (_, place) = take_in_parts(&source, recipe, &[(1, *updates)]);
            place.examples().is_multiple_of(23)
        };
        let edge = (1..BATCHES).find(at_an_edge).expect("an update that ends with an epoch");
        assert_eq!(take_in_parts(&source, recipe, &[(1, edge), (1, BATCHES - edge)]), (whole, end));
    }

    #[test]
    fn rows_of_the_emoji_are_full() {
        const BATCHES: usize = 40;
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let shards = vec![root.join("datasets/emoji/train-*.tar").display().to_string()];
        let config = r#"
            captions = [{ member = "json", key = "en" }, { member = "json", key = "zh" }]
            transform = "resize:72 | random_crop:64"
            tasks = { language_modelling = 1.0, text_denoising = 1.0, captioning = 2.0 }"#;
        let tokenizer = Tokenizer::load(&root.join("models/emoji/tokenizer.json")).unwrap();
        let positions = Positions { text: 64, patch_grid: 4, code_grid: 1 };
        let (source, recipe) = open(&shards, config, tokenizer, positions);
        let log = SkipLog::new(Path::new("unused"));
        let mut feed = Feed::start(&source, Place::start(0..1), recipe, log.into()).unwrap();
        let real: i64 = (0..BATCHES).map(|_| feed.next_batch(Device::Cpu).unwrap().real).sum();
        let fill = real as f64 / (BATCHES * recipe.tokens) as f64;
        assert!(fill > 0.97, "{fill}");
    }
}
