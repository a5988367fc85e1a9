//! The transformer's settings, saved as `config.json` beside its weights.

use m6_vision::PatchConfig;
use serde::{Deserialize, Serialize};

use super::order::CodeOrder;

/// Settings of one stack: sizes, feed-forward kind, patch extractor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Width of the residual stream, `d`.
    pub width: i64,
    /// Number of blocks.
    pub layers: i64,
    /// Attention heads, `h`; they divide the width.
    pub heads: i64,
    /// Width of the SwiGLU feed-forward, `f`; with experts, of each expert.
    pub hidden: i64,
    /// Longest text of one segment, in tokens.
    pub max_text: i64,
    /// Share of values dropped after each sub-layer and after the embedding, while training.
    #[serde(default)]
    pub dropout: f64,
    /// Whether each token is told the place of the code that is predicted from it, so that the codes of a picture can
    /// come in any order.
    #[serde(default)]
    pub any_order: bool,
    /// The order in which pictures are drawn; any but row by row needs `any_order`.
    #[serde(default)]
    pub code_order: CodeOrder,
    /// How pictures become patch features.
    pub patches: PatchConfig,
    /// Experts in place of the dense feed-forward.
    #[serde(default)]
    pub moe: Option<MoeConfig>,
}

/// Settings of the mixture-of-experts feed-forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Number of experts, `e`.
    pub experts: i64,
    /// Experts that each token goes through.
    pub active: i64,
    /// Every n-th block has experts (the n-th, the 2n-th, ...); the others are dense.
    pub every: i64,
    /// Weight of the load-balance loss (Fedus et al. 2021, Switch Transformer, equation 4).
    pub balance_loss: f64,
    /// Weight of the squared log-partition of the router (Zoph et al. 2022, ST-MoE, equation 5).
    pub z_loss: f64,
}

/// Bounds that keep a damaged or absurd config from asking for all memory; far above any model that is built.
const MAX_WIDTH: i64 = 1 << 16;
const MAX_LAYERS: i64 = 1 << 10;
const MAX_TEXT: i64 = 1 << 20;
/// What a grouped matrix product takes at once.
const MAX_EXPERTS: i64 = 1 << 10;
/// What flash attention takes.
const MAX_HEAD_WIDTH: i64 = 256;

impl ModelConfig {
    /// Width of one head, `k`.
    pub fn head_width(&self) -> i64 {
        self.width / self.heads
    }

    /// What is wrong with these settings, in one line naming the key.
    ///
    /// # Errors
    /// When a size is not positive or does not divide as it must.
    pub fn validate(&self) -> Result<(), String> {
        let sizes = [
            ("width", self.width, MAX_WIDTH),
            ("layers", self.layers, MAX_LAYERS),
            ("heads", self.heads, MAX_WIDTH),
            ("hidden", self.hidden, MAX_WIDTH),
            ("max_text", self.max_text, MAX_TEXT),
        ];
        if let Some((key, value, most)) = sizes.iter().find(|(_, value, most)| !(1..=*most).contains(value)) {
            return Err(format!("{key} = {value}: expected 1 to {most}"));
        }
        // Flash attention and grouped products want rows of whole 16-byte words in bf16.
        if self.width % (8 * self.heads) != 0 {
            return Err(format!(
                "width = {}: expected a multiple of 8 * heads = {}",
                self.width,
                8 * self.heads
            ));
        }
        if self.head_width() > MAX_HEAD_WIDTH {
            return Err(format!("heads = {}: expected heads of at most {MAX_HEAD_WIDTH} values", self.heads));
        }
        if self.hidden % 8 != 0 {
            return Err(format!("hidden = {}: expected a multiple of 8", self.hidden));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("dropout = {}: expected 0 <= dropout < 1", self.dropout));
        }
        if self.code_order != CodeOrder::Rows && !self.any_order {
            return Err("code_order is not rows: expected any_order = true".into());
        }
        if let Some(moe) = &self.moe {
            if !(1..=MAX_EXPERTS).contains(&moe.experts) {
                return Err(format!("moe.experts = {}: expected 1 to {MAX_EXPERTS}", moe.experts));
            }
            for (key, value) in [("balance_loss", moe.balance_loss), ("z_loss", moe.z_loss)] {
                if !(value >= 0.0 && value.is_finite()) {
                    return Err(format!("moe.{key} = {value}: expected 0 or more"));
                }
            }
            if moe.active < 1 || moe.active > moe.experts {
                return Err(format!(
                    "moe.active = {}: expected 1 to moe.experts = {}",
                    moe.active, moe.experts
                ));
            }
            if moe.every < 1 || moe.every > self.layers {
                return Err(format!("moe.every = {}: expected 1 to layers = {}", moe.every, self.layers));
            }
        }
        self.patches.validate().map_err(|problem| format!("patches.{problem}"))
    }
}
