//! The order in which experts take their rows: a sort and sums on the device.

use m6_runtime::Permutation;
use tch::{Kind, Tensor};

/// Routed rows by expert; those of one expert are first choices before second ones, each in the order of their tokens.
#[derive(Debug)]
pub struct Dispatch {
    /// Between tokens and rows.
    pub permutation: Permutation,
    /// `[r]` the expert of each row.
    experts_r: Tensor,
    /// `[e]` where the rows of each expert end.
    pub ends_e: Tensor,
}

impl Dispatch {
    /// Of choices `[n, a]` among `count` experts.
    pub fn new(experts_na: &Tensor, count: i64) -> Self {
        let choices_r = experts_na.tr().flatten(0, 1);
        let order_r = choices_r.argsort_stable(true, 0, false);
        let experts_r = choices_r.index_select(0, &order_r);
        let ends_e = bounds(&experts_r, count, "right");
        Self { permutation: Permutation::new(order_r, experts_na.size()[0]), experts_r, ends_e }
    }

    /// `[n, a]` 1 for the rows that are taken and 0 for the others, where each of `count` experts takes the first
    /// `capacity` of its rows. Only those of the first `real` tokens are queued, the rest is padding; and of them those that
    /// have a 1 in `wanted_na`, where that is given.
    pub fn taken(&self, count: i64, capacity: i64, real: i64, wanted_na: Option<&Tensor>) -> Tensor {
        let is_real_r = self.permutation.tokens().lt(real).to_kind(Kind::Int64);
        let is_queued_r = match wanted_na {
            Some(wanted_na) => self.permutation.rows(wanted_na).to_kind(Kind::Int64) * is_real_r,
            None => is_real_r,
        };
        let before_r = is_queued_r.cumsum(0, Kind::Int64) - &is_queued_r;
        let starts_r = bounds(&self.experts_r, count, "left").index_select(0, &self.experts_r);
        let queue_r = &before_r - before_r.index_select(0, &starts_r);
        let taken_r = queue_r.lt(capacity).to_kind(Kind::Float) * is_queued_r;
        self.permutation.choices(&taken_r)
    }
}

/// `[e]` where the rows of each expert begin (`left`) or end (`right`).
fn bounds(experts_r: &Tensor, count: i64, side: &str) -> Tensor {
    let each = Tensor::arange(count, (Kind::Int64, experts_r.device()));
    each.searchsorted(experts_r, true, side == "right", side, None::<Tensor>)
}
