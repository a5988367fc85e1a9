//! Any bytes as a shard and any bytes as its index: what can be opened can be read.
#![no_main]

use std::fs;

use libfuzzer_sys::fuzz_target;
use m6_data::ShardSet;

fuzz_target!(|input: (&[u8], &[u8])| {
    let (shard, index) = input;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("shard.tar");
    fs::write(&path, shard).expect("a temporary file");
    // After the shard, so that it is not taken for outdated.
    if !index.is_empty() {
        fs::write(path.with_extension("idx"), index).expect("a temporary file");
    }
    let Ok(set) = ShardSet::open(&[path.display().to_string()]) else { return };
    for number in 0..set.len() {
        let sample = set.sample(number).expect("a sample that the set has");
        assert!(!sample.key.is_empty() && sample.members().count() > 0);
    }
});
