//! The transformer's settings, saved as `config.json` beside its weights.

use std::ops::Range;
use std::path::Path;

use m6_vision::PatchConfig;
use serde::{Deserialize, Serialize};

use super::moe::config::MoeConfig;
use super::order::CodeOrder;
use super::rotary::RotaryConfig;

/// Settings of one stack. A family of models is a choice of them: the files in `configs/model`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Width of the residual stream, `d`.
    pub width: i64,
    /// Number of blocks.
    pub layers: i64,
    /// Whether all blocks have the weights of the first: the pseudo stage of M6-10T (Lin et al. 2021), in which a giant
    /// learns as a stack of the size of one block. `m6 convert --delink` gives each its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub share_layers: bool,
    /// Attention heads, `h`.
    pub heads: i64,
    /// Heads of keys and values, each for a group of query heads (Ainslie et al. 2023); as many as `heads` where absent.
    #[serde(default)]
    pub kv_heads: Option<i64>,
    /// Width of one head, `k`; the width over the heads where absent.
    #[serde(default)]
    pub head_width: Option<i64>,
    /// Width of the feed-forward, `f`; with experts, of each expert that has no width of its own.
    pub hidden: i64,
    /// Longest text of one segment, in tokens.
    pub max_text: i64,
    /// Norms between the layers.
    #[serde(default)]
    pub norm: NormKind,
    /// Epsilon of every norm.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// Whether queries and keys are normalised (Chameleon's cure for divergence with mixed modalities).
    #[serde(default = "yes")]
    pub qk_norm: bool,
    /// Which products have a bias.
    #[serde(default)]
    pub bias: Bias,
    /// The dense feed-forward and the experts; experts have no biases.
    #[serde(default)]
    pub feed_forward: FeedForwardKind,
    /// Rotary positions in place of the learned table.
    #[serde(default)]
    pub rotary: Option<RotaryConfig>,
    /// How far back some blocks see.
    #[serde(default)]
    pub window: Option<WindowConfig>,
    /// Whether the text head shares the input table.
    #[serde(default = "yes")]
    pub tied: bool,
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
    /// How pictures become patch features; absent where the model sees none.
    #[serde(default)]
    pub patches: Option<PatchConfig>,
    /// Experts in place of the dense feed-forward.
    #[serde(default)]
    pub moe: Option<MoeConfig>,
}

/// A kind of norm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// Root mean square.
    #[default]
    Rms,
    /// Layer norm, with a bias.
    Layer,
}

/// The products of a block that have a bias.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Queries, keys and values, as in Qwen.
    Qkv,
    /// All of attention and of the dense feed-forward, as in BERT.
    All,
}

/// A kind of feed-forward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeedForwardKind {
    /// Three matrices, the first of which gates the second (Shazeer 2020).
    #[default]
    Swiglu,
    /// Two matrices.
    Gelu,
}

/// A limit of how far back is seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowConfig {
    /// Tokens that are seen, the one that looks included.
    pub size: i64,
    /// The first block that is limited; the ones before it see everything.
    pub from: i64,
    /// The first block after `from` that is not, nor those after it; none where absent.
    #[serde(default)]
    pub until: Option<i64>,
    /// Of the blocks between them every n-th is limited, beginning with the first.
    #[serde(default = "one")]
    pub every: i64,
    /// Tokens that are seen in the last block that is limited; between it and the first they change evenly (Bai et al. 2023,
    /// Qwen: shorter windows in lower layers). All see `size` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<i64>,
}

/// Bounds that keep a damaged or absurd config from asking for all memory; far above any model that is built.
const MAX_WIDTH: i64 = 1 << 16;
const MAX_LAYERS: i64 = 1 << 10;
const MAX_TEXT: i64 = 1 << 20;
const MAX_WINDOW: i64 = 1 << 32;
/// What flash attention takes.
const MAX_HEAD_WIDTH: i64 = 256;

fn norm_eps() -> f64 {
    1e-6
}

fn yes() -> bool {
    true
}

fn one() -> i64 {
    1
}

impl ModelConfig {
    /// A stack of these sizes with everything else as it is by default.
    pub fn new(width: i64, layers: i64, heads: i64, hidden: i64, max_text: i64) -> Self {
        Self {
            width,
            layers,
            share_layers: false,
            heads,
            kv_heads: None,
            head_width: None,
            hidden,
            max_text,
            norm: NormKind::default(),
            norm_eps: norm_eps(),
            qk_norm: yes(),
            bias: Bias::default(),
            feed_forward: FeedForwardKind::default(),
            rotary: None,
            window: None,
            tied: yes(),
            dropout: 0.0,
            any_order: false,
            code_order: CodeOrder::default(),
            patches: None,
            moe: None,
        }
    }

