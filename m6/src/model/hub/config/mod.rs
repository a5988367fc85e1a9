//! `config.json` of Qwen2, Qwen2-MoE (transformers' `configuration_qwen2*.py`) and Qwen (its own `configuration_qwen.py`)
//! as settings of our stack, and back.

mod qwen;
mod qwen2;

use m6_runtime::FloatDtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::model::ModelConfig;
use crate::model::difference::difference;
use qwen::Qwen;
use qwen2::Qwen2;

/// transformers' default, and that of the first Qwen2 models.
const ROPE_THETA: f64 = 10_000.0;

/// A family of models, by how their weights are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `QWenLMHeadModel`.
    Qwen,
    /// `Qwen2ForCausalLM` and `Qwen2MoeForCausalLM`.
    Qwen2,
}

/// What a folder's config describes.
#[derive(Debug, Clone)]
pub struct Described {
    pub family: Family,
    pub model: ModelConfig,
    /// Rows of the input table, padding included.
    pub vocab_size: i64,
    pub ids: TokenIds,
}

/// Ids that generation in transformers looks at. Nothing of ours does; they are kept for what is written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenIds {
    bos_token_id: Option<Ids>,
    eos_token_id: Option<Ids>,
    pad_token_id: Option<Ids>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(i64),
    Any(Vec<i64>),
}

/// Reads a `config.json`.
///
/// # Errors
/// One line that names the key, where something is missing or not among what we compute.
pub fn describe(config: &Value) -> Result<Described, String> {
    #[derive(Deserialize)]
    struct Kind {
        model_type: String,
    }
    let Kind { model_type } = read(config)?;
    let (family, model, vocab_size) = match model_type.as_str() {
        "qwen2" => {
            let config = read::<Qwen2>(config)?;
            (Family::Qwen2, config.model()?, config.vocab_size)
        }
        "qwen2_moe" => {
            let mut all = qwen2::experts_by_default();
            merge(&mut all, config);
            let config = read::<Qwen2>(&all)?;
            (Family::Qwen2, config.model()?, config.vocab_size)
        }
        "qwen" => {
            let config = read::<Qwen>(config)?;
            (Family::Qwen, config.model()?, config.vocab_size)
        }
        other => return Err(format!("model_type = {other:?}: expected qwen2, qwen2_moe or qwen")),
    };
    Ok(Described { family, model, vocab_size, ids: read(config)? })
}

/// Some of the keys of a config; what is wrong names its key.
fn read<'a, T: Deserialize<'a>>(config: &'a Value) -> Result<T, String> {
    serde_path_to_error::deserialize(config).map_err(|error| match error.path().to_string().as_str() {
        // Of no key in particular.
        "." => error.inner().to_string(),
        key => format!("{key}: {}", error.inner()),
    })
}

/// A `config.json` that [`describe`] reads as the same, for weights stored as `dtype`.
///
/// # Errors
/// One line that names the first setting that the family has no counterpart of.
pub fn publish(described: &Described, dtype: FloatDtype) -> Result<Value, String> {
    let Described { family, model, vocab_size, ids } = described;
    let mut config = match family {
        Family::Qwen => qwen::write(model, dtype),
        Family::Qwen2 => qwen2::write(model, dtype),
    };
    config["vocab_size"] = json!(vocab_size);
    merge(&mut config, &json!(ids));
    difference(model, &describe(&config)?.model).map_or(Ok(config), |(key, value, _)| {
        Err(format!("{key} = {value} has no counterpart in a published {} config", json!(family)))
    })
}

/// Adds the settings of `more` that are not null.
fn merge(config: &mut Value, more: &Value) {
    for (key, value) in more.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        config[key] = value.clone();
    }
}

