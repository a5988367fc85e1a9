//! What holds the activations of the discriminator in bounds.

use m6_runtime::nn::{Conv2d, GroupNorm};
use m6_runtime::{Group, Init, Params};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::config::NORM_GROUPS;

const NORM_EPS: f64 = 1e-5;
/// Keeps a vector of zeros from dividing by zero.
const LENGTH_EPS: f64 = 1e-12;

/// What holds the activations of the discriminator in bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiscriminatorNorm {
    /// Group norms: a picture's verdict does not depend on its neighbours in the batch.
    #[default]
    Group,
    /// Batch norms, as in the original (Isola et al. 2017). A picture's verdict depends on the others of its batch,
    /// more so the smaller that is; real pictures and reconstructions are batches of their own.
    Batch,
    /// No norm, and kernels divided by their largest singular value (Miyato et al. 2018).
    Spectral,
}

/// The norm after a convolution.
#[derive(Debug)]
pub(super) enum Norm {
    Group(GroupNorm),
    Batch(BatchNorm),
}

impl Norm {
    /// Over `channels`; none where the kernels are what is normalised.
    pub(super) fn new(kind: DiscriminatorNorm, params: &Params, channels: i64) -> Option<Self> {
        match kind {
            DiscriminatorNorm::Group => {
                Some(Self::Group(GroupNorm::new(params, NORM_GROUPS, channels, NORM_EPS)))
            }
            DiscriminatorNorm::Batch => Some(Self::Batch(BatchNorm::new(params, channels))),
            DiscriminatorNorm::Spectral => None,
        }
    }

    /// Same shape and dtype as `x` `[b, c, h, w]`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Group(norm) => norm.forward(x),
            Self::Batch(norm) => norm.forward(x),
        }
    }
}

/// Batch norm (Ioffe and Szegedy 2015) by the statistics of the batch. There are no running ones, since a discriminator
/// is only ever trained.
#[derive(Debug)]
pub(super) struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
}

impl BatchNorm {
    fn new(params: &Params, channels: i64) -> Self {
        let weight = params.add("weight", &[channels], Init::Ones, Group::NoDecay);
        let bias = params.add("bias", &[channels], Init::Zeros, Group::NoDecay);
        Self { weight, bias }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        const UNUSED_MOMENTUM: f64 = 0.0;
        let (weight, bias) = (Some(&self.weight), Some(&self.bias));
        x.batch_norm(weight, bias, None, None, true, UNUSED_MOMENTUM, NORM_EPS, true)
    }
}

/// A convolution, whose kernel is divided by its largest singular value where that is the norm.
#[derive(Debug)]
pub(super) struct Conv {
    conv: Conv2d,
    spectral: Option<SpectralNorm>,
}

impl Conv {
    pub(super) fn new(norm: DiscriminatorNorm, params: &Params, conv: Conv2d) -> Self {
        let spectral =
            (norm == DiscriminatorNorm::Spectral).then(|| SpectralNorm::new(params, conv.weight().size()[0]));
        Self { conv, spectral }
    }

    /// `[b, in, h, w] -> [b, out, h', w']` in the dtype of `x`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        match &self.spectral {
            Some(spectral) => self.conv.forward_with(x, &spectral.normalise(self.conv.weight())),
            None => self.conv.forward(x),
        }
    }
}

/// Spectral normalisation (Miyato et al. 2018): the largest singular value is followed by one power iteration a pass.
#[derive(Debug)]
struct SpectralNorm {
    /// Where the power iteration has got to, the left singular vector of the largest value: `[out]`.
    u: Tensor,
}

impl SpectralNorm {
    fn new(params: &Params, output: i64) -> Self {
        Self { u: params.add("u", &[output], Init::Normal(1.0), Group::Buffer) }
    }

    /// `kernel` `[out, ..]` over the largest singular value of `[out, rest]`. As in the paper, the singular vectors are
    /// constants to the gradient.
    fn normalise(&self, kernel: &Tensor) -> Tensor {
        let matrix = kernel.flatten(1, -1);
        let (u, v) = self.iterate(&matrix);
        kernel / u.dot(&matrix.mv(&v))
    }

