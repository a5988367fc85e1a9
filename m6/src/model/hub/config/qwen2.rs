//! The fields of transformers' `configuration_qwen2.py` and `configuration_qwen2_moe.py`.

use m6_runtime::FloatDtype;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ROPE_THETA, dtype_name, merge};
use crate::model::config::{Bias, ModelConfig, WindowConfig};
use crate::model::moe::{Balance, MoeConfig, RouterNoise, RoutingKind};
use crate::model::rotary::{ChunkConfig, RotaryConfig, RotaryScaling, beta_fast, beta_slow};

/// What transformers takes for keys that a Qwen2-MoE config lacks.
pub(super) fn experts_by_default() -> Value {
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

/// In the fields of transformers 5.
pub(super) fn write(model: &ModelConfig, dtype: FloatDtype) -> Value {
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

/// The fields of Qwen2 and Qwen2-MoE that decide what is computed.
#[derive(Debug, Deserialize)]
pub(super) struct Qwen2 {
    pub(super) vocab_size: i64,
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

/// Of vLLM, which puts the furthest keys at a distance of `chunk_size`, and adds a temperature for texts beyond the trained
/// length. An et al. put them one nearer and have none, and so do we.
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

fn yes() -> bool {
    true
}

fn one() -> i64 {
    1
}

impl Qwen2 {
    pub(super) fn model(&self) -> Result<ModelConfig, String> {
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
