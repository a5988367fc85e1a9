//! How many parameters a stack has: the arithmetic of [`Transformer::new`](crate::model::Transformer::new), without a
//! tensor.

use m6_vision::{Extractor, PatchConfig};
use serde::Serialize;

use super::shape::Shape;
use crate::model::{Bias, FeedForwardKind, ModelConfig, MoeConfig, NormKind, SEGMENTS};

/// Parameters of a part: all of them, and those that a token meets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// All.
    pub parameters: i64,
    /// Without the experts that a token does not go through.
    pub active: i64,
}

impl Count {
    fn same(parameters: i64) -> Self {
        Self { parameters, active: parameters }
    }
}

impl std::iter::Sum for Count {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |sum, count| Self {
            parameters: sum.parameters + count.parameters,
            active: sum.active + count.active,
        })
    }
}

/// The parameters of a stack by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Tables of tokens, positions, aims and segments.
    pub embeddings: Count,
    /// Projections of attention and the norms of queries and keys.
    pub attention: Count,
    /// Dense feed-forwards.
    pub feed_forward: Count,
    /// Experts, the shared ones included.
    pub experts: Count,
    /// Routers, and the gates of shared experts.
    pub router: Count,
    /// Norms between the layers.
    pub norms: Count,
    /// Output heads that share no table.
    pub heads: Count,
    /// The extractor of patch features.
    pub patches: Count,
}

impl Parts {
    /// Counts a stack.
    pub fn of(shape: &Shape) -> Self {
        let model = &shape.model;
        let blocks = model.own_blocks().count() as i64;
        let moes = || model.own_blocks().filter_map(|layer| model.experts(layer));
        let dense = blocks - moes().count() as i64;
        Self {
            embeddings: Count::same(embeddings(shape)),
            attention: Count::same(blocks * attention(model)),
            feed_forward: Count::same(dense * feed_forward(model)),
            experts: moes().map(|moe| experts(model, moe)).sum(),
            router: Count::same(moes().map(|moe| router(model, moe)).sum()),
            norms: Count::same((2 * blocks + 1) * norm(model)),
            heads: Count::same(heads(shape)),
            patches: Count::same(model.patches.as_ref().map_or(0, |config| patches(config, model.width))),
        }
    }

    /// Names and counts, in the order of the stack.
    pub fn named(&self) -> [(&'static str, Count); 8] {
        [
            ("embeddings", self.embeddings),
            ("patches", self.patches),
            ("attention", self.attention),
            ("feed-forward", self.feed_forward),
            ("experts", self.experts),
            ("router", self.router),
            ("norms", self.norms),
            ("heads", self.heads),
        ]
    }

    /// The sum.
    pub fn total(&self) -> Count {
        self.named().into_iter().map(|(_, count)| count).sum()
    }
}

/// Parameters of the largest block.
pub(super) fn largest_block(model: &ModelConfig) -> i64 {
    let fed = |layer| match model.experts(layer) {
        Some(moe) => experts(model, moe).parameters + router(model, moe),
        None => feed_forward(model),
    };
    attention(model) + 2 * norm(model) + (0..model.layers).map(fed).max().unwrap_or(0)
}

/// Parameters of the matrices that Muon updates, where it is chosen.
pub(super) fn hidden_matrices(shape: &Shape) -> i64 {
    let (model, d) = (&shape.model, shape.model.width);
    let fed = |layer| match model.experts(layer) {
        Some(moe) => experts(model, moe).parameters,
        None => matrices(model.feed_forward) * d * model.hidden,
    };
    let projections = d * (queries_keys_values(model) + model.heads * model.head_width());
    let project = model.patches.as_ref().map_or(0, |patches| patches.features() * d);
    let blocks = model.own_blocks();
    blocks.clone().map(|layer| projections + fed(layer)).sum::<i64>() + project
}

fn embeddings(shape: &Shape) -> i64 {
    let (model, positions) = (&shape.model, shape.positions());
    let mut rows = shape.vocab.rows();
    if model.rotary.is_none() {
        rows += positions.rows();
    }
    if model.any_order {
        rows += positions.aim_rows();
    }
    if shape.has_pictures() {
        rows += SEGMENTS;
    }
    rows * model.width
}

/// Values of the queries, keys and values of a token.
pub(super) fn queries_keys_values(model: &ModelConfig) -> i64 {
    (model.heads + 2 * model.kv_heads()) * model.head_width()
}

fn attention(model: &ModelConfig) -> i64 {
    let (d, k) = (model.width, model.head_width());
    let (input, output) = (queries_keys_values(model), model.heads * k);
    let biases = match model.bias {
        Bias::None => 0,
        Bias::Qkv => input,
        Bias::All => input + d,
    };
    d * (input + output) + biases + if model.qk_norm { 2 * k } else { 0 }
}

/// How many matrices of `width * hidden` a feed-forward has.
pub(super) fn matrices(kind: FeedForwardKind) -> i64 {
    match kind {
        FeedForwardKind::Swiglu => 3,
        FeedForwardKind::Gelu => 2,
    }
}

fn feed_forward(model: &ModelConfig) -> i64 {
    let (d, f, matrices) = (model.width, model.hidden, matrices(model.feed_forward));
    let biases = if model.bias == Bias::All { (matrices - 1) * f + d } else { 0 };
    matrices * d * f + biases
}

fn experts(model: &ModelConfig, moe: &MoeConfig) -> Count {
    let values = matrices(model.feed_forward) * model.width;
    let (each, shared) = (values * moe.hidden(model.hidden), values * moe.shared.unwrap_or(0));
    Count { parameters: moe.experts * each + shared, active: moe.active * each + shared }
}

fn router(model: &ModelConfig, moe: &MoeConfig) -> i64 {
    model.width * (moe.experts + i64::from(moe.shared.is_some()))
}

fn norm(model: &ModelConfig) -> i64 {
    match model.norm {
        NormKind::Rms => model.width,
        NormKind::Layer => 2 * model.width,
    }
}

fn heads(shape: &Shape) -> i64 {
    let text = if shape.model.tied { 0 } else { shape.vocab.text_rows() };
    let codes = if shape.vocab.is_language() { 0 } else { shape.vocab.code_rows() };
    (text + codes) * shape.model.width
}

/// Without a network that comes trained.
fn patches(config: &PatchConfig, width: i64) -> i64 {
    let extractor = match &config.extractor {
        // Kernel and bias, then weight and bias of the norm.
        Extractor::Convolutions(channels) => {
            layers(channels).map(|(input, output)| KERNEL * input * output + 3 * output).sum()
        }
        Extractor::Linear(_) | Extractor::Resnet(_) => 0,
    };
    extractor + (config.features() + 1) * width
}

/// Channels that each convolution takes and gives.
pub(super) fn layers(channels: &[i64]) -> impl Iterator<Item = (i64, i64)> {
    std::iter::once(COLOURS).chain(channels.iter().copied()).zip(channels.iter().copied())
}

/// Values of a pixel.
pub(super) const COLOURS: i64 = 3;

/// Values of a convolution's window.
pub(super) const KERNEL: i64 = 9;
