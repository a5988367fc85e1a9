//! The PatchGAN discriminator (Isola et al. 2017): tells real patches from reconstructed ones.

mod norm;

use m6_runtime::Params;
use m6_runtime::fused::{channels_last, leaky_relu};
use m6_runtime::nn::Conv2d;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use norm::DiscriminatorNorm;

use crate::config::COLOURS;
use norm::{Conv, Norm};

/// Channels of the first layer, doubled by each further one up to eight times.
const WIDTH: i64 = 64;
const MAX_MULTIPLE: i64 = 8;
const KERNEL: i64 = 4;
const LEAK: f64 = 0.2;

/// What the discriminator minimises, and what the model does about its scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdversarialLoss {
    /// Real patches should score 1 or more, others -1 or less (Lim and Ye 2017); the model raises the scores of its
    /// own.
    #[default]
    Hinge,
    /// Cross-entropy of the sigmoids of the scores; the model raises the scores of its own (taming-transformers).
    Vanilla,
    /// The same, and the model minimises the negative logarithm of the sigmoids of its own (Goodfellow et al. 2014).
    NonSaturating,
}

/// Convolutions of kernel 4.
#[derive(Debug)]
pub(crate) struct Discriminator {
    hidden: Vec<Hidden>,
    verdict: Conv,
}

#[derive(Debug)]
struct Hidden {
    conv: Conv,
    norm: Option<Norm>,
}

/// What the discriminator makes of a batch.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// Activations of each hidden layer.
    features: Vec<Tensor>,
    /// One score a patch, float32 `[b, 1, h', w']`, high for real patches.
    pub(crate) logits: Tensor,
}

impl Discriminator {
    /// `layers` of stride 2, then one of stride 1 and the scores.
    pub(crate) fn new(params: &Params, layers: i64, norm: DiscriminatorNorm) -> Self {
        let conv = |params: &Params, input, output, stride| {
            Conv::new(norm, params, Conv2d::new(params, input, output, KERNEL, stride, 1))
        };
        let mut width = COLOURS;
        let hidden = (0..=layers).map(|layer| {
            let input = std::mem::replace(&mut width, WIDTH * (1 << layer).min(MAX_MULTIPLE));
            let stride = if layer < layers { 2 } else { 1 };
            let norm = (layer > 0).then(|| Norm::new(norm, &(params / "norm" / layer), width));
            Hidden { conv: conv(&(params / "conv" / layer), input, width, stride), norm: norm.flatten() }
        });
        let hidden = hidden.collect();
        Self { hidden, verdict: conv(&(params / "verdict"), width, 1, 1) }
    }

    /// Judges pictures `[b, 3, h, w]` from -1 to 1 in their dtype.
    pub(crate) fn forward(&self, x: &Tensor) -> Verdict {
        let mut features: Vec<Tensor> = Vec::with_capacity(self.hidden.len());
        let x = &channels_last(x);
        for Hidden { conv, norm } in &self.hidden {
            let x = conv.forward(features.last().unwrap_or(x));
            let x = norm.as_ref().map_or_else(|| x.shallow_clone(), |norm| norm.forward(&x));
            features.push(leaky_relu(&x, LEAK));
        }
        let logits = self.verdict.forward(features.last().unwrap_or(x)).to_kind(Kind::Float);
        Verdict { features, logits }
    }
}

impl Verdict {
    /// One score a picture, `[b]`: the mean of those of its patches.
    pub(crate) fn scores(&self) -> Tensor {
        self.logits.mean_dim([1, 2, 3].as_slice(), false, Kind::Float)
    }

    /// What the discriminator minimises; `self` judges real pictures.
    pub(crate) fn discriminator_loss(&self, fake: &Verdict, loss: AdversarialLoss) -> Tensor {
        let penalty = |wrong: Tensor| match loss {
            AdversarialLoss::Hinge => (1.0f64 + wrong).relu(),
            AdversarialLoss::Vanilla | AdversarialLoss::NonSaturating => wrong.softplus(),
        };
        let real = penalty(-&self.logits).mean(Kind::Float);
        let fake = penalty(fake.logits.shallow_clone()).mean(Kind::Float);
        (real + fake) * 0.5
    }

