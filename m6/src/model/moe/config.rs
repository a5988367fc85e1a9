//! Settings of the experts.

use serde::{Deserialize, Serialize};

/// Settings of the mixture-of-experts feed-forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Number of experts, `e`.
    pub experts: i64,
    /// Experts that each token goes through.
    pub active: i64,
    /// How they are chosen.
    #[serde(default)]
    pub routing: RoutingKind,
    /// Rows that an expert takes while training, as a multiple of its even share (M6 has 1.25); those beyond are dropped.
    /// First choices come before second ones, and earlier tokens before later ones. No limit where absent.
    #[serde(default)]
    pub capacity: Option<f64>,
    /// Every n-th block has experts (the n-th, the 2n-th, ...); the others are dense.
    pub every: i64,
    /// Blocks, counted from 0, that are dense all the same.
    #[serde(default)]
    pub dense_layers: Vec<i64>,
    /// Width of each expert, `f`; the model's `hidden` where absent.
    #[serde(default)]
    pub hidden: Option<i64>,
    /// Width of an expert that every token goes through, weighted by a gate of its own (Qwen2-MoE).
    #[serde(default)]
    pub shared: Option<i64>,
    /// Whether the weights of a token's experts are made to sum to 1.
    #[serde(default = "yes")]
    pub renormalize: bool,
    /// Weight of the load-balance loss (Fedus et al. 2021, Switch Transformer, equation 4).
    pub balance_loss: f64,
    /// What the load-balance loss looks at.
    #[serde(default)]
    pub balance: Balance,
    /// Weight of the squared log-partition of the router (Zoph et al. 2022, ST-MoE, equation 5).
    pub z_loss: f64,
    /// What is left to chance while training.
    #[serde(default, skip_serializing_if = "RouterNoise::is_none")]
    pub noise: RouterNoise,
}

/// Chances by which a router explores while it is trained; both are in the public code for M6's experts (FastNN).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterNoise {
    /// Dropout of what the router looks at; the experts see all of it.
    pub input_dropout: f64,
    /// Of two choices the second one is kept with twice its share of their weights (Lepikhin et al. 2020, GShard, algorithm
    /// 1), and takes no place of its expert otherwise.
    pub random_second: bool,
}

impl RouterNoise {
    /// Whether nothing is left to chance.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A way to choose experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoutingKind {
    /// The likeliest of all.
    #[default]
    Top,
    /// The likeliest of each group, where there are as many groups as active experts (M6-T's prototypes).
    Prototypes,
}

/// What is balanced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Balance {
    /// Each block by itself: the sum over blocks of `e * sum_e f_e P_e`, where the loads `f` sum to 1.
    #[default]
    Layer,
    /// All blocks as one, as transformers does for Qwen2-MoE: `e * sum_e f_e P_e` once, with the means over blocks, where
    /// the loads sum to the number of active experts.
    Model,
}

/// Bounds that keep the arithmetic of an absurd config within whole numbers.
const MAX_EXPERTS: i64 = 1 << 14;
const MAX_WIDTH: i64 = 1 << 16;

fn yes() -> bool {
    true
}

impl MoeConfig {
    /// Width of each expert in a model whose feed-forward is `hidden` wide.
    pub fn hidden(&self, hidden: i64) -> i64 {
        self.hidden.unwrap_or(hidden)
    }

    /// Groups of experts in each of which a token chooses.
    pub(super) fn groups(&self) -> i64 {
        match self.routing {
            RoutingKind::Top => 1,
            RoutingKind::Prototypes => self.active,
        }
    }

    /// Rows that each expert takes of those of `tokens` tokens, where that is limited.
    pub(super) fn capacity(&self, tokens: i64) -> Option<i64> {
        let even_share = (tokens * self.active) as f64 / self.experts as f64;
        self.capacity.map(|multiple| (multiple * even_share).ceil() as i64)
    }

    /// What is wrong, in one line that begins with the key.
    pub(in crate::model) fn validate(&self, layers: i64) -> Result<(), String> {
        if !(1..=MAX_EXPERTS).contains(&self.experts) {
            return Err(format!("experts = {}: expected 1 to {MAX_EXPERTS}", self.experts));
        }
        for (key, value) in [("balance_loss", self.balance_loss), ("z_loss", self.z_loss)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(format!("{key} = {value}: expected 0 or more"));
            }
        }
        if self.active < 1 || self.active > self.experts {
            return Err(format!("active = {}: expected 1 to moe.experts = {}", self.active, self.experts));
        }
        if self.experts % self.groups() != 0 {
            return Err(format!(
                "active = {}: expected a divisor of moe.experts = {}",
                self.active, self.experts
            ));
        }
        if let Some(capacity) = self.capacity.filter(|capacity| !(*capacity > 0.0 && capacity.is_finite())) {
            return Err(format!("capacity = {capacity}: expected a positive number"));
        }
        let RouterNoise { input_dropout, random_second } = self.noise;
        if !(0.0..1.0).contains(&input_dropout) {
            return Err(format!("noise.input_dropout = {input_dropout}: expected 0 <= input_dropout < 1"));
        }
        if random_second && (self.active, self.routing) != (2, RoutingKind::Top) {
            return Err("noise.random_second = true: expected active = 2 and routing = \"top\"".to_owned());
        }
        if self.every < 1 || self.every > layers {
            return Err(format!("every = {}: expected 1 to layers = {layers}", self.every));
        }
        if let Some(layer) = self.dense_layers.iter().find(|layer| !(0..layers).contains(layer)) {
            return Err(format!("dense_layers: {layer} is no block; expected 0 to {}", layers - 1));
        }
        for (key, value) in [("hidden", self.hidden), ("shared", self.shared)] {
            if let Some(value) = value.filter(|value| !(1..=MAX_WIDTH).contains(value) || value % 8 != 0) {
                return Err(format!("{key} = {value}: expected a multiple of 8, at most {MAX_WIDTH}"));
            }
        }
        Ok(())
    }
}
