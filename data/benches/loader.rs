//! Pictures a second from the embedded shards through decode and crop, by number of workers.
//!
//! `cargo bench -p m6-data`

use std::path::Path;

use m6_data::{ShardSet, Transform, bench};

/// Pictures of one measurement.
const PICTURES: u64 = 1000;
const REPEATS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shards = Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/emoji/train-*.tar");
    let pattern = [shards.to_string_lossy().into_owned()];
    let transform: Transform = "resize:136 | random_crop:128".parse()?;
    for workers in [1, std::thread::available_parallelism()?.get()] {
        let mut rates = Vec::new();
        for _ in 0..REPEATS {
            let report = bench(ShardSet::open(&pattern)?, transform.clone(), workers, PICTURES, || ())?;
            rates.push(report.samples_per_s);
        }
        rates.sort_by(f64::total_cmp);
        let (low, median, high) = (rates[0], rates[REPEATS / 2], rates[REPEATS - 1]);
        println!("{workers} worker(s): {median:.0} pictures/s (from {low:.0} to {high:.0})");
    }
    Ok(())
}