    /// Width of one head, `k`.
    pub fn head_width(&self) -> i64 {
        self.head_width.unwrap_or(self.width / self.heads)
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> i64 {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// How far back block `layer` sees, where that is limited.
    pub fn window(&self, layer: usize) -> Option<i64> {
        self.window.as_ref().and_then(|window| window.of(layer as i64, self.layers))
    }

    /// Whether a forward pass in training leaves something to chance.
    pub fn is_random(&self) -> bool {
        self.dropout > 0.0 || self.moe.as_ref().is_some_and(|moe| !moe.noise.is_none())
    }

    /// The blocks that have weights of their own.
    pub fn own_blocks(&self) -> Range<i64> {
        0..if self.share_layers { 1 } else { self.layers }
    }

    /// What block `layer` has in place of a dense feed-forward, if anything.
    pub fn experts(&self, layer: i64) -> Option<&MoeConfig> {
        self.moe.as_ref().filter(|moe| (layer + 1) % moe.every == 0 && !moe.dense_layers.contains(&layer))
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
        self.validate_heads()?;
        if self.hidden % 8 != 0 {
            return Err(format!("hidden = {}: expected a multiple of 8", self.hidden));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("dropout = {}: expected 0 <= dropout < 1", self.dropout));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(format!("norm_eps = {}: expected 0 < norm_eps < 1", self.norm_eps));
        }
        if self.code_order != CodeOrder::Rows && !self.any_order {
            return Err("code_order is not rows: expected any_order = true".into());
        }
        if let Some(rotary) = &self.rotary {
            rotary.validate().map_err(|problem| format!("rotary.{problem}"))?;
            let other = [("patches", self.patches.is_some()), ("window", self.window.is_some())];
            if let (Some(_), Some((key, _))) = (rotary.chunks, other.iter().find(|(_, is_set)| *is_set)) {
                return Err(format!("{key} is set: expected none with rotary.chunks"));
            }
        }
        if let Some(window) = &self.window {
            window.validate(self.layers).map_err(|problem| format!("window.{problem}"))?;
        }
        if let Some(moe) = &self.moe {
            moe.validate(self.layers).map_err(|problem| format!("moe.{problem}"))?;
        }
        if self.share_layers && (1..self.layers).any(|layer| self.experts(layer) != self.experts(0)) {
            return Err("share_layers = true: expected experts in all blocks or in none".into());
        }
        self.patches
            .as_ref()
            .map_or(Ok(()), |patches| patches.validate().map_err(|problem| format!("patches.{problem}")))
    }

    /// Whether there are weights for a network that comes trained: in a `file` of their own, or in the model that a run
    /// starts from (`init`).
    ///
    /// # Errors
    /// What is wrong, in one line naming the key `extractor`.
    pub fn check_extractor(&self, file: Option<&Path>, init: bool) -> Result<(), String> {
        let trained = self.patches.as_ref().and_then(PatchConfig::trained).map(u32::from);
        match (trained, file) {
            (Some(layers), None) if !init => Err(format!(
                "extractor is missing: expected a file with the weights of a ResNet-{layers}, such as torchvision's"
            )),
            (None, Some(file)) => Err(format!(
                "extractor = {}: expected none, since model.patches takes no trained network",
                file.display()
            )),
            _ => Ok(()),
        }
    }

    /// Flash attention and grouped products want rows of whole 16-byte words in bf16.
    fn validate_heads(&self) -> Result<(), String> {
        if self.head_width.is_none() && self.width % (8 * self.heads) != 0 {
            return Err(format!(
                "width = {}: expected a multiple of 8 * heads = {}",
                self.width,
                8 * self.heads
            ));
        }
        if self.width % 8 != 0 {
            return Err(format!("width = {}: expected a multiple of 8", self.width));
        }
        let head_width = self.head_width();
        if !(1..=MAX_HEAD_WIDTH).contains(&head_width) || head_width % 8 != 0 {
            let expected = format!("a multiple of 8, at most {MAX_HEAD_WIDTH}");
            return Err(match self.head_width {
                Some(_) => format!("head_width = {head_width}: expected {expected}"),
                None => format!("heads = {}: expected heads of at most {MAX_HEAD_WIDTH} values", self.heads),
            });
        }
        let kv_heads = self.kv_heads();
        if kv_heads < 1 || self.heads % kv_heads != 0 {
            return Err(format!("kv_heads = {kv_heads}: expected a divisor of heads = {}", self.heads));
        }
        Ok(())
    }
}

impl WindowConfig {
    /// Of `size` tokens in all blocks from `from` on.
    pub fn new(size: i64, from: i64) -> Self {
        Self { size, from, until: None, every: one(), last: None }
    }

    /// How far back block `layer` of `layers` sees, where it is limited.
    fn of(&self, layer: i64, layers: i64) -> Option<i64> {
        let until = self.until.unwrap_or(layers);
        let (above, steps) = (layer - self.from, (until - 1 - self.from) / self.every);
        let is_limited = above >= 0 && layer < until && above % self.every == 0;
        let growth = self.last.map_or(0, |last| last - self.size);
        is_limited.then(|| self.size + growth * (above / self.every) / steps.max(1))
    }

