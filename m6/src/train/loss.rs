//! Cross-entropy of a packed batch, by head and by task.

use m6_runtime::fused::linear_cross_entropy;
use tch::{Kind, Tensor};

use crate::error::Result;
use crate::model::{Hidden, Mode, Recompute, Transformer};
use crate::objectives::{Batch, Targets, Task};

/// Losses of one micro-batch, all on the device.
#[derive(Debug)]
pub struct Losses {
    /// What is minimised: mean over code targets, plus mean over text targets, plus the routers' losses. The two
    /// means are taken apart, or the few text targets would drown among the codes.
    pub total: Tensor,
    /// `[tasks]` sums of the targets' cross-entropies, in nats.
    pub task_sums: Tensor,
    /// `[tasks]` numbers of targets.
    pub task_counts: Tensor,
    /// Share of routed rows that each expert was chosen for, where there are experts.
    pub expert_load: Option<Tensor>,
    /// Share of routed rows that were dropped, where experts can be full.
    pub expert_dropped: Option<Tensor>,
}

/// Runs the stack over a batch and scores its targets.
///
/// # Errors
/// When libtorch refuses an attention call.
pub fn losses(transformer: &Transformer, batch: &Batch, mode: Mode) -> Result<Losses> {
    let hidden =
        transformer.forward(&batch.tokens, batch.pictures.as_ref(), &batch.layout, batch.real, mode)?;
    Ok(score(hidden, transformer.text_head(), transformer.code_head(), batch))
}

/// The losses of a micro-batch, one of `count` of an update, whose gradients are added to those of the parameters. With
/// `recompute`, blocks keep their input alone and are computed again.
///
/// # Errors
/// When libtorch refuses an attention call.
pub(super) fn accumulate(
    transformer: &Transformer,
    batch: &Batch,
    count: u64,
    recompute: bool,
) -> Result<Losses> {
    let backward = |losses: &Losses| (&losses.total / count as f64).backward();
    if !recompute {
        let losses = losses(transformer, batch, Mode::Train)?;
        backward(&losses);
        return Ok(losses);
    }
    let (pass, hidden) =
        Recompute::forward(transformer, &batch.tokens, batch.pictures.as_ref(), &batch.layout, batch.real)?;
    let losses = score(hidden, pass.text_head().shallow_clone(), transformer.code_head(), batch);
    backward(&losses);
    pass.backward()?;
    Ok(losses)
}

