//! The group norms, and where they take their moments from.

use std::convert::Infallible;

use m6_runtime::Params;
use m6_runtime::nn::GroupNorm;
use tch::Tensor;

use crate::config::NORM_GROUPS;

const NORM_EPS: f64 = 1e-6;

pub(super) fn norm(params: &Params, channels: i64) -> GroupNorm {
    GroupNorm::new(params, NORM_GROUPS, channels, NORM_EPS)
}

/// Computes the norms of one pass, in the order of the layers.
pub(crate) trait Norms {
    /// Why the pass cannot go on.
    type Stop;

    /// `norm` of `x`, then swish.
    fn swish(&mut self, norm: &GroupNorm, x: &Tensor) -> Result<Tensor, Self::Stop>;
}

/// Moments are those of the input.
#[derive(Debug)]
pub(crate) struct Own;

impl Norms for Own {
    type Stop = Infallible;

    fn swish(&mut self, norm: &GroupNorm, x: &Tensor) -> Result<Tensor, Infallible> {
        Ok(norm.forward_swish(x))
    }
}
