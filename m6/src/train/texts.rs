//! The texts that a tokenizer is trained on.

use m6_data::{CaptionFields, ShardSet, Skipped};

use crate::error::{Error, Result};

/// Every text of `fields` in every sample; `on_sample` is called after each. Samples whose texts cannot be read are
/// named and left out.
///
/// # Errors
/// When there is no text at all, a shard cannot be read, or too many samples in a row have none.
pub fn texts(
    shards: &ShardSet,
    fields: &[&CaptionFields],
    mut on_sample: impl FnMut(),
) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    let mut skipped = Skipped::default();
    for index in 0..shards.len() {
        let sample = shards.sample(index)?;
        for fields in fields {
            let found = skipped.check(fields.all(&sample), None, |note| eprintln!("{note}"))?;
            texts.extend(found.into_iter().flatten().map(|caption| caption.text));
        }
        on_sample();
    }
    if texts.is_empty() {
        let names: Vec<String> = fields.iter().map(|fields| fields.to_string()).collect();
        return Err(Error::Usage(format!(
            "no sample has a text in the caption fields {}; expected some to train a tokenizer on",
            names.join(", ")
        )));
    }
    Ok(texts)
}
