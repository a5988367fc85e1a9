//! What a stack costs before anything is computed: parameters, operations and memory, by arithmetic alone.

mod count;
mod memory;
mod report;
mod shape;

use m6_vision::{Extractor, PatchConfig};
use serde::Serialize;

pub use count::{Count, Parts};
pub use memory::{Machine, Precision, Setup};
pub use shape::{Shape, Subject};

use crate::model::ModelConfig;

/// The backward pass takes twice the operations of the forward pass.
const PASSES: f64 = 3.0;
/// Longest text for which operations are given where no length is asked for.
const USUAL_LENGTH: i64 = 4096;

/// What a stack costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// All parameters.
    pub parameters: i64,
    /// Those that a token meets.
    pub active_parameters: i64,
    /// Both by part.
    pub parts: Parts,
    /// Floating point operations.
    pub flops: Flops,
    /// Memory of one GPU, a way to train each.
    pub memory: Vec<Setup>,
}

/// Floating point operations; a product and a sum are two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Flops {
    /// Tokens of the text that a token stands in; it sees those before it.
    pub length: i64,
    /// A token's forward pass, with the head of texts and without pictures.
    pub forward_per_token: f64,
    /// A token's forward and backward pass.
    pub training_per_token: f64,
    /// A picture's way to patch features; 0 where there are none.
    pub forward_per_picture: f64,
    /// That way and back, as far as it is trained.
    pub training_per_picture: f64,
}

impl Plan {
    /// Of a stack on a machine, with texts of `length` tokens.
    pub fn of(subject: &Subject, machine: Machine, length: Option<i64>) -> Self {
        let parts = Parts::of(&subject.shape);
        let length = length.unwrap_or(subject.shape.longest().min(USUAL_LENGTH));
        Self {
            parameters: parts.total().parameters,
            active_parameters: parts.total().active,
            parts,
            flops: Flops::of(&subject.shape, length),
            memory: memory::setups(subject, machine),
        }
    }
}

impl Flops {
    fn of(shape: &Shape, length: i64) -> Self {
        // A token goes through blocks that share their weights, too.
        let model = &ModelConfig { share_layers: false, ..shape.model.clone() };
        let parts = Parts::of(&Shape { model: model.clone(), ..shape.clone() });
        let body = [parts.attention, parts.feed_forward, parts.experts, parts.router];
        let head = shape.vocab.text_rows() * model.width;
        let products = body.iter().map(|count| count.active).sum::<i64>() + head;
        // Scores and sums of values, of each token seen.
        let attention: f64 =
            (0..model.layers).map(|layer| 4.0 * attention_width(model) * seen(model, layer, length)).sum();
        let forward_per_token = 2.0 * products as f64 + attention;
        let (trained, frozen) = model.patches.as_ref().map_or((0.0, 0.0), |p| picture(p, model.width));
        Self {
            length,
            forward_per_token,
            training_per_token: PASSES * forward_per_token,
            forward_per_picture: trained + frozen,
            training_per_picture: PASSES * trained + frozen,
        }
    }
}

fn attention_width(model: &ModelConfig) -> f64 {
    (model.heads * model.head_width()) as f64
}

/// Tokens that one of `length` sees in a block, on average.
fn seen(model: &ModelConfig, layer: i64, length: i64) -> f64 {
    let length = length as f64;
    match model.window(layer as usize).map(|window| window as f64).filter(|window| *window < length) {
        Some(window) => window - window * window / (2.0 * length),
        None => length / 2.0,
    }
}

