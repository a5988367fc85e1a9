//! Codes in shards: written by `m6 data codes`, read by `m6 train`.

use std::fs;

use m6_data::{Element, ShardSet, Transform, sample_rng};
use m6_vqgan::{Vqgan, pictures_to_tensor, to_unit};
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::scene::{Sample, Scene, samples};

const WRONG_USE: Option<i32> = Some(2);
/// `tests/train.toml` says by what its codes are made.
const CODE_TRANSFORM: &str = "code_transform = \"resize:17 | random_crop:16\"\n";

/// The scene's pictures, then a text alone, a picture alone and a broken picture.
fn mixed() -> Scene {
    let scene = Scene::with_tokenizer();
    let names: &[u8] = br#"{"en": "a heart", "zh": "\u5fc3", "style": "flat"}"#;
    let mut all = samples();
    let png = all[0].members[0].1.clone();
    all.push(Sample::new("text", &[("json", names)]));
    all.push(Sample::new("picture", &[("png", &png)]));
    all.push(Sample::new("broken", &[("png", &png[..40]), ("json", names)]));
    scene.write_shard("shards", all);
    scene
}

fn codes<'a>(transform: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let command = ["data", "codes", "shards/*.tar", "-o", "coded", "--vqgan", "tokenizer/model"];
    [&command[..], &["--device", "cpu", "--json", "--transform", transform], more].concat()
}

#[test]
fn each_picture_gets_the_codes_of_its_views_and_everything_else_stays() {
    let scene = mixed();
    let centered = codes("resize:16 | center_crop:16", &["--views", "2"]);
    let report = scene.json(&centered).remove(0);
    let pictures = samples().len() + 1;
    assert_eq!((&report["samples"], &report["with_codes"]), (&json!(pictures + 2), &json!(pictures)));
    assert_eq!((&report["shards"], &report["kept"]), (&json!(["coded/train-000000.tar"]), &json!(0)));

    let open =
        |folder: &str| ShardSet::open(&[scene.path(folder).join("*.tar").display().to_string()]).unwrap();
    let (before, after) = (open("shards"), open("coded"));
    let vqgan = Vqgan::load(&scene.path("tokenizer/model"), Device::Cpu).unwrap();
    let member = format!("codes-{}.npy", vqgan.hash().unwrap());
    assert_eq!(report["member"], json!(member));
    assert_eq!(before.len(), after.len());
    for index in 0..before.len() {
        let (old, new) = (before.sample(index).unwrap(), after.sample(index).unwrap());
        let kept: Vec<_> = new.members().filter(|(extension, _)| *extension != member).collect();
        assert_eq!((old.key, old.members().collect::<Vec<_>>()), (new.key, kept));
        let Some(array) = new.array(&member).unwrap() else {
            assert!(["text", "broken"].contains(&new.key), "{} has no codes", new.key);
            continue;
        };
        assert_eq!((array.element, array.shape.as_slice()), (Element::U16, &[2, 4, 4][..]));
        let picture = Transform::centered(16).load(&new, &mut sample_rng(0, 0)).unwrap();
        let picture = to_unit(&pictures_to_tensor(&[picture]).unwrap(), Device::Cpu).unwrap();
        let expected = vqgan.encode(&picture).unwrap().view([16]);
        let written: Vec<i64> =
            array.bytes.chunks(2).map(|pair| i64::from(u16::from_le_bytes([pair[0], pair[1]]))).collect();
        assert_eq!(Tensor::from_slice(&written), expected.repeat([2]), "{}", new.key);
    }

    let bytes = || fs::read(scene.path("coded/train-000000.tar")).unwrap();
    let (first, again) = (bytes(), scene.json(&centered).remove(0));
    assert_eq!((&again["samples"], &again["kept"]), (&json!(0), &json!(1)));
    fs::remove_file(scene.path("coded/train-000000.tar")).unwrap();
    scene.json(&centered);
    assert_eq!(bytes(), first, "made again");
}

#[test]
fn what_cannot_be_coded_is_counted_once_and_named() {
    let scene = mixed();
    let shard = fs::read(scene.path("shards/train-000000.tar")).unwrap();
    let climbing = rename(&shard, "text.json", "../x.json");
    fs::write(scene.path("shards/train-000000.tar"), climbing).unwrap();
    fs::write(scene.path("shards/unreadable.tar"), [7; 3000]).unwrap();
    // Its views alone would be too many in a row.
    let more = ["--views", "5", "--skip-in-a-row", "2"];
    let finished = scene.run(&codes("resize:17 | random_crop:16", &more));
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    let pictures = samples().len() + 1;
    assert_eq!(
        (&report["samples"], &report["with_codes"], &report["left_out"]),
        (&json!(pictures + 1), &json!(pictures), &json!(1))
    );
    assert_eq!(report["unusable"][0]["shard"], json!("shards/unreadable.tar"));
    let log = fs::read_to_string(scene.path("coded/skipped.jsonl")).unwrap();
    let classes: Vec<Value> =
        log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["class"].clone()).collect();
    assert_eq!(classes, ["broken_picture", "unsafe_name", "unusable_shard"], "{log}");
    fs::remove_file(scene.path("coded/train-000000.tar")).unwrap();
    let finished = scene.run(&codes("resize:17 | random_crop:16", &["--views", "5", "--skip-in-a-row", "1"]));
    assert_eq!(finished.code, Some(1));
    assert!(finished.stderr.contains("1 samples in a row cannot be used"), "{}", finished.stderr);
}

/// An archive in which a member has another name of the same length.
fn rename(archive: &[u8], from: &str, to: &str) -> Vec<u8> {
    let mut archive = archive.to_vec();
    let at = archive.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    archive[at..at + to.len()].copy_from_slice(to.as_bytes());
    let header = &mut archive[at..at + 512];
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive
}

