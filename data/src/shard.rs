//! Sets of webdataset shards: tar files whose members share a key per sample.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::cache::Cache;
use crate::error::{DataError, Result};
use crate::flaw::{Flaw, FlawClass};
use crate::key::{member_path, split_key};
use crate::pattern::resolve;
use crate::picture::{Decoded, Rgb8};
use crate::scan::{Care, Progress, Scanned, Stamp, scan_all};
use crate::skipped::SkipLimits;
use crate::tar_index::Defect;

/// Extensions that hold a sample's picture, in the order in which they are looked for.
pub const PICTURE_EXTENSIONS: [&str; 5] = ["webp", "png", "jpg", "jpeg", "bmp"];

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

#[derive(Debug)]
struct MemberEntry {
    extension: String,
    offset: u64,
    size: u64,
}

impl ShardSet {
    /// Opens and indexes the shards named by `patterns`, in the order given. Each is a file, a glob (`data/*.tar`), a url
    /// (`http`, `https`, `s3`, `gs`; with the feature `remote`), a shell command that writes a shard (`pipe:COMMAND`), or a
    /// brace list of these (`data/train-{000000..000017}.tar`). A shard is an archive, or by its name (`.txt`, `.jsonl`) a
    /// text whose lines are its samples; lines of a `jsonl` in an archive are samples too.
    ///
    /// What is no file, and what is compressed (gzip, bzip2 or xz, whatever its name), is first fetched whole into the
    /// folder that the environment variable `M6_CACHE` names, or taken from there; see the crate's `cache` module.
    ///
    /// # Errors
    /// No pattern, a pattern without a match, no cache where one is needed, no shard with a sample, or shards that cannot be
    /// used beyond the default [`SkipLimits`]. Those below the limits, and damage inside of shards, are in
    /// [`ShardSet::flaws`].
    pub fn open(patterns: &[String]) -> Result<Self> {
        Self::open_with(patterns, SkipLimits::default(), |_, _, _| ())
    }

    /// As [`ShardSet::open`], with limits for shards that cannot be used: so many in a row, and a share of them. Where
    /// shards have to be fetched, `progress` is called with (done, all, bytes) as they come: the shards that are there, all
    /// that have to be fetched, and the bytes that came so far.
    ///
    /// # Errors
    /// Those of [`ShardSet::open`].
    pub fn open_with(
        patterns: &[String],
        limits: SkipLimits,
        mut progress: impl FnMut(usize, usize, u64) + Send,
    ) -> Result<Self> {
        Self::open_in(Cache::of_process, patterns, limits, &mut progress)
    }

