//! `config.json` of Qwen2, Qwen2-MoE (transformers' `configuration_qwen2*.py`) and Qwen (its own `configuration_qwen.py`)
//! as settings of our stack, and back.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::ModelConfig;
use super::super::config::{Bias, WindowConfig};
use super::super::moe::{Balance, MoeConfig, RouterNoise, RoutingKind};
use super::super::rotary::{ChunkConfig, RotaryConfig, RotaryScaling, beta_fast, beta_slow};
use super::StoredKind;

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
            let mut all = experts_by_default();
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

/// What transformers takes for keys that a Qwen2-MoE config lacks.
fn experts_by_default() -> Value {
    json!({
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "norm_topk_prob": false,
        "router_aux_loss_coef": 0.001,
    })
}

/// A `config.json` that [`describe`] reads as the same, for weights stored as `dtype`.
///
/// # Errors
/// One line that names the first setting that the family has no counterpart of.
pub fn publish(described: &Described, dtype: StoredKind) -> Result<Value, String> {
    let Described { family, model, vocab_size, ids } = described;
    let mut config = match family {
        Family::Qwen => qwen(model, dtype),
        Family::Qwen2 => qwen2(model, dtype),
    };
    config["vocab_size"] = json!(vocab_size);
    merge(&mut config, &json!(ids));
    difference(model, &describe(&config)?.model).map_or(Ok(config), |(key, value, _)| {
        Err(format!("{key} = {value} has no counterpart in a published {} config", json!(family)))
    })
}

/// The same settings with nothing left to defaults that follow from others.
fn explicit(model: &ModelConfig) -> ModelConfig {
    let mut model = model.clone();
    (model.kv_heads, model.head_width) = (Some(model.kv_heads()), Some(model.head_width()));
    let hidden = model.hidden;
    if let Some(moe) = &mut model.moe {
        moe.hidden = Some(moe.hidden(hidden));
    }
    model
}

/// The first setting of `wanted` that differs in `found`, by its key, with both values.
pub fn difference(wanted: &ModelConfig, found: &ModelConfig) -> Option<(String, Value, Value)> {
    difference_in("", &json!(explicit(wanted)), &json!(explicit(found)))
}

fn difference_in(key: &str, wanted: &Value, found: &Value) -> Option<(String, Value, Value)> {
    let Value::Object(settings) = wanted else {
        return (wanted != found).then(|| (key.to_owned(), wanted.clone(), found.clone()));
    };
    let key_of = |name: &String| if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
    let inner = |(name, value): (&String, &Value)| {
        difference_in(&key_of(name), value, found.get(name).unwrap_or(&Value::Null))
    };
    settings.iter().find_map(inner)
}

/// Adds the settings of `more` that are not null.
fn merge(config: &mut Value, more: &Value) {
    for (key, value) in more.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        config[key] = value.clone();
    }
}

fn dtype_name(dtype: StoredKind) -> &'static str {
    match dtype {
        StoredKind::Bf16 => "bfloat16",
        StoredKind::F32 => "float32",
    }
}

/// In the fields of transformers 5.
fn qwen2(model: &ModelConfig, dtype: StoredKind) -> Value {
    let mut config = json!({
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": dtype_name(dtype),
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads(),
        "head_dim": model.head_width(),
        "hidden_act": "silu",
        "max_position_embeddings": model.max_text,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "rope_parameters": rope(model.rotary.as_ref()),
        "use_sliding_window": model.window.is_some(),
        "sliding_window": model.window.as_ref().map(|window| window.size),
        "max_window_layers": model.window.as_ref().map_or(model.layers, |window| match model.moe {
            None => window.from,
            Some(_) => window.until.unwrap_or(model.layers),
        }),
    });
    if let Some(ChunkConfig { size, trained }) = model.rotary.as_ref().and_then(|rotary| rotary.chunks) {
        config["dual_chunk_attention_config"] = json!({
            "chunk_size": trained,
            "local_size": trained - size,
            "original_max_position_embeddings": trained,
        });
    }
    if let Some(moe) = &model.moe {
        let experts = json!({
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "qkv_bias": model.bias != Bias::None,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.active,
            "moe_intermediate_size": moe.hidden(model.hidden),
            // There every token goes through an expert: none cannot be said.
            "shared_expert_intermediate_size": moe.shared.unwrap_or(0),
            "decoder_sparse_step": moe.every,
            "mlp_only_layers": moe.dense_layers,
            "norm_topk_prob": moe.renormalize,
            "router_aux_loss_coef": moe.balance_loss,
        });
        merge(&mut config, &experts);
    }
    config
}

