//! How fast a language model trains: forward, backward, clipping and AdamW over packed texts of random tokens, with random
//! weights.
//!
//!     cargo bench -p m6 --features cuda --bench train_step -- qwen2-0.5b 8 2048
//!
//! Shape, texts, tokens a text, how often they are gone through before an update (once), and the dtypes of the optimizer's
//! moments and of the weights (`fp32`, or `bf16`). On a GPU steps are launched kernel by kernel and as a CUDA graph, in turn. Prints one line of
//! JSON, to be read beside what Hugging Face's implementation makes of the same shape on the same GPU.

use std::time::Instant;

use m6::model::{
    Balance, Bias, FeedForwardKind, Mode, ModelConfig, MoeConfig, NormKind, RotaryConfig, RouterNoise,
    RoutingKind, Sequence, Transformer, Vocab,
};
use m6_runtime::attention::{Layout, Span};
use m6_runtime::device::{device, memory, set_tf32};
use m6_runtime::fused::linear_cross_entropy;
use m6_runtime::optim::{Optimizer, OptimizerConfig};
use m6_runtime::{CudaGraph, FloatDtype, Params, RuntimeError};
use tch::{Device, Kind, Tensor};

const WARM_UP: usize = 4;
const STEPS: usize = 10;
const ROUNDS: usize = 3;
const LEARNING_RATE: f64 = 1e-4;

/// A shape by its name, and the rows of its vocabulary.
fn shape(name: &str) -> Option<(ModelConfig, i64)> {
    let qwen2 = |width, layers, heads, kv_heads, hidden| ModelConfig {
        kv_heads: Some(kv_heads),
        qk_norm: false,
        bias: Bias::Qkv,
        rotary: Some(RotaryConfig::new(1e6)),
        ..ModelConfig::new(width, layers, heads, hidden, 4096)
    };
    let m6 = |hidden| ModelConfig {
        norm: NormKind::Layer,
        qk_norm: false,
        bias: Bias::All,
        feed_forward: FeedForwardKind::Gelu,
        ..ModelConfig::new(1024, 5, 16, hidden, 4096)
    };
    Some(match name {
        "tiny" => (qwen2(64, 2, 4, 2, 128), 512),
        "qwen2-0.5b" => (qwen2(896, 24, 14, 2, 4864), 151_936),
        "qwen2-1.5b" => (qwen2(1536, 28, 12, 2, 8960), 151_936),
        "qwen2-moe-60" => {
            let moe = MoeConfig {
                experts: 60,
                active: 4,
                routing: RoutingKind::Top,
                capacity: None,
                every: 1,
                dense_layers: Vec::new(),
                hidden: Some(704),
                shared: Some(2816),
                renormalize: false,
                balance_loss: 0.0,
                balance: Balance::Model,
                z_loss: 0.0,
                noise: RouterNoise::default(),
            };
            let model = ModelConfig { tied: false, moe: Some(moe), ..qwen2(1024, 12, 16, 16, 2816) };
            (model, 32_000)
        }
        // What the experts compute for a token, in one feed-forward.
        "qwen2-moe-60-dense" => {
            (ModelConfig { tied: false, ..qwen2(1024, 12, 16, 16, 4 * 704 + 2816) }, 32_000)
        }
        // M6-T's base (Yang et al. 2021) with two prototypes.
        "m6-t-base" => {
            let moe = MoeConfig {
                experts: 32,
                active: 2,
                routing: RoutingKind::Prototypes,
                capacity: Some(1.25),
                every: 1,
                dense_layers: Vec::new(),
                hidden: None,
                shared: None,
                renormalize: false,
                balance_loss: 0.0,
                balance: Balance::Layer,
                z_loss: 0.0,
                noise: RouterNoise::default(),
            };
            (ModelConfig { moe: Some(moe), ..m6(4096) }, 21_128)
        }
        "m6-t-base-dense" => (m6(2 * 4096), 21_128),
        "llamagen-gpt-l" => {
            let model = ModelConfig { bias: Bias::None, tied: false, ..qwen2(1024, 24, 16, 16, 2816) };
            (model, 16_384)
        }
        _ => return None,
    })
}