    /// As [`ShardSet::open_with`], with a cache that is asked for if one is needed.
    fn open_in<'a>(
        cache: impl Fn() -> Result<&'a Cache> + Sync,
        patterns: &[String],
        limits: SkipLimits,
        progress: Progress,
    ) -> Result<Self> {
        let mut set = Self::default();
        let (sources, care) = (resolve(patterns)?, Care::Usual { give_up_after: limits.in_a_row });
        let scanned = scan_all(&sources, &cache, care, progress)?;
        let (all, tried) = (sources.len(), scanned.len());
        let mut unusable = Vec::new();
        for (name, scanned) in scanned {
            match scanned.and_then(|scanned| set.add(name.clone(), scanned)) {
                Ok(()) => {}
                // That of no shard: the next would fail alike.
                Err(error @ DataError::Cache(_)) => return Err(error),
                Err(error) => unusable.push((name, error)),
            }
        }
        if set.is_empty() && !unusable.is_empty() {
            return Err(unusable.swap_remove(0).1);
        }
        let too_many = match tried < all {
            true => Some(format!("{} shards in a row", limits.in_a_row)),
            false => (unusable.len() as f64 > limits.share * all as f64).then(|| {
                format!("{} of {all} shards, more than a share of {},", unusable.len(), limits.share)
            }),
        };
        if let (Some(skipped), Some((_, last))) = (too_many, unusable.last()) {
            return Err(DataError::TooManySkipped { skipped, last: last.to_string() });
        }
        set.flaws.extend(unusable.into_iter().map(|(name, error)| Flaw::of_unusable(name, &error)));
        Ok(set)
    }

    /// As [`ShardSet::open_with`], but without limits, so that the set may be empty, and every header is read, whatever an
    /// index says.
    ///
    /// # Errors
    /// No pattern, a pattern without a match, or no cache where one is needed.
    pub(crate) fn open_what_can_be_read(patterns: &[String], progress: Progress) -> Result<Self> {
        Self::open_what_can_be_read_in(Cache::of_process, patterns, progress)
    }

    fn open_what_can_be_read_in<'a>(
        cache: impl Fn() -> Result<&'a Cache> + Sync,
        patterns: &[String],
        progress: Progress,
    ) -> Result<Self> {
        let mut set = Self::default();
        for (name, scanned) in scan_all(&resolve(patterns)?, &cache, Care::Thorough, progress)? {
            if let Err(error) = scanned.and_then(|scanned| set.add(name.clone(), scanned)) {
                set.flaws.push(Flaw::of_unusable(name, &error));
            }
        }
        Ok(set)
    }

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

    /// Adds a shard by what was found in it.
    fn add(&mut self, name: PathBuf, scanned: Scanned) -> Result<()> {
        let Scanned { file, stamp, index, unused_index } = scanned;
        let damage = |defect: &Defect| {
            let (offset, reason) = (Some(defect.offset), defect.reason.clone());
            Flaw::of_shard(FlawClass::DamagedShard, name.clone(), offset, reason)
        };
        let mut flaws: Vec<Flaw> = index.defects.iter().map(damage).collect();
        flaws.extend(unused_index.map(|reason| {
            let reason = format!("its .idx is not used: {reason}");
            Flaw::of_shard(FlawClass::UnusedIndex, name.clone(), None, reason)
        }));

        let shard = self.shards.len();
        let first = self.samples.len();
        for member in index.members {
            let Some((key, extension)) = split_key(&member.path) else { continue };
            let entry = MemberEntry { extension, offset: member.offset, size: member.size };
            match self.samples[first..].last_mut().filter(|sample| sample.key == key) {
                Some(sample) if sample.members.iter().any(|m| m.extension == entry.extension) => {
                    flaws.push(Flaw {
                        class: FlawClass::DuplicateMember,
                        shard: name.clone(),
                        offset: Some(entry.offset),
                        key: Some(key.to_owned()),
                        reason: format!("two members .{}, the first is used", entry.extension),
                    });
                }
                Some(sample) => sample.members.push(entry),
                None => self.samples.push(SampleEntry { shard, key: key.to_owned(), members: vec![entry] }),
            }
        }
        if index.defects.last().is_some_and(|d| d.fatal) {
            flaws.extend(self.drop_half_sample(first, &name));
        }
        if self.samples.len() == first {
            let reason = match index.defects.last() {
                Some(defect) => format!("{} holds no whole sample ({defect})", name.display()),
                None => format!(
                    "{} holds no sample (expected members such as KEY.webp and KEY.json, or lines of text)",
                    name.display()
                ),
            };
            return Err(DataError::Pattern { pattern: name.display().to_string(), reason });
        }
        self.bytes += stamp.bytes;
        self.flaws.append(&mut flaws);
        self.shards.push(Shard { name, file, stamp });
        Ok(())
    }

    /// A cut shard may have lost members of its last sample: leave that one out if it has fewer than its neighbour.
    fn drop_half_sample(&mut self, first: usize, path: &Path) -> Option<Flaw> {
        let [.., whole, last] = &self.samples[first..] else { return None };
        if last.members.len() >= whole.members.len() {
            return None;
        }
        let last = self.samples.pop()?;
        Some(Flaw {
            class: FlawClass::DamagedShard,
            shard: path.to_owned(),
            offset: last.members.first().map(|member| member.offset),
            key: Some(last.key),
            reason: "its last sample is not whole and is left out".to_owned(),
        })
    }
}

/// The shards that `patterns` name, in their order; each may be opened alone by its name.
///
/// # Errors
/// No pattern, or one that is malformed or names nothing.
pub fn shard_names(patterns: &[String]) -> Result<Vec<String>> {
    let sources = resolve(patterns)?;
    Ok(sources.iter().map(|source| source.name().to_string_lossy().into_owned()).collect())
}

