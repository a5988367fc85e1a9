//! Do drawn pictures show what the prompt asked for, and are they more than copies of training pictures?

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use m6_data::caption::text;
use m6_data::{CaptionFields, FlawClass, Rgb8, ShardSet, contact_sheet};
use m6_run::{Task, write_atomic};
use serde::Serialize;

use super::captions::{judge, scores};
use super::features::FeatureSpace;
use super::names::{ByLanguage, Judged, NameScores};
use super::reference::{Placed, Reference, SpaceReport};
use super::retrieval::{Memorisation, Ranks};
use super::samples::{EvalSample, json_field, open_shards, read_all};
use crate::error::Result;
use crate::generate::{DrawRequest, Drawing, Sampling, draw};
use crate::model::Model;
use crate::table::{percent, table};

/// Samples on a contact sheet.
const SHEET_SAMPLES: usize = 48;
const SHEET_COLUMNS: usize = 8;
const SHEET_TILE: u32 = 128;

/// What to draw, compare and write.
#[derive(Debug, Clone)]
pub struct PicturesRequest {
    /// Held-out shards.
    pub shards: Vec<String>,
    /// Training shards, for memorisation and for more candidates.
    pub train: Vec<String>,
    /// Prompts as templates over the samples' JSON keys, such as `{en}, {style_en} style`; each is scored on its own.
    pub prompts: Vec<String>,
    /// Pictures among which the true one is to be found, itself included.
    pub candidates: usize,
    /// Draws the first samples only.
    pub limit: Option<usize>,
    /// Drawings of which the one that the model finds best becomes the picture.
    pub best_of: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// How codes are chosen.
    pub sampling: Sampling,
    /// Seed of every picture, and of the choice of candidates.
    pub seed: u64,
    /// Folder for `pictures.jsonl` and a contact sheet for each prompt.
    pub out: Option<PathBuf>,
}

/// Scores of each prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PicturesReport {
    /// Samples, each drawn once for each prompt.
    pub samples: usize,
    /// Pictures among which the true one is to be found.
    pub candidates: usize,
    /// Share that chance would find.
    pub chance: f64,
    /// One for each prompt.
    pub prompts: Vec<PromptReport>,
}

/// Scores of the pictures drawn from one prompt template.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PromptReport {
    /// The template.
    pub prompt: String,
    /// Wall time of drawing, per picture.
    pub seconds_per_picture: f64,
    /// By feature space.
    pub spaces: BTreeMap<FeatureSpace, SpaceReport>,
    /// How often the model's own caption of what it drew is the true name.
    pub round_trip: ByLanguage<Option<NameScores>>,
}

/// A line of `pictures.jsonl`.
#[derive(Debug, Serialize)]
struct Row<'a> {
    key: &'a str,
    style: Option<&'a str>,
    prompt: &'a str,
    seed: u64,
    spaces: BTreeMap<FeatureSpace, Placed>,
    #[serde(flatten)]
    captions: &'a ByLanguage<Option<Judged>>,
}

impl PicturesRequest {
    fn drawing(&self, prompts: Vec<String>) -> DrawRequest {
        let Self { best_of, sampling, guidance, seed, .. } = *self;
        DrawRequest { prompts, count: 1, best_of, seed, sampling, guidance }
    }
}

