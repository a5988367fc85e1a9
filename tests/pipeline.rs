//! From a folder of pictures to captions and drawings, command after command.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::scene::{Sample, Scene, samples};

const PICTURES: usize = 12;

#[track_caller]
fn has_keys(object: &Value, keys: &[&str]) {
    for key in keys {
        assert!(!object[key].is_null(), "no `{key}` in {object}");
    }
}

#[track_caller]
fn one(mut lines: Vec<Value>) -> Value {
    assert_eq!(lines.len(), 1, "{lines:?}");
    lines.remove(0)
}

#[test]
fn pictures_become_a_model_that_draws_and_captions() {
    let scene = Scene::new();

    let packed = one(scene.json(&["data", "pack", "pictures", "shards", "--prefix", "train", "--json"]));
    assert_eq!((&packed["samples"], &packed["skipped"]), (&PICTURES.into(), &Value::Array(vec![])));
    let info = one(scene.json(&["data", "info", "shards/train-*.tar", "--json"]));
    assert_eq!((&info["samples"], &info["broken"]), (&PICTURES.into(), &0.into()));
    assert_eq!(info["captions"][".json zh"]["count"], PICTURES);
    scene.succeed(&[
        "data",
        "show",
        "shards/train-*.tar",
        "--field",
        "json:en",
        "-n",
        "5",
        "-o",
        "sheet.png",
    ]);
    assert!(scene.path("sheet.png").is_file());

    let bpe = ["--field", "json:en", "--field", "json:zh", "--vocab-size", "280", "-o", "bpe.json"];
    scene.succeed(&[&["tokenizer", "train", "shards/train-*.tar"], bpe.as_slice()].concat());
    let texts = ["a red\r\nsquare", "", "红色"];
    let lines: String = texts.iter().map(|text| format!("{}\n", Value::from(*text))).collect();
    fs::write(scene.path("texts.jsonl"), lines).unwrap();
    fs::write(scene.path("texts.txt"), "红色\n").unwrap();
    let encoded = scene.json(&["tokenizer", "encode", "bpe.json", "texts.jsonl", "--json"]);
    let tokenizer = m6_data::Tokenizer::load(&scene.path("bpe.json")).unwrap();
    let expected = texts.map(|text| json!({ "tokens": tokenizer.encode(text).unwrap() }));
    assert_eq!(encoded, expected);
    let ids: Vec<String> = tokenizer.encode("红色").unwrap().iter().map(u32::to_string).collect();
    assert_eq!(scene.succeed(&["tokenizer", "encode", "bpe.json", "texts.txt"]), ids.join(" ") + "\n");
    assert_chats(&scene);
    scene.succeed(&["vqgan", "train", "vqgan.toml", "--set", "schedule.steps=8"]);
    let scores = one(scene.json(&[
        "vqgan",
        "eval",
        "tokenizer/model",
        "shards/train-*.tar",
        "--grid",
        "grid.png",
        "--device",
        "cpu",
        "--json",
    ]));
    has_keys(
        &scores,
        &["samples", "psnr", "ssim", "codebook_usage", "perplexity", "bits_per_pixel", "fidelity"],
    );
    assert_eq!(scores["samples"], PICTURES);
    assert!(scene.path("grid.png").is_file());

    let layouts = ["taming", "diffusers"].map(|layout| (layout, format!("{layout}.safetensors")));
    for (layout, file) in &layouts {
        scene.succeed(&["vqgan", "export", "tokenizer/model", "--layout", layout, "-o", file]);
        let said = scene.succeed(&["vqgan", "import", file, "-o", layout, "--resolution", "16"]);
        assert!(said.contains(&format!("layout {layout}")), "{}", said);
        let again =
            one(scene.json(&["vqgan", "eval", layout, "shards/train-*.tar", "--device", "cpu", "--json"]));
        assert_eq!(again, scores);
    }

    let encode =
        ["vqgan", "encode", "tokenizer/model", "pictures", "-o", "codes", "--reconstructions", "seen"];
    let lines = scene.json(&[&encode[..], &["--device", "cpu", "--json"]].concat());
    assert_eq!(lines.len(), PICTURES);
    has_keys(&lines[0], &["picture", "codes", "width", "height", "rows", "columns"]);
    let decode = ["vqgan", "decode", "tokenizer/model", "codes", "-o", "decoded", "--device", "cpu"];
    scene.succeed(&decode);
    // 20 pixels are five codes of four, so nothing is cut off.
    let read = |name: &str| fs::read(scene.path(name)).unwrap();
    assert!(read("seen/red-bar.png") == read("decoded/red-bar.png"), "encode and decode differ");

    let own_bpe = ["--set", "tokenizer={ file = 'bpe.json' }"];
    scene.succeed(&[&["train", "train.toml", "--set", "schedule.steps=8"], own_bpe.as_slice()].concat());
    let rows = fs::read_to_string(scene.path("run/metrics.jsonl")).unwrap();
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<u64> = rows.iter().filter_map(|row| row["step"].as_u64()).collect();
    assert_eq!(steps, [3, 6, 7, 8]);
    has_keys(&rows[1], &["loss", "lr", "grad_norm", "tokens_per_s", "loss/text_to_image", "expert_load_cv"]);
    let loads = rows[1]["expert_load"][0].as_array().unwrap();
    let sum: f64 = loads.iter().filter_map(Value::as_f64).sum();
    assert!(loads.len() == 4 && (sum - 4.0).abs() < 0.01, "{loads:?}");
    has_keys(&rows[2], &["validation/captioning", "validation/text_to_image"]);
    assert!(scene.path("run/samples/step-00000008-samples.png").is_file());

    let model = ["--model", "run/model", "--device", "cpu", "--json"];
    let drawn = scene.json(
        &[&["generate", "red bar", "蓝方块", "-n", "2", "--seed", "7", "-o", "art/out.png"], &model[..]]
            .concat(),
    );
    assert_eq!(drawn.len(), 4);
    for (i, line) in drawn.iter().enumerate() {
        assert_eq!(line["file"], format!("art/out-{i:03}.png"));
        assert_eq!(line["prompt"], ["red bar", "蓝方块"][i / 2]);
        assert_eq!(line["seed"], 7 + i as u64 % 2);
        assert!(scene.path(line["file"].as_str().unwrap()).is_file());
    }
    assert!(scene.path("art/out.png").is_file());
    let sidecar: Value = serde_json::from_slice(&fs::read(scene.path("art/out.json")).unwrap()).unwrap();
    assert_eq!(sidecar["pictures"].as_array().map(Vec::len), Some(4));

    let captions =
        scene.json(&[&["caption", "pictures/red-bar.png", "art/out-000.png"], &model[..]].concat());
    let seen: Vec<_> = captions.iter().map(|line| (line["image"].as_str(), line["lang"].as_str())).collect();
    let images = ["pictures/red-bar.png", "art/out-000.png"];
    let expected = images.map(|image| [(Some(image), Some("en")), (Some(image), Some("zh"))]).concat();
    assert_eq!(seen, expected);
    for line in &captions {
        let best = &line["captions"][0];
        assert!(best["text"].is_string() && best["logprob"].as_f64().is_some_and(|p| p <= 0.0), "{line}");
    }

    let scores = one(scene.json(
        &[&["eval", "captions", "shards/train-*.tar", "--beams", "2", "--out", "scores"], &model[..]]
            .concat(),
    ));
    assert_eq!(scores["samples"], PICTURES);
    has_keys(&scores, &["en", "zh", "by_style"]);
    assert_eq!(fs::read_to_string(scene.path("scores/captions.jsonl")).unwrap().lines().count(), PICTURES);

    let options = ["--candidates", "4", "--prompt", "{en}", "--limit", "3", "--train", "shards/train-*.tar"];
    let scores =
        one(scene.json(&[&["eval", "pictures", "shards/train-*.tar"], &options[..], &model[..]].concat()));
    assert_eq!((&scores["samples"], &scores["chance"]), (&3.into(), &0.25.into()));
    has_keys(&scores["prompts"][0], &["prompt", "seconds_per_picture", "spaces", "round_trip"]);
}

