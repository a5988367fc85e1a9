//! What a reconstruction is judged by.
//!
//! The field's perceptual loss is LPIPS, which needs the weights of a VGG network trained on ImageNet. This crate has
//! none and takes a substitute that needs no weights, the *structural loss*: differences of image gradients at three
//! scales, and 1 - SSIM. It is not LPIPS, and figures under it do not compare with LPIPS figures. Once the
//! discriminator is on, the distance of its activations (feature matching) joins in.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::metrics::Ssim;

/// Scales at which image gradients are compared: the full size, a half, a quarter.
const SCALES: usize = 3;

/// Weights of the terms of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossWeights {
    /// Mean absolute difference of pixels (values from -1 to 1).
    pub l1: f64,
    /// Structural loss: mean absolute difference of horizontal and vertical image gradients, averaged over scales.
    pub gradient: f64,
    /// Structural loss: 1 - SSIM.
    pub ssim: f64,
    /// Distance of the codes to the encoder's rows.
    pub codebook: f64,
    /// Distance of the encoder's rows to their codes.
    pub commitment: f64,
}

/// One term of a loss: a scalar on the device, its name in the metrics and its weight.
#[derive(Debug)]
pub(crate) struct Term {
    pub(crate) name: &'static str,
    pub(crate) weight: f64,
    pub(crate) value: Tensor,
}

impl Term {
    /// The weighted sum of `terms`.
    pub(crate) fn total(terms: &[Term]) -> Tensor {
        terms.iter().map(|term| &term.value * term.weight).sum()
    }
}

/// Compares reconstructions of one size with their originals.
#[derive(Debug)]
pub(crate) struct ReconstructionLoss {
    ssim: Ssim,
    weights: LossWeights,
}

impl ReconstructionLoss {
    pub(crate) fn new(resolution: i64, weights: LossWeights, device: Device) -> Self {
        Self { ssim: Ssim::new(resolution, resolution, device), weights }
    }

    /// Terms for reconstructions `y` of `x`, both float32 `[b, 3, h, w]` from -1 to 1.
    pub(crate) fn terms(&self, x: &Tensor, y: &Tensor) -> Vec<Term> {
        let unit = |t: &Tensor| t * 0.5 + 0.5;
        let ssim = self.ssim.forward(&unit(x), &unit(y)).mean(Kind::Float);
        vec![
            Term { name: "l1", weight: self.weights.l1, value: (x - y).abs().mean(Kind::Float) },
            Term { name: "gradient", weight: self.weights.gradient, value: gradient_difference(x, y) },
            Term { name: "ssim", weight: self.weights.ssim, value: 1.0 - ssim },
        ]
    }
}

/// Mean absolute difference of the image gradients of `x` and `y`, averaged over [`SCALES`] scales.
fn gradient_difference(x: &Tensor, y: &Tensor) -> Tensor {
    // Gradients are linear, so those of the difference are the difference of those.
    let mut gap = x - y;
    let mut total = gap.zeros_like().sum(Kind::Float);
    for scale in 0..SCALES {
        if scale > 0 {
            gap = gap.avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None);
        }
        for dim in [2, 3] {
            total += gap.diff::<Tensor>(1, dim, None, None).abs().mean(Kind::Float);
        }
    }
    total / SCALES as f64
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init, Params};

    use super::*;

    const WEIGHTS: LossWeights =
        LossWeights { l1: 1.0, gradient: 2.0, ssim: 0.5, codebook: 1.0, commitment: 0.25 };

    fn picture(seed: u64) -> Tensor {
        Params::new(Device::Cpu, seed).add("x", &[2, 3, 16, 16], Init::Uniform(1.0), Group::Buffer)
    }

    #[test]
    fn equal_pictures_cost_nothing_and_others_something() {
        let loss = ReconstructionLoss::new(16, WEIGHTS, Device::Cpu);
        let terms = loss.terms(&picture(1), &picture(1));
        assert!(terms.iter().all(|term| term.value.double_value(&[]).abs() < 1e-6));
        let terms = loss.terms(&picture(1), &picture(2));
        assert!(terms.iter().all(|term| term.value.double_value(&[]) > 0.1));
        let total: f64 = terms.iter().map(|term| term.weight * term.value.double_value(&[])).sum();
        assert!((Term::total(&terms).double_value(&[]) - total).abs() < 1e-5);
    }

    #[test]
    fn the_gradient_of_a_ramp_is_its_slope_at_every_scale() {
        let ramp = Tensor::arange(16, (Kind::Float, Device::Cpu)) * 0.1;
        let x = ramp.expand([1, 3, 16, 16], false).contiguous();
        // Slopes 0.1, 0.2 and 0.4 along one of two axes.
        let difference = gradient_difference(&x, &x.zeros_like()).double_value(&[]);
        assert!((difference - 0.7 / 3.0).abs() < 1e-5, "{difference}");
    }
}
