//! A run that was interrupted, however often and wherever, ends as one that never was.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use m6_runtime::read_tensors;
use serde_json::{Map, Value};

use crate::scene::{Running, Sample, Scene, samples};

/// Metrics that measure the machine and not the run.
const MEASURED: [&str; 4] = ["tokens_per_s", "data_wait", "memory_peak_bytes", "images_per_second"];

/// The rows of `metrics.jsonl` without what is measured.
fn rows(run: &Path) -> Vec<Map<String, Value>> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let row = |line| {
        let mut row: Map<String, Value> = serde_json::from_str(line).unwrap();
        row.retain(|key, _| !MEASURED.contains(&key.as_str()));
        row
    };
    text.lines().map(row).collect()
}

#[track_caller]
fn assert_same(scene: &Scene, one: &str, other: &str) {
    assert_eq!(rows(&scene.path(one)), rows(&scene.path(other)));
    let weights = |run: &str| fs::read(scene.path(run).join("model/model.safetensors")).unwrap();
    assert!(weights(one) == weights(other), "the weights of {one} and {other} differ");
}

/// Enough steps that none of the interruptions comes after the end.
const STEPS: &str = "schedule.steps=90";

/// Milliseconds after its start when a run is killed, drawn at random: before its first step, in a step, while it saves.
const MOMENTS: [u64; 10] = [691, 302, 847, 455, 1003, 518, 764, 226, 935, 609];

/// The step of the last checkpoint that a run has saved.
fn last_saved(run: &Path) -> Option<u32> {
    let names = fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|name| name.to_str()?.strip_prefix("step-")?.parse().ok()).max()
}

/// Lets `command`, of a run that logs at steps 3, 6, 9, ... and saves at 4, 8, 12, ... and so in the middle of a window of
/// losses, be killed right after a checkpoint, after a report, twice at its start and at ten moments, or at its next
/// checkpoint where that comes first: a fast machine must not reach the end. Then stops it politely, and finishes it with
/// other workers.
fn run_with_interruptions(scene: &Scene, command: &[&str], run: &str) {
    let set_run = format!("run={run}");
    let command = [command, &["--set", &set_run]].concat();
    let killed = |mut running: Running| {
        running.kill();
        let finished = running.finish();
        assert_eq!(finished.code, None, "it ended before it was killed:\n{}", finished.stderr);
    };

    let mut running = scene.start(&command);
    running.wait_for_path(&scene.path(run).join("checkpoints/step-00000004"));
    killed(running);

    let mut running = scene.start(&command);
    running.wait_for_line(|line| line.starts_with("step "));
    killed(running);

    for _ in 0..2 {
        let mut running = scene.start(&command);
        running.wait_for_line(|line| line.contains("from step "));
        killed(running);
    }

    for moment in MOMENTS {
        let saved = last_saved(&scene.path(run));
        let started = Instant::now();
        let running = scene.start(&command);
        while started.elapsed() < Duration::from_millis(moment) && last_saved(&scene.path(run)) == saved {
            sleep(Duration::from_millis(1));
        }
        killed(running);
    }

    let mut running = scene.start(&command);
    running.wait_for_line(|line| line.starts_with("step "));
    running.signal("INT");
    let stopped = running.finish();
    assert_eq!(stopped.code, Some(0), "{}", stopped.stderr);
    assert!(stopped.stdout.contains("the same command resumes it"), "{}", stopped.stdout);

    scene.succeed(&[&command[..], &["--set", "data.workers=3"]].concat());
}

