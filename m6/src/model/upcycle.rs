//! Experts out of a dense model, as Qwen2-57B-A14B came from Qwen2-7B (Yang et al. 2024, "Qwen2 technical report",
//! section 2.2): for `n` experts of `h_E` neurons, the dense feed-forward's `h_FFN` neurons are copied
//! `ceil(n h_E / h_FFN)` times, shuffled within each copy, and cut into experts one after the other; half of each
//! expert's parameters start anew. The report does not say which: here it is whole neurons, as in Nakamura et al. 2025
//! ("Drop-Upcycling"), so that the others compute what they did.

use std::path::Path;

use m6_runtime::{Params, named_seed};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use tch::Tensor;

use super::config::{Bias, ModelConfig};
use super::difference::difference;
use crate::error::{Error, Result};

/// Share of an expert's neurons that start anew.
const FRESH: f64 = 0.5;

/// How a dense model gets experts.
#[derive(Debug, Clone)]
pub struct Upcycling {
    /// What becomes of it: its own settings, with experts.
    pub(super) model: ModelConfig,
    /// Seed of the shuffles and of all that starts anew, routers and shared experts too.
    pub(super) seed: u64,
    fresh: f64,
    /// The file that says it.
    file: String,
}

/// A file with a stack, of `configs/model` or of a run; what else it has does not matter.
#[derive(Deserialize)]
struct Stack {
    model: ModelConfig,
}

impl Upcycling {
    /// To the stack that the table `model` of a file describes.
    ///
    /// # Errors
    /// When it cannot be read, describes no stack or one without experts.
    pub fn open(path: &Path, seed: u64) -> Result<Self> {
        let Stack { model } = m6_run::config::load::<Stack>(path, &[])?.config;
        let upcycling = Self { model, seed, fresh: FRESH, file: path.display().to_string() };
        upcycling.model.validate().map_err(|problem| upcycling.error(&problem))?;
        match upcycling.model.moe {
            Some(_) => Ok(upcycling),
            None => Err(upcycling.error("moe is missing: expected experts")),
        }
    }

    /// Whether a model with these settings can become that.
    ///
    /// # Errors
    /// When it has experts already, or differs in anything else.
    pub(super) fn check(&self, dense: &ModelConfig) -> Result<()> {
        if let Some(moe) = &dense.moe {
            let found = format!("moe.experts = {}: expected a dense one", moe.experts);
            return Err(Error::Usage(format!("the model to start from has {found}")));
        }
        if dense.bias == Bias::All {
            let problem = "bias = \"all\": expected none or qkv, since experts have no biases";
            return Err(Error::Usage(format!("the model to start from has {problem}")));
        }
        let without = ModelConfig { moe: None, ..self.model.clone() };
        difference(&without, dense).map_or(Ok(()), |(key, own, expected)| {
            Err(self.error(&format!("{key} = {own}: expected {expected}, as in the model to start from")))
        })
    }

    /// Fills `target`, a stack of [`Upcycling::model`] with fresh weights, with those of a dense one.
    pub(super) fn fill(&self, dense: &Params, target: &Params) {
        let _guard = tch::no_grad_guard();
        let (dense, mut target) = (dense.tensors(), target.tensors());
        for (name, tensor) in &mut target {
            if let Some(source) = dense.get(name) {
                tensor.copy_(source);
            }
        }
        for layer in self.model.own_blocks() {
            let Some(moe) = self.model.experts(layer) else { continue };
            // Of SwiGLU the gate's rows, then as many of the other half.
            let (up, parts) = self.model.feed_forward.up(1);
            let (from, to) = (format!("blocks.{layer}.mlp"), format!("blocks.{layer}.moe.experts"));
            let [dense_up, dense_down] = [up, "down"].map(|name| &dense[&format!("{from}.{name}.weight")]);
            let [up_efd, down_edf] = [up, "down"].map(|name| &target[&format!("{to}.{name}")]);
            let mut rng = ChaCha8Rng::seed_from_u64(named_seed(self.seed, &to));
            let sizes = [self.model.hidden, moe.experts, moe.hidden(self.model.hidden)];
            for (expert, kept) in (0..).zip(deal(sizes.map(|size| size as usize), self.fresh, &mut rng)) {
                let [places, neurons] =
                    kept.map(|indices| Tensor::from_slice(&indices).to_device(up_efd.device()));
                let halves = up_efd.get(expert).chunk(parts, 0).into_iter().zip(dense_up.chunk(parts, 0));
                for (mut rows, dense_rows) in halves {
                    let _ = rows.index_copy_(0, &places, &dense_rows.index_select(0, &neurons));
                }
                let columns = dense_down.index_select(1, &neurons);
                let _ = down_edf.get(expert).index_copy_(1, &places, &columns);
            }
        }
    }

