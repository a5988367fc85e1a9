//! What a data set is like to train on: lengths and scripts of texts, sizes of pictures, and what is in it more than once.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

use crate::caption::texts_by_field;
use crate::error::Result;
use crate::flaw::FlawClass;
use crate::info::Broken;
use crate::loader::Loader;
use crate::picture::Measured;
use crate::script::Script;
use crate::shard::ShardSet;

/// Samples that each worker reads ahead.
const AHEAD: usize = 16;
/// Short sides in pixels at which models are trained, and below which a picture would have to be blown up.
const SHORT_SIDES: [u32; 5] = [64, 128, 256, 512, 1024];
/// Groups of duplicates that are named, and keys that are named of each.
const MAX_NAMED: usize = 5;

/// Figures of a set of shards; those of pictures and texts leave out the samples that are broken.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DatasetStats {
    /// Number of samples.
    pub samples: usize,
    /// Number of shards.
    pub shards: usize,
    /// Size of the shards.
    pub bytes: u64,
    /// Samples with a broken picture, text or other member.
    #[serde(flatten)]
    pub broken: Broken,
    /// The pictures, at most one a sample.
    pub pictures: PictureStats,
    /// The texts, by the way a caption field would name them: `.txt`, `.json en`.
    pub texts: BTreeMap<String, TextStats>,
    /// Damage of whole shards, one line each.
    pub warnings: Vec<String>,
}

/// Figures of the pictures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PictureStats {
    /// The shorter of width and height, in pixels.
    pub short_side: Spread<u32>,
    /// Width divided by height.
    pub aspect: Spread<f64>,
    /// Size of the encoded picture in bytes.
    pub bytes: Spread<usize>,
    /// How many pictures have a short side below each of 64, 128, 256, 512 and 1024 pixels.
    pub below: BTreeMap<u32, usize>,
    /// Samples whose pictures have the same bytes.
    pub same_bytes: Duplicates,
    /// Samples whose pictures look alike: brightness rises and falls along the rows at the same places of an 8x8 grid
    /// (equal 64-bit difference hashes). Those with the same bytes are among them, and so are the same picture in other
    /// encodings and sizes; crops and mirrored pictures are not. Plain pictures all look alike.
    pub alike: Duplicates,
}

/// Figures of the texts of one caption field. A sample whose JSON has an array there has several.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextStats {
    /// Unicode characters, without surrounding white space.
    pub characters: Spread<usize>,
    /// Words between white space, of Latin texts only; others may not separate theirs.
    pub words: Spread<usize>,
    /// How many texts are in each script.
    pub scripts: BTreeMap<Script, usize>,
    /// Samples with the same text.
    pub same: Duplicates,
}

/// How numbers are spread; each is one that occurs (nearest rank). Without any, `count` is 0 and so are the others.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread<T> {
    /// How many there are.
    pub count: usize,
    /// The smallest.
    pub min: T,
    /// 5 % are no larger.
    pub p5: T,
    /// Half are no larger.
    pub median: T,
    /// 95 % are no larger.
    pub p95: T,
    /// The largest.
    pub max: T,
}

/// Samples that have something in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Duplicates {
    /// How many different things there are, those that occur once included.
    pub distinct: usize,
    /// How many of them two or more samples have.
    pub groups: usize,
    /// Samples in these groups.
    pub samples: usize,
    /// The first few groups, the largest first.
    pub largest: Vec<Group>,
}

/// Samples that have one thing in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Number of samples.
    pub samples: usize,
    /// Keys of the first few, in the order of the shards.
    pub keys: Vec<String>,
}

type Digest = [u8; blake3::OUT_LEN];

/// What is kept of a sample.
struct Record {
    picture: Option<Measured>,
    texts: Vec<(String, Text)>,
}

struct Text {
    characters: usize,
    words: usize,
    script: Script,
    digest: Digest,
}

