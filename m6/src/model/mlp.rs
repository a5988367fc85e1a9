//! The dense feed-forward: SwiGLU (Shazeer 2020).

use m6_runtime::fused::swiglu;
use m6_runtime::nn::Linear;
use m6_runtime::{Init, Params};
use tch::Tensor;

use super::INIT_STD;

/// `down(silu(gate(x)) * up(x))`, gate and up in one product.
#[derive(Debug)]
pub struct Mlp {
    gate_up: Linear,
    down: Linear,
}

impl Mlp {
    /// Of `width` to `hidden` and back.
    pub fn new(params: &Params, width: i64, hidden: i64, out_std: f64) -> Self {
        Self {
            gate_up: Linear::without_bias(&(params / "gate_up"), width, 2 * hidden, Init::Normal(INIT_STD)),
            down: Linear::without_bias(&(params / "down"), hidden, width, Init::Normal(out_std)),
        }
    }

    /// `[n, d] -> [n, d]`.
    pub fn forward(&self, x_nd: &Tensor) -> Tensor {
        self.down.forward(&swiglu(&self.gate_up.forward(x_nd)))
    }
}
