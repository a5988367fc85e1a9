//! Mixture of experts: a router apart from stacked experts, and perhaps an expert for all tokens.
//!
//! Every token goes to its `active` experts; none is dropped and nothing is padded, so no host synchronisation is
//! needed to size a buffer. Legend: `n` tokens, `d` model width, `f` expert width, `e` experts, `a` active experts,
//! `r = n * a` routed rows.

mod config;
mod experts;
mod router;

use m6_runtime::nn::Linear;
use m6_runtime::{Init, Params};
use tch::Tensor;

pub use config::{Balance, MoeConfig};
use experts::Experts;
use router::Router;
pub use router::{RouterLosses, total};

use super::INIT_STD;
use super::config::ModelConfig;
use super::mlp::Mlp;

/// The feed-forward of a block with experts.
#[derive(Debug)]
pub struct Moe {
    router: Router,
    experts: Experts,
    shared: Option<Shared>,
}

/// The expert that every token goes through, weighted by the sigmoid of its gate.
#[derive(Debug)]
struct Shared {
    expert: Mlp,
    gate: Linear,
}

impl Moe {
    /// The experts of one block.
    pub fn new(params: &Params, model: &ModelConfig, config: &MoeConfig, out_std: f64) -> Self {
        let d = model.width;
        let (kind, hidden) = (model.feed_forward, config.hidden(model.hidden));
        let shared = config.shared.map(|width| Shared {
            expert: Mlp::new(&(params / "shared"), kind, d, width, out_std, false),
            gate: Linear::head(&(params / "shared_gate"), d, 1, Init::Normal(INIT_STD)),
        });
        Self {
            router: Router::new(&(params / "router"), d, config),
            experts: Experts::new(&(params / "experts"), kind, config.experts, d, hidden, out_std),
            shared,
        }
    }

    /// `[n, d] -> [n, d]`; only the first `real` tokens count for the losses, the rest is padding.
    pub fn forward(&self, x_nd: &Tensor, real: i64) -> (Tensor, RouterLosses) {
        let routing = self.router.route(x_nd);
        let routed_nd = self.experts.forward(x_nd, &routing);
        let y_nd = match &self.shared {
            Some(shared) => shared.gate.forward(x_nd).sigmoid() * shared.expert.forward(x_nd) + routed_nd,
            None => routed_nd,
        };
        (y_nd, self.router.losses(&routing, real))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::super::config::FeedForwardKind;
    use super::*;

    const KIND: FeedForwardKind = FeedForwardKind::Swiglu;

    fn build(active: i64, renormalize: bool, device: Device) -> (Params, Moe) {
        let moe = MoeConfig {
            experts: 4,
            active,
            every: 1,
            dense_layers: Vec::new(),
            hidden: None,
            shared: None,
            renormalize,
            balance_loss: 0.01,
            balance: Balance::Layer,
            z_loss: 0.001,
        };
        let model = ModelConfig { moe: Some(moe.clone()), ..ModelConfig::new(16, 1, 2, 24, 4) };
        let params = Params::new(device, 5);
        let layer = Moe::new(&params, &model, &moe, 0.2);
        // A wide router, so that the experts' loads differ and one may be empty.
        let _guard = tch::no_grad_guard();
        for (name, mut p) in params.entries() {
            if name.starts_with("router") {
                let _ = p.tensor.g_mul_scalar_(50.0);
            }
        }
        (params, layer)
    }

    /// Every expert over every token, weighted by its gate `[n, e]`.
    fn mixture(moe: &Moe, x_nd: &Tensor, gates: &Tensor) -> Tensor {
        (0..4).fold(x_nd.zeros_like(), |sum, e| {
            let hidden = KIND.activate(&x_nd.matmul(&moe.experts.up_efd.get(e).tr()));
            sum + hidden.matmul(&moe.experts.down_edf.get(e).tr()) * gates.select(1, e).unsqueeze(-1)
        })
    }

    fn probabilities(params: &Params, x_nd: &Tensor) -> Tensor {
        let entries = (params / "router").entries();
        x_nd.matmul(&entries[0].1.tensor.tr()).softmax(-1, Kind::Float)
    }

    /// The definition of renormalised top-k.
    fn dense(params: &Params, moe: &Moe, active: i64, x_nd: &Tensor) -> Tensor {
        let probs = probabilities(params, x_nd);
        let (weights, chosen) = probs.topk(active, -1, true, true);
        let weights = &weights / weights.sum_dim_intlist([-1].as_slice(), true, Kind::Float);
        mixture(moe, x_nd, &probs.zeros_like().scatter(-1, &chosen, &weights))
    }

    #[test]
    fn all_experts_without_renormalisation_are_the_dense_mixture() {
        tch::manual_seed(2);
        let (params, moe) = build(4, false, Device::Cpu);
        let x = Tensor::randn([11, 16], (Kind::Float, Device::Cpu));
        let (routed, _) = moe.forward(&x, 11);
        let expected = mixture(&moe, &x, &probabilities(&params, &x));
        assert!((routed - expected).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn matches_a_loop_over_experts_gradients_included() {
        tch::manual_seed(3);
        for active in 1..=4 {
            let (params, moe) = build(active, true, Device::Cpu);
            let x = Tensor::randn([11, 16], (Kind::Float, Device::Cpu));
            let probe = Tensor::randn([11, 16], (Kind::Float, Device::Cpu));
            let gradients = |y: Tensor| {
                let tensors: Vec<Tensor> = params.trainable().into_iter().map(|(_, p)| p.tensor).collect();
                Tensor::run_backward(&[(y * &probe).sum(Kind::Float)], &tensors, false, false)
            };
            let (routed, reference) = (moe.forward(&x, 11).0, dense(&params, &moe, active, &x));
            assert!((&routed - &reference).abs().max().double_value(&[]) < 1e-5);
            for (a, b) in gradients(routed).iter().zip(gradients(reference)) {
                assert!((a - b).abs().max().double_value(&[]) < 1e-4);
            }
        }
    }

    #[test]
    fn padding_does_not_count_for_load_and_losses() {
        tch::manual_seed(4);
        let (_params, moe) = build(2, true, Device::Cpu);
        let x = Tensor::randn([9, 16], (Kind::Float, Device::Cpu));
        let padded = Tensor::cat(&[x.shallow_clone(), Tensor::ones([7, 16], (Kind::Float, Device::Cpu))], 0);
        let ((_, plain), (_, filled)) = (moe.forward(&x, 9), moe.forward(&padded, 9));
        assert!((plain.loss - filled.loss).abs().double_value(&[]) < 1e-6);
        assert_eq!(plain.load_e, filled.load_e);
        assert!((plain.load_e.sum(Kind::Float).double_value(&[]) - 1.0).abs() < 1e-6);
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn bf16_on_a_gpu_matches_float32_on_the_cpu() {
        tch::manual_seed(6);
        let (params, moe) = build(2, true, Device::Cpu);
        let (on_gpu, gpu_moe) = build(2, true, Device::Cuda(0));
        for ((_, mut to), (_, from)) in on_gpu.entries().into_iter().zip(params.entries()) {
            tch::no_grad(|| to.tensor.copy_(&from.tensor));
        }
        let x = Tensor::randn([64, 16], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let exact = moe.forward(&x.to_kind(Kind::Float), 64).0;
        let fast = gpu_moe.forward(&x.to_device(Device::Cuda(0)), 64).0.to_device(Device::Cpu);
        let gap = ((fast.to_kind(Kind::Float) - &exact).norm() / exact.norm()).double_value(&[]);
        assert!(gap < 1e-2, "{gap}");
    }
}
