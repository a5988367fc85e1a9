//! Any bytes as a shard, compressed or not, and any bytes as its index: what can be opened can be read. The first two bytes
//! say how long the index is.
#![no_main]

use std::fs;

use libfuzzer_sys::fuzz_target;
use m6_data::ShardSet;

/// Bytes of a block of an archive.
const BLOCK: usize = 512;
/// Where a header says that it is one, and where its checksum is.
const MAGIC: std::ops::Range<usize> = 257..262;
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// Gives every header the checksum that it needs, or hardly any damage would be looked at beyond that.
fn mend(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(BLOCK).filter(|block| &block[MAGIC] == b"ustar") {
        block[CHECKSUM].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// Compressed shards go to a cache, which is not to be the user's; `make fuzz` names one.
fn expect_a_cache() {
    assert!(std::env::var_os("M6_CACHE").is_some(), "set M6_CACHE to a folder for this run");
}

fuzz_target!(init: expect_a_cache(), |bytes: &[u8]| {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let (index, shard) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    let mut shard = shard.to_vec();
    mend(&mut shard);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("shard.tar");
    fs::write(&path, &shard).expect("a temporary file");
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
