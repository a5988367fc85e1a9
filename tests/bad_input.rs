//! What is wrong gets one clear line and an exit code, and costs nothing that was already written.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use m6_data::{Array, Element, Rgb8};
use serde_json::{Value, json};

use crate::refusals::{Case, FAILURE, WRONG_USE, assert_all_refused, assert_refused, copy};
use crate::scene::{Finished, Member, Sample, Scene, finish, samples};

#[test]
fn settings() {
    let scene = Scene::with_tokenizer();
    let text = fs::read_to_string(scene.path("train.toml")).unwrap();
    fs::write(scene.path("typo.toml"), text.replace("log_every", "log_evrey")).unwrap();
    fs::write(scene.path("type.toml"), text.replace("log_every = 3", "log_every = 'often'")).unwrap();
    fs::write(scene.path("broken.toml"), text.replace("log_every = 3", "log_every = = 3")).unwrap();
    fs::write(scene.path("bytes.toml"), [0xff, 0xfe]).unwrap();
    assert_all_refused(
        &scene,
        &[
            ("train none.toml", FAILURE, &["none.toml", "No such file"]),
            ("train bytes.toml", FAILURE, &["bytes.toml", "UTF-8"]),
            ("train typo.toml", WRONG_USE, &["typo.toml", "`log_evrey`", "did you mean `log_every`?"]),
            ("train type.toml", WRONG_USE, &["type.toml", "`log_every`", "\"often\"", "expected u64"]),
            ("train broken.toml", WRONG_USE, &["broken.toml, line 9, column"]),
            ("vqgan train train.toml", WRONG_USE, &["train.toml", "unknown field"]),
        ],
    );
    let settings: [(&str, &[&str]); 53] = [
        ("train train.toml --set schedule.stesp=3", &["--set schedule.stesp=3", "did you mean `steps`?"]),
        ("train train.toml --set schedule.steps=many", &["schedule.steps=many", "expected u64"]),
        ("train train.toml --set schedule.steps=-1", &["schedule.steps=-1", "expected u64"]),
        ("train train.toml --set schedule.steps=0", &["schedule.steps", "expected 1 or more"]),
        ("train train.toml --set schedule.steps", &["--set schedule.steps", "expected KEY=VALUE"]),
        ("train train.toml --set schedule.tokens=0", &["schedule.tokens", "expected 1 or more"]),
        ("train train.toml --set schedule.lr=nan", &["schedule.lr = NaN"]),
        ("train train.toml --set schedule.clip=-1", &["schedule.clip = -1"]),
        ("train train.toml --set schedule.min_ratio=nan", &["schedule.min_ratio = NaN"]),
        ("train train.toml --set ema=1.5", &["ema = 1.5"]),
        ("train train.toml --set merging.base=base", &["init is missing", "merging.base"]),
        ("train train.toml --set merging.base=base --set merging.reserve=0", &["merging.reserve = 0"]),
        ("train train.toml --set weights=fp8", &["weights", "`fp8`", "`bf16`"]),
        ("train train.toml --set weights=bf16", &["ema = 0.9: expected 0", "weights = \"bf16\""]),
        (
            "train train.toml --set weights=bf16 --set ema=0 --set optimizer.muon_momentum=0.9",
            &["optimizer.muon_momentum = 0.9: expected none", "weights = \"bf16\""],
        ),
        (
            "train train.toml --set weights=bf16 --set ema=0 --set init=tuned --set merging.base=base",
            &["merging: expected none", "weights = \"bf16\""],
        ),
        ("train train.toml --set device=tpu", &["`tpu`", "expected `cpu`"]),
        ("train train.toml --set model.width=20", &["model.width = 20", "multiple of"]),
        ("train train.toml --set model.heads=0", &["model.heads = 0"]),
        ("train train.toml --set model.dropout=nan", &["model.dropout = NaN"]),
        ("train train.toml --set model.moe.active=9", &["model.moe.active = 9"]),
        ("train train.toml --set model.moe.capacity=0", &["model.moe.capacity = 0", "positive"]),
        ("train train.toml --set model.moe.experts=16385", &["model.moe.experts = 16385", "1 to 16384"]),
        ("train train.toml --set model.patches.resolution=7", &["model.patches.resolution = 7"]),
        ("train train.toml --set tasks.captioning=-1", &["tasks.captioning = -1"]),
        ("train train.toml --set tasks.text_to_image.noise=2", &["noise = 2"]),
        ("train train.toml --set tasks.text_to_image.shuffled=0.5", &["shuffled", "model.any_order = true"]),
        ("train train.toml --set model.code_order=coarse_to_fine", &["model.code_order", "any_order = true"]),
        (
            "train train.toml --set optimizer={beta1=2.0,beta2=0.9,eps=0.0,weight_decay=0.0}",
            &["optimizer.beta1 = 2"],
        ),
        ("train train.toml --set tokenizer.train=10", &["vocab_size = 10", "256"]),
        ("train train.toml --set tokenizer.file=bpe.json", &["tokenizer", "not both"]),
        (
            "train train.toml --set data.sources.bars.transform=resize:16",
            &["data.sources.bars.transform", "16 x 16"],
        ),
        (
            "train train.toml --set data.sources.bars.code_transform=random_crop:8",
            &["data.sources.bars.code_transform", "16 x 16"],
        ),
        (
            "train train.toml --set data.sources.bars.transform=blur:3",
            &["data.sources.bars.transform", "blur:3"],
        ),
        (
            "train train.toml --set data.sources.bars.captions.0.weight=0",
            &["data.sources.bars.captions", "weight = 0"],
        ),
        ("train train.toml --set data.sources.bars.shards=[]", &["shards", "expected at least one"]),
        ("train train.toml --set data.sources.bars.shards.0=none-*.tar", &["none-*.tar", "no such file"]),
        ("train train.toml --set data.sources={}", &["data.sources", "at least one source"]),
        ("train train.toml --set data.sources.bars.weight=0", &["source bars", "weight = 0"]),
        ("train train.toml --set data.sources.bars.epochs=2", &["source bars", "one source without"]),
        ("train train.toml --set data.sources.bars.code_views=0", &["data.sources.bars.code_views = 0"]),
        (
            "train train.toml --set data.sources.bars.tasks.captioning=-1",
            &["data.sources.bars.tasks.captioning = -1"],
        ),
        ("train train.toml --set validation.source=foos", &["validation.source = \"foos\"", "one of bars"]),
        ("train train.toml --set validation.shards.0=none.tar", &["none.tar", "no such file"]),
        ("train train.toml --set validation.examples=0", &["validation.examples", "expected 1 or more"]),
        ("train train.toml --set samples.count=0", &["samples.count", "expected 1 or more"]),
        ("train train.toml --set samples.sampling.top_p=2", &["samples", "top-p 2"]),
        ("vqgan train vqgan.toml --set schedule.batch=0", &["schedule.batch", "expected at least 1"]),
        ("vqgan train vqgan.toml --set model.ch=20", &["model.ch", "multiple of 32"]),
        ("vqgan train vqgan.toml --set optimizer.beta1=2", &["optimizer", "beta1 = 2"]),
        ("vqgan train vqgan.toml --set model.quantizer=gumbel", &["codebook.gradient", "a table `gumbel`"]),
        ("vqgan train vqgan.toml --set codebook.gradient.gumbel.hard=1", &["codebook.gradient", "hard"]),
        ("vqgan train vqgan.toml --set data.shards=[]", &["shards", "expected at least one"]),
    ];
    let cases = settings.map(|(line, words)| (line, WRONG_USE, words));
    assert_all_refused(&scene, &cases);
}