/// One sample in memory: the members of a shard that share a key.
#[derive(Debug)]
pub struct Sample<'a> {
    /// Key of the sample: folder and file name up to its first dot.
    pub key: &'a str,
    /// The shard it comes from.
    pub shard: &'a Path,
    members: &'a [MemberEntry],
    start: u64,
    bytes: Vec<u8>,
}

impl Sample<'_> {
    /// Bytes of the member with this (lower-case) extension.
    pub fn member(&self, extension: &str) -> Option<&[u8]> {
        self.members.iter().find(|m| m.extension == extension).map(|m| self.slice(m))
    }

    /// Extension and bytes of every member, in the order of the shard.
    pub fn members(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.members.iter().map(|m| (m.extension.as_str(), self.slice(m)))
    }

    /// Bytes of the picture: the first member among [`PICTURE_EXTENSIONS`]. A sample may have none.
    pub fn picture(&self) -> Option<&[u8]> {
        PICTURE_EXTENSIONS.iter().find_map(|extension| self.member(extension))
    }

    /// An error that names this sample, its shard and where it begins there.
    pub fn error(&self, class: FlawClass, reason: impl Into<String>) -> DataError {
        DataError::Sample(Flaw {
            class,
            shard: self.shard.to_owned(),
            offset: Some(self.start),
            key: Some(self.key.to_owned()),
            reason: reason.into(),
        })
    }

    fn slice(&self, member: &MemberEntry) -> &[u8] {
        let start = (member.offset - self.start) as usize;
        &self.bytes[start..start + member.size as usize]
    }
}

/// Decodes the [picture](Sample::picture) of a sample.
///
/// # Errors
/// Names the sample when it has no picture or a broken one.
pub fn sample_image(sample: &Sample) -> Result<Rgb8> {
    sample_image_for(sample, None)?.into_rgb()
}

