//! Pictures a second from the embedded shards through decode and crop, by number of workers.
//!
//! `cargo bench -p m6-data`

use std::path::Path;
use std::time::Instant;

use m6_data::{Loader, ShardSet, Transform, sample_image, sample_rng};

/// Pictures of one measurement, after as many to warm up.
const PICTURES: usize = 1000;
const REPEATS: usize = 5;
const AHEAD: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shards = Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/emoji/train-*.tar");
    let pattern = [shards.to_string_lossy().into_owned()];
    let cores = std::thread::available_parallelism()?.get();
    for workers in [1, cores] {
        let shards = ShardSet::open(&pattern)?;
        let transform: Transform = "resize:136 | random_crop:128".parse()?;
        let mut loader = Loader::start(0, workers, AHEAD * workers, move |ordinal| {
            let sample = shards.sample(ordinal as usize % shards.len())?;
            transform.apply(&sample_image(&sample)?, &mut sample_rng(1, ordinal))
        })?;
        let mut rates = Vec::new();
        for round in 0..=REPEATS {
            let start = Instant::now();
            for made in loader.by_ref().take(PICTURES) {
                made?.1?;
            }
            if round > 0 {
                rates.push(PICTURES as f64 / start.elapsed().as_secs_f64());
            }
        }
        rates.sort_by(f64::total_cmp);
        let (low, median, high) = (rates[0], rates[REPEATS / 2], rates[REPEATS - 1]);
        println!("{workers} worker(s): {median:.0} pictures/s (from {low:.0} to {high:.0})");
    }
    Ok(())
}
