//! Sets of webdataset shards: tar files whose members share a key per sample.

mod open;
mod sample;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};
use crate::flaw::{Flaw, FlawClass};
use crate::key::member_path;
use crate::scan::Stamp;
use crate::skipped::SkipLimits;
pub use open::shard_names;
use sample::MemberEntry;
pub(crate) use sample::sample_image_for;
pub use sample::{PICTURE_EXTENSIONS, Sample, sample_image};

/// An indexed set of shards. The index lives in memory, the samples' bytes stay on disk.
#[derive(Debug, Default)]
pub struct ShardSet {
    shards: Vec<Shard>,
    samples: Vec<SampleEntry>,
    flaws: Vec<Flaw>,
    bytes: u64,
}

#[derive(Debug)]
struct Shard {
    /// As the user named it, for messages.
    name: PathBuf,
    /// Where its bytes are: itself, or its file in the cache.
    file: PathBuf,
    stamp: Stamp,
}

#[derive(Debug)]
struct SampleEntry {
    shard: usize,
    key: String,
    members: Vec<MemberEntry>,
}

impl ShardSet {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is no sample at all.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The shards as they were named, in order.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.name.as_path())
    }

    /// The files with their bytes, in the same order.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.file.as_path())
    }

    /// Size of all shard files in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A fingerprint of what the set holds and in which order: keys, member names, offsets and sizes.
    pub fn identity(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for sample in &self.samples {
            hasher.update(sample.key.as_bytes());
            for member in &sample.members {
                hasher.update(b"\0");
                hasher.update(member.extension.as_bytes());
                hasher.update(&member.offset.to_le_bytes());
                hasher.update(&member.size.to_le_bytes());
            }
            hasher.update(b"\n");
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Damage found while indexing.
    pub fn flaws(&self) -> &[Flaw] {
        &self.flaws
    }

    /// Extensions of the members of sample `index`, without reading them.
    pub fn extensions(&self, index: usize) -> impl Iterator<Item = &str> {
        self.samples[index].members.iter().map(|member| member.extension.as_str())
    }

    /// A flaw of sample `index`.
    pub fn flaw(&self, index: usize, class: FlawClass, reason: String) -> Flaw {
        let entry = &self.samples[index];
        let offset = entry.members.iter().map(|member| member.offset).min();
        Flaw {
            class,
            shard: self.shards[entry.shard].name.clone(),
            offset,
            key: Some(entry.key.clone()),
            reason,
        }
    }

    /// Why sample `index` cannot be written to another shard: a name that leaves the folder of unpacked shards or would not
    /// be read back as it is.
    pub fn unsafe_name(&self, index: usize) -> Option<Flaw> {
        let reason =
            self.extensions(index).find_map(|extension| member_path(self.key(index), extension).err())?;
        Some(self.flaw(index, FlawClass::UnsafeName, reason))
    }

    /// Whether sample `index` has a member with this (lower-case) extension, without reading it.
    pub fn has(&self, index: usize, extension: &str) -> bool {
        self.extensions(index).any(|has| has == extension)
    }

    /// Whether sample `index` has a picture, without reading it.
    pub fn has_picture(&self, index: usize) -> bool {
        self.extensions(index).any(|has| PICTURE_EXTENSIONS.contains(&has))
    }

    /// The samples that have a picture, without reading them.
    pub fn with_picture(&self) -> Vec<usize> {
        (0..self.len()).filter(|&index| self.has_picture(index)).collect()
    }

    /// The samples that `serves` picks, and a flaw for each of the others, which lack `what`. Nothing is read.
    ///
    /// # Errors
    /// None is picked, or the others are more than the limits' share.
    pub fn serving(
        &self,
        serves: impl Fn(usize) -> bool,
        what: &str,
        limits: &SkipLimits,
    ) -> Result<(Vec<usize>, Vec<Flaw>)> {
        let (served, others): (Vec<usize>, Vec<usize>) = (0..self.len()).partition(|&index| serves(index));
        let flaw = |index| self.flaw(index, FlawClass::MissingMember, format!("lacks {what}"));
        let flaws: Vec<Flaw> = others.into_iter().map(flaw).collect();
        match flaws.last() {
            Some(last) if served.is_empty() || limits.passes_share(flaws.len() as u64, self.len() as u64) => {
                Err(limits.too_many(flaws.len() as u64, self.len() as u64, last))
            }
            _ => Ok((served, flaws)),
        }
    }

    /// Key of sample `index`.
    pub(crate) fn key(&self, index: usize) -> &str {
        &self.samples[index].key
    }

    /// The shard that holds sample `index`.
    pub(crate) fn shard(&self, index: usize) -> &Path {
        &self.shards[self.samples[index].shard].name
    }

    /// Reads sample `index` (below [`ShardSet::len`], in the order of the shards) into memory.
    ///
    /// # Errors
    /// Names the sample when its shard cannot be read any more, or the shard when its size or time is not what it was when
    /// it was opened.
    ///
    /// # Panics
    /// `index` is not below [`ShardSet::len`].
    pub fn sample(&self, index: usize) -> Result<Sample<'_>> {
        let entry = &self.samples[index];
        let shard = &self.shards[entry.shard];
        let start = entry.members.iter().map(|m| m.offset).min().unwrap_or(0);
        let end = entry.members.iter().map(|m| m.offset + m.size).max().unwrap_or(0);
        // A sample's members are neighbours in the archive, so one read fetches them all. Files are opened per sample:
        // a set may have more shards than a process may hold files, and unlike a memory map a failing read is an error
        // and not a signal.
        let mut bytes = vec![0; (end - start) as usize];
        let unusable =
            |e| DataError::Sample(self.flaw(index, FlawClass::UnusableShard, format!("cannot be read: {e}")));
        let file = File::open(&shard.file).map_err(unusable)?;
        let read = file.read_exact_at(&mut bytes, start);
        // Asked afterwards, so that a change while it is read is seen as well.
        if !shard.stamp.fits(&file).map_err(unusable)? {
            return Err(DataError::Changed { shard: shard.name.clone() });
        }
        read.map_err(unusable)?;
        Ok(Sample { key: &entry.key, shard: &shard.name, members: &entry.members, start, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Cache;
    use crate::skipped::SkipLimits;
    use crate::testing::{cat, shard};

    fn open(path: &Path) -> Result<ShardSet> {
        ShardSet::open(&[path.display().to_string()])
    }

    #[test]
    fn a_shard_that_changes_or_vanishes_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = shard(dir.path(), &[("a", &[("txt", b"old")]), ("b", &[("txt", b"x")])]);
        let (set, whole) = (open(&path).unwrap(), std::fs::read(&path).unwrap());
        let error = || set.sample(0).unwrap_err().to_string();
        let changed = format!("{} has changed since it was opened; open it again", path.display());
        for length in [0, 513, whole.len() - 512] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(error(), changed);
        }
        std::fs::write(&path, &whole).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(10);
        File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert_eq!(error(), changed, "the same size at another time");
        assert_eq!(open(&path).unwrap().sample(0).unwrap().member("txt"), Some(b"old".as_slice()));
        std::fs::remove_file(&path).unwrap();
        let start = format!("{}, byte 512, sample a: cannot be read: No such file", path.display());
        assert!(error().starts_with(&start), "{}", error());
    }

    #[test]
    fn a_shard_in_the_cache_is_told_by_its_size_alone() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache"), 1 << 20).unwrap();
        let path = shard(dir.path(), &[("a", &[("txt", b"text")])]);
        let set = ShardSet::open_in(|| Ok(&cache), &[cat(&path)], SkipLimits::default(), &mut |_, _, _| ())
            .unwrap();
        let file = File::options().write(true).open(&set.shards[0].file).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(set.sample(0).unwrap().member("txt"), Some(b"text".as_slice()), "another process used it");
        file.set_len(600).unwrap();
        let error = set.sample(0).unwrap_err().to_string();
        assert_eq!(error, format!("{} has changed since it was opened; open it again", cat(&path)));
    }
}
