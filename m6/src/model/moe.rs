//! Mixture of experts: a router apart from stacked experts, dispatch by a device-side sort and grouped products.
//!
//! Every token goes to its `active` experts; none is dropped and nothing is padded, so no host synchronisation is
//! needed to size a buffer. Legend: `n` tokens, `d` model width, `f` expert width, `e` experts, `a` active experts,
//! `r = n * a` routed rows.

use m6_runtime::fused::swiglu;
use m6_runtime::nn::Linear;
use m6_runtime::{Group, Init, Params};
use tch::{Kind, Tensor};

use super::config::MoeConfig;
use super::{INIT_STD, ModelConfig};

/// The feed-forward of a block with experts.
#[derive(Debug)]
pub struct Moe {
    router: Linear,
    gate_up_efd: Tensor,
    down_edf: Tensor,
    config: MoeConfig,
}

/// What a block with experts gives back.
#[derive(Debug)]
pub struct MoeOutput {
    /// `[n, d]`.
    pub y_nd: Tensor,
    /// Weighted balance and z losses, a scalar.
    pub loss: Tensor,
    /// `[e]` share of the routed rows that each expert took.
    pub load_e: Tensor,
}

impl Moe {
    /// The experts of one block.
    pub fn new(params: &Params, model: &ModelConfig, config: &MoeConfig, out_std: f64) -> Self {
        let (e, d, f) = (config.experts, model.width, model.hidden);
        let experts = params / "experts";
        Self {
            router: Linear::head(&(params / "router"), d, e, Init::Normal(INIT_STD)),
            gate_up_efd: experts.add("gate_up", &[e, 2 * f, d], Init::Normal(INIT_STD), Group::Hidden),
            down_edf: experts.add("down", &[e, d, f], Init::Normal(out_std), Group::Hidden),
            config: config.clone(),
        }
    }

    /// `[n, d] -> [n, d]`; only the first `real` tokens count for the losses, the rest is padding.
    pub fn forward(&self, x_nd: &Tensor, real: i64) -> MoeOutput {
        let logits_ne = self.router.forward(&x_nd.to_kind(Kind::Float));
        let probs_ne = logits_ne.softmax(-1, Kind::Float);
        let (weights_na, experts_na) = probs_ne.topk(self.config.active, -1, true, true);
        let weights_na = &weights_na / weights_na.sum_dim_intlist([-1].as_slice(), true, Kind::Float);

        let experts_r = experts_na.flatten(0, 1);
        let order_r = experts_r.argsort_stable(true, 0, false);
        let tokens_r = order_r.floor_divide_scalar(self.config.active);
        let sorted_r = experts_r.index_select(0, &order_r);
        let each = Tensor::arange(self.config.experts, (Kind::Int64, x_nd.device()));
        let ends_e = each.searchsorted(&sorted_r, true, true, "right", None::<Tensor>);

        let kind = x_nd.kind();
        let product = |x: &Tensor, weight: &Tensor| {
            x.internal_grouped_mm(&weight.to_kind(kind).transpose(1, 2), Some(&ends_e), None, None)
        };
        let x_rd = x_nd.index_select(0, &tokens_r);
        let hidden_rf = swiglu(&product(&x_rd, &self.gate_up_efd));
        let weights_r = weights_na.flatten(0, 1).index_select(0, &order_r).unsqueeze(-1).to_kind(kind);
        let y_rd = product(&hidden_rf, &self.down_edf) * weights_r;
        let y_nd = x_nd.zeros_like().index_add(0, &tokens_r, &y_rd);

        let (loss, load_e) = self.losses(&logits_ne, &probs_ne, &experts_na, real);
        MoeOutput { y_nd, loss, load_e }
    }

    /// Switch Transformer's balance loss `e * sum_e f_e P_e` over the real tokens, and ST-MoE's z-loss.
    fn losses(
        &self,
        logits_ne: &Tensor,
        probs_ne: &Tensor,
        experts_na: &Tensor,
        real: i64,
    ) -> (Tensor, Tensor) {
        let e = self.config.experts;
        let chosen_na = experts_na.narrow(0, 0, real);
        let each = Tensor::arange(e, (Kind::Int64, logits_ne.device()));
        let load_e = chosen_na.unsqueeze(-1).eq_tensor(&each).mean_dim([0, 1].as_slice(), false, Kind::Float);
        let mean_e = probs_ne.narrow(0, 0, real).mean_dim([0].as_slice(), false, Kind::Float);
        let balance = (&load_e * mean_e).sum(Kind::Float) * (e as f64 * self.config.balance_loss);
        let z = logits_ne.narrow(0, 0, real).logsumexp([-1].as_slice(), false).square().mean(Kind::Float);
        (balance + z * self.config.z_loss, load_e)
    }
}

