//! Held-out samples: a picture, its style and its true names.

use m6_data::caption::text;
use m6_data::{CaptionField, Rgb8, Sample, ShardSet, SkipLimits, sample_image};
use m6_run::fetching;

use super::names::ByLanguage;
use crate::error::{Error, Result};
use crate::model::Language;

const MEMBER: &str = "json";
const STYLE: &str = "style";

/// A sample of a shard as the scores see it.
#[derive(Debug, Clone)]
pub struct EvalSample {
    /// Key in its shard.
    pub key: String,
    /// JSON key `style`, where the sample has one.
    pub style: Option<String>,
    /// JSON keys `en` and `zh`: what the picture shows.
    pub names: ByLanguage<Option<String>>,
    /// The picture.
    pub picture: Rgb8,
}

impl EvalSample {
    /// Reads a sample.
    ///
    /// # Errors
    /// When its picture or its JSON is broken. Scores over fewer samples than there are could not be compared, so
    /// nothing is skipped.
    pub fn read(sample: &Sample) -> Result<Self> {
        let field = |key: &str| text(sample, &json_field(Some(key), None));
        let name = |language: Language| field(name_key(language));
        Ok(Self {
            key: sample.key.to_owned(),
            style: field(STYLE)?,
            names: ByLanguage::try_make(name)?,
            picture: sample_image(sample)?,
        })
    }
}

/// JSON key of the true name in a language.
fn name_key(language: Language) -> &'static str {
    match language {
        Language::En => "en",
        Language::Zh => "zh",
    }
}

/// A field of the samples' JSON: a key or a template over keys.
pub(super) fn json_field(key: Option<&str>, template: Option<&str>) -> CaptionField {
    CaptionField {
        member: MEMBER.to_owned(),
        key: key.map(str::to_owned),
        template: template.map(str::to_owned),
        lang: None,
        weight: 1.0,
    }
}

/// Opens shards and reports damage on stderr.
///
/// # Errors
/// When a pattern names no shard or a shard cannot be read.
pub fn open_shards(patterns: &[String]) -> Result<ShardSet> {
    let shards = ShardSet::open_with(patterns, SkipLimits::default(), fetching())?;
    for flaw in shards.flaws() {
        eprintln!("m6: {flaw}");
    }
    Ok(shards)
}

/// The first `limit` samples of shards, or all.
///
/// # Errors
/// When there is none or one is broken.
pub(super) fn read_all(shards: &ShardSet, limit: Option<usize>) -> Result<Vec<EvalSample>> {
    let count = limit.map_or(shards.len(), |limit| limit.min(shards.len()));
    if count == 0 {
        return Err(Error::Usage("--limit 0: expected 1 or more samples".into()));
    }
    (0..count).map(|index| EvalSample::read(&shards.sample(index)?)).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use m6_data::ShardWriter;

    use super::*;
    use crate::generate::testing::picture;

    /// Writes one shard of noise pictures with these names and styles.
    pub(crate) fn shard(dir: &Path, prefix: &str, samples: &[(&str, &str, &str)]) -> Vec<String> {
        let mut writer = ShardWriter::create(dir, prefix, 1 << 20).unwrap();
        for (i, (en, zh, style)) in samples.iter().enumerate() {
            let json = serde_json::json!({ "en": en, "zh": zh, "style": style }).to_string();
            let png = picture(i as u8).encode_png().unwrap();
            writer.write(&format!("{prefix}-{i}"), &[("png", &png), ("json", json.as_bytes())]).unwrap();
        }
        writer.finish().unwrap().iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn names_and_style_come_from_the_json() {
        let dir = tempfile::tempdir().unwrap();
        let shards =
            open_shards(&shard(dir.path(), "val", &[("red heart", "红心", "flat"), ("sun", "", "3D")]))
                .unwrap();
        let samples = read_all(&shards, None).unwrap();
        assert_eq!(samples.len(), 2);
        assert_eq!(samples[0].names.zh.as_deref(), Some("红心"));
        assert_eq!(samples[1].names, ByLanguage { en: Some("sun".to_owned()), zh: None });
        assert_eq!(samples[1].style.as_deref(), Some("3D"));
        assert_eq!(read_all(&shards, Some(1)).unwrap().len(), 1);
        assert!(read_all(&shards, Some(0)).unwrap_err().to_string().starts_with("--limit 0"));
    }

    #[test]
    fn a_broken_sample_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), "val", 1 << 20).unwrap();
        writer.write("cut", &[("png", b"not a picture"), ("json", b"{}")]).unwrap();
        let paths: Vec<String> = writer.finish().unwrap().iter().map(|p| p.display().to_string()).collect();
        let error = read_all(&open_shards(&paths).unwrap(), None).unwrap_err().to_string();
        assert!(error.contains(", sample cut: "), "{error}");
    }
}
