//! What a finished model can do: pictures from prompts, captions of pictures it never saw.

use std::path::Path;

use m6_data::{Rgb8, grid};
use m6_run::Task;

use super::page::{Captioned, Card, DrawnPrompt};
use super::{Clock, PICTURES, Split};
use crate::error::Result;
use crate::eval::{EvalSample, judge, open_shards};
use crate::generate::{DrawRequest, Sampling, draw};
use crate::model::Model;

const PROMPTS: [&str; 12] = [
    "a red heart",
    "dog face, 3D style",
    "rocket, flat style",
    "pizza, noto style",
    "rose",
    "birthday cake, 3D style",
    "红心",
    "猫脸，立体风格",
    "火箭，扁平风格",
    "红苹果，谷歌风格",
    "玫瑰",
    "房子，立体风格",
];
/// Pictures of each prompt.
const COUNT: usize = 4;
const SEED: u64 = 1;
const GUIDANCE: f64 = 3.0;
const GAP: u32 = 4;
/// Pictures captioned of each split.
const CAPTIONED: usize = 12;
const BEAMS: usize = 4;

/// Draws the prompts and writes one strip of pictures for each.
pub(super) fn draw_prompts(model: &Model, out: &Path, clock: &mut Clock) -> Result<Vec<DrawnPrompt>> {
    let request = DrawRequest {
        prompts: PROMPTS.map(str::to_owned).to_vec(),
        count: COUNT,
        best_of: 1,
        seed: SEED,
        sampling: Sampling::default(),
        guidance: GUIDANCE,
    };
    let drawings = clock.time(
        "draw pictures",
        |drawings: &Vec<_>| format!("{} pictures", drawings.len()),
        || {
            let mut task = Task::new("draw pictures", request.codes(model), "codes");
            let drawings = draw(model, &request, |chosen| task.advance(chosen))?;
            task.finish();
            Ok(drawings)
        },
    )?;
    let strip = |(i, (prompt, drawings)): (usize, (&str, &[_]))| {
        let pictures: Vec<Rgb8> =
            drawings.iter().map(|drawing: &crate::generate::Drawing| drawing.picture.clone()).collect();
        let file = format!("{PICTURES}/drawn-{i:02}.png");
        grid(&pictures, COUNT as u32, GAP).save_png(&out.join(&file))?;
        Ok(DrawnPrompt { prompt: prompt.to_owned(), file })
    };
    PROMPTS.into_iter().zip(drawings.chunks(COUNT)).enumerate().map(strip).collect()
}

/// Captions some pictures of a split, evenly spread over it, and writes them out.
pub(super) fn caption_split(
    model: &Model,
    split: &Split,
    shards: &[String],
    out: &Path,
    clock: &mut Clock,
) -> Result<Captioned> {
    let shards = open_shards(shards)?;
    let count = CAPTIONED.min(shards.len());
    let samples = (0..count)
        .map(|i| EvalSample::read(&shards.sample(i * shards.len() / count)?))
        .collect::<Result<Vec<_>>>()?;
    let pairs: Vec<_> = samples.iter().map(|sample| (&sample.picture, &sample.names)).collect();
    let judged = clock.time(
        split.stage,
        |judged: &Vec<_>| format!("{} pictures in two languages", judged.len()),
        || judge(model, &pairs, BEAMS),
    )?;
    let card = |(sample, judged): (&EvalSample, _)| {
        let file = format!("{PICTURES}/{}.png", file_name(&sample.key));
        sample.picture.save_png(&out.join(&file))?;
        Ok(Card { file, style: sample.style.clone(), judged })
    };
    let cards = samples.iter().zip(judged).map(card).collect::<Result<_>>()?;
    Ok(Captioned { note: split.note.to_owned(), cards })
}

/// A sample's key as a file name: keys may hold folders.
fn file_name(key: &str) -> String {
    key.chars().map(|c| if c.is_alphanumeric() || c == '-' { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_plain_file_names() {
        assert_eq!(file_name("noto-1f466"), "noto-1f466");
        assert_eq!(file_name("../a/b c"), "___a_b_c");
    }
}