impl DatasetStats {
    /// Reads every sample and decodes every picture on `workers` threads (at least one); `progress` is called after each
    /// sample. About a hundred bytes for each picture and each text are kept in memory.
    ///
    /// # Errors
    /// The system refuses a thread. Broken samples are counted instead.
    pub fn scan(set: ShardSet, workers: usize, mut progress: impl FnMut()) -> Result<Self> {
        let set = Arc::new(set);
        let workers = workers.max(1);
        let read = {
            let set = Arc::clone(&set);
            // Workers run ahead of the last sample.
            move |ordinal: u64| (ordinal < set.len() as u64).then(|| Record::read(&set, ordinal as usize))
        };
        let mut broken = Broken::default();
        let mut pictures = Vec::new();
        let mut texts: BTreeMap<String, Vec<(usize, Text)>> = BTreeMap::new();
        for (index, made) in (0..set.len()).zip(Loader::start(0, workers, AHEAD * workers, read)?) {
            match made? {
                (_, Some(Ok(record))) => {
                    pictures.extend(record.picture.map(|picture| (index, picture)));
                    for (field, text) in record.texts {
                        texts.entry(field).or_default().push((index, text));
                    }
                }
                (_, Some(Err(error))) => broken.add(&error),
                (_, None) => {}
            }
            progress();
        }
        let texts = texts.into_iter().map(|(field, texts)| (field, TextStats::of(&set, &texts)));
        Ok(Self {
            samples: set.len(),
            shards: set.shards().len(),
            bytes: set.bytes(),
            broken,
            pictures: PictureStats::of(&set, &pictures),
            texts: texts.collect(),
            warnings: set.flaws().iter().map(ToString::to_string).collect(),
        })
    }
}

impl Record {
    fn read(set: &ShardSet, index: usize) -> Result<Self> {
        let sample = set.sample(index)?;
        sample.check_members()?;
        let texts = texts_by_field(&sample)?
            .into_iter()
            .flat_map(|(field, texts)| texts.into_iter().map(move |text| (field.clone(), Text::of(&text))))
            .collect();
        let picture = sample.picture().map(Measured::of).transpose();
        let picture = picture.map_err(|e| sample.error(FlawClass::BrokenPicture, e.to_string()))?;
        Ok(Self { picture, texts })
    }
}

impl Text {
    fn of(text: &str) -> Self {
        Self {
            characters: text.chars().count(),
            words: text.split_whitespace().count(),
            script: Script::of(text),
            digest: *blake3::hash(text.as_bytes()).as_bytes(),
        }
    }
}

impl PictureStats {
    fn of(set: &ShardSet, pictures: &[(usize, Measured)]) -> Self {
        let all = || pictures.iter().map(|(_, picture)| picture);
        let short_sides = || all().map(|picture| picture.width.min(picture.height));
        let below = |limit| (limit, short_sides().filter(|&side| side < limit).count());
        Self {
            short_side: Spread::of(short_sides(), Ord::cmp),
            aspect: Spread::of(all().map(Measured::aspect), f64::total_cmp),
            bytes: Spread::of(all().map(|picture| picture.bytes), Ord::cmp),
            below: SHORT_SIDES.map(below).into(),
            same_bytes: Duplicates::of(set, pictures.iter().map(|(index, p)| (p.digest, *index))),
            alike: Duplicates::of(set, pictures.iter().map(|(index, p)| (p.hash, *index))),
        }
    }
}

impl TextStats {
    fn of(set: &ShardSet, texts: &[(usize, Text)]) -> Self {
        let all = || texts.iter().map(|(_, text)| text);
        let latin = all().filter(|text| text.script == Script::Latin);
        let mut scripts = BTreeMap::new();
        for text in all() {
            *scripts.entry(text.script).or_default() += 1;
        }
        Self {
            characters: Spread::of(all().map(|text| text.characters), Ord::cmp),
            words: Spread::of(latin.map(|text| text.words), Ord::cmp),
            scripts,
            same: Duplicates::of(set, texts.iter().map(|(index, text)| (text.digest, *index))),
        }
    }
}

impl<T: Copy + Default> Spread<T> {
    fn of(values: impl Iterator<Item = T>, order: impl Fn(&T, &T) -> Ordering) -> Self {
        let mut sorted: Vec<T> = values.collect();
        sorted.sort_unstable_by(order);
        let percentile = |percent: usize| {
            let rank = (percent * sorted.len()).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or_default()
        };
        Self {
            count: sorted.len(),
            min: percentile(0),
            p5: percentile(5),
            median: percentile(50),
            p95: percentile(95),
            max: percentile(100),
        }
    }
}

