//! Stacked experts: grouped products over rows that are sorted by expert.

use m6_runtime::fused::grouped_linear;
use m6_runtime::{Group, Init, Params};
use tch::{Device, Tensor};

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
        let parts = parts(self.groups, x_rd.size()[0], ends_e);
        let hidden_rf = self.kind.activate(&product(&x_rd, &self.up_efd, &parts));
        let y_rd = product(&hidden_rf, &self.down_edf, &parts);
        permutation.unpermute(&y_rd, &routing.weights_na)
    }
}

/// Experts, one after the other, that go through one grouped product.
#[derive(Debug)]
struct Part {
    /// How many rows they have.
    rows: i64,
    /// `[e]` where the rows of each end, counted from the first of the part.
    ends_e: Tensor,
}

/// All experts, whose rows end at `ends_e`, in parts of as many as a grouped product takes. More than that in one group
/// make the host wait for the device, which alone knows where the rows of a part end.
fn parts(groups: i64, rows: i64, ends_e: &Tensor) -> Vec<Part> {
    let experts = ends_e.size()[0];
    if experts <= MAX_GROUPS {
        return vec![Part { rows, ends_e: ends_e.shallow_clone() }];
    }
    let group = experts / groups;
    let whole_groups = MAX_GROUPS / group;
    let size = if whole_groups > 0 { whole_groups * group } else { MAX_GROUPS };
    let firsts = (size..experts).step_by(size as usize);
    let mut ends: Vec<i64> = if whole_groups > 0 {
        // Every token has as many rows in one group as in another.
        firsts.map(|first| first * rows / experts).collect()
    } else {
        let lasts = ends_e.slice(0, size - 1, experts - 1, size).to_device(Device::Cpu);
        (0..firsts.count() as i64).map(|part| lasts.int64_value(&[part])).collect()
    };
    ends.push(rows);
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let part =
        |((ends_e, start), end): ((Tensor, i64), &i64)| Part { rows: end - start, ends_e: ends_e - start };
    ends_e.split(size, 0).into_iter().zip(starts).zip(&ends).map(part).collect()
}

/// Rows `[r, i]`, each by the matrix `[o, i]` of its expert.
fn product(x_ri: &Tensor, weight_eoi: &Tensor, parts: &[Part]) -> Tensor {
    if let [all] = parts {
        return grouped_linear(x_ri, weight_eoi, &all.ends_e);
    }
    let sizes = |size: fn(&Part) -> i64| parts.iter().map(size).collect::<Vec<_>>();
    let x = x_ri.split_with_sizes(sizes(|part| part.rows), 0);
    let weights = weight_eoi.split_with_sizes(sizes(|part| part.ends_e.size()[0]), 0);
    let with_rows = x.iter().zip(&weights).zip(parts).filter(|(_, part)| part.rows > 0);
    let products = with_rows.map(|((x, weight), part)| grouped_linear(x, weight, &part.ends_e));
    Tensor::cat(&products.collect::<Vec<_>>(), 0)
}