fn main() {
    // Cargo adds a flag of its own.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let name = args.first().map_or("tiny", String::as_str);
    let number =
        |place: usize, default| args.get(place).map_or(default, |text| text.parse().expect("a number"));
    let (texts, length, passes): (i64, i64, i64) = (number(1, 2), number(2, 64), number(3, 1));
    let dtype = |place: usize| match args.get(place).map_or("fp32", String::as_str) {
        "fp32" => FloatDtype::Fp32,
        "bf16" => FloatDtype::Bf16,
        other => panic!("{other}: expected fp32 or bf16"),
    };
    let (moments, weights) = (dtype(4), dtype(5));
    let Some((config, rows)) = shape(name) else { panic!("{name}: expected one of those in `shape`") };
    config.validate().expect("a shape that can be computed");
    let device = device("auto").expect("a device");
    // As in training.
    set_tf32(true).expect("a setting");
    let params = Params::new(device, 1).with_matrices(weights);
    let model = Transformer::new(&params, &config, Vocab::language(rows), 0);
    let mut optimizer = Optimizer::new(&params, OptimizerConfig { moments, ..OptimizerConfig::default() });
    optimizer.set_lr(LEARNING_RATE);
    let mut step = step(&model, &mut optimizer, rows, (texts, length), passes);
    let mut by_kernel = vec![seconds(device, &mut step)];
    let mut as_graph = Vec::new();
    if device.is_cuda() {
        let work = || {
            step();
            Ok::<_, RuntimeError>(())
        };
        let graph = CudaGraph::record(device, work).expect("a graph of the step").0;
        // In turn, since a GPU gets slower under load.
        for _ in 0..ROUNDS {
            as_graph.push(seconds(device, || graph.replay().expect("a step")));
            by_kernel.push(seconds(device, &mut step));
        }
    }
    let mean = |times: &[f64]| times.iter().sum::<f64>() / times.len() as f64;
    let by_kernel = mean(&by_kernel);
    let seconds = if as_graph.is_empty() { by_kernel } else { mean(&as_graph) };
    let (tokens, parameters) = (passes * texts * length, params.count());
    let active = parameters - idle(&params, &config);
    // 6 for each parameter that a token meets, and causal attention, as the peer counts them.
    let attention = 6 * config.layers * config.width * length;
    let flops = (6 * active as i64 + attention) as f64 * tokens as f64;
    let report = serde_json::json!({
        "shape": name,
        "parameters": parameters,
        "active_parameters": active,
        "tokens_per_s": tokens as f64 / seconds,
        "ms_per_step": seconds * 1e3,
        "ms_per_step_by_kernel": by_kernel * 1e3,
        "tflops_per_s": flops / seconds / 1e12,
        "memory_peak_bytes": memory(device).expect("figures of the device's memory").peak,
    });
    println!("{report}");
}

/// Parameters of experts that a token does not go through.
fn idle(params: &Params, config: &ModelConfig) -> usize {
    let is_of_experts = |name: &str| name.contains(".experts.");
    let of_experts = params.trainable().into_iter().filter(|(name, _)| is_of_experts(name));
    let count: usize = of_experts.map(|(_, param)| param.tensor.numel()).sum();
    let active = |moe: &MoeConfig| count * moe.active as usize / moe.experts as usize;
    count - config.moe.as_ref().map_or(count, active)
}

/// Mean time of a step.
fn seconds(device: Device, mut step: impl FnMut()) -> f64 {
    (0..WARM_UP).for_each(|_| step());
    synchronize(device);
    let start = Instant::now();
    (0..STEPS).for_each(|_| step());
    synchronize(device);
    start.elapsed().as_secs_f64() / STEPS as f64
}

/// One update, on the same `texts` texts of `length` random tokens in each of its passes.
fn step(
    model: &Transformer,
    optimizer: &mut Optimizer,
    rows: i64,
    (texts, length): (i64, i64),
    passes: i64,
) -> impl FnMut() {
    let device = model.text_head().device();
    let ids = Vec::<i64>::try_from(Tensor::randint(rows, [texts * length], (Kind::Int64, Device::Cpu)));
    let ids = ids.expect("whole numbers");
    let mut sequence = Sequence::new(model.vocab(), model.positions());
    for text in ids.chunks(length as usize) {
        sequence.begin();
        sequence.prefix_text(text);
    }
    let tokens = sequence.to_device(device).expect("memory for the tokens");
    let layout = Layout::new(vec![Span { prefix: 0, target: length }; texts as usize], device);
    let layout = layout.expect("memory for the layout");
    // The token after each one; the last of a text is followed by the first of the next, which costs as much.
    let labels = tokens.ids.roll([-1], [0]);
    move || {
        optimizer.zero_grad().expect("gradients");
        for _ in 0..passes {
            let hidden =
                model.forward(&tokens, None, &layout, texts * length, Mode::Train).expect("a forward pass");
            let (mean, _) = linear_cross_entropy(&hidden.x_nd, &model.text_head(), &labels);
            let loss = hidden.routers.map_or(mean.shallow_clone(), |routers| mean + routers.loss);
            (loss / passes as f64).backward();
        }
        let _ = optimizer.step(1.0).expect("an update");
    }
}

fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}
