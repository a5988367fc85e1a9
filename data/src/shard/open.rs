//! Opens shards: finds them, and groups the members of each by their keys.

use std::path::{Path, PathBuf};

use super::sample::MemberEntry;
use super::{SampleEntry, Shard, ShardSet};
use crate::cache::Cache;
use crate::error::{DataError, Result};
use crate::flaw::{Flaw, FlawClass};
use crate::key::split_key;
use crate::pattern::resolve;
use crate::scan::{Care, Progress, Scanned, scan_all};
use crate::skipped::SkipLimits;
use crate::tar_index::Defect;

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
    pub(super) fn open_in<'a>(
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::sample_image;
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