/// A picture's way to patch features: what is trained of it, and what is not and has no way back.
fn picture(patches: &PatchConfig, width: i64) -> (f64, f64) {
    let project = patches.features() * width * patches.grid().pow(2);
    let (trained, frozen) = match &patches.extractor {
        Extractor::Convolutions(channels) => {
            let products = |(halvings, (input, output)): (u32, (i64, i64))| {
                count::KERNEL * input * output * (patches.resolution >> halvings).pow(2)
            };
            ((1..).zip(count::layers(channels)).map(products).sum(), 0)
        }
        Extractor::Linear(_) => (0, 0),
        Extractor::Resnet(depth) => (0, depth.products(patches.resolution)),
    };
    (2.0 * (project + trained) as f64, 2.0 * frozen as f64)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use m6_runtime::{Group, Params};
    use m6_vision::Depth;
    use tch::Device;

    use super::*;
    use crate::model::{Bias, FeedForwardKind, MoeConfig, NormKind, RotaryConfig, Transformer, Vocab};

    fn repository(path: &str) -> Subject {
        Subject::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)).unwrap()
    }

    pub(super) fn preset(name: &str) -> Subject {
        repository(&format!("configs/model/{name}.toml"))
    }

    /// Counts of the stack as it is built, and of its matrices between hidden layers.
    fn built(shape: &Shape) -> (i64, i64) {
        let params = Params::unfilled(Device::Cpu);
        let _transformer = Transformer::new(&params, &shape.model, shape.vocab, shape.code_grid);
        let entries = params.trainable();
        let hidden = entries.iter().filter(|(_, param)| param.group == Group::Hidden);
        let size = |param: &m6_runtime::Param| param.tensor.numel() as i64;
        (entries.iter().map(|(_, param)| size(param)).sum(), hidden.map(|(_, param)| size(param)).sum())
    }

    /// Small stacks that between them have every setting with a parameter to it.
    fn families() -> Vec<Shape> {
        let plain = ModelConfig::new(32, 3, 4, 48, 16);
        let patches = Some(PatchConfig::convolutions(32, &[16, 32]));
        let extractor = |resolution, extractor| Some(PatchConfig { resolution, extractor });
        let moe: MoeConfig =
            toml::from_str("experts = 6\nactive = 2\nevery = 1\nbalance_loss = 0\nz_loss = 0").unwrap();
        let qwen2 = ModelConfig {
            kv_heads: Some(2),
            qk_norm: false,
            bias: Bias::Qkv,
            rotary: Some(RotaryConfig::new(1e4)),
            ..plain.clone()
        };
        let bert = ModelConfig {
            norm: NormKind::Layer,
            bias: Bias::All,
            feed_forward: FeedForwardKind::Gelu,
            patches: patches.clone(),
            ..plain.clone()
        };
        let some = MoeConfig { every: 2, hidden: Some(24), ..moe.clone() };
        let shared = MoeConfig { shared: Some(40), dense_layers: vec![1], ..moe };
        let models = [
            (ModelConfig { any_order: true, patches, ..plain.clone() }, 8),
            (ModelConfig { head_width: Some(16), tied: false, ..plain }, 0),
            (ModelConfig { moe: Some(some.clone()), ..bert.clone() }, 0),
            (ModelConfig { moe: Some(some), ..qwen2.clone() }, 0),
            (ModelConfig { moe: Some(shared), tied: false, ..qwen2.clone() }, 8),
            (qwen2, 0),
            (ModelConfig { share_layers: true, ..bert.clone() }, 8),
            (ModelConfig { patches: extractor(64, Extractor::Resnet(Depth::Fifty)), ..bert.clone() }, 0),
            (ModelConfig { patches: extractor(32, Extractor::Linear(8)), ..bert.clone() }, 8),
            (bert, 8),
        ];
        models
            .map(|(model, codes)| Shape { model, vocab: Vocab { text: 40, codes }, code_grid: codes / 2 })
            .into()
    }

    #[test]
    fn counts_are_those_of_the_stack_as_it_is_built() {
        for shape in families() {
            shape.model.validate().unwrap();
            let planned = (Parts::of(&shape).total().parameters, count::hidden_matrices(&shape));
            assert_eq!(planned, built(&shape), "{shape:?}");
        }
    }

    /// Published totals in billions and how near we come, as a share.
    #[test]
    fn presets_have_the_published_number_of_parameters() {
        let published = [
            ("m6-base", 0.327, 0.002),
            ("m6-10b", 10.0, 0.02),
            ("m6-100b", 100.0, 0.04),
            ("m6-t-1t", 1002.7, 0.0002),
            ("m6-10t", 10_050.0, 0.0005),
            ("qwen-1.8b", 1.84, 0.003),
            ("qwen-7b", 7.72, 0.001),
            ("qwen-14b", 14.17, 0.001),
            ("qwen-72b", 72.29, 0.001),
            ("qwen2-0.5b", 0.494, 0.001),
            ("qwen2-1.5b", 1.544, 0.001),
            ("qwen2-7b", 7.616, 0.001),
            ("qwen2-72b", 72.71, 0.001),
            ("qwen2-57b-a14b", 57.41, 0.001),
        ];
        for (name, billions, share) in published {
            let found = Parts::of(&preset(name).shape).total().parameters as f64 / 1e9;
            assert!((found / billions - 1.0).abs() < share, "{name}: {found}");
        }
    }

    /// To the last parameter: 4 matrices of attention, 2 of a feed-forward and the table of tokens.
    #[test]
    fn m6s_products_are_its_arithmetic() {
        const D: i64 = 1024;
        const ROWS: i64 = 21_128;
        let sizes = [
            ("m6-base", D, 24, 4 * D, 24, 0),
            ("m6-10b", 4 * D, 50, 16 * D, 50, 0),
            ("m6-100b", D, 24, 4 * D, 12, 12 * 1024),
            ("m6-t-1t", D, 24, 21_248, 0, 24 * 960),
            ("m6-10t", D, 48, 9984, 0, 48 * 10_240),
        ];
        for (name, d, layers, hidden, dense, experts) in sizes {
            let Subject { shape, .. } = preset(name);
            let bare = ModelConfig { bias: Bias::None, patches: None, ..shape.model.clone() };
            let parts = Parts::of(&Shape { model: bare, ..shape.clone() });
            let found = [parts.attention, parts.feed_forward, parts.experts].map(|count| count.parameters);
            let each = 2 * d * hidden;
            assert_eq!(found, [layers * 4 * d * d, dense * each, experts * each], "{name}");
            assert_eq!(shape.vocab.text, ROWS, "{name}");
        }
    }

    /// The four sizes of M6-T (Yang et al. 2021): matrices of attention and experts and the table of tokens, in billions.
    #[test]
    fn m6_ts_sizes_are_its_arithmetic() {
        let sizes = [
            (5, 32, 4096, 1.385),
            (10, 128, 4096, 10.80),
            (24, 512, 4096, 103.20),
            (24, 960, 21_248, 1002.73),
        ];
        for (layers, experts, hidden, billions) in sizes {
            let mut shape = preset("m6-t-1t").shape;
            let model = &mut shape.model;
            (model.layers, model.hidden, model.bias, model.patches) = (layers, hidden, Bias::None, None);
            let moe = model.moe.as_mut().unwrap();
            moe.experts = experts;
            let table = shape.vocab.text * shape.model.width;
            let parts = Parts::of(&shape);
            let found = (parts.attention.parameters + parts.experts.parameters + table) as f64 / 1e9;
            assert!((found / billions - 1.0).abs() < 5e-4, "{layers} {experts}: {found}");
        }
    }

    #[test]
    fn qwen2_without_its_tables_and_without_idle_experts() {
        let billions = |parameters: i64| (parameters as f64 / 1e7).round() / 100.0;
        for (name, body) in [("0.5b", 0.36), ("1.5b", 1.31), ("7b", 6.53), ("72b", 70.21)] {
            let parts = Parts::of(&preset(&format!("qwen2-{name}")).shape);
            let tables = parts.embeddings.parameters + parts.heads.parameters;
            assert_eq!(billions(parts.total().parameters - tables), body, "{name}");
        }
        let parts = Parts::of(&preset("qwen2-57b-a14b").shape);
        let tables = parts.embeddings.parameters + parts.heads.parameters;
        assert_eq!(billions(parts.total().active), 14.25);
        assert_eq!(billions(parts.total().active - tables), 13.16);
    }

    #[test]
    fn presets_tell_their_size() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/model");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let shape = Subject::open(&path).unwrap().shape;
            let total = Parts::of(&shape).total();
            let text = std::fs::read_to_string(&path).unwrap();
            let size = format!("Size: {} parameters, ", report::short(total.parameters as f64));
            let active = report::short(total.active as f64);
            let active = if total.active == total.parameters { "all" } else { &active };
            assert!(text.contains(&format!("{size}{active} active")), "{}", path.display());
        }
    }

    #[test]
    fn the_shipped_model_is_its_preset() {
        let shipped = repository("models/emoji");
        assert_eq!(preset("emoji").shape, shipped.shape);
        let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/m6/emoji.toml");
        let run = m6_run::config::load::<crate::train::TrainConfig>(run, &[]).unwrap();
        assert_eq!(run.config.model, shipped.shape.model);
    }

    #[test]
    fn published_folders_are_planned() {
        let folder = "m6/tests/parity/qwen2-moe";
        let subject = repository(folder);
        assert_eq!(Parts::of(&subject.shape).total().parameters, built(&subject.shape).0);
    }

    #[test]
    fn operations_are_counted_as_in_our_bench() {
        let Subject { shape, .. } = preset("qwen2-0.5b");
        let parts = Parts::of(&shape);
        let found = Flops::of(&shape, 2048).training_per_token;
        // 6 for each parameter and token, and causal attention; norms are no products.
        let attention = 6 * shape.model.layers * shape.model.width * 2048;
        let bench = (6 * (parts.total().parameters - parts.norms.parameters) + attention) as f64;
        assert_eq!(found, bench);
    }

    #[test]
    fn the_largest_stack_that_is_allowed_stays_within_whole_numbers() {
        let mut model = ModelConfig::new(1 << 16, 1 << 10, 1 << 8, 1 << 16, 1 << 20);
        model.any_order = true;
        model.tied = false;
        model.patches = Some(PatchConfig::convolutions(1 << 13, &[1 << 16; 8]));
        let moe = "experts = 16384\nactive = 16384\nevery = 1\nshared = 65536\nbalance_loss = 0\nz_loss = 0";
        model.moe = Some(toml::from_str(moe).unwrap());
        let shape = Shape { model, vocab: Vocab { text: 1 << 24, codes: 1 << 24 }, code_grid: 1 << 12 };
        assert_eq!(shape.model.validate(), Ok(()));
        let machine = Machine { gpus: 1 << 20, memory: Some(u64::MAX) };
        let plan = Plan::of(&Subject::alone(shape), machine, Some(1 << 30));
        assert!(plan.parameters > 1 << 57);
    }

    #[test]
    fn a_window_is_seen_and_no_more() {
        let mut model = ModelConfig::new(32, 2, 4, 48, 16);
        model.window = Some(crate::model::WindowConfig::new(4, 1));
        assert_eq!((seen(&model, 0, 8), seen(&model, 1, 8), seen(&model, 1, 2)), (4.0, 3.0, 1.0));
    }
}