#[test]
fn flags() {
    let scene = Scene::with_model();
    let draw = "generate heart --model run/model --device cpu";
    let caption = "caption pictures/red-bar.png --model run/model --device cpu";
    let score = "eval pictures shards/*.tar --model run/model --device cpu";
    let long = "word".repeat(100);
    fs::write(scene.path("texts.jsonl"), "\"a text\"\n{}\n").unwrap();
    let cases: [(String, i32, &[&str]); 32] = [
        (format!("{draw} --temperature -1"), WRONG_USE, &["--temperature -1"]),
        (format!("{draw} --temperature nan"), WRONG_USE, &["--temperature NaN"]),
        (format!("{draw} --top-p 2"), WRONG_USE, &["--top-p 2"]),
        (format!("{draw} --top-k -1"), WRONG_USE, &["-1"]),
        (format!("{draw} --guidance inf"), WRONG_USE, &["--guidance inf"]),
        (format!("{draw} -n 0"), WRONG_USE, &["0", "1..=10000"]),
        (format!("{draw} --seed -1"), WRONG_USE, &["-1"]),
        (format!("{draw} -o out.jpg"), WRONG_USE, &["out.jpg", ".png"]),
        (format!("{draw} -o pictures"), WRONG_USE, &["pictures", ".png"]),
        (format!("generate {long} --model run/model --device cpu"), WRONG_USE, &["tokens", "at most 32"]),
        ("generate heart --model run/model --device tpu".into(), WRONG_USE, &["`tpu`", "`cpu`"]),
        ("generate heart --model run/model --device cuda:99".into(), WRONG_USE, &["`cuda:99`"]),
        ("generate heart".into(), WRONG_USE, &["required"]),
        (format!("{caption} --beams 0"), WRONG_USE, &["--beams 0"]),
        (format!("{caption} --lang fr"), WRONG_USE, &["fr"]),
        ("data show shards/*.tar --field json".into(), WRONG_USE, &["json", "key"]),
        ("data show shards/*.tar -n 0".into(), WRONG_USE, &["0", "1..=10000"]),
        ("data info shards".into(), WRONG_USE, &["shards is a folder"]),
        ("data pack none shards".into(), FAILURE, &["none", "No such file"]),
        ("data pack pictures new --filter min_side:big".into(), WRONG_USE, &["min_side:big", "pixels"]),
        ("data pack pictures new --filter words_absent:none".into(), FAILURE, &["none", "No such file"]),
        ("data pack pictures new --dropped log".into(), WRONG_USE, &["required"]),
        ("tokenizer train shards/*.tar --field json:en --vocab-size 9".into(), WRONG_USE, &["9", "256"]),
        (
            "tokenizer encode run/model/tokenizer.json texts.jsonl".into(),
            FAILURE,
            &["texts.jsonl: line 2", "a JSON string"],
        ),
        ("eval captions shards/*.tar --model run/model --device cpu --limit 0".into(), WRONG_USE, &["0"]),
        ("plan none.toml".into(), WRONG_USE, &["none.toml", "does not exist"]),
        ("plan pictures".into(), FAILURE, &["pictures/config.json", "No such file"]),
        ("plan vqgan.toml".into(), WRONG_USE, &["vqgan.toml", "unknown"]),
        ("plan train.toml --gpu-memory lots".into(), WRONG_USE, &["lots", "such as 80G"]),
        ("plan train.toml --gpus 0".into(), WRONG_USE, &["0", "1..=1048576"]),
        (format!("{score} --prompt {{en}}"), WRONG_USE, &["candidates 100", "12"]),
        (format!("{score} --prompt {{de}}"), FAILURE, &["red-square", "{de}"]),
    ];
    let cases: Vec<Case> = cases.iter().map(|(line, code, words)| (line.as_str(), *code, *words)).collect();
    assert_all_refused(&scene, &cases);
    let prompt = OsStr::from_bytes(b"\xff\xfe");
    let args = ["generate", "--model", "run/model"].map(OsStr::new);
    let picture = scene.run(&["caption", "vqgan.toml", "--model", "run/model", "--device", "cpu"]);
    assert_eq!(picture.code, Some(FAILURE));
    assert!(picture.stderr.contains("m6: vqgan.toml: broken picture"), "{}", picture.stderr);
    assert_refused("non-UTF-8 prompt", &scene.run(&[&args[..], &[prompt]].concat()), WRONG_USE, &["UTF-8"]);
}