#[test]
fn codes_that_cannot_be_made_are_refused() {
    let scene = mixed();
    let refused = |args: &[&str], words: &[&str]| {
        let finished = scene.run(args);
        assert_eq!(finished.code, WRONG_USE, "{args:?}: {}", finished.stderr);
        assert!(words.iter().all(|word| finished.stderr.contains(word)), "{args:?}: {}", finished.stderr);
    };
    refused(&codes("resize:16", &[]), &["--transform", "16 x 16"]);
    refused(&codes("resize:16", &["--skip-share", "2"]), &["--skip-share = 2: expected 0 to 1"]);
    let fits = "resize:17 | random_crop:16";
    let with = |from: &'static str, to: &'static str| -> Vec<&str> {
        codes(fits, &[]).into_iter().map(|word| if word == from { to } else { word }).collect()
    };
    refused(&with("coded", "shards"), &["shards/train-000000.tar", "choose another"]);
    refused(&with("shards/*.tar", "pipe:cat shards/train-000000.tar"), &["expected a file or url"]);
    scene.json(&codes(fits, &["--seed", "3"]));
    refused(&codes(fits, &["--seed", "4"]), &["coded/codes.json", "seed = 3", "4 needs another"]);
}

#[test]
fn training_reads_codes_from_its_samples() {
    let scene = mixed();
    let text = fs::read_to_string(scene.path("train.toml")).unwrap();
    let config = |folder: &str| {
        let text = text.replace(CODE_TRANSFORM, "");
        let (data, validation) = text.split_once("[validation]").unwrap();
        let data = data.replace("shards/*.tar", &format!("{folder}/*.tar"));
        fs::write(scene.path("members.toml"), format!("{data}[validation]{validation}")).unwrap();
    };
    let train = ["train", "members.toml", "--set", "schedule.steps=8"];

    config("shards");
    let finished = scene.run(&train);
    assert_eq!(finished.code, WRONG_USE);
    assert!(
        finished.stderr.contains("data.sources.bars: its samples have no codes; expected members codes-")
    );

    scene.json(&codes("resize:17 | random_crop:16", &["--views", "2"]));
    config("coded");
    let finished = scene.run(&train);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(finished.stderr.contains("sample picture: lacks the members that "), "{}", finished.stderr);
    let rows = fs::read_to_string(scene.path("run/metrics.jsonl")).unwrap();
    let row: Value = rows.lines().map(|line| serde_json::from_str(line).unwrap()).next().unwrap();
    assert!(row["loss/text_to_image"].as_f64().is_some_and(f64::is_finite), "{row}");

    let set = ShardSet::open(&[scene.path("shards/*.tar").display().to_string()]).unwrap();
    let foreign: Vec<Sample> = (0..set.len())
        .map(|index| {
            let sample = set.sample(index).unwrap();
            let members: Vec<_> =
                sample.members().chain([("codes-0123456789abcdef.npy", &b""[..])]).collect();
            Sample::new(sample.key, &members)
        })
        .collect();
    scene.write_shard("coded", foreign);
    let finished = scene.run(&[&train[..], &["--set", "run=other"]].concat());
    assert_eq!(finished.code, WRONG_USE);
    let hash = Vqgan::load(&scene.path("tokenizer/model"), Device::Cpu).unwrap().hash().unwrap().to_owned();
    let words = [
        "codes of another tokenizer, codes-0123456789abcdef.npy",
        &format!("expected members codes-{hash}.npy"),
    ];
    assert!(words.iter().all(|word| finished.stderr.contains(word)), "{}", finished.stderr);
}

#[test]
fn picture_tasks_do_not_draw_samples_without_a_picture() {
    const TEXTS: usize = 300;
    let scene = Scene::with_tokenizer();
    let texts = (0..TEXTS).map(|i| {
        let names = json!({ "en": format!("text {i}"), "zh": "字" }).to_string();
        Sample::new(&format!("text-{i}"), &[("json", names.as_bytes())])
    });
    scene.write_shard("shards", texts.chain(samples()));
    let train = |run: &str, tasks: &str| {
        let run = format!("run={run}");
        let tasks = format!("tasks={tasks}");
        let args = ["train", "train.toml", "--set", "schedule.steps=4", "--set", &run, "--set", &tasks];
        let finished = scene.run(&args);
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        let rows =
            fs::read_to_string(scene.path(run.trim_start_matches("run=")).join("metrics.jsonl")).unwrap();
        let row: Value = rows.lines().map(|line| serde_json::from_str(line).unwrap()).next().unwrap();
        assert_eq!(row["skipped_samples"], json!(0.0), "{row}");
        (row, finished.stderr)
    };
    let (row, stderr) = train("pictures", "{ captioning = 0.5, text_to_image = { weight = 0.5 } }");
    assert_eq!(row["known_flaws/missing_member"], json!(TEXTS as f64));
    // Ten each of training and validation are named.
    assert_eq!(stderr.matches("lacks the members that captioning or text_to_image needs").count(), 20);
    assert!(
        stderr.contains("290 more flaws of shards and samples are in pictures/skipped.jsonl"),
        "{stderr}"
    );
    assert!(row["epochs/bars"].as_f64() > Some(0.9), "an epoch is the samples that serve a task: {row}");
    let (row, stderr) = train("both", "{ captioning = 0.5, language_modelling = 0.5 }");
    assert!(!stderr.contains("lacks") && row.get("known_flaws/missing_member").is_none(), "{stderr}");
    for task in ["captioning", "language_modelling"] {
        assert!(row[format!("loss/{task}")].as_f64().is_some_and(f64::is_finite), "{row}");
    }
}
