//! How fast shards become pictures, and where the time goes.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::Result;
use crate::loader::Loader;
use crate::order::{SampleOrder, sample_rng};
use crate::picture::Rgb8;
use crate::shard::{ShardSet, sample_image_for};
use crate::transform::Transform;

/// Samples that each worker makes ahead.
const AHEAD: usize = 64;
/// Seed of the order and of the augmentation.
const SEED: u64 = 0;
const MEGABYTE: f64 = 1e6;

/// What [`bench()`] measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// Pictures made.
    pub samples: u64,
    /// Samples that gave no picture.
    pub broken: u64,
    /// Threads that made them.
    pub workers: usize,
    /// How long it took.
    pub seconds: f64,
    /// Pictures a second.
    pub samples_per_s: f64,
    /// Megabytes (10^6) of members read a second.
    pub mb_per_s: f64,
    /// Where the workers' time goes.
    pub stages: Stages,
}

/// Milliseconds of one worker's time for a sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stages {
    /// Reading the sample's members from its shard.
    pub read: f64,
    /// Bytes to pixels.
    pub decode: f64,
    /// Augmentation.
    pub transform: f64,
}

/// A sample's picture and what it took to make it.
#[derive(Default)]
struct Made {
    picture: Option<Rgb8>,
    bytes: u64,
    read: Duration,
    decode: Duration,
    transform: Duration,
}

/// Makes pictures of `samples` samples of `set`, in random order and with random augmentation as in training, on
/// `workers` threads (at least one). What the threads make while they start is not measured. `progress` is called after
/// each sample.
///
/// # Errors
/// When the set is empty or the system refuses a thread.
pub fn bench(
    set: ShardSet,
    transform: Transform,
    workers: usize,
    samples: u64,
    mut progress: impl FnMut(),
) -> Result<BenchReport> {
    let workers = workers.max(1);
    let ahead = AHEAD * workers;
    let order = SampleOrder::new(set.len(), SEED)?;
    let mut loader =
        Loader::start(0, workers, ahead, move |at| Made::new(&set, order.index(at), &transform, at))?;
    for made in loader.by_ref().take(ahead) {
        made?;
    }

    let (mut pictures, mut sum) = (0, Made::default());
    let start = Instant::now();
    for made in loader.take(samples as usize) {
        let (_, made) = made?;
        pictures += u64::from(made.picture.is_some());
        sum.bytes += made.bytes;
        sum.read += made.read;
        sum.decode += made.decode;
        sum.transform += made.transform;
        progress();
    }
    let seconds = start.elapsed().as_secs_f64();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3 / samples.max(1) as f64;
    Ok(BenchReport {
        samples: pictures,
        broken: samples - pictures,
        workers,
        seconds,
        samples_per_s: pictures as f64 / seconds,
        mb_per_s: sum.bytes as f64 / MEGABYTE / seconds,
        stages: Stages {
            read: milliseconds(sum.read),
            decode: milliseconds(sum.decode),
            transform: milliseconds(sum.transform),
        },
    })
}

impl Made {
    fn new(set: &ShardSet, index: usize, transform: &Transform, ordinal: u64) -> Self {
        let mut made = Self::default();
        let Ok(sample) = timed(&mut made.read, || set.sample(index)) else { return made };
        made.bytes = sample.members().map(|(_, bytes)| bytes.len() as u64).sum();
        let decoded = timed(&mut made.decode, || sample_image_for(&sample, transform.short_side()));
        made.picture = decoded.ok().and_then(|picture| {
            let mut rng = sample_rng(SEED, ordinal);
            timed(&mut made.transform, || transform.apply_to(picture, &mut rng)).ok()
        });
        made
    }
}

fn timed<T>(time: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    *time = start.elapsed();
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::ShardWriter;

    #[test]
    fn pictures_and_broken_samples_are_counted_apart() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), "s", u64::MAX).unwrap();
        let png = Rgb8::filled(8, 6, [1, 2, 3]).encode_png().unwrap();
        for (key, bytes) in [("a", png.as_slice()), ("b", &png), ("c", b"broken")] {
            writer.write(key, &[("png", bytes)]).unwrap();
        }
        let shard = writer.finish().unwrap().remove(0).display().to_string();
        let transform: Transform = "resize:4 | random_crop:4".parse().unwrap();
        let set = || ShardSet::open(std::slice::from_ref(&shard)).unwrap();
        for workers in [1, 3] {
            let mut calls = 0;
            let report = bench(set(), transform.clone(), workers, 300, || calls += 1).unwrap();
            assert_eq!((report.workers, report.samples + report.broken, calls), (workers, 300, 300));
            // A third, give or take the epochs that are begun before the clock starts and not ended when it stops.
            assert!((98..=102).contains(&report.broken), "{report:?}");
            assert!(report.samples_per_s > 0.0 && report.mb_per_s > 0.0);
            let Stages { read, decode, transform } = report.stages;
            assert!(read > 0.0 && decode > 0.0 && transform > 0.0, "{report:?}");
        }
    }
}
