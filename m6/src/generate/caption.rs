//! Captions of pictures: greedy and beam search, and the probability of a given text.
//!
//! Every probability here is over the tokens that a caption may hold, which are the text tokenizer's and the end of
//! the text; the other special tokens are masked out.

use m6_data::picture::Rgb8;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::cache::KvCache;
use crate::error::{Error, Result};
use crate::model::{Language, Mode, Model, Sequence, Special, Vocab};
use crate::objectives::{Example, Piece, Target, Task};
use crate::train::Packer;

/// Rows that go through the transformer at once.
const ROWS: usize = 64;
/// Tokens that a batch of texts to score may hold.
const SCORE_TOKENS: usize = 8192;
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
/// their mean log-probability a token (the end counts as one; Wu et al. 2016, equation 14 with exponent 1). It ends
/// when as many are finished and no unfinished one has a better mean so far, or at `max_tokens` tokens, or at the
/// longest text that the model knows.
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
        captions.extend(search(model, pictures, &languages, beams, max_tokens)?);
    }
    Ok(captions)
}

/// Log-probability of each text, its end included, as the caption of the picture beside it.
///
/// # Errors
/// When a text is longer than the model takes, or libtorch refuses an operation.
pub fn score_texts(model: &Model, pairs: &[(&Rgb8, &str)], language: Language) -> Result<Vec<f64>> {
    let _guard = tch::no_grad_guard();
    let (vocab, positions) = (model.info.vocab, model.transformer.positions());
    let patches = (positions.patch_grid * positions.patch_grid) as usize;
    // The language's token takes one place of the text.
    let limit = model.info.model.max_text as usize - 1;
    let mut packer = Packer::new(vocab, positions, SCORE_TOKENS);
    let mut scores = Vec::with_capacity(pairs.len());
    let mut lengths = Vec::new();
    for (picture, text) in pairs {
        let ids: Vec<i64> = model.tokenizer.encode(text)?.into_iter().map(i64::from).collect();
        if ids.len() > limit {
            let n = ids.len();
            return Err(Error::Usage(format!(
                "the text {text:?} has {n} tokens; this model takes at most {limit}"
            )));
        }
        let prefix = vec![Piece::Picture(fit(picture, model)?)];
        let example = Example { task: Task::Captioning, prefix, target: Target::Text { language, ids } };
        let tokens = example.target.tokens();
        debug_assert!(example.tokens(patches) <= SCORE_TOKENS);
        if let Some(example) = packer.push(example) {
            score_row(model, &mut packer, &mut lengths, &mut scores)?;
            packer.push(example);
        }
        lengths.push(tokens);
    }
    if !packer.is_empty() {
        score_row(model, &mut packer, &mut lengths, &mut scores)?;
    }
    Ok(scores)
}

/// Scores the packed texts of these lengths in one pass.
fn score_row(
    model: &Model,
    packer: &mut Packer,
    lengths: &mut Vec<usize>,
    scores: &mut Vec<f64>,
) -> Result<()> {
    let device = model.params.device();
    let batch = packer.finish(device)?;
    let (tokens, pictures) = (&batch.tokens, batch.pictures.as_ref());
    let hidden = model.transformer.forward(tokens, pictures, &batch.layout, batch.real, Mode::Infer)?;
    let logprobs = logprobs(model, &hidden.x_nd.index_select(0, &batch.texts.rows));
    let chosen = logprobs.gather(1, &batch.texts.labels.unsqueeze(-1), false).squeeze_dim(1);
    let chosen =
        Vec::<f64>::try_from(chosen.to_kind(Kind::Double)).map_err(m6_runtime::RuntimeError::from)?;
    let mut rest = chosen.as_slice();
    for length in lengths.drain(..) {
        let (text, later) = rest.split_at(length);
        scores.push(text.iter().sum());
        rest = later;
    }
    Ok(())
}

/// The picture on a white square, scaled to what the model's patches are made for.
fn fit(picture: &Rgb8, model: &Model) -> Result<Rgb8> {
    let side = picture.width.max(picture.height);
    let resolution = model.info.model.patches.resolution as u32;
    if picture.width == picture.height {
        return Ok(picture.resize(resolution, resolution)?);
    }
    let mut square = Rgb8::filled(side, side, WHITE);
    square.paste(picture, (side - picture.width) / 2, (side - picture.height) / 2);
    Ok(square.resize(resolution, resolution)?)
}

