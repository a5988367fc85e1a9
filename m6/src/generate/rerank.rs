//! The best of several drawings by the model's own captioner (the post-selection of CogView, Ding et al. 2021,
//! section 3.4): no second model is needed to match words and pictures.

use m6_data::picture::Rgb8;

use super::drawing::Drawing;
use super::score::score_texts;
use crate::error::Result;
use crate::model::{Language, Model};

/// How well each picture shows the text beside it: the log-probability of the text as the picture's caption, in the
/// language of its script; 0 for an empty text. Comparable between pictures of one text only.
///
/// # Errors
/// When a text is longer than the model takes, or libtorch refuses an operation.
fn fidelity(model: &Model, pairs: &[(&Rgb8, &str)]) -> Result<Vec<f64>> {
    let mut scores = vec![0.0; pairs.len()];
    for language in [Language::En, Language::Zh] {
        let is_here = |text: &str| !text.is_empty() && Language::of(text) == language;
        let here: Vec<usize> = (0..pairs.len()).filter(|&i| is_here(pairs[i].1)).collect();
        let of_language: Vec<_> = here.iter().map(|&i| pairs[i]).collect();
        for (i, score) in here.into_iter().zip(score_texts(model, &of_language, language)?) {
            scores[i] = score;
        }
    }
    Ok(scores)
}

/// Of each `n` drawings that follow each other the one that shows its prompt best, the first where they are equal.
pub(super) fn best_of_each(model: &Model, drawings: Vec<Drawing>, n: usize) -> Result<Vec<Drawing>> {
    if n == 1 {
        return Ok(drawings);
    }
    let pairs: Vec<_> = drawings.iter().map(|drawing| (&drawing.picture, drawing.prompt.trim())).collect();
    let scores = fidelity(model, &pairs)?;
    let mut best: Vec<(f64, Drawing)> = Vec::with_capacity(drawings.len() / n);
    for (i, (score, drawing)) in scores.into_iter().zip(drawings).enumerate() {
        match best.last_mut().filter(|_| i % n > 0) {
            None => best.push((score, drawing)),
            Some(last) if score > last.0 => *last = (score, drawing),
            Some(_) => {}
        }
    }
    Ok(best.into_iter().map(|(_, drawing)| drawing).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::testing::{picture, tiny_model};

    fn drawing(prompt: &str, seed: u8) -> Drawing {
        Drawing {
            prompt: prompt.to_owned(),
            seed: u64::from(seed),
            codes: Vec::new(),
            picture: picture(seed),
        }
    }

    #[test]
    fn the_likeliest_drawing_of_each_prompt_is_kept() {
        let model = tiny_model();
        let _guard = tch::no_grad_guard();
        let drawings: Vec<Drawing> = ["a red heart", " 红心 ", ""]
            .iter()
            .flat_map(|prompt| (0..5).map(|seed| drawing(prompt, seed)))
            .collect();
        let best = best_of_each(&model, drawings.clone(), 5).unwrap();
        let likeliest = |text: &str, language| {
            let pictures: Vec<Rgb8> = (0..5).map(picture).collect();
            let pairs: Vec<_> = pictures.iter().map(|picture| (picture, text)).collect();
            let scores = score_texts(&model, &pairs, language).unwrap();
            (0..5).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap() as u64
        };
        let expected = [likeliest("a red heart", Language::En), likeliest("红心", Language::Zh), 0];
        assert_eq!(best.iter().map(|drawing| drawing.seed).collect::<Vec<_>>(), expected);
        assert_eq!(best.iter().map(|d| d.prompt.as_str()).collect::<Vec<_>>(), ["a red heart", " 红心 ", ""]);
        let all = best_of_each(&model, drawings, 1).unwrap();
        assert_eq!(all.len(), 15);
    }
}