    /// What the generator minimises; `self` judges its pictures.
    pub(crate) fn generator_loss(&self, loss: AdversarialLoss) -> Tensor {
        match loss {
            AdversarialLoss::Hinge | AdversarialLoss::Vanilla => -self.logits.mean(Kind::Float),
            AdversarialLoss::NonSaturating => (-&self.logits).softplus().mean(Kind::Float),
        }
    }

    /// Mean absolute difference to the activations of the real pictures, averaged over layers (feature matching,
    /// Salimans et al. 2016; no gradient to the real side).
    pub(crate) fn feature_loss(&self, real: &Verdict) -> Tensor {
        let gaps = self.features.iter().zip(&real.features);
        let gaps: Vec<Tensor> = gaps
            .map(|(fake, real)| (fake - real.detach()).to_kind(Kind::Float).abs().mean(Kind::Float))
            .collect();
        Tensor::stack(&gaps, 0).mean(Kind::Float)
    }
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init};
    use tch::Device;

    use super::*;

    fn verdict(logits: &[f32]) -> Verdict {
        Verdict { features: Vec::new(), logits: Tensor::from_slice(logits) }
    }

    #[test]
    fn hinge_losses_match_their_formulas() {
        let (real, fake) = (verdict(&[2.0, 0.5, -1.0]), verdict(&[-2.0, 0.5]));
        // real: (0 + 0.5 + 2) / 3; fake: (0 + 1.5) / 2
        let loss = real.discriminator_loss(&fake, AdversarialLoss::Hinge).double_value(&[]);
        assert!((loss - 0.5 * (2.5 / 3.0 + 0.75)).abs() < 1e-6, "{loss}");
        let loss = fake.generator_loss(AdversarialLoss::Hinge).double_value(&[]);
        assert!((loss - 0.75).abs() < 1e-6, "{loss}");
    }

    #[test]
    fn losses_of_probabilities_match_their_formulas() {
        // Logits of which the sigmoids are 3/4, 1/2 and 1/5.
        let (real, fake) = (verdict(&[3f32.ln(), 0.0]), verdict(&[-4f32.ln()]));
        // -ln of what is given to the truth: 3/4 and 1/2 for the real patches, 1 - 1/5 for the other.
        let own = 0.5 * (-0.5 * (0.75f64.ln() + 0.5f64.ln()) - 0.8f64.ln());
        for (loss, expected) in
            [(AdversarialLoss::Vanilla, 4f64.ln()), (AdversarialLoss::NonSaturating, -0.2f64.ln())]
        {
            assert!((real.discriminator_loss(&fake, loss).double_value(&[]) - own).abs() < 1e-6, "{loss:?}");
            assert!((fake.generator_loss(loss).double_value(&[]) - expected).abs() < 1e-6, "{loss:?}");
        }
    }

    #[test]
    fn scores_are_one_a_patch_and_features_can_be_matched() {
        for norm in [DiscriminatorNorm::Group, DiscriminatorNorm::Batch, DiscriminatorNorm::Spectral] {
            let params = Params::new(Device::Cpu, 1);
            let discriminator = Discriminator::new(&(&params / "d"), 2, norm);
            let x = params.add("x", &[2, 3, 32, 32], Init::Uniform(1.0), Group::Decay);
            let fake = discriminator.forward(&x);
            assert_eq!(fake.logits.size(), [2, 1, 6, 6]);
            let real = discriminator.forward(&(&x * 0.5).detach());
            assert_eq!(fake.feature_loss(&fake).double_value(&[]), 0.0);
            fake.feature_loss(&real).backward();
            assert!(x.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
        }
    }

    #[test]
    fn pictures_depend_on_their_neighbours_where_norms_go_over_the_batch() {
        let gap = |norm| {
            let params = Params::new(Device::Cpu, 1);
            let judge =
                |x: &Tensor| Discriminator::new(&Params::new(Device::Cpu, 1), 2, norm).forward(x).logits;
            let x = params.add("x", &[2, 3, 32, 32], Init::Uniform(1.0), Group::Buffer);
            (judge(&x).get(0) - judge(&x.narrow(0, 0, 1))).abs().max().double_value(&[])
        };
        assert!(gap(DiscriminatorNorm::Group) < 1e-5);
        assert!(gap(DiscriminatorNorm::Spectral) < 1e-5);
        assert!(gap(DiscriminatorNorm::Batch) > 1e-3);
    }
}
