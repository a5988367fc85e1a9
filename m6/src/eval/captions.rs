//! How often captions are the true names of what the pictures show.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use m6_data::{Rgb8, contact_sheet};
use m6_run::{Task, write_atomic};
use serde::Serialize;

use super::names::{ByLanguage, Judged, NameScores};
use super::samples::{EvalSample, open_shards, read_all};
use crate::error::{Error, Result};
use crate::generate::caption;
use crate::model::{Language, Model};
use crate::table::{percent, table};

/// Pictures between two looks at the progress.
const BATCH: usize = 32;
/// Pictures on the contact sheet.
const SHEET_PICTURES: usize = 48;
const SHEET_COLUMNS: u32 = 8;
const SHEET_TILE: u32 = 128;

/// What to score and where to put it.
#[derive(Debug, Clone)]
pub struct CaptionsRequest {
    /// Held-out shards; names under the JSON keys `en` and `zh`.
    pub shards: Vec<String>,
    /// Beams of the search; 1 is greedy.
    pub beams: usize,
    /// Scores the first samples only.
    pub limit: Option<usize>,
    /// Folder for `captions.jsonl` and the contact sheet `captions.png`.
    pub out: Option<PathBuf>,
}

/// Scores by language, over all samples and by style.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaptionsReport {
    /// Samples.
    pub samples: usize,
    /// Beams of the search.
    pub beams: usize,
    /// Over all samples.
    #[serde(flatten)]
    pub all: ByLanguage<Option<NameScores>>,
    /// By the samples' `style`.
    pub by_style: BTreeMap<String, ByLanguage<Option<NameScores>>>,
}

/// A line of `captions.jsonl`.
#[derive(Debug, Serialize)]
struct Row<'a> {
    key: &'a str,
    style: Option<&'a str>,
    #[serde(flatten)]
    judged: &'a ByLanguage<Option<Judged>>,
}

/// Captions the pictures of the shards in both languages and compares with their true names.
///
/// # Errors
/// When a shard or a sample cannot be read, no sample has a name, or a file cannot be written.
pub fn captions(model: &Model, request: &CaptionsRequest) -> Result<CaptionsReport> {
    let samples = read_all(&open_shards(&request.shards)?, request.limit)?;
    let pairs: Vec<_> = samples.iter().map(|sample| (&sample.picture, &sample.names)).collect();
    let judged = judge(model, &pairs, request.beams)?;
    let report = CaptionsReport {
        samples: samples.len(),
        beams: request.beams,
        all: scores(judged.iter()),
        by_style: by_style(&samples, &judged),
    };
    if report.all == ByLanguage::default() {
        let shards = request.shards.join(" ");
        return Err(Error::Usage(format!(
            "shards {shards}: no sample has a name under the JSON key `en` or `zh`"
        )));
    }
    if let Some(out) = &request.out {
        let rows = samples.iter().zip(&judged).map(|(sample, judged)| {
            let row = Row { key: &sample.key, style: sample.style.as_deref(), judged };
            serde_json::to_string(&row).expect("plain values become JSON") + "\n"
        });
        write_atomic(out.join("captions.jsonl"), rows.collect::<String>().as_bytes())?;
        sheet(&samples, &judged)?.save_png(&out.join("captions.png"))?;
    }
    Ok(report)
}

/// The best caption of each picture in each language that its names have, beside the name.
///
/// # Errors
/// As for [`caption`].
pub(crate) fn judge(
    model: &Model,
    pairs: &[(&Rgb8, &ByLanguage<Option<String>>)],
    beams: usize,
) -> Result<Vec<ByLanguage<Option<Judged>>>> {
    let max_tokens = model.info.model.max_text as usize;
    let mut task = Task::new("caption pictures", pairs.len() as u64, "pictures");
    let mut judged = Vec::with_capacity(pairs.len());
    for batch in pairs.chunks(BATCH) {
        let pictures: Vec<Rgb8> = batch.iter().map(|(picture, _)| (*picture).clone()).collect();
        let captions = caption(model, &pictures, None, beams, max_tokens)?;
        for ((_, names), captions) in batch.iter().zip(&captions) {
            judged.push(ByLanguage::make(|language| {
                let truth = names.get(language).as_ref()?;
                let best = captions.iter().find(|caption| caption.language == language)?;
                Some(Judged::new(truth, &best.text, best.logprob, language))
            }));
        }
        task.advance(batch.len() as u64);
    }
    task.finish();
    Ok(judged)
}

