//! Which experts each token goes to, and the losses that keep this choice healthy.

use m6_runtime::nn::Linear;
use m6_runtime::{Init, Params};
use tch::{Kind, Tensor};

use super::config::{Balance, MoeConfig};
use crate::model::INIT_STD;

/// Scores of experts by a product of its own, in float32.
#[derive(Debug)]
pub struct Router {
    scores: Linear,
    config: MoeConfig,
}

/// What a router chose for `n` tokens.
#[derive(Debug)]
pub struct Routing {
    /// `[n, e]`.
    logits_ne: Tensor,
    /// `[n, e]`.
    probs_ne: Tensor,
    /// `[n, a]` weights of the chosen experts.
    pub weights_na: Tensor,
    /// `[n, a]` the chosen experts.
    pub experts_na: Tensor,
}

/// What a router's losses are made of.
#[derive(Debug)]
pub struct RouterLosses {
    /// The weighted z-loss, and the balance loss where each block is balanced by itself; a scalar.
    pub loss: Tensor,
    /// `[e]` share of the routed rows that each expert took.
    pub load_e: Tensor,
    /// `[e]` mean probability of each expert.
    pub mean_e: Tensor,
}

impl Router {
    pub fn new(params: &Params, width: i64, config: &MoeConfig) -> Self {
        let scores = Linear::head(params, width, config.experts, Init::Normal(INIT_STD));
        Self { scores, config: config.clone() }
    }

    /// Of tokens `[n, d]`.
    pub fn route(&self, x_nd: &Tensor) -> Routing {
        let logits_ne = self.scores.forward(&x_nd.to_kind(Kind::Float));
        let probs_ne = logits_ne.softmax(-1, Kind::Float);
        let (weights_na, experts_na) = probs_ne.topk(self.config.active, -1, true, true);
        let weights_na = if self.config.renormalize {
            &weights_na / weights_na.sum_dim_intlist([-1].as_slice(), true, Kind::Float)
        } else {
            weights_na
        };
        Routing { logits_ne, probs_ne, weights_na, experts_na }
    }

    /// Over the `real` tokens, which come first.
    pub fn losses(&self, routing: &Routing, real: i64) -> RouterLosses {
        let e = self.config.experts;
        let chosen_na = routing.experts_na.narrow(0, 0, real);
        let each = Tensor::arange(e, (Kind::Int64, chosen_na.device()));
        let load_e = chosen_na.unsqueeze(-1).eq_tensor(&each).mean_dim([0, 1].as_slice(), false, Kind::Float);
        let mean_e = routing.probs_ne.narrow(0, 0, real).mean_dim([0].as_slice(), false, Kind::Float);
        let z = routing.logits_ne.narrow(0, 0, real).logsumexp([-1].as_slice(), false).square();
        let z = z.mean(Kind::Float) * self.config.z_loss;
        let loss = match self.config.balance {
            Balance::Layer => {
                (&load_e * &mean_e).sum(Kind::Float) * (e as f64 * self.config.balance_loss) + z
            }
            Balance::Model => z,
        };
        RouterLosses { loss, load_e, mean_e }
    }
}

/// The losses of all blocks with experts in one scalar, and their loads `[blocks with experts, e]`.
pub fn total(config: &MoeConfig, blocks: &[RouterLosses]) -> (Tensor, Tensor) {
    let stack =
        |part: fn(&RouterLosses) -> &Tensor| Tensor::stack(&blocks.iter().map(part).collect::<Vec<_>>(), 0);
    let loss = stack(|block| &block.loss).sum(Kind::Float);
    let loads = stack(|block| &block.load_e);
    if config.balance == Balance::Layer {
        return (loss, loads);
    }
    let mean = |stacked: &Tensor| stacked.mean_dim([0].as_slice(), false, Kind::Float);
    let balance = (mean(&loads) * mean(&stack(|block| &block.mean_e))).sum(Kind::Float);
    let scale = (config.experts * config.active) as f64 * config.balance_loss;
    (loss + balance * scale, loads)
}
