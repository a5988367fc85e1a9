//! Language models that cannot be read or converted get one clear line.

use std::fs;
use std::path::{Path, PathBuf};

use m6_runtime::{read_tensors, write_tensors};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::refusals::{FAILURE, WRONG_USE, assert_all_refused, assert_refused, copy};
use crate::scene::Scene;

/// Tensors of a file by name.
type Tensors = Vec<(String, Tensor)>;

fn published() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/qwen2")
}

/// A scene with the language model `qwen2`.
fn scene() -> Scene {
    let scene = Scene::new();
    copy(&published(), &scene.path("qwen2"));
    scene
}

#[test]
fn configs_that_describe_no_model_of_ours() {
    let scene = scene();
    let config: Value = serde_json::from_slice(&fs::read(published().join("config.json")).unwrap()).unwrap();
    let cases: [(&str, Value, &[&str]); 10] = [
        ("model_type", json!("llama"), &["model_type = \"llama\"", "expected qwen2"]),
        (
            "rope_parameters",
            json!({ "rope_type": "longrope" }),
            &["rope_type = \"longrope\"", "expected default"],
        ),
        ("hidden_act", json!("gelu"), &["hidden_act = \"gelu\"", "expected silu"]),
        ("num_attention_heads", Value::Null, &["missing field `num_attention_heads`"]),
        ("num_attention_heads", json!("four"), &["num_attention_heads: invalid type", "\"four\""]),
        ("num_key_value_heads", json!(3), &["kv_heads = 3"]),
        ("num_key_value_heads", json!(0), &["kv_heads = 0"]),
        ("hidden_size", json!(18), &["width = 18: expected a multiple of 8"]),
        ("num_hidden_layers", json!(1u64 << 40), &["layer_types has 2 entries"]),
        ("intermediate_size", json!(-4), &["-4"]),
    ];
    for (key, value, words) in cases {
        let mut changed = config.clone();
        match changed.as_object_mut().unwrap() {
            keys if value.is_null() => drop(keys.remove(key)),
            keys => drop(keys.insert(key.to_owned(), value.clone())),
        }
        fs::write(scene.path("qwen2/config.json"), changed.to_string()).unwrap();
        let words = [words, &["qwen2/config.json"]].concat();
        for command in [&["score", "--tokens", "1,2", "--device", "cpu", "--model"][..], &["plan"]] {
            let finished = scene.run(&[command, &["qwen2"]].concat());
            assert_refused(&format!("{} with {key} = {value}", command[0]), &finished, FAILURE, &words);
        }
    }
    fs::write(scene.path("qwen2/config.json"), "{\"model_type\": ").unwrap();
    assert_all_refused(
        &scene,
        &[("score --model qwen2 --tokens 1,2", FAILURE, &["qwen2/config.json", "EOF while parsing"])],
    );
}

#[test]
fn weights_that_are_not_those_of_the_config() {
    let scene = scene();
    let file = scene.path("qwen2/model.safetensors");
    let whole = fs::read(&file).unwrap();
    let score = "score --model qwen2 --device cpu --tokens 1,2";
    let refused = |words: &[&str]| assert_all_refused(&scene, &[(score, FAILURE, words)]);
    let altered = |alter: &dyn Fn(&mut Tensors), words: &[&str]| {
        fs::write(&file, &whole).unwrap();
        let mut tensors = read_tensors(&file).unwrap();
        alter(&mut tensors);
        write_tensors(&file, &tensors).unwrap();
        refused(words);
    };
    altered(&|tensors| drop(tensors.pop()), &["qwen2: `model.norm.weight` is missing"]);
    let ones = || Tensor::ones([3, 4], (Kind::Float, tch::Device::Cpu));
    altered(
        &|tensors| tensors[0].1 = ones(),
        &["`lm_head.weight` has shape [3, 4]", "the config asks for [32, 16]"],
    );
    altered(&|tensors| tensors.push(("extra".into(), ones())), &["`extra` is not part of this model"]);
    altered(
        &|tensors| tensors[1].1 = &tensors[1].1 * f64::NAN,
        &["`model.embed_tokens.weight` holds what is no number"],
    );
    for cut in [0, 7, 100, whole.len() - 1] {
        fs::write(&file, &whole[..cut]).unwrap();
        refused(&["model.safetensors"]);
    }
    fs::remove_file(&file).unwrap();
    refused(&["qwen2", "model.safetensors"]);
    // An index, of whose shards one is not there.
    let index = json!({ "weight_map": { "lm_head.weight": "model-00001-of-00001.safetensors" } });
    fs::write(scene.path("qwen2/model.safetensors.index.json"), index.to_string()).unwrap();
    refused(&["model-00001-of-00001.safetensors", "No such file"]);
}

#[test]
fn texts_that_a_model_cannot_take() {
    let scene = scene();
    let long = vec!["1"; 65].join(",");
    assert_all_refused(
        &scene,
        &[
            (
                &format!("score --model qwen2 --device cpu --tokens {long}"),
                WRONG_USE,
                &["65 tokens", "at most 64"],
            ),
            ("score --model qwen2 --device cpu --tokens 1,32", WRONG_USE, &["32"]),
            ("score --model qwen2 --device cpu --tokens 1,-2", WRONG_USE, &["-2"]),
        ],
    );
}

#[test]
fn language_models_that_cannot_be_converted() {
    let scene = Scene::with_tokenizer();
    copy(&published(), &scene.path("qwen2"));
    scene.succeed(&["convert", "qwen2", "own"]);
    copy(&scene.path("own"), &scene.path("normed"));
    let own = fs::read_to_string(scene.path("own/config.json")).unwrap();
    let normed = own.replace("\"dropout\": 0.0", "\"dropout\": 0.1");
    fs::write(scene.path("normed/config.json"), normed).unwrap();
    assert_all_refused(
        &scene,
        &[
            ("convert qwen2 own", WRONG_USE, &["own", "not empty"]),
            ("convert qwen2 train.toml", FAILURE, &["train.toml", "Not a directory"]),
            ("convert qwen2 train.toml/own", FAILURE, &["train.toml", "Not a directory"]),
            ("convert none new", FAILURE, &["none/config.json", "No such file"]),
            ("convert tokenizer/model new", FAILURE, &["config.json", "expected a language model"]),
            ("convert normed new", FAILURE, &["normed", "dropout = 0.1 has no counterpart"]),
            ("score --model none --tokens 1,2", FAILURE, &["none/config.json", "No such file"]),
        ],
    );
    assert!(!scene.path("new").exists());
}
