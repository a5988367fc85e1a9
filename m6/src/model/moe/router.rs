//! Which experts each token goes to, and the losses that keep this choice healthy.

use m6_runtime::nn::Linear;
use m6_runtime::{Init, Params};
use tch::{Kind, Tensor};

use super::config::{Balance, MoeConfig};
use super::dispatch::Dispatch;
use crate::model::INIT_STD;
use crate::model::mode::Mode;

/// What the weights of a token's experts are divided by at least: all of them may have been full.
const MIN_SUM: f64 = 1e-9;

/// Scores of experts by a product of its own, in float32.
#[derive(Debug)]
pub struct Router {
    scores: Linear,
    config: MoeConfig,
}

/// What a router chose for `n` tokens.
#[derive(Debug)]
pub struct Routing {
    /// `[n, g, e / g]`.
    logits: Tensor,
    /// `[n, g, e / g]`.
    probs: Tensor,
    /// `[n, a]` weights of the chosen experts; 0 where one was full or not wanted.
    pub weights_na: Tensor,
    /// `[n, a]` the chosen experts.
    experts_na: Tensor,
    /// `[n, a]` 1 where chance kept a choice, where that is asked.
    wanted_na: Option<Tensor>,
    /// `[n, a]` 1 where an expert that was wanted was not full, where that is asked.
    taken_na: Option<Tensor>,
    /// The order of the rows.
    pub dispatch: Dispatch,
}

/// What a router's losses are made of.
#[derive(Debug)]
pub struct RouterLosses {
    /// The weighted z-loss, and the balance loss where each block is balanced by itself; a scalar.
    pub loss: Tensor,
    /// `[e]` share of the routed rows that each expert was chosen for.
    pub load_e: Tensor,
    /// `[e]` mean probability of each expert.
    pub mean_e: Tensor,
    /// Share of the wanted rows that were dropped, where experts can be full; a scalar.
    pub dropped: Option<Tensor>,
}

impl Router {
    pub fn new(params: &Params, width: i64, config: &MoeConfig) -> Self {
        let scores = Linear::head(params, width, config.experts, Init::Normal(INIT_STD));
        Self { scores, config: config.clone() }
    }

    /// Of tokens `[n, d]`, of which the first `real` are no padding.
    pub fn route(&self, x_nd: &Tensor, real: i64, mode: Mode) -> Routing {
        let MoeConfig { experts, active, renormalize, noise, .. } = self.config;
        let is_training = mode == Mode::Train;
        let (groups, device) = (self.config.groups(), x_nd.device());
        let size = experts / groups;
        let seen_nd = x_nd.to_kind(Kind::Float);
        let seen_nd = if is_training && noise.input_dropout > 0.0 {
            seen_nd.dropout(noise.input_dropout, true)
        } else {
            seen_nd
        };
        let logits = self.scores.forward(&seen_nd).view([-1, groups, size]);
        let probs = logits.softmax(-1, Kind::Float);
        let (weights, chosen) = probs.topk(active / groups, -1, true, true);
        let firsts = Tensor::arange_start_step(0, experts, size, (Kind::Int64, device)).unsqueeze(-1);
        let experts_na = (chosen + firsts).flatten(1, 2);
        let dispatch = Dispatch::new(&experts_na, experts);
        let weights_na = weights.flatten(1, 2);
        let wanted_na = (is_training && noise.random_second).then(|| wanted(&weights_na));
        let capacity = self.config.capacity(real).filter(|_| is_training);
        let taken_na = capacity.map(|capacity| dispatch.taken(experts, capacity, real, wanted_na.as_ref()));
        let weights_na = match taken_na.as_ref().or(wanted_na.as_ref()) {
            Some(kept_na) => weights_na * kept_na,
            None => weights_na,
        };
        let weights_na = if renormalize {
            let sum = weights_na.sum_dim_intlist([-1].as_slice(), true, Kind::Float);
            weights_na / sum.clamp_min(MIN_SUM)
        } else {
            weights_na
        };
        Routing { logits, probs, weights_na, experts_na, wanted_na, taken_na, dispatch }
    }