fn rope(rotary: Option<&RotaryConfig>) -> Value {
    let mut rope = match rotary.and_then(|rotary| rotary.scaling.as_ref()) {
        None | Some(RotaryScaling::DynamicSteps { .. }) => json!({ "rope_type": "default" }),
        Some(RotaryScaling::Linear { factor }) => json!({ "rope_type": "linear", "factor": factor }),
        Some(RotaryScaling::Dynamic { factor, .. }) => json!({ "rope_type": "dynamic", "factor": factor }),
        Some(RotaryScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor }) => {
            let mut yarn = json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
            });
            merge(&mut yarn, &json!({ "attention_factor": attention_factor }));
            yarn
        }
    };
    rope["rope_theta"] = json!(rotary.map_or(ROPE_THETA, |rotary| rotary.base));
    rope
}

/// In the fields of `configuration_qwen.py`.
fn qwen(model: &ModelConfig, dtype: StoredKind) -> Value {
    let rotary = model.rotary.as_ref();
    let steps = match rotary.and_then(|rotary| rotary.scaling.as_ref()) {
        Some(RotaryScaling::DynamicSteps { trained }) => Some(*trained),
        _ => None,
    };
    let logn = rotary.and_then(|rotary| rotary.logn);
    json!({
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "model_type": "qwen",
        "torch_dtype": dtype_name(dtype),
        "hidden_size": model.width,
        "intermediate_size": 2 * model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "kv_channels": model.head_width(),
        "layer_norm_epsilon": model.norm_eps,
        "max_position_embeddings": model.max_text,
        "seq_length": steps.or(logn).unwrap_or(model.max_text),
        "rotary_emb_base": rotary.map_or(ROPE_THETA, |rotary| rotary.base),
        "rotary_pct": 1.0,
        "use_dynamic_ntk": steps.is_some(),
        "use_logn_attn": logn.is_some(),
        "no_bias": true,
        "tie_word_embeddings": model.tied,
    })
}

/// The fields of Qwen2 and Qwen2-MoE that decide what is computed.
#[derive(Debug, Deserialize)]
struct Qwen2 {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    hidden_act: String,
    max_position_embeddings: i64,
    rms_norm_eps: f64,
    #[serde(default)]
    tie_word_embeddings: bool,
    /// Before transformers 5.
    rope_theta: Option<f64>,
    /// Before transformers 5.
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    dual_chunk_attention_config: Option<DualChunks>,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<i64>,
    max_window_layers: Option<i64>,
    /// From transformers 4.53 on.
    layer_types: Option<Vec<String>>,
    #[serde(default = "yes")]
    qkv_bias: bool,
    num_experts: Option<i64>,
    num_experts_per_tok: Option<i64>,
    moe_intermediate_size: Option<i64>,
    shared_expert_intermediate_size: Option<i64>,
    #[serde(default = "one")]
    decoder_sparse_step: i64,
    mlp_only_layers: Option<Vec<i64>>,
    #[serde(default)]
    norm_topk_prob: bool,
    #[serde(default)]
    router_aux_loss_coef: f64,
}

/// Of vLLM, which adds a temperature for texts beyond the trained length; An et al. have none, nor do we.
#[derive(Debug, Deserialize)]
struct DualChunks {
    /// The trained length.
    chunk_size: i64,
    /// Tokens before a query whose distance is always the true one: what a chunk is shorter than the trained length.
    local_size: i64,
}

#[derive(Debug, Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<i64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    /// Settings of YaRN that no model of these families has.
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

/// What `layer_types` calls blocks with a window, and those without.
const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";
/// transformers' default, and that of the first Qwen2 models.
const ROPE_THETA: f64 = 10_000.0;

fn yes() -> bool {
    true
}

fn one() -> i64 {
    1
}

impl Qwen2 {
    fn model(&self) -> Result<ModelConfig, String> {
        if self.hidden_act != "silu" {
            return Err(format!("hidden_act = {:?}: expected silu", self.hidden_act));
        }
        let mut model = ModelConfig::new(
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self.max_position_embeddings,
        );
        model.kv_heads = self.num_key_value_heads;
        model.head_width = self.head_dim;
        model.norm_eps = self.rms_norm_eps;
        model.qk_norm = false;
        model.bias = if self.qkv_bias { Bias::Qkv } else { Bias::None };
        model.tied = self.tie_word_embeddings;
        model.rotary = Some(self.rotary()?);
        model.window = self.window()?;
        model.moe = self.experts()?;
        self.check_layer_types(&model)?;
        Ok(model)
    }

