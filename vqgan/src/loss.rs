//! What a reconstruction is judged by.
//!
//! The field's perceptual loss is LPIPS, which needs the weights of a VGG network trained on ImageNet. Where the user
//! has them ([`LpipsConfig`]) it is taken. The substitute that needs no weights is the *structural loss*: differences of
//! image gradients at three scales, and 1 - SSIM. It is not LPIPS, and figures under it do not compare with LPIPS
//! figures. Once the discriminator is on, the distance of its activations (feature matching) joins in.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::lpips::{Lpips, LpipsConfig};
use crate::metrics::Ssim;

/// Scales at which image gradients are compared: the full size, a half, a quarter.
const SCALES: usize = 3;

/// Weights of the terms of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossWeights {
    /// Mean absolute difference of pixels (values from -1 to 1).
    pub l1: f64,
    /// Mean squared difference of pixels.
    #[serde(default)]
    pub l2: f64,
    /// LPIPS, whose weights the table `lpips` of the run names.
    #[serde(default)]
    pub lpips: f64,
    /// Structural loss: mean absolute difference of horizontal and vertical image gradients, averaged over scales.
    pub gradient: f64,
    /// Structural loss: 1 - SSIM.
    pub ssim: f64,
    /// Distance of the codes to the encoder's rows; 0 where codes do not learn by it (`codebook.ema`, `gumbel`).
    pub codebook: f64,
    /// Distance of the encoder's rows to their codes; 0 for the quantiser `gumbel`.
    pub commitment: f64,
    /// Entropy of the choice of codes.
    #[serde(default)]
    pub entropy: Option<EntropyLoss>,
}

/// Entropy of the codes at a position less that of their mean over a batch, so that positions are sure of their codes
/// and all codes are in use (MAGVIT-v2, Yu et al. 2023; LlamaGen).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyLoss {
    /// Its weight.
    pub weight: f64,
    /// What the squared distances of rows to codes are divided by before they become probabilities.
    pub temperature: f64,
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
    lpips: Option<Lpips>,
    weights: LossWeights,
}

impl ReconstructionLoss {
    /// # Errors
    /// When the weights of LPIPS cannot be read.
    pub(crate) fn new(
        resolution: i64,
        weights: LossWeights,
        lpips: Option<&LpipsConfig>,
        device: Device,
    ) -> Result<Self> {
        let lpips =
            lpips.filter(|_| weights.lpips > 0.0).map(|lpips| Lpips::load(lpips, device)).transpose()?;
        Ok(Self { ssim: Ssim::new(resolution, resolution, device), lpips, weights })
    }

    /// Terms for reconstructions `y` of `x`, both float32 `[b, 3, h, w]` from -1 to 1. Those without weight are left out,
    /// except the first, which every run shows.
    pub(crate) fn terms(&self, x: &Tensor, y: &Tensor) -> Vec<Term> {
        let LossWeights { l1, l2, lpips: perceptual, gradient, ssim, .. } = self.weights;
        let mut terms = vec![Term { name: "l1", weight: l1, value: (x - y).abs().mean(Kind::Float) }];
        let mut add = |name, weight: f64, value: &dyn Fn() -> Tensor| {
            if weight > 0.0 {
                terms.push(Term { name, weight, value: value() });
            }
        };
        add("l2", l2, &|| (x - y).square().mean(Kind::Float));
        if let Some(lpips) = &self.lpips {
            add("lpips", perceptual, &|| lpips.distance(x, y));
        }
        add("gradient", gradient, &|| gradient_difference(x, y));
        let unit = |t: &Tensor| t * 0.5 + 0.5;
        add("ssim", ssim, &|| 1.0 - self.ssim.forward(&unit(x), &unit(y)).mean(Kind::Float));
        terms
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

    const WEIGHTS: LossWeights = LossWeights {
        l1: 1.0,
        l2: 0.0,
        lpips: 0.0,
        gradient: 2.0,
        ssim: 0.5,
        codebook: 1.0,
        commitment: 0.25,
        entropy: None,
    };

    fn picture(seed: u64) -> Tensor {
        Params::new(Device::Cpu, seed).add("x", &[2, 3, 16, 16], Init::Uniform(1.0), Group::Buffer)
    }

    #[test]
    fn equal_pictures_cost_nothing_and_others_something() {
        let weights = LossWeights { l2: 0.5, ..WEIGHTS };
        let loss = ReconstructionLoss::new(16, weights, None, Device::Cpu).unwrap();
        let names: Vec<_> = loss.terms(&picture(1), &picture(1)).iter().map(|term| term.name).collect();
        assert_eq!(names, ["l1", "l2", "gradient", "ssim"]);
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