#[test]
fn pictures_and_codes_of_the_image_tokenizer() {
    let scene = Scene::with_tokenizer();
    let save = |name: &str, side: u32| Rgb8::filled(side, 20, [9; 3]).save_png(&scene.path(name)).unwrap();
    save("thin.png", 3);
    save("fine.png", 20);
    let npy = |name: &str, shape: &[usize], element, bytes: &[u8]| {
        let array = Array { element, shape: shape.to_vec(), bytes };
        fs::write(scene.path(name), array.to_npy().unwrap()).unwrap();
    };
    npy("far.npy", &[1, 2], Element::U8, &[3, 32]);
    npy("flat.npy", &[2], Element::U8, &[3, 4]);
    npy("float.npy", &[1, 1], Element::F32, &[0; 4]);
    fs::create_dir(scene.path("empty")).unwrap();
    scene.succeed(&["vqgan", "encode", "tokenizer/model", "fine.png", "-o", "there", "--device", "cpu"]);
    let encode = |what: &str| format!("vqgan encode tokenizer/model {what} --device cpu");
    let decode = |what: &str| format!("vqgan decode tokenizer/model {what} -o out --device cpu");
    let cases: [(String, i32, &[&str]); 9] = [
        (encode("thin.png -o out"), FAILURE, &["thin.png", "3x20", "at least 4x4"]),
        (encode("none.png -o out"), FAILURE, &["none.png", "No such file"]),
        (encode("vqgan.toml -o out"), FAILURE, &["vqgan.toml", "broken picture"]),
        (encode("empty -o out"), FAILURE, &["empty", "none of the files"]),
        (encode("fine.png -o there"), WRONG_USE, &["there/fine.npy", "--overwrite"]),
        (decode("far.npy"), FAILURE, &["far.npy", "3 to 32", "0 to 31"]),
        (decode("flat.npy"), FAILURE, &["flat.npy", "shape [2]", "[rows, columns]"]),
        (decode("float.npy"), FAILURE, &["float.npy", "F32", "integers"]),
        (decode("fine.png"), FAILURE, &["fine.png", "NumPy's mark"]),
    ];
    let cases: Vec<Case> = cases.iter().map(|(line, code, words)| (line.as_str(), *code, *words)).collect();
    assert_all_refused(&scene, &cases);
}