    fn rotary(&self) -> Result<RotaryConfig, String> {
        let rope = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let base = rope.and_then(|rope| rope.rope_theta).or(self.rope_theta).unwrap_or(ROPE_THETA);
        let scaling = rope.map_or(Ok(None), |rope| rope.scaling(self.max_position_embeddings))?;
        let chunks = self.dual_chunk_attention_config.as_ref().map(|config| ChunkConfig {
            size: config.chunk_size.saturating_sub(config.local_size),
            trained: config.chunk_size,
        });
        Ok(RotaryConfig { scaling, chunks, ..RotaryConfig::new(base) })
    }

    fn window(&self) -> Result<Option<WindowConfig>, String> {
        if !self.use_sliding_window {
            return Ok(None);
        }
        let size = self.sliding_window.ok_or("sliding_window is missing; use_sliding_window asks for it")?;
        let layers =
            self.max_window_layers.ok_or("max_window_layers is missing; use_sliding_window asks for it")?;
        let until = (layers < self.num_hidden_layers).then_some(layers);
        Ok(if self.num_experts.is_none() {
            // Beyond the last block it limits none.
            until.map(|from| WindowConfig::new(size, from))
        } else {
            // In a model with experts, every other block below `max_window_layers`.
            (layers > 0).then_some(WindowConfig { until, every: 2, ..WindowConfig::new(size, 0) })
        })
    }

    /// Whether `layer_types`, which newer files have too, agrees with the keys that we read.
    fn check_layer_types(&self, model: &ModelConfig) -> Result<(), String> {
        let Some(types) = &self.layer_types else { return Ok(()) };
        if types.len() as i64 != model.layers {
            return Err(format!("layer_types has {} entries: expected {}", types.len(), model.layers));
        }
        let expected = |layer| if model.window(layer).is_some() { SLIDING } else { FULL };
        let odd = types.iter().enumerate().find(|(layer, found)| *found != expected(*layer));
        odd.map_or(Ok(()), |(layer, found)| {
            let from = self.max_window_layers.map_or("absent".to_owned(), |from| from.to_string());
            Err(format!(
                "layer_types[{layer}] = {found:?}: expected {:?}, as use_sliding_window = {} and max_window_layers = \
                 {from} say",
                expected(layer),
                self.use_sliding_window
            ))
        })
    }

    fn experts(&self) -> Result<Option<MoeConfig>, String> {
        let Some(experts) = self.num_experts.filter(|experts| *experts > 0) else { return Ok(None) };
        let active = self.num_experts_per_tok.ok_or("num_experts_per_tok is missing")?;
        Ok(Some(MoeConfig {
            experts,
            active,
            routing: RoutingKind::Top,
            capacity: None,
            every: self.decoder_sparse_step,
            dense_layers: self.mlp_only_layers.clone().unwrap_or_default(),
            hidden: self.moe_intermediate_size,
            shared: self.shared_expert_intermediate_size,
            renormalize: self.norm_topk_prob,
            balance_loss: self.router_aux_loss_coef,
            balance: Balance::Model,
            z_loss: 0.0,
            noise: RouterNoise::default(),
        }))
    }
}

impl Rope {
    fn scaling(&self, max_positions: i64) -> Result<Option<RotaryScaling>, String> {
        let kind = self.rope_type.as_deref().unwrap_or("default");
        let factor = || self.factor.ok_or(format!("factor is missing; rope_type {kind:?} asks for it"));
        let original = self.original_max_position_embeddings.unwrap_or(max_positions);
        let foreign = [
            ("mscale", self.mscale.is_some()),
            ("mscale_all_dim", self.mscale_all_dim.is_some()),
            ("truncate", self.truncate == Some(false)),
            ("partial_rotary_factor", self.partial_rotary_factor.is_some_and(|factor| factor != 1.0)),
        ];
        if let Some((key, _)) = foreign.iter().find(|(_, is_set)| *is_set) {
            return Err(format!("{key} is set: expected rotary settings without it"));
        }
        Ok(match kind {
            "default" => None,
            "linear" => Some(RotaryScaling::Linear { factor: factor()? }),
            "dynamic" => Some(RotaryScaling::Dynamic { factor: factor()?, trained: max_positions }),
            "yarn" => Some(RotaryScaling::Yarn {
                // As in transformers: what is not said follows from the lengths.
                factor: match self.original_max_position_embeddings {
                    Some(original) => self.factor.unwrap_or(max_positions as f64 / original as f64),
                    None => factor()?,
                },
                original,
                beta_fast: self.beta_fast.unwrap_or(beta_fast()),
                beta_slow: self.beta_slow.unwrap_or(beta_slow()),
                attention_factor: self.attention_factor,
            }),
            other => return Err(format!("rope_type = {other:?}: expected default, linear, dynamic or yarn")),
        })
    }
}

