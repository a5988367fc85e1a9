//! Pretraining from scratch, as small as it can be and still learn something in two minutes.

use std::fs;
use std::path::Path;

use m6_run::chart::line_chart_svg;
use m6_run::{MetricRow, RunDir, read_metrics};
use toml::Value;

use super::Clock;
use super::page::{Curve, Pretraining};
use crate::error::{Error, Result};
use crate::objectives::Task;

const VQGAN_CONFIG: &str = "configs/demo/vqgan.toml";
const TRAIN_CONFIG: &str = "configs/demo/train.toml";
/// Folder of the runs beside the page.
const RUNS: &str = "pretraining";
const VQGAN_RUN: &str = "tokenizer";
const TRAIN_RUN: &str = "transformer";

/// Trains the image tokenizer and then the transformer on its codes. Runs of an earlier demo are removed.
pub(super) fn pretrain(
    out: &Path,
    train: &[String],
    validation: &[String],
    clock: &mut Clock,
) -> Result<Pretraining> {
    for config in [VQGAN_CONFIG, TRAIN_CONFIG].map(Path::new) {
        if !config.is_file() {
            return Err(Error::file(config, "no such file; run the demo from the root of the repository"));
        }
    }
    let (vqgan_run, train_run) = (out.join(RUNS).join(VQGAN_RUN), out.join(RUNS).join(TRAIN_RUN));
    for run in [&vqgan_run, &train_run] {
        if RunDir::exists(run) {
            fs::remove_dir_all(run).map_err(|error| Error::file(run, error))?;
        }
    }

    let common = |run: &Path, shards_key: &str| {
        vec![
            set("run", run.display().to_string()),
            set(shards_key, strings(train)),
            set("validation.shards", strings(validation)),
        ]
    };
    let vqgan = clock.time(
        "pretrain a tiny image tokenizer",
        |outcome: &m6_vqgan::train::TrainOutcome| format!("{} steps", outcome.steps),
        || Ok(m6_vqgan::train::run(Path::new(VQGAN_CONFIG), &common(&vqgan_run, "data.shards"))?),
    )?;
    let Some((vqgan_model, scores)) = vqgan.finished else { return Err(clock.stopped()) };

    let mut overrides = common(&train_run, "data.sources.emoji.shards");
    overrides.push(set("vqgan", vqgan_model.display().to_string()));
    let trained = clock.time(
        "pretrain a tiny transformer on its codes",
        |outcome: &crate::train::Outcome| format!("{} steps", outcome.step),
        || crate::train::run(Path::new(TRAIN_CONFIG), &overrides),
    )?;
    if trained.model.is_none() {
        return Err(clock.stopped());
    }

    let sample = |run: &str, step: u64, name: &str| format!("{RUNS}/{run}/samples/step-{step:08}-{name}.png");
    let task_losses: Vec<String> = Task::ALL.iter().map(|task| format!("loss/{}", task.name())).collect();
    let task_losses: Vec<&str> = task_losses.iter().map(String::as_str).collect();
    Ok(Pretraining {
        curves: vec![
            curve("Image tokenizer", &["loss/l1", "loss/gradient", "loss/ssim"], &metrics(&vqgan_run)?),
            curve("Transformer, all five tasks", &task_losses, &metrics(&train_run)?),
        ],
        psnr: scores.psnr,
        reconstructions: sample(VQGAN_RUN, vqgan.steps, "reconstructions"),
        samples: sample(TRAIN_RUN, trained.step, "samples"),
    })
}

fn metrics(run: &Path) -> Result<Vec<MetricRow>> {
    Ok(read_metrics(RunDir::open(run)?.metrics())?)
}

/// The chart of some losses of a run, named `loss/NAME` in its metrics, and how far each fell.
fn curve(title: &str, names: &[&str], rows: &[MetricRow]) -> Curve {
    let points = |name: &str| -> Vec<(f64, f64)> {
        rows.iter().filter_map(|row| Some((row.step as f64, *row.values.get(name)?))).collect()
    };
    let series: Vec<(&str, Vec<(f64, f64)>)> =
        names.iter().map(|&name| (name.trim_start_matches("loss/"), points(name))).collect();
    let shown: Vec<(&str, &[(f64, f64)])> =
        series.iter().map(|(name, points)| (*name, points.as_slice())).collect();
    let falls = shown.iter().filter_map(|(name, points)| match points {
        [(_, first), .., (_, last)] => Some(format!("{name} {first:.2} to {last:.2}")),
        _ => None,
    });
    Curve { fall: falls.collect::<Vec<_>>().join(", "), svg: line_chart_svg(title, "step", &shown) }
}

/// `key=value` with the value as TOML.
fn set(key: &str, value: impl Into<Value>) -> String {
    format!("{key}={}", value.into())
}

fn strings(values: &[String]) -> Vec<Value> {
    values.iter().cloned().map(Value::String).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn overrides_are_toml() {
        assert_eq!(set("run", "out/a \"b\"".to_owned()), "run='out/a \"b\"'");
        assert_eq!(set("data.shards", strings(&["a-*.tar".to_owned()])), "data.shards=[\"a-*.tar\"]");
    }

    #[test]
    fn curves_say_how_far_the_loss_fell() {
        let row = |step, a, b| {
            let values =
                [("loss/a", a), ("loss/b", b), ("lr", 1.0)].map(|(name, value)| (name.to_owned(), value));
            MetricRow { step, values: BTreeMap::from(values) }
        };
        let found = curve(
            "t",
            &["loss/a", "loss/b", "loss/c"],
            &[row(10, 6.5, 1.0), row(20, 5.0, 0.5), row(30, 4.25, 0.25)],
        );
        assert_eq!(found.fall, "a 6.50 to 4.25, b 1.00 to 0.25");
        assert!(found.svg.starts_with("<svg"));
        assert_eq!(curve("t", &["loss/a"], &[]).fall, "");
    }

    #[test]
    fn shipped_configs_are_whole() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let mut seen = 0;
        // Those of `model` are no runs; `plan` tests them.
        let folders = fs::read_dir(&configs).unwrap().map(|folder| folder.unwrap().path());
        for folder in folders.filter(|folder| !folder.ends_with("model")) {
            for file in fs::read_dir(folder).unwrap() {
                let path = file.unwrap().path();
                let is_vqgan = [path.file_stem(), path.parent().and_then(Path::file_name)]
                    .contains(&Some("vqgan".as_ref()));
                if is_vqgan {
                    let loaded = m6_run::config::load::<m6_vqgan::train::TrainConfig>(&path, &[]).unwrap();
                    assert_eq!(loaded.config.model.validate(), Ok(()), "{}", path.display());
                } else {
                    let loaded = m6_run::config::load::<crate::train::TrainConfig>(&path, &[]).unwrap();
                    loaded.config.validate().unwrap();
                }
                seen += 1;
            }
        }
        assert!(seen >= 4, "{seen} configs");
    }
}
