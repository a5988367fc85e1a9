//! Mixture of experts: a router apart from stacked experts, and perhaps an expert for all tokens.
//!
//! Every token goes to its `active` experts and nothing is padded, so no host synchronisation is needed to size a buffer,
//! except where a token chooses among more experts than one grouped product takes.
//! Where experts have a capacity, rows beyond it count for nothing. Legend: `n` tokens, `d` model width, `f` expert width,
//! `e` experts, `g` groups of them, `a` active experts, `r = n * a` routed rows.

pub(super) mod config;
mod dispatch;
mod experts;
mod router;

use m6_runtime::fused::gated_sum;
use m6_runtime::nn::Linear;
use m6_runtime::{Init, Params};
use tch::Tensor;

pub use config::{Balance, MoeConfig, RouterNoise, RoutingKind};
use experts::Experts;
use router::Router;
pub use router::{RouterLosses, RouterTotals};

use super::INIT_STD;
use super::config::ModelConfig;
use super::mlp::Mlp;
use super::mode::Mode;

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
        let kind = model.feed_forward;
        let shared = config.shared.map(|width| Shared {
            expert: Mlp::new(&(params / "shared"), kind, d, width, out_std, false),
            gate: Linear::head(&(params / "shared_gate"), d, 1, Init::Normal(INIT_STD)),
        });
        Self {
            router: Router::new(&(params / "router"), d, config),
            experts: Experts::new(&(params / "experts"), model, config, out_std),
            shared,
        }
    }

    /// `[n, d] -> [n, d]`; only the first `real` tokens count for losses and capacity, the rest is padding.
    pub fn forward(&self, x_nd: &Tensor, real: i64, mode: Mode) -> (Tensor, RouterLosses) {
        let routing = self.router.route(x_nd, real, mode);
        let routed_nd = self.experts.forward(x_nd, &routing);
        let y_nd = match &self.shared {
            Some(Shared { expert, gate }) => {
                let gates_n1 = gate.forward(x_nd);
                gated_sum(&expert.forward(x_nd), &gates_n1, &routed_nd)
            }
            None => routed_nd,
        };
        (y_nd, self.router.losses(&routing, real))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::super::config::FeedForwardKind;
    use super::dispatch::Dispatch;
    use super::*;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn config(active: i64) -> MoeConfig {
        MoeConfig {
            experts: 4,
            active,
            routing: RoutingKind::Top,
            capacity: None,
            every: 1,
            dense_layers: Vec::new(),
            hidden: None,
            shared: None,
            renormalize: true,
            balance_loss: 0.01,
            balance: Balance::Layer,
            z_loss: 0.001,
            noise: RouterNoise::default(),
        }
    }

    fn build(config: &MoeConfig, kind: FeedForwardKind, device: Device) -> (Params, Moe) {
        config.validate(1).unwrap();
        let model = ModelConfig { feed_forward: kind, ..ModelConfig::new(16, 1, 2, 24, 4) };
        let params = Params::new(device, 5);
        let layer = Moe::new(&params, &model, config, 0.2);
        // A wide router, so that the experts' loads differ and one may be empty.
        let _guard = tch::no_grad_guard();
        for (name, mut p) in params.entries() {
            if name.starts_with("router") {
                let _ = p.tensor.g_mul_scalar_(50.0);
            }
        }
        (params, layer)
    }

    fn gap(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    /// Every expert over every token, weighted by its gate `[n, e]`.
    fn mixture(moe: &Moe, kind: FeedForwardKind, x_nd: &Tensor, gates: &Tensor) -> Tensor {
        let Experts { up_efd, down_edf, .. } = &moe.experts;
        let experts = up_efd.unbind(0).into_iter().zip(down_edf.unbind(0)).zip(gates.unbind(1));
        experts.fold(x_nd.zeros_like(), |sum, ((up, down), gate)| {
            let hidden = kind.activate(&x_nd.matmul(&up.tr()));
            sum + hidden.matmul(&down.tr()) * gate.unsqueeze(-1)
        })
    }

    /// `[n, e]`, softmax within each group.
    fn probabilities(params: &Params, config: &MoeConfig, x_nd: &Tensor) -> Tensor {
        let entries = (params / "router").entries();
        let logits = x_nd.matmul(&entries[0].1.tensor.tr());
        logits
            .view([-1, config.groups(), config.experts / config.groups()])
            .softmax(-1, Kind::Float)
            .flatten(1, 2)
    }

    /// The definition, token by token: first choices queue before second ones.
    fn gates(params: &Params, config: &MoeConfig, x_nd: &Tensor, real: i64) -> Tensor {
        let probs = probabilities(params, config, x_nd);
        let rows = Vec::<Vec<f32>>::try_from(&probs).unwrap();
        let (groups, experts) = (config.groups() as usize, config.experts as usize);
        let (size, each) = (experts / groups, config.active as usize / groups);
        let mut mask = vec![vec![0.0f32; experts]; rows.len()];
        let mut queues = vec![0; experts];
        for rank in 0..each {
            for (token, row) in rows.iter().enumerate().take(real as usize) {
                for group in 0..groups {
                    let mut order: Vec<usize> = (group * size..(group + 1) * size).collect();
                    order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
                    let expert = order[rank];
                    queues[expert] += 1;
                    if config.capacity(real).is_none_or(|capacity| queues[expert] <= capacity) {
                        mask[token][expert] = 1.0;
                    }
                }
            }
        }
        let gates = probs * Tensor::from_slice2(&mask);
        if !config.renormalize {
            return gates;
        }
        let sum = gates.sum_dim_intlist([-1].as_slice(), true, Kind::Float);
        gates / sum.clamp_min(1e-9)
    }

    #[test]
    fn all_experts_without_renormalisation_are_the_dense_mixture() {
        tch::manual_seed(2);
        let config = MoeConfig { renormalize: false, ..config(4) };
        let (params, moe) = build(&config, FeedForwardKind::Swiglu, Device::Cpu);
        let x = Tensor::randn([11, 16], FLOAT);
        let (routed, _) = moe.forward(&x, 11, Mode::Train);
        let expected = mixture(&moe, FeedForwardKind::Swiglu, &x, &probabilities(&params, &config, &x));
        assert!(gap(&routed, &expected) < 1e-5);
    }

    /// Output and gradients of all tokens but the padding.
    fn assert_matches_a_loop(config: &MoeConfig, kind: FeedForwardKind, real: i64) {
        let (params, moe) = build(config, kind, Device::Cpu);
        let x = Tensor::randn([real + 3, 16], FLOAT).set_requires_grad(true);
        let probe = Tensor::randn([real, 16], FLOAT);
        let gradients = |y: &Tensor| {
            let mut tensors: Vec<Tensor> = params.trainable().into_iter().map(|(_, p)| p.tensor).collect();
            tensors.push(x.shallow_clone());
            Tensor::run_backward(&[(y * &probe).sum(Kind::Float)], &tensors, false, false)
        };
        let routed = moe.forward(&x, real, Mode::Train).0.narrow(0, 0, real);
        let reference = mixture(&moe, kind, &x, &gates(&params, config, &x, real)).narrow(0, 0, real);
        assert!(gap(&routed, &reference) < 1e-5, "{config:?}");
        for (a, b) in gradients(&routed).iter().zip(gradients(&reference)) {
            assert!(gap(a, &b) < 1e-4, "{config:?}");
        }
    }

    #[test]
    fn matches_a_loop_over_experts_gradients_included() {
        tch::manual_seed(3);
        for active in 1..=4 {
            for capacity in [None, Some(0.5), Some(1.0), Some(1.25)] {
                let config = MoeConfig { capacity, ..config(active) };
                assert_matches_a_loop(&config, FeedForwardKind::Swiglu, 11);
                assert_matches_a_loop(&MoeConfig { renormalize: false, ..config }, FeedForwardKind::Gelu, 8);
            }
        }
    }

    #[test]
    fn prototypes_match_a_loop_over_experts_gradients_included() {
        tch::manual_seed(7);
        for (active, capacity) in [(2, None), (2, Some(1.0)), (4, Some(1.25))] {
            let config = MoeConfig {
                routing: RoutingKind::Prototypes,
                renormalize: false,
                capacity,
                ..config(active)
            };
            assert_matches_a_loop(&config, FeedForwardKind::Gelu, 11);
        }
    }

    #[test]
    fn more_experts_than_a_grouped_product_takes_match_a_loop_gradients_included() {
        tch::manual_seed(8);
        let config = MoeConfig { experts: 1200, renormalize: false, capacity: Some(1.25), ..config(3) };
        assert_matches_a_loop(&config, FeedForwardKind::Gelu, 9);
        let prototypes = MoeConfig { routing: RoutingKind::Prototypes, ..config.clone() };
        assert_matches_a_loop(&prototypes, FeedForwardKind::Gelu, 9);
        // Two prototypes of more than one product each, and a part that no row goes to.
        let large = MoeConfig { experts: 2060, routing: RoutingKind::Prototypes, ..config };
        assert_matches_a_loop(&MoeConfig { active: 2, ..large }, FeedForwardKind::Swiglu, 1);
    }

    #[test]
    fn one_prototype_is_the_likeliest_of_all() {
        tch::manual_seed(9);
        let top = MoeConfig { renormalize: false, capacity: Some(1.0), ..config(1) };
        let prototype = MoeConfig { routing: RoutingKind::Prototypes, ..top.clone() };
        let x = Tensor::randn([11, 16], FLOAT);
        let [(y, losses), (other_y, other_losses)] = [top, prototype]
            .map(|config| build(&config, FeedForwardKind::Gelu, Device::Cpu).1.forward(&x, 11, Mode::Train));
        assert_eq!(y, other_y);
        assert_eq!((losses.loss, losses.load_e), (other_losses.loss, other_losses.load_e));
    }

    #[test]
    fn an_expert_takes_first_choices_before_second_ones_and_no_padding() {
        // Token 3 is padding.
        let experts_na = Tensor::from_slice2(&[[0i64, 1], [1, 0], [1, 0], [0, 1]]);
        let taken = |capacity| {
            let taken = Dispatch::new(&experts_na, 3).taken(3, capacity, 3, None);
            Vec::<Vec<f32>>::try_from(taken).unwrap()
        };
        assert_eq!(taken(1), [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]);
        assert_eq!(taken(2), [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]);
        assert_eq!(taken(3), [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]);
    }

    #[test]
    fn capacity_is_for_training_and_its_drops_are_counted() {
        tch::manual_seed(10);
        let x = Tensor::randn([16, 16], FLOAT);
        let forward = |capacity, mode| {
            let config = MoeConfig { capacity, renormalize: false, ..config(1) };
            let (y, losses) = build(&config, FeedForwardKind::Swiglu, Device::Cpu).1.forward(&x, 16, mode);
            (y, losses.dropped.map(|share| share.double_value(&[])))
        };
        let (free, none) = forward(None, Mode::Train);
        assert_eq!(none, None);
        assert_eq!(forward(Some(0.25), Mode::Infer), (free.shallow_clone(), None));
        assert_eq!(forward(Some(4.0), Mode::Train), (free, Some(0.0)), "nothing is beyond four even shares");
        let (y, dropped) = forward(Some(0.25), Mode::Train);
        let rows = y.abs().sum_dim_intlist([-1].as_slice(), false, Kind::Float).eq(0.0);
        let empty = rows.mean_dim([0].as_slice(), false, Kind::Float).double_value(&[]);
        assert!(empty >= 0.75, "each of four experts takes one of sixteen rows: {empty}");
        assert_eq!(dropped, Some(empty));
    }

    /// Switch Transformer's equations 4 to 6 and ST-MoE's 5, from the router's weight on.
    #[test]
    fn losses_of_a_router_are_their_formulas_gradients_included() {
        tch::manual_seed(11);
        const TOKENS: i64 = 23;
        let x = Tensor::randn([TOKENS, 16], FLOAT);
        for (active, routing) in [(1, RoutingKind::Top), (3, RoutingKind::Top), (2, RoutingKind::Prototypes)]
        {
            let config = MoeConfig { balance_loss: 0.3, z_loss: 0.2, routing, ..config(active) };
            let (params, moe) = build(&config, FeedForwardKind::Gelu, Device::Cpu);
            let weight = (&params / "router").trainable().remove(0).1.tensor;
            let loss = moe.forward(&x, TOKENS, Mode::Train).1.loss;
            let (groups, size) = (config.groups(), config.experts / config.groups());
            let mut expected = Tensor::zeros([], (Kind::Double, Device::Cpu));
            for group in 0..groups {
                let rows = weight.narrow(0, group * size, size).to_kind(Kind::Double);
                let logits = x.to_kind(Kind::Double).matmul(&rows.tr());
                let probs = logits.softmax(-1, Kind::Double);
                let chosen = probs.topk(active / groups, -1, true, true).1;
                let counts = chosen.one_hot(size).sum_dim_intlist([0, 1].as_slice(), false, Kind::Double);
                let share = counts / (TOKENS * active) as f64;
                let balance = (share * probs.mean_dim([0].as_slice(), false, Kind::Double)).sum(Kind::Double);
                let z = logits.exp().sum_dim_intlist([-1].as_slice(), false, Kind::Double).log().square();
                expected = expected + balance * (0.3 * config.experts as f64) + z.mean(Kind::Double) * 0.2;
            }
            assert!(gap(&loss, &expected) < 1e-5, "{active}");
            let gradient = |loss: &Tensor| Tensor::run_backward(&[loss], &[&weight], true, false).remove(0);
            assert!(gap(&gradient(&loss), &gradient(&expected)) < 1e-5, "{active}");
        }
    }

    #[test]
    fn a_second_choice_is_kept_with_twice_its_share_and_takes_no_place_otherwise() {
        tch::manual_seed(12);
        let noise = RouterNoise { random_second: true, ..RouterNoise::default() };
        let config = MoeConfig { noise, renormalize: false, ..config(2) };
        let x = Tensor::randn([20_000, 16], FLOAT);
        let (params, moe) = build(&config, FeedForwardKind::Swiglu, Device::Cpu);
        let full = probabilities(&params, &config, &x).topk(2, -1, true, true).0;
        let mean = |t: &Tensor| t.mean(Kind::Float).double_value(&[]);
        let column = |t: &Tensor, column| t.select(1, column);
        let weights = moe.router.route(&x, 20_000, Mode::Train).weights_na;
        assert!(gap(&column(&full, 0), &column(&weights, 0)) < 1e-6);
        let kept = column(&weights, 1).gt(0.0).to_kind(Kind::Float);
        let share = column(&full, 1) * 2.0 / full.sum_dim_intlist([-1].as_slice(), false, Kind::Float);
        assert!(mean(&share) < 0.9 && (mean(&kept) - mean(&share)).abs() < 0.01);
        assert!(
            (mean(&(&kept * &share)) - mean(&share.square())).abs() < 0.01,
            "likelier where it weighs more"
        );
        assert!(gap(&full, &moe.router.route(&x, 20_000, Mode::Infer).weights_na) < 1e-6);
        let experts_na = Tensor::from_slice2(&[[0i64, 1], [1, 0], [1, 0]]);
        let wanted_na = Tensor::from_slice2(&[[1f32, 1.0], [0.0, 1.0], [1.0, 0.0]]);
        let taken = Dispatch::new(&experts_na, 3).taken(3, 2, 3, Some(&wanted_na));
        assert_eq!(taken, wanted_na, "what is not wanted is not in the way");
    }

    #[test]
    fn dropout_of_the_routers_input_changes_choices_and_not_what_experts_see() {
        tch::manual_seed(13);
        let noise = RouterNoise { input_dropout: 0.5, ..RouterNoise::default() };
        let x = Tensor::randn([64, 16], FLOAT);
        let forward = |noise, active, mode| {
            let config = MoeConfig { noise, ..config(active) };
            build(&config, FeedForwardKind::Swiglu, Device::Cpu).1.forward(&x, 64, mode).0
        };
        let plain = forward(RouterNoise::default(), 1, Mode::Train);
        assert_eq!(forward(noise, 1, Mode::Infer), plain);
        // With weights that are made to sum to 1, one expert gives the same for a token whatever the router saw of it.
        let noisy = forward(noise, 1, Mode::Train);
        let same = (noisy - plain).abs().amax([-1].as_slice(), false).lt(1e-6);
        let share = same.to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!((0.2..0.95).contains(&share), "{share}");
    }

    #[test]
    fn padding_does_not_count_for_load_and_losses() {
        tch::manual_seed(4);
        let (_params, moe) = build(&config(2), FeedForwardKind::Swiglu, Device::Cpu);
        let x = Tensor::randn([9, 16], FLOAT);
        let padded = Tensor::cat(&[x.shallow_clone(), Tensor::ones([7, 16], FLOAT)], 0);
        let ((_, plain), (_, filled)) =
            (moe.forward(&x, 9, Mode::Train), moe.forward(&padded, 9, Mode::Train));
        assert!((plain.loss - filled.loss).abs().double_value(&[]) < 1e-6);
        assert_eq!(plain.load_e, filled.load_e);
        assert!((plain.load_e.sum(Kind::Float).double_value(&[]) - 1.0).abs() < 1e-6);
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn bf16_on_a_gpu_matches_float32_on_the_cpu() {
        tch::manual_seed(6);
        for experts in [4, 1200] {
            let config = MoeConfig { experts, capacity: Some(1.0), ..config(2) };
            let device = Device::Cuda(0);
            let (params, moe) = build(&config, FeedForwardKind::Swiglu, Device::Cpu);
            let (on_gpu, gpu_moe) = build(&config, FeedForwardKind::Swiglu, device);
            for ((_, mut to), (_, from)) in on_gpu.entries().into_iter().zip(params.entries()) {
                tch::no_grad(|| to.tensor.copy_(&from.tensor));
            }
            let x = Tensor::randn([64, 16], FLOAT).to_kind(Kind::BFloat16);
            let exact = moe.forward(&x.to_kind(Kind::Float), 64, Mode::Train).0;
            let fast = gpu_moe.forward(&x.to_device(device), 64, Mode::Train).0;
            let relative = |exact: &Tensor, fast: &Tensor| {
                let fast = fast.to_device(Device::Cpu).to_kind(Kind::Float);
                ((fast - exact).norm() / exact.norm()).double_value(&[])
            };
            assert!(relative(&exact, &fast) < 1e-2, "{experts}: {}", relative(&exact, &fast));
            let probe = Tensor::randn([64, 16], FLOAT);
            (&exact * &probe).sum(Kind::Float).backward();
            (&fast * probe.to_device(device)).sum(Kind::Float).backward();
            for ((name, exact), (_, fast)) in params.entries().into_iter().zip(on_gpu.entries()) {
                let gap = relative(&exact.tensor.grad(), &fast.tensor.grad());
                assert!(gap < 3e-2, "{experts}: {name}: {gap}");
            }
        }
    }
}
