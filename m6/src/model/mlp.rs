//! The dense feed-forward.

use m6_runtime::Params;
use m6_runtime::fused::swiglu;
use m6_runtime::nn::Linear;
use tch::Tensor;

use super::INIT_STD;
use super::attention::linear;
use super::config::FeedForwardKind;

/// `down(act(up(x)))`; of SwiGLU (Shazeer 2020) `down(silu(gate(x)) * up(x))`, gate and up in one product.
#[derive(Debug)]
pub struct Mlp {
    kind: FeedForwardKind,
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// Of `width` to `hidden` and back.
    pub fn new(
        params: &Params,
        kind: FeedForwardKind,
        width: i64,
        hidden: i64,
        out_std: f64,
        has_bias: bool,
    ) -> Self {
        let (name, rows) = kind.up(hidden);
        Self {
            kind,
            up: linear(&(params / name), width, rows, INIT_STD, has_bias),
            down: linear(&(params / "down"), hidden, width, out_std, has_bias),
        }
    }

    /// `[n, d] -> [n, d]`.
    pub fn forward(&self, x_nd: &Tensor) -> Tensor {
        self.down.forward(&self.kind.activate(&self.up.forward(x_nd)))
    }
}

impl FeedForwardKind {
    /// Name and rows of the first matrix of a feed-forward of `hidden` values.
    pub(super) fn up(self, hidden: i64) -> (&'static str, i64) {
        match self {
            Self::Swiglu => ("gate_up", 2 * hidden),
            Self::Gelu => ("up", hidden),
        }
    }

    /// What stands between both matrices: `[.., rows of the first]` to `[.., hidden]`.
    pub(super) fn activate(self, up: &Tensor) -> Tensor {
        match self {
            Self::Swiglu => swiglu(up),
            Self::Gelu => up.gelu("none"),
        }
    }
}
