//! What a training step keeps in memory.
//!
//! States are what [`Optimizer`](m6_runtime::optim::Optimizer) and [`Ema`](m6_runtime::optim::Ema) hold. Activations are
//! what the operations of a block keep for their gradients, in bf16. Both are as if all were there at once; in truth
//! gradients come while activations go, so that a step may need a little less. What the driver, the allocator and the
//! image tokenizer need is not in it.

use m6_vision::{Extractor, PatchConfig};
use serde::Serialize;

use super::count::{self, Count, Parts};
use super::shape::{Shape, Subject};
use crate::model::{FeedForwardKind, ModelConfig};

const FLOAT: i64 = 4;
const BF16: i64 = 2;

/// The numbers of weights, gradients and moments, where nothing else is said of them. Vectors, which stay float32, are
/// counted like all else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// float32, with bf16 copies of the weights to compute with, and gradients of products in bf16 where one pass makes
    /// them: what `m6 train` does on a GPU.
    Fp32Bf16,
    /// bf16 alone: `weights` and `optimizer.moments` of a training config "bf16", which keeps no averages.
    Bf16,
}

impl Precision {
    const ALL: [Self; 2] = [Self::Fp32Bf16, Self::Bf16];

    fn bytes(self) -> i64 {
        match self {
            Self::Fp32Bf16 => FLOAT,
            Self::Bf16 => BF16,
        }
    }
}

/// What a GPU is given to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// GPUs that share the states.
    pub gpus: i64,
    /// Bytes of one, where that is known.
    pub memory: Option<u64>,
}

/// The bytes of one GPU in one way to train.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setup {
    /// The numbers of the states.
    pub precision: Precision,
    /// GPUs over which the states are spread (ZeRO-3).
    pub gpus: i64,
    /// Whether only the inputs of blocks are kept, and each block is computed again for its gradients.
    pub recompute: bool,
    /// The weights.
    pub weights: i64,
    /// bf16 copies of the weights; of spread ones, those of a block, gathered.
    pub copies: i64,
    /// The gradients.
    pub gradients: i64,
    /// The optimizer's moments, and what it merges updates with.
    pub optimizer: i64,
    /// The averaged weights.
    pub averages: i64,
    /// All of the above.
    pub states: i64,
    /// Activations, with the share of a picture in an example as long as can be.
    pub activations_per_token: f64,
    /// Whether the states fit, where the memory is known.
    pub fits: Option<bool>,
    /// Tokens of the largest micro-batch of a GPU, where the memory is known.
    pub largest_batch: Option<i64>,
}

/// Every way to train, plainest first.
pub(super) fn setups(subject: &Subject, machine: Machine) -> Vec<Setup> {
    let spreads = if machine.gpus > 1 { vec![1, machine.gpus] } else { vec![1] };
    let ways = Precision::ALL.into_iter().flat_map(|precision| {
        spreads.iter().flat_map(move |&gpus| [false, true].map(|recompute| (precision, gpus, recompute)))
    });
    ways.map(|(precision, gpus, recompute)| setup(subject, machine.memory, precision, gpus, recompute))
        .collect()
}

fn setup(subject: &Subject, memory: Option<u64>, precision: Precision, gpus: i64, recompute: bool) -> Setup {
    let shape = &subject.shape;
    let parts = Parts::of(shape);
    let all = parts.total().parameters;
    let share = |bytes: i64| (bytes + gpus - 1) / gpus;
    let copies = match (precision, gpus) {
        (Precision::Fp32Bf16, 1) => BF16 * copied(shape, &parts),
        (Precision::Bf16, 1) => 0,
        _ => BF16 * count::largest_block(&shape.model),
    };
    let each = precision.bytes() * all;
    let patches = shape.model.patches.as_ref();
    let frozen = patches.and_then(PatchConfig::trained).map_or(0, |network| FLOAT * network.parameters());
    let averages = if precision == Precision::Bf16 || !subject.averages { 0 } else { each };
    let states =
        [each + frozen, gradients(subject, precision, &parts), moments(subject, precision, all), averages]
            .map(share);
    let [weights, gradients, optimizer, averages] = states;
    let sum = states.iter().sum::<i64>() + copies;
    let activations_per_token = activations(shape, recompute);
    let largest_batch = memory.map(|memory| {
        let left = memory.saturating_sub(sum as u64);
        (left as f64 / activations_per_token) as i64
    });
    Setup {
        precision,
        gpus,
        recompute,
        weights,
        copies,
        gradients,
        optimizer,
        averages,
        states: sum,
        activations_per_token,
        fits: memory.map(|memory| sum as u64 <= memory),
        largest_batch,
    }
}