/// Draws a picture for each sample and prompt and scores it.
///
/// # Errors
/// When data or a setting is wrong, there are too few candidates, or a file cannot be written.
pub fn pictures(model: &Model, request: &PicturesRequest) -> Result<PicturesReport> {
    request.drawing(Vec::new()).validate()?;
    let shards = open_shards(&request.shards)?;
    let samples = read_all(&shards, request.limit)?;
    let prompts = request
        .prompts
        .iter()
        .map(|template| fill(&shards, template, samples.len()))
        .collect::<Result<Vec<Vec<String>>>>()?;
    let train = if request.train.is_empty() { None } else { Some(open_shards(&request.train)?) };
    let reference = Reference::read(model, &shards, train.as_ref(), request.candidates, request.seed)?;

    let mut reports = Vec::with_capacity(prompts.len());
    let mut rows = String::new();
    for (number, (template, prompts)) in (1..).zip(request.prompts.iter().zip(prompts)) {
        let (drawings, seconds) = draw_all(model, prompts, request)?;
        let drawn: Vec<Rgb8> = drawings.iter().map(|drawing| drawing.picture.clone()).collect();
        let mut placed: Vec<BTreeMap<FeatureSpace, Placed>> = vec![BTreeMap::new(); drawn.len()];
        let mut spaces = BTreeMap::new();
        for space in FeatureSpace::ALL {
            let (report, in_space) = reference.score(space, model, &drawn)?;
            spaces.insert(space, report);
            for (all, here) in placed.iter_mut().zip(in_space) {
                all.insert(space, here);
            }
        }
        let pairs: Vec<_> = drawn.iter().zip(samples.iter().map(|sample| &sample.names)).collect();
        let captions = judge(model, &pairs, 1)?;
        reports.push(PromptReport {
            prompt: template.clone(),
            seconds_per_picture: seconds / drawn.len() as f64,
            spaces,
            round_trip: scores(captions.iter()),
        });
        if let Some(out) = &request.out {
            sheet(&samples, &drawings, &captions)?.save_png(&out.join(format!("pictures-{number}.png")))?;
            for (((sample, drawing), spaces), captions) in
                samples.iter().zip(&drawings).zip(placed).zip(&captions)
            {
                let (key, style) = (sample.key.as_str(), sample.style.as_deref());
                let row = Row { key, style, prompt: &drawing.prompt, seed: drawing.seed, spaces, captions };
                rows += &serde_json::to_string(&row).expect("plain values become JSON");
                rows.push('\n');
            }
        }
    }
    if let Some(out) = &request.out {
        write_atomic(out.join("pictures.jsonl"), rows.as_bytes())?;
    }
    Ok(PicturesReport {
        samples: samples.len(),
        candidates: request.candidates,
        chance: 1.0 / request.candidates as f64,
        prompts: reports,
    })
}

/// The prompt of each of the first `count` samples.
fn fill(shards: &ShardSet, template: &str, count: usize) -> Result<Vec<String>> {
    let fields = CaptionFields::new(vec![json_field(None, Some(template))])?;
    let field = &fields.fields()[0];
    let prompt = |index| {
        let sample = shards.sample(index)?;
        let missing = || {
            sample
                .error(FlawClass::MissingMember, format!("its JSON lacks a key of the prompt \"{template}\""))
        };
        Ok(text(&sample, field)?.ok_or_else(missing)?)
    };
    (0..count).map(prompt).collect()
}

/// One drawing for each prompt, and how long they took.
fn draw_all(model: &Model, prompts: Vec<String>, request: &PicturesRequest) -> Result<(Vec<Drawing>, f64)> {
    let request = request.drawing(prompts);
    let mut task = Task::new("draw pictures", request.codes(model), "codes");
    let drawings = draw(model, &request, |chosen| task.advance(chosen))?;
    Ok((drawings, task.finish().as_secs_f64()))
}

/// Rows of true pictures with their names, each above a row of what was drawn for them with the prompts and, marked
/// right or wrong, the model's own captions.
fn sheet(
    samples: &[EvalSample],
    drawings: &[Drawing],
    captions: &[ByLanguage<Option<Judged>>],
) -> Result<Rgb8> {
    let shown = samples.len().min(SHEET_SAMPLES);
    let blank = || (Rgb8::filled(1, 1, [u8::MAX; 3]), Vec::new());
    let mut items = Vec::new();
    for start in (0..shown).step_by(SHEET_COLUMNS) {
        let cells = start..start + SHEET_COLUMNS;
        items.extend(cells.clone().map(|i| match samples.get(i).filter(|_| i < shown) {
            Some(sample) => {
                let names = [&sample.names.en, &sample.names.zh].into_iter().flatten().cloned();
                (sample.picture.clone(), names.collect())
            }
            None => blank(),
        }));
        items.extend(cells.map(|i| match drawings.get(i).filter(|_| i < shown) {
            Some(drawing) => {
                let mut lines = vec![drawing.prompt.clone()];
                let judged = [&captions[i].en, &captions[i].zh].into_iter().flatten();
                lines.extend(
                    judged.map(|one| format!("{} {}", if one.exact { '√' } else { '×' }, one.caption)),
                );
                (drawing.picture.clone(), lines)
            }
            None => blank(),
        }));
    }
    Ok(contact_sheet(&items, SHEET_COLUMNS as u32, SHEET_TILE)?)
}

