//! The discriminator with its own optimizer.

use m6_runtime::optim::{Optimizer, OptimizerConfig};
use m6_runtime::{FloatDtype, Params, named_seed};
use tch::{Device, Kind, Tensor};

use super::adversarial::DiscriminatorConfig;
use super::regularise::{LeCam, gradient_penalty};
use crate::augment::Augmentation;
use crate::discriminator::{Discriminator, Verdict};
use crate::error::Result;
use crate::loss::Term;
use crate::model::compute_kind;

/// Less momentum than the model's: the discriminator chases a moving target.
const OPTIMIZER: OptimizerConfig = OptimizerConfig {
    beta1: 0.5,
    beta2: 0.9,
    eps: 1e-8,
    weight_decay: 0.0,
    moments: FloatDtype::Fp32,
    muon_momentum: None,
};

/// Keeps an adversarial loss without a gradient from dividing by zero, as taming-transformers has it.
const BALANCE_EPS: f64 = 1e-4;

/// What a step does with the discriminator.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct CriticPlan {
    /// By how much the model's loss listens to it, 0 to 1.
    pub(super) ratio: f64,
    /// The weight of R1, where the step has it.
    pub(super) r1: Option<f64>,
}

#[derive(Debug)]
pub(super) struct Critic {
    config: DiscriminatorConfig,
    steps: u64,
    pub(super) params: Params,
    pub(super) optimizer: Optimizer,
    discriminator: Discriminator,
    lecam: Option<LeCam>,
    compute: Kind,
}

impl Critic {
    /// For a run of `steps`.
    pub(super) fn new(config: DiscriminatorConfig, steps: u64, device: Device, seed: u64) -> Self {
        let params = Params::new(device, named_seed(seed, "discriminator"));
        let discriminator = Discriminator::new(&params, config.layers, config.norm);
        let mut optimizer = Optimizer::new(&params, OPTIMIZER);
        optimizer.set_lr(config.lr);
        let lecam = (config.lecam > 0.0).then(|| LeCam::new(&(&params / "lecam")));
        Self { config, steps, params, optimizer, discriminator, lecam, compute: compute_kind(device) }
    }

    /// What `step` does with the discriminator, once it is trained.
    pub(super) fn plan(&self, step: u64) -> Option<CriticPlan> {
        let Self { config, steps, .. } = self;
        let plan = CriticPlan { ratio: config.ratio(step, *steps), r1: config.r1_weight(step) };
        config.is_on(step, *steps).then_some(plan)
    }

    /// The model's terms for reconstructions `y` of `x`, `[b, 3, h, w]`; `ratio` is by how much it listens. An adaptive
    /// weight balances the adversarial loss with the model's `others` at the `last_kernel` of its decoder.
    pub(super) fn model_terms(
        &self,
        x: &Tensor,
        y: &Tensor,
        ratio: f64,
        others: &[Term],
        last_kernel: &Tensor,
    ) -> Vec<Term> {
        let DiscriminatorConfig { loss, weight, adaptive_max, feature_matching, .. } = self.config;
        let augmentation = Augmentation::draw(self.config.augment, &x.size(), x.device());
        self.params.set_trainable(false);
        let fake = self.judge(&augmentation, y);
        let mut adversarial =
            Term { name: "adversarial", weight: weight * ratio, value: fake.generator_loss(loss) };
        let mut terms = Vec::new();
        if let Some(max) = adaptive_max {
            let factor = balance(&Term::total(others), &adversarial.value, last_kernel, max);
            adversarial.value = scale_gradient(&adversarial.value, &factor);
            terms.push(Term { name: "adaptive_weight", weight: 0.0, value: factor });
        }
        terms.push(adversarial);
        if feature_matching > 0.0 {
            let features = fake.feature_loss(&self.judge(&augmentation, x));
            terms.push(Term { name: "feature_matching", weight: feature_matching * ratio, value: features });
        }
        self.params.set_trainable(true);
        terms
    }

    /// The discriminator's own terms, with R1 of the weight `r1` where there is one, and by how much its scores tell `x`
    /// from reconstructions `y`.
    pub(super) fn own_terms(&self, x: &Tensor, y: &Tensor, r1: Option<f64>) -> Vec<Term> {
        let augmentation = Augmentation::draw(self.config.augment, &x.size(), x.device());
        let (real, fake) = (self.judge(&augmentation, x), self.judge(&augmentation, &y.detach()));
        let margin = real.logits.mean(Kind::Float) - fake.logits.mean(Kind::Float);
        let mut terms = vec![
            Term {
                name: "discriminator",
                weight: 1.0,
                value: real.discriminator_loss(&fake, self.config.loss),
            },
            Term { name: "discriminator_margin", weight: 0.0, value: margin.detach() },
        ];
        if let Some(lecam) = &self.lecam {
            let value = lecam.penalty(&real.logits, &fake.logits);
            terms.push(Term { name: "lecam", weight: self.config.lecam, value });
        }
        if let Some(weight) = r1 {
            // In float32: the kernels for bf16 have no second derivatives.
            let score = |shown: &Tensor| self.discriminator.forward(shown).scores();
            let value = gradient_penalty(&augmentation.apply(x), score);
            terms.push(Term { name: "r1", weight, value });
        }
        terms
    }

