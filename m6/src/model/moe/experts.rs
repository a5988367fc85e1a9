//! Stacked experts: dispatch by a device-side sort and grouped products.

use m6_runtime::{Group, Init, Params};
use tch::{Kind, Tensor};

use super::router::Routing;
use crate::model::INIT_STD;
use crate::model::config::FeedForwardKind;

/// The weights of all experts.
#[derive(Debug)]
pub struct Experts {
    kind: FeedForwardKind,
    /// Of SwiGLU the gate's rows, then those of the other half.
    pub(super) up_efd: Tensor,
    pub(super) down_edf: Tensor,
}

impl Experts {
    /// `count` experts of `width` to `hidden` and back.
    pub fn new(
        params: &Params,
        kind: FeedForwardKind,
        count: i64,
        width: i64,
        hidden: i64,
        out_std: f64,
    ) -> Self {
        let (e, d, f) = (count, width, hidden);
        let (name, rows) = kind.up(f);
        Self {
            kind,
            up_efd: params.add(name, &[e, rows, d], Init::Normal(INIT_STD), Group::Hidden),
            down_edf: params.add("down", &[e, d, f], Init::Normal(out_std), Group::Hidden),
        }
    }

    /// `[n, d] -> [n, d]`: the weighted sum of what its experts make of each token.
    pub fn forward(&self, x_nd: &Tensor, routing: &Routing) -> Tensor {
        let experts_r = routing.experts_na.flatten(0, 1);
        let order_r = experts_r.argsort_stable(true, 0, false);
        let tokens_r = order_r.floor_divide_scalar(routing.experts_na.size()[1]);
        let sorted_r = experts_r.index_select(0, &order_r);
        let each = Tensor::arange(self.down_edf.size()[0], (Kind::Int64, x_nd.device()));
        let ends_e = each.searchsorted(&sorted_r, true, true, "right", None::<Tensor>);

        let kind = x_nd.kind();
        let product = |x: &Tensor, weight: &Tensor| {
            x.internal_grouped_mm(&weight.to_kind(kind).transpose(1, 2), Some(&ends_e), None, None)
        };
        let x_rd = x_nd.index_select(0, &tokens_r);
        let hidden_rf = self.kind.activate(&product(&x_rd, &self.up_efd));
        let weights_r =
            routing.weights_na.flatten(0, 1).index_select(0, &order_r).unsqueeze(-1).to_kind(kind);
        let y_rd = product(&hidden_rf, &self.down_edf) * weights_r;
        x_nd.zeros_like().index_add(0, &tokens_r, &y_rd)
    }
}
