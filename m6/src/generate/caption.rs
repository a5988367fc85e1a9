//! Captions of pictures: greedy and beam search.
//!
//! Every probability here is over the tokens that a caption may hold, which are the text tokenizer's and the end of
//! the text; the other special tokens are masked out.

use m6_data::picture::Rgb8;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::beam::{Candidate, Hypothesis, Search};
use super::cache::KvCache;
use crate::error::{Error, Result};
use crate::model::{Language, Model, Sequence, Special, Vocab};
use crate::objectives::Piece;

/// Rows that go through the transformer at once.
const ROWS: usize = 64;
const WHITE: [u8; 3] = [255; 3];

/// A text that the model wrote about a picture.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Caption {
    /// Its language.
    pub language: Language,
    /// The text.
    pub text: String,
    /// Sum of the log-probabilities of its tokens, the end included (where it did not have to be cut).
    pub logprob: f64,
}

/// Captions of each picture, at most `beams` for each language, the best first; without a `language` English ones
/// and then Chinese ones.
///
/// With one beam the search is greedy. With more it keeps that many unfinished texts, and ranks finished ones by
/// their mean log-probability a token (the end counts as one). It ends when as many are finished and no unfinished
/// one has a better mean so far, or at `max_tokens` tokens, or at the longest text that the model knows; texts that
/// were cut there come after the finished ones.
///
/// # Errors
/// When `beams` or `max_tokens` is zero, or libtorch refuses an operation.
pub fn caption(
    model: &Model,
    pictures: &[Rgb8],
    language: Option<Language>,
    beams: usize,
    max_tokens: usize,
) -> Result<Vec<Vec<Caption>>> {
    let _guard = tch::no_grad_guard();
    let choices = model.info.vocab.text as usize;
    if beams == 0 || beams > choices {
        return Err(Error::Usage(format!("--beams {beams}: expected 1 to {choices}")));
    }
    if max_tokens == 0 {
        return Err(Error::Usage("0 tokens a caption: expected 1 or more".into()));
    }
    let languages = language.map_or(vec![Language::En, Language::Zh], |language| vec![language]);
    let max_tokens = max_tokens.min(model.info.model.max_text as usize);
    let batch = (ROWS / (languages.len() * beams)).max(1);
    let mut captions = Vec::with_capacity(pictures.len());
    for pictures in pictures.chunks(batch) {
        let found = search(model, pictures, &languages, beams, max_tokens)?;
        for of_picture in found.chunks(languages.len()) {
            let pairs = languages.iter().zip(of_picture);
            let of_picture = pairs.flat_map(|(&language, texts)| {
                texts.iter().map(move |text| to_caption(model, language, text))
            });
            captions.push(of_picture.collect::<Result<_>>()?);
        }
    }
    Ok(captions)
}

/// The picture scaled to what the model's patches are made for, its long side to the whole side, on a white square.
pub(super) fn fit(picture: &Rgb8, model: &Model) -> Result<Rgb8> {
    let resolution = model.resolution() as u32;
    let long_side = u64::from(picture.width.max(picture.height));
    let scaled = |side: u32| ((u64::from(side) * u64::from(resolution)).div_ceil(long_side)).max(1) as u32;
    let small = picture.resize(scaled(picture.width), scaled(picture.height))?;
    let mut square = Rgb8::filled(resolution, resolution, WHITE);
    square.paste(&small, (resolution - small.width) / 2, (resolution - small.height) / 2);
    Ok(square)
}

/// `[m, d]` hidden rows to log-probabilities `[m, text rows]`, minus infinity where no caption may go.
pub(super) fn logprobs(model: &Model, hidden: &Tensor) -> Tensor {
    let logits = model.transformer.text_logits(hidden);
    let vocab = model.info.vocab;
    let illegal: Vec<bool> = (0..vocab.text_rows()).map(|id| !is_legal(vocab, id)).collect();
    let illegal = Tensor::from_slice(&illegal).to_device(logits.device());
    logits.masked_fill(&illegal, f64::NEG_INFINITY).log_softmax(-1, Kind::Float)
}

fn is_legal(vocab: Vocab, id: i64) -> bool {
    id < vocab.text || id == vocab.special(Special::EndOfText)
}