fn dtype_name(dtype: FloatDtype) -> &'static str {
    match dtype {
        FloatDtype::Bf16 => "bfloat16",
        FloatDtype::Fp32 => "float32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::{Bias, WindowConfig};
    use crate::model::rotary::{ChunkConfig, RotaryConfig, RotaryScaling};

    const SMALLEST: &str = r#"{"model_type": "qwen2", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_act": "silu", "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, MORE}"#;

    fn describe(text: &str) -> Result<Described, String> {
        super::describe(&serde_json::from_str(text).unwrap())
    }

    fn with(more: &str) -> Result<Described, String> {
        describe(&SMALLEST.replace("MORE", more))
    }

    #[test]
    fn files_of_before_and_after_transformers_5_say_the_same() {
        let before = with(
            r#""rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}"#,
        );
        let after = with(
            r#""rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}"#,
        );
        let (before, after) = (before.unwrap().model, after.unwrap().model);
        assert_eq!(before, after);
        assert_eq!(after.rotary.unwrap().base, 1e6);
    }

    /// So that `m6 convert --experts` takes the one for the other. The keys are those of the published files.
    #[test]
    fn presets_say_what_published_configs_do() {
        let both = r#""hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "sliding_window": 131072, "max_window_layers": 28, "use_sliding_window": false,
            "tie_word_embeddings": false"#;
        let experts = r#""num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480, "norm_topk_prob": false, "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.001"#;
        for (preset, published) in [
            ("qwen2-7b", format!(r#"{{"model_type": "qwen2", "vocab_size": 152064, {both}}}"#)),
            (
                "qwen2-57b-a14b",
                format!(r#"{{"model_type": "qwen2_moe", "vocab_size": 151936, {both}, {experts}}}"#),
            ),
        ] {
            let file = format!("{}/../configs/model/{preset}.toml", env!("CARGO_MANIFEST_DIR"));
            let table: toml::Table = std::fs::read_to_string(file).unwrap().parse().unwrap();
            let model: ModelConfig = table["model"].clone().try_into().unwrap();
            assert_eq!(difference(&describe(&published).unwrap().model, &model), None, "{preset}");
        }
    }

    #[test]
    fn qwens_own_fields_are_read() {
        let text = r#"{"model_type": "qwen", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
            "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128, "layer_norm_epsilon": 1e-6,
            "max_position_embeddings": 32768, "seq_length": 8192, "rotary_emb_base": 10000, "use_dynamic_ntk": true,
            "use_logn_attn": true, "no_bias": true, "tie_word_embeddings": false}"#;
        let described = describe(text).unwrap();
        assert_eq!((described.family, described.model.hidden), (Family::Qwen, 11008));
        let rotary = described.model.rotary.unwrap();
        assert_eq!(rotary.scaling, Some(RotaryScaling::DynamicSteps { trained: 8192 }));
        assert_eq!(rotary.logn, Some(8192));
        for (setting, message) in [
            (r#""rotary_pct": 0.5"#, "rotary_pct = 0.5: expected 1.0"),
            (r#""no_bias": false"#, "no_bias = false: expected true"),
            (r#""scale_attn_weights": false"#, "scale_attn_weights = false: expected true"),
        ] {
            let changed = text.replace(r#""no_bias": true"#, setting);
            assert_eq!(describe(&changed).unwrap_err(), message);
        }
    }

    /// `Qwen2MoeConfig()` of transformers 5.24.
    #[test]
    fn experts_that_are_not_described_are_those_of_transformers() {
        let config = SMALLEST.replace("\"qwen2\"", "\"qwen2_moe\"").replace("MORE", "\"num_experts\": 8");
        let moe = describe(&config).unwrap().model.moe.unwrap();
        assert_eq!((moe.experts, moe.active, moe.every, moe.renormalize), (8, 4, 1, false));
        assert_eq!((moe.hidden, moe.shared, moe.balance_loss), (Some(1408), Some(5632), 0.001));
    }

    #[test]
    fn what_we_do_not_compute_is_named() {
        let cases = [
            (r#""rope_parameters": {"rope_type": "longrope"}"#, "rope_type = \"longrope\": expected default"),
            (r#""rope_parameters": {"rope_type": "yarn"}"#, "factor is missing"),
            (r#""use_sliding_window": true"#, "sliding_window is missing"),
            (r#""num_experts": 4"#, "num_experts_per_tok is missing"),
            (r#""rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}"#, "mscale is set"),
            (r#""rope_scaling": {"type": "yarn", "factor": null}"#, "factor is missing"),
            (r#""layer_types": ["full_attention"]"#, "layer_types has 1 entries: expected 2"),
            (
                r#""use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1,
                    "layer_types": ["sliding_attention", "sliding_attention"]"#,
                "layer_types[0] = \"sliding_attention\": expected \"full_attention\", as use_sliding_window = true and \
                 max_window_layers = 1 say",
            ),
        ];
        for (more, message) in cases {
            let error = with(more).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
        let error = describe(r#"{"model_type": "llama"}"#).unwrap_err();
        assert_eq!(error, "model_type = \"llama\": expected qwen2, qwen2_moe or qwen");
        let error = describe(&SMALLEST.replace("silu", "gelu").replace(", MORE", "")).unwrap_err();
        assert_eq!(error, "hidden_act = \"gelu\": expected silu");
        let error = describe(&SMALLEST.replace("\"hidden_size\": 8,", "").replace(", MORE", "")).unwrap_err();
        assert!(error.starts_with("missing field `hidden_size`"), "{error}");
    }

    #[test]
    fn a_factor_that_is_not_said_follows_from_the_lengths() {
        let rope =
            r#""rope_scaling": {"type": "yarn", "factor": null, "original_max_position_embeddings": 16}"#;
        let scaling = with(rope).unwrap().model.rotary.unwrap().scaling;
        assert!(matches!(scaling, Some(RotaryScaling::Yarn { factor: 4.0, .. })), "{scaling:?}");
    }

    #[test]
    fn what_is_published_reads_back_as_the_same() {
        let ids = r#""bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": null"#;
        let described = with(ids).unwrap();
        let config = publish(&described, FloatDtype::Bf16).unwrap();
        assert_eq!((&config["dtype"], &config["eos_token_id"]), (&json!("bfloat16"), &json!([2, 3])));
        assert_eq!(config.get("pad_token_id"), None);
        let read = super::describe(&config).unwrap();
        assert_eq!((read.family, read.vocab_size, read.ids), (described.family, 8, described.ids));
    }

    #[test]
    fn chunks_are_read_and_written() {
        let chunks = r#""dual_chunk_attention_config": {"chunk_size": 16, "local_size": 4}"#;
        let described = with(chunks).unwrap();
        let found = described.model.rotary.as_ref().unwrap().chunks;
        assert_eq!(found, Some(ChunkConfig { size: 12, trained: 16 }));
        let written = publish(&described, FloatDtype::Fp32).unwrap()["dual_chunk_attention_config"].clone();
        let trained = "original_max_position_embeddings";
        assert_eq!(written, json!({"chunk_size": 16, "local_size": 4, trained: 16}));
        let wrong = with(&chunks.replace("\"local_size\": 4", "\"local_size\": 16")).unwrap();
        let problem = wrong.model.validate().unwrap_err();
        assert!(problem.starts_with("rotary.chunks.size = 0: expected 1 or more"), "{problem}");
        let windowed = r#", "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1"#;
        let both = with(&format!("{chunks}{windowed}")).unwrap();
        assert_eq!(both.model.validate().unwrap_err(), "window is set: expected none with rotary.chunks");
    }

    #[test]
    fn settings_without_a_counterpart_are_named() {
        let described = with(r#""tie_word_embeddings": true"#).unwrap();
        let problem = |change: fn(&mut Described)| {
            let mut described = described.clone();
            change(&mut described);
            publish(&described, FloatDtype::Fp32).unwrap_err()
        };
        let in_qwen2 =
            |setting: &str| format!("{setting} has no counterpart in a published \"qwen2\" config");
        assert_eq!(problem(|d| d.model.qk_norm = true), in_qwen2("qk_norm = true"));
        assert_eq!(problem(|d| d.model.bias = Bias::None), in_qwen2("bias = \"none\""));
        let rotary = RotaryConfig { logn: Some(16), ..RotaryConfig::new(10_000.0) };
        let mut qwen = described.clone();
        qwen.model.rotary = Some(rotary);
        assert_eq!(publish(&qwen, FloatDtype::Fp32).unwrap_err(), in_qwen2("rotary.logn = 16"));
        qwen.family = Family::Qwen;
        assert_eq!(publish(&qwen, FloatDtype::Fp32).unwrap()["seq_length"], json!(16));
        let moe = |more: &str| with(&format!(r#""num_experts": 4, "num_experts_per_tok": 2{more}"#)).unwrap();
        let alone = publish(&moe(""), FloatDtype::Fp32).unwrap_err();
        assert_eq!(alone, in_qwen2("moe.shared = null"));
        let mut windowed =
            moe(r#", "shared_expert_intermediate_size": 8, "use_sliding_window": true, "sliding_window": 8,
                "max_window_layers": 2"#);
        publish(&windowed, FloatDtype::Fp32).unwrap();
        // Of all blocks, where a published config has one of every other block.
        windowed.model.window = Some(WindowConfig::new(8, 0));
        assert_eq!(publish(&windowed, FloatDtype::Fp32).unwrap_err(), in_qwen2("window.every = 1"));
    }
}
