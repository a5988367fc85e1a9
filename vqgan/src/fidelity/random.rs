//! A convolutional network that was never trained.

use m6_runtime::{Group, Init, Params};
use tch::{Device, Kind, Tensor};

use crate::config::COLOURS;

/// Channels of the layers, each of which halves the sides.
const WIDTHS: [i64; 4] = [32, 64, 128, 256];
const KERNEL: i64 = 3;
/// Its weights follow from this number; another one makes another space.
const SEED: u64 = 0;

/// Convolutions with weights as He et al. (2015) start them, without biases, each followed by a rectifier. Naeem et al.
/// (2020) measure with random networks where trained ones have seen other kinds of pictures.
#[derive(Debug)]
pub(super) struct RandomNetwork {
    kernels: Vec<Tensor>,
}

impl RandomNetwork {
    pub(super) fn new(device: Device) -> Self {
        let params = Params::new(device, SEED);
        let mut input = COLOURS;
        let kernels = WIDTHS.iter().enumerate().map(|(layer, &width)| {
            let deviation = (2.0 / (input * KERNEL * KERNEL) as f64).sqrt();
            let shape = [width, input, KERNEL, KERNEL];
            input = width;
            (&params / layer).add("weight", &shape, Init::Normal(deviation), Group::Buffer)
        });
        Self { kernels: kernels.collect() }
    }

    /// The activations of each layer, averaged over the picture, `[b, 480]` float32, of bytes `[b, 3, h, w]`.
    pub(super) fn features(&self, bytes: &Tensor) -> Tensor {
        let mut x = bytes.to_kind(Kind::Float) / 127.5 - 1.0;
        let mut features = Vec::with_capacity(WIDTHS.len());
        for kernel in &self.kernels {
            x = x.conv2d(kernel, None::<&Tensor>, [2, 2], [1, 1], [1, 1], 1).relu();
            features.push(x.mean_dim([2, 3].as_slice(), false, Kind::Float));
        }
        Tensor::cat(&features, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise() -> Tensor {
        Tensor::arange(2 * 3 * 32 * 32, (Kind::Int64, Device::Cpu))
            .remainder(251)
            .to_kind(Kind::Uint8)
            .view([2, 3, 32, 32])
    }

    #[test]
    fn features_are_the_same_every_time_and_one_row_a_picture() {
        let features = RandomNetwork::new(Device::Cpu).features(&noise());
        assert_eq!(features.size(), [2, WIDTHS.iter().sum::<i64>()]);
        assert_eq!(features, RandomNetwork::new(Device::Cpu).features(&noise()));
        let alone = RandomNetwork::new(Device::Cpu).features(&noise().narrow(0, 1, 1));
        assert!((alone - features.narrow(0, 1, 1)).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn blur_is_seen() {
        let features = |bytes: &Tensor| RandomNetwork::new(Device::Cpu).features(bytes);
        let blurred = noise().to_kind(Kind::Float).avg_pool2d([3, 3], [1, 1], [1, 1], false, false, None);
        let gap = (features(&noise()) - features(&blurred)).norm() / features(&noise()).norm();
        assert!(gap.double_value(&[]) > 0.1);
    }
}
