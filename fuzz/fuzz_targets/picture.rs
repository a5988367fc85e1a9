//! Any bytes as a picture: an error or a picture of as many pixels as it says, and, scaled from whatever was decoded of it, one
//! of the size that was asked for.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use m6_data::{Rgb8, ShardSet, ShardWriter, Transform, sample_rng};

static TRANSFORM: LazyLock<Transform> =
    LazyLock::new(|| "resize:24 | random_crop:16 | flip:0.5".parse().expect("a transform"));

fuzz_target!(|bytes: &[u8]| {
    let Ok(picture) = Rgb8::decode(bytes) else { return };
    assert_eq!(picture.pixels.len() as u64, 3 * u64::from(picture.width) * u64::from(picture.height));
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut writer = ShardWriter::create(dir.path(), "picture", u64::MAX).expect("a shard");
    writer.write("a", &[("png", bytes)]).expect("a sample");
    let shards = writer.finish().expect("a shard");
    let set = ShardSet::open(&[shards[0].display().to_string()]).expect("the shard that was written");
    let sample = set.sample(0).expect("its sample");
    if let Ok(scaled) = TRANSFORM.load(&sample, &mut sample_rng(0, 0)) {
        assert_eq!((scaled.width, scaled.height, scaled.pixels.len()), (16, 16, 768));
    }
});