/// As [`sample_image`], by [`Decoded::for_side`].
pub(crate) fn sample_image_for(sample: &Sample, short_side: Option<u32>) -> Result<Decoded> {
    let picture = sample.picture().ok_or_else(|| {
        let reason = format!("no picture (expected one of {})", PICTURE_EXTENSIONS.join(", "));
        sample.error(FlawClass::MissingMember, reason)
    })?;
    Decoded::for_side(picture, short_side).map_err(|e| sample.error(FlawClass::BrokenPicture, e.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::{Members, archive, cat, shard};

    fn open(path: &Path) -> Result<ShardSet> {
        ShardSet::open(&[path.display().to_string()])
    }

    #[test]
    fn samples_are_grouped_by_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = shard(
            dir.path(),
            &[
                ("animals/cat", &[("webp", b"picture"), ("seg.PNG", b"mask"), ("txt", b"a cat")]),
                ("animals/dog", &[("txt", b"")]),
            ],
        );
        let set = open(&path).unwrap();
        assert_eq!((set.len(), set.flaws()), (2, [].as_slice()));
        let cat = set.sample(0).unwrap();
        assert_eq!((cat.key, cat.shard), ("animals/cat", path.as_path()));
        assert_eq!(cat.members().map(|(e, _)| e).collect::<Vec<_>>(), ["webp", "seg.png", "txt"]);
        assert_eq!(cat.member("txt"), Some(b"a cat".as_slice()));
        assert_eq!(cat.member("json"), None);
        assert_eq!(set.sample(1).unwrap().member("txt"), Some(b"".as_slice()));
        let error = sample_image(&set.sample(1).unwrap()).unwrap_err().to_string();
        assert!(error.contains(", sample animals/dog: ") && error.contains("no picture"), "{error}");
    }

    #[test]
    fn a_truncated_shard_keeps_its_whole_samples() {
        let dir = tempfile::tempdir().unwrap();
        let members: Members = &[("webp", &[1; 1000]), ("json", b"{}")];
        let path = shard(dir.path(), &[("a", members), ("b", members), ("c", members)]);
        let bytes = std::fs::read(&path).unwrap();
        let sample = 512 + 1024 + 512 + 512;
        std::fs::write(&path, &bytes[..2 * sample + 512 + 1024 + 300]).unwrap();
        let set = open(&path).unwrap();
        assert_eq!(set.len(), 2);
        let flaws: Vec<_> = set.flaws().iter().map(ToString::to_string).collect();
        let shown = path.display();
        let expected = [
            format!("{shown}, byte 6656: truncated inside a header"),
            format!("{shown}, byte 5632, sample c: its last sample is not whole and is left out"),
        ];
        assert_eq!(flaws, expected);

        std::fs::write(&path, &bytes[..300]).unwrap();
        assert!(open(&path).unwrap_err().to_string().contains("holds no whole sample"));
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

    #[test]
    fn shards_that_cannot_be_used_are_flaws_up_to_a_share() {
        let dir = tempfile::tempdir().unwrap();
        let good = shard(&dir.path().join("good"), &[("a", &[("txt", b"x")]), ("b", &[("png", b"x")])]);
        let names = ["0", "1", "2"].map(|name| dir.path().join(name));
        names.iter().for_each(|name| fs::write(name, [7; 2000]).unwrap());
        let open = |files: &[&PathBuf], share| {
            let patterns: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
            ShardSet::open_with(&patterns, SkipLimits { in_a_row: 100, share }, |_, _, _| ())
        };
        let [a, b, c] = &names;
        let set = open(&[a, &good, b], 0.7).unwrap();
        let found: Vec<_> = set.flaws().iter().map(|flaw| (flaw.class, &flaw.shard)).collect();
        assert_eq!(found, [(FlawClass::UnusableShard, a), (FlawClass::UnusableShard, b)]);
        assert_eq!(set.len(), 2);
        let error = open(&[a, &good, b], 0.6).unwrap_err().to_string();
        assert!(error.starts_with("2 of 3 shards, more than a share of 0.6, cannot be used; "), "{error}");
        let error = open(&[a, b, c], 1.0).unwrap_err().to_string();
        assert!(error.starts_with(&format!("shards \"{}\"", a.display())), "{error}");

        let limits = SkipLimits::default();
        let (served, flaws) = set.serving(|index| set.has(index, "txt"), "a text", &limits).unwrap();
        assert_eq!((served, flaws.len()), (vec![0], 1));
        assert_eq!((flaws[0].class, flaws[0].reason.as_str()), (FlawClass::MissingMember, "lacks a text"));
        let error = set.serving(|_| false, "a video", &limits).unwrap_err().to_string();
        assert!(error.starts_with("all 2 samples cannot be used; the last: "), "{error}");
    }

    #[test]
    fn a_shard_without_samples_is_an_error_and_one_sample_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tar");
        archive(&path, &[("README", b"no dot"), (".hidden", b""), ("__index.json__", b"{}")]);
        let of_others = std::fs::read(&path).unwrap();
        for (bytes, reason) in [
            (&[][..], "holds no whole sample (at byte 0: no end-of-archive mark"),
            (&[0; 1024], "holds no sample (expected members such as KEY.webp"),
            (&of_others, "holds no sample (expected members such as KEY.webp"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = open(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("{} {reason}", path.display())), "{error}");
        }
        let one = open(&shard(dir.path(), &[("a", &[("txt", b"x")])])).unwrap();
        let order = crate::SampleOrder::new(one.len(), 1).unwrap();
        assert!((0..9).all(|ordinal| order.index(ordinal) == 0), "every stream and epoch has the one sample");
    }

    #[test]
    fn samples_of_one_key_stay_apart_unless_they_are_neighbours() {
        let dir = tempfile::tempdir().unwrap();
        let one = shard(&dir.path().join("1"), &[("a", &[("txt", b"1")]), ("a", &[("cls", b"2")])]);
        let samples =
            [("a", &[("txt", b"3".as_slice())] as Members), ("b", &[("txt", b"4")]), ("a", &[("txt", b"5")])];
        let two = shard(&dir.path().join("2"), &samples);
        let set = ShardSet::open(&[&one, &two].map(|path| path.display().to_string())).unwrap();
        let texts: Vec<_> =
            contents(&set).into_iter().map(|(key, mut members)| (key, members.remove(0))).collect();
        let expected =
            [("a", "1"), ("a", "3"), ("b", "4"), ("a", "5")].map(|(key, text)| (key.to_owned(), text.into()));
        assert_eq!(texts, expected, "the two neighbours in the first shard are one sample");
        assert_eq!(set.sample(0).unwrap().members().count(), 2);
    }

    fn contents(set: &ShardSet) -> Vec<(String, Vec<Vec<u8>>)> {
        let samples = (0..set.len()).map(|index| set.sample(index).unwrap());
        samples.map(|s| (s.key.to_owned(), s.members().map(|(_, bytes)| bytes.to_vec()).collect())).collect()
    }

    #[test]
    fn a_compressed_shard_is_the_one_in_it_and_a_new_file_a_new_shard() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache"), 1 << 20).unwrap();
        let compressed = dir.path().join("test.tar.gz");
        let open = || {
            let pattern = dir.path().join("*.tar.gz").display().to_string();
            ShardSet::open_in(|| Ok(&cache), &[pattern], SkipLimits::default(), &mut |_, _, _| ())
        };
        let members: Members = &[("txt", b"text")];
        for samples in [&["a", "b"][..], &["a", "b", "c"]] {
            let samples: Vec<(&str, Members)> = samples.iter().map(|key| (*key, members)).collect();
            let path = shard(dir.path(), &samples);
            for (format, bytes) in crate::compressed::testing::compressed(&fs::read(&path).unwrap()) {
                fs::write(&compressed, bytes).unwrap();
                let piped = ShardSet::open_in(
                    || Ok(&cache),
                    &[cat(&compressed)],
                    SkipLimits::default(),
                    &mut |_, _, _| (),
                );
                let local = self::open(&path).unwrap();
                for inflated in [open().unwrap(), piped.unwrap()] {
                    assert_eq!(contents(&inflated), contents(&local), "{format}");
                    assert_eq!(inflated.identity(), local.identity());
                }
                assert_eq!(open().unwrap().shards().collect::<Vec<_>>(), [&compressed]);
                fs::remove_dir_all(dir.path().join("cache")).unwrap();
                fs::create_dir(dir.path().join("cache")).unwrap();
            }
        }

        // The archive's end and the mark of the compression's are lost.
        let path = shard(dir.path(), &[("a", &[("bin", &[7; 5000])]), ("b", members)]);
        let archive = fs::read(&path).unwrap();
        let [(_, gzip), ..] = crate::compressed::testing::compressed(&archive[..archive.len() - 1024]);
        fs::write(&compressed, &gzip[..gzip.len() - 8]).unwrap();
        let cut = open().unwrap();
        assert_eq!((cut.len(), cut.flaws().len()), (2, 1), "{:?}", cut.flaws());
        fs::write(&compressed, [&gzip[..10], &[0xff; 100]].concat()).unwrap();
        let error = open().unwrap_err().to_string();
        assert!(error.contains("test.tar.gz") && error.contains("gzip: "), "{error}");
    }

    #[test]
    fn a_command_is_a_shard_under_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache"), 1 << 20).unwrap();
        let open = |pattern: &str| {
            ShardSet::open_in(|| Ok(&cache), &[pattern.to_owned()], SkipLimits::default(), &mut |_, _, _| ())
        };
        let members: Members = &[("txt", b"text"), ("png", b"broken")];
        let path = shard(dir.path(), &[("a", members), ("b", members)]);
        let (local, piped) = (self::open(&path).unwrap(), open(&cat(&path)).unwrap());
        assert_eq!((contents(&piped), piped.identity()), (contents(&local), local.identity()));
        assert_eq!(piped.shards().collect::<Vec<_>>(), [Path::new(&cat(&path))]);
        let error = sample_image(&piped.sample(1).unwrap()).unwrap_err().to_string();
        assert!(error.starts_with(&cat(&path)) && error.contains(", sample b: "), "{error}");

        let cut = format!("pipe:head -c 3000 '{}'", path.display());
        let cut_flaw = format!("{cut}, byte 3000: no end-of-archive mark, so the archive may have been cut");
        let set = open(&cut).unwrap();
        assert_eq!((set.len(), set.flaws()[0].to_string()), (1, cut_flaw));
        let error = |pattern: &str| open(pattern).unwrap_err().to_string();
        let none = "pipe:head -c 100 /dev/zero";
        assert!(error(none).starts_with(&format!("shards \"{none}\": {none} holds no ")), "{}", error(none));
        assert!(error("pipe:exit {3,4}").starts_with("cannot fetch pipe:exit 3: the command ended with "));

        let patterns = ["pipe:exit {3,4}".to_owned(), cat(&path)];
        let set = ShardSet::open_what_can_be_read_in(|| Ok(&cache), &patterns, &mut |_, _, _| ()).unwrap();
        let unusable: Vec<_> =
            set.flaws().iter().map(|flaw| (flaw.class, flaw.shard.to_str().unwrap())).collect();
        assert_eq!(unusable, ["pipe:exit 3", "pipe:exit 4"].map(|name| (FlawClass::UnusableShard, name)));
        assert_eq!((set.len(), set.shards().len()), (2, 1));
    }

    #[test]
    fn what_has_to_be_fetched_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache"), 1 << 20).unwrap();
        let names = ["a", "b", "c"];
        let files = names.map(|name| shard(&dir.path().join(name), &[(name, &[("bin", &[7; 100_000])])]));
        let bytes = std::fs::metadata(&files[0]).unwrap().len();
        let told = |files: &[&PathBuf]| {
            let patterns: Vec<_> = files.iter().map(|file| cat(file)).collect();
            let mut told = Vec::new();
            ShardSet::open_in(|| Ok(&cache), &patterns, SkipLimits::default(), &mut |done, all, bytes| {
                told.push((done, all, bytes))
            })
            .unwrap();
            told
        };
        let [a, b, c] = &files;
        let first = told(&[a]);
        assert_eq!((first[0], first[first.len() - 1]), ((0, 1, 0), (1, 1, bytes)));
        assert!(first.len() > 3 && first.is_sorted(), "{first:?}");
        let rest = told(&[a, b, c]);
        assert_eq!((rest[0], rest[rest.len() - 1]), ((0, 2, 0), (2, 2, 2 * bytes)));
        assert!(rest.is_sorted(), "{rest:?}");
        assert_eq!(told(&[a, b, c]), []);
        assert_eq!(
            ShardSet::open_with(&[a.display().to_string()], SkipLimits::default(), |_, _, _| panic!())
                .unwrap()
                .len(),
            1
        );
    }

    #[test]
    #[cfg(feature = "remote")]
    fn a_set_of_urls_is_the_set_of_its_files() {
        use crate::testing::{Answer, Server};

        let dir = tempfile::tempdir().unwrap();
        let names: [String; 20] = std::array::from_fn(|n| format!("/train-{n:03}.tar"));
        let answers = names.each_ref().map(|name| {
            let folder = dir.path().join("one");
            let path = shard(&folder, &[(&name[1..10], &[("txt", name.as_bytes())]), ("b", &[("txt", b"")])]);
            std::fs::rename(path, dir.path().join(&name[1..])).unwrap();
            (name.as_str(), Answer::Whole(std::fs::read(dir.path().join(&name[1..])).unwrap()))
        });
        let server = Server::start(&answers);
        let pattern = "/train-{000..019}.tar";
        let local = ShardSet::open(&[format!("{}{pattern}", dir.path().display())]).unwrap();
        for requests in [names.len(), 0] {
            let before = server.requests().len();
            let cache = Cache::open(&dir.path().join("cache"), 1 << 20).unwrap();
            let set = ShardSet::open_in(
                || Ok(&cache),
                &[server.url(pattern)],
                SkipLimits::default(),
                &mut |_, _, _| (),
            )
            .unwrap();
            assert_eq!((contents(&set), set.identity()), (contents(&local), local.identity()));
            assert_eq!(set.shards().next(), Some(Path::new(&server.url(&names[0]))));
            assert_eq!(server.requests().len() - before, requests);
        }

        let cache = Cache::open(&dir.path().join("cache"), 1 << 20).unwrap();
        let absent = server.url("/absent-{0000..9999}.tar");
        let error = ShardSet::open_in(|| Ok(&cache), &[absent], SkipLimits::default(), &mut |_, _, _| ())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(&format!("cannot fetch {}: ", server.url("/absent-0000.tar"))), "{error}");
        assert!(server.requests().len() < names.len() + 1000, "it ends with the first that is not there");
    }

    #[test]
    #[cfg(not(feature = "remote"))]
    fn urls_need_the_feature() {
        let error = ShardSet::open(&["s3://bucket/train-{000..017}.tar".to_owned()]).unwrap_err().to_string();
        let expected = "shards \"s3://bucket/train-{000..017}.tar\": this program was built without urls; build it \
                        with `--features remote`";
        assert_eq!(error, expected);
    }
}
