//! What several tests need.

use std::path::{Path, PathBuf};

use crate::writer::ShardWriter;

/// Extensions and bytes of a sample.
pub type Members<'a> = &'a [(&'a str, &'a [u8])];

/// A shard of these keys and members.
pub fn shard(dir: &Path, samples: &[(&str, Members)]) -> PathBuf {
    let mut writer = ShardWriter::create(dir, "test", u64::MAX).unwrap();
    for (key, members) in samples {
        writer.write(key, members).unwrap();
    }
    writer.finish().unwrap().remove(0)
}