/// Searches all languages of all pictures in step, `beams` rows for each; the outer order is that of the pictures.
fn search(
    model: &Model,
    pictures: &[Rgb8],
    languages: &[Language],
    beams: usize,
    max_tokens: usize,
) -> Result<Vec<Vec<Hypothesis>>> {
    let (vocab, transformer, device) = (model.info.vocab, &model.transformer, model.params.device());
    let end = vocab.special(Special::EndOfText);
    let prefixes: Vec<Vec<Piece>> = pictures
        .iter()
        .map(|picture| Ok(vec![Piece::Picture(fit(picture, model)?)]))
        .collect::<Result<_>>()?;
    let mut cache = KvCache::prefill(transformer, device, &prefixes, max_tokens as i64)?;
    let rows_each = languages.len() * beams;
    cache.select(&(0..pictures.len() * rows_each).map(|row| (row / rows_each) as i64).collect::<Vec<_>>());
    let mut searches: Vec<Search> = (0..pictures.len() * languages.len()).map(|_| Search::new()).collect();

    for place in 0..max_tokens {
        let mut tokens = Sequence::new(vocab, transformer.positions());
        for (search, language) in searches.iter().zip(languages.iter().cycle()) {
            for row in 0..beams {
                // Where fewer texts are under way than rows, the last row is run more than once.
                let text = &search.live[row.min(search.live.len() - 1)];
                let last = text.ids.last().copied().unwrap_or(vocab.special(language.start()));
                tokens.target_text(&[last], place as i64);
            }
        }
        let hidden = cache.step(transformer, &tokens.to_device(device)?)?;
        let best = Best::of(&logprobs(model, &hidden), 2 * beams)?;
        let mut order = Vec::with_capacity(searches.len() * beams);
        for (index, search) in searches.iter_mut().enumerate() {
            let first = index * beams;
            if search.is_done(beams) {
                order.extend((0..beams).map(|row| (first + row) as i64));
                continue;
            }
            let candidates = search.live.iter().enumerate().flat_map(|(parent, text)| {
                let logprob = text.logprob;
                best.row(first + parent).map(move |(id, step)| Candidate {
                    parent,
                    id,
                    logprob: logprob + step,
                })
            });
            let parents = search.advance(candidates.collect(), end, beams);
            order.extend((0..beams).map(|row| (first + parents[row.min(parents.len() - 1)]) as i64));
        }
        if searches.iter().all(|search| search.is_done(beams)) {
            break;
        }
        if order.iter().enumerate().any(|(row, &from)| row as i64 != from) {
            cache.select(&order);
        }
    }

    Ok(searches.into_iter().map(|search| search.into_ranked(beams)).collect())
}

fn to_caption(model: &Model, language: Language, hypothesis: &Hypothesis) -> Result<Caption> {
    let ids: Vec<u32> = hypothesis.ids.iter().map(|&id| id as u32).collect();
    Ok(Caption { language, text: model.tokenizer.decode(&ids)?, logprob: hypothesis.logprob })
}

/// The most likely tokens of each row, on the host.
struct Best {
    ids: Vec<i64>,
    logprobs: Vec<f64>,
    each: usize,
}