#[test]
fn a_plan_knows_the_size_of_a_model_and_of_its_config() {
    let scene = Scene::with_model();
    let weights = m6_runtime::read_tensors(&scene.path("run/model/model.safetensors")).unwrap();
    let size: usize = weights.iter().map(|(_, tensor)| tensor.numel()).sum();
    let plan = |path: &str| one(scene.json(&["plan", path, "--gpu-memory", "1G", "--json"]));
    let plan_of_model = plan("run/model");
    assert_eq!(plan_of_model["parameters"], size);
    has_keys(&plan_of_model, &["active_parameters", "parts", "flops"]);
    has_keys(&plan_of_model["memory"][0], &["states", "activations_per_token", "largest_batch"]);
    let tokens = m6_data::Tokenizer::load(&scene.path("run/model/tokenizer.json")).unwrap().vocab_size();
    scene.succeed(&["plan", "train.toml"]);
    let rows = 300 - tokens as i64;
    assert_eq!(plan("train.toml")["parameters"], size as i64 + 32 * rows);
}

#[test]
fn one_picture_does_not_depend_on_its_neighbours() {
    let scene = Scene::with_model();
    let draw = |prompts: &[&str], out: &str| {
        let flags = ["--model", "run/model", "--device", "cpu", "--seed", "3", "-n", "2", "-o", out];
        scene.succeed(&[&["generate"], prompts, &flags].concat());
    };
    draw(&["red bar", "blue pole"], "both.png");
    draw(&["red bar", "blue pole"], "again.png");
    draw(&["blue pole"], "alone.png");
    let read = |name: &str| fs::read(scene.path(name)).unwrap();
    assert_eq!(read("both.png"), read("again.png"));
    assert_eq!(read("both-003.png"), read("alone-001.png"));
    assert_ne!(read("alone-000.png"), read("alone-001.png"));
}