    fn validate(&self, layers: i64) -> Result<(), String> {
        for (key, size) in [("size", Some(self.size)), ("last", self.last)] {
            if let Some(size) = size.filter(|size| !(1..=MAX_WINDOW).contains(size)) {
                return Err(format!("{key} = {size}: expected 1 to {MAX_WINDOW}"));
            }
        }
        if !(0..layers).contains(&self.from) {
            return Err(format!("from = {}: expected 0 to {}, the last block", self.from, layers - 1));
        }
        if let Some(until) = self.until.filter(|until| !(self.from + 1..layers).contains(until)) {
            let expected = format!("expected window.from + 1 = {} to {}", self.from + 1, layers - 1);
            return Err(format!("until = {until}: {expected}, the last block"));
        }
        if self.every < 1 {
            return Err(format!("every = {}: expected 1 or more", self.every));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_share_their_weights_are_alike() {
        let plain = ModelConfig { share_layers: true, ..ModelConfig::new(16, 4, 2, 24, 8) };
        assert!(plain.validate().is_ok());
        for (every, is_fine) in [(1, true), (2, false), (4, false), (0, false)] {
            let text = format!("experts = 4\nactive = 1\nevery = {every}\nbalance_loss = 0\nz_loss = 0");
            let moe = Some(toml::from_str(&text).unwrap());
            assert_eq!(ModelConfig { moe, ..plain.clone() }.validate().is_ok(), is_fine, "{every}");
        }
    }

    #[test]
    fn heads_that_do_not_divide_are_named() {
        let config = ModelConfig::new(32, 2, 4, 48, 16);
        assert_eq!(config.validate(), Ok(()));
        let problem = |change: fn(&mut ModelConfig)| {
            let mut config = config.clone();
            change(&mut config);
            config.validate().unwrap_err()
        };
        assert_eq!(problem(|c| c.heads = 3), "width = 32: expected a multiple of 8 * heads = 24");
        assert_eq!(problem(|c| c.kv_heads = Some(3)), "kv_heads = 3: expected a divisor of heads = 4");
        assert_eq!(problem(|c| c.kv_heads = Some(0)), "kv_heads = 0: expected a divisor of heads = 4");
        let expected = "head_width = 12: expected a multiple of 8, at most 256";
        assert_eq!(problem(|c| c.head_width = Some(12)), expected);
        let window = |c: &mut ModelConfig| c.window = Some(WindowConfig::new(4, 2));
        assert_eq!(problem(window), "window.from = 2: expected 0 to 1, the last block");
        let window =
            |c: &mut ModelConfig| c.window = Some(WindowConfig { until: Some(2), ..WindowConfig::new(4, 0) });
        let expected = "window.until = 2: expected window.from + 1 = 1 to 1, the last block";
        assert_eq!(problem(window), expected);
        let window =
            |c: &mut ModelConfig| c.window = Some(WindowConfig { every: 0, ..WindowConfig::new(4, 0) });
        assert_eq!(problem(window), "window.every = 0: expected 1 or more");
    }

    #[test]
    fn a_window_limits_the_blocks_that_it_says() {
        let limited = |text: &str| -> Vec<usize> {
            let window = Some(toml::from_str(text).unwrap());
            let config = ModelConfig { window, ..ModelConfig::new(32, 8, 4, 48, 16) };
            config.validate().unwrap();
            (0..8).filter(|layer| config.window(*layer).is_some()).collect()
        };
        assert_eq!(limited("size = 4\nfrom = 5"), [5, 6, 7]);
        assert_eq!(limited("size = 4\nfrom = 0\nuntil = 5\nevery = 2"), [0, 2, 4]);
        assert_eq!(limited("size = 4\nfrom = 1\nevery = 3"), [1, 4, 7]);
    }

    #[test]
    fn windows_change_evenly_to_the_last() {
        let sizes = |window: WindowConfig| -> Vec<Option<i64>> {
            let config = ModelConfig { window: Some(window), ..ModelConfig::new(32, 5, 4, 48, 16) };
            config.validate().unwrap();
            (0..5).map(|layer| config.window(layer)).collect()
        };
        let grown = WindowConfig { last: Some(16), ..WindowConfig::new(4, 0) };
        assert_eq!(sizes(grown.clone()), [4, 7, 10, 13, 16].map(Some));
        let some = WindowConfig { every: 2, from: 1, ..grown.clone() };
        assert_eq!(sizes(some), [None, Some(4), None, Some(16), None]);
        assert_eq!(sizes(WindowConfig { from: 4, ..grown.clone() }), [None, None, None, None, Some(4)]);
        let shrunk = WindowConfig { size: 16, last: Some(4), ..grown };
        assert_eq!(sizes(shrunk), [16, 13, 10, 7, 4].map(Some));
    }

    #[test]
    fn what_is_not_said_is_our_own_recipe() {
        let sizes = r#"{"width": 32, "layers": 2, "heads": 4, "hidden": 48, "max_text": 16}"#;
        let config: ModelConfig = serde_json::from_str(sizes).unwrap();
        assert_eq!(config, ModelConfig::new(32, 2, 4, 48, 16));
        assert!(config.qk_norm && config.tied && config.rotary.is_none());
    }
}