impl Best {
    fn of(logprobs: &Tensor, each: usize) -> Result<Self> {
        let each = each.min(logprobs.size()[1] as usize);
        let (logprobs, ids) = logprobs.topk(each as i64, -1, true, true);
        let torch = m6_runtime::RuntimeError::from;
        let logprobs = logprobs.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, 1);
        Ok(Self {
            ids: Vec::try_from(ids.flatten(0, 1)).map_err(torch)?,
            logprobs: Vec::try_from(logprobs).map_err(torch)?,
            each,
        })
    }

    /// Tokens and log-probabilities of a row.
    fn row(&self, row: usize) -> impl Iterator<Item = (i64, f64)> {
        let range = row * self.each..(row + 1) * self.each;
        self.ids[range.clone()].iter().copied().zip(self.logprobs[range].iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::score_texts;
    use crate::generate::testing::{SIDE, picture, tiny_model};
    use crate::model::Mode;
    use crate::objectives::{Example, Target, Task, lay_out};

    /// Log-probabilities `[n + 1, text rows]` of what comes at each place of ids and after them, from the packed
    /// training pass.
    fn packed_logprobs(model: &Model, picture: &Rgb8, language: Language, ids: &[i64]) -> Tensor {
        let _guard = tch::no_grad_guard();
        let target = Target::Text { language, ids: ids.to_vec() };
        let prefix = vec![Piece::Picture(picture.clone())];
        let example = Example { task: Task::Captioning, prefix, target };
        let row = lay_out(model.info.vocab, model.transformer.positions(), [example], None).unwrap();
        let batch = row.upload(Device::Cpu).unwrap();
        let (tokens, pictures) = (&batch.tokens, batch.pictures.as_ref());
        let hidden =
            model.transformer.forward(tokens, pictures, &batch.layout, batch.real, Mode::Infer).unwrap();
        logprobs(model, &hidden.x_nd.index_select(0, &batch.texts.rows))
    }

    /// The sum over ids and, where they are finished, their end.
    fn packed_sum(model: &Model, picture: &Rgb8, language: Language, ids: &[i64], finished: bool) -> f64 {
        let logprobs = packed_logprobs(model, picture, language, ids);
        let end = finished.then(|| model.info.vocab.special(Special::EndOfText));
        let chosen = ids.iter().copied().chain(end).enumerate();
        chosen.map(|(place, id)| logprobs.double_value(&[place as i64, id])).sum()
    }

    #[test]
    fn greedy_takes_the_most_likely_token_at_every_place() {
        let model = tiny_model();
        let end = model.info.vocab.special(Special::EndOfText);
        let pictures = [picture(1), picture(2), picture(5)];
        let languages = [Language::En, Language::Zh];
        let found = search(&model, &pictures, &languages, 1, 6).unwrap();
        for (i, found) in found.iter().enumerate() {
            let mut ids = Vec::new();
            while ids.len() < 6 {
                let logprobs = packed_logprobs(&model, &pictures[i / 2], languages[i % 2], &ids);
                match logprobs.get(-1).argmax(None, false).int64_value(&[]) {
                    id if id == end => break,
                    id => ids.push(id),
                }
            }
            assert_eq!(found[0].ids, ids);
        }
    }

    #[test]
    fn every_hypothesis_has_the_probability_of_the_training_pass() {
        let model = tiny_model();
        let pictures = [picture(1), picture(4)];
        let found = search(&model, &pictures, &[Language::Zh], 5, 7).unwrap();
        for (picture, found) in pictures.iter().zip(&found) {
            assert_eq!(found.len(), 5);
            for text in found {
                let expected = packed_sum(&model, picture, Language::Zh, &text.ids, text.finished);
                assert!((text.logprob - expected).abs() < 1e-3, "{text:?}, expected {expected}");
            }
        }
    }

    #[test]
    fn captions_come_language_by_language() {
        let model = tiny_model();
        let both = caption(&model, &[picture(1), picture(2)], None, 2, 4).unwrap();
        let zh = caption(&model, &[picture(2)], Some(Language::Zh), 2, 4).unwrap();
        let languages: Vec<Language> = both[1].iter().map(|c| c.language).collect();
        assert_eq!(languages, [Language::En, Language::En, Language::Zh, Language::Zh]);
        assert_eq!(both[1][2].text, zh[0][0].text);
    }

    #[test]
    fn a_text_scores_what_its_caption_did() {
        let model = tiny_model();
        let pictures = [picture(1), picture(3)];
        let texts = ["heart", "红", ""];
        let pairs: Vec<(&Rgb8, &str)> = pictures.iter().flat_map(|p| texts.map(|t| (p, t))).collect();
        let scores = score_texts(&model, &pairs, Language::En).unwrap();
        for ((picture, text), score) in pairs.iter().zip(scores) {
            let ids: Vec<i64> = model.tokenizer.encode(text).unwrap().into_iter().map(i64::from).collect();
            let expected = packed_sum(&model, picture, Language::En, &ids, true);
            assert!((score - expected).abs() < 1e-3, "{text}: {score} against {expected}");
        }
        let long = score_texts(&model, &[(&pictures[0], "sixteen letters.")], Language::En).unwrap_err();
        assert_eq!(
            long.to_string(),
            "the text \"sixteen letters.\" has 16 tokens; this model takes at most 15"
        );
    }

    #[test]
    fn a_wide_picture_is_put_on_a_white_square() {
        let model = tiny_model();
        let fitted = fit(&Rgb8::filled(4 * SIDE, 2 * SIDE, [0; 3]), &model).unwrap();
        assert_eq!((fitted.width, fitted.height), (SIDE, SIDE));
        let pixel = |row: u32| fitted.pixels[(row * SIDE * 3) as usize];
        assert_eq!([pixel(0), pixel(SIDE / 2), pixel(SIDE - 1)], [255, 0, 255]);
    }

    #[test]
    fn no_beam_and_no_token_are_wrong_use() {
        let model = tiny_model();
        let error = caption(&model, &[], None, 0, 4).unwrap_err();
        assert_eq!(error.to_string(), "--beams 0: expected 1 to 256");
        assert!(caption(&model, &[], None, 1, 0).is_err());
    }
}