    /// One update from the gradients so far.
    pub(super) fn step(&mut self, clip: f64) -> Result<()> {
        let _ = self.optimizer.step(clip)?;
        Ok(self.optimizer.zero_grad()?)
    }

    fn judge(&self, augmentation: &Augmentation, pictures: &Tensor) -> Verdict {
        self.discriminator.forward(&augmentation.apply(pictures).to_kind(self.compute))
    }
}

/// The length of the gradient of `loss` at `last_kernel` over that of `adversarial`, at most `max` (VQGAN, Esser et al.
/// 2021): a scalar on the device, without a gradient. Only what lies between the two and the kernel is gone through,
/// and both can be gone through again.
fn balance(loss: &Tensor, adversarial: &Tensor, last_kernel: &Tensor, max: f64) -> Tensor {
    let length = |loss: &Tensor| Tensor::run_backward(&[loss], &[last_kernel], true, false)[0].norm();
    (length(loss) / (length(adversarial) + BALANCE_EPS)).clamp_max(max)
}

/// `value`, whose gradient is `factor` times as large.
fn scale_gradient(value: &Tensor, factor: &Tensor) -> Tensor {
    let constant = value.detach();
    (value - &constant) * factor + constant
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init};

    use super::super::adversarial::tests::plain;
    use super::*;

    #[test]
    fn the_balance_is_the_ratio_of_two_lengths_and_leaves_no_gradient() {
        let kernel = Tensor::from_slice(&[1f32, -2.0, 0.5]).set_requires_grad(true);
        // Gradients (2, -4, 4), of length 6, and (0.3, 0, 0.4), of length 0.5.
        let loss = (&kernel * Tensor::from_slice(&[2f32, -4.0, 4.0])).sum(Kind::Float);
        let adversarial = (&kernel * Tensor::from_slice(&[0.3f32, 0.0, 0.4])).sum(Kind::Float);
        let factor = |max| balance(&loss, &adversarial, &kernel, max).double_value(&[]);
        assert!((factor(100.0) - 6.0 / (0.5 + BALANCE_EPS)).abs() < 1e-4);
        assert_eq!(factor(10.0), 10.0);
        assert!(!kernel.grad().defined());
    }

    #[test]
    fn a_scaled_gradient_leaves_the_value() {
        let x = Tensor::from(3f32).set_requires_grad(true);
        let y = scale_gradient(&x.square(), &Tensor::from(0.25f32));
        y.backward();
        assert_eq!((y.double_value(&[]), x.grad().double_value(&[])), (9.0, 1.5));
    }

    #[test]
    fn penalties_join_the_discriminators_own_terms() {
        let config = DiscriminatorConfig { lecam: 0.1, r1: 10.0, r1_every: 2, ..plain() };
        let critic = Critic::new(config, 100, Device::Cpu, 1);
        let draw = |seed| {
            Params::new(Device::Cpu, seed).add("x", &[2, 3, 32, 32], Init::Uniform(1.0), Group::Buffer)
        };
        let weights = |step| -> Vec<(&str, f64)> {
            let terms = critic.own_terms(&draw(1), &draw(2), critic.config.r1_weight(step));
            terms.iter().map(|term| (term.name, term.weight)).collect()
        };
        let plain = [("discriminator", 1.0), ("discriminator_margin", 0.0), ("lecam", 0.1)];
        assert_eq!(weights(0), plain);
        assert_eq!(weights(1), [&plain[..], &[("r1", 10.0)]].concat());
    }

    /// With weight 1 the adversarial loss moves the last kernel as far as the other terms do.
    #[test]
    fn an_adaptive_weight_levels_the_gradients_at_the_last_kernel() {
        let config =
            DiscriminatorConfig { adaptive_max: Some(1e9), weight: 1.0, feature_matching: 0.0, ..plain() };
        let critic = Critic::new(config, 100, Device::Cpu, 1);
        let params = Params::new(Device::Cpu, 2);
        let draw = |name, shape: &[i64], group| params.add(name, shape, Init::Uniform(1.0), group);
        let x = draw("x", &[2, 3, 32, 32], Group::Buffer);
        let kernel = draw("kernel", &[3, 3, 1, 1], Group::Decay);
        let y = x.conv2d(&kernel, None::<&Tensor>, [1, 1], [0, 0], [1, 1], 1);
        let others = [Term { name: "l1", weight: 3.0, value: (&x - &y).abs().mean(Kind::Float) }];
        let terms = critic.model_terms(&x, &y, 1.0, &others, &kernel);
        let names: Vec<_> = terms.iter().map(|term| (term.name, term.weight)).collect();
        assert_eq!(names, [("adaptive_weight", 0.0), ("adversarial", 1.0)]);
        let length = |terms: &[Term]| {
            Tensor::run_backward(&[Term::total(terms)], &[&kernel], true, false)[0].norm().double_value(&[])
        };
        let (own, adversarial) = (length(&others), length(&terms));
        assert!((adversarial / own - 1.0).abs() < 0.01, "{adversarial} against {own}");
    }
}