/// `[m, d]` hidden rows to log-probabilities `[m, text rows]`, minus infinity where no caption may go.
fn logprobs(model: &Model, hidden: &Tensor) -> Tensor {
    let logits = model.transformer.text_logits(hidden);
    let vocab = model.info.vocab;
    let illegal: Vec<bool> = (0..vocab.text_rows()).map(|id| !is_legal(vocab, id)).collect();
    let illegal = Tensor::from_slice(&illegal).to_device(logits.device());
    logits.masked_fill(&illegal, f64::NEG_INFINITY).log_softmax(-1, Kind::Float)
}

fn is_legal(vocab: Vocab, id: i64) -> bool {
    id < vocab.text || id == vocab.special(Special::EndOfText)
}

/// A text under way or finished: its ids without the end, and the sum over its tokens.
#[derive(Debug, Clone)]
struct Hypothesis {
    ids: Vec<i64>,
    logprob: f64,
    finished: bool,
}

impl Hypothesis {
    /// Mean log-probability a token.
    fn score(&self) -> f64 {
        let tokens = self.ids.len() + usize::from(self.finished);
        self.logprob / tokens.max(1) as f64
    }
}

/// The search for the captions of one picture in one language.
#[derive(Debug)]
struct Search {
    live: Vec<Hypothesis>,
    finished: Vec<Hypothesis>,
}

/// A way to go on: from hypothesis `parent` with token `id` to the sum `logprob`.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    parent: usize,
    id: i64,
    logprob: f64,
}

impl Search {
    fn new() -> Self {
        let start = Hypothesis { ids: Vec::new(), logprob: 0.0, finished: false };
        Self { live: vec![start], finished: Vec::new() }
    }

    /// Takes the best `beams` candidates that go on; those that end count if they are among the best `beams` of
    /// all, which makes one beam greedy. Returns the parent of each hypothesis that lives on.
    fn advance(&mut self, mut candidates: Vec<Candidate>, end: i64, beams: usize) -> Vec<usize> {
        candidates.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
        let (mut parents, mut live) = (Vec::with_capacity(beams), Vec::with_capacity(beams));
        for (rank, candidate) in candidates.into_iter().enumerate() {
            let mut ids = self.live[candidate.parent].ids.clone();
            if candidate.id != end && live.len() < beams {
                ids.push(candidate.id);
                live.push(Hypothesis { ids, logprob: candidate.logprob, finished: false });
                parents.push(candidate.parent);
            } else if candidate.id == end && rank < beams {
                self.finished.push(Hypothesis { ids, logprob: candidate.logprob, finished: true });
            }
        }
        self.live = live;
        self.rank(beams);
        parents
    }

    fn rank(&mut self, beams: usize) {
        self.finished.sort_by(|a, b| b.score().total_cmp(&a.score()));
        self.finished.truncate(beams);
    }

    fn is_done(&self, beams: usize) -> bool {
        let best_live = self.live.iter().map(Hypothesis::score).fold(f64::NEG_INFINITY, f64::max);
        self.finished.len() == beams && self.finished.iter().all(|text| text.score() >= best_live)
    }
}

/// Searches all pictures and languages in step, `beams` rows for each.
fn search(
    model: &Model,
    pictures: &[Rgb8],
    languages: &[Language],
    beams: usize,
    max_tokens: usize,
) -> Result<Vec<Vec<Caption>>> {
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
        let hidden = cache.step(transformer, &tokens.to_device(device))?;
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

    let captions = searches.into_iter().zip(languages.iter().cycle()).map(|(mut search, &language)| {
        // Texts that were cut fill up where too few found their end.
        let missing = beams - search.finished.len();
        search.live.sort_by(|a, b| b.score().total_cmp(&a.score()));
        search.finished.extend(search.live.drain(..).take(missing));
        search.rank(beams);
        search.finished.into_iter().map(|text| to_caption(model, language, text)).collect::<Result<Vec<_>>>()
    });
    let captions: Vec<Vec<Caption>> = captions.collect::<Result<_>>()?;
    Ok(captions.chunks(languages.len()).map(<[_]>::concat).collect())
}

