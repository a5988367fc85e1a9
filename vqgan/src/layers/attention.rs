//! Attention over the positions of a feature map.

use m6_runtime::Params;
use m6_runtime::nn::{Conv2d, GroupNorm};
use tch::Tensor;

use super::norms::norm;

/// The scores of all pairs of more positions take over 256 MiB.
const LONG: i64 = 1 << 13;

/// One head over all positions, with 1x1 convolutions as projections.
#[derive(Debug)]
pub(super) struct AttnBlock {
    norm: GroupNorm,
    q: Conv2d,
    k: Conv2d,
    v: Conv2d,
    proj_out: Conv2d,
}

impl AttnBlock {
    pub(super) fn new(params: &Params, channels: i64) -> Self {
        let projection = |name: &str| Conv2d::new(&(params / name), channels, channels, 1, 1, 0);
        Self {
            norm: norm(&(params / "norm"), channels),
            q: projection("q"),
            k: projection("k"),
            v: projection("v"),
            proj_out: projection("proj_out"),
        }
    }

    /// Same shape and dtype as `x`, `[b, c, h, w]`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let normed = self.norm.forward(x);
        // [b, c, h, w] -> [b, 1 head, t, c]
        let heads = |conv: &Conv2d| {
            let heads = conv.forward(&normed).flatten(2, 3).transpose(1, 2).unsqueeze(1);
            // The CPU's kernel that keeps no scores takes rows of adjacent values only.
            if heads.size()[2] > LONG { heads.contiguous() } else { heads }
        };
        let attended = Tensor::scaled_dot_product_attention::<Tensor>(
            &heads(&self.q),
            &heads(&self.k),
            &heads(&self.v),
            None,
            0.0,
            false,
            None,
            false,
        );
        x + self.proj_out.forward(&attended.squeeze_dim(1).transpose(1, 2).reshape_as(x))
    }
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init};
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn matches_softmax_of_scaled_products() {
        let params = Params::new(Device::Cpu, 1);
        let block = AttnBlock::new(&(&params / "attn"), 32);
        for (name, h, w) in [("few", 3, 4), ("many", 64, LONG / 64 + 1)] {
            let x = params.add(name, &[2, 32, h, w], Init::Normal(1.0), Group::Buffer);
            let normed = block.norm.forward(&x);
            let flat = |conv: &Conv2d| conv.forward(&normed).flatten(2, 3);
            let first = |x: &Tensor| x.narrow(2, 0, 12);
            let weights = first(&flat(&block.q)).transpose(1, 2).matmul(&flat(&block.k)) / 32f64.sqrt();
            let weights = weights.softmax(-1, Kind::Float);
            let attended = flat(&block.v).matmul(&weights.transpose(1, 2)).unsqueeze(-1);
            let expected = first(&x.flatten(2, 3)) + block.proj_out.forward(&attended).squeeze_dim(-1);
            let gap = first(&block.forward(&x).flatten(2, 3)) - expected;
            assert!(gap.abs().max().double_value(&[]) < 1e-5, "{name}");
        }
    }
}