#[test]
fn outputs_that_cannot_be_written() {
    let scene = Scene::with_model();
    fs::write(scene.path("file"), "").unwrap();
    let draw = "generate heart --model run/model --device cpu -n 1 -o";
    let cases: [(String, i32, &[&str]); 6] = [
        (format!("{draw} file/out.png"), FAILURE, &["file"]),
        ("train train.toml --set run=file/run".into(), FAILURE, &["file/run"]),
        ("vqgan train vqgan.toml --set run=file".into(), FAILURE, &["file"]),
        ("data pack pictures file".into(), FAILURE, &["file"]),
        ("tokenizer train shards/*.tar --field json:en -o file/bpe.json".into(), FAILURE, &["file"]),
        ("eval captions shards/*.tar --model run/model --device cpu --out file".into(), FAILURE, &["file"]),
    ];
    let cases: Vec<Case> = cases.iter().map(|(line, code, words)| (line.as_str(), *code, *words)).collect();
    assert_all_refused(&scene, &cases);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let status = scene.command(&["data", "info", "shards/*.tar", "--json"]).stdout(full).output().unwrap();
    let finished = Finished {
        code: status.status.code(),
        stdout: String::new(),
        stderr: String::from_utf8(status.stderr).unwrap(),
    };
    assert_refused("a full disk behind stdout", &finished, FAILURE, &["standard output", "No space left"]);
}

/// Samples of which the first is replaced by a broken one.
fn with_broken(members: &[Member]) -> Vec<Sample> {
    let mut all = samples();
    all[0] = Sample::new("broken", members);
    all
}

