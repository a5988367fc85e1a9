//! The fields of Qwen's own `configuration_qwen.py`.

use m6_runtime::FloatDtype;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ROPE_THETA, dtype_name};
use crate::model::config::{Bias, ModelConfig};
use crate::model::rotary::{RotaryConfig, RotaryScaling};

/// In the fields of `configuration_qwen.py`.
pub(super) fn write(model: &ModelConfig, dtype: FloatDtype) -> Value {
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

/// The fields of Qwen that decide what is computed.
#[derive(Debug, Deserialize)]
pub(super) struct Qwen {
    pub(super) vocab_size: i64,
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
    pub(super) fn model(&self) -> Result<ModelConfig, String> {
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
