//! Sets of webdataset shards: tar files whose members share a key per sample.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};
use crate::picture::Rgb8;
use crate::tar_index::TarIndex;

/// Extensions that hold a sample's picture, in the order in which they are looked for.
pub const PICTURE_EXTENSIONS: [&str; 5] = ["webp", "png", "jpg", "jpeg", "bmp"];
/// A brace list may name at most this many shards.
const MAX_EXPANSION: usize = 1 << 20;

/// An indexed set of shards. The index lives in memory, the samples' bytes stay on disk.
#[derive(Debug)]
pub struct ShardSet {
    shards: Vec<PathBuf>,
    samples: Vec<SampleEntry>,
    warnings: Vec<String>,
    bytes: u64,
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
    /// Opens and indexes the shards named by `patterns`: each a file, a glob (`data/*.tar`) or a brace list
    /// (`data/train-{000000..000017}.tar`), in the order given.
    ///
    /// # Errors
    /// No pattern, a pattern without a match, a shard that cannot be read, or one that holds no sample. Damage that leaves some
    /// samples whole is reported by [`ShardSet::warnings`] instead.
    pub fn open(patterns: &[String]) -> Result<Self> {
        let mut set = Self { shards: Vec::new(), samples: Vec::new(), warnings: Vec::new(), bytes: 0 };
        if patterns.is_empty() {
            let reason = "no files given, expected at least one".to_owned();
            return Err(DataError::Pattern { pattern: String::new(), reason });
        }
        for pattern in patterns {
            for path in resolve(pattern)? {
                set.add(path)?;
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

    /// The shard files, in order.
    pub fn shards(&self) -> &[PathBuf] {
        &self.shards
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

    /// Damage found while indexing, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Reads sample `index` (below [`ShardSet::len`], in the order of the shards) into memory.
    ///
    /// # Errors
    /// The shard cannot be read any more.
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
        File::open(shard)
            .and_then(|file| file.read_exact_at(&mut bytes, start))
            .map_err(DataError::io("read", shard))?;
        Ok(Sample { key: &entry.key, shard, members: &entry.members, start, bytes })
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(DataError::io("open", &path))?;
        self.bytes += file.metadata().map_err(DataError::io("read", &path))?.len();
        let index = TarIndex::read(file).map_err(DataError::io("read", &path))?;
        self.warnings.extend(index.defects.iter().map(|d| format!("{} {d}", path.display())));

        let shard = self.shards.len();
        let first = self.samples.len();
        for member in index.members {
            let Some((key, extension)) = split_key(&member.path) else { continue };
            let entry = MemberEntry { extension, offset: member.offset, size: member.size };
            match self.samples[first..].last_mut().filter(|sample| sample.key == key) {
                Some(sample) if sample.members.iter().any(|m| m.extension == entry.extension) => {
                    self.warnings.push(format!(
                        "{}: sample {key} has two members .{}, the first is used",
                        path.display(),
                        entry.extension
                    ))
                }
                Some(sample) => sample.members.push(entry),
                None => self.samples.push(SampleEntry { shard, key: key.to_owned(), members: vec![entry] }),
            }
        }
        if index.defects.last().is_some_and(|d| d.fatal) {
            self.drop_half_sample(first, &path);
        }
        if self.samples.len() == first {
            let reason = match index.defects.last() {
                Some(defect) => format!("{} holds no whole sample ({defect})", path.display()),
                None => format!(
                    "{} holds no sample (expected members such as KEY.webp and KEY.json)",
                    path.display()
                ),
            };
            return Err(DataError::Pattern { pattern: path.display().to_string(), reason });
        }
        self.shards.push(path);
        Ok(())
    }

    /// A cut shard may have lost members of its last sample: leave that one out if it has fewer than its neighbour.
    fn drop_half_sample(&mut self, first: usize, path: &Path) {
        if let [.., whole, last] = &self.samples[first..]
            && last.members.len() < whole.members.len()
        {
            self.warnings.push(format!(
                "{}: its last sample {} is not whole and is left out",
                path.display(),
                last.key
            ));
            self.samples.pop();
        }
    }
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

    /// An error that names this sample and its shard.
    pub fn error(&self, reason: impl Into<String>) -> DataError {
        DataError::Sample { key: self.key.to_owned(), shard: self.shard.to_owned(), reason: reason.into() }
    }

    fn slice(&self, member: &MemberEntry) -> &[u8] {
        let start = (member.offset - self.start) as usize;
        &self.bytes[start..start + member.size as usize]
    }
}

/// Decodes the picture of a sample: its first member among [`PICTURE_EXTENSIONS`].
///
/// # Errors
/// Names the sample when it has no picture or a broken one.
pub fn sample_image(sample: &Sample) -> Result<Rgb8> {
    sample_image_for(sample, None)
}

/// As [`sample_image`], by [`Rgb8::decode_for`].
pub(crate) fn sample_image_for(sample: &Sample, short_side: Option<u32>) -> Result<Rgb8> {
    let bytes =
        PICTURE_EXTENSIONS.iter().find_map(|extension| sample.member(extension)).ok_or_else(|| {
            sample.error(format!("no picture (expected one of {})", PICTURE_EXTENSIONS.join(", ")))
        })?;
    Rgb8::decode_for(bytes, short_side).map_err(|e| sample.error(e.to_string()))
}

/// webdataset's rule: the key is the path up to the first dot of its file name, the rest is the extension. Hidden files,
/// files without a dot and `__meta__` files belong to no sample.
pub(crate) fn split_key(path: &str) -> Option<(&str, String)> {
    let name_at = path.rfind('/').map_or(0, |slash| slash + 1);
    let dot = name_at + path[name_at..].find('.')?;
    let name = &path[name_at..dot];
    let meta = name.starts_with("__") && name.ends_with("__");
    (!name.is_empty() && !meta).then(|| (&path[..dot], path[dot + 1..].to_lowercase()))
}

/// The files that a pattern names, sorted within each glob.
fn resolve(pattern: &str) -> Result<Vec<PathBuf>> {
    let fail = |reason: String| DataError::Pattern { pattern: pattern.to_owned(), reason };
    let mut alternatives = Vec::new();
    expand_braces(pattern, &mut alternatives).map_err(fail)?;

    let mut paths = Vec::new();
    let mut seen = HashSet::new();
    for alternative in alternatives {
        let matches: Vec<PathBuf> = if alternative.contains(['*', '?', '[']) {
            let found = glob::glob(&alternative).map_err(|e| fail(format!("not a valid glob: {e}")))?;
            found.collect::<std::result::Result<_, _>>().map_err(|e| fail(e.to_string()))?
        } else {
            Some(PathBuf::from(&alternative)).filter(|path| path.exists()).into_iter().collect()
        };
        if matches.is_empty() {
            let named = if alternative == pattern { String::new() } else { format!(" (for {alternative})") };
            return Err(fail(format!(
                "no such file{named}; expected a tar file, a glob or a list like {{000..017}}"
            )));
        }
        if let Some(folder) = matches.iter().find(|path| path.is_dir()) {
            return Err(fail(format!("{0} is a folder; for its shards write {0}/*.tar", folder.display())));
        }
        paths.extend(matches.into_iter().filter(|path| seen.insert(path.clone())));
    }
    Ok(paths)
}

/// Expands `{a,b}` and `{000..017}` (zero-padded like its bounds), also several in one pattern.
fn expand_braces(pattern: &str, out: &mut Vec<String>) -> std::result::Result<(), String> {
    let Some(open) = pattern.find('{') else {
        if out.len() == MAX_EXPANSION {
            return Err(format!("names more than {MAX_EXPANSION} shards"));
        }
        out.push(pattern.to_owned());
        return Ok(());
    };
    let close = open + pattern[open..].find('}').ok_or("a { without its }")?;
    let (head, body, tail) = (&pattern[..open], &pattern[open + 1..close], &pattern[close + 1..]);
    if let Some((first, last)) = body.split_once("..") {
        let bound = |s: &str| s.parse::<u64>().map_err(|_| format!("{{{body}}} is not a range of numbers"));
        let (low, high) = (bound(first)?, bound(last)?);
        if low > high {
            return Err(format!("{{{body}}} counts downwards"));
        }
        for n in low..=high {
            expand_braces(&format!("{head}{n:0width$}{tail}", width = first.len()), out)?;
        }
    } else {
        for choice in body.split(',') {
            expand_braces(&format!("{head}{choice}{tail}"), out)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::ShardWriter;
    use proptest::prelude::*;

    type Members<'a> = &'a [(&'a str, &'a [u8])];

    fn shard(dir: &Path, samples: &[(&str, Members)]) -> PathBuf {
        let mut writer = ShardWriter::create(dir, "test", u64::MAX).unwrap();
        for (key, members) in samples {
            writer.write(key, members).unwrap();
        }
        writer.finish().unwrap().remove(0)
    }

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
        assert_eq!((set.len(), set.warnings()), (2, [].as_slice()));
        let cat = set.sample(0).unwrap();
        assert_eq!((cat.key, cat.shard), ("animals/cat", path.as_path()));
        assert_eq!(cat.members().map(|(e, _)| e).collect::<Vec<_>>(), ["webp", "seg.png", "txt"]);
        assert_eq!(cat.member("txt"), Some(b"a cat".as_slice()));
        assert_eq!(cat.member("json"), None);
        assert_eq!(set.sample(1).unwrap().member("txt"), Some(b"".as_slice()));
        let error = sample_image(&set.sample(1).unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("sample animals/dog of ") && error.contains("no picture"), "{error}");
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
        assert!(set.warnings().iter().any(|w| w.contains("truncated")), "{:?}", set.warnings());
        assert!(set.warnings().iter().any(|w| w.contains("last sample c")), "{:?}", set.warnings());

        std::fs::write(&path, &bytes[..300]).unwrap();
        assert!(open(&path).unwrap_err().to_string().contains("holds no whole sample"));
    }

    #[test]
    fn patterns_name_files_globs_and_lists() {
        let dir = tempfile::tempdir().unwrap();
        let made = shard(dir.path(), &[("a", &[("txt", b"x")])]);
        for n in 8..=11 {
            std::fs::copy(&made, dir.path().join(format!("train-{n:03}.tar"))).unwrap();
        }
        let shards = |pattern: &str| {
            let set = ShardSet::open(&[dir.path().join(pattern).display().to_string()])?;
            Ok::<_, DataError>(set.shards().len())
        };
        assert_eq!(shards("train-{008..011}.tar").unwrap(), 4);
        assert_eq!(shards("train-0{08,10}.tar").unwrap(), 2);
        assert_eq!(shards("train-*.tar").unwrap(), 4);
        assert_eq!(shards("{train-008,train-*}.tar").unwrap(), 4);
        let error = |pattern| shards(pattern).unwrap_err().to_string();
        assert!(error("train-{008..012}.tar").contains("train-012.tar"));
        assert!(error("valid-*.tar").contains("no such file"));
        assert!(error("train-{a..b}.tar").contains("not a range"));
        assert!(error("train-{008.tar").contains("without its }"));
        assert!(error("").contains("is a folder"));
    }

    #[test]
    fn keys_follow_webdataset() {
        let split = |path| split_key(path).map(|(key, ext)| (key.to_owned(), ext));
        assert_eq!(split("a/b.c/d.seg.PNG"), Some(("a/b.c/d".into(), "seg.png".into())));
        assert_eq!(split("no_extension"), None);
        assert_eq!(split("a/.hidden"), None);
        assert_eq!(split("__index__.json"), None);
    }

    proptest! {
        #[test]
        fn any_pattern_is_survived(pattern in "[a-c{}.,0-9]{0,12}") {
            let mut out = Vec::new();
            // Wide ranges are cut off by the limit, which the parser checks while it expands.
            let _ = expand_braces(&pattern, &mut out);
            prop_assert!(out.len() <= MAX_EXPANSION);
        }
    }
}