#[test]
fn broken_samples_are_skipped_named_and_counted() {
    let png = samples().remove(0).members.remove(0).1;
    let names = br#"{"en": "a heart", "zh": "\u5fc3"}"#;
    type Members<'a> = &'a [(&'a str, &'a [u8])];
    let broken: [(&str, Members, &str); 4] = [
        ("a broken picture", &[("png", &png[..40]), ("json", names)], "broken picture"),
        ("no caption field", &[("png", &png), ("json", b"{\"de\": \"Herz\"}")], "none of the caption fields"),
        ("text that is not UTF-8", &[("png", &png), ("json", b"{\"en\": \"\xff\"}")], "not UTF-8"),
        ("broken JSON", &[("png", &png), ("json", b"{\"en\": ")], "malformed"),
    ];
    let scene = Scene::with_tokenizer();
    for (what, members, reason) in broken {
        scene.write_shard("shards", with_broken(members));
        let finished = scene.run(&["train", "train.toml", "--set", "schedule.steps=6"]);
        assert_eq!(finished.code, Some(0), "{what}:\n{}", finished.stderr);
        let named = |line: &str| {
            line.contains("shards/train-000000.tar")
                && line.contains("sample broken: ")
                && line.contains(reason)
        };
        assert!(finished.stderr.lines().any(named), "{what}:\n{}", finished.stderr);
        let metrics = fs::read_to_string(scene.path("run/metrics.jsonl")).unwrap();
        let skipped = |line| serde_json::from_str::<Value>(line).unwrap()["skipped_samples"].as_f64();
        let most = metrics.lines().filter_map(skipped).fold(0.0, f64::max);
        assert!(most > 0.0, "{what} was not counted:\n{metrics}");
        let log = fs::read_to_string(scene.path("run/skipped.jsonl")).unwrap();
        let logged: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(logged.len() == 1 && logged[0]["key"] == "broken" && logged[0]["offset"] == 512, "{log}");
        fs::remove_dir_all(scene.path("run")).unwrap();

        let bpe = ["tokenizer", "train", "shards/*.tar", "--field", "json:en", "--field", "json:zh"];
        let finished = scene.run(&bpe);
        assert_eq!(finished.code, Some(0), "{what}:\n{}", finished.stderr);
    }

    scene
        .write_shard("shards", samples().into_iter().map(|s| Sample::new(&s.key, &[("png", b"no picture")])));
    let finished =
        scene.run(&["train", "train.toml", "--set", "schedule.steps=2", "--set", "validation.examples=2"]);
    assert_ne!(finished.code, Some(0));
    assert!(
        finished.stderr.lines().last().is_some_and(|line| line.starts_with("m6: ")),
        "{}",
        finished.stderr
    );
    assert_eq!(scene.run(&["vqgan", "train", "vqgan.toml", "--set", "run=new"]).code, Some(FAILURE));
}

/// The last value of a metric of a run.
fn metric(scene: &Scene, run: &str, name: &str) -> Option<f64> {
    let rows = fs::read_to_string(scene.path(run).join("metrics.jsonl")).unwrap();
    rows.lines().rev().find_map(|line| serde_json::from_str::<Value>(line).unwrap()[name].as_f64())
}

/// The classes in a run's log of what was skipped.
fn logged_classes(scene: &Scene, run: &str) -> Vec<Value> {
    let log = fs::read_to_string(scene.path(run).join("skipped.jsonl")).unwrap();
    log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["class"].clone()).collect()
}

#[test]
fn shards_that_cannot_be_read_are_left_out_and_counted_until_they_are_too_many() {
    let scene = Scene::with_tokenizer();
    fs::write(scene.path("shards/unreadable.tar"), [7; 3000]).unwrap();
    let lone = Sample::new("alone", &[("cls", b"1")]);
    scene.write_shard("more", samples().into_iter().chain([lone]));
    fs::rename(scene.path("more/train-000000.tar"), scene.path("shards/useless.tar")).unwrap();
    for command in [&["train", "train.toml"][..], &["vqgan", "train", "vqgan.toml"]] {
        let line = command.join(" ");
        let words = ["1 of 3 shards, more than a share of 0.1, cannot be used", "shards/unreadable.tar"];
        let run = "run=refused";
        assert_all_refused(&scene, &[(&format!("{line} --set {run}"), FAILURE, &words)]);
        let allowed = ["--set", "run=allowed", "--set", "data.skip.share=0.4", "--set", "schedule.steps=6"];
        for _ in 0..2 {
            let finished = scene.run(&[command, &allowed].concat());
            assert_eq!(finished.code, Some(0), "{line}:\n{}", finished.stderr);
            assert!(finished.stderr.contains("sample alone: lacks "), "{}", finished.stderr);
        }
        assert_eq!(metric(&scene, "allowed", "known_flaws/unusable_shard"), Some(1.0), "{line}");
        assert_eq!(metric(&scene, "allowed", "known_flaws/missing_member"), Some(1.0), "{line}");
        let classes = logged_classes(&scene, "allowed");
        assert_eq!(classes, ["unusable_shard", "missing_member"], "each is logged once");
        fs::remove_dir_all(scene.path("allowed")).unwrap();
    }
    let info = scene.run(&["data", "info", "shards/*.tar"]);
    assert_eq!(info.code, Some(FAILURE), "{}", info.stderr);
}

