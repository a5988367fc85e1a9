//! The first losses of a run are what they were: a change that should not touch the numbers does not.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::scene::{Scene, finish};

const GOLDEN: &str = "golden_losses.txt";
/// Six significant digits.
const TOLERANCE: f64 = 5e-6;

/// Losses of the first ten steps, on the plainest instructions that libtorch has: what wider vectors give depends on the
/// processor.
fn losses() -> Vec<f64> {
    let scene = Scene::with_tokenizer();
    let mut command =
        scene.command(&["train", "train.toml", "--set", "schedule.steps=10", "--set", "log_every=1"]);
    command
        .env("ATEN_CPU_CAPABILITY", "default")
        .env("MKL_CBWR", "COMPATIBLE")
        .env("ONEDNN_MAX_CPU_ISA", "SSE41");
    let finished = finish(command);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    let rows = fs::read_to_string(scene.path("run/metrics.jsonl")).unwrap();
    let rows = rows.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter_map(|row| row["loss"].as_f64()).collect()
}

#[test]
fn the_first_losses_are_those_on_record() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests").join(GOLDEN);
    let losses = losses();
    if std::env::var_os("M6_REMAKE_GOLDEN").is_some() {
        let lines: String = losses.iter().map(|loss| format!("{loss:.7}\n")).collect();
        let head = "# Losses of steps 1 to 10 of train.toml on the CPU. Where they should change, remake this file:\n\
             # M6_REMAKE_GOLDEN=1 cargo test --release -p m6 --test end_to_end golden\n";
        fs::write(&path, format!("{head}{lines}")).unwrap();
        return;
    }
    let text = fs::read_to_string(&path).unwrap();
    let recorded: Vec<f64> =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| line.parse().unwrap()).collect();
    let same = |(a, b): (&f64, &f64)| (a - b).abs() <= TOLERANCE * b.abs();
    assert!(
        losses.len() == recorded.len() && losses.iter().zip(&recorded).all(same),
        "losses   {losses:?}\nrecorded {recorded:?}"
    );
}