    fn error(&self, problem: &str) -> Error {
        Error::Usage(format!("{}: model.{problem}", self.file))
    }
}

/// How often `dense` neurons are needed for `experts` experts of `hidden` ones.
fn copies([dense, experts, hidden]: [usize; 3]) -> usize {
    (experts * hidden).div_ceil(dense)
}

/// For each of `experts` experts of `hidden` neurons those of its neurons that come from one of the `dense` ones, and
/// which: all but the share `fresh`.
fn deal([dense, experts, hidden]: [usize; 3], fresh: f64, rng: &mut impl Rng) -> Vec<[Vec<i64>; 2]> {
    let mut shuffled = |count: usize| {
        let mut all: Vec<i64> = (0..count as i64).collect();
        all.shuffle(rng);
        all
    };
    let neurons: Vec<i64> = (0..copies([dense, experts, hidden])).flat_map(|_| shuffled(dense)).collect();
    let kept = hidden - (fresh * hidden as f64).round() as usize;
    let dealt = neurons.chunks(hidden).take(experts).map(|neurons| {
        let places = shuffled(hidden).split_off(hidden - kept);
        let neurons = places.iter().map(|place| neurons[*place as usize]).collect();
        [places, neurons]
    });
    dealt.collect()
}

#[cfg(test)]
mod tests {
    use m6_runtime::attention::{Layout, Span};
    use tch::Device;

    use super::super::config::FeedForwardKind;
    use super::super::{Mode, Sequence, Transformer, Vocab};
    use super::*;

    const HIDDEN: i64 = 24;

    fn dense(kind: FeedForwardKind) -> ModelConfig {
        ModelConfig { feed_forward: kind, ..ModelConfig::new(16, 3, 2, HIDDEN, 8) }
    }

    /// The second of three blocks gets experts.
    fn upcycling(kind: FeedForwardKind, experts: &str, fresh: f64, seed: u64) -> Upcycling {
        let text = format!("{experts}\nevery = 2\nbalance_loss = 0\nz_loss = 0");
        let model = ModelConfig { moe: Some(toml::from_str(&text).unwrap()), ..dense(kind) };
        model.validate().unwrap();
        Upcycling { model, seed, fresh, file: "experts.toml".into() }
    }

    fn built(config: &ModelConfig, seed: u64) -> (Params, Transformer) {
        let params = Params::new(Device::Cpu, seed);
        let transformer = Transformer::new(&params, config, Vocab::language(20), 0);
        (params, transformer)
    }

    fn upcycled(upcycling: &Upcycling, dense: &Params) -> (Params, Transformer) {
        let (params, transformer) = built(&upcycling.model, upcycling.seed);
        upcycling.fill(dense, &params);
        (params, transformer)
    }

    /// `[neurons, ..]` all that belongs to each neuron of a feed-forward or an expert.
    fn neurons(kind: FeedForwardKind, up: &Tensor, down: &Tensor) -> Vec<Vec<f32>> {
        let mut parts = up.chunk(kind.up(1).1, 0);
        parts.push(down.tr());
        Vec::<Vec<f32>>::try_from(Tensor::cat(&parts, 1)).unwrap()
    }

