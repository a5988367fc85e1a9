//! Stacked experts: grouped products over rows that are sorted by expert.

use m6_runtime::fused::grouped_linear;
use m6_runtime::{Group, Init, Params};
use tch::{Kind, Tensor};

use super::config::MoeConfig;
use super::dispatch::Dispatch;
use super::router::Routing;
use crate::model::INIT_STD;
use crate::model::config::{FeedForwardKind, ModelConfig};

/// What one grouped matrix product of libtorch takes on a GPU: a thread of one block prepares each matrix, and the last
/// is left out.
const MAX_GROUPS: i64 = 1023;

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
        let product = |x: &Tensor, weight: &Tensor| product(x, weight, self.groups, ends_e);
        let hidden_rf = self.kind.activate(&product(&x_rd, &self.up_efd));
        let y_rd = product(&hidden_rf, &self.down_edf);
        permutation.unpermute(&y_rd, &routing.weights_na)
    }
}

/// Rows `[r, i]`, each by the matrix `[o, i]` of its expert, of experts in `groups` whose rows end at `ends_e`.
fn product(x_ri: &Tensor, weight_eoi: &Tensor, groups: i64, ends_e: &Tensor) -> Tensor {
    let experts = ends_e.size()[0];
    if experts <= MAX_GROUPS {
        return grouped_linear(x_ri, weight_eoi, ends_e);
    }
    let whole_groups = MAX_GROUPS / (experts / groups);
    if whole_groups == 0 {
        return product_of_one_pool(x_ri, weight_eoi, ends_e);
    }
    // Every token has as many rows in one group as in another, so it is known where those of a group begin.
    let (rows, experts) = (whole_groups * (x_ri.size()[0] / groups), whole_groups * (experts / groups));
    let parts = x_ri
        .split(rows, 0)
        .into_iter()
        .zip(weight_eoi.split(experts, 0))
        .zip(ends_e.split(experts, 0))
        .zip((0..).step_by(rows as usize));
    let products = parts.map(|(((x, weight), ends), start)| grouped_linear(&x, &weight, &(ends - start)));
    Tensor::cat(&products.collect::<Vec<_>>(), 0)
}

/// The same for more experts in one group than a grouped product takes. Only the device knows where the rows of a part
/// begin, and a grouped product begins at the first row: so all rows are turned to begin there, and back.
fn product_of_one_pool(x_ri: &Tensor, weight_eoi: &Tensor, ends_e: &Tensor) -> Tensor {
    let rows = x_ri.size()[0];
    let places = Tensor::arange(rows, (Kind::Int64, x_ri.device()));
    let mut start = ends_e.get(0).zeros_like();
    let mut sum = None;
    for (weight, ends) in weight_eoi.split(MAX_GROUPS, 0).iter().zip(ends_e.split(MAX_GROUPS, 0)) {
        let ends = ends - &start;
        let turned = |by: &Tensor, x: &Tensor| x.index_select(0, &(&places + by).remainder(rows));
        // What lies behind the last row is not written, neither here nor in the backward pass.
        let is_own = places.lt_tensor(&ends.get(-1)).unsqueeze(-1);
        let own = |x: Tensor| x.where_self(&is_own, &x.zeros_like());
        let y = own(grouped_linear(&own(turned(&start, x_ri)), weight, &ends));
        let y = turned(&-&start, &y);
        sum = Some(sum.map_or(y.shallow_clone(), |sum: Tensor| sum + y));
        start += ends.get(-1);
    }
    sum.expect("there are experts")
}
