//! Halving and doubling of a feature map's sides.

use m6_runtime::Params;
use m6_runtime::nn::Conv2d;
use tch::Tensor;

/// 3x3 convolution of stride 2. The padding is one column on the right and one row at the bottom: weights trained
/// with it are shifted by half a pixel under a symmetric one.
#[derive(Debug)]
pub(super) struct Downsample {
    conv: Conv2d,
}

impl Downsample {
    pub(super) fn new(params: &Params, channels: i64) -> Self {
        Self { conv: Conv2d::new(&(params / "conv"), channels, channels, 3, 2, 0) }
    }

    /// `[b, c, h, w] -> [b, c, h / 2, w / 2]`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        self.conv.forward(&x.constant_pad_nd([0, 1, 0, 1]))
    }
}

/// Nearest neighbour, then a 3x3 convolution.
#[derive(Debug)]
pub(super) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub(super) fn new(params: &Params, channels: i64) -> Self {
        Self { conv: Conv2d::new(&(params / "conv"), channels, channels, 3, 1, 1) }
    }

    /// `[b, c, h, w] -> [b, c, 2 h, 2 w]`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        let [.., h, w] = size[..] else { unreachable!("a feature map has four axes") };
        self.conv.forward(&x.upsample_nearest2d([2 * h, 2 * w], None, None))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// Output (0, 0) sees input rows and columns 0 to 2, so nothing of it is padding; the last output sees one row
    /// and one column of padding.
    #[test]
    fn padding_is_right_and_bottom_only() {
        let params = Params::new(Device::Cpu, 1);
        let down = Downsample::new(&params, 1);
        let x = Tensor::ones([1, 1, 4, 4], (Kind::Float, Device::Cpu));
        let y = down.forward(&x);
        let entries = params.entries();
        let (bias, kernel) = (&entries[0].1.tensor, &entries[1].1.tensor);
        let whole = kernel.sum(Kind::Float) + bias.sum(Kind::Float);
        let cut = kernel.narrow(2, 0, 2).narrow(3, 0, 2).sum(Kind::Float) + bias.sum(Kind::Float);
        let at = |h: i64, w: i64| y.double_value(&[0, 0, h, w]);
        assert_eq!(y.size(), [1, 1, 2, 2]);
        assert!((at(0, 0) - whole.double_value(&[])).abs() < 1e-6);
        assert!((at(1, 1) - cut.double_value(&[])).abs() < 1e-6);
    }
}
