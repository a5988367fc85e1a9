//! The probability of given texts, with a picture before them or nothing.

use m6_data::picture::Rgb8;
use m6_data::{Item, RowPacker};
use tch::Kind;

use super::caption::{fit, logprobs};
use crate::error::{Error, Result};
use crate::model::{Language, Mode, Model};
use crate::objectives::{Example, Piece, Target, Task, lay_out};

/// Tokens that go through the transformer at once.
const TOKENS: usize = 8192;

/// Log-probability of each text, its end included, as the caption of the picture beside it.
///
/// # Errors
/// When a text is longer than the model takes, or libtorch refuses an operation.
pub fn score_texts(model: &Model, pairs: &[(&Rgb8, &str)], language: Language) -> Result<Vec<f64>> {
    // The language's token takes one place of the text.
    let limit = model.info.model.max_text as usize - 1;
    let example = |(picture, text): &(&Rgb8, &str)| {
        let ids = ids(model, text)?;
        if ids.len() > limit {
            let n = ids.len();
            return Err(Error::Usage(format!(
                "the text {text:?} has {n} tokens; this model takes at most {limit}"
            )));
        }
        let prefix = vec![Piece::Picture(fit(picture, model)?)];
        Ok(Example { task: Task::Captioning, prefix, target: Target::Text { language, ids } })
    };
    log_probabilities(model, pairs.iter().map(example))
}

/// Perplexity of each text with nothing before it but the token of its script's language: e to the mean of what its
/// tokens and its end cost in nats. Of a text that is longer than the model takes only the begin is looked at, and
/// one without a token is infinitely surprising.
///
/// # Errors
/// When libtorch refuses an operation.
pub fn perplexities(model: &Model, texts: &[String]) -> Result<Vec<f64>> {
    let limit = model.info.model.max_text as usize - 1;
    let mut lengths = Vec::with_capacity(texts.len());
    let mut examples = Vec::with_capacity(texts.len());
    for text in texts {
        let mut ids = ids(model, text)?;
        ids.truncate(limit);
        let is_empty = ids.is_empty();
        let target = Target::Text { language: Language::of(text), ids };
        lengths.push(if is_empty { 0 } else { target.tokens() });
        examples.push(Example { task: Task::LanguageModelling, prefix: Vec::new(), target });
    }
    let scores = log_probabilities(model, examples.into_iter().map(Ok))?;
    let perplexity = |(score, length): (f64, usize)| match length {
        0 => f64::INFINITY,
        length => (-score / length as f64).exp(),
    };
    Ok(scores.into_iter().zip(lengths).map(perplexity).collect())
}

fn ids(model: &Model, text: &str) -> Result<Vec<i64>> {
    Ok(model.tokenizer.encode(text)?.into_iter().map(i64::from).collect())
}

/// Log-probability of the target text of each example, its end included.
fn log_probabilities(model: &Model, examples: impl Iterator<Item = Result<Example>>) -> Result<Vec<f64>> {
    let _guard = tch::no_grad_guard();
    let patches = model.transformer.positions().patches();
    let mut packer = RowPacker::new(TOKENS);
    let mut scores = Vec::new();
    for (ordinal, value) in (0..).zip(examples) {
        let value = value?;
        scores.push(0.0);
        if let Some(row) = packer.push(Item { ordinal, tokens: value.tokens(patches), value }) {
            score_row(model, row, &mut scores)?;
        }
    }
    while let Some(row) = packer.flush() {
        score_row(model, row, &mut scores)?;
    }
    Ok(scores)
}

/// Scores the texts of a row in one pass; the ordinal of each is its place in `scores`.
fn score_row(model: &Model, row: Vec<Item<Example>>, scores: &mut [f64]) -> Result<()> {
    let texts: Vec<_> = row.iter().map(|item| (item.ordinal as usize, item.value.target.tokens())).collect();
    let (vocab, positions) = (model.info.vocab, model.transformer.positions());
    let row = lay_out(vocab, positions, row.into_iter().map(|item| item.value), None)?;
    let batch = row.upload(model.params.device())?;
    let (tokens, pictures) = (&batch.tokens, batch.pictures.as_ref());
    let hidden = model.transformer.forward(tokens, pictures, &batch.layout, batch.real, Mode::Infer)?;
    let logprobs = logprobs(model, &hidden.x_nd.index_select(0, &batch.texts.rows));
    let chosen = logprobs.gather(1, &batch.texts.labels.unsqueeze(-1), false).squeeze_dim(1);
    let chosen =
        Vec::<f64>::try_from(chosen.to_kind(Kind::Double)).map_err(m6_runtime::RuntimeError::from)?;
    let mut rest = chosen.as_slice();
    for (place, length) in texts {
        let (text, later) = rest.split_at(length);
        scores[place] = text.iter().sum();
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::testing::{picture, tiny_model};

    #[test]
    fn perplexities_do_not_depend_on_the_texts_beside_and_are_of_the_words_alone() {
        let model = tiny_model();
        let texts = ["heart", "红", "", "many more letters than fit"].map(str::to_owned);
        let together = perplexities(&model, &texts).unwrap();
        for (text, together) in texts.iter().zip(&together) {
            let alone = perplexities(&model, std::slice::from_ref(text)).unwrap()[0];
            assert!(
                alone == *together || (alone / together - 1.0).abs() < 1e-4,
                "{text}: {alone} {together}"
            );
        }
        assert!(together[2].is_infinite() && together.iter().all(|&value| value > 1.0));
        // A byte-level model that has not learnt anything is unsure among its 256 tokens and the end.
        assert!((100.0..700.0).contains(&together[0]), "{together:?}");
        let with_picture = score_texts(&model, &[(&picture(1), "heart")], Language::En).unwrap()[0];
        assert!(((-with_picture / 6.0).exp() / together[0] - 1.0).abs() > 1e-6);
    }
}