/// Bytes of the gradients: those of products are bf16 where one pass makes them, and add up in float32; those of heads are
/// float32; all others have the dtype of their weights.
fn gradients(subject: &Subject, precision: Precision, parts: &Parts) -> i64 {
    let count = |parts: &[Count]| parts.iter().map(|count| count.parameters).sum::<i64>();
    let products = count(&[parts.attention, parts.feed_forward, parts.experts]);
    let heads = count(&[parts.heads]);
    let others = parts.total().parameters - products - heads;
    let in_products = if subject.passes > 1 { FLOAT } else { BF16 };
    in_products * products + FLOAT * heads + precision.bytes() * others
}

/// Bytes of the moments of `all` parameters; where updates are merged, of what they are merged with and of the weights
/// before a step, too.
fn moments(subject: &Subject, precision: Precision, all: i64) -> i64 {
    let Subject { shape, optimizer, .. } = subject;
    let by_muon = if optimizer.muon_momentum.is_some() { count::hidden_matrices(shape) } else { 0 };
    let moment = precision.bytes().min(optimizer.moments.bytes() as i64);
    let merging = if subject.merges { 2 * precision.bytes() * all } else { 0 };
    2 * moment * (all - by_muon) + precision.bytes() * by_muon + merging
}

/// Weights that layers cast to the dtype of their input: all but norms, tables that are only looked up, and routers.
fn copied(shape: &Shape, parts: &Parts) -> i64 {
    let tied = if shape.model.tied { shape.vocab.text_rows() * shape.model.width } else { 0 };
    let left_out = [parts.embeddings, parts.norms, parts.router].map(|count| count.parameters);
    parts.total().parameters - left_out.iter().sum::<i64>() + tied
}

/// Bytes a token.
fn activations(shape: &Shape, recompute: bool) -> f64 {
    let model = &shape.model;
    let blocks = (0..model.layers).map(|layer| block(model, layer));
    let kept =
        if recompute { BF16 * model.layers * model.width + blocks.max().unwrap_or(0) } else { blocks.sum() };
    // Input and output of the last norm, rows of targets, and their gradients.
    let last = 4 * BF16 * model.width;
    let picture = model.patches.as_ref().map_or(0, picture);
    (kept + last) as f64 + picture as f64 / shape.longest() as f64
}

/// Bytes that a block keeps of a token.
fn block(model: &ModelConfig, layer: i64) -> i64 {
    let (d, k) = (model.width, model.head_width());
    let turned =
        if model.qk_norm || model.rotary.is_some() { (model.heads + model.kv_heads()) * k } else { 0 };
    // Both norms' inputs and outputs; what attention reads and gives.
    let values = 4 * d + count::queries_keys_values(model) + turned + model.heads * k;
    let masks = if model.dropout > 0.0 { 2 * d } else { 0 };
    let log_sums = FLOAT * model.heads;
    BF16 * values + masks + log_sums + fed(model, layer)
}

/// Bytes that the feed-forward or the experts of a block keep of a token.
fn fed(model: &ModelConfig, layer: i64) -> i64 {
    // The first product, and what its activation makes of it.
    let hidden = |width: i64| match model.feed_forward {
        FeedForwardKind::Swiglu => 3 * width,
        FeedForwardKind::Gelu => 2 * width,
    };
    let Some(moe) = model.experts(layer) else { return BF16 * hidden(model.hidden) };
    let d = model.width;
    // Each row is gathered before its expert and weighted after it.
    let routed = moe.active * (2 * d + hidden(moe.hidden(model.hidden)));
    let shared = moe.shared.map_or(0, |width| hidden(width) + d);
    // The router's input, logits and probabilities.
    BF16 * (routed + shared) + FLOAT * (d + 2 * moe.experts)
}

