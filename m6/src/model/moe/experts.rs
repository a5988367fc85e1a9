//! Stacked experts: grouped products over rows that are sorted by expert.

use m6_runtime::fused::converted;
use m6_runtime::{Group, Init, Params};
use tch::Tensor;

use super::config::{MAX_GROUPS, MoeConfig};
use super::dispatch::Dispatch;
use super::router::Routing;
use crate::model::INIT_STD;
use crate::model::config::{FeedForwardKind, ModelConfig};

/// The weights of all experts.
#[derive(Debug)]
pub struct Experts {
    kind: FeedForwardKind,
    /// Groups in each of which a token has the same number of experts.
    groups: i64,
    /// Of SwiGLU the gate's rows, then those of the other half.
    pub(super) up_efd: Tensor,
    pub(super) down_edf: Tensor,
}

impl Experts {
    /// The experts of one block.
    pub fn new(params: &Params, model: &ModelConfig, config: &MoeConfig, out_std: f64) -> Self {
        let (kind, e, d, f) = (model.feed_forward, config.experts, model.width, config.hidden(model.hidden));
        let (name, rows) = kind.up(f);
        Self {
            kind,
            groups: config.groups(),
            up_efd: params.add(name, &[e, rows, d], Init::Normal(INIT_STD), Group::Hidden),
            down_edf: params.add("down", &[e, d, f], Init::Normal(out_std), Group::Hidden),
        }
    }

    /// `[n, d] -> [n, d]`: the weighted sum of what its experts make of each token. Rows that were dropped go through
    /// their expert like the others, with weight 0: how many there are is known to the device alone.
    pub fn forward(&self, x_nd: &Tensor, routing: &Routing) -> Tensor {
        let Dispatch { permutation, ends_e, .. } = &routing.dispatch;
        let x_rd = permutation.permute(x_nd);
        let hidden_rf = self.kind.activate(&self.product(&x_rd, &self.up_efd, ends_e));
        let y_rd = self.product(&hidden_rf, &self.down_edf, ends_e);
        permutation.unpermute(&y_rd, &routing.weights_na)
    }

    /// Rows `[r, i]`, each by the matrix `[o, i]` of its expert, whose rows end at `ends_e`.
    fn product(&self, x_ri: &Tensor, weight_eoi: &Tensor, ends_e: &Tensor) -> Tensor {
        let grouped = |x: &Tensor, weight: &Tensor, ends: &Tensor| {
            x.internal_grouped_mm(&converted(weight, x.kind()).transpose(1, 2), Some(ends), None, None)
        };
        let (experts, rows) = (weight_eoi.size()[0], x_ri.size()[0]);
        if experts <= MAX_GROUPS {
            return grouped(x_ri, weight_eoi, ends_e);
        }
        // Every token has as many rows in one prototype as in another, so that the host knows where they begin.
        let prototypes = MAX_GROUPS / (experts / self.groups);
        let (experts, rows) = (prototypes * experts / self.groups, prototypes * rows / self.groups);
        let parts = x_ri.split(rows, 0).into_iter().zip(weight_eoi.split(experts, 0));
        let parts = parts.zip(ends_e.split(experts, 0)).enumerate();
        let products = parts.map(|(i, ((x, weight), ends))| grouped(&x, &weight, &(ends - i as i64 * rows)));
        Tensor::cat(&products.collect::<Vec<_>>(), 0)
    }
}