impl fmt::Display for PicturesReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { samples, candidates, chance, prompts } = self;
        writeln!(
            f,
            "{samples} samples; the true picture among {candidates} candidates (chance {})",
            percent(*chance)
        )?;
        for PromptReport { prompt, seconds_per_picture, spaces, round_trip } in prompts {
            writeln!(f, "\nprompt \"{prompt}\": {seconds_per_picture:.2} s a picture")?;
            let cells = |name: &str, cells: [String; 4]| [name.to_owned()].into_iter().chain(cells).collect();
            let header = ["nearest", "median place", "same style: nearest", "median place"];
            let mut found = vec![cells("feature space", header.map(str::to_owned))];
            let header = ["median, drawn", "median, held out", "copies (1 % expected)", ""];
            let mut copied = vec![cells("to training pictures", header.map(str::to_owned))];
            for (space, SpaceReport { any_style, same_style, memorisation }) in spaces {
                let shown = |ranks: &Option<Ranks>| match ranks {
                    Some(ranks) => [percent(ranks.top1), ranks.median.to_string()],
                    None => ["-", "-"].map(str::to_owned),
                };
                let ([a, b], [c, d]) = (shown(any_style), shown(same_style));
                found.push(cells(space.name(), [a, b, c, d]));
                if let Some(Memorisation { drawn_median, held_out_median, copies }) = memorisation {
                    let medians = [drawn_median, held_out_median].map(|median| format!("{median:.3}"));
                    let [a, b] = medians;
                    copied.push(cells(space.name(), [a, b, percent(*copies), String::new()]));
                }
            }
            f.write_str(&table(&found))?;
            if copied.len() > 1 {
                f.write_str(&table(&copied))?;
            }
            for (language, scores) in [("en", round_trip.en), ("zh", round_trip.zh)] {
                if let Some(scores) = scores {
                    writeln!(f, "its own {language} caption is the true name: {}", percent(scores.exact))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::samples::tests::shard;
    use crate::generate::testing::tiny_model;

    fn request(dir: &std::path::Path, candidates: usize) -> PicturesRequest {
        let held_out = [("a", "红", "flat"), ("b", "心", "3D"), ("c", "日", "flat")];
        PicturesRequest {
            shards: shard(dir, "val", &held_out),
            train: shard(dir, "train", &[("d", "月", "flat"), ("e", "火", "3D")]),
            prompts: vec!["{en} {style}".to_owned(), "{zh}".to_owned()],
            candidates,
            limit: Some(2),
            best_of: 1,
            guidance: 2.0,
            sampling: Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 },
            seed: 3,
            out: Some(dir.to_path_buf()),
        }
    }

    #[test]
    fn every_prompt_of_every_sample_is_drawn_and_placed() {
        let dir = tempfile::tempdir().unwrap();
        let model = tiny_model();
        let report = pictures(&model, &request(dir.path(), 3)).unwrap();
        assert_eq!((report.samples, report.prompts.len(), report.chance), (2, 2, 1.0 / 3.0));
        for space in FeatureSpace::ALL {
            let found = report.prompts[0].spaces[&space];
            assert!(found.any_style.is_some() && found.memorisation.is_some());
            // Three flat pictures, but only two in 3D.
            assert!(found.same_style.is_some_and(|ranks| ranks.median <= 3.0));
        }
        let rows = std::fs::read_to_string(dir.path().join("pictures.jsonl")).unwrap();
        let rows: Vec<serde_json::Value> =
            rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
        assert_eq!(rows.len(), 4);
        assert_eq!((&rows[0]["prompt"], &rows[3]["prompt"]), (&"a flat".into(), &"心".into()));
        assert!(rows[1]["spaces"]["pixels-32x32"]["same_style_rank"].is_null());
        assert!(rows[0]["spaces"]["tokenizer-latent-8x8"]["nearest_training"][0].is_string());
        assert!(dir.path().join("pictures-2.png").is_file());
        let again = pictures(&model, &request(dir.path(), 3)).unwrap();
        assert_eq!(again.prompts[1].spaces, report.prompts[1].spaces);
        assert!(report.to_string().contains("nearest"));
    }

    #[test]
    fn too_few_candidates_and_bad_prompts_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let model = tiny_model();
        let message = |request: &PicturesRequest| pictures(&model, request).unwrap_err().to_string();
        assert!(message(&request(dir.path(), 6)).starts_with("--candidates 6: expected 2 to 5"));
        let bad = PicturesRequest { prompts: vec!["{name}".to_owned()], ..request(dir.path(), 3) };
        assert!(message(&bad).contains("its JSON lacks a key of the prompt \"{name}\""), "{}", message(&bad));
        let bad = PicturesRequest { guidance: -1.0, ..request(dir.path(), 3) };
        assert!(message(&bad).starts_with("--guidance -1"));
    }
}