    /// The neurons of the dense feed-forward and of each expert, and of each expert as it starts.
    fn all_neurons(upcycling: &Upcycling) -> [Vec<Vec<Vec<f32>>>; 3] {
        let kind = upcycling.model.feed_forward;
        let (up, _) = kind.up(1);
        let (params, _) = built(&dense(kind), 1);
        let source = params.tensors();
        let of = |name: &str| &source[&format!("blocks.1.mlp.{name}.weight")];
        let experts = |params: &Params| {
            let tensors = params.tensors();
            let of = |name: &str| &tensors[&format!("blocks.1.moe.experts.{name}")];
            let each = (0..of(up).size()[0]).map(|e| neurons(kind, &of(up).get(e), &of("down").get(e)));
            each.collect::<Vec<_>>()
        };
        let made = experts(&upcycled(upcycling, &params).0);
        let fresh = experts(&built(&upcycling.model, upcycling.seed).0);
        [vec![neurons(kind, of(up), of("down"))], made, fresh]
    }

    #[test]
    fn qwen2_7b_is_copied_nine_times_for_57b_a14b() {
        assert_eq!(copies([18_944, 64, 2560]), 9);
    }

    #[test]
    fn every_neuron_of_a_copy_lands_in_one_place() {
        for kind in [FeedForwardKind::Swiglu, FeedForwardKind::Gelu] {
            // Two copies and two thirds of a third one.
            let upcycling = upcycling(kind, "experts = 8\nactive = 2\nhidden = 8", 0.0, 5);
            let [dense, made, _] = all_neurons(&upcycling);
            let place = |neuron: &Vec<f32>| dense[0].iter().position(|other| other == neuron).unwrap();
            let places: Vec<usize> = made.iter().flatten().map(place).collect();
            let copies: Vec<&[usize]> = places.chunks(HIDDEN as usize).collect();
            assert_eq!(copies.iter().map(|copy| copy.len()).collect::<Vec<_>>(), [24, 24, 16]);
            for copy in &copies {
                let mut sorted = copy.to_vec();
                sorted.sort_unstable();
                assert_ne!(sorted, *copy, "it is shuffled");
                sorted.dedup();
                assert_eq!(sorted.len(), copy.len(), "no neuron comes twice");
            }
            assert_ne!(copies[0], copies[1]);
        }
    }

    #[test]
    fn half_of_each_expert_starts_anew_and_the_rest_is_as_it_was() {
        let upcycling = upcycling(FeedForwardKind::Swiglu, "experts = 6\nactive = 2\nhidden = 16", FRESH, 5);
        let [dense, made, fresh] = all_neurons(&upcycling);
        let mut kept_places = Vec::new();
        for (made, fresh) in made.iter().zip(&fresh) {
            let is_kept: Vec<bool> = made.iter().map(|neuron| dense[0].contains(neuron)).collect();
            assert_eq!(is_kept.iter().filter(|kept| **kept).count(), 8, "of 16");
            let starts = made.iter().zip(fresh).zip(&is_kept);
            assert!(starts.clone().all(|((made, fresh), kept)| *kept || made == fresh));
            kept_places.push(is_kept);
        }
        kept_places.dedup();
        assert_eq!(kept_places.len(), 6, "other neurons in each");
    }

    #[test]
    fn what_is_no_expert_is_copied_or_starts_as_the_config_says() {
        let kind = FeedForwardKind::Swiglu;
        let upcycling = upcycling(kind, "experts = 4\nactive = 2\nshared = 8", FRESH, 5);
        let (params, _) = built(&dense(kind), 1);
        let (source, made) = (params.tensors(), upcycled(&upcycling, &params).0.tensors());
        let start = built(&upcycling.model, upcycling.seed).0.tensors();
        for (name, tensor) in &made {
            match source.get(name) {
                Some(same) => assert_eq!(tensor, same, "{name}"),
                None if name.contains("experts") => assert_ne!(tensor, &start[name], "{name}"),
                None => assert_eq!(tensor, &start[name], "{name}"),
            }
        }
        let left: Vec<&String> = source.keys().filter(|name| !made.contains_key(*name)).collect();
        assert_eq!(left, ["blocks.1.mlp.down.weight", "blocks.1.mlp.gate_up.weight"]);
    }

    #[test]
    fn the_seed_decides_everything() {
        let experts = |seed| upcycling(FeedForwardKind::Swiglu, "experts = 4\nactive = 2", FRESH, seed);
        let (params, _) = built(&dense(FeedForwardKind::Swiglu), 1);
        let made = |seed| upcycled(&experts(seed), &params).0.tensors();
        assert_eq!(made(5), made(5));
        assert_ne!(made(5), made(6));
    }