/// Scores in each language.
pub(super) fn scores<'a>(
    judged: impl Iterator<Item = &'a ByLanguage<Option<Judged>>> + Clone,
) -> ByLanguage<Option<NameScores>> {
    ByLanguage::make(|language| NameScores::of(judged.clone().filter_map(|one| one.get(language).as_ref())))
}

fn by_style(
    samples: &[EvalSample],
    judged: &[ByLanguage<Option<Judged>>],
) -> BTreeMap<String, ByLanguage<Option<NameScores>>> {
    let mut styles: BTreeMap<String, Vec<&ByLanguage<Option<Judged>>>> = BTreeMap::new();
    for (sample, judged) in samples.iter().zip(judged) {
        if let Some(style) = &sample.style {
            styles.entry(style.clone()).or_default().push(judged);
        }
    }
    styles.into_iter().map(|(style, judged)| (style, scores(judged.into_iter()))).collect()
}

/// The first pictures, each with what it shows and, marked right or wrong, what the model calls it.
fn sheet(samples: &[EvalSample], judged: &[ByLanguage<Option<Judged>>]) -> Result<Rgb8> {
    let items: Vec<_> = samples
        .iter()
        .zip(judged)
        .take(SHEET_PICTURES)
        .map(|(sample, judged)| (sample.picture.clone(), sheet_lines(judged)))
        .collect();
    Ok(contact_sheet(&items, SHEET_COLUMNS, SHEET_TILE)?)
}

/// For each language: the name, with a tick where the caption says the same, else with the caption below it.
fn sheet_lines(judged: &ByLanguage<Option<Judged>>) -> Vec<String> {
    let lines = |judged: &Judged| match judged.exact {
        true => vec![format!("√ {}", judged.truth)],
        false => vec![judged.truth.clone(), format!("× {}", judged.caption)],
    };
    [Language::En, Language::Zh].iter().filter_map(|&l| judged.get(l).as_ref()).flat_map(lines).collect()
}

impl fmt::Display for CaptionsReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let header = ["style", "language", "samples", "exact name", "token F1"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        let all = std::iter::once(("all", &self.all));
        for (style, scores) in all.chain(self.by_style.iter().map(|(style, scores)| (style.as_str(), scores)))
        {
            for (language, scores) in [("en", &scores.en), ("zh", &scores.zh)] {
                let Some(NameScores { samples, exact, token_f1 }) = scores else { continue };
                let scores = [samples.to_string(), percent(*exact), percent(*token_f1)];
                rows.push([style, language].map(str::to_owned).into_iter().chain(scores).collect());
            }
        }
        f.write_str(&table(&rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::samples::tests::shard;
    use crate::generate::testing::tiny_model;

    #[test]
    fn every_sample_is_scored_and_written() {
        let dir = tempfile::tempdir().unwrap();
        let shards = shard(dir.path(), "val", &[("a", "红", "flat"), ("b", "心", "3D"), ("c", "", "flat")]);
        let out = dir.path().to_path_buf();
        let request = CaptionsRequest { shards, beams: 1, limit: None, out: Some(out.clone()) };
        let report = captions(&tiny_model(), &request).unwrap();
        assert_eq!(
            (report.samples, report.all.en.unwrap().samples, report.all.zh.unwrap().samples),
            (3, 3, 2)
        );
        assert_eq!(report.by_style["flat"].en.unwrap().samples, 2);
        let rows = std::fs::read_to_string(out.join("captions.jsonl")).unwrap();
        let rows: Vec<serde_json::Value> =
            rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
        assert_eq!((rows.len(), &rows[1]["zh"]["truth"]), (3, &"心".into()));
        assert!(rows[2]["zh"].is_null() && rows[2]["en"]["caption"].is_string());
        assert!(out.join("captions.png").is_file());
        assert_eq!(report.to_string().lines().count(), 1 + 2 + 2 + 2);
    }

    #[test]
    fn shards_without_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let shards = shard(dir.path(), "val", &[("", "", "flat")]);
        let request = CaptionsRequest { shards, beams: 1, limit: None, out: None };
        let error = captions(&tiny_model(), &request).unwrap_err().to_string();
        assert!(error.ends_with("no sample has a name under the JSON key `en` or `zh`"), "{error}");
    }
}