/// Bytes that the extractor of patch features keeps of a picture.
fn picture(config: &PatchConfig) -> i64 {
    /// What a convolution, its norm and its activation give.
    const OUTPUTS: i64 = 3;
    let kept = match &config.extractor {
        Extractor::Convolutions(channels) => {
            let sides = (1..).map(|halvings| config.resolution >> halvings);
            OUTPUTS * channels.iter().zip(sides).map(|(channels, side)| channels * side * side).sum::<i64>()
        }
        // The pixels, in another order.
        Extractor::Linear(_) => 0,
        Extractor::Resnet(_) => config.features() * config.grid().pow(2),
    };
    BF16 * (count::COLOURS * config.resolution.pow(2) + kept)
}

#[cfg(test)]
mod tests {
    use m6_runtime::FloatDtype;
    use m6_runtime::optim::OptimizerConfig;

    use super::*;

    const GIB: f64 = (1u64 << 30) as f64;

    /// docs/performance.md: peaks on an H100 of `benches/train_step.rs`, which keeps no averages, and of `m6 train`.
    #[test]
    fn the_measured_peaks_are_met_within_a_tenth() {
        let measured = [
            ("qwen2-0.5b", 8 * 2048, 23.7 * GIB, false),
            ("qwen2-1.5b", 8 * 2048, 55.5 * GIB, false),
            ("emoji", 65_536, 9.5e9, true),
        ];
        for (preset, tokens, peak, has_averages) in measured {
            let plan = setup(&super::super::tests::preset(preset), None, Precision::Fp32Bf16, 1, false);
            let states = plan.states - if has_averages { 0 } else { plan.averages };
            let planned = states as f64 + f64::from(tokens) * plan.activations_per_token;
            assert!((planned / peak - 1.0).abs() < 0.1, "{preset}: {}", planned / GIB);
        }
    }

    #[test]
    fn moments_of_bf16_take_half_except_those_of_muon() {
        let optimizer = |moments, muon_momentum| {
            let optimizer = OptimizerConfig { moments, muon_momentum, ..OptimizerConfig::default() };
            let subject = Subject { optimizer, ..super::super::tests::preset("qwen2-0.5b") };
            let setup = setup(&subject, None, Precision::Fp32Bf16, 1, false);
            (setup.optimizer, setup.weights, FLOAT * count::hidden_matrices(&subject.shape))
        };
        let (whole, weights, _) = optimizer(FloatDtype::Fp32, None);
        assert_eq!((whole, optimizer(FloatDtype::Bf16, None).0), (2 * weights, weights));
        let merging = Subject { merges: true, ..super::super::tests::preset("qwen2-0.5b") };
        let setup = setup(&merging, None, Precision::Fp32Bf16, 1, false);
        assert_eq!(setup.optimizer, 4 * setup.weights);
        let (whole, _, by_muon) = optimizer(FloatDtype::Fp32, Some(0.95));
        assert_eq!(whole, 2 * weights - by_muon);
        // One of float32 takes what two of bf16 take.
        assert_eq!(optimizer(FloatDtype::Bf16, Some(0.95)).0, weights);
    }

    #[test]
    fn spreading_and_computing_again_take_less() {
        let subject = super::super::tests::preset("qwen2-7b");
        let machine = Machine { gpus: 8, memory: Some(80 << 30) };
        let setups = setups(&subject, machine);
        let [alone, again, spread, both] = &setups[..4] else { panic!("{} setups", setups.len()) };
        assert_eq!((alone.fits, spread.fits), (Some(false), Some(true)));
        assert_eq!(alone.largest_batch, Some(0));
        assert_eq!(spread.weights, (alone.weights + 7) / 8);
        assert!(again.activations_per_token < alone.activations_per_token / 4.0);
        assert!(both.largest_batch > spread.largest_batch);
        let whole_bf16 = &setups[4];
        assert_eq!(2 * whole_bf16.weights, alone.weights);
        assert_eq!(2 * whole_bf16.optimizer, alone.optimizer);
        assert_eq!((whole_bf16.copies, whole_bf16.averages), (0, 0));
        // Of three products' passes one gradient is kept, in float32.
        let often = Subject { passes: 3, averages: false, ..subject };
        let [wide, narrow] = Precision::ALL.map(|precision| setup(&often, None, precision, 1, false));
        assert_eq!((wide.gradients, wide.averages), (wide.weights, 0));
        assert!(narrow.gradients > whole_bf16.gradients && narrow.gradients < wide.gradients);
    }
}
