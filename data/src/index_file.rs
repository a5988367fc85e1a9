//! Index files beside shards, so that opening many or far shards need not walk their headers.
//!
//! `train-000000.idx` beside `train-000000.tar` is text as NVIDIA DALI's `wds2idx` writes and its webdataset reader takes
//! it: `v1.2 SAMPLES`, then a line a sample of `EXTENSION OFFSET SIZE PATH` for each member. The format has no checksum; an
//! index that is older than its shard, that leads out of it, or whose last member is not where it says, is not used.
//!
//! Format: <https://github.com/NVIDIA/DALI/blob/main/tools/wds2idx.py>.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::atomic_file::write_atomic;
use crate::error::{DataError, Result};
use crate::key::split_key;
use crate::lines::Lines;
use crate::pattern::resolve;
use crate::source::Source;
use crate::tar_index::{BLOCK, Member, TarIndex, is_header_of_file};

const EXTENSION: &str = "idx";
const VERSION: &str = "v1.2";
/// Words that describe a member.
const WORDS: usize = 4;

/// What [`write_indexes`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct IndexReport {
    /// The index files, in the order of the shards.
    pub written: Vec<PathBuf>,
    /// Shards that have no index because they cannot be read or the format cannot say what they hold, one line each.
    pub skipped: Vec<String>,
}

/// Writes an index beside each shard named by `patterns`; `progress` is called with (done, all) after each shard.
///
/// # Errors
/// No pattern, one that names no file, or an index that cannot be written.
pub fn write_indexes(patterns: &[String], mut progress: impl FnMut(usize, usize)) -> Result<IndexReport> {
    let shards = resolve(patterns)?.into_iter().map(|source| {
        let pattern = source.name().display().to_string();
        let reason = match source {
            Source::File(path) if Lines::of_file(&pattern).is_none() => return Ok(path),
            Source::File(_) => "an index is of an archive, and this is a text".to_owned(),
            Source::Far(_) => "an index stands beside a file, and this is none".to_owned(),
        };
        Err(DataError::Pattern { pattern, reason })
    });
    let shards = shards.collect::<Result<Vec<_>>>()?;
    let mut report = IndexReport::default();
    for (done, shard) in shards.iter().enumerate() {
        let index = File::open(shard).and_then(TarIndex::read).map_err(|error| error.to_string());
        match index.and_then(|index| to_text(&index)) {
            Ok(text) => {
                let path = path_of(shard);
                write_atomic(&path, text.as_bytes())?;
                report.written.push(path);
            }
            Err(reason) => report.skipped.push(format!("{}: {reason}", shard.display())),
        }
        progress(done + 1, shards.len());
    }
    Ok(report)
}

/// The members of a shard by its index; `None` where there is none.
///
/// # Errors
/// Why the index that is there cannot be used.
pub(crate) fn read(shard: &Path, archive: &File) -> std::result::Result<Option<Vec<Member>>, String> {
    let path = path_of(shard);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let told = |error: io::Error| error.to_string();
    let (of_index, of_shard) = (file.metadata().map_err(told)?, archive.metadata().map_err(told)?);
    if of_index.modified().map_err(told)? < of_shard.modified().map_err(told)? {
        return Err("it is older than the shard; `m6 data index` makes it anew".to_owned());
    }
    let members = from_text(&io::read_to_string(file).map_err(told)?)?;
    let ends_inside =
        |member: &&Member| member.offset.checked_add(member.size).is_some_and(|end| end <= of_shard.len());
    if let Some(member) = members.iter().find(|member| !ends_inside(member)) {
        return Err(format!("{} would end behind the shard", member.path));
    }
    let last = members.iter().max_by_key(|member| member.offset).ok_or("it lists no sample")?;
    let mut header = [0; BLOCK as usize];
    let is_there = archive.read_exact_at(&mut header, last.offset.saturating_sub(BLOCK)).is_ok()
        && is_header_of_file(&header, last.size);
    if !is_there {
        return Err(format!("{} is not where it says", last.path));
    }
    Ok(Some(members))
}

fn path_of(shard: &Path) -> PathBuf {
    shard.with_extension(EXTENSION)
}

/// The index as text, or why the format cannot hold it.
fn to_text(index: &TarIndex) -> std::result::Result<String, String> {
    if let Some(defect) = index.defects.first() {
        return Err(format!("the shard is damaged ({defect})"));
    }
    let mut samples = 0;
    let mut lines = String::new();
    let mut last_key = None;
    for member in &index.members {
        let Some((key, _)) = split_key(&member.path) else { continue };
        if member.path.chars().any(char::is_whitespace) {
            return Err(format!("the name {:?} has white space in it", member.path));
        }
        if last_key == Some(key) {
            lines.push(' ');
        } else {
            lines.push_str(if samples == 0 { "" } else { "\n" });
            samples += 1;
            last_key = Some(key);
        }
        // In the letters of the name, which `split_key` does not keep.
        let extension = &member.path[key.len() + 1..];
        write!(lines, "{extension} {} {} {}", member.offset, member.size, member.path)
            .map_err(|error| error.to_string())?;
    }
    if samples == 0 {
        return Err("it holds no sample".to_owned());
    }
    Ok(format!("{VERSION} {samples}\n{lines}\n"))
}

