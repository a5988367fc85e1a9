//! What a data set holds: counts, picture sizes, caption fields and broken samples.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

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
    /// The texts, by the way a caption field would name them: `.txt`, `.json en`.
    pub captions: BTreeMap<String, CaptionCount>,
    /// Samples without a readable picture or with malformed JSON.
    pub broken: usize,
    /// The first of them, one line each.
    pub broken_named: Vec<String>,
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
                sample_image(&sample)
            });
            match checked {
                Ok(picture) => *sizes.entry((picture.width, picture.height)).or_insert(0) += 1,
                Err(error) => {
                    info.broken += 1;
                    if info.broken_named.len() < MAX_NAMED {
                        info.broken_named.push(error.to_string());
                    }
                }
            }
            progress(index + 1, set.len());
        }
        info.sizes =
            sizes.into_iter().map(|((width, height), count)| SizeCount { width, height, count }).collect();
        info.sizes.sort_by_key(|size| std::cmp::Reverse(size.count));
        info
    }

    fn count_members(&mut self, sample: &Sample) -> crate::Result<()> {
        for (extension, bytes) in sample.members() {
            *self.extensions.entry(extension.to_owned()).or_default() += 1;
            if extension == "txt" {
                let text =
                    std::str::from_utf8(bytes).map_err(|_| sample.error("its .txt is not UTF-8 text"))?;
                self.count_caption(".txt".to_owned(), text);
            } else if extension == "json" {
                let json: BTreeMap<String, Value> = serde_json::from_slice(bytes)
                    .map_err(|e| sample.error(format!("its .json is malformed: {e}")))?;
                for (key, value) in &json {
                    let text = value.as_str().or_else(|| value.get(0)?.as_str());
                    self.count_caption(format!(".json {key}"), text.unwrap_or_default());
                }
            }
        }
        Ok(())
    }

    fn count_caption(&mut self, field: String, text: &str) {
        let text = text.trim();
        if text.is_empty() {
            return;
        }
        let caption = self.captions.entry(field).or_default();
        caption.count += 1;
        if caption.examples.len() < EXAMPLES && !caption.examples.iter().any(|example| example == text) {
            caption.examples.push(text.to_owned());
        }
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
        let shards = writer.finish().unwrap();
        let set = ShardSet::open(&[shards[0].display().to_string()]).unwrap();

        let mut last = (0, 0);
        let info = DatasetInfo::scan(&set, |done, all| last = (done, all));
        assert_eq!((info.samples, info.shards, info.broken, last), (5, 1, 2, (5, 5)));
        assert_eq!(info.bytes, std::fs::metadata(&shards[0]).unwrap().len());
        assert_eq!(info.extensions["png"], 5);
        assert_eq!(info.sizes[0], SizeCount { width: 3, height: 2, count: 2 });
        assert_eq!(info.captions[".json en"], CaptionCount { count: 2, examples: vec!["one".into()] });
        assert_eq!(info.captions[".json tags"].count, 1);
        assert_eq!(info.captions[".txt"].examples, ["three"]);
        assert!(!info.captions.contains_key(".json n"));
        assert!(info.broken_named[0].starts_with("sample d of "), "{:?}", info.broken_named);
    }
}