    /// The singular vectors after one more iteration.
    fn iterate(&self, matrix: &Tensor) -> (Tensor, Tensor) {
        let _guard = tch::no_grad_guard();
        let v = unit(&matrix.tr().mv(&self.u));
        let u = unit(&matrix.mv(&v));
        self.u.shallow_clone().copy_(&u);
        (u, v)
    }
}

/// `vector` at length one.
fn unit(vector: &Tensor) -> Tensor {
    vector / vector.square().sum(Kind::Float).sqrt().clamp_min(LENGTH_EPS)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn draw(name: &str, shape: &[i64], group: Group) -> Tensor {
        Params::new(Device::Cpu, 3).add(name, shape, Init::Uniform(1.0), group)
    }

    #[test]
    fn batch_norm_matches_its_formula() {
        let params = Params::new(Device::Cpu, 1);
        let mut norm = BatchNorm::new(&params, 5);
        norm.weight = draw("weight", &[5], Group::NoDecay);
        norm.bias = draw("bias", &[5], Group::NoDecay);
        let x = draw("x", &[4, 5, 3, 2], Group::Buffer) * 3.0 + 1.0;
        let over = [0, 2, 3].as_slice();
        let centred = &x - x.mean_dim(over, true, Kind::Float);
        let variance = centred.square().mean_dim(over, true, Kind::Float);
        let channel = |t: &Tensor| t.view([1, 5, 1, 1]);
        let expected = centred / (variance + NORM_EPS).sqrt() * channel(&norm.weight) + channel(&norm.bias);
        assert!((norm.forward(&x) - expected).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn one_iteration_matches_a_plain_computation() {
        let params = Params::new(Device::Cpu, 1);
        let norm = SpectralNorm::new(&params, 2);
        norm.u.shallow_clone().copy_(&Tensor::from_slice(&[1f32, 0.0]));
        let kernel = Tensor::from_slice(&[3f32, 4.0, 0.0, 5.0]).view([2, 2, 1, 1]);
        // v = (3, 4) / 5; W v = (25, 20) / 5, of length sqrt(41), which is u W v.
        let normalised = Vec::<f32>::try_from(norm.normalise(&kernel).flatten(0, -1)).unwrap();
        let sigma = 41f32.sqrt();
        for (value, expected) in normalised.iter().zip([3.0, 4.0, 0.0, 5.0]) {
            assert!((value - expected / sigma).abs() < 1e-6, "{normalised:?}");
        }
        let u = Vec::<f32>::try_from(&norm.u).unwrap();
        assert!((u[0] - 5.0 / sigma).abs() < 1e-6 && (u[1] - 4.0 / sigma).abs() < 1e-6, "{u:?}");
    }

    #[test]
    fn iterations_reach_the_largest_singular_value_and_its_gradient() {
        let norm = SpectralNorm::new(&Params::new(Device::Cpu, 1), 6);
        let kernel = draw("kernel", &[6, 3, 2, 2], Group::Decay);
        for _ in 0..200 {
            let _ = norm.normalise(&kernel);
        }
        let singular = |t: &Tensor| t.flatten(1, -1).svd(true, true).1;
        let largest = singular(&norm.normalise(&kernel)).max().double_value(&[]);
        assert!((largest - 1.0).abs() < 1e-4, "{largest}");
        // Against libtorch's gradient of the decomposition.
        let probe = draw("probe", &[6, 3, 2, 2], Group::Buffer);
        let gradient = |normalised: Tensor| {
            Tensor::run_backward(&[(normalised * &probe).sum(Kind::Float)], &[&kernel], false, false)
                .remove(0)
        };
        let exact = gradient(&kernel / singular(&kernel).max());
        let gap = (gradient(norm.normalise(&kernel)) - &exact).norm() / exact.norm();
        assert!(gap.double_value(&[]) < 1e-3);
    }
}