fn from_text(text: &str) -> std::result::Result<Vec<Member>, String> {
    let (head, lines) = text.split_once('\n').unwrap_or((text, ""));
    let samples = head
        .split_once(' ')
        .filter(|(version, _)| *version == VERSION)
        .and_then(|(_, samples)| samples.trim().parse::<usize>().ok())
        .ok_or_else(|| format!("its first line is {head:?}, expected `{VERSION} SAMPLES`"))?;
    if lines.lines().count() != samples {
        return Err(format!("it has {} samples, its first line says {samples}", lines.lines().count()));
    }
    let mut members = Vec::new();
    for (number, line) in (2..).zip(lines.lines()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        for member in words.chunks(WORDS) {
            let parsed = match member {
                [_, offset, size, path] => offset
                    .parse()
                    .ok()
                    .zip(size.parse().ok())
                    .map(|(offset, size)| Member { path: (*path).to_owned(), offset, size }),
                _ => None,
            };
            members.push(parsed.ok_or_else(|| {
                format!("line {number}: {:?}, expected EXTENSION OFFSET SIZE PATH", member.join(" "))
            })?);
        }
    }
    Ok(members)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, SystemTime};

    use proptest::prelude::*;

    use super::*;
    use crate::shard::ShardSet;
    use crate::testing::{Members, shard};

    const SAMPLES: [(&str, Members); 2] =
        [("animals/cat", &[("webp", b"picture"), ("seg.PNG", b"mask")]), ("dog", &[("txt", b"a dog")])];

    fn patterns(path: &Path) -> [String; 1] {
        [path.display().to_string()]
    }

    /// Key, extension and bytes of every member.
    fn contents(set: &ShardSet) -> Vec<(String, String, Vec<u8>)> {
        let samples = (0..set.len()).map(|index| set.sample(index).unwrap());
        let of_sample = |sample: crate::shard::Sample| {
            let member =
                |(extension, bytes): (&str, &[u8])| (sample.key.into(), extension.into(), bytes.into());
            sample.members().map(member).collect::<Vec<_>>()
        };
        samples.flat_map(of_sample).collect()
    }

    /// Reasons why indexes were not used.
    fn unused(set: &ShardSet) -> Vec<&str> {
        set.flaws().iter().map(|flaw| flaw.reason.as_str()).collect()
    }

    #[test]
    fn an_index_reads_as_wds2idx_writes_it_and_opens_the_same_samples() {
        let dir = tempfile::tempdir().unwrap();
        let path = shard(dir.path(), &SAMPLES);
        let walked = ShardSet::open(&patterns(&path)).unwrap();
        let report = write_indexes(&patterns(&path), |_, _| ()).unwrap();
        assert_eq!(report, IndexReport { written: vec![path_of(&path)], skipped: vec![] });
        let text = fs::read_to_string(path_of(&path)).unwrap();
        let expected =
            "v1.2 2\nwebp 512 7 animals/cat.webp seg.PNG 1536 4 animals/cat.seg.PNG\ntxt 2560 5 dog.txt\n";
        assert_eq!(text, expected);
        let members = read(&path, &File::open(&path).unwrap()).unwrap();
        assert_eq!(members.map(|members| members.len()), Some(3), "the index is used");
        let indexed = ShardSet::open(&patterns(&path)).unwrap();
        assert_eq!((contents(&indexed), unused(&indexed)), (contents(&walked), vec![]));
        assert_eq!(indexed.identity(), walked.identity());
    }

    #[test]
    fn an_index_that_does_not_fit_is_named_and_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = shard(dir.path(), &SAMPLES);
        write_indexes(&patterns(&path), |_, _| ()).unwrap();
        let good = fs::read_to_string(path_of(&path)).unwrap();
        let member = "expected EXTENSION OFFSET SIZE PATH";
        let cases = [
            ("v1.2", "v1.1", "its first line is \"v1.1 2\", expected `v1.2 SAMPLES`".to_owned()),
            ("v1.2 2", "v1.2 3", "it has 2 samples, its first line says 3".to_owned()),
            ("512 7", "512", format!("line 2: \"webp 512 animals/cat.webp seg.PNG\", {member}")),
            ("2560", "x", format!("line 3: \"txt x 5 dog.txt\", {member}")),
            ("512 7", "512 18446744073709551615", "animals/cat.webp would end behind the shard".to_owned()),
            ("2560 5", "2560 50000", "dog.txt would end behind the shard".to_owned()),
            ("2560", "2048", "dog.txt is not where it says".to_owned()),
        ];
        for (right, wrong, reason) in cases {
            fs::write(path_of(&path), good.replace(right, wrong)).unwrap();
            let set = ShardSet::open(&patterns(&path)).unwrap();
            assert_eq!(set.len(), 2, "the shard itself is read");
            assert_eq!(unused(&set), [format!("its .idx is not used: {reason}")]);
        }

        fs::write(path_of(&path), &good).unwrap();
        assert!(unused(&ShardSet::open(&patterns(&path)).unwrap()).is_empty());
        let later = SystemTime::now() + Duration::from_secs(10);
        File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        let set = ShardSet::open(&patterns(&path)).unwrap();
        assert_eq!(
            unused(&set),
            ["its .idx is not used: it is older than the shard; `m6 data index` makes it anew"]
        );
    }

    #[test]
    fn what_the_format_cannot_hold_is_left_out_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = shard(dir.path(), &[("a cat", &[("txt", b"cat")])]);
        let report = write_indexes(&patterns(&path), |_, _| ()).unwrap();
        assert!(report.written.is_empty() && !path_of(&path).exists());
        assert!(report.skipped[0].contains("the name \"a cat.txt\" has white space in it"), "{report:?}");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..1024]).unwrap();
        let report = write_indexes(&patterns(&path), |_, _| ()).unwrap();
        assert!(report.skipped[0].contains("the shard is damaged (at byte 1024: "), "{report:?}");
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(v1.2 [0-9]{1,3}\n)?([a-z]{1,3} [0-9]{1,21} [0-9]{1,21} [a-z./]{1,5}[ \n]?){0,5}.{0,5}") {
            if let Ok(members) = from_text(&text) {
                prop_assert!(members.iter().all(|member| text.contains(&member.path)));
            }
        }
    }
}