/// Scores the targets of a batch against the rows of the heads.
fn score(hidden: Hidden, text_head: Tensor, code_head: Option<Tensor>, batch: &Batch) -> Losses {
    let device = hidden.x_nd.device();
    let zeros = || Tensor::zeros([Task::ALL.len() as i64], (Kind::Float, device));
    let (mut task_sums, mut task_counts) = (zeros(), zeros());
    let (mut total, expert_load, expert_dropped) = match hidden.routers {
        Some(routers) => (routers.loss, Some(routers.loads), routers.dropped),
        None => (Tensor::zeros([], (Kind::Float, device)), None, None),
    };
    let heads: [(&Targets, Option<Tensor>); 2] = [(&batch.texts, Some(text_head)), (&batch.codes, code_head)];
    for (targets, head) in heads {
        let Some(head) = head.filter(|_| targets.count > 0) else { continue };
        let rows = hidden.x_nd.index_select(0, &targets.rows);
        let (mean, each) = linear_cross_entropy(&rows, &head, &targets.labels);
        total = mean + total;
        task_sums = task_sums.index_add(0, &targets.tasks, &each);
        task_counts = task_counts.index_add(0, &targets.tasks, &each.ones_like());
    }
    Losses { total, task_sums, task_counts, expert_load, expert_dropped }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use m6_data::Rgb8;
    use m6_runtime::{Params, read_tensors};
    use m6_vision::{Extractor, PatchConfig};
    use tch::Device;

    use super::*;
    use crate::model::{
        Bias, FeedForwardKind, Language, ModelConfig, MoeConfig, NormKind, RotaryConfig, Vocab, WindowConfig,
    };
    use crate::objectives::{Example, Piece, Target, lay_out};

    const VOCAB: Vocab = Vocab { text: 20, codes: 4 };
    const CODE_GRID: i64 = 2;

    /// A picture of one grey.
    fn flat(grey: i64) -> Rgb8 {
        Rgb8::filled(8, 8, [grey as u8; 3])
    }

    /// A caption and, as `has_codes` says, a drawing, and some padding.
    fn batch(transformer: &Transformer, words: &[i64], picture: Rgb8, has_codes: bool) -> Batch {
        let caption = Example {
            task: Task::Captioning,
            prefix: vec![Piece::Picture(picture)],
            target: Target::Text { language: Language::Zh, ids: words.to_vec() },
        };
        let codes = vec![3, 2, 1, 0];
        let drawing = Example {
            task: Task::TextToImage,
            prefix: vec![Piece::Text(words.to_vec())],
            target: Target::Codes { seen: codes.clone(), codes, places: vec![0, 1, 2, 3] },
        };
        let examples = [Some(caption), has_codes.then_some(drawing)].into_iter().flatten();
        let tokens = 24 + 2 * words.len();
        let row = lay_out(transformer.vocab(), transformer.positions(), examples, Some(tokens));
        row.unwrap().upload(transformer.text_head().device()).unwrap()
    }

    fn dense() -> ModelConfig {
        let patches = Some(PatchConfig::convolutions(8, &[16, 16]));
        ModelConfig { patches, ..ModelConfig::new(16, 3, 2, 24, 8) }
    }

    fn built(config: &ModelConfig) -> (Params, Transformer) {
        config.validate().unwrap();
        let params = Params::new(Device::Cpu, 3);
        let transformer = Transformer::new(&params, config, VOCAB, CODE_GRID);
        (params, transformer)
    }

    /// `tests/parity/m6.py` made the weights and what torch's own encoder layers make of them.
    #[test]
    fn loss_and_every_gradient_of_m6_are_those_of_torchs_layers() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/m6.safetensors");
        let golden: BTreeMap<String, Tensor> = read_tensors(&file).unwrap().into_iter().collect();
        let config = ModelConfig {
            norm: NormKind::Layer,
            bias: Bias::All,
            feed_forward: FeedForwardKind::Gelu,
            qk_norm: false,
            patches: Some(PatchConfig { resolution: 8, extractor: Extractor::Linear(4) }),
            ..dense()
        };
        let (params, transformer) = built(&config);
        for (name, mut tensor) in params.tensors() {
            tensor.copy_(&golden[&format!("weight.{name}")]);
        }
        let mut picture = Rgb8::filled(8, 8, [0; 3]);
        for (i, value) in picture.pixels.iter_mut().enumerate() {
            *value = ((i * 37 + 11) % 256) as u8;
        }
        let losses =
            accumulate(&transformer, &batch(&transformer, &[5, 6, 7], picture, true), 1, false).unwrap();

        let close = |found: f64, expected: &Tensor| {
            let expected = expected.double_value(&[]);
            assert!((found - expected).abs() < 1e-5, "{found} against {expected}");
        };
        close(losses.total.double_value(&[]), &golden["loss"]);
        for (task, each) in [(Task::Captioning, "text_losses"), (Task::TextToImage, "code_losses")] {
            close(losses.task_sums.double_value(&[task as i64]), &golden[each].sum(Kind::Float));
        }
        let trained = params.trainable();
        assert_eq!(golden.len(), 2 * trained.len() + 3);
        for (name, param) in trained {
            let expected = &golden[&format!("grad.{name}")];
            let error = (param.tensor.grad() - expected).norm() / expected.norm();
            assert!(error.double_value(&[]) < 1e-4, "{name}: {error:?}");
        }
    }

    /// Of each family, wide enough for the kernels. All experts are active: a router's choice can turn on a rounded bit.
    ///
    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn loss_and_every_gradient_in_bf16_on_a_gpu_are_those_of_float32() {
        use m6_runtime::FloatDtype;
        const BF16_ERROR: f64 = 3e-2;
        let patches = Some(PatchConfig { resolution: 8, extractor: Extractor::Linear(4) });
        let wide = ModelConfig { patches, ..ModelConfig::new(256, 4, 4, 512, 64) };
        let m6 = ModelConfig {
            norm: NormKind::Layer,
            bias: Bias::All,
            feed_forward: FeedForwardKind::Gelu,
            qk_norm: false,
            ..wide.clone()
        };
        let qwen = ModelConfig {
            bias: Bias::Qkv,
            qk_norm: false,
            rotary: Some(RotaryConfig::new(1e4)),
            tied: false,
            ..wide.clone()
        };
        let qwen2 = ModelConfig { kv_heads: Some(2), ..qwen.clone() };
        let broad = ModelConfig { head_width: Some(128), ..qwen.clone() };
        let shared = "every = 2\nshared = 64\nrenormalize = false";
        let moe =
            ModelConfig { moe: experts(shared).map(|moe| MoeConfig { active: 4, ..moe }), ..qwen2.clone() };
        let words: Vec<i64> = (0..60).map(|i| (i * 7 + 3) % VOCAB.text).collect();
        let kept = [FloatDtype::Fp32, FloatDtype::Bf16];
        for (config, kept) in
            [wide, m6, qwen, qwen2, broad, moe].iter().flat_map(|config| kept.map(|kept| (config, kept)))
        {
            config.validate().unwrap();
            let weights = Params::new(Device::Cpu, 3).with_matrices(kept);
            let _ = Transformer::new(&weights, config, VOCAB, CODE_GRID);
            let weights = weights.tensors();
            let run = |device: Device, kept: FloatDtype| {
                let params = Params::new(device, 3).with_matrices(kept);
                let transformer = Transformer::new(&params, config, VOCAB, CODE_GRID);
                for (name, mut tensor) in params.tensors() {
                    tensor.copy_(&weights[&name]);
                }
                let batch = batch(&transformer, &words, flat(90), true);
                let total = accumulate(&transformer, &batch, 1, false).unwrap().total;
                let grads = params.trainable().into_iter().map(|(name, param)| (name, param.tensor.grad()));
                let numbers = std::iter::once(("loss".to_owned(), total.detach())).chain(grads);
                numbers
                    .map(|(name, x)| (name, x.to_device(Device::Cpu).to_kind(Kind::Double)))
                    .collect::<Vec<_>>()
            };
            let exact = run(Device::Cpu, FloatDtype::Fp32);
            for ((name, found), (_, exact)) in run(Device::Cuda(0), kept).iter().zip(&exact) {
                let error = ((found - exact).norm() / exact.norm()).double_value(&[]);
                assert!(error < BF16_ERROR, "{name}: {error} with weights in {kept:?} of {config:?}");
            }
        }
    }

    /// Blocks with the weights of one ("Pseudo-to-Real", Lin et al. 2021, M6-10T) compute what they do with weights of their
    /// own that are the same, and what these would learn reaches the one set together.
    #[test]
    fn shared_blocks_are_blocks_that_are_the_same() {
        let config = ModelConfig { share_layers: true, ..dense() };
        let (shared, pseudo) = built(&config);
        let (own, real) = built(&ModelConfig { share_layers: false, ..config.clone() });
        let of_first = |name: &str| match name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
            Some((_, rest)) => format!("blocks.0.{rest}"),
            None => name.to_owned(),
        };
        let weights = shared.tensors();
        for (name, mut tensor) in own.tensors() {
            tensor.copy_(&weights[&of_first(&name)]);
        }
        let score = |transformer: &Transformer, recompute| {
            let batch = batch(transformer, &[5, 6, 7], flat(5), true);
            accumulate(transformer, &batch, 1, recompute).unwrap().total
        };
        assert_eq!(score(&pseudo, false), score(&real, false));

        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, param) in own.trainable() {
            let sum =
                sums.remove(&of_first(&name)).map_or(param.tensor.grad(), |sum| sum + param.tensor.grad());
            sums.insert(of_first(&name), sum);
        }
        let gap = |param: &Tensor, sum: &Tensor| (param.grad() - sum).abs().max().double_value(&[]);
        let mut trained = shared.trainable();
        assert_eq!(trained.len(), sums.len());
        for (name, param) in &trained {
            assert!(gap(&param.tensor, &sums[name]) < 1e-6, "{name}");
        }
        let once: Vec<Tensor> = trained.iter().map(|(_, param)| param.tensor.grad().copy()).collect();
        trained.iter_mut().for_each(|(_, param)| param.tensor.zero_grad());
        let _ = score(&pseudo, true);
        for ((name, param), once) in trained.iter().zip(&once) {
            assert!(gap(&param.tensor, once) < 1e-6, "{name}");
        }
    }

    /// Every number of an update of three micro-batches by name: what they are scored, gradients, and the random state.
    fn update(config: &ModelConfig, recompute: bool) -> Vec<(String, Tensor)> {
        let (params, transformer) = built(config);
        tch::manual_seed(4);
        let mut numbers = Vec::new();
        for (words, has_codes) in [(&[5, 6, 7], true), (&[1, 2, 3], true), (&[9, 5, 9], false)] {
            let batch = batch(&transformer, words, flat(words[0]), has_codes);
            let losses = accumulate(&transformer, &batch, 3, recompute).unwrap();
            numbers.extend([
                ("total", losses.total),
                ("sums", losses.task_sums),
                ("counts", losses.task_counts),
            ]);
            numbers.extend(losses.expert_load.map(|load| ("load", load)));
            numbers.extend(losses.expert_dropped.map(|dropped| ("dropped", dropped)));
        }
        numbers.push(("random", Tensor::rand([4], (Kind::Float, Device::Cpu))));
        let numbers = numbers.into_iter().map(|(name, tensor)| (name.to_owned(), tensor.detach()));
        numbers
            .chain(params.trainable().into_iter().map(|(name, param)| (name, param.tensor.grad())))
            .collect()
    }

    fn assert_same(config: &ModelConfig) {
        let (kept, again) = (update(config, false), update(config, true));
        assert_eq!(kept.len(), again.len());
        for ((name, kept), (_, again)) in kept.iter().zip(&again) {
            assert!(kept.defined() && kept == again, "{name} of {config:?}\n{kept:?}\n{again:?}");
        }
    }

    fn experts(more: &str) -> Option<MoeConfig> {
        let text = format!("experts = 4\nactive = 2\nbalance_loss = 0.1\nz_loss = 0.01\n{more}");
        Some(toml::from_str(&text).unwrap())
    }

    #[test]
    fn blocks_that_are_computed_again_give_the_same_bits() {
        assert_same(&dense());
        let qwen2 = ModelConfig {
            kv_heads: Some(1),
            bias: Bias::Qkv,
            rotary: Some(RotaryConfig::new(1e4)),
            window: Some(WindowConfig::new(3, 1)),
            tied: false,
            ..dense()
        };
        assert_same(&qwen2);
        assert_same(&ModelConfig { norm: NormKind::Layer, any_order: true, dropout: 0.3, ..dense() });
    }

    #[test]
    fn routers_of_blocks_that_are_computed_again_give_the_same_bits() {
        for more in [
            "every = 2",
            "every = 1\nbalance = \"model\"\nshared = 16\nrenormalize = false",
            "every = 1\nrouting = \"prototypes\"\ncapacity = 0.5\ndense_layers = [1]",
            "every = 1\ncapacity = 1.0\nnoise = { input_dropout = 0.2, random_second = true }",
        ] {
            assert_same(&ModelConfig { moe: experts(more), ..dense() });
            assert_same(&ModelConfig { moe: experts(more), dropout: 0.3, ..dense() });
        }
    }

    #[test]
    fn nothing_of_a_block_is_kept_but_its_input() {
        let (params, transformer) = built(&ModelConfig { moe: experts("every = 2"), ..dense() });
        let batch = batch(&transformer, &[5, 6, 7], flat(5), true);
        let (pass, hidden) = Recompute::forward(
            &transformer,
            &batch.tokens,
            batch.pictures.as_ref(),
            &batch.layout,
            batch.real,
        )
        .unwrap();
        let head = pass.text_head().shallow_clone();
        score(hidden, head, transformer.code_head(), &batch).total.backward();
        let blocks = (&params / "blocks").trainable();
        let reached = || blocks.iter().filter(|(_, param)| param.tensor.grad().defined()).count();
        assert_eq!(reached(), 0, "a graph through the blocks would have brought them gradients");
        pass.backward().unwrap();
        assert_eq!(reached(), blocks.len());
    }
}