    /// Over the `real` tokens, which come first. Groups count one by one: their losses are added.
    pub fn losses(&self, routing: &Routing, real: i64) -> RouterLosses {
        let MoeConfig { experts, balance_loss, z_loss, balance, .. } = self.config;
        let chosen_r = routing.experts_na.narrow(0, 0, real).flatten(0, 1);
        let ones_r = chosen_r.ones_like().to_kind(Kind::Float);
        let counts_e =
            Tensor::zeros([experts], (Kind::Float, chosen_r.device())).index_add(0, &chosen_r, &ones_r);
        let load_e = counts_e / (real * self.config.active) as f64;
        let mean_e =
            routing.probs.narrow(0, 0, real).mean_dim([0].as_slice(), false, Kind::Float).flatten(0, -1);
        let z = routing.logits.narrow(0, 0, real).logsumexp([-1].as_slice(), false).square();
        let z = z.sum_dim_intlist([-1].as_slice(), false, Kind::Float).mean(Kind::Float) * z_loss;
        let loss = match balance {
            Balance::Layer => (&load_e * &mean_e).sum(Kind::Float) * (experts as f64 * balance_loss) + z,
            Balance::Model => z,
        };
        let sum = |mask_na: &Tensor| mask_na.narrow(0, 0, real).sum(Kind::Float);
        let dropped = routing.taken_na.as_ref().map(|taken_na| match &routing.wanted_na {
            Some(wanted_na) => 1.0 - sum(taken_na) / sum(wanted_na),
            None => 1.0 - taken_na.narrow(0, 0, real).mean(Kind::Float),
        });
        RouterLosses { loss, load_e, mean_e, dropped }
    }
}

/// `[n, 2]` 1 for every first choice, and for a second one by chance, of weights `[n, 2]`.
fn wanted(weights_na: &Tensor) -> Tensor {
    let sum_n1 = weights_na.sum_dim_intlist([-1].as_slice(), true, Kind::Float);
    let share_na = weights_na.detach() / sum_n1.clamp_min(MIN_SUM).detach();
    // The share of a first choice is at least a half, and no number drawn is 1.
    share_na.rand_like().lt_tensor(&(share_na * 2.0)).to_kind(Kind::Float)
}

impl RouterLosses {
    /// Those of a pass without a graph, as leaves.
    pub fn into_leaves(self) -> Self {
        let leaf = |tensor: Tensor| tensor.set_requires_grad(true);
        Self { loss: leaf(self.loss), mean_e: leaf(self.mean_e), ..self }
    }
}

/// What the routers of all blocks come to.
#[derive(Debug)]
pub struct RouterTotals {
    /// Their losses in one scalar.
    pub loss: Tensor,
    /// `[blocks with experts, e]` share of the routed rows that each expert was chosen for.
    pub loads: Tensor,
    /// Mean share of the routed rows that were dropped, where experts can be full; a scalar.
    pub dropped: Option<Tensor>,
}

impl RouterTotals {
    /// Of blocks that have experts, at least one.
    pub fn of(config: &MoeConfig, blocks: &[RouterLosses]) -> Self {
        let stack = |part: fn(&RouterLosses) -> &Tensor| {
            Tensor::stack(&blocks.iter().map(part).collect::<Vec<_>>(), 0)
        };
        let mean = |stacked: &Tensor| stacked.mean_dim([0].as_slice(), false, Kind::Float);
        let each = stack(|block| &block.loss).sum(Kind::Float);
        let loads = stack(|block| &block.load_e);
        let loss = match config.balance {
            Balance::Layer => each,
            Balance::Model => {
                let balance = (mean(&loads) * mean(&stack(|block| &block.mean_e))).sum(Kind::Float);
                balance * ((config.experts * config.active) as f64 * config.balance_loss) + each
            }
        };
        let dropped: Vec<&Tensor> = blocks.iter().filter_map(|block| block.dropped.as_ref()).collect();
        let dropped = (!dropped.is_empty()).then(|| mean(&Tensor::stack(&dropped, 0)));
        Self { loss, loads, dropped }
    }
}
