//! The norm between layers, of the kind that the config names.

use m6_runtime::Params;
use m6_runtime::nn::{LayerNorm, RmsNorm};
use tch::Tensor;

use super::config::{ModelConfig, NormKind};

/// A norm over the model's width.
#[derive(Debug)]
pub enum Norm {
    Rms(RmsNorm),
    Layer(LayerNorm),
}

impl Norm {
    pub fn new(params: &Params, config: &ModelConfig) -> Self {
        match config.norm {
            NormKind::Rms => Self::Rms(RmsNorm::new(params, config.width, config.norm_eps)),
            NormKind::Layer => Self::Layer(LayerNorm::new(params, config.width, config.norm_eps)),
        }
    }

    /// Same shape and dtype as `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Rms(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
        }
    }

    /// `x + residual`, and its norm.
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> (Tensor, Tensor) {
        match self {
            Self::Rms(norm) => norm.forward_sum(x, residual),
            Self::Layer(norm) => norm.forward_sum(x, residual),
        }
    }
}