#[test]
fn a_run_does_not_go_on_with_other_samples() {
    let scene = Scene::with_tokenizer();
    let commands = [&["train", "train.toml"][..], &["vqgan", "train", "vqgan.toml"]];
    for (command, run) in commands.into_iter().zip(["language", "pictures"]) {
        let run = format!("run={run}");
        let command = [command, &["--set", &run, "--set", "checkpoint_every=1"]].concat();
        let mut running = scene.start(&command);
        running.wait_for_path(&scene.path(&run[4..]).join("checkpoints/step-00000002"));
        running.kill();
        running.finish();
        let shard = fs::read(scene.path("shards/train-000000.tar")).unwrap();
        scene.write_shard("shards", samples().into_iter().skip(1));
        let finished = scene.run(&command);
        let words = ["data.s", "samples", "not those with which the run was started"];
        assert_refused(&command.join(" "), &finished, FAILURE, &words);
        fs::write(scene.path("shards/train-000000.tar"), shard).unwrap();
        scene.succeed(&[&command[..], &["--set", "checkpoint_every=50"]].concat());
    }
}

#[test]
fn examples_longer_than_a_row_are_skipped_and_long_texts_cut() {
    let scene = Scene::with_tokenizer();
    let names = json!({ "en": "many words ".repeat(50), "zh": "很多字".repeat(50) }).to_string();
    let png = samples().remove(0).members.remove(0).1;
    let wordy = Sample::new("wordy", &[("png", &png), ("json", names.as_bytes())]);
    scene.write_shard("shards", samples().into_iter().chain([wordy]));
    let steps = ["train", "train.toml", "--set", "schedule.steps=6", "--set", "tokenizer.train=270"];
    scene.succeed(&steps);
    assert!(metric(&scene, "run", "cut_texts") > Some(0.0));
    assert_eq!(metric(&scene, "run", "skipped_samples"), Some(0.0));

    // Less than the codes of a picture.
    let short = ["--set", "schedule.tokens=16", "--set", "run=short", "--set", "data.skip.share=1.0"];
    let finished = scene.run(&[&steps[..], &short].concat());
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(finished.stderr.contains("more than schedule.tokens = 16"), "{}", finished.stderr);
    assert!(metric(&scene, "short", "skipped_samples/unfit") > Some(0.0));
    assert!(logged_classes(&scene, "short").iter().all(|class| class == "unfit"));
}

#[test]
fn truncated_shards_are_used_up_to_the_cut() {
    let scene = Scene::with_tokenizer();
    let shard = scene.path("shards/train-000000.tar");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2 + 100]).unwrap();
    let finished = scene.run(&["train", "train.toml", "--set", "schedule.steps=2"]);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(finished.stderr.contains("train-000000.tar, byte 12288: truncated"), "{}", finished.stderr);
    let info = scene.json(&["data", "info", "shards/*.tar", "--json"]);
    assert!(info[0]["samples"].as_u64().is_some_and(|n| (4..=7).contains(&n)), "{info:?}");

    fs::write(&shard, &bytes[..300]).unwrap();
    let line = "data info shards/train-000000.tar";
    assert_all_refused(&scene, &[(line, WRONG_USE, &["train-000000.tar", "no whole sample"])]);
    fs::remove_file(&shard).unwrap();
    assert_all_refused(&scene, &[(line, WRONG_USE, &["train-000000.tar", "no such file"])]);
    fs::create_dir(&shard).unwrap();
    assert_all_refused(&scene, &[(line, WRONG_USE, &["train-000000.tar is a folder"])]);
}

