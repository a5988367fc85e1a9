//! The discriminator with its own optimizer.

use m6_runtime::optim::{Optimizer, OptimizerConfig};
use m6_runtime::{Params, named_seed};
use tch::{Device, Kind, Tensor};

use super::config::DiscriminatorConfig;
use crate::augment::Augmentation;
use crate::discriminator::{Discriminator, Verdict};
use crate::error::Result;
use crate::loss::Term;
use crate::model::compute_kind;

/// Less momentum than the model's: the discriminator chases a moving target.
const OPTIMIZER: OptimizerConfig =
    OptimizerConfig { beta1: 0.5, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, muon_momentum: None };

#[derive(Debug)]
pub(super) struct Critic {
    config: DiscriminatorConfig,
    steps: u64,
    pub(super) params: Params,
    pub(super) optimizer: Optimizer,
    discriminator: Discriminator,
    compute: Kind,
}

impl Critic {
    /// For a run of `steps`.
    pub(super) fn new(config: DiscriminatorConfig, steps: u64, device: Device, seed: u64) -> Self {
        let params = Params::new(device, named_seed(seed, "discriminator"));
        let discriminator = Discriminator::new(&params, config.layers);
        let optimizer = Optimizer::new(&params, OPTIMIZER);
        Self { config, steps, params, optimizer, discriminator, compute: compute_kind(device) }
    }

    /// Whether the discriminator is trained at `step`.
    pub(super) fn is_on(&self, step: u64) -> bool {
        self.config.is_on(step, self.steps)
    }

    /// By how much the model's loss listens to it at `step`, 0 to 1.
    pub(super) fn ratio(&self, step: u64) -> f64 {
        self.config.ratio(step, self.steps)
    }

    /// The model's terms for reconstructions `y` of `x`, `[b, 3, h, w]`; `ratio` is by how much it listens.
    pub(super) fn model_terms(&self, x: &Tensor, y: &Tensor, ratio: f64) -> Vec<Term> {
        let DiscriminatorConfig { loss, weight, feature_matching, .. } = self.config;
        let augmentation = Augmentation::draw(&x.size(), x.device());
        self.params.set_trainable(false);
        let fake = self.judge(&augmentation, y);
        let mut terms =
            vec![Term { name: "adversarial", weight: weight * ratio, value: fake.generator_loss(loss) }];
        if feature_matching > 0.0 {
            let features = fake.feature_loss(&self.judge(&augmentation, x));
            terms.push(Term { name: "feature_matching", weight: feature_matching * ratio, value: features });
        }
        self.params.set_trainable(true);
        terms
    }

    /// The discriminator's own term, and by how much its scores tell `x` from reconstructions `y`.
    pub(super) fn own_terms(&self, x: &Tensor, y: &Tensor) -> Vec<Term> {
        let augmentation = Augmentation::draw(&x.size(), x.device());
        let (real, fake) = (self.judge(&augmentation, x), self.judge(&augmentation, &y.detach()));
        let margin = real.logits.mean(Kind::Float) - fake.logits.mean(Kind::Float);
        vec![
            Term {
                name: "discriminator",
                weight: 1.0,
                value: real.discriminator_loss(&fake, self.config.loss),
            },
            Term { name: "discriminator_margin", weight: 0.0, value: margin.detach() },
        ]
    }

    /// One update from the gradients so far.
    pub(super) fn step(&mut self, clip: f64) -> Result<()> {
        let norm = self.optimizer.clip_grad_norm(clip)?;
        self.optimizer.step(self.config.lr, &norm)?;
        Ok(self.optimizer.zero_grad()?)
    }

    fn judge(&self, augmentation: &Augmentation, pictures: &Tensor) -> Verdict {
        self.discriminator.forward(&augmentation.apply(pictures).to_kind(self.compute))
    }
}