#[cfg(test)]
mod tests {
    use super::super::order::CodeOrder;
    use m6_vision::PatchConfig;
    use tch::Device;

    use super::*;

    fn build(active: i64, device: Device) -> (Params, Moe) {
        let moe = MoeConfig { experts: 4, active, every: 1, balance_loss: 0.01, z_loss: 0.001 };
        let model = ModelConfig {
            width: 16,
            layers: 1,
            heads: 2,
            hidden: 24,
            max_text: 4,
            dropout: 0.0,
            any_order: false,
            code_order: CodeOrder::Rows,
            patches: PatchConfig { resolution: 16, channels: vec![16] },
            moe: Some(moe.clone()),
        };
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

    /// The definition: every expert over every token, weighted by its gate.
    fn dense(moe: &Moe, x_nd: &Tensor) -> Tensor {
        let probs = moe.router.forward(x_nd).softmax(-1, Kind::Float);
        let (weights, chosen) = probs.topk(moe.config.active, -1, true, true);
        let weights = &weights / weights.sum_dim_intlist([-1].as_slice(), true, Kind::Float);
        let gates = probs.zeros_like().scatter(-1, &chosen, &weights);
        (0..moe.config.experts).fold(x_nd.zeros_like(), |sum, e| {
            let hidden = swiglu(&x_nd.matmul(&moe.gate_up_efd.get(e).tr()));
            sum + hidden.matmul(&moe.down_edf.get(e).tr()) * gates.select(1, e).unsqueeze(-1)
        })
    }

    #[test]
    fn matches_a_loop_over_experts_gradients_included() {
        tch::manual_seed(3);
        for active in 1..=4 {
            let (params, moe) = build(active, Device::Cpu);
            let x = Tensor::randn([11, 16], (Kind::Float, Device::Cpu));
            let probe = Tensor::randn([11, 16], (Kind::Float, Device::Cpu));
            let gradients = |y: Tensor| {
                let tensors: Vec<Tensor> = params.trainable().into_iter().map(|(_, p)| p.tensor).collect();
                Tensor::run_backward(&[(y * &probe).sum(Kind::Float)], &tensors, false, false)
            };
            let (routed, reference) = (moe.forward(&x, 11).y_nd, dense(&moe, &x));
            assert!((&routed - &reference).abs().max().double_value(&[]) < 1e-5);
            for (a, b) in gradients(routed).iter().zip(gradients(reference)) {
                assert!((a - b).abs().max().double_value(&[]) < 1e-4);
            }
        }
    }

    #[test]
    fn padding_does_not_count_for_load_and_losses() {
        tch::manual_seed(4);
        let (_params, moe) = build(2, Device::Cpu);
        let x = Tensor::randn([9, 16], (Kind::Float, Device::Cpu));
        let padded = Tensor::cat(&[x.shallow_clone(), Tensor::ones([7, 16], (Kind::Float, Device::Cpu))], 0);
        let (plain, filled) = (moe.forward(&x, 9), moe.forward(&padded, 9));
        assert!((plain.loss - filled.loss).abs().double_value(&[]) < 1e-6);
        assert_eq!(plain.load_e, filled.load_e);
        assert!((plain.load_e.sum(Kind::Float).double_value(&[]) - 1.0).abs() < 1e-6);
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn bf16_on_a_gpu_matches_float32_on_the_cpu() {
        tch::manual_seed(6);
        let (params, moe) = build(2, Device::Cpu);
        let (on_gpu, gpu_moe) = build(2, Device::Cuda(0));
        for ((_, mut to), (_, from)) in on_gpu.entries().into_iter().zip(params.entries()) {
            tch::no_grad(|| to.tensor.copy_(&from.tensor));
        }
        let x = Tensor::randn([64, 16], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let exact = moe.forward(&x.to_kind(Kind::Float), 64).y_nd;
        let fast = gpu_moe.forward(&x.to_device(Device::Cuda(0)), 64).y_nd.to_device(Device::Cpu);
        let gap = ((fast.to_kind(Kind::Float) - &exact).norm() / exact.norm()).double_value(&[]);
        assert!(gap < 1e-2, "{gap}");
    }
}