/// The fields of Qwen that decide what is computed.
#[derive(Debug, Deserialize)]
struct Qwen {
    vocab_size: i64,
    hidden_size: i64,
    /// Twice the width of the feed-forward.
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    kv_channels: i64,
    layer_norm_epsilon: f64,
    max_position_embeddings: i64,
    /// The trained length.
    seq_length: i64,
    rotary_emb_base: f64,
    #[serde(default)]
    use_dynamic_ntk: bool,
    #[serde(default)]
    use_logn_attn: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    rotary_pct: Option<f64>,
    no_bias: Option<bool>,
    scale_attn_weights: Option<bool>,
}

impl Qwen {
    fn model(&self) -> Result<ModelConfig, String> {
        let foreign = [
            ("rotary_pct", json!(self.rotary_pct), json!(1.0)),
            ("no_bias", json!(self.no_bias), json!(true)),
            ("scale_attn_weights", json!(self.scale_attn_weights), json!(true)),
        ];
        let is_foreign = |(_, found, expected): &&(&str, Value, Value)| !found.is_null() && found != expected;
        if let Some((key, found, expected)) = foreign.iter().find(is_foreign) {
            return Err(format!("{key} = {found}: expected {expected}"));
        }
        let mut model = ModelConfig::new(
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size / 2,
            self.max_position_embeddings,
        );
        let trained = self.seq_length;
        model.head_width = Some(self.kv_channels);
        model.norm_eps = self.layer_norm_epsilon;
        model.qk_norm = false;
        model.bias = Bias::Qkv;
        model.tied = self.tie_word_embeddings;
        model.rotary = Some(RotaryConfig {
            scaling: self.use_dynamic_ntk.then_some(RotaryScaling::DynamicSteps { trained }),
            logn: self.use_logn_attn.then_some(trained),
            ..RotaryConfig::new(self.rotary_emb_base)
        });
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let config = publish(&described, StoredKind::Bf16).unwrap();
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
        let written = publish(&described, StoredKind::F32).unwrap()["dual_chunk_attention_config"].clone();
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
            publish(&described, StoredKind::F32).unwrap_err()
        };
        let in_qwen2 =
            |setting: &str| format!("{setting} has no counterpart in a published \"qwen2\" config");
        assert_eq!(problem(|d| d.model.qk_norm = true), in_qwen2("qk_norm = true"));
        assert_eq!(problem(|d| d.model.bias = Bias::None), in_qwen2("bias = \"none\""));
        let rotary = RotaryConfig { logn: Some(16), ..RotaryConfig::new(10_000.0) };
        let mut qwen = described.clone();
        qwen.model.rotary = Some(rotary);
        assert_eq!(publish(&qwen, StoredKind::F32).unwrap_err(), in_qwen2("rotary.logn = 16"));
        qwen.family = Family::Qwen;
        assert_eq!(publish(&qwen, StoredKind::F32).unwrap()["seq_length"], json!(16));
        let moe = |more: &str| with(&format!(r#""num_experts": 4, "num_experts_per_tok": 2{more}"#)).unwrap();
        let alone = publish(&moe(""), StoredKind::F32).unwrap_err();
        assert_eq!(alone, in_qwen2("moe.shared = null"));
        let mut windowed =
            moe(r#", "shared_expert_intermediate_size": 8, "use_sliding_window": true, "sliding_window": 8,
                "max_window_layers": 2"#);
        publish(&windowed, StoredKind::F32).unwrap();
        // Of all blocks, where a published config has one of every other block.
        windowed.model.window = Some(WindowConfig::new(8, 0));
        assert_eq!(publish(&windowed, StoredKind::F32).unwrap_err(), in_qwen2("window.every = 1"));
    }
}