#[test]
fn lint_finds_what_is_broken_and_repair_leaves_it_out() {
    let scene = Scene::new();
    let broken = Sample::new("broken", &[("png", b"no picture"), ("json", br#"{"en": "a"}"#)]);
    scene.write_shard("shards", samples().into_iter().chain([broken]));
    let found = scene.run(&["data", "lint", "shards/*.tar", "--repair", "clean", "--json"]);
    assert_eq!(found.code, Some(1), "{}", found.stderr);
    assert!(found.stderr.contains("m6: shards/*.tar: flaws: 1"), "{}", found.stderr);
    let report: Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!((&report["samples"], &report["clean"]), (&json!(13), &json!(12)));
    assert_eq!(report["counts"], json!({ "broken_picture": 1 }));
    assert_eq!(report["flaws"][0]["key"], "broken");
    assert_eq!(report["repaired"], json!(["clean/clean-000000.tar"]));
    let onto_itself = scene.run(&["data", "lint", "clean/*.tar", "--repair", "clean"]);
    assert_eq!(onto_itself.code, Some(2), "{}", onto_itself.stderr);
    assert!(onto_itself.stderr.contains("holds clean-000000.tar already"), "{}", onto_itself.stderr);
    let again = scene.succeed(&["data", "lint", "clean/*.tar"]);
    assert_eq!(again, "12 samples in 1 shards, 12 of them whole\n");
}

#[test]
fn filters_leave_out_what_breaks_a_rule_and_say_so() {
    let scene = Scene::new();
    let [square, bar] = [&samples()[0], &samples()[1]].map(|sample| sample.members[0].1.clone());
    scene.write_shard(
        "shards",
        [
            Sample::new(
                "square",
                &[("png", &square), ("json", r#"{"en": "a square", "zh": "方"}"#.as_bytes())],
            ),
            Sample::new("again", &[("png", &square), ("txt", b"a square")]),
            Sample::new("bar", &[("png", &bar), ("txt", b"a bar")]),
            Sample::new("text", &[("txt", b"?")]),
        ],
    );
    let rules = ["--filter", "distinct:pictures", "--filter", "text_length:2.."];
    let pack = ["data", "pack", "shards/*.tar", "clean", "--dropped", "dropped.jsonl"];
    let printed = scene.succeed(&[&pack[..], &rules].concat());
    let expected = "clean/data-000000.tar\n\
        distinct:pictures left out 1 samples, 0 texts\n\
        text_length:2.. left out 1 samples, 2 texts\n\
        2 samples in 1 shards, 0 of them without a text, 0 without a picture, 0 skipped\n";
    assert_eq!(printed, expected);
    let dropped = fs::read_to_string(scene.path("dropped.jsonl")).unwrap();
    let dropped: Vec<Value> = dropped.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let keys: Vec<_> = dropped.iter().map(|line| (&line["key"], &line["field"])).collect();
    let expected = json!([["square", ".json zh"], ["again", null], ["text", ".txt"], ["text", null]]);
    assert_eq!(json!(keys), expected);
    let info = one(scene.json(&["data", "info", "clean/*.tar", "--json"]));
    assert_eq!(info["extensions"], json!({ "json": 1, "png": 2, "txt": 1 }));
    let again = one(scene.json(&[&["data", "pack", "clean/*.tar", "twice", "--json"], &rules[..]].concat()));
    assert_eq!(again["filtered"][1], json!({ "rule": "text_length:2..", "samples": 0, "texts": 0 }));
}

#[test]
fn a_model_says_which_texts_are_too_surprising() {
    let scene = Scene::with_model();
    let pack = |rule: &str, out: &str, model: &[&str]| {
        scene.run(&[&["data", "pack", "shards/*.tar", out, "--json", "--filter", rule], model].concat())
    };
    let model = ["--model", "run/model", "--device", "cpu"];
    // No text is certain.
    for (rule, stay) in [("perplexity:..1.0", 0), ("perplexity:1.0..", PICTURES)] {
        let finished = pack(rule, &format!("out{stay}"), &model);
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        assert_eq!(report["samples"], stay, "{report}");
    }
    let finished = pack("perplexity:..100", "none", &[]);
    assert_eq!(finished.code, Some(2));
    assert!(finished.stderr.contains("perplexity:..100\": expected a model"), "{}", finished.stderr);
}

#[test]
fn bench_prints_its_figures() {
    let scene = Scene::with_shard();
    let bench =
        ["data", "bench", "shards/*.tar", "--workers", "2", "--transform", "resize:18 | random_crop:16"];
    let report = &scene.json(&[&bench[..], &["--samples", "50", "--json"]].concat())[0];
    assert_eq!(
        (&report["samples"], &report["broken"], &report["workers"]),
        (&json!(50), &json!(0), &json!(2))
    );
    let figures = ["samples_per_s", "mb_per_s"].map(|key| &report[key]);
    let stages = ["read", "decode", "transform"].map(|key| &report["stages"][key]);
    assert!(figures.iter().chain(&stages).all(|figure| figure.as_f64() > Some(0.0)), "{report}");
}

#[test]
fn a_published_language_model_is_converted_there_and_back() {
    let scene = Scene::new();
    let published = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/parity/qwen2-moe");
    scene.succeed(&["convert", published, "own"]);
    scene.succeed(&["convert", "own", "back"]);
    scene.succeed(&["convert", "own", "half", "--dtype", "bf16"]);
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap().len();
    assert!(weights(&scene.path("half")) < weights(&scene.path("back")));
    let score = |model: &str| {
        let line = ["score", "--model", model, "--tokens", "1,2,3,4", "--device", "cpu", "--json"];
        one(scene.json(&line))["logprobs"].clone()
    };
    let exact = score(published);
    assert_eq!((score("own"), score("back")), (exact.clone(), exact));
}

#[test]
fn texts_are_scored_by_their_tokens() {
    let scene = Scene::new();
    write_language_model(&scene.path("language"), 300);
    fs::write(scene.path("poem.txt"), "a red square\n红方块").unwrap();
    let score = |what: &[&str]| {
        one(scene.json(&[&["score", "--model", "language", "--device", "cpu", "--json"], what].concat()))
    };
    let text = score(&["--text", "a red square\n红方块"]);
    assert_eq!(score(&["--file", "poem.txt"]), text);
    let tokens: Vec<String> = text["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(score(&["--tokens", &tokens.join(",")]), text);
    let logprobs: Vec<f64> = text["logprobs"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
    assert_eq!(logprobs.len() + 1, tokens.len());
    let nll = text["nll"].as_f64().unwrap();
    let mean = -logprobs.iter().sum::<f64>() / logprobs.len() as f64;
    assert!((nll - mean).abs() < 1e-5);
    assert!((text["perplexity"].as_f64().unwrap() - mean.exp()).abs() < 1e-3 * mean.exp());
}

#[test]
fn a_dense_model_gets_experts() {
    let scene = Scene::new();
    let dense = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/parity/qwen2");
    let stack = |width: i64| {
        format!(
            "[model]\nwidth = {width}\nlayers = 2\nheads = 4\nkv_heads = 2\nhead_width = 8\nhidden = 24\nmax_text = 64\nqk_norm = false\n\
             bias = \"qkv\"\ntied = false\nrotary = {{ base = 1e4 }}\n[model.moe]\nexperts = 4\nactive = 2\nevery = 1\n\
             hidden = 16\nshared = 8\nrenormalize = false\nbalance_loss = 0.001\nbalance = \"model\"\nz_loss = 0.0\n"
        )
    };
    fs::write(scene.path("experts.toml"), stack(16)).unwrap();
    fs::write(scene.path("wide.toml"), stack(32)).unwrap();
    scene.succeed(&["convert", dense, "own", "--experts", "experts.toml", "--seed", "1"]);
    scene.succeed(&["convert", "own", "published"]);
    let score = |model: &str| {
        one(scene.json(&["score", "--model", model, "--tokens", "1,2,3,4", "--device", "cpu", "--json"]))
    };
    assert_eq!(score("own"), score("published"));
    assert_ne!(score("own"), score(dense));
    let refused = scene.run(&["convert", dense, "other", "--experts", "wide.toml"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("wide.toml: model.width = 32: expected 16"), "{}", refused.stderr);
    assert!(!scene.path("other").exists());
}

#[test]
fn a_dense_model_that_draws_gets_experts() {
    let scene = Scene::with_tokenizer();
    let config = fs::read_to_string(scene.path("train.toml")).unwrap();
    let is_of_experts = |line: &&str| line.starts_with("moe = ");
    let dense: Vec<&str> = config.lines().filter(|line| !is_of_experts(line)).collect();
    fs::write(scene.path("dense.toml"), dense.join("\n")).unwrap();
    scene.succeed(&["train", "dense.toml", "--set", "schedule.steps=2"]);
    scene.succeed(&["convert", "run/model", "experts", "--experts", "train.toml"]);
    let begin = ["--set", "run=more", "--set", "init=experts", "--set", "tokenizer.file=run/tokenizer.json"];
    let config = config.replace("train = 300", "");
    fs::write(scene.path("more.toml"), config).unwrap();
    scene.succeed(&[&["train", "more.toml", "--set", "schedule.steps=2"], &begin[..]].concat());
    let refused = scene.run(&["convert", "more/model", "again", "--experts", "train.toml"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("has moe.experts = 4: expected a dense one"), "{}", refused.stderr);
}

/// Conversations as tokens and labels; a line that is none is named.
fn assert_chats(scene: &Scene) {
    let ranks =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/src/tokenizer/testdata/qwen_cut.tiktoken");
    fs::copy(ranks, scene.path("qwen.tiktoken")).unwrap();
    let turns =
        r#"{"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "yes"}]}"#;
    fs::write(scene.path("chats.jsonl"), turns).unwrap();
    let chat = ["tokenizer", "chat", "qwen.tiktoken", "chats.jsonl"];
    let found = one(scene.json(&[&chat[..], &["--json"]].concat()));
    let tokenizer = m6_data::Tokenizer::load(&scene.path("qwen.tiktoken")).unwrap();
    let messages: Vec<m6_data::Message> =
        serde_json::from_value(serde_json::from_str::<Value>(turns).unwrap()["messages"].clone()).unwrap();
    let expected = m6_data::ChatTokens::new(&tokenizer, &messages).unwrap();
    assert_eq!(found, json!(expected));
    let shown = scene.succeed(&chat);
    let learned = |label: &&i64| **label != m6_data::chat::IGNORED;
    let bare: Vec<&str> = shown.split_whitespace().filter(|token| !token.starts_with('(')).collect();
    let labels = expected.labels.iter().filter(learned).map(i64::to_string);
    assert_eq!(bare, labels.collect::<Vec<_>>());
    fs::write(scene.path("chats.jsonl"), turns.replace("user", "bot")).unwrap();
    let refused = scene.run(&chat);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.stderr.contains("chats.jsonl: line 1: expected an object with messages"),
        "{}",
        refused.stderr
    );
}

/// Writes a random language model of Qwen2's layout, with a tokenizer of 256 ids or more and `rows` rows in its table.
fn write_language_model(folder: &Path, rows: i64) {
    let texts = ["a red square", "红方块"].map(str::to_owned);
    fs::create_dir(folder).unwrap();
    m6_data::train_bpe(texts.into_iter(), 270).unwrap().save(&folder.join("tokenizer.json")).unwrap();
    let config = json!({
        "model_type": "qwen2", "vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu", "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let layer = [
        ("input_layernorm.weight", vec![32]),
        ("post_attention_layernorm.weight", vec![32]),
        ("self_attn.q_proj.weight", vec![32, 32]),
        ("self_attn.q_proj.bias", vec![32]),
        ("self_attn.k_proj.weight", vec![16, 32]),
        ("self_attn.k_proj.bias", vec![16]),
        ("self_attn.v_proj.weight", vec![16, 32]),
        ("self_attn.v_proj.bias", vec![16]),
        ("self_attn.o_proj.weight", vec![32, 32]),
        ("mlp.gate_proj.weight", vec![48, 32]),
        ("mlp.up_proj.weight", vec![48, 32]),
        ("mlp.down_proj.weight", vec![32, 48]),
    ];
    let layer = layer.map(|(name, shape)| (format!("model.layers.0.{name}"), shape));
    let rest = [("model.embed_tokens.weight", vec![rows, 32]), ("model.norm.weight", vec![32])];
    let rest = rest.map(|(name, shape)| (name.to_owned(), shape));
    let random = |shape: Vec<i64>| tch::Tensor::randn(shape, (tch::Kind::Float, tch::Device::Cpu)) * 0.1;
    let tensors: Vec<_> = layer.into_iter().chain(rest).map(|(name, shape)| (name, random(shape))).collect();
    m6_runtime::write_tensors(&folder.join("model.safetensors"), &tensors).unwrap();
}

#[test]
fn a_language_model_learns_pictures() {
    let scene = Scene::with_tokenizer();
    write_language_model(&scene.path("language"), 300);
    let config = fs::read_to_string(scene.path("train.toml")).unwrap();
    let (head, rest) = config.split_once("[model]").unwrap();
    let (_, tail) = rest.split_once("[data]").unwrap();
    let model = "[model]\nwidth = 32\nlayers = 1\nheads = 2\nkv_heads = 1\nhidden = 48\nmax_text = 32\ndropout = 0.1\n\
        qk_norm = false\nbias = \"qkv\"\nrotary = { base = 1e4 }\npatches = { resolution = 16, channels = [16, 16] }\n";
    let head = head.replace("train = 300", "file = \"start/tokenizer.json\"");
    fs::write(scene.path("train.toml"), format!("init = \"start\"\n{head}{model}[data]{tail}")).unwrap();
    scene.succeed(&["convert", "language", "start", "--pictures", "train.toml", "--seed", "1"]);

    let table = |folder: &str, name: &str| {
        let tensors = m6_runtime::read_tensors(&scene.path(folder).join("model.safetensors")).unwrap();
        tensors.into_iter().find(|(found, _)| found == name).unwrap().1
    };
    let (old, new) = (table("language", "model.embed_tokens.weight"), table("start", "tokens.weight"));
    let ids = m6_data::Tokenizer::load(&scene.path("start/tokenizer.json")).unwrap().vocab_size() as i64;
    assert_eq!(new.narrow(0, 0, ids), old.narrow(0, 0, ids));

    scene.succeed(&["train", "train.toml", "--set", "schedule.steps=2"]);
    scene.succeed(&["generate", "--model", "run/model", "red square", "-o", "out.png", "--device", "cpu"]);
    scene.succeed(&["caption", "--model", "run/model", "pictures/red-square.png", "--device", "cpu"]);

    // The same with a network that comes trained: its weights come along.
    let config = fs::read_to_string(scene.path("train.toml")).unwrap();
    let trained =
        config.replace("{ resolution = 16, channels = [16, 16] }", "{ resolution = 32, resnet = 50 }");
    fs::write(scene.path("trained.toml"), format!("extractor = \"resnet.safetensors\"\n{trained}")).unwrap();
    write_extractor(&scene);
    scene.succeed(&["convert", "language", "seeing", "--pictures", "trained.toml"]);
    let tensors = m6_runtime::read_tensors(&scene.path("resnet.safetensors")).unwrap();
    let (name, kernel) = tensors.into_iter().find(|(name, _)| name == "layer4.2.conv3.weight").unwrap();
    assert_eq!(table("seeing", &format!("patches.resnet.{name}")).to_kind(tch::Kind::BFloat16), kernel);

    write_language_model(&scene.path("small"), 200);
    fs::remove_file(scene.path("language/tokenizer.json")).unwrap();
    for (folder, problem) in [
        ("language", "language: holds none of tokenizer.json, qwen.tiktoken"),
        ("small", "ids: expected at most 200, the rows of its table"),
    ] {
        let refused = scene.run(&["convert", folder, "other", "--pictures", "train.toml"]);
        assert_eq!(refused.code, Some(1));
        assert!(refused.stderr.contains(problem), "{}", refused.stderr);
    }
}

#[test]
fn blocks_that_shared_their_weights_learn_apart() {
    let scene = Scene::with_tokenizer();
    let pseudo = "model.share_layers=true";
    scene.succeed(&[
        "train",
        "train.toml",
        "--set",
        "schedule.steps=2",
        "--set",
        pseudo,
        "--set",
        "model.moe.every=1",
    ]);
    scene.succeed(&["convert", "run/model", "real", "--delink"]);
    let caption = |model: &str| {
        let args = ["caption", "--model", model, "pictures/red-square.png", "--device", "cpu", "--json"];
        scene.json(&args)[0]["captions"].clone()
    };
    let before = caption("run/model");
    assert!(before[0]["logprob"].is_f64(), "{before}");
    assert_eq!(before, caption("real"));
    let size = |model: &str| fs::metadata(scene.path(model).join("model.safetensors")).unwrap().len();
    assert!(size("real") > size("run/model"));

    let again = scene.run(&["convert", "real", "other", "--delink"]);
    assert_eq!(again.code, Some(2), "{}", again.stderr);
    assert!(again.stderr.contains("share_layers = false"), "{}", again.stderr);
    let start = ["--set", "init=\"real\"", "--set", "tokenizer={ file = \"real/tokenizer.json\" }"];
    let train = [
        "train",
        "train.toml",
        "--set",
        "schedule.steps=2",
        "--set",
        "run=apart",
        "--set",
        "model.moe.every=1",
    ];
    scene.succeed(&[&train[..], &start[..]].concat());
}

/// Writes a ResNet-50 with random weights as `resnet.safetensors`.
fn write_extractor(scene: &Scene) -> PathBuf {
    let params = m6_runtime::Params::new(tch::Device::Cpu, 3);
    let config = serde_json::from_str(r#"{ "resolution": 32, "resnet": 50 }"#).unwrap();
    m6_vision::PatchEncoder::new(&params, &config, 8);
    let path = scene.path("resnet.safetensors");
    (&params / "resnet").save(&path, tch::Kind::BFloat16).unwrap();
    path
}

#[test]
fn pictures_are_seen_by_a_trained_network_or_by_their_pixels() {
    let scene = Scene::with_tokenizer();
    let extractor = write_extractor(&scene);

    let seen = |patches: &str, transform: &str| {
        format!("model.patches={patches}\ndata.sources.bars.transform=\"{transform}\"\nschedule.steps=2")
    };
    let settings = seen("{ resolution = 32, resnet = 50 }", "resize:36 | random_crop:32");
    let set =
        |settings: &str| settings.lines().flat_map(|line| ["--set".to_owned(), line.to_owned()]).collect();
    let train = |settings: &str| {
        let settings: Vec<String> = set(settings);
        scene.run(&[&["train".to_owned(), "train.toml".to_owned()], &settings[..]].concat())
    };
    let trained = |settings: &str| {
        let finished = train(settings);
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    };
    let missing = train(&settings);
    assert_eq!(missing.code, Some(2), "{}", missing.stderr);
    let expected = "extractor is missing: expected a file with the weights of a ResNet-50";
    assert!(missing.stderr.contains(expected), "{}", missing.stderr);
    let of_no_use = train("extractor=\"resnet.safetensors\"");
    assert_eq!(of_no_use.code, Some(2), "{}", of_no_use.stderr);

    let settings = format!("{settings}\nextractor=\"resnet.safetensors\"");
    trained(&settings);
    let read = |path: &Path| m6_runtime::read_tensors(path).unwrap().into_iter().collect::<BTreeMap<_, _>>();
    let (model, file) = (read(&scene.path("run/model/model.safetensors")), read(&extractor));
    for (name, tensor) in &file {
        assert_eq!(&model[&format!("patches.resnet.{name}")], tensor, "{name}");
    }
    // A run that has begun has the network in its checkpoint.
    fs::remove_file(&extractor).unwrap();
    trained(&settings);
    scene.succeed(&["caption", "--model", "run/model", "pictures/red-square.png", "--device", "cpu"]);

    trained(&format!(
        "run=\"pixels\"\n{}",
        seen("{ resolution = 16, linear = 8 }", "resize:18 | random_crop:16")
    ));
    scene.succeed(&["caption", "--model", "pixels/model", "pictures/red-square.png", "--device", "cpu"]);
}

#[test]
fn shards_with_a_broken_picture_are_measured_indexed_and_shown() {
    let scene = Scene::new();
    let broken = Sample::new("broken", &[("png", b"no picture"), ("json", br#"{"en": "a", "zh": "b"}"#)]);
    scene.write_shard("shards", samples().into_iter().chain([broken]));
    let pictures = samples().len();
    let stats = one(scene.json(&["data", "stats", "shards/*.tar", "--json"]));
    assert_eq!((&stats["samples"], &stats["broken"]), (&json!(pictures + 1), &json!(1)));
    assert_eq!(stats["pictures"]["short_side"]["count"], json!(pictures));
    let table = scene.succeed(&["data", "stats", "shards/*.tar"]);
    assert!(table.contains("short side in pixels") && table.contains("broken: 1 samples"), "{table}");

    let before = one(scene.json(&["data", "info", "shards/*.tar", "--json"]));
    let index = one(scene.json(&["data", "index", "shards/*.tar", "--json"]));
    assert_eq!(index["written"], json!(["shards/train-000000.idx"]));
    assert!(scene.path("shards/train-000000.idx").is_file());
    assert_eq!(one(scene.json(&["data", "info", "shards/*.tar", "--json"])), before);

    let shown = scene.run(&["data", "show", "shards/*.tar", "--field", "json:en", "-o", "sheet.png"]);
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    assert!(shown.stdout.contains(&format!("{pictures} of {} samples", pictures + 1)), "{}", shown.stdout);
    assert!(shown.stderr.contains("sample broken: broken picture"), "{}", shown.stderr);
    m6_data::Rgb8::decode(&fs::read(scene.path("sheet.png")).unwrap()).unwrap();
}