/// A scene of which one sample is broken, so that it has to be counted too.
fn scene_with_a_broken_sample() -> Scene {
    let scene = Scene::with_tokenizer();
    let broken = Sample::new("broken", &[("png", b"no picture"), ("json", br#"{"en": "a", "zh": "b"}"#)]);
    scene.write_shard("shards", samples().into_iter().chain([broken]));
    scene
}

/// A second source: texts alone, for tasks of its own, until they were seen three times.
const WORDS: &str = r#"data.sources.words={ shards = ["words/*.tar"], weight = 0.5, epochs = 3, captions = [{ member = "txt" }],
    tasks = { language_modelling = 1.0, text_denoising = 1.0 } }"#;

#[test]
fn training_on_a_mixture_resumes_exactly() {
    let scene = scene_with_a_broken_sample();
    let words = ["one red bar", "two green poles", "三个蓝方块"]
        .map(|text| Sample::new(text, &[("txt", text.as_bytes())]));
    scene.write_shard("words", words);
    let mixture = ["--set", WORDS, "--set", "validation.source=bars", "--set", "optimizer.muon_momentum=0.9"];
    let train = [&["train", "train.toml", "--set", STEPS], &mixture[..]].concat();
    scene.succeed(&train);
    let skipped = |row: &Map<String, Value>| row.get("skipped_samples").and_then(Value::as_f64) > Some(0.0);
    let whole = rows(&scene.path("run"));
    assert!(whole.iter().any(skipped), "the broken sample was not met");
    let epochs = |name: &str| whole.iter().rev().find_map(|row| row.get(name)?.as_f64()).unwrap();
    assert_eq!(epochs("epochs/words"), 3.0);
    assert!(epochs("epochs/bars") > 3.0);
    scene.succeed(&[&train[..], &["--set", "run=same", "--set", "data.workers=2"]].concat());
    assert_same(&scene, "run", "same");
    run_with_interruptions(&scene, &train, "interrupted");
    assert_same(&scene, "run", "interrupted");
    scene.succeed(&train);
    assert_same(&scene, "run", "same");
}

#[test]
fn training_of_the_image_tokenizer_resumes_exactly() {
    let scene = scene_with_a_broken_sample();
    let train = ["vqgan", "train", "vqgan.toml", "--set", STEPS];
    let whole = [&train[..], &["--set", "run=run"]].concat();
    scene.succeed(&whole);
    scene.succeed(&[&train[..], &["--set", "run=same", "--set", "data.workers=2"]].concat());
    assert_same(&scene, "run", "same");
    run_with_interruptions(&scene, &train, "interrupted");
    assert_same(&scene, "run", "interrupted");
    scene.succeed(&whole);
    assert_same(&scene, "run", "same");
}

#[test]
fn blocks_that_are_computed_again_do_not_change_a_run() {
    let scene = Scene::with_tokenizer();
    let train = ["train", "train.toml", "--set", "schedule.steps=7"];
    scene.succeed(&train);
    scene.succeed(&[&train[..], &["--set", "run=again", "--set", "recompute=true"]].concat());
    assert_same(&scene, "run", "again");
    scene.succeed(&[&train[..], &["--set", "recompute=true"]].concat());
}

/// What is rounded by lot is rounded as it would have been. The model is that of the last checkpoint, since nothing is averaged.
#[test]
fn weights_in_bf16_resume_exactly() {
    let scene = Scene::with_tokenizer();
    let narrow = ["--set", "weights=bf16", "--set", "optimizer.moments=bf16", "--set", "ema=0"];
    let train = [&["train", "train.toml", "--set", "schedule.steps=24"], &narrow[..]].concat();
    scene.succeed(&train);
    let parts = [&train[..], &["--set", "run=parts"]].concat();
    let mut running = scene.start(&parts);
    running.wait_for_path(&scene.path("parts/checkpoints/step-00000004"));
    running.kill();
    assert_eq!(running.finish().code, None);
    scene.succeed(&parts);
    assert_same(&scene, "run", "parts");
    let exported = read_tensors(&scene.path("run/model/model.safetensors")).unwrap();
    let kept = read_tensors(&scene.path("run/checkpoints/step-00000024/model.safetensors")).unwrap();
    assert!(!exported.is_empty() && exported.len() == kept.len());
    for ((name, exported), (same_name, kept)) in exported.iter().zip(&kept) {
        assert_eq!(name, same_name);
        assert_eq!(*exported, kept.to_kind(exported.kind()), "{name}");
    }
}

/// What updates are merged with belongs to the state: base and tuned model are not needed again.
#[test]
fn merged_updates_resume_exactly() {
    let scene = Scene::with_tokenizer();
    let tokenizer = "tokenizer={ file = \"base/tokenizer.json\" }";
    scene.succeed(&["train", "train.toml", "--set", "run=base", "--set", "schedule.steps=2"]);
    let tune = ["train", "train.toml", "--set", "seed=6", "--set", "schedule.steps=3", "--set", "run=tuned"];
    scene.succeed(&[&tune[..], &["--set", "init=base/model", "--set", tokenizer]].concat());
    let merging = "merging={ base = \"base/model\", alpha = 0.01, reserve = 0.5 }";
    let train = ["train", "train.toml", "--set", STEPS, "--set", "init=tuned/model", "--set", tokenizer];
    let merged = [&train[..], &["--set", merging]].concat();
    scene.succeed(&[&train[..], &["--set", "run=plain"]].concat());
    scene.succeed(&merged);
    assert_ne!(rows(&scene.path("plain")), rows(&scene.path("run")));

    let parts = [&merged[..], &["--set", "run=parts"]].concat();
    let mut running = scene.start(&parts);
    running.wait_for_path(&scene.path("parts/checkpoints/step-00000004"));
    running.kill();
    assert_eq!(running.finish().code, None);
    for folder in ["base/model", "tuned/model"] {
        fs::remove_dir_all(scene.path(folder)).unwrap();
    }
    scene.succeed(&parts);
    assert_same(&scene, "run", "parts");
}