    fn logits(transformer: &Transformer) -> Tensor {
        let mut sequence = Sequence::new(transformer.vocab(), transformer.positions());
        sequence.begin();
        sequence.prefix_text(&[3, 14, 15, 9, 2]);
        let layout = Layout::new(vec![Span { prefix: 0, target: 5 }], Device::Cpu).unwrap();
        let tokens = sequence.to_device(Device::Cpu).unwrap();
        let hidden = transformer.forward(&tokens, None, &layout, 5, Mode::Infer).unwrap();
        transformer.text_logits(&hidden.x_nd)
    }

    /// The experts of `c` whole copies sum up to `c` times the dense feed-forward. So where `n` experts, all of them
    /// active, have the same weight `1 / n`, they come to `c / n` of it; and where each is a whole copy, to all of it
    /// whatever their weights, which sum to 1.
    #[test]
    fn all_experts_together_are_the_dense_feed_forward() {
        for kind in [FeedForwardKind::Swiglu, FeedForwardKind::Gelu] {
            let (params, transformer) = built(&dense(kind), 1);
            // Wide enough that the feed-forwards show in the logits.
            for (_, param) in params.entries() {
                let _guard = tch::no_grad_guard();
                let mut tensor = param.tensor;
                let _ = tensor.g_mul_scalar_(8.0);
            }
            let exact = logits(&transformer);
            let gap = |upcycling: &Upcycling, scale: Option<f64>| {
                let (params, transformer) = upcycled(upcycling, &params);
                let _guard = tch::no_grad_guard();
                for (name, mut param) in params.entries() {
                    match scale {
                        Some(_) if name.contains("router") => drop(param.tensor.zero_()),
                        Some(scale) if name.contains("experts.down") => {
                            drop(param.tensor.g_mul_scalar_(scale))
                        }
                        _ => {}
                    }
                }
                ((logits(&transformer) - &exact).abs().max() / exact.abs().max()).double_value(&[])
            };
            let whole = "experts = 3\nactive = 3\nrenormalize = false";
            assert!(gap(&upcycling(kind, whole, 0.0, 5), None) < 1e-5);
            // Two copies in six experts.
            let cut = "experts = 6\nactive = 6\nhidden = 8";
            assert!(gap(&upcycling(kind, cut, 0.0, 5), Some(3.0)) < 1e-5);
            assert!(gap(&upcycling(kind, cut, FRESH, 5), Some(3.0)) > 1e-3);
        }
    }

    #[test]
    fn what_does_not_fit_is_named_in_one_line() {
        let kind = FeedForwardKind::Swiglu;
        let upcycling = upcycling(kind, "experts = 4\nactive = 2", FRESH, 5);
        upcycling.check(&dense(kind)).unwrap();
        upcycling.check(&ModelConfig { kv_heads: Some(2), ..dense(kind) }).unwrap();
        let problem = |dense: ModelConfig| upcycling.check(&dense).unwrap_err().to_string();
        assert_eq!(
            problem(ModelConfig { hidden: 32, ..dense(kind) }),
            "experts.toml: model.hidden = 24: expected 32, as in the model to start from"
        );
        assert_eq!(
            problem(upcycling.model.clone()),
            "the model to start from has moe.experts = 4: expected a dense one"
        );
        assert_eq!(
            problem(ModelConfig { bias: Bias::All, ..dense(kind) }),
            "the model to start from has bias = \"all\": expected none or qkv, since experts have no biases"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        let message = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            Upcycling::open(file.path(), 0).unwrap_err().to_string()
        };
        let stack = "[model]\nwidth = 16\nlayers = 2\nheads = 2\nhidden = 24\nmax_text = 8\n";
        assert!(message(stack).ends_with("model.moe is missing: expected experts"), "{}", message(stack));
        let experts = "[model.moe]\nexperts = 4\nactive = 5\nevery = 1\nbalance_loss = 0\nz_loss = 0";
        let message = message(&format!("{stack}{experts}"));
        assert!(message.ends_with("model.moe.active = 5: expected 1 to moe.experts = 4"), "{message}");
    }
}
