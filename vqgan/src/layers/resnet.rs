//! The residual block.

use m6_runtime::Params;
use m6_runtime::nn::{Conv2d, GroupNorm};
use tch::Tensor;

use super::norms::{Norms, norm};

/// Norm, swish, convolution, twice; a 1x1 convolution carries the input across where the width changes.
#[derive(Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    nin_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub(super) fn new(params: &Params, input: i64, output: i64) -> Self {
        Self {
            norm1: norm(&(params / "norm1"), input),
            conv1: Conv2d::new(&(params / "conv1"), input, output, 3, 1, 1),
            norm2: norm(&(params / "norm2"), output),
            conv2: Conv2d::new(&(params / "conv2"), output, output, 3, 1, 1),
            nin_shortcut: (input != output)
                .then(|| Conv2d::new(&(params / "nin_shortcut"), input, output, 1, 1, 0)),
        }
    }

    /// `[b, input, h, w] -> [b, output, h, w]`.
    pub(super) fn forward<N: Norms>(&self, x: &Tensor, norms: &mut N) -> Result<Tensor, N::Stop> {
        let h = self.conv1.forward(&norms.swish(&self.norm1, x)?);
        let h = self.conv2.forward(&norms.swish(&self.norm2, &h)?);
        Ok(match &self.nin_shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        })
    }
}
