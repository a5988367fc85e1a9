//! `config.json` of Qwen2, Qwen2-MoE (transformers' `configuration_qwen2*.py`) and Qwen (its own `configuration_qwen.py`)
//! as settings of our stack.

use serde::Deserialize;

use super::super::ModelConfig;
use super::super::config::{Bias, WindowConfig};
use super::super::moe::{Balance, MoeConfig, RoutingKind};
use super::super::rotary::{RotaryConfig, RotaryScaling, beta_fast, beta_slow};

/// A family of models, by how their weights are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `QWenLMHeadModel`.
    Qwen,
    /// `Qwen2ForCausalLM` and `Qwen2MoeForCausalLM`.
    Qwen2,
}

/// What a folder's config describes.
#[derive(Debug)]
pub struct Described {
    pub family: Family,
    pub model: ModelConfig,
    /// Rows of the input table, padding included.
    pub vocab_size: i64,
}

/// Reads the text of a `config.json`.
///
/// # Errors
/// One line that names the key, where something is missing or not among what we compute.
pub fn describe(text: &str) -> Result<Described, String> {
    #[derive(Deserialize)]
    struct Kind {
        model_type: String,
    }
    let plain = |error: serde_json::Error| error.to_string();
    let Kind { model_type } = serde_json::from_str(text).map_err(plain)?;
    match model_type.as_str() {
        "qwen2" | "qwen2_moe" => serde_json::from_str::<Qwen2>(text).map_err(plain)?.describe(),
        "qwen" => serde_json::from_str::<Qwen>(text).map_err(plain)?.describe(),
        other => Err(format!("model_type = {other:?}: expected qwen2, qwen2_moe or qwen")),
    }
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
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<i64>,
    max_window_layers: Option<i64>,
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

/// transformers' default, and that of the first Qwen2 models.
const ROPE_THETA: f64 = 10_000.0;

fn yes() -> bool {
    true
}

fn one() -> i64 {
    1
}

impl Qwen2 {
    fn describe(self) -> Result<Described, String> {
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
        Ok(Described { family: Family::Qwen2, model, vocab_size: self.vocab_size })
    }

    fn rotary(&self) -> Result<RotaryConfig, String> {
        let rope = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let base = rope.and_then(|rope| rope.rope_theta).or(self.rope_theta).unwrap_or(ROPE_THETA);
        let scaling = rope.map_or(Ok(None), |rope| rope.scaling(self.max_position_embeddings))?;
        Ok(RotaryConfig { base, scaling, logn: None })
    }

    fn window(&self) -> Result<Option<WindowConfig>, String> {
        if !self.use_sliding_window {
            return Ok(None);
        }
        // There the window is one of every other block below `max_window_layers`.
        if self.num_experts.is_some() {
            return Err("use_sliding_window = true: expected false in a model with experts".to_owned());
        }
        let size = self.sliding_window.ok_or("sliding_window is missing; use_sliding_window asks for it")?;
        let from =
            self.max_window_layers.ok_or("max_window_layers is missing; use_sliding_window asks for it")?;
        // Beyond the last block it limits none.
        Ok((from < self.num_hidden_layers).then_some(WindowConfig { size, from }))
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
                factor: factor()?,
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
}

impl Qwen {
    fn describe(self) -> Result<Described, String> {
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
            base: self.rotary_emb_base,
            scaling: self.use_dynamic_ntk.then_some(RotaryScaling::DynamicSteps { trained }),
            logn: self.use_logn_attn.then_some(trained),
        });
        Ok(Described { family: Family::Qwen, model, vocab_size: self.vocab_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = r#"{"model_type": "qwen2", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_act": "silu", "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, MORE}"#;

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
    }

    #[test]
    fn what_we_do_not_compute_is_named() {
        let cases = [
            (r#""rope_parameters": {"rope_type": "longrope"}"#, "rope_type = \"longrope\": expected default"),
            (r#""rope_parameters": {"rope_type": "yarn"}"#, "factor is missing"),
            (r#""use_sliding_window": true"#, "sliding_window is missing"),
            (r#""num_experts": 4"#, "num_experts_per_tok is missing"),
            (
                r#""num_experts": 4, "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1"#,
                "use_sliding_window = true: expected false",
            ),
            (r#""rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}"#, "mscale is set"),
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
}
