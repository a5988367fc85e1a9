//! Flags that several commands share, and what they are where nobody says.

use std::num::NonZero;
use std::path::PathBuf;

use m6::Result;
use m6_data::{CaptionField, CaptionFields};
use m6_runtime::FloatDtype;

/// Bytes of the unit in which sizes are given.
pub const MIB: u64 = 1 << 20;
/// Shards of this size are large enough for sequential reading and small enough to be dealt out.
pub const SHARD_MIB: u64 = 256;

/// Threads where none are said: one a core.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// A training run's config.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The run as TOML
    pub config: PathBuf,
    /// Override a key of the config, such as `schedule.steps=100`; may be given many times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// Numbers of weights or of a computation.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Dtype {
    Fp32,
    Bf16,
}

impl From<Dtype> for FloatDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Fp32 => Self::Fp32,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

/// Where the captions of samples are found.
#[derive(Debug, clap::Args)]
pub struct FieldArgs {
    /// A caption of the samples: `txt`, a key as in `json:en`, or a template as in `json:{en}, {style_en}`; may be
    /// given many times
    #[arg(long = "field", value_name = "MEMBER[:KEY]", value_parser = parse_field)]
    fields: Vec<CaptionField>,
}

impl FieldArgs {
    /// The fields, checked.
    pub fn caption_fields(&self) -> Result<CaptionFields> {
        Ok(CaptionFields::new(self.fields.clone())?)
    }

    /// Whether none was given.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }
}

/// Parses a caption field.
pub fn parse_field(text: &str) -> std::result::Result<CaptionField, String> {
    let (member, rest) = match text.split_once(':') {
        Some((member, rest)) => (member, Some(rest.to_owned())),
        None => (text, None),
    };
    if member.is_empty() || rest.as_ref().is_some_and(String::is_empty) {
        return Err("expected MEMBER or MEMBER:KEY, such as `txt` or `json:en`".into());
    }
    let is_template = rest.as_ref().is_some_and(|rest| rest.contains('{'));
    let (key, template) = if is_template { (None, rest) } else { (rest, None) };
    Ok(CaptionField { member: member.to_owned(), key, template, lang: None, weight: 1.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_members_keys_or_templates() {
        let field = |text| {
            let field = parse_field(text).unwrap();
            (field.member, field.key, field.template)
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(field("txt"), ("txt".into(), None, None));
        assert_eq!(field("json:en"), ("json".into(), some("en"), None));
        assert_eq!(field("json:{en}: {style}"), ("json".into(), None, some("{en}: {style}")));
        assert!(parse_field("json:").is_err() && parse_field(":en").is_err() && parse_field("").is_err());
    }

    #[test]
    fn fields_that_contradict_themselves_are_refused() {
        let fields = FieldArgs { fields: vec![parse_field("json").unwrap()] };
        assert!(fields.caption_fields().is_err());
    }
}