impl Duplicates {
    /// Groups samples, given by index, by what they have.
    fn of<T: Ord>(set: &ShardSet, seen: impl Iterator<Item = (T, usize)>) -> Self {
        let mut seen: Vec<_> = seen.collect();
        seen.sort_unstable();
        // A sample that has the same text twice is not its own duplicate.
        seen.dedup();
        let by_thing = || seen.chunk_by(|a, b| a.0 == b.0);
        let mut groups: Vec<_> = by_thing().filter(|group| group.len() > 1).collect();
        groups.sort_by_key(|group| (Reverse(group.len()), group[0].1));
        let grouped: BTreeSet<_> = groups.iter().flat_map(|group| group.iter().map(|seen| seen.1)).collect();
        let named = |group: &&[(T, usize)]| Group {
            samples: group.len(),
            keys: group.iter().take(MAX_NAMED).map(|seen| set.key(seen.1).to_owned()).collect(),
        };
        Self {
            distinct: by_thing().count(),
            groups: groups.len(),
            samples: grouped.len(),
            largest: groups.iter().take(MAX_NAMED).map(named).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    use crate::picture::Rgb8;
    use crate::testing::{Members, shard};

    fn scan(samples: &[(&str, Members)], workers: usize) -> (DatasetStats, usize) {
        let dir = tempfile::tempdir().unwrap();
        let shard = shard(dir.path(), samples).display().to_string();
        let mut calls = 0;
        (DatasetStats::scan(ShardSet::open(&[shard]).unwrap(), workers, || calls += 1).unwrap(), calls)
    }

    fn group(keys: &[&str]) -> Group {
        Group { samples: keys.len(), keys: keys.iter().map(|&key| key.to_owned()).collect() }
    }

    /// Stripes, brighter and darker by turns from the left.
    fn stripes(width: u32, height: u32) -> image::RgbImage {
        image::RgbImage::from_fn(width, height, |x, _| image::Rgb([(x * 9 / width % 2 * 200) as u8; 3]))
    }

    fn encode(picture: &image::RgbImage, format: image::ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn sizes_and_duplicates_of_pictures() {
        let small = encode(&stripes(90, 60), image::ImageFormat::Png);
        let jpeg = encode(&stripes(90, 60), image::ImageFormat::Jpeg);
        let large = encode(&stripes(180, 360), image::ImageFormat::Png);
        let plain = Rgb8::filled(64, 64, [1, 2, 3]).encode_png().unwrap();
        let samples: [(&str, Members); 8] = [
            ("plain", &[("png", &plain)]),
            ("broken", &[("png", b"broken"), ("txt", b"left out")]),
            ("small", &[("png", &small)]),
            ("large", &[("png", &large)]),
            ("again", &[("png", &small)]),
            ("jpeg", &[("jpg", &jpeg)]),
            ("text", &[("txt", b"no picture")]),
            ("neither", &[("cls", b"1")]),
        ];
        let (stats, calls) = scan(&samples, 1);
        assert_eq!((stats.samples, stats.shards, stats.broken.count, calls), (8, 1, 1, 8));
        assert!(stats.broken.named[0].contains(", sample broken: "), "{:?}", stats.broken);
        assert_eq!(stats.texts[".txt"].characters.count, 1, "texts of broken samples are left out");

        let PictureStats { short_side, aspect, bytes, below, same_bytes, alike } = &stats.pictures;
        let sides = Spread { count: 5, min: 60, p5: 60, median: 60, p95: 180, max: 180 };
        assert_eq!(*short_side, sides);
        assert_eq!((aspect.min, aspect.median, aspect.max), (0.5, 1.5, 1.5));
        assert_eq!((bytes.count, bytes.min), (5, plain.len().min(small.len())));
        assert_eq!(*below, [(64, 3), (128, 4), (256, 5), (512, 5), (1024, 5)].into());
        let largest = vec![group(&["small", "again"])];
        assert_eq!(*same_bytes, Duplicates { distinct: 4, groups: 1, samples: 2, largest });
        let largest = vec![group(&["small", "large", "again", "jpeg"])];
        assert_eq!(*alike, Duplicates { distinct: 2, groups: 1, samples: 4, largest });

        for workers in [0, 3] {
            let (again, calls) = scan(&samples, workers);
            assert_eq!((again.pictures, again.broken.count, calls), (stats.pictures.clone(), 1, 8));
        }
    }

    #[test]
    fn lengths_scripts_and_duplicates_of_texts() {
        let png = Rgb8::filled(2, 2, [1, 2, 3]).encode_png().unwrap();
        let (stats, _) = scan(
            &[
                ("a", &[("png", &png), ("json", r#"{"n": 1, "name": "a red heart"}"#.as_bytes())]),
                ("b", &[("png", &png), ("json", r#"{"name": ["红心", "红心", " ", "heart"]}"#.as_bytes())]),
                ("c", &[("png", &png), ("json", r#"{"name": " heart\n"}"#.as_bytes())]),
                ("d", &[("png", &png), ("json", r#"{"name": "❤"}"#.as_bytes()), ("txt", b"heart")]),
                ("e", &[("png", &png), ("json", b"{"), ("txt", b"heart")]),
                ("f", &[("png", &png), ("txt", b"\xff")]),
                ("g", &[("png", &png), ("cls", b"?")]),
            ],
            2,
        );
        assert_eq!((stats.broken.count, stats.pictures.short_side.count), (3, 4));
        assert_eq!(stats.texts.keys().collect::<Vec<_>>(), [".json name", ".txt"]);
        let name = &stats.texts[".json name"];
        let characters = Spread { count: 6, min: 1, p5: 1, median: 2, p95: 11, max: 11 };
        assert_eq!(name.characters, characters);
        assert_eq!(name.words, Spread { count: 3, min: 1, p5: 1, median: 1, p95: 3, max: 3 });
        assert_eq!(name.scripts, [(Script::Han, 2), (Script::Latin, 3), (Script::Other, 1)].into());
        let largest = vec![group(&["b", "c"])];
        assert_eq!(name.same, Duplicates { distinct: 4, groups: 1, samples: 2, largest });
        assert_eq!(stats.texts[".txt"].characters.count, 1);

        let json = serde_json::to_value(&stats).unwrap();
        assert_eq!(json["broken"], 3);
        assert_eq!(json["texts"][".json name"]["scripts"]["latin"], 3);
        assert_eq!(json["pictures"]["below"]["64"], 4);
    }

    #[test]
    fn the_largest_groups_are_named_and_all_are_counted() {
        let png = Rgb8::filled(2, 2, [1, 2, 3]).encode_png().unwrap();
        let keys: Vec<_> = (0..24).map(|i| format!("k{i:02}")).collect();
        // Texts 0 to 6; 0 to 2 occur four times, the others three.
        let texts: Vec<_> = (0..24).map(|i| (i % 7).to_string()).collect();
        let members: Vec<[(&str, &[u8]); 2]> =
            texts.iter().map(|text| [("png", &*png), ("txt", text.as_bytes())]).collect();
        let samples: Vec<(&str, Members)> =
            keys.iter().zip(&members).map(|(key, members)| (key.as_str(), &members[..])).collect();
        let (stats, _) = scan(&samples, 2);
        let same = &stats.texts[".txt"].same;
        assert_eq!((same.distinct, same.groups, same.samples, same.largest.len()), (7, 7, 24, MAX_NAMED));
        assert_eq!(same.largest[0], group(&["k00", "k07", "k14", "k21"]));
        assert_eq!(same.largest[3], group(&["k03", "k10", "k17"]));
        let all = &stats.pictures.same_bytes.largest[0];
        assert_eq!((all.samples, all.keys.len()), (24, MAX_NAMED));
    }

    #[test]
    fn percentiles_are_values_that_occur() {
        let spread = Spread::of((1..=100).rev(), Ord::cmp);
        assert_eq!(spread, Spread { count: 100, min: 1, p5: 5, median: 50, p95: 95, max: 100 });
        let none = Spread::of(std::iter::empty(), f64::total_cmp);
        assert_eq!(none, Spread { count: 0, min: 0.0, p5: 0.0, median: 0.0, p95: 0.0, max: 0.0 });
    }
}