#[test]
fn model_folders() {
    let scene = Scene::with_model();
    let line = "generate heart --model model --device cpu";
    let with_damage = |what: &str, damage: &dyn Fn(&Path), words: &[&str]| {
        let model = scene.path("model");
        copy(&scene.path("run/model"), &model);
        damage(&model);
        let args: Vec<&str> = line.split(' ').collect();
        assert_refused(what, &scene.run(&args), FAILURE, words);
        fs::remove_dir_all(model).unwrap();
    };
    let files = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vqgan/config.json",
        "vqgan/model.safetensors",
    ];
    for file in files {
        with_damage(
            &format!("without {file}"),
            &|model| fs::remove_file(model.join(file)).unwrap(),
            &[file, "No such file"],
        );
        let cut = |model: &Path| {
            let bytes = fs::read(model.join(file)).unwrap();
            fs::write(model.join(file), &bytes[..bytes.len() / 2]).unwrap();
        };
        with_damage(&format!("{file} is cut"), &cut, &[file]);
        with_damage(&format!("{file} is empty"), &|model| fs::write(model.join(file), "").unwrap(), &[file]);
    }

    let bpe =
        ["tokenizer", "train", "shards/*.tar", "--field", "json:en", "--vocab-size", "270", "-o", "bpe.json"];
    scene.succeed(&bpe);
    let other_tokenizer = |model: &Path| {
        fs::write(model.join("tokenizer.json"), fs::read(scene.path("bpe.json")).unwrap()).unwrap()
    };
    with_damage("another tokenizer", &other_tokenizer, &["tokenizer.json", "not the one", "trained with"]);
    let other_vqgan = |model: &Path| {
        let path = model.join("vqgan/model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
    };
    with_damage("another image tokenizer", &other_vqgan, &["vqgan", "not the one", "trained with"]);
    assert_all_refused(
        &scene,
        &[
            (line, FAILURE, &["model", "expected a model folder"]),
            ("train train.toml --set run=new --set vqgan=none", FAILURE, &["none", "No such file"]),
            ("vqgan eval none shards/*.tar --device cpu", FAILURE, &["none", "No such file"]),
        ],
    );
}

#[test]
fn a_run_does_not_go_on_with_other_tokenizers_or_settings() {
    let scene = Scene::with_tokenizer();
    let mut running = scene.start(&["train", "train.toml"]);
    running.wait_for_path(&scene.path("run/checkpoints/step-00000004"));
    running.kill();
    running.finish();
    let changed = "train train.toml --set seed=6";
    assert_all_refused(&scene, &[(changed, WRONG_USE, &["run was started with another `seed`"])]);

    let weights = scene.path("tokenizer/model/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&weights, other).unwrap();
    assert_all_refused(&scene, &[("train train.toml", FAILURE, &["image tokenizer", "not the one"])]);
    fs::write(&weights, bytes).unwrap();
    scene.succeed(&["train", "train.toml"]);
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before_it() {
    // Room for logs and codes, but not for weights, in units of 512 or 1024 bytes. The signal that would end the program
    // is ignored, so that it sees the failure as it would see a full disk.
    const NO_ROOM: &str = "trap '' XFSZ; ulimit -f 40";
    let scene = Scene::with_tokenizer();
    for (args, run) in
        [(["train", "train.toml"].as_slice(), "run"), (&["vqgan", "train", "vqgan.toml"], "tokenizer")]
    {
        let mut running = scene.start(args);
        running.wait_for_path(&scene.path(run).join("checkpoints/step-00000004"));
        running.kill();
        running.finish();
        let finished = finish(scene.command_after(NO_ROOM, args));
        let words = ["checkpoint of step", "was not saved", "File too large", "older checkpoints are intact"];
        assert_refused(run, &finished, FAILURE, &words);
        scene.succeed(args);
    }
}

#[test]
fn a_damaged_newest_checkpoint_is_named_and_the_one_before_is_not_used_unasked() {
    let scene = Scene::with_tokenizer();
    for (args, run) in
        [(["train", "train.toml"].as_slice(), "run"), (&["vqgan", "train", "vqgan.toml"], "tokenizer")]
    {
        let mut running = scene.start(args);
        running.wait_for_path(&scene.path(run).join("checkpoints/step-00000008"));
        running.signal("INT");
        assert_eq!(running.finish().code, Some(0));
        let checkpoints = fs::read_dir(scene.path(run).join("checkpoints")).unwrap();
        let mut checkpoints: Vec<_> = checkpoints.map(|entry| entry.unwrap().path()).collect();
        checkpoints.sort();
        let [older, newest] = checkpoints.as_slice() else { panic!("{checkpoints:?}") };
        let weights = newest.join("model.safetensors");
        fs::write(&weights, &fs::read(&weights).unwrap()[1..]).unwrap();
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let words = [&name(newest), "is damaged", "model.safetensors", "older checkpoints", &name(older)];
        assert_refused(run, &scene.run(args), FAILURE, &words);
        fs::remove_dir_all(newest).unwrap();
        scene.succeed(args);
    }
}