fn to_caption(model: &Model, language: Language, hypothesis: Hypothesis) -> Result<Caption> {
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
    use crate::generate::testing::{SIDE, picture, tiny_model};

    /// Log-probability of ids as a caption, cut or ended, from the packed training pass.
    fn packed_logprob(model: &Model, picture: &Rgb8, language: Language, ids: &[i64], ended: bool) -> f64 {
        let _guard = tch::no_grad_guard();
        let positions = model.transformer.positions();
        let mut packer = Packer::new(model.info.vocab, positions, SCORE_TOKENS);
        let target = Target::Text { language, ids: ids.to_vec() };
        let prefix = vec![Piece::Picture(picture.clone())];
        assert!(packer.push(Example { task: Task::Captioning, prefix, target }).is_none());
        let batch = packer.finish(Device::Cpu).unwrap();
        let (tokens, pictures) = (&batch.tokens, batch.pictures.as_ref());
        let hidden =
            model.transformer.forward(tokens, pictures, &batch.layout, batch.real, Mode::Infer).unwrap();
        let logprobs = logprobs(model, &hidden.x_nd.index_select(0, &batch.texts.rows));
        let chosen = logprobs.gather(1, &batch.texts.labels.unsqueeze(-1), false);
        chosen.narrow(0, 0, (ids.len() + usize::from(ended)) as i64).sum(Kind::Double).double_value(&[])
    }

    #[test]
    fn greedy_takes_the_most_likely_token_at_every_place() {
        let model = tiny_model();
        let pictures = [picture(1), picture(2), picture(5)];
        let vocab = model.info.vocab;
        let captions = caption(&model, &pictures, None, 1, 6).unwrap();
        for (picture, captions) in pictures.iter().zip(&captions) {
            assert_eq!(captions.iter().map(|c| c.language).collect::<Vec<_>>(), [Language::En, Language::Zh]);
            for found in captions {
                let (mut ids, mut logprob, mut ended) = (Vec::new(), 0.0, false);
                while ids.len() < 6 && !ended {
                    let mut tokens: Vec<i64> = (0..vocab.text).collect();
                    tokens.push(vocab.special(Special::EndOfText));
                    let after = |id: i64| {
                        let ended = id == vocab.special(Special::EndOfText);
                        let longer = if ended { ids.clone() } else { [ids.as_slice(), &[id]].concat() };
                        packed_logprob(&model, picture, found.language, &longer, ended)
                    };
                    let best =
                        tokens.into_iter().map(|id| (id, after(id))).max_by(|a, b| a.1.total_cmp(&b.1));
                    let (id, best) = best.unwrap();
                    logprob = best;
                    ended = id == vocab.special(Special::EndOfText);
                    if !ended {
                        ids.push(id);
                    }
                }
                let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
                assert_eq!(found.text, model.tokenizer.decode(&ids).unwrap());
                assert!((found.logprob - logprob).abs() < 1e-3, "{} against {logprob}", found.logprob);
            }
        }
    }

    #[test]
    fn beams_are_ranked_by_their_mean_and_no_worse_than_greedy() {
        let model = tiny_model();
        let pictures = [picture(1), picture(2)];
        let greedy = caption(&model, &pictures, Some(Language::Zh), 1, 4).unwrap();
        let wide = caption(&model, &pictures, Some(Language::Zh), 16, 4).unwrap();
        for (greedy, wide) in greedy.iter().zip(&wide) {
            assert_eq!(wide.len(), 16);
            assert!(
                wide[0].logprob / 4.0 >= greedy[0].logprob / 4.0 - 1e-4 || wide[0].text != greedy[0].text
            );
        }
    }

    #[test]
    fn an_end_out_of_the_best_beams_does_not_count() {
        const END: i64 = 9;
        let candidates = |all: &[(i64, f64)]| {
            all.iter().map(|&(id, logprob)| Candidate { parent: 0, id, logprob }).collect::<Vec<_>>()
        };
        let mut search = Search::new();
        let parents = search.advance(candidates(&[(1, -1.0), (END, -2.0), (2, -3.0)]), END, 1);
        assert_eq!((parents, search.finished.len()), (vec![0], 0));
        assert_eq!(search.live[0].ids, [1]);
        search.advance(candidates(&[(END, -1.5), (3, -1.6)]), END, 1);
        assert_eq!(search.finished[0].ids, [1]);
        assert!(search.is_done(1));
    }

    #[test]
    fn the_mean_ranks_and_a_better_unfinished_text_keeps_the_search_going() {
        let text =
            |tokens: usize, logprob: f64, finished| Hypothesis { ids: vec![0; tokens], logprob, finished };
        let mut search = Search {
            live: vec![text(3, -2.0, false)],
            finished: vec![text(1, -2.0, true), text(3, -3.0, true)],
        };
        search.rank(2);
        assert_eq!(search.finished[0].ids.len(), 3, "-3/4 is above -2/2");
        assert!(!search.is_done(2), "-2/3 may still beat -1");
        search.live[0].logprob = -3.1;
        assert!(search.is_done(2));
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
            let expected = packed_logprob(&model, picture, Language::En, &ids, true);
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
