//! What a data set holds: counts, picture sizes, caption fields and broken samples.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::caption::texts_by_field;
use crate::error::{DataError, Result};
use crate::shard::{Sample, ShardSet, sample_image};

/// Broken samples that are named; all are counted.
const MAX_NAMED: usize = 20;
/// Examples that are kept of each caption field.
const EXAMPLES: usize = 3;

/// A summary of a set of shards.
#[derive(Debug, Clone, Default, Serialize)]
pub struct DatasetInfo {
    /// Number of samples.
    pub samples: usize,
    /// Number of shards.
    pub shards: usize,
    /// Size of the shards.
    pub bytes: u64,
    /// How many samples have a member with each extension.
    pub extensions: BTreeMap<String, usize>,
    /// How many pictures have each size, most frequent first.
    pub sizes: Vec<SizeCount>,
    /// Samples without a picture.
    pub without_picture: usize,
    /// Samples without a text.
    pub without_text: usize,
    /// The texts, by the way a caption field would name them: `.txt`, `.json en`.
    pub captions: BTreeMap<String, CaptionCount>,
    /// Samples with a broken picture, text or other member.
    #[serde(flatten)]
    pub broken: Broken,
    /// Damage of whole shards, one line each.
    pub warnings: Vec<String>,
}

/// How many pictures have one size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SizeCount {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Number of pictures.
    pub count: usize,
}

/// How often a caption field has a text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CaptionCount {
    /// Number of samples.
    pub count: usize,
    /// The first few texts.
    pub examples: Vec<String>,
}

/// Samples of which something cannot be read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Broken {
    /// Number of samples.
    #[serde(rename = "broken")]
    pub count: usize,
    /// The first of them, one line each.
    #[serde(rename = "broken_named")]
    pub named: Vec<String>,
}

impl Broken {
    pub(crate) fn add(&mut self, error: &DataError) {
        self.count += 1;
        if self.named.len() < MAX_NAMED {
            self.named.push(error.to_string());
        }
    }
}

impl DatasetInfo {
    /// Reads every sample and decodes every picture; `progress` is called with (done, all) after each.
    pub fn scan(set: &ShardSet, mut progress: impl FnMut(usize, usize)) -> Self {
        let mut info = Self {
            samples: set.len(),
            shards: set.shards().len(),
            bytes: set.bytes(),
            warnings: set.flaws().iter().map(ToString::to_string).collect(),
            ..Self::default()
        };
        let mut sizes = BTreeMap::new();
        for index in 0..set.len() {
            let checked = set.sample(index).and_then(|sample| {
                info.count_members(&sample)?;
                sample.check_members()?;
                sample.picture().map(|_| sample_image(&sample)).transpose()
            });
            match checked {
                Ok(Some(picture)) => *sizes.entry((picture.width, picture.height)).or_insert(0) += 1,
                Ok(None) => {}
                Err(error) => info.broken.add(&error),
            }
            progress(index + 1, set.len());
        }
        info.sizes =
            sizes.into_iter().map(|((width, height), count)| SizeCount { width, height, count }).collect();
        info.sizes.sort_by_key(|size| std::cmp::Reverse(size.count));
        info
    }

    fn count_members(&mut self, sample: &Sample) -> Result<()> {
        for (extension, _) in sample.members() {
            *self.extensions.entry(extension.to_owned()).or_default() += 1;
        }
        self.without_picture += usize::from(sample.picture().is_none());
        let texts = texts_by_field(sample)?;
        self.without_text += usize::from(texts.is_empty());
        for (field, texts) in texts {
            let caption = self.captions.entry(field).or_default();
            caption.count += 1;
            if let Some(text) = texts.into_iter().next()
                && caption.examples.len() < EXAMPLES
                && !caption.examples.contains(&text)
            {
                caption.examples.push(text);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::Rgb8;
    use crate::writer::ShardWriter;

    #[test]
    fn counts_sizes_captions_and_broken_samples() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), "s", u64::MAX).unwrap();
        let png = |width| Rgb8::filled(width, 2, [1, 2, 3]).encode_png().unwrap();
        let (small, large) = (png(2), png(3));
        writer
            .write("a", &[("png", &small), ("json", br#"{"en": "one", "tags": ["x", "y"], "n": 1}"#)])
            .unwrap();
        writer.write("b", &[("png", &large), ("json", br#"{"en": "one", "tags": []}"#)]).unwrap();
        writer.write("c", &[("png", &large), ("txt", b"three\n")]).unwrap();
        writer.write("d", &[("png", b"broken")]).unwrap();
        writer.write("e", &[("png", &small), ("json", b"{")]).unwrap();
        writer.write("f", &[("png", &small), ("cls", b"7"), ("npy", b"broken")]).unwrap();
        writer.write("g", &[("txt", b"four")]).unwrap();
        writer.write("h", &[("png", &large)]).unwrap();
        let shards = writer.finish().unwrap();
        let set = ShardSet::open(&[shards[0].display().to_string()]).unwrap();

        let mut last = (0, 0);
        let info = DatasetInfo::scan(&set, |done, all| last = (done, all));
        assert_eq!((info.samples, info.shards, info.broken.count, last), (8, 1, 3, (8, 8)));
        assert_eq!((info.without_picture, info.without_text), (1, 3));
        assert_eq!(info.bytes, std::fs::metadata(&shards[0]).unwrap().len());
        assert_eq!((info.extensions["png"], info.extensions["cls"]), (7, 1));
        assert_eq!(info.sizes[0], SizeCount { width: 3, height: 2, count: 3 });
        assert_eq!(info.captions[".json en"], CaptionCount { count: 2, examples: vec!["one".into()] });
        assert_eq!(info.captions[".json tags"].count, 1);
        assert_eq!(info.captions[".txt"].examples, ["three", "four"]);
        assert!(!info.captions.contains_key(".json n"));
        assert!(info.broken.named[0].contains(", sample d: "), "{:?}", info.broken);
        let json = serde_json::to_value(&info).unwrap();
        assert_eq!((&json["broken"], json["broken_named"].as_array().unwrap().len()), (&3.into(), 3));
    }
}
